"""Which files are read, and the records in them: every format, every damage, every place."""

import csv
import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft import data_files
from sft.data_files import find_data_files, read_records
from sft.errors import UserError

RECORD = {"query": "q", "answer": "a"}
LINE = b'{"query": "q", "answer": "a"}\n'
# What a reader may spoil: numbers, line ends, separators, quotes, characters that end lines.
TEXTS = [
    "007",
    "1.50",
    "nan",
    "NULL",
    "true",
    "a,b\n\"c\" 'd'",
    "a\r\nb",
    "a\rb",
    "中文\u2028🚀\x85\x0c",
    "<|im_end|>",
    " a ",
    "\ufeffa",
]
RECORDS = [{"query": f"q {text}", "answer": text} for text in TEXTS]


def case(name: str, *values):
    return pytest.param(*values, id=name)


@pytest.fixture
def read(tmp_path):
    """A function: the name and bytes of a file to its records [{"line", "text", "error"}]."""

    def read(name: str, data: bytes) -> list[dict]:
        path = tmp_path / name
        path.write_bytes(data)
        return read_records([path], tmp_path).to_list()

    return read


def parsed(records: list[dict]) -> list:
    return [json.loads(record["text"]) for record in records]


def json_lines(records: list[dict]) -> bytes:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()


def csv_file(path, records: list[dict], **options) -> bytes:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), **options)
        writer.writeheader()
        writer.writerows(records)
    return path.read_bytes()


def parquet_file(path, records: list[dict], **options) -> bytes:
    pq.write_table(pa.Table.from_pylist(records), path, **options)
    return path.read_bytes()


# ---- Which files of a folder --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "train", "validation", "not_read"),
    [
        case("train alone", ["train.jsonl"], ["train.jsonl"], [], []),
        case(
            "both",
            ["train.jsonl", "validation.jsonl"],
            ["train.jsonl"],
            ["validation.jsonl"],
            [],
        ),
        case(
            "several",
            ["train_b.jsonl", "train-a.jsonl", "train2.jsonl"],
            ["train-a.jsonl", "train2.jsonl", "train_b.jsonl"],
            [],
            [],
        ),
        case(
            "a word inside", ["gsm_train.csv", "my.dev.csv"], ["gsm_train.csv"], ["my.dev.csv"], []
        ),
        case("capitals", ["Train.JSONL"], ["Train.JSONL"], [], []),
        case(
            "words for validation",
            ["train.csv", "val_1.csv", "valid.csv", "dev.csv", "validation-2.csv"],
            ["train.csv"],
            ["dev.csv", "val_1.csv", "valid.csv", "validation-2.csv"],
            [],
        ),
        case(
            "test beside validation",
            ["train.csv", "dev.csv", "test.csv"],
            ["train.csv"],
            ["dev.csv"],
            ["test.csv"],
        ),
        case("test alone", ["train.csv", "test.csv"], ["train.csv"], ["test.csv"], []),
        case("eval alone", ["train.csv", "eval_1.csv"], ["train.csv"], ["eval_1.csv"], []),
        case(
            "words that only begin like one",
            [
                "train.jsonl",
                "developer_qa.jsonl",
                "values.jsonl",
                "testament.jsonl",
                "trains.jsonl",
            ],
            ["train.jsonl"],
            [],
            ["developer_qa.jsonl", "testament.jsonl", "trains.jsonl", "values.jsonl"],
        ),
        case(
            "two words",
            ["train.jsonl", "train_test.jsonl"],
            ["train.jsonl"],
            [],
            ["train_test.jsonl"],
        ),
        case("no data", ["train.csv", "README.md", "notes"], ["train.csv"], [], []),
        case(
            "another ending", ["train.csv", "train.jsonl.gz"], ["train.csv"], [], ["train.jsonl.gz"]
        ),
        case("hidden", ["train.csv", "._train.csv"], ["train.csv"], [], ["._train.csv"]),
        case(
            "parts",
            ["train-00000-of-00002.csv", "train-00001-of-00002.csv"],
            ["train-00000-of-00002.csv", "train-00001-of-00002.csv"],
            [],
            [],
        ),
        case(
            "parts from 1",
            ["train-1-of-2.csv", "train-2-of-2.csv"],
            ["train-1-of-2.csv", "train-2-of-2.csv"],
            [],
            [],
        ),
    ],
)
def test_the_names_in_a_folder_decide(names, train, validation, not_read, tmp_path, capsys):
    for name in names:
        (tmp_path / name).write_bytes(LINE)
    expected = {"train": [tmp_path / name for name in train]}
    if validation:
        expected["validation"] = [tmp_path / name for name in validation]
    said = ""
    if not_read:
        said = f"not read   {', '.join(str(tmp_path / name) for name in not_read)}\n"
    assert find_data_files([str(tmp_path)]) == expected
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        case("empty", [], "no file's name says train"),
        case("no train", ["validation.jsonl"], "no file's name says train"),
        case("another name", ["general.jsonl"], "no file's name says train"),
        case("two formats", ["train.jsonl", "train.csv"], "two formats"),
        case(
            "a part is missing", ["train-0-of-3.csv", "train-2-of-3.csv"], "has 3 parts, but 2 are"
        ),
    ],
)
def test_a_folder_that_is_not_clear_is_refused(names, reason, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(LINE)
    with pytest.raises(UserError, match=reason):
        find_data_files([str(tmp_path)])


def test_a_folder_within_a_folder_is_named_not_read(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train.jsonl").write_bytes(LINE)
    assert find_data_files([str(tmp_path)]) == {"train": [tmp_path / "train.jsonl"]}
    assert capsys.readouterr().out == f"not read   {tmp_path / 'train'}\n"


# ---- Files that are named one by one ------------------------------------------------------------
@pytest.fixture
def write(tmp_path):
    """A function: the name of a file to the path of one with a record in it."""

    def write(name: str) -> str:
        path = tmp_path / name
        path.write_bytes(LINE)
        return str(path)

    return write


@pytest.mark.parametrize("name", ["general.jsonl", "validation.jsonl", "test.csv", "a.parquet"])
def test_a_file_alone_is_trained_whatever_its_name(name, write, tmp_path):
    assert find_data_files([write(name)]) == {"train": [tmp_path / name]}


def test_the_names_of_several_files_decide(write, tmp_path):
    names = ["gsm_train.jsonl", "gsm_validation.jsonl", "train-2.csv"]
    found = find_data_files([write(name) for name in names])
    assert found["train"] == [tmp_path / "gsm_train.jsonl", tmp_path / "train-2.csv"]
    assert found["validation"] == [tmp_path / "gsm_validation.jsonl"]


@pytest.mark.parametrize("name", ["general.jsonl", "values.jsonl", "train_test.jsonl"])
def test_of_several_files_an_unclear_name_is_refused(name, write):
    with pytest.raises(UserError, match=f"{name}: its name does not say what it is for"):
        find_data_files([write("train.jsonl"), write(name)])


def test_a_file_that_is_named_twice_is_refused(write):
    path = write("train.jsonl")
    with pytest.raises(UserError, match="is the same file as"):
        find_data_files([path, path])


def test_a_file_and_its_folder_are_refused(write, tmp_path):
    with pytest.raises(UserError, match="is the same file as"):
        find_data_files([str(tmp_path), write("train.jsonl")])


def test_a_file_and_a_link_to_it_are_refused(write, tmp_path):
    (tmp_path / "train-2.jsonl").symlink_to(write("train-1.jsonl"))
    with pytest.raises(UserError, match=r"train-2.jsonl: is the same file as .*train-1.jsonl"):
        find_data_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        case("mistyped", "dta", "there is no such file or folder"),
        case("mistyped file", "tain.jsonl", "there is no such file or folder"),
        case("too long", "a" * 5000, "cannot be read: "),
        case("another ending", "notes.txt", "is not a file that ends in .jsonl, .json, .csv"),
        case("control characters", "train\x1b[2J.jsonl", r"\\x1b.*rename it"),
    ],
)
def test_a_path_that_is_no_data_gets_a_sentence(name, reason, tmp_path, write):
    if len(name) < 100 and name not in ("dta", "tain.jsonl"):
        write(name)
    with pytest.raises(UserError, match=reason) as error:
        find_data_files([str(tmp_path / name)])
    assert str(error.value).isprintable()


@pytest.mark.parametrize("data_path", [[], [""]])
def test_no_path_is_refused(data_path):
    with pytest.raises(UserError, match="--data_path is empty"):
        find_data_files(data_path)


# ---- Formats ------------------------------------------------------------------------------------
def test_json_lines(read):
    records = read("train.jsonl", json_lines(RECORDS))
    assert parsed(records) == RECORDS
    assert [record["line"] for record in records] == list(range(1, len(RECORDS) + 1))
    assert {record["error"] for record in records} == {""}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_an_array_in_a_file_of_either_name(name, indent, read):
    data = json.dumps(RECORDS, ensure_ascii=False, indent=indent).encode()
    records = read(name, data)
    assert parsed(records) == RECORDS
    assert [record["line"] for record in records] == list(range(1, len(RECORDS) + 1))


def test_lines_in_a_json_file(read):
    assert parsed(read("train.json", json_lines(RECORDS))) == RECORDS


def test_csv_keeps_texts_as_they_are_written(read, tmp_path):
    records = read("train.csv", csv_file(tmp_path / "x.csv", RECORDS))
    assert parsed(records) == RECORDS
    assert [record["line"] for record in records] == list(range(1, len(RECORDS) + 1))


def test_csv_with_line_ends_of_unix(read, tmp_path):
    data = csv_file(tmp_path / "x.csv", RECORDS, lineterminator="\n", quoting=csv.QUOTE_ALL)
    assert parsed(read("train.csv", data)) == RECORDS


def test_csv_has_no_longest_text(read):
    long = b"long " * 100_000
    (record,) = parsed(read("train.csv", b"query,answer\nq," + long))
    assert record["answer"] == long.decode()


def test_parquet(read, tmp_path):
    assert parsed(read("train.parquet", parquet_file(tmp_path / "x", RECORDS))) == RECORDS


def test_parquet_with_messages_and_missing_values(read, tmp_path):
    turns = [{"role": "user", "content": "q", "weight": None}]
    records = [{"messages": turns, "query": None}, {"messages": None, "query": "q"}]
    assert parsed(read("train.parquet", parquet_file(tmp_path / "x", records))) == records


def test_a_value_that_json_does_not_have_never_becomes_a_text(read, tmp_path):
    """Bytes would be trained as the text b'...'."""
    (record,) = parsed(read("train.parquet", parquet_file(tmp_path / "x", [{"query": b"q"}])))
    assert not isinstance(record["query"], str)


@pytest.mark.parametrize("row_group_size", [200, 777, 10_000])
def test_every_row_of_a_long_parquet_file_with_its_number(row_group_size, read, tmp_path):
    rows = [{"query": f"q{i}", "answer": f"a{i}"} for i in range(1, 2501)]
    data = parquet_file(tmp_path / "x", rows, row_group_size=row_group_size)
    records = read("train.parquet", data)
    assert parsed(records) == rows
    assert [record["line"] for record in records] == list(range(1, 2501))


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv"])
def test_every_row_of_a_long_file_with_its_number(name, read, tmp_path):
    rows = [{"query": f"q{i}", "answer": f"a{i}"} for i in range(1, 2501)]
    data = {
        "train.jsonl": json_lines(rows),
        "train.json": json.dumps(rows).encode(),
        "train.csv": csv_file(tmp_path / "x", rows),
    }
    records = read(name, data[name])
    assert parsed(records) == rows
    assert [record["line"] for record in records] == list(range(1, 2501))


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv"])
def test_a_byte_order_mark_is_no_text(name, read):
    data = {
        "train.jsonl": LINE,
        "train.json": b"[" + LINE + b"]",
        "train.csv": b"query,answer\nq,a",
    }
    assert parsed(read(name, b"\xef\xbb\xbf" + data[name])) == [RECORD]


def test_blank_lines_are_no_records_but_count(read):
    records = read("train.jsonl", b"\n\r\n" + LINE + b" \t\n" + LINE)
    assert [record["line"] for record in records] == [3, 5]


def test_lines_may_end_as_on_windows(read):
    records = read("train.jsonl", LINE.replace(b"\n", b"\r\n") * 3)
    assert parsed(records) == [RECORD] * 3


def test_several_files_in_their_order(tmp_path):
    paths = []
    for i, name in enumerate(["b.jsonl", "a.csv", "c.jsonl"]):
        path = tmp_path / name
        path.write_bytes([LINE * 2, b"query,answer\nq,a\n", LINE][i])
        paths.append(path)
    records = read_records(paths, tmp_path)
    assert list(records["file"]) == [0, 0, 1, 2]
    assert list(records["line"]) == [1, 2, 1, 1]


def test_what_is_read_lies_in_a_file(read, tmp_path):
    """Memory stays flat: `datasets` maps the file."""
    (tmp_path / "train.jsonl").write_bytes(LINE * 1000)
    records = read_records([tmp_path / "train.jsonl"], tmp_path)
    assert isinstance(records, datasets.Dataset)
    assert [file["filename"] for file in records.cache_files] == [str(tmp_path / "raw.arrow")]


# ---- A record that cannot be read does not spoil the others -------------------------------------
def test_a_line_that_is_not_utf8(read):
    records = read("train.jsonl", LINE + b'{"query": "\xff"}\n' + LINE)
    errors = [record["error"] for record in records]
    assert errors[0] == errors[2] == ""
    assert errors[1].startswith("is not UTF-8 (byte 11); save the file as UTF-8")


def test_a_row_with_more_fields_than_the_header(read):
    records = read("train.csv", b"query,answer\nq,a\nHello, w,Hi\nq,a\n")
    errors = [record["error"] for record in records]
    assert errors[0] == errors[2] == ""
    assert errors[1] == "has more fields than the header; put texts with commas in quotes"


def test_a_row_with_fewer_fields_than_the_header(read):
    (record,) = parsed(read("train.csv", b"query,answer\nq\n"))
    assert record == {"query": "q", "answer": None}


# ---- A file that cannot be read -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        case("empty", "train.jsonl", b"", "is empty"),
        case("blank", "train.jsonl", b"\n\r\n", "is empty"),
        case("empty array", "train.json", b" [ ] ", "is empty"),
        case("empty csv", "train.csv", b"", "is empty"),
        case("csv of a header", "train.csv", b"query,answer\n", "is empty"),
        case("no parquet", "train.parquet", b"PAR1", "cannot be read"),
        case(
            "array without end",
            "train.json",
            b'[{"query": "q"}',
            "no comma after row 1; is its end",
        ),
        case("array without comma", "train.json", b'[{"a": 1}\n{"a": 1}]', "no comma after row 1"),
        case(
            "array that breaks",
            "train.json",
            b'[{"query": "q"},\n{"answer"]',
            "row 2 is broken JSON",
        ),
        case("a comma too many", "train.json", b'[{"query": "q"},]', "row 2 is broken JSON"),
        case(
            "text after an array",
            "train.jsonl",
            b'["q"]\n' + LINE,
            "text after the end of its array",
        ),
        case(
            "rows within an object",
            "train.json",
            b'{"data": [\n{"query": "q"},\n' + LINE + b"]}",
            "is one JSON object over several lines",
        ),
        case(
            "objects over lines",
            "train.jsonl",
            b'{\n"query": "q"\n}\n' + LINE,
            "is one JSON object over several lines",
        ),
        case("deep array", "train.json", b"[" * 200_000, "row 1 is broken JSON"),
        case("a long number", "train.json", b"[" + b"9" * 10_000 + b"]", "row 1 is broken JSON"),
        case("gbk array", "train.json", '[{"query": "你好"}]'.encode("gbk"), "is not UTF-8"),
        case(
            "gbk csv", "train.csv", "query,answer\n你好,好".encode("gbk"), "is not UTF-8; save the"
        ),
        case("open quote", "train.csv", b'query,answer\nq,a\n"q,a', "cannot be read after row 1"),
        case("column twice", "train.csv", b"query,answer,answer\nq,a,b", "a column appears twice"),
        case(
            "semicolons", "train.csv", b"query;answer\nq;a\n", "is separated by ';'; save it with"
        ),
        case("tabs", "train.csv", b"query\tanswer\nq\ta\n", r"is separated by '\\t'; save it with"),
        case(
            "utf-16 lines", "train.jsonl", LINE.decode().encode("utf-16"), "is UTF-16; save it as"
        ),
        case(
            "utf-16-be", "train.jsonl", LINE.decode().encode("utf-16-be"), "is UTF-16; save it as"
        ),
        case("utf-16-le", "train.json", "[{}]".encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
        case("utf-16 csv", "train.csv", "query,answer\n".encode("utf-16"), "is UTF-16; save it as"),
    ],
)
def test_a_file_that_cannot_be_read_gets_a_sentence(name, data, reason, read, tmp_path):
    with pytest.raises(UserError, match=reason) as error:
        read(name, data)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_broken_array_names_the_line_of_its_file(read):
    data = json.dumps([RECORD] * 3, indent=1).encode().replace(b'"q"', b"q", 3)
    with pytest.raises(UserError, match="row 1 is broken JSON: Expecting value at line 3, char"):
        read("train.json", data)


def test_a_parquet_file_with_bytes_that_are_no_text(tmp_path):
    array = pa.array([b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"query": array}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train.parquet: cannot be read: "):
        read_records([tmp_path / "train.parquet"], tmp_path)


def test_a_file_without_permission_gets_a_sentence(tmp_path, monkeypatch):
    """Simulated, for the superuser may read everything."""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "train.jsonl"
    path.write_bytes(LINE)
    monkeypatch.setattr(data_files, "read_first_bytes", refuse)
    with pytest.raises(UserError, match=r"train.jsonl: cannot be read: .*Permission denied"):
        read_records([path], tmp_path)


# ---- Anything else ------------------------------------------------------------------------------
PIECES = [
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b'"',
    b"\\",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
]
PIECES += [
    b'"query"',
    b'"a"',
    b"null",
    b"1",
    b"-",
    b"\\u",
    b"\\ud800",
    b"\xe2\x80\xa8",
    b" ",
    b"\xff\xfe",
]
PIECES += [LINE, LINE.strip(), b"query,answer\n", b"q,a\n", b'"q"",a"\n', b"[" * 5000, b"9" * 5000]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv"])
def test_any_bytes_are_records_or_a_sentence(name, tmp_path):
    rng = random.Random(name)
    path = tmp_path / name
    num_refused = 0
    for _ in range(300):
        path.write_bytes(b"".join(rng.choices(PIECES, k=rng.randrange(30))))
        try:
            records = read_records([path], tmp_path)
        except UserError as error:
            num_refused += 1
            assert str(error).startswith(str(path))
            continue
        for record in records:
            assert record["error"].isprintable()
    assert 0 < num_refused < 300


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_parquet_file_that_was_cut_gets_a_sentence(share, read, tmp_path):
    data = parquet_file(tmp_path / "whole", RECORDS)
    with pytest.raises(UserError, match=r"train.parquet: cannot be read: "):
        read("train.parquet", data[: int(share * len(data))])
