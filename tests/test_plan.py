"""Precision, placement and the dry run: what is decided before anything is loaded."""

import itertools
import random
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import memory
import numpy as np
import psutil
import pytest
import torch
import transformers
from conftest import ROOT

import sft_qwen2
from sft import memory_plan as mp
from sft.memory_plan import GIB, Job, choose_precision, device_loads, fits, place
from sft.rows import UserError

AMPERE, VOLTA = (8, 0), (7, 0)
ON_ONE = [(AMPERE, False, 1), (AMPERE, True, 1), (VOLTA, False, 1), (None, False, 1)]


def make_job(gpus: str, num_shards: int = 1, name: str = "7B") -> Job:
    capacities, capability = mp.parse_gpus(gpus)
    return Job(memory.make_config(name), choose_precision(capability, 0), capacities, num_shards)


def parse(argv: list[str]) -> tuple:
    return sft_qwen2.parse_arguments(argv, sft_qwen2.ScriptArguments, sft_qwen2.TRAINING_DEFAULTS)


def plan_of(job: Job, longest: int, **flags):
    argv = [f"--{name}={value}" for name, value in flags.items()]
    return mp.plan_memory(job, *parse(argv), longest)


# ---- Which GPU holds what -----------------------------------------------------------------------
@pytest.mark.parametrize("gpus", ["2x80", "2x80,1x40", "3x32", "random"])
def test_no_other_place_is_better(gpus):
    """However consecutive modules are dealt out: the fullest GPU is not less full."""
    rng = random.Random(0)
    for _ in range(60 if gpus == "random" else 2):
        job = make_job("1x80" if gpus == "random" else gpus, name=rng.choice(["7B", "0.5B"]))
        if gpus == "random":
            job.config.num_hidden_layers = rng.randint(1, 6)
            job = job._replace(capacities=[rng.uniform(1, 4) for _ in range(rng.randint(1, 4))])
        tokens, checkpointing = rng.choice([1, 700, 30000]), rng.random() < 0.5
        ours, num_gpus = place(job, tokens, checkpointing), len(job.capacities)
        names = [name for held in ours for name in held]
        cuts = itertools.combinations_with_replacement(range(len(names) + 1), num_gpus - 1)
        ends = ([0, *cut, len(names)] for cut in cuts)
        ways = ([names[a:b] for a, b in itertools.pairwise(end)] for end in ends)
        loads = (device_loads(job, tokens, held, checkpointing) for held in (ours, *ways))
        shares = [max(load / room for load, room in zip(x, job.capacities)) for x in loads]
        assert shares[0] == pytest.approx(min(shares), rel=1e-9)


@pytest.mark.parametrize("name", ["7B", "1.5B"])
def test_the_map_names_every_part(name):
    """Every module has its GPU, in order; norm and an untied head are last, a tied one first."""
    job = make_job("4x80", name=name)
    device_map = plan_of(job, 900).device_map
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(job.config)
    names = {name for name, _ in model.named_parameters()}
    assert all(any(name.startswith(f"{part}.") for part in device_map) for name in names)
    layers = [device_map[f"model.layers.{i}"] for i in range(28)]
    assert layers == sorted(layers) and {*layers} == {0, 1, 2, 3}
    ends = [device_map[f"model.{part}"] for part in ("embed_tokens", "rotary_emb", "norm")]
    assert [*ends, device_map["lm_head"]] == [0, 0, 3, 0 if name == "1.5B" else 3]


def test_a_gpu_too_small_for_any_part_holds_none():
    """A model on one GPU alone is refused where this is not GPU 0: Trainer would move it there."""
    job = make_job("1x5,1x80")._replace(capacities=[0.4 * GIB, 78 * GIB])
    found = plan_of(job, 900)
    assert found.held[0] == [] and found.used[0] == 0 < found.used[1] < 78 * GIB
    with pytest.raises(UserError, match="only GPU 1 has room: use CUDA_VISIBLE_DEVICES=1"):
        mp.check_plan(found, job, *parse([]), 900)


# ---- What a step needs --------------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("capability, fp32, shards", [*ON_ONE, (AMPERE, 0, 2), (VOLTA, 0, 8)])
def test_the_formula_is_what_a_recorded_step_shows(capability, fp32, shards, checkpointing):
    """Of 4 layers, besides weights, gradients and state. Whole models: benchmarks/memory.py."""
    precision, config = choose_precision(capability, fp32), memory.make_config("1.5B")
    config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings = 4, 16384, False
    recorded = memory.peak_bytes(memory.record(config, 4096, precision, checkpointing, shards))
    job = Job(config, precision._replace(optim=""), [1], shards)
    (formula,) = device_loads(job, 4096, place(job, 4096), checkpointing)
    fixed = mp.count_parameters(config)["model"] * precision.bytes_per_parameter / shards
    assert 0.985 <= (formula - fixed) / (recorded - fixed) <= 1.05


@pytest.mark.parametrize(
    "gpus, processes, needed, plain",  # GiB, and tokens without checkpointing
    [
        ("1x80", 1, 47.1, range(4800, 5000)),
        ("2x80", 2, 28.7, range(7800, 8200)),
        ("8x80", 8, 12.6, range(10000, 11000)),
        ("4x32", 4, 25.2, range(900, 1000)),
        ("4x80", 1, 14.7, range(36000, 39000)),
        ("1x48", 1, 47.1, range(1)),
    ],
)
def test_needed_and_used_are_the_least_and_the_most(gpus, processes, needed, plain):
    """For rows of 8,192 tokens; and of what workspaces and NCCL leave free, 95 % and no more."""
    job = make_job(gpus, processes)
    found = plan_of(job, 8192, tokens_per_forward=39000)
    assert max(found.needed) / GIB == pytest.approx(needed, abs=0.06)
    most, free = found.max_tokens_without_checkpointing, job.capacities[0] / GIB
    usable = 0.95 * (free - 0.5 - 0.6 * (processes > 1))
    loads = [max(device_loads(job, n, found.held, False)) / GIB for n in (most, most + 1)]
    assert most in plain and (loads[0] <= usable or most == 0) and loads[1] > usable


# ---- Precision ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "capability, fp32, weights, compute, optim, num_bytes",
    [
        ((8, 0), False, "bfloat16", "bfloat16", "adamw_torch_8bit", 6.06),
        ((8, 0), True, "float32", "bfloat16", "adamw_torch_fused", 16),
        ((7, 5), False, "float32", "float16", "adamw_torch_8bit", 10.06),
        ((7, 0), True, "float32", "float16", "adamw_torch_fused", 16),
        (None, False, "float32", "float32", "adamw_torch_fused", 16),
    ],
)
def test_the_least_gpu_decides(capability, fp32, weights, compute, optim, num_bytes, monkeypatch):
    """A newer GPU is beside it; without one, a tenth of the memory is for other programs."""
    capabilities = [(9, 0), capability]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: ((70 + gpu) * GIB, 80 * GIB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    process = SimpleNamespace(world_size=1, device=torch.device("cuda" if capability else "cpu"))
    free, least = mp.find_devices(None, process)
    assert free == ([70 * GIB, 71 * GIB] if capability else [90 * GIB])
    *dtypes, found_optim, found_bytes, _ = choose_precision(least, fp32)
    assert [str(dtype) for dtype in dtypes] == [f"torch.{weights}", f"torch.{compute}"]
    assert (found_optim, round(found_bytes, 2)) == (optim, num_bytes)


PYPI = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # for CUDA 13
CUDA126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA, OLD = ("13.0", "580.82.07"), ("13.0", "535.104.05")  # PyTorch's, and the driver's


@pytest.mark.parametrize(
    "found, said",  # what check_devices is told
    [
        (("cuda", [(8, 0), (8, 6), (8, 9), (9, 0)], PYPI, False, *CUDA), None),
        (("cuda", [(12, 1)], PYPI, False, *CUDA), None),  # newer than the build, which can compile
        (("cuda", [(10, 0)], CUDA126, False, *CUDA), "capability 10.0, only sm_50 "),
        (("cuda", [(8, 0), (7, 0)], PYPI, False, *CUDA), "capability 7.0, only sm_75 .*CUDA 12.6"),
        (("cuda", [(7, 0)], CUDA126, False, *CUDA), None),
        (("cuda", [(8, 0)] * 4, PYPI, True, *CUDA), "--nproc_per_node gpu"),
        (("cuda", [(8, 0)], PYPI, True, *CUDA), None),
        (("cpu", [], [], False, *OLD), "CUDA 13.0 .*driver 535.104.05: .*580.*--use_cpu"),
        (("cpu", [], [], False, "13.0", ""), None),
        (("cpu", [], [], False, "", "535.104.05"), None),  # a PyTorch without CUDA
        (("mps", [], [], False, "", ""), "--use_cpu"),
    ],
)
def test_useless_gpus_are_named_before_the_model_loads(found, said, run_main, monkeypatch):
    if said is None:
        return mp.check_devices(*found)
    check_devices = mp.check_devices
    monkeypatch.setattr(mp, "check_devices", lambda *args: check_devices(*found))
    monkeypatch.setattr(sft_qwen2, "load_model", None)
    code, out, err = run_main(
        "--model_name_or_path", ROOT / "data/tiny-qwen2", "--report_to", "none"
    )
    assert (code, out, err.count("\n")) == (1, "", 1) and re.search(said, err)


@pytest.mark.parametrize("flags, hidden", [("", None), ("", "-1"), ("--use_cpu", None)])
def test_a_driver_that_is_too_old_is_found(flags, hidden, monkeypatch, tmp_path):
    """Unless its GPUs are not wanted."""
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build\n"
    (tmp_path / "version").write_text(line)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden or "0")
    with nullcontext() if flags or hidden else pytest.raises(UserError, match="driver 535"):
        mp.check_machine(parse(["--report_to=none", *flags.split()])[1], tmp_path / "version")


# ---- The dry run --------------------------------------------------------------------------------
@pytest.fixture
def dry_run(run_main, tiny_model_dir, monkeypatch, tmp_path):
    """A function: flags, and free disk in GiB, to what main returns over the 7B."""
    memory.make_config("7B").save_pretrained(tmp_path / "7b")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model_dir / name, tmp_path / "7b")

    def dry_run(*flags, free=1000.0):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * GIB))
        argv = ["--model_name_or_path", tmp_path / "7b", "--data_path", ROOT / "data", "--dry_run"]
        argv += ["--output_dir", tmp_path / "outputs", "--report_to", "none"]
        result = run_main(*argv, *flags)
        assert not (tmp_path / "outputs").exists()
        return result

    return dry_run


TOKENS = "--tokens_per_forward"


@pytest.mark.parametrize(
    "flags, code, said",
    [
        ("1x80", 0, r"(\d+) rows = \1 trained \+ 0 drop[^$]*⟦[^⟧]+<\|im_end\|>⟧\n[^$]*precision  "),
        ("1x80", 0, r"uses 74.2 of 78.6 GiB\nrecompute  nothing: memory suffices\n"),
        ("4x80", 0, r"layers.\d+ to lm_head\)\n.*\n.* 4 sft_qwen2.py --gradient_acc\w+_steps 8\n"),
        ("2x24,2x80:fp16", 0, "work in turn; too small to work at once"),
        ("8x32", 0, r"float16 over float32 weights, adamw_torch_8bit \(compute capability 7.0, a"),
        ("4x32:bf16", 0, r"bfloat16 over bfloat16 weights, adamw_torch_8bit \(.* 8.0, assumed: "),
        (f"1x80 {TOKENS} 32768", 0, r"recompute  micro-batches over 4,9\d\d tokens"),
        ("1x80 --gradient_checkpointing 0", 0, "nothing: memory suffices"),
        (
            f"1x80 --gradient_checkpointing 0 {TOKENS} 8192",
            1,
            "memory for 8192 tokens without gradient check",
        ),
        ("1x48", 1, r"needs 47.1, uses 47.1 of 46.9 [^$]*would fit: torchrun --nproc_per_node 2\n"),
        (f"4x32 {TOKENS} 65536", 1, r"what would fit: --tokens_per_forward 16384\n"),
        ("1x80 --fp32 1", 1, r"what would fit: torchrun --nproc_per_node 2; no --fp32\n"),
        ("4x80 --max_steps 7", 0, "steps      7 of 128 rows, .* few to learn from"),
        ("8x80", 0, r"[\d.e+]+ FLOPs an epoch: [\d.]+ h if 1 x A100 reach 40 % of 312 TFLOP/s\n"),
        ("4x80", 0, r"disk       100.6 GiB for 3 checkpoints and the export\n"),
        *((gpus, 2, "--gpus") for gpus in ("4", "x80", "4x", "4x80,", "0x80", "4x80:fp8")),
    ],
)
def test_a_dry_run_says(dry_run, flags, code, said):
    result = dry_run("--gpus", *flags.split(), free=0.01)  # of this machine, not of that
    assert result[0] == code and re.search(said, result[1] + result[2])
    assert result[2].count("\n") == (code > 0)


def test_a_plan_for_this_machine_is_for_what_is_free(dry_run, monkeypatch):
    """Memory that other programs hold is not; and of two processes each has the whole model."""
    free = SimpleNamespace(total=900 * GIB, available=200 * GIB, free=GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    code, out, err = dry_run()
    assert (code, err) == (0, "") and re.search(r"of 2048 tokens; [^$]* FLOPs an epoch\n", out)
    (alone,) = re.findall(r"device 0: (.*) of 180.0 GiB\n", out)
    code, out, err = dry_run(free=1)
    assert code == 1 and "GiB for 3 checkpoints and the export, 1.0 GiB free\n" in out
    assert err == "error: too little disk: lower --save_total_limit, or move --output_dir\n"
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
    assert alone in dry_run()[1]
    free.available //= 10
    assert "too little memory; to plan for another machine: " in dry_run()[2]


@pytest.mark.parametrize("gpus, tokens", [("4x32", 65536), ("2x24", 2048), ("1x40", 16384)])
def test_what_is_said_to_fit_fits_and_no_less(dry_run, gpus, tokens):
    """Each remedy of a refusal is tried: it is enough, and the next smaller one is not."""
    flags = ("--gpus", gpus, TOKENS)
    err = dry_run(*flags, tokens)[2]
    fewer, processes = (re.search(rf"{name} (\d+)", err) for name in (TOKENS, "--nproc_per_node"))
    assert fewer or processes
    if fewer:
        assert dry_run(*flags, fewer[1])[0] == 0 and dry_run(*flags, 2 * int(fewer[1]))[0] == 1
    if processes:
        assert fits(make_job(gpus).over(int(processes[1])), tokens)
        assert not fits(make_job(gpus).over(int(processes[1]) - 1), tokens)


def test_gpus_are_one_for_each_process_and_for_dry_runs(run_main):
    """Of unlike ones all plan for the smallest, since they cut a step in the same way."""
    processes = [SimpleNamespace(world_size=number) for number in (3, 2)]
    (first, *others), capability = mp.find_devices("2x80,1x40", processes[0])
    assert others == [first] * 2 and round(first / GIB, 1) == 39.0 and capability == AMPERE
    with pytest.raises(UserError, match="3 GPUs for 2 processes"):
        mp.find_devices("2x80,1x40", processes[1])
    assert run_main("--gpus", "4x80")[0] == 2


def test_a_tied_head_is_no_second_table():
    """Qwen2-1.5B's size; and of its embedding's gradient the head's part waits for the rest."""
    job = make_job("1x80", name="1.5B")
    assert mp.count_parameters(job.config)["model"] == 1_543_714_304
    table = 151_936 * 1536
    held = 1_543_714_304 * job.precision.bytes_per_parameter
    found = mp.step_memory(job, 1, place(job, 1)[0])["embedding"]
    assert found == pytest.approx(held + 2 * 2 * table, rel=1e-5)


def test_an_epochs_cost_is_that_of_its_rows():
    attention = 12 * 28 * 3584 * (1000**2 + 3000**2)  # of each row by itself
    found = mp.training_flops(memory.make_config("7B"), 7e9, np.array([1000, 3000]))
    assert found == 6 * 7e9 * 4000 + attention
