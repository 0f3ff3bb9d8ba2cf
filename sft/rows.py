"""Rows of data files: what is read, what is refused and why, and what they are once encoded."""

import csv
import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tqdm.auto

IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # ChatML's control tokens, around every turn
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
BOM, NOT_UTF8 = b"\xef\xbb\xbf", "save the file as UTF-8 (iconv -f GB18030 -t UTF-8)"
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs
# What a terminal would obey, or show in another order than it stands.
NOT_PRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# The beginning of a file's name says what it is for, as datasets.load_dataset has it.
SPLIT_NAMES = {"train": "train", "validation": "valid|val|dev", "test": "test|eval"}

# A row has these keys, a turn in "messages" has role, content and, to be context only, a weight
# (or loss) of 0. Of all others, those are refused that ask for something which is not done here
# (unless empty), with what to do about it. Any other is named once and ignored: ids, sources.
ROW_KEYS, TURN_KEYS = ("query", "answer", "system", "messages"), ("role", "content")
OTHER_FORMAT = "another format: docs/data.md has the line that converts it"
REMEDIES = {
    "instruction input output conversations history": OTHER_FORMAT,
    "prompt completion response chosen rejected": OTHER_FORMAT,
    "tools functions tool_calls function_call": "tool calls are not trained: leave such rows out",
    "image images video videos audio audios": "only text is trained: leave such rows out",
    "reasoning_content reasoning thinking": "not trained: write it into the answer or drop it",
}
REFUSED_KEYS = {key: remedy for keys, remedy in REMEDIES.items() for key in keys.split()}
ROW_REFUSED = REFUSED_KEYS | dict.fromkeys(("weight", "loss"), "write it to an assistant turn")
TURN_REFUSED = REFUSED_KEYS | {"name": "Qwen2's format has no names: write it into the content"}


class UserError(Exception):
    """A mistake the user can fix: printed as a sentence, exit code 1, no traceback."""


@contextmanager
def as_user_error(sentence: str, kinds=Exception):  # of which each library has its own
    """Turn exceptions of these kinds into a UserError: the sentence, and what was the matter."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{sentence}: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """Return in one line what was the matter; of several processes, with the first that failed."""
    failed = getattr(error, "failures", None)  # of torch.distributed.checkpoint, no Exception
    error = next(iter(failed.values()))[0] if failed else error
    return " ".join(str(error.__cause__ or error).split())


def say(text: str, file=None) -> None:
    """Print a line, by default to stdout, at once and above the bar that may be on screen."""
    tqdm.auto.tqdm.write(text, file=file)
    (file or sys.stdout).flush()


def printable(text: str) -> str:
    """Return a text of the data with all that a terminal would obey written as an escape."""
    return NOT_PRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def file_sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Files --------------------------------------------------------------------------------------
def find_data_files(data_path: str | list[str]) -> dict[str, list[Path]]:
    """Return {"train": files} and, if there are any, {"validation": files}; raises UserError.

    A file alone is trained; of several, and of a folder's, the names decide. Test files serve as
    validation where there are no others. What else looks like data in a folder is named.
    """
    given = [Path(path) for path in ([data_path] if isinstance(data_path, str) else data_path)]
    found = {"train": [], "validation": [], "test": [], "other": []}
    for path in given:
        if not path.exists():
            raise UserError(f"{path}: does not exist; --data_path names your files or folder")
        if path.is_file() and path.suffix not in DATA_SUFFIXES:
            raise UserError(f"{path}: is none of {', '.join(DATA_SUFFIXES)}")
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            if (name := printable(str(file))) != str(file):
                raise UserError(f"{name}: rename it: terminals would obey its name")
            names = (split for split, name in SPLIT_NAMES.items() if re.match(name, file.name))
            split = next(names, "train" if file == path else "other")
            readable = file.is_file() and file.suffix in DATA_SUFFIXES
            if readable or split != "other":
                found["train" if given == [file] else split if readable else "other"].append(file)
    found["other" if found["validation"] else "validation"] += found.pop("test")
    if ignored := found.pop("other"):
        print(f"not read   {', '.join(map(str, ignored))}")
    if not found["train"]:
        raise UserError(f"{given[0]}: has no file train*, of {', '.join(DATA_SUFFIXES)}")
    for files in found.values():
        if len({file.suffix for file in files}) > 1:
            raise UserError(f"{files[0]} and {files[-1]}: two formats; name the files you mean")
        parts = Counter(re.sub(r"-\d+-of-", "-*-of-", str(file)) for file in files)
        for name, number in parts.items() if given[0].is_dir() else ():
            total = re.search(r"-\*-of-0*(\d+)\.", name)
            if total and int(total[1]) != number:
                raise UserError(f"{name}: has {total[1]} parts, but {number} are here")
    return {split: files for split, files in found.items() if files}


def read_rows(path: Path, start: int = 0, end: int = sys.maxsize) -> Iterator[tuple[int, dict]]:
    """Yield (line or row number from 1, row); in the place of an unreadable row, what is wrong.

    Of JSONL the lines that begin within these bytes, of other files all rows, or none if start > 0.
    Raises UserError where the rest of the file cannot be read.
    """
    readers = {".json": read_json, ".csv": read_csv, ".parquet": read_parquet}
    with as_user_error(f"{path}: cannot be read"):
        if path.suffix == ".jsonl":
            yield from read_lines(path, start, end)
        elif start == 0:
            yield from readers[path.suffix](path)


def read_lines(path: Path, start: int = 0, end: int = sys.maxsize):
    with open(path, "rb") as file:  # as bytes only \n ends a line: texts may hold U+2028
        number = 1
        while start and (block := file.read(min(2**20, start - 1 - file.tell()))):
            number += block.count(b"\n")
        if start:  # the line that begins before it is not of this part
            number += file.readline().count(b"\n")
        position = file.tell()
        for line in file:
            if position >= end:
                break
            if not line.isspace():
                yield number, parse_json(line.rstrip(b"\r\n"))
            number, position = number + 1, position + len(line)


def read_json(path: Path):
    whole = path.read_bytes()
    rows = parse_json(whole)
    if isinstance(rows, str) and not whole.removeprefix(BOM).lstrip().startswith(b"["):
        yield from read_lines(path)
    elif isinstance(rows, str):
        raise ValueError(rows)
    else:
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
            yield number, [row] if isinstance(row, str) else row  # a str says what is wrong


def read_csv(path: Path):
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of over 131,072 characters
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            rows = csv.DictReader(file, strict=True)
            if len(set(rows.fieldnames or ())) < len(rows.fieldnames or ()):
                raise ValueError("a column appears twice")
            for number, row in enumerate(rows, 1):  # texts as they are written, empty ones are none
                if None in row:
                    row[None] = "has more fields than the header; put texts with commas in quotes"
                yield number, {key: value for key, value in row.items() if value}
        except UnicodeDecodeError:
            raise ValueError(f"is not UTF-8; {NOT_UTF8}") from None


def read_parquet(path: Path):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
            raise ValueError("a column appears twice")
        batches = (batch.to_pylist() for batch in file.iter_batches(1000))
        yield from enumerate(itertools.chain.from_iterable(batches), 1)


def parse_json(text: bytes):
    """Return what a JSON text says, or a str: what is wrong with it.

    An object in which a key appears twice has, under the key None, what is wrong with it.
    """

    def unique(pairs):
        twice = {None: "has a key that appears twice"} if len(dict(pairs)) < len(pairs) else {}
        return dict(pairs) | twice

    try:
        value = json.loads(text.removeprefix(BOM).decode(), object_pairs_hook=unique)
        return value if isinstance(value, dict | list) else "is not a JSON object"
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start}); {NOT_UTF8}"
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" * (error.lineno > 1)
        return f"is broken JSON: {error.msg.removesuffix(' at')} at character {error.colno}{line}"
    except (ValueError, RecursionError) as error:
        return f"is broken JSON: {error}"


# ---- What a row says ----------------------------------------------------------------------------
def parse_row(row, system_prompt: str) -> list[dict]:
    """Return [{"role", "content"}, ...]: system, user, assistant, ...; or ValueError, why not.

    An assistant turn that is context, not to be trained, has "weight": 0.
    """
    if not isinstance(row, dict):
        raise ValueError(row if isinstance(row, str) else "is not a JSON object")
    row = checked_keys(row, ROW_REFUSED)
    roles = {"query": "user", "answer": "assistant"}
    pair = [{"role": roles[key], "content": row[key]} for key in roles if key in row]
    turns = row.get("messages", pair)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('has "messages" that are not a list of {"role": ..., "content": ...}')
    turns = [checked_keys(turn, TURN_REFUSED) for turn in turns]
    has_system = bool(turns) and turns[0].get("role") == "system"
    if ("messages" in row and pair) or ("system" in row and has_system):
        raise ValueError('has "messages" and beside it what is in them: "query" or "system"')
    if not has_system:
        turns = [{"role": "system", "content": row.get("system", system_prompt)}, *turns]
    found = [turn.get("role") for turn in turns[1:]]
    if not found or found != ["user", "assistant"] * (len(turns) // 2):
        found = ", ".join(map(str, ["roles", *found] if "messages" in row else row))
        raise ValueError(
            'wants "query" and "answer", or "messages" in which user and assistant alternate, '
            f"assistant last; has {found[:80]!r}"  # as repr: nothing unprintable
        )
    turns = [parse_turn(turn) for turn in turns]
    if all(turn.get("weight") == 0 for turn in turns[2::2]):
        raise ValueError("has nothing to train: the weight of each assistant turn is 0")
    return turns


def checked_keys(about: dict, refused: dict[str, str]) -> dict:
    """Return a row or turn without what is null; raises ValueError for a key that is refused."""
    about = {key: value for key, value in about.items() if value is not None}
    if None in about:
        raise ValueError(about[None])
    for key in sorted(about.keys() & refused.keys()):
        if about[key] not in ("", [], {}):
            raise ValueError(f'has "{key}": {refused[key]}')
    return about


def parse_turn(turn: dict) -> dict:
    """Return {"role", "content"}, of a turn that is only context with "weight": 0."""
    role, text = turn["role"], turn.get("content")
    weights = [turn[key] for key in ("weight", "loss") if key in turn]
    if not isinstance(text, str):
        raise ValueError(f"its {role} text is not a string")
    if not text.strip() and role != "system":
        raise ValueError(f"has an empty {role} text")
    if NOT_TEXT.search(text):
        raise ValueError(f"its {role} text has a NUL or half a surrogate pair")
    if any(weight not in (0, 1) for weight in weights) or len(set(weights)) > 1:
        raise ValueError('has a "weight" that is not 0 or 1, or a "loss" not true or false')
    if role != "assistant" and any(weights):
        raise ValueError(f"its {role} turn has a weight; only assistant turns are trained")
    context = role == "assistant" and 0 in weights
    return {"role": role, "content": text} | ({"weight": 0} if context else {})


def ignored_keys(row: dict) -> str:
    """Return the names of what a good row says to no effect, a line each."""
    keys = row.keys() - ROW_KEYS - ROW_REFUSED.keys()
    for turn in row.get("messages") or ():
        keys |= turn.keys() - {*TURN_KEYS, "weight", "loss"} - TURN_REFUSED.keys()
    return "\n".join(map(repr, sorted(keys)))
