"""Rows as token ids: encoded once and kept on disk, what fits of them, and what is said of it."""

import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from sft import rows as rows_module
from sft.rows import (
    UserError,
    as_user_error,
    file_sha256,
    ignored_keys,
    parse_row,
    printable,
    read_rows,
    say,
)

IGNORE_INDEX = -100  # the label that PyTorch's cross entropy, and every library around it, skips
BATCH_ROWS, BATCH_CHARACTERS = 1000, 4_000_000  # encoded at once: enough for speed, few to hold
BYTES_PER_PROCESS = 1_000_000  # of data at least; a process is forked in a moment
NUMBERS = ("file", "line", "num_tokens", "num_answer_tokens", "num_control_tokens")
SCHEMA = pa.schema(  # "trained" marks the labels that are not -100: a bit a token
    [("input_ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.bool_()))]
    + [(name, pa.int32()) for name in NUMBERS]
    + [("error", pa.string()), ("ignored", pa.string())]
)


class Rows:
    """Encoded rows, as torch's loaders ask for them: a number gives a row, a name a column.

    A row: input_ids [T], labels [T], place ("file:line"), and the columns file (its number), line,
    error (why it is refused, or ""), ignored (keys without effect), num_tokens, num_answer_tokens
    (the trained ones), num_control_tokens (those spelled in its texts).
    """

    def __init__(self, table, paths: list[Path], sha256: str, numbers: np.ndarray | None = None):
        self.table, self.paths, self.sha256 = table, paths, sha256  # of the bytes of all files
        self.numbers = np.arange(len(table)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.table[key].to_numpy()[self.numbers]
        number = int(self.numbers[key])  # IndexError behind the last
        row = {name: self.table[name][number] for name in self.table.column_names}
        ids, trained = (row.pop(name).values.to_numpy(False) for name in ("input_ids", "trained"))
        row = {name: value.as_py() for name, value in row.items()}
        row["place"] = f"{self.paths[row['file']]}:{row['line']}"
        return {"input_ids": ids, "labels": np.where(trained, ids, IGNORE_INDEX), **row}

    def select(self, where: np.ndarray) -> "Rows":
        """Return the rows at these positions, or where a mask is true."""
        return Rows(self.table, self.paths, self.sha256, self.numbers[where])


# ---- Encoding: once, in as many processes as there are cores ------------------------------------
def encode_files(
    paths: list[Path], tokenizer, system_prompt: str, encode_batch, script, num_proc=None
) -> Rows:
    """Return all rows of the files, encoded once, kept on disk and found again by content.

    One process of a machine encodes, in num_proc forks, while others wait. Raises UserError, also
    for a file that changes while it is read.
    """
    hashes = [file_sha256(path) for path in paths]
    causes = [tokenizer.backend_tokenizer.to_str(), system_prompt, [p.suffix for p in paths]]
    causes += [hashes, *map(file_sha256, (script, rows_module.__file__, __file__))]
    name = hashlib.sha256(json.dumps(causes).encode()).hexdigest()
    cache = Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME, "datasets")), "sft_rows")
    folder, aside = cache / name, cache / f"{name}.unfinished"
    with as_user_error(f"{cache}: encoded rows cannot be kept here; make room", OSError):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            table = open_cached(folder)
            shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
            try:
                if table is None:
                    aside.mkdir()
                    encode_parts(aside, paths, num_proc, tokenizer, system_prompt, encode_batch)
                    if hashes != [file_sha256(path) for path in paths]:
                        raise UserError(f"{paths[0]}: changed while it was read; start again")
                    os.replace(aside, folder)
                    table = open_parts(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    rows = Rows(table, paths, "+".join(hashes))
    for path, number in zip(paths, np.bincount(rows["file"], minlength=len(paths))):
        if number == 0:
            raise UserError(f"{path}: is empty; it needs one conversation per line or row")
    return rows


def open_cached(folder: Path) -> pa.Table | None:
    """Return the table of a folder, or None; one that is damaged is removed."""
    try:
        return open_parts(folder) if folder.exists() else None
    except (OSError, ValueError) as error:
        say(f"cache      {folder} is damaged, so encoding again: {error}", sys.stderr)
        shutil.rmtree(folder)


def open_parts(folder: Path) -> pa.Table:
    """Return the table of a folder's parts, mapped into memory; ValueError if it is damaged."""
    files = sorted(folder.glob("*.arrow"))
    if not files or not files[0].stem.endswith(f"-of-{len(files):05}"):
        raise ValueError("parts are missing")
    parts = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
    table = pa.concat_tables(parts)
    if not table["num_tokens"].equals(pa.compute.list_value_length(table["input_ids"])):
        raise ValueError("rows are not as long as they were")
    return table


def encode_parts(folder: Path, paths: list[Path], num_proc: int | None, *how) -> None:
    """Write the rows to folder, each process those that begin in its part of all the bytes."""
    sizes = [path.stat().st_size for path in paths]
    if num_proc is None:  # elsewhere a fork of a process with threads is not safe
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        num_proc = max(1, min(cores, sum(sizes) // BYTES_PER_PROCESS))
    edges = [sum(sizes) * i // num_proc for i in range(num_proc)] + [sys.maxsize]
    parts = [
        (folder / f"{i:05}-of-{num_proc:05}.arrow", edge, paths, sizes, *how)
        for i, edge in enumerate(itertools.pairwise(edges))
    ]
    if num_proc == 1:
        return encode_part(*parts[0])
    fork = multiprocessing.get_context("fork")  # which hands on the tokenizer as it is
    processes = [fork.Process(target=try_part, args=part, daemon=True) for part in parts]
    for process in processes:
        process.start()
    try:
        for process, part in zip(processes, parts):
            process.join()
            if process.exitcode:
                encode_part(*part)  # what was the matter is raised here, where it can be caught
    finally:
        for process in processes:
            process.terminate()
            process.join()


def try_part(*part) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are enough
    gc.disable()  # it would read, and so copy, all of the parent's objects
    try:
        encode_part(*part)
    except BaseException:  # the parent tries again, and tells
        sys.exit(1)


def encode_part(file: Path, edges, paths, sizes, tokenizer, system_prompt, encode_batch) -> None:
    """Write the rows that begin between these edges of all files' bytes to an Arrow file."""
    controls = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    batches = parse_batches(edges, paths, sizes, system_prompt)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for conversations, about in batches:
            examples = encode_batch(conversations, tokenizer)
            writer.write(to_arrow(conversations, about, examples, controls))


def parse_batches(edges, paths: list[Path], sizes: list[int], system_prompt: str) -> Iterator:
    """Yield (conversations, (file, line, error, ignored keys) of each), of a limited size."""
    conversations, about, size, before = [], [], 0, 0
    for number, path in enumerate(paths):
        start, end = (max(edge - before, 0) for edge in edges)
        before += sizes[number]
        for line, row in read_rows(path, start, end) if end and start <= sizes[number] else ():
            try:
                turns, error, ignored = parse_row(row, system_prompt), "", ignored_keys(row)
            except ValueError as refusal:
                turns, error, ignored = [], str(refusal), ""  # no turns: no tokens
            conversations.append(turns)
            about.append((number, line, error, ignored))
            size += sum(len(turn["content"]) for turn in turns)
            if len(about) == BATCH_ROWS or size > BATCH_CHARACTERS:
                yield conversations, about
                conversations, about, size = [], [], 0
    if about:
        yield conversations, about


def to_arrow(conversations, about, examples, controls: re.Pattern) -> pa.RecordBatch:
    """Return the columns of SCHEMA."""
    texts = ("\n".join(turn["content"] for turn in turns) for turns in conversations)
    ids, labels = ([example[key] for example in examples] for key in ("input_ids", "labels"))
    files, lines, errors, ignored = zip(*about)
    lengths = np.array(list(map(len, ids)))
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    flat = [np.fromiter(itertools.chain(*x), np.int32, offsets[-1]) for x in (ids, labels)]
    trained = flat[1] != IGNORE_INDEX
    num_trained = np.diff(np.append(0, np.cumsum(trained))[offsets])
    num_controls = [len(controls.findall(text)) for text in texts]
    columns = [pa.ListArray.from_arrays(offsets, values) for values in (flat[0], trained)]
    columns += map(pa.array, (files, lines, lengths, num_trained, num_controls, errors, ignored))
    columns = [column.cast(field.type) for column, field in zip(columns, SCHEMA)]
    return pa.record_batch(columns, schema=SCHEMA)


# ---- What fits, and what is said about it -------------------------------------------------------
def fit_rows(rows: Rows, max_len: int, overflow_strategy: str, skip_bad_rows: bool = False):
    """Return the rows to train on, and counts {name: number} of rows and of answer tokens.

    Rows read = trained + dropped + rejected, and answer tokens read = trained + cut + dropped. A
    row whose answer begins beyond max_len is dropped in any case: it has nothing to train.
    counts["files"] has {path: (rows read, rows trained)}, counts["ignored_keys"] names keys.
    """
    lengths, answer_tokens = rows["num_tokens"], rows["num_answer_tokens"]
    rejected, over = lengths == 0, np.flatnonzero(lengths > max_len)
    if num_rejected := int(rejected.sum()):
        lines = [
            f"{row['place']}: {row['error']}" for row in itertools.islice(rows.select(rejected), 20)
        ]
        lines += ["..."] * (num_rejected > len(lines))
        report = "\n".join([*lines, f"{num_rejected} of {len(rows)} rows are refused"])
        if not skip_bad_rows:
            raise UserError(f"{report}; fix them, or train without them: --skip_bad_rows")
        print(report, file=sys.stderr)
    if overflow_strategy == "error" and len(over):
        first = rows[over[0]]
        raise UserError(
            f"{first['place']}: {first['num_tokens']} tokens, and max_len is {max_len} "
            f"({len(over)} such rows); raise --max_len or choose another --overflow_strategy"
        )
    kept = answer_tokens.copy()
    for i in over:
        labels = rows[i]["labels"][:max_len]
        kept[i] = (labels != IGNORE_INDEX).sum() if overflow_strategy == "truncate" else 0
    trained = kept > 0
    if not trained.any():
        raise UserError(f"{rows.paths[0]}: no answer begins within max_len {max_len}; raise it")
    ignored = rows.table["ignored"].unique().to_pylist()  # each the names of a row
    files = rows["file"], rows["file"][trained]
    per_file = zip(*(np.bincount(file, minlength=len(rows.paths)).tolist() for file in files))
    counts = {
        "rows_read": len(rows),
        "rows_trained": int(trained.sum()),
        "rows_cut": int(trained[over].sum()),
        "rows_dropped": int((~trained).sum()) - num_rejected,
        "rows_rejected": num_rejected,
        "answer_tokens_read": int(answer_tokens.sum()),
        "answer_tokens_trained": int(kept.sum()),
        "answer_tokens_cut": int((answer_tokens - kept)[trained].sum()),
        "answer_tokens_dropped": int(answer_tokens[~trained].sum()),
        "control_tokens": int(rows["num_control_tokens"].sum()),
        "ignored_keys": sorted(set("\n".join(ignored).splitlines()) - {""}),
        "files": dict(zip(map(str, rows.paths), per_file)),
    }
    return rows.select(trained), counts


def write_rejected(tables: Iterable[Rows], output_dir: str) -> None:
    """Write a line for each refused row to rejected.jsonl: where it stands, and why."""
    path = Path(output_dir, "rejected.jsonl")
    path.unlink(missing_ok=True)  # it may be a link to a file of others
    # A file's name that is no UTF-8 has half surrogate pairs.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        for rows in tables:
            for row in rows.select(rows["num_tokens"] == 0):
                about = {"place": row["place"], "error": row["error"]}
                file.write(json.dumps(about, ensure_ascii=False) + "\n")


def mark_trained_tokens(row: dict, tokenizer, color: bool) -> str:
    """Return a row's text with its trained tokens marked: in green, or in brackets."""
    on, off = ("\033[32m", "\033[0m") if color else ("⟦", "⟧")
    text = ""
    edges = np.flatnonzero(np.diff(row["labels"] != IGNORE_INDEX)) + 1
    for i, part in enumerate(np.split(row["input_ids"], edges)):  # context, trained, context, ...
        part = printable(tokenizer.decode(part))
        text += on + part + off if i % 2 else part
    return text


def print_data(split: str, counts: dict) -> None:
    c = {name: f"{n:,}" for name, n in counts.items() if isinstance(n, int)}
    used = "trained" if split == "train" else "evaluated"
    words = {"trained": used, "dropped": "dropped", "rejected": "rejected", "cut": "cut"}
    rows = [f"{c['rows_' + name]} {words[name]}" for name in ("trained", "dropped", "rejected")]
    tokens = [f"{c['answer_tokens_' + x]} {words[x]}" for x in ("trained", "cut", "dropped")]
    files = list(counts["files"])
    what = files[0] if len(files) == 1 else f"{len(files)} files"
    print(f"{split:10} {what}: {c['rows_read']} rows = {' + '.join(rows)} ({c['rows_cut']} cut)")
    print(f"{'':10} {c['answer_tokens_read']} answer tokens = {' + '.join(tokens)}")
    for path in files if len(files) > 1 else ():
        print("{:10} {}: {:,} rows, {:,} trained".format("", path, *counts["files"][path]))
    if counts["control_tokens"]:
        print(f"{'':10} {c['control_tokens']} control tokens spelled in texts stay plain text")
    if counts["ignored_keys"]:
        print(
            f"{'':10} ignored, for they change nothing: {', '.join(counts['ignored_keys'])[:200]}"
        )


def beyond_positions(max_len: int, positions: int) -> str:
    return f"max_len {max_len:,} is beyond the {positions:,} positions that the model was made for"
