"""Precision, placement and the dry run: what is decided before anything is loaded."""

import bisect
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import memory_plan
import psutil
import pytest
import torch
import transformers
from conftest import ROOT
from memory_plan import GIB, largest_plain, parse_gpus, place, split_layers, step_memory

import sft_qwen2
from sft_qwen2 import choose_precision

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TOKENS = 32768  # of a forward pass, as by default
AMPERE, VOLTA = (8, 0), (7, 0)
MACHINES = {"1 x 80": [80], "2 x 80": [80] * 2, "4 x 80": [80] * 4, "8 x 80": [80] * 8}
MACHINES |= {"80 + 80 + 40": [80, 80, 40]}
FLAGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "max_len": 128,
}


@pytest.fixture(scope="module")
def config_7b():
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
    return transformers.Qwen2Config(num_hidden_layers=28, **sizes, **heads)


@pytest.fixture(scope="module")
def dir_7b(config_7b, tiny_model_dir, tmp_path_factory):
    """A folder that holds the 7B's config and a tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("qwen2-7b")
    config_7b.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tiny_model_dir / name, folder)
    return folder


@pytest.fixture(scope="module")
def memory_benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import memory

    return memory


@pytest.fixture
def pretend(monkeypatch):
    """A function: let the script find a GPU of this compute capability; all runs on the CPU."""

    def pretend(capability):
        monkeypatch.setattr(sft_qwen2, "find_devices", lambda *args: ([64 * GIB], capability))

    return pretend


# ---- The split ----------------------------------------------------------------------------------
def part_costs(config, precision, tokens=TOKENS) -> tuple[list[float], float]:
    """Bytes of the embedding, each layer and the head; bytes that every GPU needs besides."""
    parts = step_memory(config, tokens, precision)
    layers = [parts["layer"]] * config.num_hidden_layers
    return [parts["embedding"], *layers, parts["head"]], parts["work"]


def largest_load(costs, gpus, capacities, fixed) -> float:
    loads = [0.0] * len(capacities)
    for cost, gpu in zip(costs, gpus):
        loads[gpu] += cost
    return max((load + fixed) / room for load, room in zip(loads, capacities) if load)


def all_splits(num_items: int, num_gpus: int):
    """Every way to deal consecutive items to consecutive GPUs; a GPU may have none."""
    for cuts in itertools.combinations_with_replacement(range(num_items + 1), num_gpus - 1):
        yield [bisect.bisect_right(cuts, item) for item in range(num_items)]


def can_be_less(costs, capacities, fixed, limit: float) -> bool:
    """Whether a split has every load / capacity below `limit`.

    Exact: with each GPU filled as far as it goes, no other split has more items behind it.
    """
    item = 0
    for room in capacities:
        load = fixed
        while item < len(costs) and (load + costs[item]) / room < limit:
            load += costs[item]
            item += 1
    return item == len(costs)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("capability", [AMPERE, VOLTA])
def test_no_split_of_the_7b_is_better(config_7b, machine, capability):
    """No other split of whole layers has a smaller largest share: all of them, or by the greedy."""
    costs, fixed = part_costs(config_7b, choose_precision(capability, 1, False))
    capacities = [room * GIB for room in MACHINES[machine]]
    gpus = split_layers(costs, capacities, fixed)
    assert gpus == sorted(gpus) and len(gpus) == 30
    ours = largest_load(costs, gpus, capacities, fixed)
    assert not can_be_less(costs, capacities, fixed, ours * (1 - 1e-9))
    if len(capacities) <= 4:
        splits = all_splits(len(costs), len(capacities))
        best = min(largest_load(costs, split, capacities, fixed) for split in splits)
        assert ours == pytest.approx(best, rel=1e-12)


def test_no_split_of_anything_is_better():
    """Random costs and capacities, against every split; and the greedy against them too."""
    rng = random.Random(0)
    for _ in range(200):
        costs = [rng.uniform(0.1, 3) for _ in range(rng.randint(1, 8))]
        capacities = [rng.uniform(1, 4) for _ in range(rng.randint(1, 4))]
        fixed = rng.choice([0.0, rng.uniform(0, 2)])
        splits = list(all_splits(len(costs), len(capacities)))
        best = min(largest_load(costs, split, capacities, fixed) for split in splits)
        ours = split_layers(costs, capacities, fixed)
        assert largest_load(costs, ours, capacities, fixed) == pytest.approx(best)
        assert not can_be_less(costs, capacities, fixed, best * (1 - 1e-9))
        assert can_be_less(costs, capacities, fixed, best * (1 + 1e-9))


@pytest.mark.parametrize("machine", [name for name in MACHINES if name != "1 x 80"])
def test_the_split_is_never_worse_than_accelerates(config_7b, machine):
    """Largest share of a GPU over the mean share, beside accelerate's `auto`: printed with -s."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    precision = choose_precision(AMPERE, 1, False)
    costs, fixed = part_costs(config_7b, precision)
    capacities = [room * GIB for room in MACHINES[machine]]
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config_7b).to(precision.weights)
    options = {"no_split_module_classes": ["Qwen2DecoderLayer"], "dtype": precision.weights}
    memory = get_balanced_memory(model, dict(enumerate(capacities)), **options)
    their_map = infer_auto_device_map(model, memory, **options)
    layers = [f"model.layers.{i}" for i in range(28)]
    theirs = [their_map[part] for part in ("model.embed_tokens", *layers, "lm_head")]
    mean = (sum(costs) + fixed * len(capacities)) / sum(capacities)
    splits = (split_layers(costs, capacities, fixed), theirs)
    ours, auto = (largest_load(costs, gpus, capacities, fixed) / mean for gpus in splits)
    print(f"\n{machine}: max / mean {ours:.3f}, accelerate's auto {auto:.3f}")
    assert ours <= auto


@pytest.mark.parametrize("tied", [False, True])
def test_the_map_names_every_part(config_7b, tied):
    """Every module has its GPU, in order; norm and an untied head are last, a tied one first."""
    config = transformers.Qwen2Config(**config_7b.to_dict() | {"tie_word_embeddings": tied})
    device_map, loads = place(config, TOKENS, choose_precision(AMPERE, 1, False), [80 * GIB] * 4)
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    names = {name for name, _ in model.named_parameters()}
    assert all(any(name.startswith(f"{part}.") for part in device_map) for name in names)
    assert [device_map[f"model.layers.{i}"] for i in (0, 27)] == [0, 3]
    assert (device_map["model.embed_tokens"], device_map["model.norm"]) == (0, 3)
    assert device_map["lm_head"] == (0 if tied else 3)
    parts = step_memory(config, TOKENS, choose_precision(AMPERE, 1, False))
    total = parts["embedding"] + 28 * parts["layer"] + parts["head"] + 4 * parts["work"]
    assert sum(loads) == pytest.approx(total)


def test_parts_are_where_they_are_counted(config_7b):
    """A GPU too small for any part has none, needs nothing, and the map says so."""
    device_map, loads = place(
        config_7b, TOKENS, choose_precision(AMPERE, 1, False), [4 * GIB, 80 * GIB]
    )
    assert set(device_map.values()) == {1}
    assert loads[0] == 0 and loads[1] < 80 * GIB


@pytest.mark.parametrize("folder", ["tiny_model_dir", "untied_model_dir"])
def test_a_model_is_trained_over_a_map(folder, request, train, monkeypatch, write_rows, tmp_path):
    """The map of two GPUs, all on the CPU under accelerate's hooks, trains as none does.

    This shows that the map's names are the model's and cover it, and that hooks on these parts
    leave loss, gradients and export alone. That tensors travel between GPUs, no CPU can show.
    """
    from accelerate import dispatch_model

    folder, rows = request.getfixturevalue(folder), write_rows(ROWS)
    config = transformers.AutoConfig.from_pretrained(folder)
    device_map, _ = place(config, 256, choose_precision(None, 1, False), [GIB, GIB])
    assert set(device_map.values()) == {0, 1}
    cpu_map, load_model = dict.fromkeys(device_map, "cpu"), sft_qwen2.load_model

    def load_and_hook(name_or_path, dtype, device_map):
        model = load_model(name_or_path, dtype, device_map)
        options = {"skip_keys": model._skip_keys_device_placement, "force_hooks": True}
        return dispatch_model(model, device_map, **options)

    flags = {**FLAGS, "save_strategy": "no"}
    plain = train(folder, rows, tmp_path / "plain", **flags)
    monkeypatch.setattr(sft_qwen2, "plan_memory", lambda *args: sft_qwen2.Plan(cpu_map, 2048, 0))
    monkeypatch.setattr(sft_qwen2, "load_model", load_and_hook)
    mapped = train(folder, rows, tmp_path / "mapped", **flags)
    assert mapped.trainer.model.hf_device_map == cpu_map
    assert mapped.trainer.model.model.layers[1]._hf_hook is not None
    assert mapped.losses == plain.losses
    exports = [(tmp_path / name / "model.safetensors") for name in ("plain", "mapped")]
    assert exports[0].read_bytes() == exports[1].read_bytes()


# ---- What a step keeps, and whether it fits without checkpointing -------------------------------
def test_planning_imports_neither_torch_nor_the_script():
    code = "import sys, memory_plan; assert not {'torch', 'sft_qwen2', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_a_layer_keeps_is_what_autograd_saves(untied_model_dir):
    """Byte for byte, of a real layer in fp32: all it saves for its backward pass, each once.

    Besides, the formula leaves out a number per token and norm, and one per token and head. The
    other formats have no kernel here, and are traced: benchmarks/memory.py.
    """
    model = sft_qwen2.load_model(untied_model_dir, torch.float32).train()
    config, saved, now = model.config, {}, {}
    for i, part in enumerate([*model.model.layers, model.model.norm]):
        part.register_forward_pre_hook(lambda part, args, i=i: now.update(layer=i))

    def save(tensor):
        saved.setdefault(tensor.untyped_storage()._cdata, (now.get("layer"), tensor))
        return tensor

    ids = torch.arange(97) % 50
    row = {"input_ids": ids, "labels": ids}
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        for parameter in model.parameters():
            save(parameter)
        model(**sft_qwen2.flatten([row]))
    found = sum(x.untyped_storage().nbytes() for layer, x in saved.values() if layer == 1)
    precision = choose_precision(None, 1, False)
    layer = step_memory(config, 97, precision, checkpointing=False)["layer"]
    layer -= memory_plan.count_parameters(config)["layer"] * precision.bytes_per_parameter
    assert found - layer == 97 * 4 * (2 + config.num_attention_heads)


@pytest.mark.parametrize(
    "gpus, processes, capability, expected",  # tokens of the 7B
    [
        ("1x80", 1, AMPERE, range(4000, 5000)),
        ("2x80,1x40", 1, AMPERE, range(17000, 23000)),
        ("4x80", 1, AMPERE, range(33000, 38000)),
        ("1x141", 1, AMPERE, range(13000, 15000)),
        ("8x80", 8, AMPERE, range(8000, 10000)),
        ("8x32", 1, VOLTA, range(15000, 18000)),
        ("1x48", 1, AMPERE, range(1)),
        ("2x64", 2, AMPERE, range(1)),
    ],
)
def test_the_largest_micro_batch_without_checkpointing_is_that(
    config_7b, gpus, processes, capability, expected
):
    """On every GPU it needs at most 90 %, with the layers where the map has them; one more not."""
    precision, capacities = choose_precision(capability, processes, False), parse_gpus(gpus)
    device_map, _ = place(config_7b, TOKENS, precision, capacities, processes)
    terms = (precision, device_map, capacities, processes)
    largest = largest_plain(config_7b, 10**6, *terms)
    assert largest in expected
    layers = [f"model.layers.{i}" for i in range(28)]
    names = {"embedding": ["model.embed_tokens"], "layer": layers, "head": ["lm_head"]}

    def fullest(tokens):
        parts = step_memory(config_7b, tokens, precision, processes, checkpointing=False)
        loads = [parts["work"]] * len(capacities)
        for part, modules in names.items():
            for module in modules:
                for gpu in [device_map[module]] if device_map else range(processes):
                    loads[gpu] += parts[part]
        return max(load / room for load, room in zip(loads, capacities))

    assert largest == 0 or fullest(largest) <= 0.9
    assert fullest(largest + 1) > 0.9
    for most in (1, largest // 2 + 1):
        assert largest_plain(config_7b, most, *terms) == min(most, largest)


def test_the_layers_stay_where_the_map_has_them(config_7b):
    """With all of them on the first of four GPUs, the others are no help."""
    precision = choose_precision(AMPERE, 1, False)
    device_map, _ = place(config_7b, TOKENS, precision, [80 * GIB])
    alone = largest_plain(config_7b, TOKENS, precision, device_map, [80 * GIB], 1)
    assert alone == largest_plain(config_7b, TOKENS, precision, device_map, [80 * GIB] * 4, 1)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("gpu", ["A100", "A100 --fp32", "V100", "CPU", "8 x A100", "8 x V100"])
def test_the_formula_is_what_a_trace_shows(gpu, checkpointing, memory_benchmark):
    """Of 4 layers, what a step needs besides weights, gradients and state; never much too little.

    Whole models take minutes: benchmarks/memory.py.
    """
    capability, world, fp32, *_ = TABLE[gpu]
    precision = choose_precision(capability, world, fp32)
    config = memory_benchmark.make_config("1.5B")
    config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings = 4, 16384, False
    options = {"checkpointing": checkpointing, "world": world}
    traced = memory_benchmark.trace(config, 4096, precision, **options)["peak"]
    parts = step_memory(config, 4096, precision, **options)
    (formula,) = memory_plan.device_loads(config, parts, None, 1)
    parameters = memory_plan.count_parameters(config)["model"]
    fixed = parameters * precision.bytes_per_parameter
    if world > 1:
        fixed /= world
    ratio = (formula - fixed) / (traced - fixed)
    print(f"\n{gpu}, checkpointing {checkpointing}: {ratio:.3f} of the trace")
    assert 0.97 <= ratio <= (1.2 if world > 1 else 1.05)


def test_processes_share_weights_and_state_but_not_activations(config_7b):
    """Of 8, each holds an eighth of them, and whole: activations, and what is computed with."""
    precision = choose_precision(AMPERE, 8, False)
    parameters = 7_615_616_512
    small, large = (place(config_7b, n, precision, [80 * GIB] * 8, 8)[1] for n in (1024, 32768))
    assert len(large) == 8 and len({*large}) == 1
    shards = parameters * 16 / 8
    table, layer = 2 * 152064 * 3584, 2 * 233_057_792
    assert small[0] > shards + 3 * table
    kept = 28 * 32768 * 3584 * 2  # each layer's input
    work = 32768 * (12 * 18944 + 4 * 512 + 22 * 3584)
    assert large[0] == pytest.approx(shards + kept + work + 2 * table + 3 * layer, rel=0.001)


@pytest.mark.parametrize("given", ["balanced", "sequential", '{"": "cpu"}', '{"model": 0}'])
def test_a_device_map_of_ones_own_is_passed_on_and_not_planned(
    given, run_main, monkeypatch, tiny_model_dir, write_rows, tmp_path
):
    """On a machine too small for ours: nothing is said of devices that the map may not use."""
    seen, plan_memory = {}, sft_qwen2.plan_memory

    def from_pretrained(*args, **kwargs):
        seen.update(kwargs)
        raise sft_qwen2.UserError("seen")

    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(sft_qwen2, "plan_memory", lambda *args: sft_qwen2.Plan({"": 0}, 2048, 0))
    argv = ["--model_name_or_path", tiny_model_dir, "--data_path", write_rows(ROWS)]
    argv += ["--output_dir", tmp_path, "--report_to", "none"]
    assert run_main(*argv)[0] == 1 and seen["device_map"] == {"": 0}
    monkeypatch.setattr(sft_qwen2, "plan_memory", plan_memory)
    monkeypatch.setattr(sft_qwen2, "find_devices", lambda *args: ([1.0], None))
    code, out, err = run_main(*argv, "--device_map", given)
    assert code == 1 and err == "error: seen\n"
    assert seen["device_map"] == (json.loads(given) if given.startswith("{") else given)
    lines = [line for line in out.splitlines() if line.startswith("memory")]
    assert lines == ["memory     not planned: the device map is your own"]


# ---- Precision ----------------------------------------------------------------------------------
ROWS = [{"query": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}"} for i in range(40)]

# compute capability, processes, --fp32: weights, autocast's format, optimizer, bytes a parameter
TABLE = {
    "H100": ((9, 0), 1, False, "bfloat16", "no", "AdamW8bit", 6),
    "A100": ((8, 0), 1, False, "bfloat16", "no", "AdamW8bit", 6),
    "A100 --fp32": ((8, 0), 1, True, "float32", "bf16", "AdamW", 16),
    "T4": ((7, 5), 1, False, "float32", "fp16", "AdamW8bit", 10),
    "V100": ((7, 0), 1, False, "float32", "fp16", "AdamW8bit", 10),
    "V100 --fp32": ((7, 0), 1, True, "float32", "fp16", "AdamW", 16),
    "CPU": (None, 1, False, "float32", "no", "AdamW", 16),
    "8 x A100": ((8, 0), 8, False, "float32", "bf16", "AdamW", 16),
    "8 x V100": ((7, 0), 8, False, "float32", "fp16", "AdamW", 16),
}


def make_trainer(model_dir, tokenizer, precision, output_dir, **flags):
    """The trainer of build_trainer on the CPU, whatever GPU the precision is for."""
    flags = {"report_to": "none", "output_dir": output_dir, "use_cpu": True, **flags}
    argv = [str(text) for name, value in flags.items() for text in (f"--{name}", value)]
    args, training_args = sft_qwen2.parse_arguments(argv)
    model = sft_qwen2.load_model(model_dir, precision.weights)
    rows = {"train": [{}] * 8}
    plan = sft_qwen2.Plan(None, 2048, 0)
    return sft_qwen2.build_trainer(model, tokenizer, args, training_args, rows, precision, plan)


@pytest.mark.parametrize("name", TABLE)
def test_every_row_of_the_precision_table(name, tiny_model_dir, tiny_tokenizer, tmp_path):
    """Formats, optimizer and memory follow from the GPU and the number of processes."""
    capability, world_size, fp32, weights, autocast, optimizer, num_bytes = TABLE[name]
    precision = choose_precision(capability, world_size, fp32)
    assert round(precision.bytes_per_parameter) == num_bytes
    trainer = make_trainer(tiny_model_dir, tiny_tokenizer, precision, tmp_path)
    assert {str(p.dtype) for p in trainer.model.parameters()} == {f"torch.{weights}"}
    args = trainer.args
    assert args.mixed_precision == autocast
    assert (args.bf16, args.fp16) == (autocast == "bf16", autocast == "fp16")
    made = trainer.create_optimizer()
    assert type(made).__name__ == optimizer
    assert not args.optim_args or made.bf16_stochastic_round == (weights == "bfloat16")
    assert bool(args.optim_args) == (weights == "bfloat16")
    if optimizer == "AdamW":
        assert type(made) is torch.optim.AdamW


@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (7, 5), (7, 0)])
def test_the_gpus_capability_is_what_counts(capability, monkeypatch):
    """The least capable GPU decides, whatever is_bf16_supported says of its emulation."""
    capabilities = [(9, 0), capability]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: ((70 + gpu) * GIB, 80 * GIB))
    process = SimpleNamespace(world_size=1, device=torch.device("cuda", 0))
    free, least = sft_qwen2.find_devices(None, process)
    assert free == [70 * GIB, 71 * GIB] and least == capability
    assert choose_precision(least, 1, False).compute == ("bf16" if capability >= AMPERE else "fp16")


def test_several_gpus_are_never_data_parallel(
    tiny_model_dir, tiny_tokenizer, tmp_path, monkeypatch
):
    """With four GPUs in sight of one process, and a map of one, the model is not wrapped."""
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(GpuCount.get))
    precision = choose_precision(None, 1, False)
    trainer = make_trainer(tiny_model_dir, tiny_tokenizer, precision, tmp_path)
    assert trainer.args.n_gpu == 1
    model = trainer._wrap_model(trainer.model)
    assert not isinstance(model, torch.nn.DataParallel)


class GpuCount:
    """TrainingArguments.n_gpu on a machine of four GPUs: 4, until something sets _n_gpu."""

    @staticmethod
    def get(args):
        args.device  # noqa: B018 - sets _n_gpu to this machine's
        return vars(args).get("_n_gpu") or 4


@pytest.fixture
def eager():
    """torchao's step, not compiled: that takes a minute, and benchmarks/precision.py does it."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def test_resuming_over_bf16_weights(eager, pretend, train, untied_model_dir, write_rows, tmp_path):
    """With 8-bit state and rounding by chance, too, a resumed run is the run never stopped."""
    pretend(AMPERE)
    rows, flags = write_rows(ROWS), {**FLAGS, "save_steps": 3, "save_total_limit": 5}
    whole = train(untied_model_dir, rows, tmp_path / "whole", **flags)
    (tmp_path / "half").mkdir()
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "half")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    half = train(untied_model_dir, rows, tmp_path / "half", **flags, resume=True)
    assert type(half.trainer.optimizer.optimizer).__name__ == "AdamW8bit"
    assert len(half.steps) == 3 and len(whole.steps) == 6
    assert half.losses == whole.losses and whole.losses[-1] < whole.losses[0]
    weights = list(zip(half.trainer.model.parameters(), whole.trainer.model.parameters()))
    assert all(mine.dtype == torch.bfloat16 and torch.equal(mine, its) for mine, its in weights)

    saved = [tmp_path / "half" / "checkpoint-6" / x for x in ("model.safetensors", "optimizer.pt")]
    num_parameters = sum(mine.numel() for mine, _ in weights)  # so few, that names weigh too
    assert sum(path.stat().st_size for path in saved) == pytest.approx(4 * num_parameters, rel=0.1)


def test_no_step_is_lost_to_scaling(
    eager, pretend, train, tiny_model_dir, write_rows, tmp_path, monkeypatch
):
    """fp16 over fp32 weights: a loss scale that begins too high is halved; then all steps count.

    Accelerate leaves fp16 out on the CPU; with its autocast and a scaler put in, the CPU does it.
    """
    pretend(VOLTA)
    seen, build_trainer = SimpleNamespace(dtypes=set(), scales=[]), sft_qwen2.build_trainer

    def build_with_fp16(*args):
        trainer = seen.trainer = build_trainer(*args)
        trainer.accelerator.native_amp = True
        seen.scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        mlp = trainer.model.model.layers[0].mlp
        mlp.register_forward_hook(lambda module, args, output: seen.dtypes.add(output.dtype))
        clip = trainer._clip_grad_norm

        def watched(model):
            seen.scales.append(seen.scaler.get_scale())
            return clip(model)

        trainer._clip_grad_norm = watched
        return trainer

    monkeypatch.setattr(sft_qwen2, "build_trainer", build_with_fp16)
    flags = {**FLAGS, "max_steps": 20, "save_strategy": "no"}
    run = train(tiny_model_dir, write_rows(ROWS), tmp_path / "out", **flags)
    assert seen.dtypes == {torch.float16}
    assert {parameter.dtype for parameter in run.trainer.model.parameters()} == {torch.float32}
    norms = [log["grad_norm"] for log in run.trainer.state.log_history if "grad_norm" in log]
    lost = [not math.isfinite(norm) for norm in norms]
    assert lost[0] and seen.scales[1] == seen.scales[0] / 2
    assert sum(lost) < 12 and lost == sorted(lost, reverse=True)  # the first ones, then no more
    assert seen.scales[-1] == seen.scaler.get_scale() == 2.0 ** (24 - sum(lost))
    assert run.losses[-1] < run.losses[0] - 1


# ---- The dry run --------------------------------------------------------------------------------
@pytest.fixture
def dry_run(run_main, dir_7b, monkeypatch, tmp_path):
    """A function: --gpus, flags and the free disk in GiB to what main returns, over the 7B."""

    def dry_run(*flags, free=1000.0):
        disk = SimpleNamespace(free=free * GIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
        argv = ["--model_name_or_path", dir_7b, "--data_path", ROOT / "data", "--dry_run"]
        argv += ["--output_dir", tmp_path / "outputs", "--report_to", "none"]
        code, out, err = run_main(*argv, *flags)
        assert not (tmp_path / "outputs").exists()
        return code, out, err

    return dry_run


@pytest.mark.parametrize(
    "gpus, precision, num_devices, checkpoint",  # bytes a parameter: weights and optimizer state
    [
        ("1x80", "bf16 over bfloat16", 1, 4),
        ("4x80", "bf16 over bfloat16", 4, 4),
        ("4x24", "bf16 over bfloat16", 4, 4),
        ("2x80,1x40", "bf16 over bfloat16", 3, 4),
        ("8x32", "fp16 over float32", 8, 6),
    ],
)
def test_a_dry_run_tells_all(dry_run, gpus, precision, num_devices, checkpoint):
    """Counts, an example, steps, formats, every device, the disk: and no file is written."""
    code, out, err = dry_run("--gpus", gpus)
    assert (code, err) == (0, "")
    num_rows = len((ROOT / "data" / "train.jsonl").read_bytes().splitlines())
    assert f"{num_rows} rows = {num_rows} trained + 0 dropped + 0 rejected (0 cut)" in out
    assert re.search(r"answer tokens = [\d,]+ trained \+ 0 cut \+ 0 dropped", out)
    assert re.search(r"assistant\n⟦[^⟧]+<\|im_end\|>⟧\n", out)
    capability = "8.0" if checkpoint == 4 else "7.0"
    reason = f"assumed compute capability {capability}"
    assert f"precision  {precision} weights, adamw_torch_8bit ({reason})\n" in out
    assert f"steps      {math.ceil(num_rows / 128)} of 128 rows" in out
    devices = re.findall(r"memory     device (\d+): ([\d.]+) of ([\d.]+) GiB( \(.*\))?\n", out)
    rooms = [int(gib) for n, gib in (x.split("x") for x in gpus.split(",")) for _ in range(int(n))]
    assert [float(room) for *_, room, _ in devices] == rooms
    assert all(0 < float(load) < room for (_, load, _, _), room in zip(devices, rooms))
    assert ("model.embed_tokens to" in out) == ("to lm_head" in out) == (num_devices > 1)
    at_once = f"torchrun --nproc_per_node {num_devices} " in out
    assert at_once == (gpus in ("4x80", "8x32"))  # else there is one, or one is too small
    assert ("too small to work at once" in out) == (gpus in ("4x24", "2x80,1x40"))
    needed, kept = re.search(r"disk       ([\d.]+) GiB for (\d) checkpoints", out).groups()
    weights = 2 if checkpoint == 4 else 4
    size = 7_615_616_512 * (weights + int(kept) * checkpoint) / GIB
    assert float(needed) == pytest.approx(size, rel=0.01) and kept == "3"


def test_a_dry_run_without_gpus_plans_for_the_memory_that_is_free(dry_run, monkeypatch):
    """What other programs hold is not there, what the page cache holds is; a tenth stays free."""
    memory = SimpleNamespace(total=900 * GIB, available=200 * GIB, free=GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    code, out, err = dry_run()
    assert (code, err) == (0, "")
    assert "precision  fp32 over float32 weights, adamw_torch_fused (no GPU)\n" in out
    assert re.search(r"device 0: [\d.]+ of 180.0 GiB\n", out)
    memory.available //= 10
    code, out, err = dry_run()
    assert code == 1 and err.startswith("error: too little memory; to plan for another machine: ")


@pytest.mark.parametrize(
    "gpus, budget, said",
    [
        ("1x80", 32768, r"micro-batches over 4,\d{3} tokens"),
        ("4x80", 32768, r"nothing: memory suffices"),
        ("1x80", 2048, r"nothing: memory suffices"),
        ("1x49", 1024, r"all micro-batches"),
    ],
)
def test_the_plan_says_where_checkpointing_is_needed(
    dry_run, gpus, budget, said, config_7b, capsys
):
    """The same number is in the Plan, of which the trainer is to make use."""
    code, out, _ = dry_run("--gpus", gpus, "--tokens_per_forward", budget)
    assert code == 0
    (line,) = re.findall(r"recompute  (.*)\n", out)
    assert re.fullmatch(said, line)
    arguments = sft_qwen2.parse_arguments(["--tokens_per_forward", str(budget)])
    precision, capacities = choose_precision(AMPERE, 1, False), parse_gpus(gpus)
    plan = sft_qwen2.plan_memory(config_7b, *arguments, precision, capacities, 566)
    planned = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("devices")]
    assert planned and set(planned) <= set(out.splitlines())
    device_map, _ = place(config_7b, budget, precision, capacities)
    assert plan.device_map is None  # no GPU here
    assert plan.tokens_per_forward == budget
    assert plan.plain_tokens == largest_plain(
        config_7b, budget, precision, device_map, capacities, 1
    )


def test_a_row_longer_than_the_budget_is_planned_for(config_7b, capsys):
    """It makes a micro-batch of its own."""
    arguments = sft_qwen2.parse_arguments(["--tokens_per_forward", "512"])
    terms = (choose_precision(AMPERE, 1, False), [80 * GIB] * 4)
    plan = sft_qwen2.plan_memory(config_7b, *arguments, *terms, 30000)
    _, loads = place(config_7b, 30000, *terms, checkpointing=False)
    assert f"device 0: {loads[0] / GIB:.1f} of 80.0 GiB" in capsys.readouterr().out
    assert plan.plain_tokens == 30000


@pytest.mark.parametrize(
    "capability, gib, budget", [(AMPERE, 80, 4000), (AMPERE, 65, 32768), (None, 200, 2048)]
)
def test_micro_batches_are_as_large_as_is_fastest(config_7b, capability, gib, budget):
    """Where enough tokens fit without computing layers twice, no more than these at once."""
    precision, capacities = choose_precision(capability, 1, False), [gib * GIB]
    plan = sft_qwen2.plan_memory(
        config_7b, *sft_qwen2.parse_arguments([]), precision, capacities, 566
    )
    assert budget <= plan.tokens_per_forward <= budget * 1.25
    assert plan.plain_tokens == plan.tokens_per_forward or capability is None or gib == 65


def test_without_gradient_checkpointing_all_must_fit(dry_run):
    flags = ("--gpus", "1x80", "--gradient_checkpointing", "False")
    code, _, err = dry_run(*flags, "--tokens_per_forward", "8192")
    assert code == 1 and "8192 tokens without gradient checkpointing" in err
    code, out, _ = dry_run(*flags)  # as many as fit
    assert code == 0 and "nothing: memory suffices" in out


def test_without_gpus_each_process_has_the_whole_model(dry_run, monkeypatch, config_7b):
    """Nothing is sharded there: what is planned for one of two is what is planned for one."""
    memory = SimpleNamespace(available=200 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    alone = re.findall(r"device 0: ([\d.]+) of", dry_run()[1])
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
    assert re.findall(r"device 0: ([\d.]+) of", dry_run()[1]) == alone != []


def test_what_is_said_to_fit_fits_and_no_less(dry_run, config_7b):
    """Each remedy of a refusal is tried: it is enough, and the next smaller one is not."""
    wanted = ("--tokens_per_forward", TOKENS)
    code, out, err = dry_run("--gpus", "4x32", *wanted)
    assert code == 1 and "device 3: 32" in out
    found = re.fullmatch(
        r"error: too little memory \(5% of it stays free\); what would fit: "
        r"--tokens_per_forward (\d+); (\d+) such GPUs; "
        r"torchrun --nproc_per_node (\d+) with --tokens_per_forward (\d+)\n",
        err,
    )
    budget, num_gpus, processes, longest = map(int, found.groups())
    assert dry_run("--gpus", "4x32", "--tokens_per_forward", budget)[0] == 0
    assert dry_run("--gpus", "4x32", "--tokens_per_forward", 2 * budget)[0] == 1
    assert dry_run("--gpus", f"{num_gpus}x32", *wanted)[0] == 0
    assert dry_run("--gpus", f"{num_gpus - 1}x32", *wanted)[0] == 1
    _, out, _ = dry_run("--gpus", "4x32")  # nothing asked for: as many as fit
    assert f"forward passes of {budget} tokens" in out

    def fits(processes):
        precision = choose_precision(VOLTA, processes, False)
        loads = place(config_7b, longest, precision, [32 * GIB] * processes, processes)[1]
        return max(loads) <= 0.95 * 32 * GIB

    assert fits(processes) and not fits(processes - 1)


def test_no_budget_is_offered_below_the_longest_row(config_7b):
    """It would have a micro-batch of its own, of more tokens than that."""
    single, sharded = (choose_precision(VOLTA, processes, False) for processes in (1, 2))
    for longest, offered in ((16384, True), (16385, False)):
        terms = (TOKENS, longest, single, sharded, [32 * GIB] * 4, 1)
        ways = memory_plan.what_would_fit(config_7b, *terms)
        assert ("--tokens_per_forward 16384" in ways) == offered


@pytest.mark.parametrize("gpus", ["1x80", "4x32"])
def test_fp32_that_does_not_fit_names_the_default_if_that_does(dry_run, gpus):
    code, _, err = dry_run("--gpus", gpus, "--fp32", "True")
    assert code == 1 and "too little memory" in err
    assert ("one process without --fp32" in err) == (dry_run("--gpus", gpus)[0] == 0)


def test_a_full_disk_is_refused_with_figures(dry_run, tiny_model_dir):
    """This machine's is; of a machine that one only plans for, the figures are enough."""
    code, out, err = dry_run("--model_name_or_path", tiny_model_dir, free=0.01)
    assert code == 1 and "0.0 GiB for 3 checkpoints and the export, 0.0 GiB free\n" in out
    assert err == "error: too little disk: lower --save_total_limit, or move --output_dir\n"
    flags = ("--model_name_or_path", tiny_model_dir, "--save_strategy", "no")
    assert dry_run(*flags, free=0.01)[0] == 0
    code, out, _ = dry_run("--gpus", "4x80", free=50)
    assert code == 0 and "GiB for 3 checkpoints and the export\n" in out


@pytest.mark.parametrize(
    "gpus", ["4", "x80", "4x", "80GB", "4x80,", "0x80", "4x0", "4x802x80", "a"]
)
def test_malformed_gpus_are_a_usage_error(dry_run, gpus):
    code, out, err = dry_run(f"--gpus={gpus}")
    assert code == 2 and out == "" and "--gpus" in err and err.count("\n") == 1


def test_gpus_are_one_for_each_process():
    """Of unlike ones all plan for the smallest, since they cut a step in the same way."""
    found = sft_qwen2.find_devices("2x80,1x40", SimpleNamespace(world_size=3))
    assert found == ([40 * GIB] * 3, AMPERE)
    with pytest.raises(sft_qwen2.UserError, match="3 GPUs for 2 processes"):
        sft_qwen2.find_devices("2x80,1x40", SimpleNamespace(world_size=2))


def test_gpus_are_for_dry_runs(run_main):
    assert run_main("--gpus", "4x80")[0] == 2


def test_a_dry_run_leaves_a_run_alone(run_main, train, tiny_model_dir, write_rows, tmp_path):
    """Over the folder of a finished run it plans, changes nothing, and had its steps right."""
    rows, flags = write_rows(ROWS), {"num_train_epochs": 1.5, "save_strategy": "no"}
    flags |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    run = train(tiny_model_dir, rows, tmp_path, **flags)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    flags |= {"model_name_or_path": tiny_model_dir, "data_path": rows, "output_dir": tmp_path}
    argv = [text for name, value in flags.items() for text in (f"--{name}", value)]
    code, out, _ = run_main(*argv, "--dry_run")
    assert code == 0
    assert f"steps      {run.trainer.state.max_steps} of 12 rows" in out
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
