"""Qwen2-7B on one GPU: is it exact, does the plan hold, how fast is it beside TRL?

    pip install pytest trl==1.16.0 liger-kernel
    python benchmarks/gpu.py [--tiny] [--minutes 8.5] [--out FILE] [--show FILE]

First the numerics. tests/test_attention_and_loss.py compares attention, loss and model on this
device with fp64. A small fp16 run is resumed, beside the run that was not stopped. A 0.5B trains
with AdamW's state and gradients in host memory, beside the same on the GPU: no bit may differ.

Then a 7B with random weights, made on the GPU: no checkpoint, data or network is needed. Examples
are random tokens with the lengths of GSM8K (short: 100 to 500, mean 215, two thirds trained) and
long ones (4,113 to 8,001, mean 5,017, half trained). All contenders take the same examples in the
same order, as many to a step, in bf16, with 8-bit AdamW, stochastic rounding, and gradient
checkpointing switched on:

    this trainer                    as it is: no checkpointing where its plan has the memory
    this trainer, 23 GiB            short ones only, on a GPU that is made as small as one of 24 GB:
                                    AdamW's state and gradients are in host memory
    this trainer, compiled          the same; torch.compile of each layer's MLP and norms
    this trainer, all checkpointed  micro-batches of at most 32,768 tokens
    TRL                             SFTTrainer, padded batches: of 4 or 16 short ones, of 1 long one
    TRL, Liger kernels              the same, with use_liger_kernel

Each is a process of its own. One step warms up: in it the optimizer compiles. Tokens and FLOPs are
those of the examples, not of padding. MFU is sft.step_time.training_flops over the data sheet's
peak. What is recomputed is not in it, but in "layer passes". "Peak" is the most that was allocated
in the timed steps, "reserved" what the allocator took for it, "planned" the formula for the largest
micro-batch. A run whose first-step loss differs by over 1e-3, or that trains another number of
tokens, is VOID. After its runs, "this trainer" saves a checkpoint and answers 40 questions: their
time, bytes and memory are measured, too.

It ends within --minutes. What was measured until then is in benchmarks/results/<GPU>.json, and
--show prints the tables of such a file. Exit code 1: something is wrong, VOID, or broke. Without a
GPU, or with --tiny, every path runs with a tiny model, to show that it does. Then nothing is
written without --out.
"""

import argparse
import copy
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch_2_11  # noqa: F401  # before the script imports what this adds
from compiled import compile_parts

from throughput import (  # isort: skip
    LONG,
    MAX_LEN,
    ROOT,
    SEED,
    TOLERANCE,
    Clock,
    RandomExamples,
    be_quiet,
    draw,
    list_in_order,
    list_lengths,
    make_own_trainer,
    make_trl_trainer,
    options_of_others,
)

import forks
import gpu_checks
import runs
import torch
import transformers

import sft.limits
import sft_qwen2
from sft.errors import UserError
from sft.memory_model import (
    QWEN2_SIZES,
    count_parameters,
    list_modules,
    peak_bytes,
    pinned_host_bytes,
)
from sft.precision import Precision, choose_precision, name_format
from sft.step_time import training_flops
from sft.throughput import GIB, find_peak_tflops

CONTENDERS = (
    "numerics",
    "fp16 resumed",
    "host memory",
    "this trainer",
    "this trainer, 23 GiB",
    "TRL",
    "this trainer, compiled",
    "this trainer, all checkpointed",
    "TRL, Liger kernels",
)
CHECKPOINTED_TOKENS = 4 * MAX_LEN  # of a micro-batch of "all checkpointed"
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "accelerate", "torchao", "triton", "trl", "liger-kernel")
MIN_SECONDS = 30  # a contender is not started with less time left
MESSAGE_LENGTH = 300
NUMERICS = (
    *("tests/test_attention_and_loss.py", "-p", "torch_2_11", "-p", "no:cacheprovider"),
    "--assert=plain",  # plugins may be imported by now, and could not be rewritten
    *("--noconftest", "-s", "-q", "-k", "on_device or those_of_fp64", "-m"),
)
SMALL_GPU_GIB = 23
ON_HOST = ("state", "gradients")
NO_GPU = "no GPU: every path ran with a tiny model, and figures of speed and memory are missing"
TINY_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """Examples to train on, and how."""

    examples: RandomExamples
    examples_per_step: int
    num_steps: int  # timed, after one to warm up
    batch_sizes: tuple[int, ...]  # of TRL: each is tried

    def draw(self, vocab_size: int) -> list[dict]:
        return draw(self.examples.make(vocab_size), (self.num_steps + 1) * self.examples_per_step)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run here."""

    device: str
    is_tiny: bool
    config: transformers.Qwen2Config
    precision: Precision
    loads: dict[str, Load]


SHORT = RandomExamples(number=256, shortest=100, longest=500, skew=2.48, trained_share=2 / 3)
LOADS = {
    "short": Load(examples=SHORT, examples_per_step=64, num_steps=3, batch_sizes=(4, 16)),
    "long": Load(examples=LONG, examples_per_step=8, num_steps=2, batch_sizes=(1,)),
}
TINY_LOADS = {
    "short": Load(
        examples=replace(SHORT, number=16, shortest=10, longest=50),
        examples_per_step=8,
        num_steps=1,
        batch_sizes=(4,),
    ),
    "long": Load(
        examples=replace(LONG, number=8, shortest=205, longest=400),
        examples_per_step=4,
        num_steps=1,
        batch_sizes=(1,),
    ),
}


def find_setting(is_tiny: bool) -> Setting:
    """Return Qwen2-7B and its examples; a tiny model where there is no GPU."""
    device = "cpu"
    capability = None
    if torch.cuda.is_available():
        device = "cuda"
        capability = torch.cuda.get_device_capability()
    sizes = asdict(QWEN2_SIZES["Qwen2-7B"])
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    loads = LOADS
    if is_tiny or device == "cpu":
        sizes = TINY_SIZES
        loads = TINY_LOADS
    return Setting(
        device=device,
        is_tiny=is_tiny or device == "cpu",
        config=transformers.Qwen2Config(**sizes, use_cache=False),
        precision=choose_precision(capability, False, "auto"),
        loads=loads,
    )


def make_model(setting: Setting, model_class, attention: str):
    """Return a model on the device, with the same random weights each time."""
    torch.manual_seed(SEED)
    config = copy.deepcopy(setting.config)  # trainers write into it
    with torch.device(setting.device):
        model = model_class._from_config(
            config, dtype=setting.precision.weights, attn_implementation=attention
        )
    return model.train()


# ---- What a run is measured by ------------------------------------------------------------------
class GpuClock(Clock):
    """Also notes each step's peak memory, and the tokens of the timed micro-batches."""

    def __init__(self, trainer):
        super().__init__(trainer)
        self.step_peaks = []
        self.batch_tokens = []

    def count(self, model, args, kwargs) -> None:
        super().count(model, args, kwargs)
        self.batch_tokens.append(kwargs["input_ids"].numel())

    def on_step_end(self, *args, **kwargs) -> None:
        super().on_step_end(*args, **kwargs)
        if self.is_on_gpu:
            self.step_peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        if len(self.boundaries) == 1:  # that was the warm-up
            self.batch_tokens.clear()


def measure(trainer, load: Load, examples: list[dict]) -> tuple[dict, list[int]]:
    """Train; return the figures, and the tokens of the timed micro-batches.

    `examples`: of all steps, in order. Figures of speed and memory are there on a GPU only.
    """
    clock = GpuClock(trainer)
    trainer.train()
    result = clock.result()
    lengths = list_lengths(examples[load.examples_per_step :])
    num_tokens = int(lengths.sum())
    found = {
        "first_step_loss": result.first_step_loss,
        "tokens": num_tokens,
        "trained_tokens": result.trained_tokens,
        "padding": 1 - num_tokens / result.computed_tokens,
        "layer_passes": result.layer_passes,
        "largest_micro_batch": max(clock.batch_tokens),
    }
    if clock.is_on_gpu:
        seconds = result.duration_s
        found["s_per_step"] = seconds / load.num_steps
        found["tokens_per_s"] = num_tokens / seconds
        found["trained_tokens_per_s"] = result.trained_tokens / seconds
        found["peak_gib"] = max(clock.step_peaks[1:]) / GIB
        found["reserved_gib"] = torch.cuda.memory_reserved() / GIB
        peak_tflops = find_peak_tflops(torch.cuda.get_device_name())
        if peak_tflops is not None:
            flops = training_flops(trainer.model.config, lengths, result.trained_tokens)
            found["mfu"] = flops / seconds / (peak_tflops * 1e12)
    return found, clock.batch_tokens


# ---- The contenders -----------------------------------------------------------------------------
def make_options(setting: Setting, load: Load, folder: str, batch_size: int) -> dict:
    """Return the options of all contenders."""
    return {
        "output_dir": folder,
        "max_steps": load.num_steps + 1,
        "seed": SEED,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": load.examples_per_step // batch_size,
        "gradient_checkpointing": True,
        "learning_rate": 1e-5,
        "weight_decay": 0.003,
        "logging_steps": load.num_steps + 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": setting.device == "cpu",
    }


def make_trainer(setting: Setting, load: Load, folder: str, **more_flags):
    """Return (this trainer with random weights, its plan, its examples)."""
    flags = {**make_options(setting, load, folder, batch_size=4), **more_flags}

    def make_random(model_class, *_, **__):
        return make_model(setting, model_class, "packed_attention")

    examples = load.draw(setting.config.vocab_size)
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs.TINY)
    with mock.patch.object(sft_qwen2, "load_weights", make_random):
        trainer, plan = make_own_trainer(setting.config, tokenizer, examples, flags)
    return trainer, plan, examples


def place(in_host_memory: tuple[str, ...]):
    """Return a context in which the plan keeps just this in host memory."""
    return mock.patch.object(sft.limits, "list_host_levels", lambda *_: [in_host_memory])


def be_small_gpu(setting: Setting):
    """Let this process have as much memory as a GPU of 24 GB, and return a context for its plan."""
    if setting.device == "cpu":
        return place(ON_HOST)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(SMALL_GPU_GIB * GIB / total)
    free_and_total = (SMALL_GPU_GIB * GIB, total)
    return mock.patch.object(torch.cuda, "mem_get_info", lambda *_: free_and_total)


def train_own(setting: Setting, load: Load, folder: str, contender: str) -> dict:
    """Train with this trainer; return the figures."""
    is_checkpointed = contender.endswith("all checkpointed")
    flags = {}
    if is_checkpointed:
        flags["tokens_per_forward"] = CHECKPOINTED_TOKENS
    machine = nullcontext()
    if contender.endswith("23 GiB"):
        machine = be_small_gpu(setting)
    with machine:
        trainer, plan, examples = make_trainer(setting, load, folder, **flags)
    if is_checkpointed:
        trainer.max_tokens_without_checkpointing = 0
    if contender.endswith("compiled"):
        backend = "aot_eager"  # takes no minutes on the CPU
        if setting.device == "cuda":
            backend = "inductor"
        compile_parts(trainer.model, backend)
    ordered = list_in_order(examples, load.examples_per_step)
    found, batch_tokens = measure(trainer, load, ordered)
    planned_bytes = 0
    for tokens in set(batch_tokens):
        # The limit is lower than planned where that was too much.
        recompute = tokens > trainer.max_tokens_without_checkpointing
        needed = peak_bytes(plan.job, list_modules(setting.config), tokens, recompute=recompute)
        planned_bytes = max(planned_bytes, needed)
    found["planned_gib"] = planned_bytes / GIB
    found["free_gib"] = plan.devices.free_bytes[0] / GIB
    if plan.in_host_memory:
        found["host_gib"] = pinned_host_bytes(plan.job) / GIB
    return found


def train_trl(setting: Setting, load: Load, folder: str, batch_size: int, contender: str) -> dict:
    """Train with trl.SFTTrainer; return the figures."""
    precision = setting.precision
    options = options_of_others(make_options(setting, load, folder, batch_size))
    options["use_liger_kernel"] = contender.endswith("Liger kernels")
    options["optim"] = precision.optim
    if precision.weights == torch.bfloat16:
        options["optim_args"] = "bf16_stochastic_round=True"
    options["bf16"] = False  # With weights in bf16, autocast would have nothing to do.
    options["fp16"] = precision.compute == torch.float16
    examples = list_in_order(load.draw(setting.config.vocab_size), load.examples_per_step)
    model = make_model(setting, transformers.Qwen2ForCausalLM, "sdpa")
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs.TINY)
    trainer = make_trl_trainer(model, tokenizer, examples, options)
    found, _ = measure(trainer, load, examples)
    return found


# ---- What is compared on small models, and measured beside the runs -----------------------------
def train_small(setting: Setting, folder: str, in_host_memory: tuple[str, ...]):
    """Train in this place; return (weights on the CPU, figures of host memory)."""
    with place(in_host_memory):
        trainer, plan, _ = make_trainer(setting, setting.loads["short"], folder)
    trainer.train()
    weights = {name: p.detach().cpu() for name, p in trainer.model.named_parameters()}
    figures = {"asked_gib": pinned_host_bytes(plan.job) / GIB}
    if in_host_memory:
        figures["pinned_gib"] = trainer.optimizer.optimizer.pinned_memory.num_bytes / GIB
    if setting.device == "cuda":
        allocated = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
        figures["allocated_gib"] = allocated / GIB
    return weights, figures


def compare_places(setting: Setting, folder: str) -> list[dict]:
    """Return how many weights of a 0.5B depend on where gradients and AdamW's state are.

    Two runs in the same place say how many depend on nothing but the GPU's order of sums.
    """
    if not setting.is_tiny:
        sizes = asdict(QWEN2_SIZES["Qwen2-0.5B"])
        sizes["rope_parameters"] = setting.config.rope_parameters
        setting = replace(setting, config=transformers.Qwen2Config(**sizes, use_cache=False))
    on_host = ON_HOST
    if setting.precision.needs_autocast:
        on_host = ON_HOST[:1]  # gradients of fp32 weights stay on the GPU
    torch.use_deterministic_algorithms(True, warn_only=True)
    wanted, _ = train_small(setting, folder, ())
    again, _ = train_small(setting, folder, ())
    found, figures = train_small(setting, folder, on_host)
    same_way = gpu_checks.count_different(again, wanted)
    other_way = gpu_checks.count_different(found, wanted)
    name = f"0.5B, weights that differ with {' and '.join(on_host)} in host memory"
    return [
        {"name": name, "error": other_way, "limit": same_way},
        {"what": "host memory of a 0.5B", "figures": figures},
    ]


def save_and_answer(setting: Setting, folder: str) -> list[dict]:
    """Return what a save and the sample answers of a model take after a step."""
    load = replace(setting.loads["short"], num_steps=0)  # one to warm up
    trainer, plan, examples = make_trainer(setting, load, folder)
    trainer.train()
    return [
        {"what": "a save", "figures": gpu_checks.measure_save(trainer, plan)},
        {"what": "40 answers", "figures": gpu_checks.measure_answers(trainer, plan, examples)},
    ]


# ---- A contender's process ----------------------------------------------------------------------
def print_result(result: dict) -> None:
    print("\nRESULT " + json.dumps(result), flush=True)


def report_run(run: dict, train, *args) -> None:
    """Print the result of train(*args) as a line of JSON, or why there is none."""
    free_memory()
    try:
        run.update(train(*args))
    except (torch.OutOfMemoryError, UserError) as error:
        run["error"] = " ".join(str(error).split())[:MESSAGE_LENGTH]
    print_result(run)


def free_memory() -> None:
    gc.collect()  # A trainer refers to itself: only now is the last one's memory free.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def work(contender: str, setting: Setting) -> None:
    """Do a contender's runs."""
    if contender == "numerics":
        marker = "not gpu"
        if setting.device == "cuda":
            marker = "gpu"
        import pytest  # which may be missing: see why_not

        sys.exit(int(pytest.main([*NUMERICS, marker])))
    be_quiet()
    if setting.device == "cpu" and contender in ("host memory", "this trainer, 23 GiB"):
        forks.take_for_gpu("bf16", shard=False)
        setting = replace(setting, precision=choose_precision((8, 0), False, "auto"))
    with tempfile.TemporaryDirectory() as folder:
        if contender == "fp16 resumed":
            results = gpu_checks.resume_in_fp16(Path(folder), setting.device)
        elif contender == "host memory":
            results = compare_places(setting, folder)
        else:
            train_on_all_loads(contender, setting, folder)
            results = []
        if contender == "this trainer":
            free_memory()
            results = save_and_answer(setting, folder)
        for result in results:
            print_result(result)


def train_on_all_loads(contender: str, setting: Setting, folder: str) -> None:
    weights = name_format(setting.precision.weights)
    for kind, load in setting.loads.items():
        run = {"examples": kind, "contender": contender, "weights": weights}
        if contender.endswith("23 GiB") and kind != "short":
            continue
        if not contender.startswith("TRL"):
            report_run(run, train_own, setting, load, folder, contender)
            continue
        for batch_size in load.batch_sizes:
            run = {**run, "contender": f"{contender}, {batch_size} at once"}
            report_run(run, train_trl, setting, load, folder, batch_size, contender)


def work_aside(log: str, contender: str, setting: Setting) -> None:
    """Do a contender's runs, and write all that is printed into a file."""
    file = os.open(log, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    work(contender, setting)


# ---- All of them --------------------------------------------------------------------------------
def why_not(contender: str) -> str | None:
    """Return why a contender cannot run here, in a sentence."""
    needed = {"numerics": ("pytest", "pytest"), "TRL": ("trl", "trl==1.16.0")}
    needed["Liger"] = ("liger_kernel", "liger-kernel")
    for part, (module, package) in needed.items():
        if part in contender and not importlib.util.find_spec(module):
            return f"{contender}: skipped; pip install {package}"
    if "Liger" in contender and not torch.cuda.is_available():
        return f"{contender}: skipped; they are for GPUs"
    return None


def prepare_environment() -> None:
    """Set what the processes of contenders inherit, before they import torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    # The script sets this, too, but in a contender's process torch is imported before the script.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for products that are the same each time


def run_worker(contender: str, setting: Setting, limit_s: float) -> tuple[list[dict], str | None]:
    """Return the results of a contender's process, and what was the matter with it.

    It is killed after limit_s seconds.
    """
    method = "fork"  # quick, as all is imported here
    if setting.device == "cuda":
        method = "spawn"  # CUDA cannot be forked
    problem = None
    with tempfile.NamedTemporaryFile("r") as log:
        arguments = (log.name, contender, setting)
        process = multiprocessing.get_context(method).Process(target=work_aside, args=arguments)
        process.start()
        process.join(limit_s)
        if process.is_alive():
            process.kill()
            process.join()
            problem = f"{contender}: cut short, the time was over"
        lines = log.read().split("\n")
    if problem is None and process.exitcode != 0:
        last = "".join(line for line in lines if line.strip())[-MESSAGE_LENGTH:]
        problem = f"{contender}: exit code {process.exitcode}, {last}"
    results = []
    for line in lines:
        if line.startswith("RESULT "):
            results.append(json.loads(line.removeprefix("RESULT ")))
    return results, problem


def kind_of(result: dict) -> str:
    """Return in which list of the report a result belongs."""
    if "limit" in result:
        return "numerics"
    if "figures" in result:
        return "facts"
    return "runs"


def mark_void(all_runs: list[dict]) -> bool:
    """Mark the runs that did other work than the first on the same examples; return if any did."""
    first_runs = {}
    is_any_void = False
    for run in all_runs:
        run["void"] = False
        if "first_step_loss" not in run:
            continue
        first = first_runs.setdefault((run["examples"], run["weights"]), run)
        is_close = abs(run["first_step_loss"] / first["first_step_loss"] - 1) <= TOLERANCE
        run["void"] = not is_close or run["trained_tokens"] != first["trained_tokens"]
        is_any_void = is_any_void or run["void"]
    return is_any_void


def has_errors(checks: list[dict]) -> bool:
    return any(check["error"] > check["limit"] for check in checks)


COLUMNS = {  # key of a run: (title, format)
    "examples": ("examples", ""),
    "contender": ("contender", ""),
    "s_per_step": ("s/step", ".2f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "trained_tokens_per_s": ("trained tokens/s", ",.0f"),
    "mfu": ("MFU", ".1%"),
    "peak_gib": ("peak GiB", ".1f"),
    "planned_gib": ("planned GiB", ".1f"),
    "reserved_gib": ("reserved GiB", ".1f"),
    "host_gib": ("host GiB", ".1f"),
    "padding": ("padding", ".0%"),
    "layer_passes": ("layer passes", ".2f"),
    "first_step_loss": ("first-step loss", ".5f"),
}


def print_report(report: dict) -> None:
    for check in report["numerics"]:
        print("numerics   {name}: error {error:.2g}, limit {limit:.2g}".format(**check))
    for fact in report["facts"]:
        figures = [f"{name} {figure:.4g}" for name, figure in fact["figures"].items()]
        print(f"measured   {fact['what']}: {', '.join(figures)}")
    titles = [title for title, _ in COLUMNS.values()]
    print("\n| " + " | ".join(titles) + " |\n|---|---" + "|--:" * (len(titles) - 2) + "|")
    for run in sorted(report["runs"], key=lambda run: run["examples"], reverse=True):
        cells = []
        for key, (_, form) in COLUMNS.items():
            cells.append(format(run[key], form) if key in run else "")
        if run["void"]:
            cells[1] = f"VOID {cells[1]}"
        if "error" in run:
            cells[2] = run["error"]
        print("| " + " | ".join(cells) + " |")
    for note in report["notes"]:
        print(f"note       {note}")


def describe(setting: Setting) -> dict:
    """Return what the figures belong to: command, versions, model and examples."""
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in PACKAGES:
        if importlib.util.find_spec(name.replace("-", "_")):
            versions[name] = importlib.metadata.version(name)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "device": None,
        "versions": versions,
        "parameters": count_parameters(setting.config).model,
        "precision": f"{name_format(setting.precision.compute)}, {setting.precision.optim}",
        "loads": {kind: asdict(load) for kind, load in setting.loads.items()},
        "numerics": [],
        "facts": [],
        "runs": [],
        "notes": [NO_GPU],
    }
    if setting.device == "cuda":
        report["device"] = torch.cuda.get_device_name()
        report["notes"] = []
    return report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    parser.add_argument("--show", type=Path, help="print the tables of such a file, and end")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--minutes", type=float, default=8.5, help="all ends then")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=CONTENDERS,
        metavar="NAME",
        help=", ".join(CONTENDERS),
    )
    return parser.parse_args()


def run_all(args, setting: Setting, report: dict, out: Path | None) -> bool:
    """Run the contenders, and write the report after each. Return whether all went well."""
    end_s = time.monotonic() + 60 * args.minutes
    is_well = True
    for contender in args.contenders:
        left_s = end_s - time.monotonic()
        problem = why_not(contender)
        if problem is None and left_s < MIN_SECONDS:
            problem = f"{contender}: not started, the time was over"
            is_well = False
        elif problem is None:
            results, problem = run_worker(contender, setting, left_s)
            is_well = is_well and problem is None
            for result in results:
                report[kind_of(result)].append(result)
        if problem is not None:
            report["notes"].append(problem)
        if mark_void(report["runs"]) or has_errors(report["numerics"]):
            is_well = False
        if out is not None:  # The next contender might break the machine.
            out.write_text(json.dumps(report, indent=2) + "\n")
        print(problem or f"{contender}: measured", flush=True)
    return is_well


def main() -> int:
    args = parse_arguments()
    if args.show is not None:
        print_report(json.loads(args.show.read_text()))
        return 0
    prepare_environment()
    setting = find_setting(args.tiny)
    report = describe(setting)
    out = args.out
    if out is None and report["device"] is not None and not args.tiny:
        name = re.sub(r"[^a-z0-9]+", "-", report["device"].lower())
        out = RESULTS / f"{name}.json"
        out.parent.mkdir(exist_ok=True)
    is_well = run_all(args, setting, report, out)
    print_report(report)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
