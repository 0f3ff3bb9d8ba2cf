"""Qwen2-7B on one GPU: is it exact, does the plan hold, how fast is it beside TRL?

    pip install pytest trl==1.16.0 liger-kernel
    python benchmarks/gpu.py [--tiny] [--minutes 8.5] [--out FILE] [--show FILE]

First the numerics: tests/test_attention_and_loss.py compares attention, loss and model on this
device with fp64. Then a 7B with random weights, made on the GPU: no checkpoint, data or network is
needed. Examples are random tokens with the lengths of GSM8K (short: 100 to 500, mean 215, two
thirds trained) and long ones (4,113 to 8,001, mean 5,017, half trained). All contenders take the
same examples in the same order, as many to a step, in bf16, with 8-bit AdamW, stochastic rounding,
and gradient checkpointing switched on:

    this trainer                    as it is: no checkpointing where its plan has the memory
    this trainer, compiled          the same; torch.compile of each layer's MLP and norms
    this trainer, all checkpointed  micro-batches of at most 32,768 tokens
    TRL                             SFTTrainer, padded batches: of 4 or 16 short ones, of 1 long one
    TRL, Liger kernels              the same, with use_liger_kernel

Each is a process of its own. One step warms up: in it the optimizer compiles. Tokens and FLOPs are
those of the examples, not of padding. MFU is sft.step_time.training_flops over the data sheet's
peak. What is recomputed is not in it, but in "layer passes". "Peak" is the most that was allocated
in the timed steps, "reserved" what the allocator took for it, "planned" the formula for the largest
micro-batch. A run whose first-step loss differs by over 1e-3, or that trains another number of
tokens, is VOID.

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
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch_2_11  # noqa: F401  # before the script imports what this adds

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

import runs
import torch
import transformers

import sft_qwen2
from sft.errors import UserError
from sft.memory_model import QWEN2_SIZES, count_parameters, list_modules, peak_bytes
from sft.precision import Precision, choose_precision, name_format
from sft.step_time import training_flops
from sft.throughput import GIB, find_peak_tflops

CONTENDERS = (
    "numerics",
    "this trainer",
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
    *(sys.executable, "-m", "pytest", "tests/test_attention_and_loss.py"),
    *("-p", "torch_2_11"),
    *("--noconftest", "-s", "-q", "-k", "on_device or those_of_fp64", "-m"),
)
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


def compile_layers(model, device: str) -> None:
    backend = "aot_eager"  # takes no minutes on the CPU
    if device == "cuda":
        backend = "inductor"
    for layer in model.model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.forward = torch.compile(part.forward, dynamic=True, backend=backend)


def train_own(setting: Setting, load: Load, folder: str, contender: str) -> dict:
    """Train with this trainer; return the figures."""
    is_checkpointed = contender.endswith("all checkpointed")
    flags = make_options(setting, load, folder, batch_size=4)
    if is_checkpointed:
        flags["tokens_per_forward"] = CHECKPOINTED_TOKENS

    def make_random(model_class, *_, **__):
        return make_model(setting, model_class, "packed_attention")

    examples = load.draw(setting.config.vocab_size)
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs.TINY)
    with mock.patch.object(sft_qwen2, "load_weights", make_random):
        trainer, plan = make_own_trainer(setting.config, tokenizer, examples, flags)
    if is_checkpointed:
        trainer.max_tokens_without_checkpointing = 0
    if contender.endswith("compiled"):
        compile_layers(trainer.model, setting.device)
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


# ---- A contender's process ----------------------------------------------------------------------
def report_run(run: dict, train, *args) -> None:
    """Print the result of train(*args) as a line of JSON, or why there is none."""
    gc.collect()  # A trainer refers to itself: only now is the last one's memory free.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        run.update(train(*args))
    except (torch.OutOfMemoryError, UserError) as error:
        run["error"] = " ".join(str(error).split())[:MESSAGE_LENGTH]
    print("\nRESULT " + json.dumps(run), flush=True)


def work(contender: str, setting: Setting) -> None:
    """Do a contender's runs."""
    be_quiet()
    with tempfile.TemporaryDirectory() as folder:
        for kind, load in setting.loads.items():
            if not contender.startswith("TRL"):
                run = {"examples": kind, "contender": contender}
                report_run(run, train_own, setting, load, folder, contender)
                continue
            for batch_size in load.batch_sizes:
                run = {"examples": kind, "contender": f"{contender}, {batch_size} at once"}
                report_run(run, train_trl, setting, load, folder, batch_size, contender)


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


def make_command(contender: str, is_tiny: bool) -> list[str]:
    if contender == "numerics":
        marker = "not gpu"
        if torch.cuda.is_available():
            marker = "gpu"
        return [*NUMERICS, marker]
    command = [sys.executable, __file__, "--worker", contender]
    if is_tiny:
        command.append("--tiny")
    return command


def run_worker(contender: str, is_tiny: bool, limit_s: float) -> tuple[list[dict], str | None]:
    """Return the results of a contender's process, and what was the matter with it.

    It is killed after limit_s seconds.
    """
    environment = dict(os.environ)
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0")
    environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    # The script sets this, too, but here torch is imported before the script.
    environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    environment["PYTHONPATH"] = str(Path(__file__).parent)  # of torch_2_11
    problem = None
    exit_code = 0
    with tempfile.TemporaryFile("w+") as out:
        try:
            ended = subprocess.run(
                make_command(contender, is_tiny),
                stdout=out,
                stderr=out,
                env=environment,
                cwd=ROOT,
                timeout=limit_s,
            )
            exit_code = ended.returncode
        except subprocess.TimeoutExpired:
            problem = f"{contender}: cut short, the time was over"
        out.seek(0)
        lines = out.read().split("\n")
    if exit_code != 0:
        last = "".join(line for line in lines if line.strip())[-MESSAGE_LENGTH:]
        problem = f"{contender}: exit code {exit_code}, {last}"
    results = []
    for line in lines:
        if line.startswith("RESULT "):
            results.append(json.loads(line.removeprefix("RESULT ")))
    return results, problem


def mark_void(all_runs: list[dict]) -> bool:
    """Mark the runs that did other work than the first on the same examples; return if any did."""
    first_runs = {}
    is_any_void = False
    for run in all_runs:
        run["void"] = False
        if "first_step_loss" not in run:
            continue
        first = first_runs.setdefault(run["examples"], run)
        is_close = abs(run["first_step_loss"] / first["first_step_loss"] - 1) <= TOLERANCE
        run["void"] = not is_close or run["trained_tokens"] != first["trained_tokens"]
        is_any_void = is_any_void or run["void"]
    return is_any_void


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
    "padding": ("padding", ".0%"),
    "layer_passes": ("layer passes", ".2f"),
    "first_step_loss": ("first-step loss", ".5f"),
}


def print_report(report: dict) -> None:
    for check in report["numerics"]:
        print("numerics   {name}: error {error:.2g}, limit {limit:.2g}".format(**check))
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
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_all(args, report: dict, out: Path | None) -> bool:
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
            results, problem = run_worker(contender, args.tiny, left_s)
            is_well = is_well and problem is None
            kind = "numerics" if contender == "numerics" else "runs"
            report[kind] += results
        if problem is not None:
            report["notes"].append(problem)
        if mark_void(report["runs"]):
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
    setting = find_setting(args.tiny)
    if args.worker is not None:
        work(args.worker, setting)
        return 0
    report = describe(setting)
    out = args.out
    if out is None and report["device"] is not None and not args.tiny:
        name = re.sub(r"[^a-z0-9]+", "-", report["device"].lower())
        out = RESULTS / f"{name}.json"
        out.parent.mkdir(exist_ok=True)
    is_well = run_all(args, report, out)
    print_report(report)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
