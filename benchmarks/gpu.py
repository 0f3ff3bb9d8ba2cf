"""Training Qwen2-7B on one GPU: this trainer beside TRL, speed and memory, on the same rows.

    pip install trl==1.16.0 liger-kernel
    python benchmarks/gpu.py [--out gpu.json]

Qwen2-7B with random weights of a fixed seed, made on the GPU; for all contenders bf16, AdamW with
8-bit state and stochastic rounding, and gradient checkpointing switched on. Neither a checkpoint
nor data is needed: rows are random token ids, with the lengths of GSM8K (short: 100 to 500 tokens,
mean 215, two thirds of them answers) and long ones (4,113 to 8,001, mean 5,017, half of them
answers). Every contender takes the same rows in the same order, as many to an optimizer step:

    this trainer                    as it is: no checkpointing where it plans that memory suffices
    this trainer, all checkpointed  micro-batches of at most 32,768 tokens
    TRL                             SFTTrainer, padded batches: of 4 or 16 short rows, of 1 long row
    TRL, Liger kernels              the same, with use_liger_kernel

Each contender is a process of its own, and makes the model anew for each kind of rows. One step
warms up: in it the optimizer compiles, which takes a minute, and the AdamW state is made. Two or
three are timed. Of tokens and FLOPs only those of the rows count, not padding. MFU is 6 for each
parameter and token, and 12 x layers x hidden size x T^2 for the attention in a row of T tokens
(PaLM, arXiv:2204.02311, appendix B), over the data sheet's peak. What checkpointing computes twice
is not in it; "layer passes" shows it. "Peak" is torch.cuda.max_memory_allocated of the timed steps,
and beside it is what the plan of --dry_run expects. First-step losses that differ by more than
1e-3, or other numbers of trained tokens, make a run VOID (exit code 1).

Then attention alone, forward and backward, over one micro-batch: PyTorch's varlen_attn, which the
trainer uses, beside one scaled_dot_product_attention a row.

It ends within 9 minutes, with what was measured until then. Without a GPU every path runs with a
tiny model, to show that it does; figures of speed and memory are left out.
"""

import argparse
import copy
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import shlex
import statistics
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
import transformers
from memory import make_config, make_model
from throughput import (
    LONG,
    MAX_LEN,
    SEED,
    TOLERANCE,
    Clock,
    RowSet,
    be_quiet,
    make_plan,
    make_rows,
    own_arguments,
)
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
import memory_plan
from memory_plan import GIB

import sft_qwen2
from sft_qwen2 import IGNORE_INDEX

CONTENDERS = ("this trainer", "TRL", "attention", "this trainer, all checkpointed")
CONTENDERS += ("TRL, Liger kernels",)
BUDGET = 4 * MAX_LEN  # tokens of a micro-batch with checkpointing
TOKENIZER = Path(__file__).parents[1] / "data" / "tiny-qwen2"  # TRL wants one, for its padding
PACKAGES = ("torch", "transformers", "accelerate", "torchao", "triton", "trl", "liger-kernel")
MEASURED = ("s_per_step", "tokens_per_s", "trained_tokens_per_s", "mfu", "peak_gib")
MEASURED += ("first_step_peak_gib",)
WARM_UPS, REPEATS = 3, 10  # of attention alone
LEAST_S = 30  # a contender is not started with less time left
NO_GPU = "no GPU: every path ran with a tiny model, and figures of speed and memory are missing"


class Workload(NamedTuple):
    rows: RowSet
    rows_per_step: int
    steps: int  # timed, after one to warm up
    rows_at_once: tuple[int, ...]  # TRL's per_device_train_batch_size: each is tried


class Setting(NamedTuple):
    """What a machine can do."""

    folder: str  # for what a trainer insists on writing
    device: str
    config: transformers.Qwen2Config
    precision: sft_qwen2.Precision
    workloads: dict[str, Workload]


def find_setting(folder: str = "") -> Setting:
    """Return Qwen2-7B and its rows, or a tiny model and tiny rows where there is no GPU."""
    if torch.cuda.is_available():
        short = Workload(RowSet(256, 100, 500, skew=2.48, answers=2 / 3), 64, 3, (4, 16))
        workloads = {"short": short, "long": Workload(LONG, 8, 2, (1,))}
        precision = sft_qwen2.choose_precision(torch.cuda.get_device_capability(), 1, False)
        return Setting(folder, "cuda", make_config("7B"), precision, workloads)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048}
    short = Workload(RowSet(16, 10, 50, skew=2.48, answers=2 / 3), 8, 1, (4,))
    long = Workload(LONG._replace(number=8, shortest=205, longest=400), 4, 1, (1,))
    config = transformers.Qwen2Config(**sizes)
    precision = sft_qwen2.choose_precision(None, 1, False)
    return Setting(folder, "cpu", config, precision, {"short": short, "long": long})


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
        **dict.fromkeys(MEASURED),
    }
    if clock.on_gpu:
        name = torch.cuda.get_device_name()
        tflops = sft_qwen2.PEAK_TFLOPS.items()
        peak = next((peak * 1e12 for gpu, peak in tflops if gpu in name), None)
        flops = sft_qwen2.training_flops(model.config, model.num_parameters(), lengths)
        found["s_per_step"] = seconds / steps
        found["tokens_per_s"] = found["tokens"] / seconds
        found["trained_tokens_per_s"] = found["trained_tokens"] / seconds
        found["mfu"] = flops / seconds / peak if peak else None
        found["peak_gib"] = max(clock.peaks[1:]) / GIB
        found["first_step_peak_gib"] = clock.peaks[0] / GIB
    return found


def planned_gib(setting: Setting, sizes: list[int], plain_tokens: int) -> float:
    """Return what the plan expects of the largest micro-batches, with checkpointing and without."""
    loads = []
    for tokens in set(sizes):
        terms = (setting.config, tokens, setting.precision)
        parts = memory_plan.step_memory(*terms, checkpointing=tokens > plain_tokens)
        loads += memory_plan.device_loads(setting.config, parts, None, 1)
    return max(loads) / GIB


# ---- The contenders -----------------------------------------------------------------------------
def draw_rows(workload: Workload, vocab_size: int) -> list[dict]:
    """Return the rows of all steps, in their order."""
    table = make_rows(workload.rows, vocab_size)
    number = (workload.steps + 1) * workload.rows_per_step
    order = np.random.default_rng(SEED).permutation(len(table))[:number]
    return [table[int(i)] for i in order]


def build_model(setting: Setting, own: bool):
    """Return the model on the device, with the same weights each time."""
    torch.manual_seed(SEED)
    config = copy.deepcopy(setting.config)  # trainers write into it
    with torch.device(setting.device):
        return make_model(config, setting.precision.weights, not own, checkpointing=False)


def common_options(setting: Setting, workload: Workload, rows_at_once: int) -> dict:
    """Return the TrainingArguments of all contenders."""
    options = {"output_dir": setting.folder, "max_steps": workload.steps + 1, "seed": SEED}
    options |= {"per_device_train_batch_size": rows_at_once, "gradient_checkpointing": True}
    options |= {"gradient_accumulation_steps": workload.rows_per_step // rows_at_once}
    options |= {"learning_rate": 1e-5, "weight_decay": 0.003, "save_strategy": "no"}
    options |= {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return options | {"use_cpu": setting.device == "cpu"}


def train_own(setting: Setting, workload: Workload, checkpoint_all: bool) -> dict:
    """Train with this trainer; return the figures."""
    rows = draw_rows(workload, setting.config.vocab_size)
    options = common_options(setting, workload, rows_at_once=4)
    if checkpoint_all:
        options["tokens_per_forward"] = BUDGET
    args = own_arguments(options)
    plan = make_plan(setting.config, *args, setting.precision, workload.rows.longest)
    if checkpoint_all:
        plan = plan._replace(plain_tokens=0)
    model, tables = build_model(setting, own=True), {"train": rows}
    trainer = sft_qwen2.build_trainer(model, None, *args, tables, setting.precision, plan)
    trainer.train_file = "random rows"
    # In the order of the list: its own loader shuffles.
    loader = torch.utils.data.DataLoader(rows, workload.rows_per_step, collate_fn=list)
    trainer.get_train_dataloader = lambda: loader
    clock = GpuClock(trainer)
    trainer.train()
    found = take_figures(clock, model, rows[workload.rows_per_step :])
    found["planned_gib"] = planned_gib(setting, clock.sizes, trainer.plain_tokens)
    return found


def train_trl(setting: Setting, workload: Workload, rows_at_once: int, liger: bool) -> dict:
    """Train with trl.SFTTrainer, its loss on completions only; return the figures."""
    import trl

    rows = draw_rows(workload, setting.config.vocab_size)
    labels = [row["labels"].tolist() for row in rows]
    masks = [[int(label != IGNORE_INDEX) for label in row] for row in labels]
    ids = [row["input_ids"].tolist() for row in rows]
    table = datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    options = common_options(setting, workload, rows_at_once) | {"use_liger_kernel": liger}
    options |= {"train_sampling_strategy": "sequential", "max_length": None}
    options |= {"completion_only_loss": True, "optim": setting.precision.optim}
    if setting.precision.weights == torch.bfloat16:
        options["optim_args"] = "bf16_stochastic_round=True"
    # With weights in bf16, autocast would have nothing to do.
    options |= {"bf16": False, "fp16": setting.precision.compute == "fp16"}
    model = build_model(setting, own=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    args, tables = trl.SFTConfig(**options), {"train_dataset": table}
    trainer = trl.SFTTrainer(model, args, processing_class=tokenizer, **tables)
    assert trainer.train_dataset["labels"][:] == labels, "TRL would train other tokens"
    clock = GpuClock(trainer)
    trainer.train()
    return take_figures(clock, model, rows[workload.rows_per_step :])


def time_attention(setting: Setting, workload: Workload) -> dict:
    """Return milliseconds of one layer's attention, forward and backward, over a micro-batch."""
    rows = draw_rows(workload, setting.config.vocab_size)[: workload.rows_per_step]
    lengths = [len(row["input_ids"]) for row in rows]
    lengths = [lengths[i] for i in sft_qwen2.bin_rows(lengths, BUDGET)[0]]
    heads, kv_heads = setting.config.num_attention_heads, setting.config.num_key_value_heads
    options = {"device": setting.device, "dtype": setting.precision.weights, "requires_grad": True}
    size = setting.config.hidden_size // heads
    torch.manual_seed(SEED)
    qkv = [torch.randn(1, h, sum(lengths), size, **options) for h in (heads, kv_heads, kv_heads)]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=setting.device)
    bounds = {"seq_lens": lengths, "cu_seq_lens": bounds, "scaling": size**-0.5}

    def at_once():
        return sft_qwen2.row_attention(None, *qkv, None, **bounds)[0]

    def row_by_row():
        parts = zip(*(x.split(lengths, dim=2) for x in qkv))
        options = {"is_causal": True, "enable_gqa": True}
        outputs = [scaled_dot_product_attention(*row, **options) for row in parts]
        return torch.cat(outputs, dim=2).transpose(1, 2)

    difference = float((at_once() - row_by_row()).abs().max())
    found = {"tokens": sum(lengths), "num_rows": len(lengths), "largest_difference": difference}
    on_gpu = setting.device == "cuda"
    found["varlen_ms"] = milliseconds(at_once, qkv) if on_gpu else None
    found["row_by_row_ms"] = milliseconds(row_by_row, qkv) if on_gpu else None
    return found


def milliseconds(attend: Callable, inputs: list[torch.Tensor]) -> float:
    """Return the median time of a forward and backward pass on the GPU."""
    times, gradient = [], torch.randn_like(attend())
    for _ in range(WARM_UPS + REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.autograd.grad(attend(), inputs, gradient)
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[WARM_UPS:])


# ---- A contender's process ----------------------------------------------------------------------
def list_runs(contender: str, setting: Setting) -> Iterator[tuple[str, str, Callable]]:
    """Yield (kind of rows, name, function that returns the figures) of a contender's runs."""
    for kind, workload in setting.workloads.items():
        terms = (setting, workload)
        if contender == "attention":
            yield kind, contender, functools.partial(time_attention, *terms)
        elif contender.startswith("TRL"):
            for number in workload.rows_at_once:
                run = functools.partial(train_trl, *terms, number, liger="Liger" in contender)
                yield kind, f"{contender}, {number} at once", run
        else:
            checkpoint_all = contender.endswith("all checkpointed")
            yield kind, contender, functools.partial(train_own, *terms, checkpoint_all)


def work(contender: str, setting: Setting) -> None:
    """Do a contender's runs; print the result of each as a line of JSON."""
    be_quiet()
    on_gpu = setting.device == "cuda"
    for kind, name, run in list_runs(contender, setting):
        gc.collect()  # a trainer refers to itself: only now is the last one's memory free
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = {"contender": name, "rows": kind}
        try:
            found |= run()
        except torch.OutOfMemoryError:
            found["error"] = "out of memory"
        except sft_qwen2.UserError as error:
            found["error"] = str(error)
        found["device"] = torch.cuda.get_device_name() if on_gpu else None
        print("\nRESULT " + json.dumps(found), flush=True)


# ---- All of them --------------------------------------------------------------------------------
def why_not(contender: str) -> str | None:
    """Return why a contender cannot run here, in a sentence."""
    if "TRL" in contender and not importlib.util.find_spec("trl"):
        return f"{contender}: skipped; pip install trl==1.16.0"
    if "Liger" in contender and not importlib.util.find_spec("liger_kernel"):
        return f"{contender}: skipped; pip install liger-kernel"
    if "Liger" in contender and not torch.cuda.is_available():
        return f"{contender}: skipped; they are for GPUs"
    return None


def start_worker(contender: str, seconds: float) -> tuple[list[dict], str | None]:
    """Return the results of a contender's process, and what was the matter if it did not end well.

    `seconds`: it is killed after them.
    """
    one_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    command, problem = [sys.executable, __file__, "--worker", contender], None
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        options = {"stdout": out, "stderr": err, "env": os.environ | one_gpu}
        try:
            code = subprocess.run(command, timeout=seconds, **options).returncode
        except subprocess.TimeoutExpired:
            code, problem = 0, f"{contender}: cut short, the time was over"
        out.seek(0)
        err.seek(0)
        results = [json.loads(line[7:]) for line in out if line.startswith("RESULT ")]
        if code:
            last = ([line.strip() for line in err if line.strip()] or ["no message"])[-1]
            problem = f"{contender}: exit code {code}, {last[:300]}"
    return results, problem


def mark_void(runs: list[dict]) -> bool:
    """Mark the runs that did other work than the first on the same rows; return whether any did."""
    for run in runs:
        done = [r for r in runs if r["rows"] == run["rows"] and "first_step_loss" in r]
        run["void"] = False
        if run in done:
            close = abs(run["first_step_loss"] / done[0]["first_step_loss"] - 1) <= TOLERANCE
            run["void"] = not (close and run["trained_tokens"] == done[0]["trained_tokens"])
    return any(run["void"] for run in runs)


def print_table(runs: list[dict]) -> None:
    columns = {
        "rows": ("rows", ""),
        "contender": ("contender", ""),
        "s/step": ("s_per_step", ".2f"),
        "tokens/s": ("tokens_per_s", ",.0f"),
        "trained tokens/s": ("trained_tokens_per_s", ",.0f"),
        "MFU": ("mfu", ".1%"),
        "peak GiB": ("peak_gib", ".1f"),
        "planned GiB": ("planned_gib", ".1f"),
        "first step's peak": ("first_step_peak_gib", ".1f"),
        "padding": ("padding", ".0%"),
        "layer passes": ("layer_passes", ".2f"),
        "first-step loss": ("first_step_loss", ".5f"),
    }
    print("\n| " + " | ".join(columns) + " |\n|---|---" + "|--:" * (len(columns) - 2) + "|")
    for run in sorted(runs, key=lambda run: run["rows"], reverse=True):  # short before long
        shown = {name: "" for name in columns}
        for name, (key, form) in columns.items():
            if run.get(key) is not None:
                shown[name] = format(run[key], form)
        shown["contender"] = "VOID " * run["void"] + shown["contender"]
        shown["s/step"] = run.get("error", shown["s/step"])
        print("| " + " | ".join(shown.values()) + " |")


def print_report(report: dict) -> None:
    print_table(report["runs"])
    print()
    for run in report["attention"]:
        if run.get("varlen_ms"):
            work = f"{run['num_rows']} {run['rows']} rows, {run['tokens']:,} tokens"
            ways = (
                f"varlen_attn {run['varlen_ms']:.1f} ms, row by row {run['row_by_row_ms']:.1f} ms"
            )
            print(f"attention  {work}: {ways}")
    for note in report["notes"]:
        print(f"note       {note}")


def describe(setting: Setting) -> dict:
    """Return what the figures belong to: command, versions, model and rows."""
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in PACKAGES:
        installed = importlib.util.find_spec(name.replace("-", "_"))
        versions[name] = importlib.metadata.version(name) if installed else None
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("intermediate_size", "vocab_size")
    model = {name: getattr(setting.config, name) for name in names}
    model["parameters"] = memory_plan.count_parameters(setting.config)["model"]
    loads = setting.workloads.items()
    return {
        "command": f"python {shlex.join(sys.argv)}",
        "device": None,  # a process tells it that runs on one: this one leaves the GPU alone
        "versions": versions,
        "model": model,
        "precision": f"{setting.precision.compute}, {setting.precision.optim}",
        "rows": {kind: {**load._asdict(), "rows": load.rows._asdict()} for kind, load in loads},
        "runs": [],
        "attention": [],
        "notes": [NO_GPU] if setting.device == "cpu" else [],
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="all figures, as JSON")
    parser.add_argument("--minutes", type=float, default=8.5, help="all ends then")
    names = {"choices": CONTENDERS, "default": CONTENDERS, "metavar": "NAME"}
    parser.add_argument("--contenders", nargs="+", help=", ".join(CONTENDERS), **names)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.worker:
        with tempfile.TemporaryDirectory() as folder:
            work(args.worker, find_setting(folder))
        return 0
    end, well = time.monotonic() + 60 * args.minutes, True
    report = describe(find_setting())
    for contender in args.contenders:
        left, skipped = end - time.monotonic(), why_not(contender)
        results, problem = [], skipped or f"{contender}: not started, the time was over"
        if not skipped and left > LEAST_S:
            results, problem = start_worker(contender, left)
        well &= skipped is not None or problem is None
        report["notes"] += [problem] if problem else []
        for result in results:
            report["device"] = result.pop("device")
            report["attention" if contender == "attention" else "runs"].append(result)
        well &= not mark_void(report["runs"])
        args.out.write_text(json.dumps(report, indent=2) + "\n")  # what is there, should it break
        print(problem or f"{contender}: measured", flush=True)
    print_report(report)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
