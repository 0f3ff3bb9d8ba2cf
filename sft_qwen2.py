"""Supervised fine-tuning (SFT) of Qwen2 on query/answer JSONL: one script, read from top to bottom.

    python sft_qwen2.py                                 # Qwen2-7B-Instruct on data/train.jsonl
    python sft_qwen2.py data/tiny.json                  # the stand-in model, on any laptop
    python sft_qwen2.py run.json --learning_rate 2e-5   # arguments from a file, flags on top
    torchrun --nproc_per_node gpu sft_qwen2.py          # all GPUs at once

A line of data is a conversation: {"query": "...", "answer": "..."}, optionally with "system", or
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}.
Only the tokens of each answer and the <|im_end|> after it are trained; all others give context.

One optimizer step is a set of rows. They are laid end to end, without padding, in micro-batches of
at most `tokens_per_forward` tokens. Attention stays inside each row, and the loss is summed over
the trained tokens of the step and divided by their number: how the set is cut into micro-batches
changes memory and speed, never the result.

Shapes: T tokens of a row or micro-batch, N trained tokens, H query heads, K key/value heads, D head
size, V vocabulary.
"""

import csv
import datetime
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tqdm.auto
import transformers
from torch.nn.functional import linear_cross_entropy, scaled_dot_product_attention
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

import memory_plan
from memory_plan import GIB, GPUS, LOSS_CHUNK

IGNORE_INDEX = -100  # the label that PyTorch's cross entropy, and every library around it, skips
IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # ChatML's control tokens, around every turn
FAST_TOKENS_CPU = 2048  # a micro-batch of more is slower: caches hold less of it
FAST_TOKENS_GPU = 4096  # a micro-batch of fewer leaves a GPU idle more than computing twice does
ENCODE_BATCH = 1000  # rows per tokenizer call: enough for its threads, few enough to hold
OLDEST = {"bf16": (8, 0), "fp16": (7, 0)}  # least compute capability for which this is chosen
STATE_8BIT = 2 * (1 + 4 / 256)  # bytes of AdamW state: two codes, and a scale for each 256 of them
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "wandb", "torchao")
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# TFLOP/s of dense half-precision matrix products, from the vendor's data sheets, for MFU. Of these
# names, the first that a GPU's full name contains is taken.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989, "H20": 148}
PEAK_TFLOPS |= {"A100": 312, "A800": 312, "V100": 125}
SHOWN_IN_BAR = ("loss", "tokens_per_s", "mfu", "peak_gib")
SHOWN = (*SHOWN_IN_BAR, "grad_norm", "learning_rate", "trained_tokens_per_s")
FEW_STEPS = 10  # of the optimizer: fewer hardly move the weights
NUM_SAMPLES, SAMPLE_TOKENS = 3, 48  # validation prompts answered before and after training


class UserError(Exception):
    """A mistake the user can fix: printed as a sentence, exit code 1, no traceback."""


# ---- Arguments ----------------------------------------------------------------------------------
@dataclass
class ScriptArguments:
    """The arguments that transformers.TrainingArguments does not have."""

    model_name_or_path: str = HfArg(default="Qwen/Qwen2-7B-Instruct", help="Hub name or folder.")
    data_path: str = HfArg(default="data/", help="File, or folder with train.* and validation.*")
    system_prompt: str = HfArg(
        default="你是一个知识渊博的人,请根据问题做出全面且正确的回答。",
        help="System turn of rows that have none, and default of the exported chat template.",
    )
    max_len: int = HfArg(default=8192, help="Longest row in tokens, prompt and answer together.")
    overflow_strategy: Literal["truncate", "drop", "error"] = HfArg(
        default="truncate", help="A row over max_len loses its end, is left out, or stops the run."
    )
    tokens_per_forward: int | None = HfArg(
        default=None, help="Memory knob. At most per_device_train_batch_size x max_len by default."
    )
    skip_bad_rows: bool = HfArg(default=False, help="Write refused rows to rejected.jsonl, go on.")
    fp32: bool = HfArg(default=False, help="fp32 weights and AdamW state: 16 bytes per parameter.")
    device_map: str = HfArg(default="auto", help="auto: layers by memory; or transformers' own.")
    resume: bool = HfArg(default=False, help="Continue the run in output_dir where it stopped.")
    dry_run: bool = HfArg(default=False, help="Do everything but load the model and train.")
    gpus: str | None = HfArg(default=None, help="With --dry_run: plan for 4x80, or 2x80,1x40 GiB.")


TRAINING_DEFAULTS = {
    "output_dir": "./outputs",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 32,
    "num_train_epochs": 1.0,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a share of all steps
    "weight_decay": 0.003,
    "logging_steps": 1,
    "save_steps": 5,
    "save_total_limit": 2,  # a checkpoint of the 7B with its optimizer takes 46 GB or more
    "run_name": "qwen2-7B-sft",
    "report_to": "wandb",
    "gradient_checkpointing": True,
    "logging_nan_inf_filter": False,  # a NaN is to be seen, and stops the run
}

# Each process saves its share; one a machine reads the model's files, and hands out the weights.
FSDP_CONFIG = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}


def process_defaults(argv: list[str]) -> dict:
    """Return the TrainingArguments of one of torchrun's processes: FSDP2 on GPUs, DDP on CPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or any("--deepspeed" in flag for flag in argv):
        return {}
    if not torch.cuda.is_available():
        return {"use_cpu": True, "ddp_backend": "gloo"}
    return {"fsdp": True, "fsdp_config": FSDP_CONFIG}


def parse_arguments(argv: list[str]) -> tuple:
    """Return (ScriptArguments, TrainingArguments); one line and exit code 2 if they are wrong."""
    classes = (ScriptArguments, transformers.TrainingArguments)
    usage = "%(prog)s [arguments.json] [--flag value ...]"
    parser = transformers.HfArgumentParser(classes, allow_abbrev=False, usage=usage)
    parser.print_usage = lambda file=None: None  # an error is one line, without the usage
    try:
        if argv and argv[0].endswith(".json"):  # becomes flags, so that one parser checks both
            values = json.loads(Path(argv[0]).read_text(encoding="utf-8")).items()
            values = [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in values]
            argv = [f"--{k}={v}" for k, v in values if v != "null"] + argv[1:]
        parser.set_defaults(**TRAINING_DEFAULTS, **process_defaults(argv))
        args, training_args, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
        if args.device_map.startswith("{"):
            args.device_map = json.loads(args.device_map)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    if unknown:
        parser.error(f"unknown argument {unknown[0]} (--help lists all)")
    if training_args.bf16 or training_args.fp16:
        parser.error("leave --bf16 and --fp16 out: the number format follows from the GPU")
    if training_args.load_best_model_at_end or training_args.save_strategy == "best":
        parser.error("no best checkpoint is kept: leave --load_best_model_at_end out")
    if args.gpus and not (args.dry_run and re.fullmatch(GPUS, args.gpus)):
        parser.error("--gpus is for --dry_run, and reads NUMBERxGIB: 4x80, or 2x80,1x40")
    values = vars(args) | vars(training_args)
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
    for name in ("max_len", "tokens_per_forward", *sizes):
        if values[name] is not None and values[name] <= 0:
            parser.error(f"--{name} must be positive")
    for name in training_args.report_to:  # TrainingArguments have imported what is asked here
        if name not in transformers.integrations.get_available_reporting_integrations():
            parser.error(f"--report_to {name}: there is none, or its package is not installed")
    return args, training_args


def rows_per_step(training_args) -> int:
    """Return the rows of one optimizer step, of all processes together."""
    own = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    return own * training_args.world_size


@contextmanager
def as_user_error(kinds, sentence: str):
    """Turn exceptions of these kinds into a UserError: the sentence, and what was the matter."""
    try:
        yield
    except kinds as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{sentence}: {cause}") from error


def say(text: str, file=None) -> None:
    """Print a line, by default to stdout, at once and above the bar that may be on screen."""
    tqdm.auto.tqdm.write(text, file=file)
    (file or sys.stdout).flush()


# ---- Rows: what is read, and why a row is refused -----------------------------------------------
def find_data_files(data_path: str) -> dict[str, Path]:
    """Return {"train": file} and, if there is one, {"validation": file}; raises UserError."""
    path, found = Path(data_path), {}
    if not path.exists():
        raise UserError(f"{path}: does not exist; --data_path names your file or folder")
    for split in ("train", "validation"):
        files = [path] if split == "train" and path.is_file() else path.glob(f"{split}.*")
        found[split] = [file for file in files if file.suffix in DATA_SUFFIXES]
    if len(found["train"]) != 1 or len(found["validation"]) > 1:
        wanted = f"be a file ({', '.join(DATA_SUFFIXES)}) or a folder with one named train.*"
        raise UserError(f"{path}: must {wanted}, and at most one named validation.*")
    return {split: files[0] for split, files in found.items() if files}


def read_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """Yield (line or row number from 1, row); in the place of an unreadable row, what is wrong."""
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:  # as bytes only \n ends a line: texts may hold U+2028
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, parse_json(line)
    elif path.suffix == ".csv":  # texts stay as they are written; an empty field is none
        csv.field_size_limit(2**31 - 1)  # the default refuses texts of over 131,072 characters
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), 1):
                wrong = "has more fields than the header; put quotes around texts with commas"
                row = {key: value for key, value in row.items() if value}
                yield number, wrong if None in row else row
    else:
        import datasets

        options = {"data_files": str(path), "split": "train", "streaming": True}
        for number, row in enumerate(datasets.load_dataset(path.suffix[1:], **options), 1):
            yield number, {key: value for key, value in row.items() if value is not None}


def parse_json(line: bytes) -> dict | str:
    """Return the JSON object of a line, or what is wrong with it."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    if line.startswith(b"\xef\xbb\xbf"):
        return "begins with a byte order mark (BOM); save the file as UTF-8 without BOM"
    try:
        row = json.loads(line.rstrip(b"\r\n").decode(), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start}); save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"is broken JSON: {error.msg.removesuffix(' at')} at character {error.pos}"
    except (ValueError, RecursionError) as error:
        return f"is broken JSON: {error}"
    return row if isinstance(row, dict) else "is not a JSON object"


def parse_row(row: dict | str, system_prompt: str) -> list[dict]:
    """Return [{"role", "content"}, ...]: system, user, assistant, ...; or ValueError, why not."""
    if isinstance(row, str):
        raise ValueError(row)
    keys = {"system": "system", "query": "user", "answer": "assistant"}
    turns = [{"role": keys[key], "content": row[key]} for key in keys if key in row]
    turns = row.get("messages", turns)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('has "messages" that are not a list of {"role": ..., "content": ...}')
    if not turns or turns[0].get("role") != "system":
        turns = [{"role": "system", "content": system_prompt}, *turns]
    roles = [turn.get("role") for turn in turns]
    if len(roles) < 3 or roles[1:] != ["user", "assistant"] * (len(roles) // 2):
        found = ", ".join(map(str, ["roles", *roles[1:]] if "messages" in row else row))
        raise ValueError(
            'wants "query" and "answer", or "messages" in which user and assistant alternate, '
            f"assistant last; has {found[:80]!r}"  # as repr: nothing unprintable
        )
    for turn in turns:
        role, text = turn["role"], turn.get("content")
        if not isinstance(text, str):
            raise ValueError(f"its {role} text is not a string")
        if not text.strip() and role != "system":
            raise ValueError(f"has an empty {role} text")
        if NOT_TEXT.search(text):
            raise ValueError(f"its {role} text has a NUL or half a surrogate pair")
    return turns


# ---- Encoding: which tokens are trained ---------------------------------------------------------
def encode_batch(conversations: list[list[dict]], tokenizer) -> list[dict]:
    """Return {"input_ids": [T], "labels": [T]} of each conversation. With ^ under what is trained:

    <|im_start|>system\\nS<|im_end|>\\n<|im_start|>user\\nQ<|im_end|>\\n<|im_start|>assistant\\nA<|im_end|>
                                                                                   ^^^^^^^^^^^
    An answer is encoded apart from the "assistant\\n" before it, because generation starts exactly
    there. Control tokens spelled in a text are encoded as the plain characters they are:
    no row can open or close a turn.
    """
    start, end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    turns = itertools.chain(*conversations)
    texts = [("" if t["role"] == "assistant" else t["role"] + "\n") + t["content"] for t in turns]
    options = {"add_special_tokens": False, "return_attention_mask": False}
    options["split_special_tokens"] = True  # those in texts; those of turns are added below
    newline, assistant, *encoded = tokenizer(["\n", "assistant\n", *texts], **options)["input_ids"]
    encoded, examples = iter(encoded), []
    for turns in conversations:
        input_ids, labels = [], []
        for turn in turns:
            context, trained = [*newline, start] if input_ids else [start], [*next(encoded), end]
            if turn["role"] == "assistant":
                context += assistant
            else:
                context, trained = context + trained, []
            input_ids += context + trained
            labels += [IGNORE_INDEX] * len(context) + trained
        examples.append({"input_ids": input_ids, "labels": labels})
    return examples


def encode(messages: list[dict], tokenizer) -> dict[str, list[int]]:
    """Return {"input_ids": [T], "labels": [T]} of one conversation, as encode_batch does."""
    return encode_batch([messages], tokenizer)[0]


def load_tokenizer(name_or_path: str, system_prompt: str):
    """Return the tokenizer, with the trained system prompt as its chat template's default.

    Raises UserError where the template renders a conversation differently than `encode`: the model
    would be trained on one format and served with another.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path)
    texts = {"system": "S 1", "user": " two\nlines ", "assistant": "你好!"}
    probe = [{"role": r, "content": texts[r]} for r in ("system", *("user", "assistant") * 2)]
    rendered = tokenizer.chat_template and tokenizer.apply_chat_template(probe, return_dict=False)
    if encode(probe, tokenizer)["input_ids"] + tokenizer.encode("\n") != rendered:
        raise UserError(f"{name_or_path}: its chat template is not Qwen2's; choose a Qwen2 model")
    turn = "{'role': 'system', 'content': " + json.dumps(system_prompt, ensure_ascii=False) + "}"
    tokenizer.chat_template = (
        "{% if not messages or messages[0]['role'] != 'system' %}"
        "{% set messages = [" + turn + "] + messages %}{% endif %}" + tokenizer.chat_template
    )
    return tokenizer


def file_sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_file(path: Path, tokenizer, system_prompt: str):
    """Return all rows as a datasets.Dataset on disk, encoded once and found again by content.

    Columns: input_ids [T], labels [T], line (number in the file), error (why the row is refused, or
    ""), num_tokens, num_answer_tokens, num_control_tokens (those spelled in the row's texts).
    """
    import datasets

    control_tokens = tokenizer.all_special_tokens

    def encoded_rows():
        rows = read_rows(path)
        while batch := list(itertools.islice(rows, ENCODE_BATCH)):
            parsed = []
            for line, row in batch:
                try:
                    parsed.append((line, parse_row(row, system_prompt), ""))
                except ValueError as error:
                    parsed.append((line, [], str(error)))  # no turns: no tokens
            examples = encode_batch([turns for _, turns, _ in parsed], tokenizer)
            for (line, turns, error), example in zip(parsed, examples):
                text = "\n".join(turn["content"] for turn in turns)
                yield {
                    **example,
                    "line": line,
                    "error": error,
                    "num_tokens": len(example["input_ids"]),
                    "num_answer_tokens": len(example["labels"])
                    - example["labels"].count(IGNORE_INDEX),
                    "num_control_tokens": sum(text.count(token) for token in control_tokens),
                }

    ids, number = datasets.List(datasets.Value("int32")), datasets.Value("int32")
    features = {"input_ids": ids, "labels": ids, "line": number, "error": datasets.Value("string")}
    features |= {f"num_{kind}tokens": number for kind in ("", "answer_", "control_")}
    unreadable = (OSError, ValueError, RuntimeError, csv.Error, datasets.exceptions.DatasetsError)
    with as_user_error(unreadable, f"{path}: cannot be read or cached"):
        if next(read_rows(path), None) is None:
            raise UserError(f"{path}: is empty; it needs one conversation per line or row")
        vocabulary, script = tokenizer.backend_tokenizer.to_str(), file_sha256(__file__)
        causes = file_sha256(path) + path.suffix + system_prompt + vocabulary + script
        table = datasets.Dataset.from_generator(
            encoded_rows,
            features=datasets.Features(features),
            fingerprint=hashlib.sha256(causes.encode()).hexdigest(),
        )
    return table.with_format("numpy")


def fit_rows(table, path: Path, max_len: int, overflow_strategy: str, skip_bad_rows: bool = False):
    """Return the rows to train on, and counts {name: number} of rows and of answer tokens.

    Rows read = trained + dropped + rejected, and answer tokens read = trained + cut + dropped. A
    row whose answer begins beyond max_len is dropped in any case: it has nothing to train.
    """
    lengths, answer_tokens = table["num_tokens"][:], table["num_answer_tokens"][:]
    rejected, over = np.flatnonzero(lengths == 0), np.flatnonzero(lengths > max_len)
    if len(rejected):
        lines = [f"{path}:{row['line']}: {row['error']}" for row in table.select(rejected[:20])]
        lines += ["..."] * (len(rejected) > len(lines))
        report = "\n".join([*lines, f"{len(rejected)} of {len(table)} rows are refused"])
        if not skip_bad_rows:
            raise UserError(f"{report}; fix them, or train without them: --skip_bad_rows")
        print(report, file=sys.stderr)
    if overflow_strategy == "error" and len(over):
        raise UserError(
            f"{path}:{table[over[0]]['line']}: {lengths[over[0]]} tokens, and max_len is {max_len} "
            f"({len(over)} such rows); raise --max_len or choose another --overflow_strategy"
        )
    kept = answer_tokens.copy()
    for i in over:
        labels = table[i]["labels"][:max_len]
        kept[i] = (labels != IGNORE_INDEX).sum() if overflow_strategy == "truncate" else 0
    trained = kept > 0
    if not trained.any():
        raise UserError(f"{path}: no answer begins within max_len {max_len}; raise --max_len")
    counts = {
        "rows_read": len(table),
        "rows_trained": int(trained.sum()),
        "rows_cut": int(trained[over].sum()),
        "rows_dropped": int((~trained).sum()) - len(rejected),
        "rows_rejected": len(rejected),
        "answer_tokens_read": int(answer_tokens.sum()),
        "answer_tokens_trained": int(kept.sum()),
        "answer_tokens_cut": int((answer_tokens - kept)[trained].sum()),
        "answer_tokens_dropped": int(answer_tokens[~trained].sum()),
        "control_tokens": int(table["num_control_tokens"][:].sum()),
    }
    rows = table if trained.all() else table.select(np.flatnonzero(trained))
    return rows.select_columns(["input_ids", "labels", "line", "num_tokens"]), counts


def write_rejected(table, path: Path, file) -> None:
    """Write each refused row to a JSONL file: where it stands, why it is refused, and its text."""
    rejected = table.select(np.flatnonzero(table["num_tokens"][:] == 0))
    errors = {int(row["line"]): str(row["error"]) for row in rejected}
    with open(path, encoding="utf-8", errors="replace", newline="\n") as lines:
        for number, row in enumerate(lines, 1) if path.suffix == ".jsonl" else read_rows(path):
            if number in errors:
                about = {"file": str(path), "line": number, "error": errors[number], "row": row}
                file.write(json.dumps(about, ensure_ascii=False, default=str) + "\n")


def paint(row: dict, tokenizer, color: bool) -> str:
    """Return a row's text with its trained tokens marked: in green, or in brackets."""
    on, off = ("\033[32m", "\033[0m") if color else ("⟦", "⟧")
    text = ""
    edges = np.flatnonzero(np.diff(row["labels"] != IGNORE_INDEX)) + 1
    for i, part in enumerate(np.split(row["input_ids"], edges)):  # context, trained, context, ...
        text += on + tokenizer.decode(part) + off if i % 2 else tokenizer.decode(part)
    return text


# ---- Micro-batches: the rows of an optimizer step, without padding ------------------------------
def bin_rows(lengths: list[int], tokens_per_forward: int, multiple_of: int = 1) -> list[list[int]]:
    """Return row numbers in bins of at most tokens_per_forward tokens, by first-fit decreasing.

    A longer row has a bin of its own. There are a multiple of `multiple_of` bins, the number of
    processes, since all must run the same number of forward passes: the fullest are split for it.
    """
    bins, free = [], []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        at = next((b for b, room in enumerate(free) if lengths[row] <= room), len(bins))
        if at == len(bins):
            bins.append([])
            free.append(tokens_per_forward)
        bins[at].append(row)
        free[at] -= lengths[row]
    while len(bins) % multiple_of:
        fullest = max(bins, key=lambda rows: (len(rows) > 1, sum(lengths[row] for row in rows)))
        bins.append(fullest[1::2])  # empty where there are fewer rows than processes
        fullest[:] = fullest[::2]
    return bins


def flatten(rows: list[dict]) -> dict:
    """Return a micro-batch: the {"input_ids", "labels"} of rows laid end to end.

    input_ids, position_ids, shift_labels [1, T]: a row's positions begin at 0, and shift_labels[t]
    is the token that position t is to predict, or -100. cu_seq_lens [rows + 1]: the boundaries.
    Of no rows: one untrained token, for this process must run as many passes as the others.
    """
    rows = rows or [{"input_ids": [0], "labels": [IGNORE_INDEX]}]
    batch = transformers.DataCollatorWithFlattening()(rows)  # a row's first label becomes -100
    labels = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=IGNORE_INDEX)
    seq_lens = [len(row["input_ids"]) for row in rows]
    bounds = torch.tensor([0, *itertools.accumulate(seq_lens)], dtype=torch.int32)
    return {**batch, "shift_labels": labels[:, 1:], "cu_seq_lens": bounds, "seq_lens": seq_lens}


def cut(row: dict, max_len: int) -> dict:
    return {name: row[name][:max_len] for name in ("input_ids", "labels")}


def collate(rows: list[dict], max_len: int, tokens_per_forward: int, rank: int = 0, world: int = 1):
    """Return (this process's micro-batches of a step's rows, trained tokens of the whole step).

    Every process reads all rows of the step and takes its share of the bins: each knows the divisor
    of the loss and the number of forward passes without communicating.
    """
    rows = [cut(row, max_len) for row in rows]
    bins = bin_rows([len(row["input_ids"]) for row in rows], tokens_per_forward, world)
    trained_tokens = sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
    return [flatten([rows[i] for i in b]) for b in bins[rank::world]], trained_tokens


# ---- Model: attention inside each row, loss at trained positions --------------------------------
def row_attention(module, query, key, value, mask, seq_lens=None, cu_seq_lens=None, **kwargs):
    """Causal attention of queries [1, H, T, D] on keys and values [1, K, T, D], row by row.

    FlashAttention's kernel for rows of many lengths, where PyTorch has it for the GPU and dtype;
    elsewhere one call a row. Without seq_lens, as in generation, transformers' own sdpa. Returns
    ([1, T, H, D], None), as transformers.AttentionInterface asks.
    """
    if seq_lens is None:
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)
    options = {"scale": kwargs["scaling"], "enable_gqa": True}
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast left them fp32
    ampere = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    if ampere and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        bounds = (cu_seq_lens, cu_seq_lens, max(seq_lens), max(seq_lens))
        return varlen_attn(q, k, v, *bounds, window_size=(-1, 0), **options)[None], None
    if query.is_cuda and not ampere:  # their fused kernel wants a key and a value per query head
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    rows = zip(*(x.split(seq_lens, dim=2) for x in (query, key, value)))
    outputs = [scaled_dot_product_attention(*row, is_causal=True, **options) for row in rows]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


class AnswerLoss:
    """Mixin that load_model combines with transformers.Qwen2ForCausalLM: a micro-batch's loss."""

    def forward(self, input_ids=None, shift_labels=None, num_items_in_batch=1, **kwargs):
        """Return {"loss": cross entropy summed over the trained tokens / num_items_in_batch}.

        Only the N of T hidden states that have a target meet the head, in chunks: [N, V] logits
        never exist at once. Without shift_labels this is transformers' forward.
        """
        if shift_labels is None:
            return super().forward(input_ids, **kwargs)
        mask = {"full_attention": None}  # row_attention keeps rows apart without one
        output = self.model(input_ids, attention_mask=mask, use_cache=False, **kwargs)
        head = self.lm_head.weight
        shift_labels = shift_labels.to(head.device)
        trained = shift_labels != IGNORE_INDEX
        hidden, targets = output.last_hidden_state.to(head.device)[trained], shift_labels[trained]
        if torch.is_autocast_enabled(head.device.type):  # it would leave this product in fp32
            dtype = torch.get_autocast_dtype(head.device.type)
            hidden, head = hidden.to(dtype), head.to(dtype)
        chunks = {"batch_chunk_size": LOSS_CHUNK, "chunking_method": None, "acc_policy": "compact"}
        options = {"options": torch.nn.LinearCrossEntropyOptions(**chunks)}
        # In half precision a sum would be rounded to 8 bits; the single losses' errors cancel out.
        options["reduction"] = "sum" if hidden.dtype == torch.float32 else "none"
        losses = linear_cross_entropy(hidden, head, targets, **options)
        return {"loss": losses.float().sum() / num_items_in_batch}


def check_model(name_or_path: str, planned: bool):
    """Return the model's config; raises UserError where the model cannot be trained here.

    `planned`: whether there is a GPU, or only a plan is wanted.
    """
    default = ScriptArguments.model_name_or_path
    if name_or_path == default and not planned:
        raise UserError(f"{default} needs a GPU; without one: python sft_qwen2.py data/tiny.json")
    remedy = f"try hf download {default} --local-dir qwen2, then --model_name_or_path qwen2"
    sentence = f"{name_or_path}: no such model, here or on the hub; {remedy}"
    with as_user_error((OSError, ValueError), sentence):
        config = transformers.AutoConfig.from_pretrained(name_or_path)
    if config.model_type != "qwen2" or config.use_sliding_window:
        raise UserError(f"{name_or_path}: is not a Qwen2 or Qwen2.5 model with full attention")
    return config


def load_model(name_or_path: str, dtype: torch.dtype, device_map=None):
    """Return the checkpoint as a Qwen2ForCausalLM with AnswerLoss and row_attention."""
    transformers.AttentionInterface.register("row_attention", row_attention)
    masks = transformers.AttentionMaskInterface
    masks.register("row_attention", masks()["sdpa"])  # for generation
    bases = (AnswerLoss, transformers.Qwen2ForCausalLM)  # here: importing models takes seconds
    return type("Qwen2ForCausalLM", bases, {}).from_pretrained(
        name_or_path, dtype=dtype, device_map=device_map, attn_implementation="row_attention"
    )


# ---- Precision and placement --------------------------------------------------------------------
class Precision(NamedTuple):
    weights: torch.dtype
    compute: str  # bf16, fp16 or fp32
    optim: str
    bytes_per_parameter: float  # of weight, gradient and AdamW state
    reason: str


def choose_precision(capability: tuple | None, world_size: int, fp32: bool) -> Precision:
    """Return the number formats for a GPU's compute capability (None: no GPU).

    bf16 weights need stochastic rounding: most updates of AdamW at a learning rate of 1e-5 are less
    than half a bf16 step, and plain rounding loses them. fp16 always has fp32 weights behind it.
    (torch.cuda.is_bf16_supported is no guide: it counts the V100's emulation.)
    """
    if capability is None:
        return Precision(torch.float32, "fp32", "adamw_torch_fused", 16, "no GPU")
    gpu = "compute capability {}.{}".format(*capability)
    compute = "bf16" if capability >= (8, 0) else "fp16"
    if fp32 or world_size > 1:
        reason = f"{gpu}, {'--fp32' if fp32 else 'sharded'}"
        return Precision(torch.float32, compute, "adamw_torch_fused", 16, reason)
    weights = torch.bfloat16 if compute == "bf16" else torch.float32
    size = 2 * weights.itemsize + STATE_8BIT
    return Precision(weights, compute, "adamw_torch_8bit", size, gpu)


class Plan(NamedTuple):
    device_map: dict | str | None
    tokens_per_forward: int  # of a micro-batch, at most
    plain_tokens: int  # at most, of one that fits without gradient checkpointing


def plan_memory(config, args, training_args, precision: Precision, capacities: list, longest: int):
    """Return the Plan and print what each device will hold; raises UserError if too much.

    `longest`: the tokens of the longest row. Unless --tokens_per_forward says otherwise,
    micro-batches are as large as fits; or as fits without checkpointing, if these are not too small
    to keep the device busy: a layer that is not recomputed saves a fifth of its time.
    """
    on_cpu = precision.compute == "fp32"
    world = 1 if on_cpu else training_args.world_size  # a CPU's processes have all weights each
    budget = training_args.per_device_train_batch_size * args.max_len
    budget = args.tokens_per_forward or (min(budget, FAST_TOKENS_CPU) if on_cpu else budget)
    if args.device_map != "auto" and world == 1:
        print("memory     not planned: the device map is your own")
        return Plan(args.device_map, budget, 0)
    # With checkpointing: the largest micro-batch that fits, or the one that is asked for.
    terms = (precision, capacities, world)
    if not args.tokens_per_forward:
        while budget > longest and not memory_plan.fits(config, budget, *terms):
            budget //= 2
    tokens = max(budget, longest)
    device_map, loads = memory_plan.place(config, tokens, *terms)
    if not memory_plan.fits(config, tokens, *terms):
        print_loads(loads, capacities, device_map)
        refuse_plan(config, args, precision, capacities, (tokens, longest), world)
    # Without: as many tokens as fit while layers stay on their devices, if that is enough.
    placed = (precision, device_map, capacities, world)
    plain = memory_plan.largest_plain(config, tokens, *placed)
    enough = FAST_TOKENS_GPU if training_args.gradient_checkpointing else longest
    if not args.tokens_per_forward and plain >= enough:
        budget = min(budget, plain)
    tokens = max(budget, longest)
    if not training_args.gradient_checkpointing and plain < tokens:
        raise UserError(f"too little memory for {tokens} tokens without gradient checkpointing")
    which = f"micro-batches over {plain:,} tokens" if plain else "all micro-batches"
    loads = memory_plan.peak_loads(config, tokens, plain, *placed)
    if plain >= tokens:  # then another split is the most even
        which = "nothing: memory suffices"
        device_map, loads = memory_plan.place(config, tokens, *terms, checkpointing=False)
    print_loads(loads, capacities, device_map)
    print(f"recompute  {which}")  # by gradient checkpointing
    if world == 1 and len(capacities) > 1:
        print_torchrun(config, precision, capacities, longest, training_args)
    on_gpu = training_args.device.type == "cuda"
    return Plan(device_map if on_gpu else None, budget, plain)


def print_loads(loads: list[float], capacities: list[float], device_map: dict | None) -> None:
    for gpu, (load, room) in enumerate(zip(loads, capacities)):
        parts = [part for part, at in (device_map or {}).items() if at == gpu]
        held = f" ({parts[gpu == 0]} to {parts[-1]})" if len(capacities) > 1 and parts else ""
        print(f"memory     device {gpu}: {load / GIB:.1f} of {room / GIB:.1f} GiB{held}")


def print_torchrun(config, precision: Precision, capacities: list, longest: int, training_args):
    """Say how all GPUs of one process could be used at once, for the same rows per step."""
    gpus = len(capacities)
    sharded = choose_precision(OLDEST[precision.compute], gpus, False)
    each = memory_plan.place(config, longest, sharded, capacities, gpus)[1][0]
    steps = max(1, round(training_args.gradient_accumulation_steps / gpus))
    flags = f"--nproc_per_node {gpus} sft_qwen2.py --gradient_accumulation_steps {steps}"
    way = f"at once: torchrun {flags}"
    if each > memory_plan.USABLE * min(capacities):
        way = "too small to work at once"
    print(f"devices    work in turn; {way} ({each / GIB:.1f} GiB each at least)")


def refuse_plan(config, args, precision: Precision, capacities: list, tokens: tuple, world: int):
    """Raise UserError, with what would fit. `tokens`: of a micro-batch, and of the longest row."""
    if precision.compute == "fp32":
        raise UserError("too little memory; to plan for another machine: --dry_run --gpus 4x80")
    single, sharded = (choose_precision(OLDEST[precision.compute], n, False) for n in (1, 2))
    ways = memory_plan.what_would_fit(config, *tokens, precision, sharded, capacities, world)
    if (args.fp32 or world > 1) and memory_plan.fits(config, tokens[0], single, capacities):
        ways.insert(0, "one process" + " without --fp32" * args.fp32)
    reserve = f"too little memory ({1 - memory_plan.USABLE:.0%} of it stays free)"
    raise UserError(f"{reserve}; what would fit: {'; '.join(ways) or 'a smaller model'}")


# ---- Trainer: one optimizer step over a set of rows ---------------------------------------------
class StepTrainer:
    """Mixin that build_trainer combines with transformers.Trainer: a batch is a whole step's rows.

    build_trainer also sets max_len, tokens_per_forward, plain_tokens, num_parameters, train_file,
    and since when (time.time()) which work [steps, tokens, trained tokens, FLOPs] was done.
    """

    bar = None
    stop_signal = 0  # the number of the one that came
    bad_norms = 0  # consecutive steps whose gradient norm was not finite

    def get_train_dataloader(self):
        """Return the loader of steps: lists of rows, shuffled by the seed and the epoch."""
        from accelerate.data_loader import prepare_data_loader

        options = {"batch_size": rows_per_step(self.args), "shuffle": True, "collate_fn": list}
        loader = torch.utils.data.DataLoader(self.train_dataset, **options)
        # "1 process": else accelerate deals out the rows itself, and repeats some to fill a step.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        options = {"use_seedable_sampler": True, "data_seed": seed}
        return prepare_data_loader(loader, num_processes=1, process_index=0, **options)

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, checkpoint, trial):
        """Begin the bar; return (epochs, steps of the next) done before.

        Of a finished run all epochs: Trainer would add a step if it ended within one.
        """
        done = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        if sys.stderr.isatty() and self.is_world_process_zero():
            self.bar = tqdm.auto.tqdm(total=max_steps, initial=self.state.global_step)
            transformers.utils.logging.disable_progress_bar()  # a save's would break this one
        return done if self.state.global_step < max_steps else (epochs, 0)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Return Trainer's schedule, one step ahead where it warms up.

        A warm-up begins with a rate of 0: the rows of that step would not be trained.
        """
        warm_up = self.args.get_warmup_steps(num_training_steps) > 0
        scheduler = super().create_scheduler(num_training_steps + warm_up, optimizer)
        if warm_up and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, to step the optimizer first
                scheduler.step()
        return scheduler

    def micro_batches(self, rows: list[dict]) -> tuple[list[dict], int]:
        share = (self.args.process_index, self.args.world_size)
        batches, trained_tokens = collate(rows, self.max_len, self.tokens_per_forward, *share)
        return [self._prepare_inputs(batch) for batch in batches], trained_tokens

    def training_step(self, model, rows, num_items_in_batch=None):
        """Run the step's micro-batches and return its loss; out of memory, again with less at once.

        The divisor of the loss is the trained tokens of all processes. Processes average gradients
        and losses, so each multiplies its part by their number.
        """
        model.train()
        while True:
            batches, trained_tokens = self.micro_batches(rows)
            loss_sum = torch.zeros((), device=self.args.device)
            try:
                for i, batch in enumerate(batches, 1):
                    self.choose_checkpointing(sum(batch["seq_lens"]))
                    self.accelerator.sync_gradients = i == len(batches)  # for DeepSpeed
                    with self.gradients_kept(model) if i < len(batches) else nullcontext():
                        divisor = trained_tokens / self.args.world_size
                        loss = model(**batch, num_items_in_batch=divisor)["loss"]
                        self.accelerator.backward(loss)
                    loss_sum += loss.detach().to(loss_sum.device)
                break
            except torch.OutOfMemoryError:
                self.lower_budget(batches)
            loss = None  # and with it the activations that it holds
            model.zero_grad()
            torch.cuda.empty_cache()
        step_loss = self.accelerator.reduce(loss_sum, "mean").item()  # the same in all processes
        # Exactly 0 is what wrong labels and overflown logits look like.
        if not math.isfinite(step_loss) or step_loss == 0:
            raise self.broken_step(f"its loss is {step_loss}", rows)
        self.control.should_training_stop |= self.agreed_signal() > 0
        self.rows = rows
        lengths = np.array([len(row["input_ids"][: self.max_len]) for row in rows])
        flops = training_flops(self.model.config, self.num_parameters, lengths)
        self.work += [1, lengths.sum(), trained_tokens, flops]
        return loss_sum

    def choose_checkpointing(self, tokens: int) -> None:
        """Recompute layers in the backward pass only where memory asks for it."""
        if self.args.gradient_checkpointing:
            for layer in self.model.model.layers:
                layer.gradient_checkpointing = tokens > self.plain_tokens

    def gradients_kept(self, model):
        """Return a context in which backward leaves gradients where they are, for later ones.

        With FSDP it exchanges them each time: kept, they would be whole, 4 bytes a parameter.
        """
        return nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model)

    def agreed_signal(self) -> int:
        """Return the signal that any process got, or 0: all must stop after the same step."""
        number = torch.tensor(self.stop_signal, device=self.args.device)
        return int(self.accelerator.gather(number).max())

    def lower_budget(self, batches: list[dict]) -> None:
        """Checkpoint all layers, or if so already, halve tokens_per_forward.

        Raises UserError where that cannot help or other processes would not do the same.
        """
        largest = max((batch["seq_lens"] for batch in batches), key=sum)
        tokens, half = sum(largest), sum(largest) // 2
        if self.args.world_size > 1:
            raise UserError(f"out of memory with {tokens} tokens; try --tokens_per_forward {half}")
        if self.plain_tokens and self.args.gradient_checkpointing:
            self.plain_tokens = 0
            say(f"memory     out with {tokens} tokens; now with gradient checkpointing for all")
        elif len(largest) == 1:
            raise UserError(f"out of memory with one row of {tokens} tokens; lower --max_len")
        else:
            self.tokens_per_forward = half
            say(f"memory     {tokens} tokens are too many for one forward pass; now {half}")
        self.log({"tokens_per_forward": self.tokens_per_forward})

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the norm as Trainer does, but stop before NaN gradients reach the weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.bad_norms = 0 if np.isfinite(float(norm)) else self.bad_norms + 1
        # fp16's loss scale begins too high on purpose: it skips such steps, and halves itself.
        if self.bad_norms > (20 if self.args.fp16 else 0):
            raise self.broken_step(f"its gradient norm is {float(norm)}", self.rows)
        return norm

    def broken_step(self, what: str, rows) -> UserError:
        lines = ", ".join(f"{self.train_file}:{row['line']}" for row in rows)
        return UserError(
            f"step {self.state.global_step + 1}: {what}. Training stopped before that reached the "
            f"weights; checkpoints are as they were, nothing is exported. Its rows: {lines}"
        )

    def _save_checkpoint(self, model, trial=None) -> None:
        """Save a checkpoint aside and rename it once it is on disk: it is whole, or not there."""
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        aside, error = output_dir / "unfinished", None
        self.args.output_dir = str(aside)
        try:
            super()._save_checkpoint(model, trial)  # every process writes a part
            os.sync()
        except Exception as caught:  # each library has its own for a full disk; training can go on
            error = caught
            say(f"{name} could not be saved; earlier ones are whole: {error}", sys.stderr)
        self.args.output_dir = str(output_dir)
        failed = torch.tensor(float(error is not None), device=self.args.device)
        failed = self.accelerator.reduce(failed) > 0  # in any process; all parts are written now
        if self.args.should_save:
            if not failed:
                os.replace(aside / name, output_dir / name)
                rotate_checkpoints(str(output_dir), self.args.save_total_limit)
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None):
        if state_dict and self.model.config.tie_word_embeddings:
            state_dict.pop("lm_head.weight")  # FSDP's second copy of the embedding
        super()._save(output_dir, state_dict)

    def evaluate(self, ignore_keys=None):
        """Log and return {"eval_loss"}: the mean over all answer tokens of the validation rows."""
        began, rows, loss_sum, token_sum = time.time(), iter(self.eval_dataset), 0.0, 0
        self.model.eval()
        while step := list(itertools.islice(rows, self.args.per_device_train_batch_size)):
            batches, trained_tokens = self.micro_batches(step)
            token_sum += trained_tokens
            with torch.no_grad(), self.accelerator.autocast():
                loss_sum += sum(self.model(**batch)["loss"].item() for batch in batches)
        loss_sum = self.accelerator.reduce(torch.tensor(loss_sum, device=self.args.device)).item()
        metrics = {"eval_loss": loss_sum / token_sum}
        self.log(metrics)
        say(f"eval_loss  {metrics['eval_loss']:.4f} at step {self.state.global_step}")
        self.since += time.time() - began  # no part of the steps' time
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict, start_time=None) -> None:
        """Report to wandb and others, to output_dir/metrics.jsonl and, of a step, on screen."""
        if "loss" in logs:
            logs |= self.measure_speed()
        try:
            super().log(logs, start_time)
        except Exception as error:  # wandb's, of whatever kind: a report must not cost the run
            say(f"wandb      lost step {self.state.global_step}: {error}")
        if not self.is_world_process_zero():
            return
        step, steps = self.state.global_step, self.state.max_steps
        try:
            with open(Path(self.args.output_dir) / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **logs}) + "\n")
        except OSError as error:  # a full disk; the next line may have room again
            say(f"step {step} is not in metrics.jsonl: {error}")
        values = {name: logs[name] for name in SHOWN if name in logs}
        shown = {k: f"{v:,}" if isinstance(v, int) else f"{v:.4g}" for k, v in values.items()}
        if "loss" in logs and self.bar is not None:
            self.bar.set_postfix({k: v for k, v in shown.items() if k in SHOWN_IN_BAR})
            self.bar.update(step - self.bar.n)
        elif "loss" in logs:  # a bar would fill a log file
            left = datetime.timedelta(seconds=round(logs["seconds_left"]))
            line = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{steps}  {line}  left {left}", flush=True)

    def measure_speed(self) -> dict[str, float]:
        """Return the throughput since the last log, and its share of the GPUs' peak."""
        steps, tokens, trained, flops = self.work / (time.time() - self.since)
        self.since, self.work = time.time(), np.zeros(4)
        left = (self.state.max_steps - self.state.global_step) / steps
        speed = {"tokens_per_s": round(tokens), "trained_tokens_per_s": round(trained)}
        if self.args.device.type == "cuda":
            name, gpus = torch.cuda.get_device_name(), range(torch.cuda.device_count())
            if peak := next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name), None):
                speed["mfu"] = flops / (peak * 1e12 * self.args.world_size)
            speed["peak_gib"] = max(map(torch.cuda.max_memory_allocated, gpus)) / GIB
        return {**speed, "seconds_left": round(left)}


def training_flops(config, num_parameters: int, lengths: np.ndarray) -> float:
    """Return the FLOPs of training on rows of these lengths, as MFU counts them.

    6 for each parameter and token, and 12 for each layer, value of the hidden size, and pair of
    tokens of a row (PaLM, arXiv:2204.02311, appendix B). What is computed twice counts once.
    """
    attention = 12 * config.num_hidden_layers * config.hidden_size * (lengths.astype(float) ** 2)
    return 6 * num_parameters * lengths.sum() + attention.sum()


def sharded_policy(compute: str):
    """Return FSDP's number formats. (accelerate's own would sum gradients in half precision.)"""
    dtype = COMPUTE_DTYPES[compute]
    return torch.distributed.fsdp.MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)


def build_trainer(model, tokenizer, script_args, training_args, rows: dict, precision, plan: Plan):
    """Return the transformers.Trainer with StepTrainer's steps, over the rows of each split."""
    import accelerate

    rounded = precision.weights == torch.bfloat16  # then nothing is left for autocast
    stochastic = rounded and precision.optim == "adamw_torch_8bit"
    own_step = rows_per_step(training_args) // training_args.world_size
    args = replace(
        training_args,
        per_device_train_batch_size=own_step,  # for Trainer, a step is one large batch
        gradient_accumulation_steps=1,
        bf16=precision.compute == "bf16" and not rounded,
        fp16=precision.compute == "fp16",
        optim=precision.optim,
        optim_args="bf16_stochastic_round=True" if stochastic else training_args.optim_args,
        eval_on_start="validation" in rows,
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs in one process: never nn.DataParallel
    datasets = {"train_dataset": rows["train"], "eval_dataset": rows.get("validation")}
    trainer_class = type("SFTTrainer", (StepTrainer, transformers.Trainer), {})
    trainer = trainer_class(model, args, data_collator=list, processing_class=tokenizer, **datasets)
    for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
        trainer.remove_callback(callback)  # StepTrainer.log shows the steps
    # A cache of half-precision weights would cost 2 bytes a parameter, and save little time.
    trainer.accelerator.autocast_handler = accelerate.utils.AutocastKwargs(cache_enabled=False)
    if trainer.is_fsdp_enabled:
        policy = sharded_policy(precision.compute)
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    trainer.max_len, trainer.num_parameters = script_args.max_len, model.num_parameters()
    trainer.tokens_per_forward, trainer.plain_tokens = plan[1:]
    trainer.since, trainer.work = time.time(), np.zeros(4)
    return trainer


def answer_samples(model, tokenizer, prompts: list[list[dict]]) -> list[str]:
    """Return the model's greedy answer to each prompt, itself a conversation that waits for one."""
    chat = transformers.pipeline("text-generation", model=model.eval(), tokenizer=tokenizer)
    length = {"max_new_tokens": SAMPLE_TOKENS, "max_length": None, "return_full_text": False}
    return [chat(prompt, do_sample=False, **length)[0]["generated_text"] for prompt in prompts]


# ---- The run ------------------------------------------------------------------------------------
def quiet_libraries() -> None:
    """Leave the console to what the user must know; what fails still raises."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Of kernels for other machines, and of each try to reach the hub.
    for name in ("torchao", "torch.utils._pytree", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        transformers.utils.logging.disable_progress_bar()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def find_devices(gpus: str | None, training_args) -> tuple[list[float], tuple[int, int] | None]:
    """Return the free bytes of each device to plan for, and their least compute capability.

    Of several processes each looks at its own device, and all plan for the one with the least:
    they must cut a step into micro-batches in the same way.
    """
    if gpus:
        capacities, processes = memory_plan.parse_gpus(gpus), training_args.world_size
        if processes not in (1, len(capacities)):
            raise UserError(f"--gpus has {len(capacities)} GPUs for {processes} processes")
        old = {16 * GIB, 32 * GIB} & set(capacities)  # V100s, and the T4
        capacities = capacities if processes == 1 else [min(capacities)] * processes
        return capacities, OLDEST["fp16" if old else "bf16"]
    import psutil  # comes with accelerate
    from accelerate.utils import gather_object

    world_size, device = training_args.world_size, training_args.device
    if device.type == "cuda":
        ids = [device.index] if world_size > 1 else range(torch.cuda.device_count())
        capability = min(torch.cuda.get_device_capability(i) for i in ids)
        free = [torch.cuda.mem_get_info(i)[0] for i in ids]
    else:  # of the machine's memory, a tenth is for other programs
        capability, processes = None, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free = [0.9 * psutil.virtual_memory().available / processes]
    if world_size > 1:
        free = [min(gather_object(free))] * (world_size if capability else 1)
        capability = capability and min(gather_object([capability]))
    return free, capability


def plan_steps(budget: int, training_args, lengths: np.ndarray) -> None:
    """Print how many optimizer steps there will be, and the forward passes of one."""
    rows = rows_per_step(training_args)
    steps = math.ceil(math.ceil(len(lengths) / rows) * training_args.num_train_epochs)
    steps = training_args.max_steps if training_args.max_steps > 0 else steps
    sample = np.random.default_rng(0).permutation(lengths)[:rows].tolist()
    world_size = training_args.world_size
    passes = len(bin_rows(sample, budget, world_size)) // world_size
    each = f"{min(rows, len(lengths))} rows, {passes} or so forward passes of {budget} tokens"
    print(f"steps      {steps} of {each}")
    if steps < FEW_STEPS:
        print(f"{'':10} few to learn from: lower --gradient_accumulation_steps, or train longer")


def plan_disk(config, precision: Precision, args: ScriptArguments, training_args) -> None:
    """Print what checkpoints and export take; raises UserError where the disk cannot hold them."""
    weights, checkpoint = memory_plan.disk_bytes(config, precision)
    kept = 0 if training_args.save_strategy == "no" else (training_args.save_total_limit or 2) + 1
    folder = Path(training_args.output_dir).resolve()
    folder = next(place for place in (folder, *folder.parents) if place.exists())
    needed, free = (weights + kept * checkpoint) / GIB, shutil.disk_usage(folder).free / GIB
    here = "" if args.gpus else f", {free:.1f} GiB free"  # else, it is another machine's disk
    print(f"disk       {needed:.1f} GiB for {kept} checkpoints and the export{here}")
    if needed > free and here:
        raise UserError("too little disk: lower --save_total_limit, or move --output_dir")


def start_wandb(training_args) -> None:
    """Start wandb, offline where there is no login or no answer: it must neither ask nor wait."""
    if "wandb" not in training_args.report_to or training_args.process_index > 0:
        return
    import wandb

    wanted = os.environ.get("WANDB_MODE")
    with suppress(Exception):  # what stands for a key is none
        wanted = wanted or ("online" if wandb.login(prompt=False, verify=False) else None)
    options = {"name": training_args.run_name, "dir": training_args.output_dir}
    options["project"] = os.environ.get("WANDB_PROJECT", "huggingface")
    options["settings"] = wandb.Settings(init_timeout=30, silent=True)
    for mode in dict.fromkeys((wanted or "offline", "offline")):
        try:
            wandb.init(mode=mode, **options)
            break
        except Exception as error:  # whatever it is, it must not cost the run
            print(f"wandb      not {mode}: {error}")
    else:  # or Trainer would start it once more, and raise
        training_args.report_to.remove("wandb")
    if wandb.run and wandb.run.offline:
        print(f"wandb      records offline; to upload: wandb sync {Path(wandb.run.dir).parent}")


def replace_text(path: Path, text: str) -> None:
    """Write a file so that, whatever happens, it is the old or the new one."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def open_run(args, training_args, precision: Precision, counts: dict, data_sha256: str):
    """Return the path of the checkpoint to resume from, or None; write output_dir/run.json.

    Raises UserError where a run would be overwritten, or continued on other terms.
    """
    output_dir = Path(training_args.output_dir)
    record, metrics = output_dir / "run.json", output_dir / "metrics.jsonl"
    settings, terms = training_args.to_dict(), {"rows_per_step": rows_per_step(training_args)}
    names = ("model_name_or_path", "system_prompt", "max_len", "overflow_strategy")
    terms |= {name: getattr(args, name) for name in names}
    names = ("seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")
    terms |= {name: settings[name] for name in names}
    terms |= {"train_file_sha256": data_sha256, "weights": str(precision.weights)}
    terms |= {"optim": precision.optim, "sharded": bool(training_args.fsdp)}
    checkpoint = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
    if not args.resume and (checkpoint or (output_dir / "config.json").exists()):
        raise UserError(f"{output_dir} holds a run: --resume continues it, --output_dir leaves it")
    if checkpoint:
        remedy = "put it back, or choose another --output_dir"
        with as_user_error((OSError, ValueError, KeyError), f"{record}: cannot be read; {remedy}"):
            old = json.loads(record.read_text(encoding="utf-8"))["terms"]
            changes = [f"{k} was {old[k]!r} and is {v!r}" for k, v in terms.items() if old[k] != v]
        if changes:
            raise UserError(f"{output_dir} cannot be resumed: {'; '.join(changes)}")
    if args.resume:
        print(f"resume     from {checkpoint or 'the beginning: no checkpoint was saved yet'}")
    # Without a shell, a machine that has no git would be an error.
    options = {"shell": True, "cwd": Path(__file__).parent, "capture_output": True, "text": True}
    about = {
        "terms": terms,
        "counts": counts,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "arguments": vars(args),
        "training_arguments": settings,
        "git": subprocess.run("git describe --always --dirty", **options).stdout.strip(),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    if training_args.should_save:  # one process for all
        shutil.rmtree(output_dir / "unfinished", ignore_errors=True)  # a save that was killed
        if metrics.exists():  # what was logged after the checkpoint will be logged again
            step = int(checkpoint.rpartition("-")[2]) if checkpoint else -1
            lines = [x for x in metrics.read_text().splitlines(True) if x.endswith("}\n")]
            lines = [line for line in lines if json.loads(line)["step"] <= step]
            replace_text(metrics, "".join(lines))
        replace_text(record, json.dumps(about, indent=2, ensure_ascii=False))
    return checkpoint


def print_data(split: str, path: Path, counts: dict) -> None:
    c = {name: f"{number:,}" for name, number in counts.items()}
    rows = [f"{c['rows_' + name]} {name}" for name in ("trained", "dropped", "rejected")]
    tokens = [f"{c['answer_tokens_' + name]} {name}" for name in ("trained", "cut", "dropped")]
    print(f"{split:10} {path}: {c['rows_read']} rows = {' + '.join(rows)} ({c['rows_cut']} cut)")
    print(f"{'':10} {c['answer_tokens_read']} answer tokens = {' + '.join(tokens)}")
    if counts["control_tokens"]:
        print(f"{'':10} {c['control_tokens']} control tokens spelled in texts stay plain text")


def prepare(args: ScriptArguments, training_args):
    """Return all that training needs, having read and checked all that can be wrong before it."""
    on_gpu = training_args.device.type == "cuda"
    config = check_model(args.model_name_or_path, on_gpu or args.dry_run)
    files, tables, rows, counts = find_data_files(args.data_path), {}, {}, {}
    with as_user_error(ValueError, "--system_prompt"):
        parse_row({"query": "q", "answer": "a"}, args.system_prompt)
    tokenizer = load_tokenizer(args.model_name_or_path, args.system_prompt)
    for split, path in files.items():
        tables[split] = encode_file(path, tokenizer, args.system_prompt)
        limits = (args.max_len, args.overflow_strategy, args.skip_bad_rows)
        rows[split], counts[split] = fit_rows(tables[split], path, *limits)
        print_data(split, path, counts[split])
    lengths = rows["train"]["num_tokens"][:].clip(max=args.max_len)
    shortest = cut(rows["train"][int(lengths.argmin())], args.max_len)
    print(f"example    {paint(shortest, tokenizer, sys.stdout.isatty())}", flush=True)
    capacities, capability = find_devices(args.gpus, training_args)
    precision = choose_precision(capability, training_args.world_size, args.fp32)
    if training_args.optim != transformers.TrainingArguments.optim:  # the user's --optim
        size = 4 * precision.weights.itemsize  # of AdamW; others have less state than that
        precision = precision._replace(optim=training_args.optim.value, bytes_per_parameter=size)
    weights = str(precision.weights).removeprefix("torch.")
    formats = f"{precision.compute} over {weights} weights, {precision.optim}"
    print(f"precision  {formats} ({'assumed ' * bool(args.gpus)}{precision.reason})")
    plan = plan_memory(config, args, training_args, precision, capacities, int(lengths.max()))
    plan_steps(plan.tokens_per_forward, training_args, lengths)
    plan_disk(config, precision, args, training_args)
    if args.dry_run:
        return None
    checkpoint = open_run(args, training_args, precision, counts, file_sha256(files["train"]))
    if args.skip_bad_rows and training_args.should_save:
        with open(Path(training_args.output_dir) / "rejected.jsonl", "w", encoding="utf-8") as file:
            for split, table in tables.items():
                write_rejected(table, files[split], file)
    return files, rows, tokenizer, precision, plan, checkpoint


def run(args: ScriptArguments, training_args) -> int:
    """Read, encode, train, export; return the exit code. Raises UserError."""
    if not (prepared := prepare(args, training_args)):
        return 0
    files, rows, tokenizer, precision, plan, checkpoint = prepared
    if training_args.fsdp:  # for from_pretrained, which must know before there is a Trainer
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    model = load_model(args.model_name_or_path, precision.weights, plan.device_map)
    start_wandb(training_args)
    trainer = build_trainer(model, tokenizer, args, training_args, rows, precision, plan)
    trainer.train_file = files["train"]
    samples = "validation" in rows and not training_args.fsdp  # sharded, a token takes a second
    if samples:
        lines = rows["validation"][:NUM_SAMPLES]["line"]
        first = itertools.islice(read_rows(files["validation"]), int(lines[-1]))
        prompts = [parse_row(row, args.system_prompt)[:2] for line, row in first if line in lines]
        before = answer_samples(model, tokenizer, prompts)
    if stop_signal := train(trainer, checkpoint):
        return 128 + stop_signal
    model.config.use_cache = True  # Trainer turned it off; what is served needs it
    failure = f"{training_args.output_dir}: the model is not written; make room, then --resume"
    if training_args.fsdp:  # one ordinary model folder
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with as_user_error(Exception, failure):  # each library has its own for a full disk
        trainer.save_model()
    if "validation" in rows:
        trainer.evaluate()
    if samples:
        after = answer_samples(model, tokenizer, prompts)
        for prompt, old, new in zip(prompts, before, after):
            print(f"question   {prompt[1]['content']}\n  before   {old!r}\n  after    {new!r}")
    if trainer.is_world_process_zero():
        draw_losses(Path(training_args.output_dir))
    output_dir = training_args.output_dir
    print(f"logs       {output_dir}/metrics.jsonl, {output_dir}/run.json")
    print(f"model      {output_dir}; to serve it: vllm serve {output_dir}")
    return 0


def draw_losses(output_dir: Path) -> None:
    """Draw the losses of metrics.jsonl as loss.png, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    logs = list(map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines()))
    for name, style in (("loss", "-"), ("eval_loss", "o")):
        if points := [(log["step"], log[name]) for log in logs if name in log]:
            axes.plot(*zip(*points), style, label=name)
    axes.set(xlabel="optimizer step", ylabel="cross entropy of a trained token")
    axes.legend()
    figure.savefig(output_dir / "loss.png")
    print(f"losses     {output_dir / 'loss.png'}")


def train(trainer, checkpoint: str | None) -> int:
    """Train to the end and return 0, or to a SIGINT or SIGTERM, save, and return its number."""

    def stop(number, frame):
        trainer.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once
        name = signal.Signals(number).name
        say(f"{name}: saving after this step; a second one stops unsaved")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    remedy = "use more GPUs, or leave --fp32 out, and go on with --resume"
    try:  # training_step recovers by itself, as far as fewer tokens per forward pass can help
        with as_user_error(torch.OutOfMemoryError, f"out of memory outside the model; {remedy}"):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if trainer.bar is not None:
            trainer.bar.close()
            transformers.utils.logging.enable_progress_bar()
    if number := trainer.agreed_signal():
        step = trainer.state.global_step
        saved = Path(trainer.args.output_dir, f"checkpoint-{step}")
        if not saved.exists():
            trainer._save_checkpoint(trainer.model)
        where = "is saved; --resume continues from there" if saved.exists() else "is not saved"
        if trainer.is_world_process_zero():
            print(f"stopped    after step {step}, which {where}")
    return number


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code, 1 after a UserError. A wrong argument exits with 2."""
    quiet_libraries()
    args, training_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    if training_args.process_index > 0:  # the first prints for all; each its own error
        sys.stdout = io.StringIO()
    try:
        code = run(args, training_args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return code
    except (UserError, OSError) as error:  # a full disk, files without permission, a lost network
        rank = f" in process {training_args.process_index}" * (training_args.world_size > 1)
        print(f"error{rank}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training began: there is nothing to save
        print("stopped    before training began", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
