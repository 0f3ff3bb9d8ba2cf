"""Rows of data files: what is read, what is refused and why, what fits, and what is counted."""

import csv
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tqdm.auto

IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # ChatML's control tokens, around every turn
IGNORE_INDEX = -100  # the label that PyTorch's cross entropy, and every library around it, skips
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ENCODE_BATCH = 1000  # rows per tokenizer call: enough for its threads, few enough to hold


class UserError(Exception):
    """A mistake the user can fix: printed as a sentence, exit code 1, no traceback."""


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


def file_sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_file(path: Path, tokenizer, system_prompt: str, encode_batch, script: str):
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
        vocabulary, script = tokenizer.backend_tokenizer.to_str(), file_sha256(script)
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


def print_data(split: str, path: Path, counts: dict) -> None:
    c = {name: f"{number:,}" for name, number in counts.items()}
    rows = [f"{c['rows_' + name]} {name}" for name in ("trained", "dropped", "rejected")]
    tokens = [f"{c['answer_tokens_' + name]} {name}" for name in ("trained", "cut", "dropped")]
    print(f"{split:10} {path}: {c['rows_read']} rows = {' + '.join(rows)} ({c['rows_cut']} cut)")
    print(f"{'':10} {c['answer_tokens_read']} answer tokens = {' + '.join(tokens)}")
    if counts["control_tokens"]:
        print(f"{'':10} {c['control_tokens']} control tokens spelled in texts stay plain text")


def row_place(row: dict) -> str:
    return f"train:{row['line']}"
