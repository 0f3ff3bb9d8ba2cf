"""The plan: what fits where, how much is computed at once, and what is said about it."""

import dataclasses
import itertools
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import transformers
from recorded_steps import find_peak, make_config, record, record_device

from sft import devices
from sft.errors import UserError
from sft.limits import can_fit, choose_host_memory
from sft.memory_model import (
    QWEN2_SIZES,
    Job,
    count_parameters,
    list_modules,
    make_share,
    peak_bytes,
    step_memory,
)
from sft.placement import make_device_map, place_by_memory, place_by_time
from sft.plan import check_plan, plan_run
from sft.plan_report import describe_plan, suggest_schedule
from sft.precision import choose_precision
from sft.step_time import busy_share, device_time, min_pipeline_tokens, training_flops
from sft.throughput import GIB

AMPERE = (8, 0)
VOLTA = (7, 0)
MAX_LEN = 8192
STATE = ("state",)
GRADIENTS = ("state", "gradients")


def make_job(name: str = "Qwen2-7B", capability=AMPERE, optim: str = "auto", **options) -> Job:
    precision = choose_precision(capability, False, optim)
    return Job(config=QWEN2_SIZES[name], precision=precision, **options)


def plan(
    gpus: str | None = "1x80",
    *,
    lengths=(MAX_LEN,),
    num_examples: int = 2000,
    processes: int = 1,
    model: str = "Qwen2-7B",
    **changes,
):
    """Return the Plan of a run whose examples have these lengths in turn, 60 % of them trained."""
    args = SimpleNamespace(
        gpus=gpus,
        fp32=False,
        optim="auto",
        max_len=MAX_LEN,
        tokens_per_forward=None,
        gradient_checkpointing=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=max(1, 32 // processes),
        num_train_epochs=1.0,
        max_steps=-1,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=2,
        eval_strategy="no",
        eval_steps=None,
        logging_steps=1,
        output_dir="outputs",
        resume=False,
    )
    for name, value in changes.items():
        setattr(args, name, value)
    training_args = SimpleNamespace(
        **vars(args), world_size=processes, device=torch.device("cpu"), use_cpu=False
    )
    repeated = np.resize(np.array(lengths, dtype=np.int32), num_examples)
    num_trained_tokens = int(0.6 * repeated.sum())
    return plan_run(QWEN2_SIZES[model], args, training_args, repeated, num_trained_tokens)


def describe(made, num_forward_passes: int = 16) -> str:
    return "\n".join(describe_plan(made, num_forward_passes))


@pytest.fixture
def this_machine(monkeypatch):
    """A CPU with 200 GiB free, and 1,000 GB of disk; its figures can be changed."""
    machine = SimpleNamespace(available=200 * GIB, free=1000e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(devices, "list_limits", lambda: [])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: machine)
    return machine


@pytest.fixture
def one_gpu(this_machine, monkeypatch):
    """A function: GiB of a GPU of this machine, and of its host, to find_devices finding them."""

    def make(gib: float, host_gib: float = 200) -> None:
        found = devices.Devices(
            kind="cuda",
            names=["NVIDIA A100-SXM4-80GB"],
            free_bytes=[gib * GIB],
            capability=AMPERE,
            num_processes=1,
            is_assumed=False,
            host_free_bytes=host_gib * GIB,
        )
        monkeypatch.setattr("sft.plan.find_devices", lambda args, training_args: found)

    return make


# ---- Which GPU holds what -----------------------------------------------------------------------
def list_splits(modules: list[str], num_devices: int) -> list[list[list[str]]]:
    """Return all ways to give modules to devices, in their order."""
    splits = []
    cuts = itertools.combinations_with_replacement(range(len(modules) + 1), num_devices - 1)
    for inner in cuts:
        ends = [0, *inner, len(modules)]
        splits.append([modules[a:b] for a, b in itertools.pairwise(ends)])
    return splits


def fullness(job, split, capacities, tokens, options) -> float:
    peaks = [peak_bytes(job, modules, tokens, **options) for modules in split]
    return max(peak / capacity for peak, capacity in zip(peaks, capacities))


def list_times(job, split) -> list[float]:
    times = []
    for modules in split:
        if modules:
            times.append(device_time(job.config, make_share(job.config, modules), 0.6))
    return times


def draw_placement_case(seed: int):
    """Return a small model, devices of unlike sizes, and options of a step."""
    rng = random.Random(seed)
    name = rng.choice(["Qwen2-7B", "Qwen2-0.5B"])
    sizes = dataclasses.replace(QWEN2_SIZES[name], num_hidden_layers=rng.randint(1, 6))
    job = dataclasses.replace(make_job(), config=sizes)
    tokens = rng.choice([1, 700, 30000])
    options = {"recompute": rng.random() < 0.5, "window_tokens": 4 * tokens}
    whole = peak_bytes(job, list_modules(sizes), tokens, **options)
    num_devices = rng.randint(1, 4)
    capacities = [whole * rng.uniform(0.3, 1.2) for _ in range(num_devices)]
    return job, capacities, tokens, options


@pytest.mark.parametrize("seed", range(20))
def test_no_other_split_leaves_the_fullest_gpu_less_full(seed):
    job, capacities, tokens, options = draw_placement_case(seed)
    ours = place_by_memory(job, capacities, tokens, **options)
    splits = list_splits(list_modules(job.config), len(capacities))
    best = min(fullness(job, split, capacities, tokens, options) for split in splits)
    assert fullness(job, ours, capacities, tokens, options) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_split_that_fits_is_faster_or_more_even(seed):
    job, capacities, tokens, options = draw_placement_case(seed)
    ours = place_by_time(job, capacities, tokens, 0.6, **options)
    fitting = []
    for split in list_splits(list_modules(job.config), len(capacities)):
        if fullness(job, split, capacities, tokens, options) <= 1:
            fitting.append(split)
    if not fitting:
        assert ours is None
        return
    assert ours in fitting
    slowest = min(max(list_times(job, split)) for split in fitting)
    assert max(list_times(job, ours)) == pytest.approx(slowest)
    equally_fast = [x for x in fitting if max(list_times(job, x)) <= slowest * (1 + 1e-9)]
    unevenness = min(sum(time**2 for time in list_times(job, split)) for split in equally_fast)
    assert sum(time**2 for time in list_times(job, ours)) == pytest.approx(unevenness)


def test_layers_go_by_even_time_and_not_by_even_memory():
    """The head counts as 1.4 layers, the embedding as none."""
    by_device = plan("4x80", lengths=[1000]).modules_by_device
    num_layers = [make_share(QWEN2_SIZES["Qwen2-7B"], modules).num_layers for modules in by_device]
    assert sorted(num_layers) == [6, 7, 7, 8]
    assert num_layers[-1] == 6


@pytest.mark.parametrize("name", ["Qwen2-7B", "Qwen2-1.5B"])
def test_the_device_map_names_every_part(name):
    device_map = plan("4x80", model=name, lengths=[900]).device_map
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(make_config(name))
    for parameter, _ in model.named_parameters():
        assert any(parameter.startswith(f"{part}.") for part in device_map), parameter


@pytest.mark.parametrize("name, head_device", [("Qwen2-7B", 3), ("Qwen2-1.5B", 0)])
def test_layers_follow_each_other_and_the_norm_is_with_the_head(name, head_device):
    """A tied head is where its embedding is."""
    device_map = plan("4x80", model=name, lengths=[900]).device_map
    layers = [device_map[f"model.layers.{number}"] for number in range(28)]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1, 2, 3}
    assert device_map["model.embed_tokens"] == 0
    assert device_map["model.rotary_emb"] == 0
    assert device_map["lm_head"] == head_device
    assert device_map["model.norm"] == head_device


def test_a_model_that_fits_on_another_gpu_than_the_first_is_refused():
    """Trainer would move it to GPU 0."""
    made = plan("1x1,1x80", lengths=[900])
    assert made.modules_by_device[0] == []
    assert made.used_bytes[0] == 0
    with pytest.raises(UserError, match="only GPU 1 has room: set CUDA_VISIBLE_DEVICES=1"):
        check_plan(made)


def test_a_device_map_for_one_gpu_names_it_alone():
    job = make_job()
    assert set(make_device_map(job, [list_modules(job.config)]).values()) == {0}


# ---- What a step needs --------------------------------------------------------------------------
RECORDED = {
    "bf16": make_job(),
    "bf16, weights fp32": dataclasses.replace(
        make_job(), precision=choose_precision(AMPERE, True, "auto")
    ),
    "fp16": make_job(capability=VOLTA),
    "fp32": make_job(capability=None),
    "bf16 in shards": make_job(num_shards=2),
    "fp16 in shards": make_job(capability=VOLTA, num_shards=8),
    "gradients in host memory": make_job(in_host_memory=GRADIENTS),
}
FAST = ("bf16", True)


def list_recorded_cases() -> list:
    cases = []
    for name in RECORDED:
        for recompute in (True, False):
            marks = ()
            if (name, recompute) != FAST:
                marks = (pytest.mark.slow,)
            cases.append(pytest.param(name, recompute, marks=marks))
    return cases


def without_update(memory: dict) -> float:
    """Return the fullest moment of a micro-batch; the update is not recorded."""
    return max(size for moment, size in memory.items() if moment != "update")


@pytest.mark.parametrize("name, recompute", list_recorded_cases())
def test_the_formula_is_what_a_recorded_micro_batch_shows(name, recompute):
    """Activations of 2 layers, beside weights, gradients and state. Whole models: benchmarks."""
    config = make_config(
        "Qwen2-1.5B", num_hidden_layers=2, vocab_size=16384, tie_word_embeddings=False
    )
    job = dataclasses.replace(RECORDED[name], config=config)
    recorded = find_peak(job, record(job, 4096, recompute=recompute))
    formula = without_update(step_memory(job, list_modules(config), 4096, recompute=recompute))
    resident = count_parameters(config).model * job.device_bytes_per_parameter
    assert 0.985 <= (formula - resident) / (recorded - resident) <= 1.06


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("part", ["first", "middle", "last"])
def test_the_formula_is_what_a_device_of_a_pipeline_shows(part, recompute):
    config = make_config(
        "Qwen2-1.5B", num_hidden_layers=6, vocab_size=16384, tie_word_embeddings=False
    )
    modules = list_modules(config)
    held = {"first": modules[:3], "middle": modules[3:5], "last": modules[5:]}[part]
    job = dataclasses.replace(make_job(), config=config)
    recording = record_device(job, held, 2048, recompute=recompute)
    recorded = find_peak(job, recording, num_micro_batches=6)
    formula = without_update(
        step_memory(job, held, 2048, recompute=recompute, window_tokens=6 * 2048)
    )
    weights = sum(recording.weight_bytes) / 2 * job.device_bytes_per_parameter
    assert 0.985 <= (formula - weights) / (recorded - weights) <= 1.06


def test_the_residual_stream_has_the_format_of_the_weights_in_shards_too():
    one = make_job(capability=VOLTA)
    shards = make_job(capability=VOLTA, num_shards=4)
    assert one.stream_bytes == shards.stream_bytes == 4


@pytest.mark.parametrize(
    "gpus, processes, needed, kept_tokens",  # GiB, and tokens that are not recomputed
    [
        ("1x80", 1, 47.1, range(4800, 5000)),
        ("2x80", 2, 28.7, range(7800, 8200)),
        ("8x80", 8, 12.6, range(10000, 11000)),
        ("4x32:fp16", 4, 27.0, range(800, 1000)),
    ],
)
def test_figures_of_boxes(gpus, processes, needed, kept_tokens):
    """For examples of 8,192 tokens."""
    made = plan(gpus, processes=processes, tokens_per_forward=39000)
    assert max(made.needed_bytes) / GIB == pytest.approx(needed, abs=0.06)
    assert made.max_tokens_without_checkpointing in kept_tokens


@pytest.mark.parametrize("gpus, processes, reserved", [("1x80", 1, 0.5), ("2x80", 2, 1.1)])
def test_a_step_takes_95_percent_of_what_workspaces_and_nccl_leave(gpus, processes, reserved):
    made = plan(gpus, processes=processes, tokens_per_forward=39000)
    usable = 0.95 * (made.devices.free_bytes[0] - reserved * GIB)
    most = made.max_tokens_without_checkpointing
    modules = made.modules_by_device[0]
    assert peak_bytes(made.job, modules, most, recompute=False) <= usable
    assert peak_bytes(made.job, modules, most + 1, recompute=False) > usable


def test_a_tied_head_is_no_second_table():
    """Qwen2-1.5B's size; and the head's part of the gradient waits for the embedding's."""
    job = make_job("Qwen2-1.5B")
    parameters = 1_543_714_304
    table_bytes = 2 * 151_936 * 1536
    assert count_parameters(job.config).model == parameters
    memory = step_memory(job, list_modules(job.config), 1, recompute=True)
    resident = parameters * job.precision.bytes_per_parameter
    assert memory["embedding"] == pytest.approx(resident + 2 * table_bytes, rel=1e-5)


def test_the_update_of_plain_adamw_takes_a_copy_of_all_parameters():
    """torch.optim.AdamW with foreach, its default on GPUs."""
    usual = make_job(optim="adamw_torch")
    fused = make_job(optim="adamw_torch_fused")
    modules = list_modules(usual.config)
    difference = (
        step_memory(usual, modules, 1, recompute=True)["update"]
        - step_memory(fused, modules, 1, recompute=True)["update"]
    )
    assert difference == pytest.approx(4 * count_parameters(usual.config).model, rel=1e-3)


# ---- Micro-batches of one process ---------------------------------------------------------------
def test_a_micro_batch_that_was_asked_for_is_kept():
    assert plan("1x80", lengths=[900], tokens_per_forward=6000).tokens_per_forward == 6000


def test_a_gpu_computes_enough_tokens_that_need_no_recomputing():
    made = plan("1x80", lengths=[900])
    assert made.tokens_per_forward == made.max_tokens_without_checkpointing > 4096
    assert not made.recomputes


def test_few_tokens_at_once_are_worse_than_recomputing():
    """1 x 48 GB could keep 2,340 tokens, which would leave it idle; it recomputes more."""
    made = plan("1x48", lengths=[900])
    assert made.max_tokens_without_checkpointing in range(1000, 4096)
    assert made.tokens_per_forward == 4 * MAX_LEN
    assert made.recomputes


def test_a_cpu_computes_few_tokens_at_once(this_machine):
    assert plan(None, lengths=[900]).tokens_per_forward == 2048


def test_processes_on_the_cpu_have_the_whole_model_each(this_machine, monkeypatch):
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: own)
    alone = plan(None, lengths=[900]).needed_bytes
    assert plan(None, lengths=[900], processes=2).needed_bytes == alone


def test_without_checkpointing_a_micro_batch_is_what_can_be_kept():
    made = plan("1x80", lengths=[900], gradient_checkpointing=False)
    assert made.limits.fits
    assert made.tokens_per_forward == made.max_tokens_without_checkpointing


def test_an_example_that_cannot_be_kept_is_refused_without_checkpointing():
    made = plan("1x80", gradient_checkpointing=False)
    with pytest.raises(UserError, match="8192 tokens without gradient checkpointing"):
        check_plan(made)


# ---- Host memory --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "gpus, in_host_memory, host_gib",
    [
        ("1x80", (), 0),
        ("4x24", (), 0),
        ("1x48", STATE, 14.6),
        ("1x40", STATE, 14.6),
        ("2x24", STATE, 14.6),
        ("1x24", GRADIENTS, 28.8),
    ],
)
def test_the_host_has_the_least_with_which_the_longest_example_fits(gpus, in_host_memory, host_gib):
    made = plan(gpus)
    check_plan(made)
    assert made.in_host_memory == in_host_memory
    if host_gib:
        contents = "AdamW state"
        if "gradients" in in_host_memory:
            contents = "AdamW state, gradients"
        assert f"host       {host_gib} GiB pinned: {contents}; about" in describe(made)


@pytest.mark.parametrize(
    "gpus, price",
    [("1x48", "1.6 s a step"), ("2x24", "0.8 s a step"), ("1x24", "1.5 s a micro-batch")],
)
def test_what_is_in_host_memory_comes_and_goes(gpus, price):
    """15.7 GB of state, or 15.2 GB of gradients, there and back."""
    assert f"; about {price} at 20 GB/s (assumed)" in describe(plan(gpus))


def test_a_level_less_would_not_do():
    found = plan("1x24").devices
    assert not can_fit(make_job(in_host_memory=STATE), found, MAX_LEN)
    found = plan("1x48").devices
    assert not can_fit(make_job(), found, MAX_LEN)


def test_only_the_8_bit_optimizer_of_one_process_uses_the_host():
    found = plan("1x24").devices
    job = make_job(optim="adamw_torch_fused")
    assert choose_host_memory(job, found, MAX_LEN).in_host_memory == ()
    assert plan("2x8", processes=2).in_host_memory == ()


def test_gradients_of_fp32_weights_stay_on_the_gpu():
    assert plan("1x8:fp16", model="Qwen2-1.5B").in_host_memory == STATE


def test_checkpoints_have_all_that_is_in_host_memory():
    assert plan("1x24").disk.needed_bytes == plan("1x80").disk.needed_bytes


def test_the_update_brings_the_largest_tensor_from_the_host():
    on_device = make_job()
    on_host = make_job(in_host_memory=GRADIENTS)
    modules = list_modules(on_device.config)
    parameters = count_parameters(on_device.config)
    host_bytes = on_host.host_bytes_per_parameter
    assert host_bytes == 2 + 2.0625
    difference = (
        step_memory(on_device, modules, 1, recompute=True)["update"]
        - step_memory(on_host, modules, 1, recompute=True)["update"]
    )
    assert difference == pytest.approx(host_bytes * (parameters.model - parameters.table))


def test_micro_batches_shrink_by_eighths_where_gradients_move():
    tokens = plan("1x24").tokens_per_forward
    assert tokens > 4 * MAX_LEN // 4  # halves would leave 8,192
    modules = list_modules(QWEN2_SIZES["Qwen2-7B"])
    made = plan("1x24")
    more = tokens * 8 // 7 + 2
    assert peak_bytes(made.job, modules, more, recompute=True) > made.usable_bytes[0]


def test_a_host_with_too_little_memory_is_refused_with_both_figures(one_gpu):
    one_gpu(23.2, host_gib=28.7)
    with pytest.raises(UserError) as error:
        check_plan(plan(None))
    assert "too little host memory: AdamW state, gradients take 28.8 GiB" in str(error.value)
    assert "28.7 GiB are free" in str(error.value)
    assert "Qwen2-1.5B in 10.9 GiB" in str(error.value)


def test_a_host_with_enough_memory_is_accepted(one_gpu):
    one_gpu(23.2, host_gib=28.9)
    check_plan(plan(None))


def test_fp32_weights_of_shards_need_room_on_the_host_while_they_load(monkeypatch, this_machine):
    found = dataclasses.replace(
        plan("4x32:fp16", processes=4).devices, is_assumed=False, host_free_bytes=28 * GIB
    )
    monkeypatch.setattr("sft.plan.find_devices", lambda args, training_args: found)
    with pytest.raises(UserError, match=r"fp32 weights take 28\.4 GiB .* 28\.0 GiB are free"):
        check_plan(plan(None, processes=4))


# ---- Several GPUs of one process ----------------------------------------------------------------
def simulate_turns(device_times: list[float], num_micro_batches: int) -> float:
    """Return the share of time that devices work which pass micro-batches on to each other."""
    done = [0.0] * len(device_times)
    for _ in range(num_micro_batches):
        arrived = 0.0
        for device, time in enumerate(device_times):
            done[device] = max(done[device], arrived) + time
            arrived = done[device]
    return num_micro_batches * sum(device_times) / (len(device_times) * done[-1])


@pytest.mark.parametrize("device_times", [[7.4] * 4, [8, 7, 7, 7.4], [1, 5], [3]])
@pytest.mark.parametrize("num_micro_batches", [1, 8, 16])
def test_the_busy_share_is_that_of_simulated_turns(device_times, num_micro_batches):
    simulated = simulate_turns(device_times, num_micro_batches)
    assert busy_share(device_times, num_micro_batches, num_windows=1) == pytest.approx(simulated)


def test_16_micro_batches_on_4_even_gpus_keep_them_busy_84_percent_of_the_time():
    assert busy_share([7.0] * 4, 16, num_windows=1) == pytest.approx(16 / 19)


def test_each_window_fills_and_empties_the_pipeline():
    two = busy_share([7.0] * 4, 16, num_windows=2)
    assert two == pytest.approx(busy_share([7.0] * 4, 8, num_windows=1))


@pytest.mark.parametrize(
    "gpus, length, tokens",
    [
        ("4x80", 1000, 4000),  # an eighth of a step for each GPU
        ("2x80", 1000, 4096),  # not over 4,096
        ("8x80", 300, 1246),  # what the host can keep up with
        ("4x80", 6000, 6000),  # an example of a step
    ],
)
def test_a_micro_batch_of_a_pipeline(gpus, length, tokens):
    assert plan(gpus, lengths=[length]).tokens_per_forward == tokens


def test_the_host_keeps_up_with_156_tokens_a_gpu_on_a100s():
    config = QWEN2_SIZES["Qwen2-7B"]
    assert min_pipeline_tokens(config, 1, 0.4 * 312e12) == 156


@pytest.mark.parametrize("gpus", ["2x24", "2x80", "4x24", "4x80", "8x24", "8x80", "4x32:fp16"])
@pytest.mark.parametrize("lengths", [[MAX_LEN], [300, 500, 4000]])
def test_pipelines_fit(gpus, lengths):
    made = plan(gpus, lengths=lengths)
    check_plan(made)
    assert made.window_tokens >= made.largest_micro_batch
    for used, usable in zip(made.used_bytes, made.usable_bytes):
        assert 0 < used <= usable


def test_a_window_is_the_whole_step_if_that_fits():
    made = plan("4x80", lengths=[300])
    assert made.window_tokens == 128 * 300
    assert not made.recomputes


def test_a_window_is_halved_until_it_fits():
    made = plan("4x24", lengths=[4000])
    assert made.window_tokens == 128 * 4000 / 4
    for used, usable in zip(made.used_bytes, made.usable_bytes):
        assert used <= usable


def test_a_smaller_window_may_be_faster_because_nothing_is_recomputed():
    made = plan("2x80", lengths=[1000])
    assert made.window_tokens < 128_000
    assert made.window_tokens <= made.max_tokens_without_checkpointing


def test_under_autocast_a_pipeline_recomputes_all():
    """Else each micro-batch in flight would keep a cast of all weights."""
    made = plan("4x80:fp16", lengths=[300])
    assert made.max_tokens_without_checkpointing == 0
    assert made.recomputes
    assert made.window_tokens == 128 * 300


def test_micro_batches_are_smaller_where_nothing_else_fits():
    small = plan("4x24", lengths=[100], max_len=100_000, tokens_per_forward=None)
    assert small.limits.fits
    with pytest.raises(UserError, match="what fits: --tokens_per_forward"):
        check_plan(plan("2x24", lengths=[100], tokens_per_forward=200_000))


def test_the_plan_says_how_many_gpus_work_at_once():
    made = plan("4x80", lengths=[300])
    share = busy_share(made.device_times, 32, num_windows=1)
    line = f"devices    4 at work at once, at best {100 * share:.0f} % (32 micro-batches in flight)"
    assert line in describe(made, num_forward_passes=32)


def test_torchrun_is_named_where_shards_are_faster_with_what_that_assumes():
    said = describe(plan("8x80", lengths=[4000]), num_forward_passes=125)
    assert re.search(r"by estimate, torchrun is 1\.\d x as fast, even over PCIe \(20 GB/s", said)
    assert "torchrun --nproc_per_node 8 sft_qwen2.py --gradient_accumulation_steps 4" in said


def test_torchrun_is_not_named_where_shards_do_not_fit():
    assert "torchrun" not in describe(plan("2x24"))


def test_torchrun_is_not_named_where_shards_are_slower():
    """Few tokens a step, and GPUs whose messages take longer than their products."""
    made = plan("2x24", model="Qwen2-1.5B", lengths=[100], gradient_accumulation_steps=1)
    assert "torchrun" not in describe(made, num_forward_passes=1)


# ---- Steps and time -----------------------------------------------------------------------------
def test_only_what_is_computed_counts_as_flops():
    """Layers for each token, the head for trained ones, and half of all pairs of an example."""
    layers = 6 * 28 * 233_046_016
    head = 6 * 152_064 * 3584
    pairs = 12 * 28 * 3584 * (1000**2 + 3000**2) / 2
    found = training_flops(QWEN2_SIZES["Qwen2-7B"], np.array([1000, 3000], dtype=np.int32), 700)
    assert found == pytest.approx(4000 * layers + 700 * head + pairs)


@pytest.mark.parametrize(
    "num_examples, epochs, max_steps, num_steps",
    [(247, 1.0, -1, 2), (247, 3.0, -1, 6), (300, 0.5, -1, 2), (10_000, 1.0, -1, 79), (9, 1, 7, 7)],
)
def test_steps_are_counted_as_trainer_counts_them(num_examples, epochs, max_steps, num_steps):
    made = plan(num_examples=num_examples, num_train_epochs=epochs, max_steps=max_steps)
    assert made.workload.num_steps == num_steps
    assert f"steps      {num_steps} of " in describe(made)


def test_hours_are_those_of_all_processes_together():
    def hours(gpus, processes):
        said = describe(plan(gpus, processes=processes, lengths=[1000], num_examples=100_000))
        return float(re.search(r"an epoch, about ([\d.e+-]+) h", said)[1])

    assert hours("8x80", 8) == pytest.approx(hours("1x80", 1) / 8, rel=0.1)


def test_few_examples_get_values_to_copy():
    said = describe(plan(num_examples=247))
    hint = "few steps  2; for 247 rows: --num_train_epochs 3 --gradient_accumulation_steps 2"
    assert hint in said


def test_the_values_to_copy_make_enough_steps():
    for num_examples in (1, 7, 24, 60, 247, 999, 2000, 9_999, 50_000):
        flags = suggest_schedule(num_examples, 4)
        made = plan(num_examples=num_examples, **flags)
        assert made.workload.num_steps >= 20, num_examples


def test_enough_steps_need_no_hint():
    assert "few steps" not in describe(plan(num_examples=10_000))


def test_a_number_of_steps_that_was_asked_for_needs_no_hint():
    assert "few steps" not in describe(plan(max_steps=7))


def test_an_evaluation_that_never_comes_is_named():
    said = describe(plan(num_examples=247, eval_strategy="steps", eval_steps=20))
    assert "evaluation none before the end: --eval_steps 20 of 2 steps" in said


def test_an_evaluation_that_comes_is_not_named():
    said = describe(plan(num_examples=247, eval_strategy="steps", eval_steps=2))
    assert "evaluation none" not in said


def test_a_share_of_all_steps_is_always_reached():
    said = describe(plan(num_examples=247, eval_strategy="steps", eval_steps=0.5, save_steps=0.5))
    assert "before the end" not in said


def test_a_checkpoint_that_never_comes_is_named():
    assert "saving     not before the end: --save_steps 5 of 2 steps" in describe(
        plan(num_examples=247)
    )


def test_saving_that_takes_a_large_share_of_the_time_is_named():
    said = describe(plan("8x80", processes=8, lengths=[300], num_examples=100_000))
    found = re.search(
        r"saving     31 GB, as long as ([\d.]+) steps .*; try --save_steps (\d+)", said
    )
    assert float(found[1]) > 1
    assert int(found[2]) > 5


def test_rare_saving_is_not_named():
    said = describe(plan("8x80", processes=8, lengths=[300], num_examples=100_000, save_steps=500))
    assert "saving" not in said


# ---- Disk ---------------------------------------------------------------------------------------
def test_disk_is_that_of_the_checkpoints_and_the_export():
    """4.0625 bytes a parameter: bf16 weights and 8-bit state; and one more while it is written."""
    disk = plan().disk
    assert disk.num_checkpoints == 3
    assert disk.needed_bytes == pytest.approx(7_615_616_512 * (3 * 4.0625 + 2))


def test_disk_of_another_machine_is_not_compared(this_machine):
    this_machine.free = 1
    check_plan(plan("1x80"))


def test_a_disk_that_is_too_small_is_refused_and_one_that_suffices_is_not(one_gpu, this_machine):
    one_gpu(78.6)
    this_machine.free = 108.1e9
    check_plan(plan(None))
    this_machine.free = 107.9e9
    with pytest.raises(UserError, match=r"take 108\.0 GB, 107\.9 GB are free; lower --save_total"):
        check_plan(plan(None))


def test_a_resumed_run_may_replace_its_own_checkpoints(one_gpu, this_machine, tmp_path):
    one_gpu(78.6)
    this_machine.free = 107.9e9
    (tmp_path / "checkpoint-5").mkdir()
    with open(tmp_path / "checkpoint-5" / "optimizer.pt", "wb") as file:
        file.truncate(int(0.2e9))
    check_plan(plan(None, resume=True, output_dir=str(tmp_path)))
    with pytest.raises(UserError, match="too little disk"):
        check_plan(plan(None, output_dir=str(tmp_path)))


def test_without_saving_only_the_export_takes_disk():
    assert plan(save_strategy="no").disk.needed_bytes == 2 * 7_615_616_512


# ---- What does not fit --------------------------------------------------------------------------
def refusal(made) -> str:
    with pytest.raises(UserError) as error:
        check_plan(made)
    return str(error.value)


def test_too_little_memory_names_what_fits_this_machine_first():
    said = refusal(plan("1x16"))
    assert said.startswith("too little memory; what fits: a smaller model, Qwen2-1.5B in 10.9 GiB")
    assert said.index("LoRA") < said.index("torchrun")


def test_shorter_examples_are_named_where_they_help():
    said = refusal(plan("1x24", lengths=[60_000], max_len=60_000))
    max_len = int(re.search(r"what fits: --max_len (\d+)", said)[1])
    check_plan(plan("1x24", lengths=[max_len]))
    with pytest.raises(UserError):
        check_plan(plan("1x24", lengths=[2 * max_len]))


def test_smaller_micro_batches_are_named_where_they_help():
    said = refusal(plan("1x80", lengths=[900], tokens_per_forward=200_000))
    tokens = int(re.search(r"what fits: --tokens_per_forward (\d+)", said)[1])
    check_plan(plan("1x80", lengths=[900], tokens_per_forward=tokens))
    with pytest.raises(UserError):
        check_plan(plan("1x80", lengths=[900], tokens_per_forward=2 * tokens))


def test_as_many_gpus_are_named_as_are_enough():
    number = int(re.search(r"--nproc_per_node (\d+)", refusal(plan("1x16")))[1])
    check_plan(plan(f"{number}x16", processes=number))
    with pytest.raises(UserError):
        check_plan(plan(f"{number - 1}x16", processes=number - 1))


def test_fp32_is_named_where_it_is_what_is_too_large():
    assert "no --fp32" in refusal(plan("1x80", fp32=True))


def test_a_cpu_is_told_a_smaller_model_and_a_gpu(this_machine):
    this_machine.available = 40 * GIB
    said = refusal(plan(None, lengths=[900]))
    assert "Qwen2-1.5B" in said
    assert "--dry_run --gpus 1x80" in said
    assert "torchrun" not in said


def test_a_plan_that_cannot_be_does_not_go_on_to_hours_and_disk():
    said = describe(plan("1x16"))
    assert "memory     GPU 0: needs 20.3 GiB, 14.0 usable of 15.2 free" in said
    for word in ("steps", "cost", "disk"):
        assert f"\n{word} " not in said


def test_adafactor_cannot_train_shards():
    with pytest.raises(UserError, match="--optim adafactor cannot train shards"):
        check_plan(plan("2x80", processes=2, optim="adafactor"))
    check_plan(plan("2x80", optim="adafactor"))


# ---- What is said -------------------------------------------------------------------------------
def test_a_plan_for_another_machine_says_which_formats_it_assumes():
    said = describe(plan("4x32"))
    assert said.startswith("precision  bfloat16, adamw_torch_8bit\n")
    assert "compute capability 8.0, assumed; for V100 or T4: --gpus 4x32:fp16\n" in said


def test_the_suffix_for_v100_is_obeyed():
    said = describe(plan("4x32:fp16"))
    assert said.startswith("precision  float16 over float32 weights, adamw_torch_8bit\n")
    assert "compute capability 7.0, assumed\n" in said


def test_memory_is_said_once_for_processes_that_are_alike():
    said = describe(plan("8x80", processes=8))
    assert "memory     each of 8 GPUs: uses 73.6, needs 12.6 of 73.6 usable GiB" in said
    assert said.count("\nmemory ") == 1


def test_memory_of_a_pipeline_is_said_for_each_gpu():
    said = describe(plan("4x24", lengths=[4000]))
    assert re.search(r"memory     GPU 0: uses .* usable GiB; embedding, layers 0-6\n", said)
    assert re.search(r"memory     GPU 3: uses .* usable GiB; layers 22-27, head\n", said)


def test_recomputing_is_said():
    assert "recompute  nothing: memory suffices" in describe(plan(lengths=[900]))
    assert re.search(r"recompute  micro-batches over 4,9\d\d tokens", describe(plan()))
    assert "recompute  all layers" in describe(plan("4x32:fp16"))


def test_a_cpu_has_no_hours(this_machine):
    assert re.search(r"FLOPs an epoch\n", describe(plan(None, lengths=[900])))
