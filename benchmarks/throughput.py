"""Training throughput on the CPU: this trainer beside the usual ways, on the same rows and weights.

    pip install trl==1.16.0
    python benchmarks/throughput.py --data FILE.jsonl [--steps 4] [--rows_per_step 64] [--rounds 3]
    python benchmarks/throughput.py --synthetic long

Every contender loads the same small Qwen2 (random weights of a fixed seed, fp32) and takes the same
rows in the same order, `rows_per_step` to an optimizer step, with gradient checkpointing and AdamW,
without logging and saving. It runs one step to warm up and `steps` that are timed; the rounds take
the contenders in turn, and the table shows medians. Rows are encoded once, for all: what a
tokenizer costs is not measured.

The loss of the first step, the mean over all its trained tokens, must be the same to 1e-3, and so
must the number of tokens trained: a contender that does other work is marked VOID (exit code 1).
"""

import argparse
import functools
import importlib.metadata
import logging
import os
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import sft_qwen2
from sft_qwen2 import IGNORE_INDEX

ROWS_PER_FORWARD = 4  # per_device_train_batch_size of all contenders
MAX_LEN, SEED, TOLERANCE = 8192, 0, 1e-3
LONG_ROWS, SHORTEST, LONGEST, SKEW = 256, 4113, 8001, 3.32  # a mean of 5,017 tokens
FP32 = sft_qwen2.choose_precision(None, 1, False)


class Task(NamedTuple):
    """What all contenders are given."""

    folder: str  # with the weights; also for what a trainer insists on writing
    tokenizer: transformers.PreTrainedTokenizerBase
    table: datasets.Dataset  # the rows, for this trainer's own loader to shuffle
    rows: list[dict]  # the same as lists in that loader's order, for the others
    longest: int  # tokens of the longest row of the whole set, of which these rows are a sample
    options: dict  # the TrainingArguments of all


class Result(NamedTuple):
    loss: float  # of the first step
    seconds: float  # of the timed steps
    trained: int  # tokens, in the timed steps
    computed: int  # the same, of all tokens, padding included


class Clock(transformers.TrainerCallback):
    """Times steps from boundary to boundary, and counts what enters the model."""

    def __init__(self, trainer):
        self.steps, self.loss, self.trained, self.computed = [], 0.0, 0, 0
        self.training_step, trainer.training_step = trainer.training_step, self.watch_step
        trainer.model.register_forward_pre_hook(self.count, with_kwargs=True)
        for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(self)

    def watch_step(self, *args, **kwargs):
        loss = self.training_step(*args, **kwargs)
        self.loss += loss.item()  # each part is already divided by the trained tokens of the step
        return loss

    def count(self, model, args, kwargs) -> None:
        labels = kwargs["shift_labels"] if "shift_labels" in kwargs else kwargs["labels"][:, 1:]
        self.trained += int((labels != IGNORE_INDEX).sum())
        self.computed += kwargs["input_ids"].numel()

    def on_step_end(self, *args, **kwargs) -> None:
        self.steps.append((self.loss, time.perf_counter(), self.trained, self.computed))


def time_steps(trainer) -> Result:
    clock = Clock(trainer)
    trainer.train()
    first, last = clock.steps[0], clock.steps[-1]
    return Result(first[0], *(end - start for start, end in zip(first[1:], last[1:])))


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


def make_own_trainer(task: Task):
    """Return this trainer with its defaults: micro-batches of at most 4 x 8192 tokens."""
    options = {**task.options, "model_name_or_path": task.folder}
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    model = sft_qwen2.load_model(task.folder, FP32.weights)
    parsed, rows = sft_qwen2.parse_arguments(flags), {"train": task.table}
    return sft_qwen2.build_trainer(model, task.tokenizer, *parsed, rows, FP32)


CONTENDERS = {
    "padded to longest": functools.partial(run_plain, padding="max_length"),
    "dynamic padding": functools.partial(run_plain, padding="longest"),
    "TRL": functools.partial(run_trl, padding_free=False),
    "TRL, padding-free": functools.partial(run_trl, padding_free=True),
    "this trainer": lambda task: time_steps(make_own_trainer(task)),
}


# ---- Rows, model, machine -----------------------------------------------------------------------
def make_long_rows(vocab_size: int) -> datasets.Dataset:
    """Return rows of random tokens, 4,113 to 8,001 long; the second half of each is its answer."""
    rng = np.random.default_rng(SEED)
    lengths = SHORTEST + (LONGEST - SHORTEST) * np.linspace(0, 1, LONG_ROWS) ** SKEW
    ids = [rng.integers(0, vocab_size, int(length)).tolist() for length in lengths.round()]
    labels = [[IGNORE_INDEX] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    columns = {"input_ids": ids, "labels": labels, "num_tokens": [len(row) for row in ids]}
    columns["line"] = list(range(1, LONG_ROWS + 1))
    return datasets.Dataset.from_dict(columns).with_format("numpy")


def save_model(tokenizer, folder: str) -> transformers.Qwen2Config:
    """Save a small Qwen2 with random weights and the tokenizer; return its config."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024}
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
        encoded = sft_qwen2.encode_file(args.data, tokenizer, "You are a helpful assistant.")
        table, _ = sft_qwen2.fit_rows(encoded, args.data, MAX_LEN, "truncate")
    else:
        table = make_long_rows(len(tokenizer))
    lengths = table["num_tokens"][:].clip(max=MAX_LEN)
    wanted = (args.steps + 1) * args.rows_per_step  # a small set is taken more than once
    sample = np.resize(np.random.default_rng(SEED).permutation(len(table)), wanted)
    print(
        f"rows       {wanted:,} of {args.data or 'random tokens'}: {len(table):,} rows of "
        f"{lengths.min():,} to {lengths.max():,} tokens, mean {lengths.mean():,.0f}"
    )
    options = {"output_dir": folder, "max_steps": args.steps + 1, "seed": SEED, "use_cpu": True}
    options |= {"per_device_train_batch_size": ROWS_PER_FORWARD, "gradient_checkpointing": True}
    options |= {"gradient_accumulation_steps": args.rows_per_step // ROWS_PER_FORWARD}
    options |= {"optim": "adamw_torch_fused", "learning_rate": 1e-5, "dataloader_pin_memory": False}
    options |= {"train_sampling_strategy": "sequential", "logging_strategy": "no"}
    options |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    task = Task(folder, tokenizer, table.select(sample), [], int(lengths.max()), options)
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


def matrix_flops(config, rows: list[dict]) -> float:
    """Return the FLOPs of all matrix products that training on these rows without padding takes.

    A product of [m, k] and [k, n] is 2mkn FLOPs. Forward, a layer takes 2 for each weight of its
    matrices and each token, and in attention 2 x hidden for each pair of a query and a key it sees
    (scores) and as many again (values); T tokens have T (T + 1) / 2 such pairs. Backward takes
    twice as much, and checkpointing repeats the forward pass: 4 in all. The head takes 2 x hidden x
    vocabulary for each trained token, and twice that backward. Norms, rotary, softmax, activation
    functions and the optimizer are not counted, nor is what FlashAttention's backward repeats.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    weights = hidden * (2 * hidden + 2 * kv + 3 * config.intermediate_size)
    tokens = np.array([len(row["input_ids"]) for row in rows], dtype=float)
    trained = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    layer = 2 * weights * tokens.sum() + 4 * hidden * (tokens * (tokens + 1) / 2).sum()
    return 4 * layers * layer + 3 * 2 * hidden * config.vocab_size * trained


# ---- The run ------------------------------------------------------------------------------------
def print_table(rows: list[dict], steps: int, results: dict[str, list[Result]]) -> bool:
    """Print a line for each contender over the timed rows; return whether all did the same work."""
    tokens = sum(len(row["input_ids"]) for row in rows)
    trained = sum(x != IGNORE_INDEX for row in rows for x in row["labels"])
    seconds = {name: statistics.median(run.seconds for run in results[name]) for name in results}
    loss = statistics.median(runs[0].loss for runs in results.values())
    columns = ("contender", "s/step", "useful tokens/s", "trained tokens/s", "padding")
    columns += ("x padded to longest", "x TRL", "first-step loss")
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
            f"{runs[0].loss:.5f}",
        )
        print("| " + " | ".join(cells) + " |")
    return not void


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training throughput, side by side, on the CPU.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="rows as the trainer reads them")
    source.add_argument("--synthetic", choices=["long"], help="random tokens, 5,017 a row")
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps")
    parser.add_argument("--rows_per_step", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", default="data/tiny-qwen2")
    args = parser.parse_args()
    if min(args.steps, args.rounds, args.rows_per_step) < 1 or args.rows_per_step % 4:
        parser.error("--steps and --rounds begin at 1, --rows_per_step is a multiple of 4")
    return args


def main() -> int:
    args = parse_arguments()
    warnings.filterwarnings("ignore")
    for name in ("trl", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
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
            for name, contender in CONTENDERS.items():
                rates.append(matmul_rate())
                results[name].append(contender(task))
    timed, rate = task.rows[args.rows_per_step :], statistics.median(rates)
    seconds = statistics.median(run.seconds for run in results["this trainer"])
    share = matrix_flops(config, timed) / seconds / rate
    print(f"matrices   {rate / 1e9:.0f} GFLOP/s in fp32 products; this trainer's are {share:.0%}")
    return 0 if print_table(timed, args.steps, results) else 1


if __name__ == "__main__":
    sys.exit(main())
