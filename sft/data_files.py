"""Data files: which are read, and the records in them, each with its line or row number."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from sft.console import printable, say
from sft.errors import UserError, as_user_error

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# A word of a file's name says what the file is for, as in datasets.load_dataset.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
WORD_SEPARATORS = re.compile("[-._ 0-9]+")
SHARD = re.compile(r"-(\d+)-of-(\d+)(?=\.)")  # train-00000-of-00003.parquet

BOM = b"\xef\xbb\xbf"
UTF8_REMEDY = "save the file as UTF-8 (iconv -f GB18030 -t UTF-8)"
TOO_MANY_FIELDS = "has more fields than the header; put texts with commas in quotes"
JSON_BLANKS = re.compile(r"[ \t\r\n]*")
RECORDS_PER_BATCH = 200  # few enough to hold long texts, many enough to be quick
RAW_FILE = "raw.arrow"
RAW_SCHEMA = pa.schema(
    [
        ("file", pa.int32()),  # its index among the paths
        ("line", pa.int32()),  # from 1: the line of JSON Lines, elsewhere the row
        ("text", pa.large_string()),  # the record as a JSON text
        ("error", pa.string()),  # why the record cannot be read, "" if it can
    ]
)


# ---- Which files are read -----------------------------------------------------------------------
def find_data_files(data_path: list[str], validation_split: float = 0) -> dict[str, list[Path]]:
    """Return {"train": files} and, where there are any, {"validation": files}.

    One file alone is trained. Of several, and in a folder, the names decide. Test files are
    validation files where there are no others. Prints which files of a folder are not read. Raises
    UserError, also for validation files where a share of the train rows is to be drawn.
    """
    if not data_path or "" in data_path:
        raise UserError("--data_path is empty; it names files or folders")
    found = {"train": [], "validation": [], "test": []}
    not_read = []
    for name in data_path:
        with as_user_error(f"{printable(name)}: cannot be read", OSError):
            path = Path(name)
            if path.is_dir():
                not_read += sort_folder(path, found)
            else:
                check_file(path)
                found[split_of_file(path, len(data_path))].append(path)
    if found["validation"]:
        not_read += found["test"]
    else:
        found["validation"] = found["test"]
    if not found["train"]:
        raise UserError(
            f"{printable(str(data_path[0]))}: no file's name says train ({', '.join(SUFFIXES)}); "
            "rename your file to train.jsonl, or name the file itself: --data_path FOLDER/FILE"
        )
    check_names(found["train"] + found["validation"])
    if not_read:
        say(f"not read   {', '.join(printable(str(path)) for path in not_read)}")
    if not found["validation"]:
        return {"train": found["train"]}
    if validation_split > 0:
        raise UserError(
            f"--validation_split: {found['validation'][0]} is a validation file; leave the share "
            "out, or name the files to train alone: --data_path FOLDER/FILE"
        )
    return {"train": found["train"], "validation": found["validation"]}


def check_file(path: Path) -> None:
    name = printable(str(path))
    if not path.exists():
        raise UserError(f"{name}: there is no such file or folder; --data_path names your data")
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{name}: is not a file that ends in {', '.join(SUFFIXES)}")


def split_of_file(path: Path, num_paths: int) -> str:
    """Return what a file that was named by the user is for: alone it is trained."""
    if num_paths == 1:
        return "train"
    splits = splits_in_name(path)
    if len(splits) != 1:
        raise UserError(
            f"{printable(str(path))}: its name does not say what it is for; of several files each "
            "needs train or validation in its name: train-1.jsonl, train-2.jsonl, validation.jsonl"
        )
    return splits[0]


def splits_in_name(path: Path) -> list[str]:
    """Return the splits that a file's name speaks of, each once."""
    splits = []
    for word in WORD_SEPARATORS.split(path.name.lower()):
        split = SPLIT_WORDS.get(word)
        if split is not None and split not in splits:
            splits.append(split)
    return splits


def sort_folder(folder: Path, found: dict[str, list[Path]]) -> list[Path]:
    """Add a folder's files to those of their splits; return what looks like data but is not read.

    Raises UserError where the files of a split have two formats, or where a part is missing.
    """
    here = {"train": [], "validation": [], "test": []}
    not_read = []
    for path in sorted(folder.iterdir()):
        is_data = path.is_file() and path.suffix.lower() in SUFFIXES
        splits = splits_in_name(path)
        if is_data and len(splits) == 1 and not path.name.startswith("."):
            here[splits[0]].append(path)
        elif is_data or splits:
            not_read.append(path)
    for split, paths in here.items():
        check_formats(paths)
        check_shards(paths)
        found[split] += paths
    return not_read


def check_formats(paths: list[Path]) -> None:
    for path in paths:
        if path.suffix.lower() != paths[0].suffix.lower():
            raise UserError(f"{paths[0]} and {path}: two formats; name the files you mean")


def check_shards(paths: list[Path]) -> None:
    """Raise UserError where files say that they are parts of more than there are."""
    parts = Counter()
    totals = {}
    for path in paths:
        shard = SHARD.search(path.name)
        if shard:
            name = path.with_name(SHARD.sub(r"-*-of-\2", path.name))
            parts[name] += 1
            totals[name] = int(shard[2])
    for name, total in totals.items():
        if parts[name] != total:
            raise UserError(f"{name}: has {total} parts, but {parts[name]} are here")


def check_names(paths: list[Path]) -> None:
    """Raise UserError for a file that is named twice or whose name a terminal would obey."""
    seen = {}
    for path in paths:
        if printable(str(path)) != str(path):
            raise UserError(f"{printable(str(path))}: rename it; its name has control characters")
        real_path = path.resolve()
        if real_path in seen:
            raise UserError(f"{path}: is the same file as {seen[real_path]}; name it once")
        seen[real_path] = path


# ---- What is in them ----------------------------------------------------------------------------
def read_records(paths: list[Path], folder: Path) -> datasets.Dataset:
    """Return the raw records of all files in order, with the columns of RAW_SCHEMA.

    They are written to `folder`, so that memory stays flat. Raises UserError for a file that is
    empty or that cannot be read to its end.
    """
    arrow_file = str(folder / RAW_FILE)
    with pa.OSFile(arrow_file, "wb") as file, pa.ipc.new_stream(file, RAW_SCHEMA) as writer:
        for index, path in enumerate(paths):
            num_records = 0
            for batch in read_batches(index, path):
                writer.write(batch)
                num_records += batch.num_rows
            if num_records == 0:
                raise UserError(f"{path}: is empty; it needs one conversation per line or row")
    return datasets.Dataset.from_file(arrow_file)


def read_batches(index: int, path: Path) -> Iterator[pa.RecordBatch]:
    records = []
    for line, text, error in read_file(path):
        records.append({"file": index, "line": line, "text": text, "error": error})
        if len(records) == RECORDS_PER_BATCH:
            yield pa.RecordBatch.from_pylist(records, RAW_SCHEMA)
            records = []
    if records:
        yield pa.RecordBatch.from_pylist(records, RAW_SCHEMA)


def read_file(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line or row number, JSON text, error) of each record; raises UserError."""
    with as_user_error(f"{path}: cannot be read"):
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield from read_parquet(path)
            return
        first_bytes = read_first_bytes(path)
        if first_bytes.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in first_bytes[:2]:
            raise UserError(f"{path}: is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
        if suffix == ".csv":
            yield from read_csv(path)
        elif first_bytes.removeprefix(BOM).lstrip().startswith(b"["):
            yield from read_json_array(path)
        else:
            check_first_line(path, first_bytes)
            yield from read_json_lines(path)


def read_first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1000)


def check_first_line(path: Path, first_bytes: bytes) -> None:
    """Raise UserError where the first line only opens a value that other lines go on with.

    Some of those lines may be rows by themselves, and --skip_bad_rows would train them alone.
    """
    line, newline, _ = first_bytes.removeprefix(BOM).lstrip().partition(b"\n")
    if newline and line.startswith(b"{") and line.rstrip().endswith((b"{", b"[")):
        raise UserError(
            f"{path}: is one JSON object over several lines; write each row on a line of its own, "
            "or all rows as an array: [...]"
        )


def read_json_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    with open(path, "rb") as file:  # as bytes, only \n ends a line: texts may hold U+2028
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BOM).strip()
            if not line:
                continue
            try:
                yield number, line.decode(), ""
            except UnicodeDecodeError as error:
                yield number, "", f"is not UTF-8 (byte {error.start}); {UTF8_REMEDY}"


def read_json_array(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield each element of an array as it is written; the whole file is held in memory."""
    text = read_text(path)
    position = skip_blanks(text, text.index("[") + 1)
    number = 0
    while not text.startswith("]", position):
        if number > 0 and not text.startswith(",", position):
            raise UserError(f"{path}: has no comma after row {number}; is its end missing?")
        if number > 0:
            position = skip_blanks(text, position + 1)
        number += 1
        end = find_end(path, number, text, position)
        yield number, text[position:end], ""
        position = skip_blanks(text, end)
    if skip_blanks(text, position + 1) < len(text):
        raise UserError(f"{path}: has text after the end of its array; is it two files in one?")


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); {UTF8_REMEDY}") from None


def skip_blanks(text: str, position: int) -> int:
    return JSON_BLANKS.match(text, position).end()


def find_end(path: Path, number: int, text: str, start: int) -> int:
    """Return where the JSON value that begins at `start` ends; raises UserError if it is broken."""
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        place = f"line {error.lineno}, character {error.colno}"
        raise UserError(f"{path}: row {number} is broken JSON: {reason} at {place}") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise UserError(f"{path}: row {number} is broken JSON: {error}") from None
    return end


def read_csv(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield each row, with texts as they are written."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of over 131,072 characters
    # newline="" keeps the line ends inside of quoted texts.
    with open(path, encoding="utf-8-sig", newline="") as file:
        number = 0
        try:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            check_columns(path, names)
            check_separator(path, names)
            for number, row in enumerate(reader, 1):
                if None in row:  # where DictReader puts what is too much
                    yield number, "", TOO_MANY_FIELDS
                else:
                    yield number, json.dumps(row), ""
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8; {UTF8_REMEDY}") from None
        except csv.Error as error:
            raise UserError(f"{path}: cannot be read after row {number}: {error}") from None


def check_columns(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{path}: a column appears twice")


def check_separator(path: Path, names: list[str]) -> None:
    for separator in (";", "\t", "|"):
        if len(names) == 1 and separator in names[0]:
            raise UserError(f"{path}: is separated by {separator!r}; save it with commas")


def read_parquet(path: Path) -> Iterator[tuple[int, str, str]]:
    with pq.ParquetFile(path) as file:
        check_columns(path, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(RECORDS_PER_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield number, json.dumps(row, default=name_type), ""


def name_type(value) -> list[str]:
    """Return what stands for a value that JSON does not have: no text, or it would be trained."""
    return [type(value).__name__]
