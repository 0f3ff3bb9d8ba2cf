"""Rows of data files: what is read, what is refused and why, what fits, and what is counted."""

import csv
import hashlib
import itertools
import json
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tqdm.auto
from huggingface_hub.constants import HF_HOME

IGNORE_INDEX = -100  # the label that PyTorch's cross entropy, and every library around it, skips
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs
# What a terminal would obey, or show in another order than it stands.
NOT_PRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLIT_NAMES = {  # a file's name begins with one of these; the last is read where the second is not
    "train": "training|train",
    "validation": "validation|valid|val|dev",
    "test": "testing|test|evaluation|eval",
}
BATCH_ROWS, BATCH_CHARACTERS = 1000, 4_000_000  # encoded at once: enough for threads, few to hold
BATCHES_AHEAD = 2  # that are encoded while the next is read: so no core waits for Python
BOM, NOT_UTF8 = b"\xef\xbb\xbf", "save the file as UTF-8 (iconv -f GB18030 -t UTF-8)"

# ---- Keys of a row and of a turn: these have an effect; those that ask for what is not done here
# are refused, with what to do, unless null or empty; any other is named once and ignored.
ROW_KEYS, TURN_KEYS = ("query", "answer", "system", "messages"), ("role", "content")
WEIGHT_KEYS = ("weight", "loss")  # of an assistant turn: 0 or false is context, not trained
OTHER_FORMAT = "is another format: docs/data.md has a line that converts it"
NO_TOOLS = "asks for tool calls, which are not trained here: leave such rows out"
NO_MEDIA = "is no text: leave such rows out"
REASONING = 'is not trained: write it into "content" or "answer", or take it out'
REFUSED_KEYS = {
    **dict.fromkeys(("instruction", "input", "output", "conversations", "history"), OTHER_FORMAT),
    **dict.fromkeys(("prompt", "completion", "response", "chosen", "rejected"), OTHER_FORMAT),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_choice"), NO_TOOLS),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), NO_MEDIA),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), REASONING),
}
REFUSED_ROW_KEYS = REFUSED_KEYS | dict.fromkeys(WEIGHT_KEYS, "belongs to an assistant turn")
REFUSED_TURN_KEYS = {**REFUSED_KEYS, "name": 'has no place in Qwen2\'s format: put it in "content"'}


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


def printable(text: str) -> str:
    """Return a text of the data with all that a terminal would obey written as an escape."""
    return NOT_PRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# ---- Files: which are read ----------------------------------------------------------------------
def find_data_files(data_path: str | list[str]) -> dict[str, list[Path]]:
    """Return {"train": files} and, if there are any, {"validation": files}; raises UserError.

    A file alone is trained. Of several, and of a folder's, the beginning of the name decides, as
    it does for datasets.load_dataset; what else looks like data in a folder is named.
    """
    given = [Path(path) for path in ([data_path] if isinstance(data_path, str) else data_path)]
    found = {"train": [], "validation": [], "test": [], "other": []}
    for path in given:
        if not path.exists():
            raise UserError(f"{path}: does not exist; --data_path names your files or folder")
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            split = next((s for s, r in SPLIT_NAMES.items() if re.match(r, file.name)), None)
            readable = file.is_file() and file.suffix in DATA_SUFFIXES
            if file == path:
                split = "train" if len(given) == 1 or not split else split
            if readable and split:
                found[split].append(file)
            elif file == path:
                raise UserError(f"{file}: is none of {', '.join(DATA_SUFFIXES)}")
            elif split or file.suffix in DATA_SUFFIXES:
                found["other"].append(file)
        check_parts([file for file in itertools.chain(*found.values()) if file.parent == path])
    found["other" if found["validation"] else "validation"] += found.pop("test")
    if ignored := found.pop("other"):
        print(f"not read   {', '.join(map(str, ignored))}")
    if not found["train"]:
        raise UserError(f"{given[0]}: has no file train*, of {', '.join(DATA_SUFFIXES)}")
    for files in found.values():
        if len({file.suffix for file in files}) > 1:
            raise UserError(f"{files[0]} and {files[-1]}: two formats; name the files you mean")
    return {split: files for split, files in found.items() if files}


def check_parts(files: list[Path]) -> None:
    """Raise UserError where a folder has some of train-00000-of-00003.*, but not all."""
    parts = Counter(re.sub(r"-\d+-of-", "-*-of-", str(file)) for file in files)
    for name, number in parts.items():
        total = re.search(r"-\*-of-(\d+)\.", name)
        if total and int(total[1]) != number:
            raise UserError(f"{name}: {number} of {int(total[1])} parts are here; fetch the others")


def file_sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Rows: what they say, or why they are refused -----------------------------------------------
def read_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """Yield (line or row number from 1, row); in the place of an unreadable row, what is wrong.

    Raises UserError where the rest of the file cannot be read.
    """
    read = {".jsonl": read_lines, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}
    with as_user_error((OSError, ValueError, csv.Error), f"{path}: cannot be read"):
        yield from read[path.suffix](path)


def read_lines(path: Path):
    with open(path, "rb") as file:  # as bytes only \n ends a line: texts may hold U+2028
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, parse_json(line)


def read_json(path: Path):
    """Yield the rows of an array, numbered from 1; or a single object; or lines, as of .jsonl."""
    whole = path.read_bytes()
    rows = parse_json(whole)
    if isinstance(rows, str) and not whole.lstrip(BOM + b" \t\r\n").startswith(b"["):
        yield from read_lines(path)
    elif isinstance(rows, str):
        raise ValueError(rows)
    else:
        yield from enumerate(rows if isinstance(rows, list) else [rows], 1)


def read_csv(path: Path):
    """Yield the rows of a table, texts as they are written; an empty field is none."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of over 131,072 characters
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if names := [name for name, n in Counter(reader.fieldnames or ()).items() if n > 1]:
            raise ValueError(f"column {names[0]!r} appears twice")
        for number, row in enumerate(reader, 1):
            if None in row:
                row[None] = "has more fields than the header; put quotes around texts with commas"
            yield number, {key: value for key, value in row.items() if value}


def read_parquet(path: Path):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        batches = file.iter_batches(BATCH_ROWS)
        yield from enumerate(itertools.chain.from_iterable(b.to_pylist() for b in batches), 1)


def parse_json(text: bytes):
    """Return what a JSON text says, or in a str what is wrong with it.

    An object in which a key appears twice has the key None, and there what is wrong.
    """

    def unique(pairs):
        twice = {None: "has a key that appears twice"} if len(dict(pairs)) < len(pairs) else {}
        return dict(pairs) | twice

    try:
        return json.loads(text.removeprefix(BOM).decode(), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start}); {NOT_UTF8}"
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" * (error.lineno > 1)
        return f"is broken JSON: {error.msg.removesuffix(' at')} at character {error.colno}{line}"
    except (ValueError, RecursionError) as error:
        return f"is broken JSON: {error}"


def known_keys(about: dict, known: tuple, refused: dict, what: str) -> dict:
    """Return what says something of the known keys; raises ValueError of one that is refused."""
    about = {key: value for key, value in about.items() if value is not None}
    if None in about:
        raise ValueError(about[None])
    for key in refused.keys() & {key for key, value in about.items() if value not in ("", [], {})}:
        raise ValueError(f'{what} has "{key}", which {refused[key]}')
    return {key: about[key] for key in known if key in about}


def parse_row(row: dict | str, system_prompt: str) -> list[dict]:
    """Return [{"role", "content"}, ...]: system, user, assistant, ...; or ValueError, why not.

    An assistant turn that is not to be trained has "weight": 0.
    """
    if not isinstance(row, dict):
        raise ValueError(row if isinstance(row, str) else "is not a JSON object")
    known = known_keys(row, ROW_KEYS, REFUSED_ROW_KEYS, "the row")
    roles = {"query": "user", "answer": "assistant"}
    pair = [{"role": roles[key], "content": known[key]} for key in roles if key in known]
    turns = known.get("messages", pair)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('has "messages" that are not a list of {"role": ..., "content": ...}')
    turns = [known_keys(t, TURN_KEYS, REFUSED_TURN_KEYS, "a turn") for t in turns]
    own_system = bool(turns) and turns[0].get("role") == "system"
    if own_system + ("system" in known) == 2 or ("messages" in known and pair):
        raise ValueError('says something twice: "messages" beside "query", "answer" or "system"')
    if not own_system:
        turns = [{"role": "system", "content": known.get("system", system_prompt)}, *turns]
    roles = [turn.get("role") for turn in turns]
    if len(roles) < 3 or roles[1:] != ["user", "assistant"] * (len(roles) // 2):
        found = ", ".join(map(str, ["roles", *roles[1:]] if "messages" in known else row))
        raise ValueError(
            'wants "query" and "answer", or "messages" in which user and assistant alternate, '
            f"assistant last; has {found[:80]!r}"  # as repr: nothing unprintable
        )
    turns = [check_turn(turn) for turn in turns]
    if all(turn.get("weight") == 0 for turn in turns if turn["role"] == "assistant"):
        raise ValueError("has no turn to train: the weight of each is 0")
    return turns


def check_turn(turn: dict) -> dict:
    """Return {"role", "content"}, and "weight": 0 if it says so; raises ValueError if wrong."""
    role, text = turn["role"], turn.get("content")
    weights = [turn[key] for key in WEIGHT_KEYS if key in turn]
    if not isinstance(text, str):
        raise ValueError(f"its {role} text is not a string")
    if not text.strip() and role != "system":
        raise ValueError(f"has an empty {role} text")
    if NOT_TEXT.search(text):
        raise ValueError(f"its {role} text has a NUL or half a surrogate pair")
    if any(weight not in (0, 1) for weight in weights) or len(set(weights)) > 1:
        raise ValueError('has a turn whose "weight" is not 0 or 1, or "loss" not true or false')
    if role != "assistant" and any(weights):
        raise ValueError(f"its {role} turn is to be trained; only assistant turns are")
    trained = {"weight": 0} if role == "assistant" and 0 in weights else {}
    return {"role": role, "content": text, **trained}


# ---- The encoded rows ---------------------------------------------------------------------------
class Rows:
    """Encoded rows, as torch's loaders ask for them: a number gives a row, a name a column.

    A row: input_ids [T], labels [T], place ("file:line"), and the columns file (its number), line,
    error (why it is refused, or ""), ignored (its keys without effect), num_tokens,
    num_answer_tokens (the trained ones), num_control_tokens (those spelled in its texts).
    """

    def __init__(self, table, paths: list[Path], sha256: str, numbers: np.ndarray | None = None):
        self.table, self.paths, self.sha256 = table, paths, sha256  # of all files' bytes
        self.numbers = np.arange(len(table)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.table[key].to_numpy()[self.numbers]
        number = int(self.numbers[key])  # IndexError behind the last
        row = {name: self.table[name][number] for name in self.table.column_names}
        ids, trained = (row.pop(name).values.to_numpy(False) for name in ("input_ids", "trained"))
        labels = np.where(trained, ids, IGNORE_INDEX)
        row = {name: value.as_py() for name, value in row.items()}
        place = f"{self.paths[row['file']]}:{row['line']}"
        return {"input_ids": ids, "labels": labels, "place": place, **row}

    def select(self, where: np.ndarray) -> "Rows":
        """Return the rows at these positions, or where a mask is true."""
        return Rows(self.table, self.paths, self.sha256, self.numbers[where])


def encode_files(paths: list[Path], tokenizer, system_prompt: str, encode_batch, script) -> Rows:
    """Return all rows of the files, encoded once, kept on disk and found again by content.

    One process of a machine encodes while others wait. Raises UserError, also of a file that
    changes while it is read.
    """
    import pyarrow as pa
    from filelock import FileLock

    hashes = [file_sha256(path) for path in paths]
    causes = [tokenizer.backend_tokenizer.to_str(), system_prompt, [p.suffix for p in paths]]
    causes += [hashes, file_sha256(script), file_sha256(__file__)]
    name = hashlib.sha256(json.dumps(causes).encode()).hexdigest()
    cache = Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME, "datasets")), "sft_rows")
    file, aside = cache / f"{name}.arrow", cache / f"{name}.{os.getpid()}"
    with as_user_error(OSError, f"{cache}: rows cannot be kept here; make room"):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if file.exists():
                try:
                    return Rows(open_table(file), paths, "+".join(hashes))
                except (OSError, ValueError) as error:
                    say(f"cache      {file} is damaged, encoding again: {error}", sys.stderr)
            try:
                batches = encode_rows(paths, tokenizer, system_prompt, encode_batch)
                first = next(batches)
                with (
                    pa.OSFile(str(aside), "wb") as sink,
                    pa.ipc.new_file(sink, first.schema) as out,
                ):
                    for batch in itertools.chain([first], batches):
                        out.write(batch)
                if hashes != [file_sha256(path) for path in paths]:
                    raise UserError(f"{paths[0]}: changed while it was read; try again")
                os.replace(aside, file)
            finally:
                aside.unlink(missing_ok=True)
            return Rows(open_table(file), paths, "+".join(hashes))


def open_table(file: Path):
    """Return the table of a file, mapped into memory; raises OSError or ValueError if damaged."""
    import pyarrow as pa
    import pyarrow.compute

    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    lengths = pa.compute.list_value_length(table["input_ids"])
    if not len(table) or not table["num_tokens"].equals(lengths):
        raise ValueError("its rows are not as long as they were")
    return table


def encode_rows(paths: list[Path], tokenizer, system_prompt: str, encode_batch):
    """Yield the files' rows as Arrow batches; Python reads some while tokenizers encode others."""
    ahead = deque()
    with ThreadPoolExecutor(BATCHES_AHEAD) as pool:
        for batch in parsed_batches(paths, system_prompt):
            ahead.append(pool.submit(to_arrow, batch, tokenizer, encode_batch))
            if len(ahead) > BATCHES_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def parsed_batches(paths: list[Path], system_prompt: str) -> Iterator[list[tuple]]:
    """Yield lists of (turns, file number, line, error, ignored keys), of a limited size."""
    batch, size = [], 0
    for file_number, path in enumerate(paths):
        line = 0
        for line, row in read_rows(path):
            try:
                turns, error, ignored = parse_row(row, system_prompt), "", ignored_keys(row)
            except ValueError as refusal:
                turns, error, ignored = [], str(refusal), ""  # no turns: no tokens
            batch.append((turns, file_number, line, error, ignored))
            size += sum(len(turn["content"]) for turn in turns)
            if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if not line:
            raise UserError(f"{path}: is empty; it needs one conversation per line or row")
    if batch:
        yield batch


def ignored_keys(row: dict) -> str:
    """Return the names of what a good row says without effect."""
    turns = row.get("messages") or []
    keys = row.keys() - ROW_KEYS - REFUSED_ROW_KEYS.keys()
    keys |= set().union(*turns) - set(TURN_KEYS) - REFUSED_TURN_KEYS.keys()
    return ", ".join(map(repr, sorted(keys)))


def to_arrow(batch: list[tuple], tokenizer, encode_batch):
    """Return the Arrow batch of parsed rows: columns of Rows, and trained [T] for labels."""
    import pyarrow as pa

    conversations, files, lines, errors, ignored = zip(*batch)
    examples = encode_batch(conversations, tokenizer)
    controls = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    texts = ("\n".join(turn["content"] for turn in turns) for turns in conversations)
    ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
    lists = pa.list_(pa.int32())
    labels = pa.array(labels, lists)
    trained = labels.values.to_numpy() != IGNORE_INDEX
    before = np.cumsum(np.append(0, trained))[labels.offsets.to_numpy()]
    numbers = {
        "file": files,
        "line": lines,
        "num_tokens": list(map(len, ids)),
        "num_answer_tokens": np.diff(before),
        "num_control_tokens": [len(controls.findall(text)) for text in texts],
    }
    columns = {"input_ids": pa.array(ids, lists)}
    columns["trained"] = pa.ListArray.from_arrays(labels.offsets, pa.array(trained))
    columns |= {name: pa.array(values, pa.int32()) for name, values in numbers.items()}
    return pa.record_batch(columns | {"error": pa.array(errors), "ignored": pa.array(ignored)})


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
        "ignored_keys": sorted(set(rows["ignored"]) - {""}),
        "files": dict(zip(map(str, rows.paths), per_file)),
    }
    return rows.select(trained), counts


def write_rejected(rows: Rows, file) -> None:
    """Write each refused row to a JSONL file: where it stands, why it is refused, and its text."""
    rejected = rows.select(rows["num_tokens"] == 0)
    for number, path in enumerate(rows.paths):
        refused = rejected.select(rejected["file"] == number)
        errors = dict(zip(refused["line"].tolist(), refused["error"])) if len(refused) else {}
        for line, row in read_rows(path) if errors else ():
            if line in errors:
                about = {"file": str(path), "line": line, "error": errors[line], "row": row}
                file.write(json.dumps(about, ensure_ascii=False, default=str) + "\n")


def first_turns(rows: Rows, count: int, system_prompt: str) -> list[list[dict]]:
    """Return the system and user turn of the first rows, read again from their files."""
    places, found = [(row["file"], row["line"]) for row in itertools.islice(rows, count)], []
    for number in sorted({number for number, _ in places}):
        wanted = {line for file, line in places if file == number}
        for line, row in read_rows(rows.paths[number]):
            if line > max(wanted):
                break
            if line in wanted:
                found.append(parse_row(row, system_prompt)[:2])
    return found


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
    rows = [f"{c['rows_' + name]} {name}" for name in ("trained", "dropped", "rejected")]
    tokens = [f"{c['answer_tokens_' + name]} {name}" for name in ("trained", "cut", "dropped")]
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
