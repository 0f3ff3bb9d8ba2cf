"""Qwen2-7B on one GPU: is it exact, does the plan hold, how fast is it beside TRL on the same rows?

    pip install pytest trl==1.16.0 liger-kernel
    python benchmarks/gpu.py [--tiny] [--minutes 8.5] [--out FILE] [--show FILE]

First the numerics: tests/test_numerics.py holds loss, attention, model and optimizer, each as this
device computes it, against fp64. Then a 7B with random weights, made on the GPU; no checkpoint,
data or network is needed. Rows are random tokens with the lengths of GSM8K (short: 100 to 500
tokens, mean 215, two thirds of them answers) and long ones (4,113 to 8,001, mean 5,017, half of
them answers). All contenders take the same rows in the same order, as many to an optimizer step,
in bf16, with AdamW, 8-bit state and stochastic rounding, and gradient checkpointing switched on:

    this trainer                    as it is: no checkpointing where it plans that memory suffices
    this trainer, compiled          the same; torch.compile of each layer's MLP and norms
    this trainer, all checkpointed  micro-batches of at most 32,768 tokens
    TRL                             SFTTrainer, padded batches: of 4 or 16 short rows, of 1 long row
    TRL, Liger kernels              the same, with use_liger_kernel

Each is a process of its own, with expandable segments, and makes the model anew for each kind of
rows. One step warms up: in it the optimizer compiles, and its state is made. Tokens and FLOPs are
those of the rows, not of padding. MFU is sft.memory_plan.training_flops over the data sheet's peak;
what checkpointing does twice is not in it, but in "layer passes". "Peak" is
torch.cuda.max_memory_allocated of the timed steps, "reserved" what the allocator took for it,
"planned" the plan for the largest micro-batch. A first-step loss that differs by over 1e-3, or
another number of trained tokens: a run is VOID.

It ends within --minutes, and what was measured until then is in benchmarks/results/<GPU>.json;
--show prints the tables of such a file. Exit code 1: something is wrong, VOID, or broke. Without a
GPU, or with --tiny, every path runs with a tiny model, to show that it does; nothing is written
without --out.
"""

import argparse
import copy
import functools
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import torch_2_11  # noqa: F401
import transformers
from throughput import LONG, MAX_LEN, SEED, TOLERANCE, Clock, RowSet, be_quiet, make_rows

sys.path.insert(0, str(Path(__file__).parents[1]))
import sft_qwen2
from sft import memory_plan
from sft.arguments import parse_arguments
from sft.callbacks import StopOnSignal
from sft.encoded_rows import IGNORE_INDEX
from sft.memory_plan import GIB
from sft.rows import UserError

CONTENDERS = ("numerics", "this trainer", "TRL", "this trainer, compiled")
CONTENDERS += ("this trainer, all checkpointed", "TRL, Liger kernels")
BUDGET = 4 * MAX_LEN  # tokens of a micro-batch with checkpointing
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TOKENIZER = ROOT / "data" / "tiny-qwen2"  # TRL wants one, for its padding
PACKAGES = ("torch", "transformers", "accelerate", "torchao", "triton", "trl", "liger-kernel")
MEASURED = ("s_per_step", "tokens_per_s", "trained_tokens_per_s", "mfu", "peak_gib")
MEASURED += ("reserved_gib",)
LEAST_S = 30  # a contender is not started with less time left
NUMERICS = [sys.executable, "-m", "pytest", "tests/test_numerics.py", "-k", "on_device"]
NUMERICS += ["--noconftest", "-s", "-q", "-m"]  # conftest.py hides GPUs from the other tests
NO_GPU = "no GPU: every path ran with a tiny model, and figures of speed and memory are missing"
SIZES_7B = {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944}
SIZES_7B |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064}
SIZES_7B["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048}


class Workload(NamedTuple):
    rows: RowSet
    rows_per_step: int
    steps: int  # timed, after one to warm up
    rows_at_once: tuple[int, ...]  # TRL's per_device_train_batch_size: each is tried


class Setting(NamedTuple):
    """What is run here."""

    device: str
    config: transformers.Qwen2Config
    precision: memory_plan.Precision
    workloads: dict[str, Workload]


def find_setting(tiny: bool) -> Setting:
    """Return Qwen2-7B and its rows; where there is no GPU, as for `tiny`, a tiny model and rows."""
    on_gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if on_gpu else None
    precision = memory_plan.choose_precision(capability, False)
    sizes, short = SIZES_7B, Workload(RowSet(256, 100, 500, 2.48, 2 / 3), 64, 3, (4, 16))
    long = Workload(LONG, 8, 2, (1,))
    if tiny or not on_gpu:
        sizes, short = TINY, Workload(RowSet(16, 10, 50, 2.48, 2 / 3), 8, 1, (4,))
        long = Workload(LONG._replace(number=8, shortest=205, longest=400), 4, 1, (1,))
    config = transformers.Qwen2Config(**sizes, use_cache=False)
    workloads = {"short": short, "long": long}
    return Setting("cuda" if on_gpu else "cpu", config, precision, workloads)


def make_model(setting: Setting, own: bool):
    """Return the trainer's model or transformers', with the same random weights each time."""
    torch.manual_seed(SEED)
    attention, model_class = "sdpa", transformers.Qwen2ForCausalLM
    if own:
        attention, model_class = "row_attention", sft_qwen2.model_class()
    config = copy.deepcopy(setting.config)  # trainers write into it
    options = {"dtype": setting.precision.weights, "attn_implementation": attention}
    with torch.device(setting.device):
        return model_class._from_config(config, **options).train()


# ---- What a run is measured by ------------------------------------------------------------------
class GpuClock(Clock):
    """Also notes each step's peak memory, and the sizes of the timed micro-batches in tokens."""

    def __init__(self, trainer):
        super().__init__(trainer)
        self.peaks, self.sizes = [], []

    def count(self, model, args, kwargs) -> None:
        super().count(model, args, kwargs)
        self.sizes.append(kwargs["input_ids"].numel())

    def on_step_end(self, *args, **kwargs) -> None:
        super().on_step_end(*args, **kwargs)
        if self.on_gpu:
            self.peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        if len(self.boundaries) == 1:  # that was the warm-up
            self.sizes.clear()


def take_figures(clock: GpuClock, model, timed_rows: list[dict]) -> dict:
    """Return the figures of a run that is over; those that need a GPU are None without one."""
    first, last = clock.boundaries[0], clock.boundaries[-1]
    steps, lengths = len(clock.boundaries) - 1, np.array([row["num_tokens"] for row in timed_rows])
    seconds, computed = last.clock_s - first.clock_s, last.computed - first.computed
    found = {
        "first_step_loss": first.loss,
        "tokens": int(lengths.sum()),
        "trained_tokens": last.trained - first.trained,
        "padding": 1 - int(lengths.sum()) / computed,
        "layer_passes": (last.layer_tokens - first.layer_tokens) / computed,
        "largest_micro_batch": max(clock.sizes),
    }
    if not clock.on_gpu:
        return found | dict.fromkeys(MEASURED)
    peak = memory_plan.peak_tflops(torch.cuda.get_device_name())
    flops = memory_plan.training_flops(model.config, model.num_parameters(), lengths)
    mfu = flops / seconds / (peak * 1e12) if peak else None
    speeds = (seconds / steps, found["tokens"] / seconds, found["trained_tokens"] / seconds, mfu)
    sizes = (max(clock.peaks[1:]) / GIB, torch.cuda.memory_reserved() / GIB)
    return found | dict(zip(MEASURED, speeds + sizes, strict=True))


# ---- The contenders -----------------------------------------------------------------------------
def draw_rows(workload: Workload, vocab_size: int) -> list[dict]:
    """Return the rows of all steps, in their order."""
    table = make_rows(workload.rows, vocab_size)
    number = (workload.steps + 1) * workload.rows_per_step
    order = np.random.default_rng(SEED).permutation(len(table))[:number]
    return [table[int(i)] for i in order]


def common_options(setting: Setting, workload: Workload, folder: str, rows_at_once: int) -> dict:
    """Return the TrainingArguments of all contenders."""
    options = {"output_dir": folder, "max_steps": workload.steps + 1, "seed": SEED}
    options |= {"per_device_train_batch_size": rows_at_once, "gradient_checkpointing": True}
    options |= {"gradient_accumulation_steps": workload.rows_per_step // rows_at_once}
    options |= {"learning_rate": 1e-5, "weight_decay": 0.003, "save_strategy": "no"}
    options |= {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return options | {"use_cpu": setting.device == "cpu"}


def train_own(setting: Setting, workload: Workload, folder: str, way: str) -> dict:
    """Train with this trainer; return the figures."""
    rows, longest = draw_rows(workload, setting.config.vocab_size), workload.rows.longest
    options = common_options(setting, workload, folder, rows_at_once=4)
    if way == "all checkpointed":
        options["tokens_per_forward"] = BUDGET
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    args = parse_arguments(argv, sft_qwen2.ScriptArguments, sft_qwen2.TRAINING_DEFAULTS)
    capacities, _ = memory_plan.find_devices(None, args[1])
    job = memory_plan.Job(setting.config, setting.precision, capacities, 1)
    plan = memory_plan.plan_memory(job, *args, longest)
    if way == "all checkpointed":
        plan = plan._replace(max_tokens_without_checkpointing=0)
    memory_plan.check_plan(plan, job, *args, longest)
    model = make_model(setting, own=True)
    if way == "compiled":
        backend = "inductor" if setting.device == "cuda" else "aot_eager"  # which takes no minutes
        for layer in model.model.layers:
            for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                part.forward = torch.compile(part.forward, dynamic=True, backend=backend)
    terms = ({"train": rows}, setting.precision, plan, StopOnSignal())
    trainer = sft_qwen2.build_trainer(model, None, *args, *terms)
    # In the order of the list: its own loader shuffles.
    loader = torch.utils.data.DataLoader(rows, workload.rows_per_step, collate_fn=list)
    trainer.get_train_dataloader = lambda: loader
    clock = GpuClock(trainer)
    trainer.train()
    found = take_figures(clock, model, rows[workload.rows_per_step :])
    plain = trainer.max_tokens_without_checkpointing  # less than planned, if that was too much
    cases = [(size, plan.held, size > plain) for size in set(clock.sizes)]
    planned = max(max(memory_plan.device_loads(job, *case)) for case in cases)
    return found | {"planned_gib": planned / GIB, "free_gib": capacities[0] / GIB}


def train_trl(setting: Setting, workload: Workload, folder: str, number: int, liger: bool) -> dict:
    """Train with trl.SFTTrainer, its loss on completions only; return the figures."""
    import trl

    rows = draw_rows(workload, setting.config.vocab_size)
    labels = [row["labels"].tolist() for row in rows]
    masks = [[int(label != IGNORE_INDEX) for label in row] for row in labels]
    ids = [row["input_ids"].tolist() for row in rows]
    table = datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    options = common_options(setting, workload, folder, number) | {"use_liger_kernel": liger}
    options |= {"train_sampling_strategy": "sequential", "max_length": None}
    options |= {"completion_only_loss": True, "optim": setting.precision.optim}
    if setting.precision.weights == torch.bfloat16:
        options["optim_args"] = "bf16_stochastic_round=True"
    # With weights in bf16, autocast would have nothing to do.
    options |= {"bf16": False, "fp16": setting.precision.compute_dtype == torch.float16}
    model = make_model(setting, own=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    args, tables = trl.SFTConfig(**options), {"train_dataset": table}
    trainer = trl.SFTTrainer(model, args, processing_class=tokenizer, **tables)
    assert trainer.train_dataset["labels"][:] == labels, "TRL would train other tokens"
    clock = GpuClock(trainer)
    trainer.train()
    return take_figures(clock, model, rows[workload.rows_per_step :])


# ---- A contender's process ----------------------------------------------------------------------
def list_runs(contender: str, setting: Setting, folder: str) -> Iterator[tuple[str, str, Callable]]:
    """Yield (kind of rows, name, function that returns the figures) of a contender's runs."""
    for kind, workload in setting.workloads.items():
        terms = (setting, workload, folder)
        if not contender.startswith("TRL"):
            way = contender.partition(", ")[2]
            yield kind, contender, functools.partial(train_own, *terms, way)
            continue
        for number in workload.rows_at_once:
            run = functools.partial(train_trl, *terms, number, liger="Liger" in contender)
            yield kind, f"{contender}, {number} at once", run


def work(contender: str, setting: Setting) -> None:
    """Do a contender's runs; print the result of each as a line of JSON."""
    be_quiet()
    on_gpu = setting.device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        for kind, name, run in list_runs(contender, setting, folder):
            gc.collect()  # a trainer refers to itself: only now is the last one's memory free
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            found = {"rows": kind, "contender": name}
            try:
                found |= run()
            except (torch.OutOfMemoryError, UserError) as error:
                found["error"] = " ".join(str(error).split())[:200]
            print("\nRESULT " + json.dumps(found), flush=True)


# ---- All of them --------------------------------------------------------------------------------
def why_not(contender: str) -> str | None:
    """Return why a contender cannot run here, in a sentence."""
    needs = {"TRL": ("trl", "trl==1.16.0"), "Liger": ("liger_kernel", "liger-kernel")}
    needs["numerics"] = ("pytest", "pytest")
    for part, (module, package) in needs.items():
        if part in contender and not importlib.util.find_spec(module):
            return f"{contender}: skipped; pip install {package}"
    cpu = "Liger" in contender and not torch.cuda.is_available()
    return f"{contender}: skipped; they are for GPUs" if cpu else None


def start_worker(contender: str, tiny: bool, seconds: float) -> tuple[list[dict], str | None]:
    """Return the results of a contender's process, and what was the matter if it did not end well.

    `seconds`: it is killed after them.
    """
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | os.environ
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command, problem = [sys.executable, __file__, "--worker", contender] + ["--tiny"] * tiny, None
    if contender == "numerics":
        command = [*NUMERICS, "gpu" if torch.cuda.is_available() else "not gpu"]
    with tempfile.TemporaryFile("w+") as out:
        options = {"stdout": out, "stderr": out, "env": environment, "cwd": ROOT}
        try:
            code = subprocess.run(command, timeout=seconds, **options).returncode
        except subprocess.TimeoutExpired:
            code, problem = 0, f"{contender}: cut short, the time was over"
        out.seek(0)
        lines = [line.strip() for line in out if line.strip()] or ["no message"]
    if code:
        problem = f"{contender}: exit code {code}, {lines[-1][:300]}"
    return [json.loads(x[7:]) for x in lines if x.startswith("RESULT ")], problem


def mark_void(runs: list[dict]) -> bool:
    """Mark the runs that did other work than the first on the same rows; return whether any did."""
    first = {}
    for run in runs:
        run["void"] = False
        if "first_step_loss" in run:
            done = first.setdefault(run["rows"], run)
            close = abs(run["first_step_loss"] / done["first_step_loss"] - 1) <= TOLERANCE
            run["void"] = not (close and run["trained_tokens"] == done["trained_tokens"])
    return any(run["void"] for run in runs)


COLUMNS = {
    "rows": ("rows", ""),
    "contender": ("contender", ""),
    "s/step": ("s_per_step", ".2f"),
    "tokens/s": ("tokens_per_s", ",.0f"),
    "trained tokens/s": ("trained_tokens_per_s", ",.0f"),
    "MFU": ("mfu", ".1%"),
    "peak GiB": ("peak_gib", ".1f"),
    "planned GiB": ("planned_gib", ".1f"),
    "reserved GiB": ("reserved_gib", ".1f"),
    "padding": ("padding", ".0%"),
    "layer passes": ("layer_passes", ".2f"),
    "first-step loss": ("first_step_loss", ".5f"),
}


def print_report(report: dict) -> None:
    for check in report["numerics"]:
        print("numerics   {name}: error {error:.2g}, limit {limit:.2g}".format(**check))
    print("\n| " + " | ".join(COLUMNS) + " |\n|---|---" + "|--:" * (len(COLUMNS) - 2) + "|")
    for run in sorted(report["runs"], key=lambda run: run["rows"], reverse=True):  # short first
        shown = {name: "" for name in COLUMNS}
        for name, (key, form) in COLUMNS.items():
            if run.get(key) is not None:
                shown[name] = format(run[key], form)
        shown["contender"] = "VOID " * run["void"] + shown["contender"]
        shown["s/step"] = run.get("error", shown["s/step"])
        print("| " + " | ".join(shown.values()) + " |")
    print("".join(f"\nnote       {note}" for note in report["notes"]))


def describe(setting: Setting) -> dict:
    """Return what the figures belong to: command, versions, model and rows."""
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in PACKAGES:
        installed = importlib.util.find_spec(name.replace("-", "_"))
        versions[name] = importlib.metadata.version(name) if installed else None
    loads = setting.workloads.items()
    return {
        "command": f"python {shlex.join(sys.argv)}",
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else None,
        "versions": versions,
        "parameters": memory_plan.count_parameters(setting.config)["model"],
        "precision": f"{setting.precision.compute_dtype}, {setting.precision.optim}",
        "rows": {kind: {**load._asdict(), "rows": load.rows._asdict()} for kind, load in loads},
        "numerics": [],
        "runs": [],
        "notes": [NO_GPU] if setting.device == "cpu" else [],
    }


def parse_own_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    parser.add_argument("--show", type=Path, help="print the tables of such a file, and end")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--minutes", type=float, default=8.5, help="all ends then")
    names = {"choices": CONTENDERS, "default": CONTENDERS, "metavar": "NAME"}
    parser.add_argument("--contenders", nargs="+", help=", ".join(CONTENDERS), **names)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse_own_arguments()
    if args.show:
        print_report(json.loads(args.show.read_text()))
        return 0
    if args.worker:
        work(args.worker, find_setting(args.tiny))
        return 0
    end, well = time.monotonic() + 60 * args.minutes, True
    report, out = describe(find_setting(args.tiny)), args.out
    if not out and report["device"] and not args.tiny:
        out = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', report['device'].lower())}.json"
        out.parent.mkdir(exist_ok=True)
    for contender in args.contenders:
        left, skipped = end - time.monotonic(), why_not(contender)
        results, problem = [], skipped or f"{contender}: not started, the time was over"
        if not skipped and left > LEAST_S:
            results, problem = start_worker(contender, args.tiny, left)
        well &= skipped is not None or problem is None
        report["notes"] += [problem] if problem else []
        report["numerics" if contender == "numerics" else "runs"] += results
        well &= not mark_void(report["runs"])
        if out:  # what is there, should the next one break the machine
            out.write_text(json.dumps(report, indent=2) + "\n")
        print(problem or f"{contender}: measured", flush=True)
    print_report(report)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
