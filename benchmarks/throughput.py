"""Training throughput on the CPU: this trainer beside the usual ways, on the same rows and weights.

    pip install trl==1.16.0
    python benchmarks/throughput.py --data FILE.jsonl [--steps 4] [--rows_per_step 64] [--rounds 3]
    python benchmarks/throughput.py --synthetic long [--steps 1] [--rows_per_step 2] [--rounds 1]

Every contender loads the same small Qwen2 (random weights of a fixed seed, fp32) and takes the same
rows in the same order, `rows_per_step` to an optimizer step, with AdamW and gradient checkpointing
switched on, without logging and saving. (This trainer leaves checkpointing out where it plans that
memory suffices; the column "layer passes" shows what ran: 2.00 where each layer's forward pass is
repeated for the backward pass.) A contender runs one step to warm up and `steps` that are timed;
the rounds take the contenders in turn, and the table shows medians. Rows are encoded once, for all:
what a tokenizer costs is not measured.

Each run is a fresh process. Its peak memory is the most that the process ever held resident (the
kernel's VmHWM): about 0.5 GiB of it are Python and the imported libraries, the same for all, the
rest weights, gradients, AdamW state and activations, and what the allocator did not give back.

The loss of the first step, the mean over all its trained tokens, must be the same to 1e-3, and so
must the number of tokens trained: a contender that does other work is marked VOID (exit code 1).
"""

import argparse
import contextlib
import functools
import importlib.metadata
import io
import logging
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import sft_qwen2
from sft_qwen2 import GIB, IGNORE_INDEX

ROWS_PER_FORWARD = {"data": 4, "long": 2}  # per_device_train_batch_size of all contenders
DEFAULTS = {  # long rows take minutes a step: one round of them is 10 minutes on two cores
    "data": {"steps": 4, "rows_per_step": 64, "rounds": 3},
    "long": {"steps": 1, "rows_per_step": 2, "rounds": 1},
}
MAX_LEN, SEED, TOLERANCE = 8192, 0, 1e-3
FP32 = sft_qwen2.choose_precision(None, 1, False)


class Task(NamedTuple):
    """What all contenders are given."""

    folder: str  # with the weights; also for what a trainer insists on writing
    tokenizer: transformers.PreTrainedTokenizerBase
    table: datasets.Dataset  # the rows, for this trainer's own loader to shuffle
    rows: list[dict]  # the same as lists in that loader's order, for the others
    longest: int  # tokens to pad to: of the longest row of the set that these rows are taken from
    options: dict  # the TrainingArguments of all


class Boundary(NamedTuple):
    """What was done from the start of training to the end of a step."""

    loss: float  # sum of the steps' losses
    clock_s: float
    trained: int  # tokens
    computed: int  # tokens that entered the model, padding included
    layer_tokens: int  # tokens that entered the first layer's MLP, in whichever pass


class Result(NamedTuple):
    loss: float  # of the first step
    seconds: float  # of the timed steps
    trained: int  # tokens, in the timed steps
    computed: int  # the same, of all tokens, padding included
    layer_passes: float  # forward passes of the layers over them: 2 with gradient checkpointing
    peak: int  # bytes


class Clock(transformers.TrainerCallback):
    """Times steps from boundary to boundary, and counts what enters the model and its layers."""

    def __init__(self, trainer):
        self.boundaries, self.on_gpu = [], trainer.args.device.type == "cuda"
        self.loss, self.trained, self.computed, self.layer_tokens = 0.0, 0, 0, 0
        self.training_step, trainer.training_step = trainer.training_step, self.watch_step
        trainer.model.register_forward_pre_hook(self.count, with_kwargs=True)
        # Checkpointing repeats what is inside a layer; a hook on the layer itself sees it once.
        trainer.model.model.layers[0].mlp.register_forward_pre_hook(self.count_layer)
        for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(self)

    def watch_step(self, *args, **kwargs):
        loss = self.training_step(*args, **kwargs)
        self.loss = self.loss + loss  # each part is already divided by the step's trained tokens
        return loss

    def count(self, model, args, kwargs) -> None:
        labels = kwargs["shift_labels"] if "shift_labels" in kwargs else kwargs["labels"][:, 1:]
        self.trained = self.trained + (labels != IGNORE_INDEX).sum()  # a GPU is not waited for
        self.computed += kwargs["input_ids"].numel()

    def count_layer(self, mlp, args) -> None:
        self.layer_tokens += args[0].shape[:2].numel()

    def on_step_end(self, *args, **kwargs) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        counts = (int(self.trained), self.computed, self.layer_tokens)
        self.boundaries.append(Boundary(float(self.loss), time.perf_counter(), *counts))


def peak_resident() -> int:
    """Return the most bytes that this process ever held in memory (Linux).

    getrusage's ru_maxrss is no use: a process inherits it from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def time_steps(trainer) -> Result:
    clock = Clock(trainer)
    trainer.train()
    first, last = clock.boundaries[0], clock.boundaries[-1]
    _, seconds, trained, computed, layer_tokens = (b - a for a, b in zip(first, last))
    passes = layer_tokens / computed
    return Result(first.loss, seconds, trained, computed, passes, peak_resident())


# ---- The contenders -----------------------------------------------------------------------------
def load_plain_model(task: Task):
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    return transformers.Qwen2ForCausalLM.from_pretrained(task.folder, **options)


def run_plain(task: Task, padding: str) -> Result:
    """Run transformers.Trainer as it is, with padded batches."""
    args = transformers.TrainingArguments(**task.options)
    options = {"padding": padding, "max_length": task.longest}
    collator = transformers.DataCollatorForSeq2Seq(task.tokenizer, **options)
    options = {"train_dataset": task.rows, "data_collator": collator}
    return time_steps(transformers.Trainer(load_plain_model(task), args, **options))


def run_trl(task: Task, padding_free: bool) -> Result:
    """Run trl.SFTTrainer on encoded rows, with its loss on completions only.

    Its packing is no contender: it puts other rows into a step. Padding-free is packing's forward.
    """
    import trl

    ids, labels = ([row[key] for row in task.rows] for key in ("input_ids", "labels"))
    masks = [[int(label != IGNORE_INDEX) for label in row] for row in labels]
    dataset = datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    options = {"bf16": False, "max_length": None, "completion_only_loss": True}
    args = trl.SFTConfig(**task.options, **options, packing=False, padding_free=padding_free)
    options = {"train_dataset": dataset, "processing_class": task.tokenizer}
    trainer = trl.SFTTrainer(load_plain_model(task), args, **options)
    assert trainer.train_dataset["labels"][:] == labels, "TRL would train other tokens"
    return time_steps(trainer)


def own_arguments(flags: dict) -> tuple:
    """Return the (ScriptArguments, TrainingArguments) of this trainer's command line."""
    argv = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    return sft_qwen2.parse_arguments(argv)


def make_plan(config, args, training_args, precision, longest: int) -> sft_qwen2.Plan:
    """Return the script's own plan of micro-batches, without its printing it."""
    capacities, _ = sft_qwen2.find_devices(args.gpus, training_args)
    with contextlib.redirect_stdout(io.StringIO()):
        return sft_qwen2.plan_memory(config, args, training_args, precision, capacities, longest)


def make_own_trainer(task: Task):
    """Return this trainer with its defaults."""
    args = own_arguments({**task.options, "model_name_or_path": task.folder})
    model = sft_qwen2.load_model(task.folder, FP32.weights)
    plan = make_plan(model.config, *args, FP32, task.longest)
    rows = {"train": task.table}
    return sft_qwen2.build_trainer(model, task.tokenizer, *args, rows, FP32, plan)


CONTENDERS = {
    "padded to longest": functools.partial(run_plain, padding="max_length"),
    "dynamic padding": functools.partial(run_plain, padding="longest"),
    "TRL": functools.partial(run_trl, padding_free=False),
    "TRL, padding-free": functools.partial(run_trl, padding_free=True),
    "this trainer": lambda task: time_steps(make_own_trainer(task)),
}


def run_contender(name: str, task: Task) -> Result:
    be_quiet()
    return CONTENDERS[name](task)


def run_in_own_process(name: str, task: Task) -> Result:
    """Run a contender where none ran before it: its peak memory is its own, its start cold."""
    fresh = multiprocessing.get_context("spawn")  # a fork would begin with this process's memory
    with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as pool:
        return pool.submit(run_contender, name, task).result()


# ---- Rows, model, machine -----------------------------------------------------------------------
class RowSet(NamedTuple):
    """Rows of random tokens: their lengths rise from shortest to longest, few of them long."""

    number: int
    shortest: int  # tokens
    longest: int
    skew: float  # 1: as many long rows as short ones
    answers: float  # share of a row's tokens that are trained, at its end


LONG = RowSet(256, 4113, 8001, skew=3.32, answers=1 / 2)  # a mean of 5,017 tokens


def make_rows(rows: RowSet, vocab_size: int) -> datasets.Dataset:
    """Return the rows as sft_qwen2.fit_rows does."""
    rng = np.random.default_rng(SEED)
    spread = (rows.longest - rows.shortest) * np.linspace(0, 1, rows.number) ** rows.skew
    lengths = (rows.shortest + spread).round().astype(int)
    ids = [rng.integers(0, vocab_size, length).tolist() for length in lengths]
    starts = (lengths - lengths * rows.answers).astype(int)
    labels = [[IGNORE_INDEX] * start + row[start:] for start, row in zip(starts, ids)]
    columns = {"input_ids": ids, "labels": labels, "num_tokens": lengths.tolist()}
    columns["line"] = list(range(1, rows.number + 1))
    return datasets.Dataset.from_dict(columns).with_format("numpy")


def save_model(tokenizer, folder: str) -> transformers.Qwen2Config:
    """Save a small Qwen2 with random weights and the tokenizer; return its config."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 9, "intermediate_size": 960}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.Qwen2Config(**sizes, **tokens, bos_token_id=None)  # head not tied
    torch.manual_seed(SEED)
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"model      Qwen2, {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")
    return config


def make_task(args, folder: str, tokenizer) -> Task:
    if args.data:
        how = ("You are a helpful assistant.", sft_qwen2.encode_batch, sft_qwen2.__file__)
        encoded = sft_qwen2.encode_files([args.data], tokenizer, *how)
        table, _ = sft_qwen2.fit_rows(encoded, MAX_LEN, "truncate")
    else:
        table = make_rows(LONG, len(tokenizer))
    lengths = table["num_tokens"][:].clip(max=MAX_LEN)
    wanted = (args.steps + 1) * args.rows_per_step  # a small set is taken more than once
    sample = np.resize(np.random.default_rng(SEED).permutation(len(table)), wanted)
    print(
        f"rows       {wanted:,} of {args.data or 'random tokens'}: {len(table):,} rows of "
        f"{lengths.min():,} to {lengths.max():,} tokens, mean {lengths.mean():,.0f}"
    )
    options = {"output_dir": folder, "max_steps": args.steps + 1, "seed": SEED, "use_cpu": True}
    options |= {"per_device_train_batch_size": args.rows_per_forward}
    options |= {"gradient_accumulation_steps": args.rows_per_step // args.rows_per_forward}
    options |= {"gradient_checkpointing": True}
    options |= {"optim": "adamw_torch_fused", "learning_rate": 1e-5, "dataloader_pin_memory": False}
    options |= {"train_sampling_strategy": "sequential", "logging_strategy": "no"}
    options |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    longest = int(lengths.max()) if args.data else MAX_LEN
    task = Task(folder, tokenizer, table.select(sample), [], longest, options)
    for step in make_own_trainer(task).get_train_dataloader():
        for row in step:
            task.rows.append({key: row[key][:MAX_LEN].tolist() for key in ("input_ids", "labels")})
    return task


def matmul_rate() -> float:
    """Return FLOPs per second of fp32 matrix products: the median of several, of three sizes."""
    rates = []
    for size in (1024, 1536, 2048) * 5:
        a, b = torch.rand(size, size), torch.rand(size, size)
        start = time.perf_counter()
        a @ b
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return statistics.median(rates[3:])  # the first of each size warm up


def matrix_flops(config, rows: list[dict], layer_passes: float) -> float:
    """Return the FLOPs of all matrix products that training on these rows without padding takes.

    A product of [m, k] and [k, n] is 2mkn FLOPs. Forward, a layer takes 2 for each weight of its
    matrices and each token, and in attention 2 x hidden for each pair of a query and a key it sees
    (scores) and as many again (values); T tokens have T (T + 1) / 2 such pairs. Backward takes
    twice as much. What checkpointing repeats is work done, and counted: the forward passes of a
    layer but the first, each without the MLP's last product, whose result no gradient needs. The
    head takes 2 x hidden x vocabulary for each trained token, and twice that backward. Norms,
    rotary, softmax, activation functions and the optimizer are not counted, nor is what
    FlashAttention's backward repeats.
    """
    hidden, wide = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    weights = hidden * (2 * hidden + 2 * kv + 3 * wide)
    tokens = np.array([len(row["input_ids"]) for row in rows], dtype=float)
    trained = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    layer = 2 * weights * tokens.sum() + 4 * hidden * (tokens * (tokens + 1) / 2).sum()
    repeated = layer - 2 * hidden * wide * tokens.sum()
    layers = config.num_hidden_layers * (3 * layer + (layer_passes - 1) * repeated)
    return layers + 3 * 2 * hidden * config.vocab_size * trained


# ---- The run ------------------------------------------------------------------------------------
def print_table(rows: list[dict], steps: int, results: dict[str, list[Result]]) -> bool:
    """Print a line for each contender over the timed rows; return whether all did the same work."""
    tokens = sum(len(row["input_ids"]) for row in rows)
    trained = sum(x != IGNORE_INDEX for row in rows for x in row["labels"])
    seconds = {name: statistics.median(run.seconds for run in results[name]) for name in results}
    loss = statistics.median(runs[0].loss for runs in results.values())
    columns = ("contender", "s/step", "useful tokens/s", "trained tokens/s", "padding")
    columns += ("x padded to longest", "x TRL", "peak GiB", "layer passes", "first-step loss")
    print("\n| " + " | ".join(columns) + " |\n|---" + "|--:" * (len(columns) - 1) + "|")
    void = set()
    for name, runs in results.items():
        if any(r.trained != trained or not abs(r.loss / loss - 1) <= TOLERANCE for r in runs):
            void.add(name)
        cells = (
            "VOID " * (name in void) + name,
            f"{seconds[name] / steps:.2f}",
            f"{tokens / seconds[name]:,.0f}",
            f"{trained / seconds[name]:,.0f}",
            f"{1 - tokens / runs[0].computed:.0%}",
            f"{seconds['padded to longest'] / seconds[name]:.2f}",
            f"{seconds['TRL'] / seconds[name]:.2f}",
            f"{statistics.median(run.peak for run in runs) / GIB:.2f}",
            f"{runs[0].layer_passes:.2f}",
            f"{runs[0].loss:.5f}",
        )
        print("| " + " | ".join(cells) + " |")
    return not void


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training throughput, side by side, on the CPU.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="rows as the trainer reads them")
    source.add_argument("--synthetic", choices=["long"], help="random tokens, 5,017 a row")
    shown = " and ".join(f"{values} ({name})" for name, values in DEFAULTS.items())
    parser.add_argument("--steps", type=int, help=f"timed optimizer steps; defaults: {shown}")
    parser.add_argument("--rows_per_step", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tokenizer", default="data/tiny-qwen2")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.synthetic or "data"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.rows_per_forward = ROWS_PER_FORWARD[args.synthetic or "data"]
    if min(args.steps, args.rounds, args.rows_per_step) < 1:
        parser.error("--steps, --rounds and --rows_per_step begin at 1")
    if args.rows_per_step % args.rows_per_forward:
        parser.error(f"--rows_per_step must be a multiple of {args.rows_per_forward}")
    return args


def be_quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("trl", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main() -> int:
    args = parse_arguments()
    be_quiet()
    names = ("torch", "transformers", "trl", "accelerate")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    print(f"command    python {shlex.join(sys.argv)}")
    print(f"machine    {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, fp32")
    print(f"versions   {', '.join(versions)}")
    tokenizer = sft_qwen2.load_tokenizer(args.tokenizer, "")
    results, rates = {name: [] for name in CONTENDERS}, []
    with tempfile.TemporaryDirectory() as folder:
        config = save_model(tokenizer, folder)
        task = make_task(args, folder, tokenizer)
        for _ in range(args.rounds):
            for name in CONTENDERS:
                rates.append(matmul_rate())
                results[name].append(run_in_own_process(name, task))
                print(f"ran        {name}: {results[name][-1].seconds:.1f} s", flush=True)
    timed, rate = task.rows[args.rows_per_step :], statistics.median(rates)
    own = results["this trainer"]
    seconds = statistics.median(run.seconds for run in own)
    share = matrix_flops(config, timed, own[0].layer_passes) / seconds / rate
    print(f"matrices   {rate / 1e9:.0f} GFLOP/s in fp32 products; this trainer's are {share:.0%}")
    return 0 if print_table(timed, args.steps, results) else 1


if __name__ == "__main__":
    sys.exit(main())
