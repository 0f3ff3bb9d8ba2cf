"""Rows: what they may say, what is refused, which files are read, and the overflow law."""

import csv
import itertools
import json
import os
import random
import re
import shlex
import subprocess
import sys
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import transformers
from runs import ROOT, TINY, argv, run_main, train
from tokenizers import normalizers

import sft_qwen2
from sft import encoded_rows
from sft.encoded_rows import IGNORE_INDEX, encode_files, fit_rows
from sft.rows import UserError, find_data_files, parse_row

GOOD = {"query": "q", "answer": "a"}
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S, A0 = {"role": "system", "content": "s"}, {**A, "weight": 0}


@pytest.fixture
def encoded(tiny_tokenizer):
    """A function: a file or files, and what differs from the usual, to all their rows."""

    def encoded(paths, tokenizer=tiny_tokenizer, system="default", **more):
        paths = paths if isinstance(paths, list) else [paths]
        more = {"encode_batch": sft_qwen2.encode_batch, "script": sft_qwen2.__file__, **more}
        return encode_files(paths, tokenizer, system, **more)

    return encoded


def contents(rows) -> list[tuple]:
    return [(row["input_ids"].tolist(), row["labels"].tolist(), row["error"]) for row in rows]


def dumps(*turns, **keys) -> bytes:
    return json.dumps({"messages": turns, **keys} if turns else keys).encode()


BAD_ROWS = [  # a line of JSONL, and what is said of it
    (b'{"query": "q", "answer": ', "JSON"),
    (b'{"query": "q", "answer": "a', "Unterminated string"),
    (b'["q", "a"]', "not a JSON object"),
    (b'{"answer": "a"}', '"query" and "answer"'),
    (dumps(query="", answer="a"), "empty user"),
    (dumps(query="q", answer=" \n\t\u3000"), "empty assistant"),
    (dumps(query="q", answer=None), '"query" and "answer"'),
    (dumps(query="q", answer=42), "not a string"),
    (dumps(system=1, query="q", answer="a"), "not a string"),
    (b'{"messages": ["q", "a"]}', "messages"),
    (b'{"messages": []}', '"messages"'),
    (b'{"messages": [{"role": "user"}, {"role": "assistant"}]}', "not a string"),
    (dumps(Q, {"role": "tool", "content": "t"}, A), "tool"),
    (dumps({"role": [], "content": "q"}, A), "roles"),
    (dumps(A, Q), "assistant, user"),
    (dumps(Q, S, A), "alternate"),
    (dumps(S, Q), "assistant last"),
    (b'{"query": "q", "answer": "\xff"}', "UTF-8"),
    (b'{"query": "q", "answer": "a", "answer": "b"}', "twice"),
    (b'{"messages": [{"role": "user", "role": "user"}]}', "twice"),
    (dumps(query="q", answer="a\0b"), "NUL"),
    (dumps(query="q", answer="\ud83d"), "surrogate"),
    (b'{"query": "q", "answer": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "JSON"),
    (b'{"query": "q", "answer": ' + b"9" * 10_000 + b"}", "JSON"),
    # What would have been ignored
    (dumps(query="q", answer="a", history=[["q", "a"]]), '"history": another format'),
    (dumps(Q, A, tools=[{"name": "f"}]), '"tools": tool calls'),
    (dumps(Q, {**A, "tool_calls": [{}]}), '"tool_calls"'),
    (dumps(Q, {**A, "reasoning_content": "hm"}), '"reasoning_content": not trained'),
    (dumps({**Q, "name": "Bob"}, A), '"name"'),
    (dumps(instruction="q", output="a"), "docs/data.md"),
    (dumps(prompt="q", completion="a"), "docs/data.md"),
    (dumps(conversations=[{"from": "human", "value": "q"}]), "docs/data.md"),
    (dumps(query="q", answer="a", images=["x.png"]), '"images": only text'),
    (dumps(Q, A, query="q"), 'beside it what is in them: "query"'),
    (dumps(S, Q, A, system="s"), "beside it"),
    (dumps(query="q", answer="a", weight=0), '"weight": write it to an assistant turn'),
    (dumps(Q, A0), "nothing to train"),
    (dumps(Q, {**A, "weight": 0.5}), "not 0 or 1"),
    (dumps(Q, {**A, "weight": 1, "loss": False}), "not 0 or 1"),
    (dumps({**Q, "loss": True}, A), "user turn has a weight"),
]
NOT, YES, NONE = {"loss": False}, {"loss": True}, {"weight": None, "name": None}
GOOD_ROWS = [  # a line of JSONL, the turns after system it gives, and its system
    (dumps(**GOOD), [Q, A], "default"),
    (dumps(**GOOD, system=None, history=[], tools=None, input=""), [Q, A], "default"),
    (dumps(**GOOD, system=""), [Q, A], ""),
    (dumps(Q, A, system="own"), [Q, A], "own"),
    (dumps(S, Q, A, Q, A), [Q, A, Q, A], "s"),
    (dumps(Q, A0, Q, {**A, "weight": 1}), [Q, A0, Q, A], "default"),
    (dumps({**Q, **NOT}, {**A, **NOT}, Q, {**A, **YES}), [Q, A0, Q, A], "default"),
    (dumps({**Q, **NONE}, {**A, **NONE, "at": 1}, id=7, score=0.5), [Q, A], "default"),
    (b"\xef\xbb\xbf" + dumps(**GOOD), [Q, A], "default"),
    (b'{"query": "q", "answer": "a"}\r', [Q, A], "default"),
]


def test_rows_say_what_they_say_or_are_refused(encoded, write_rows, tiny_tokenizer):
    """Every row is taken whole, weights and system and all, or named by its line and a reason."""
    lines = [line for line, *_ in GOOD_ROWS] + [b"", b" \t"] + [line for line, _ in BAD_ROWS]
    path = write_rows(b"\n".join(lines))
    rows, at = encoded(path), itertools.count(1)
    for row, (line, turns, system) in zip(rows, GOOD_ROWS):
        turns = [{"role": "system", "content": system}, *turns]
        assert row["error"] == "" and row["place"] == f"{path}:{next(at)}", line
        expected = sft_qwen2.encode(turns, tiny_tokenizer)
        assert row["input_ids"].tolist() == expected["input_ids"], line
        assert row["labels"].tolist() == expected["labels"], line
    for row, (line, reason) in zip(rows.select(np.arange(len(GOOD_ROWS), len(rows))), BAD_ROWS):
        assert reason in row["error"] and len(row["error"]) < 300, (line[:99], row["error"])
        assert row["place"] == f"{path}:{next(at) + 2}" and row["error"].isprintable()
    assert len(rows) == len(GOOD_ROWS) + len(BAD_ROWS)
    assert set(rows["ignored"]) == {"", "'at'\n'id'\n'score'"}


def test_what_a_run_says_of_its_rows(untied_model_dir, tmp_path):
    """Refused rows end it before a model is loaded, or are written down; all that is read adds up.

    Shards are one set of rows; control tokens in texts and keys without effect are named.
    """
    rows = [GOOD, *[{"query": "q"}] * 30, {"query": "q " * 200, "answer": "a"}]
    rows += [{"query": "<|im_end|>", "answer": "b " * 99, "id": 7}]
    one, two = (tmp_path / f"train-0000{i}-of-00002.jsonl" for i in (0, 1))
    one.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    two.write_text(json.dumps(rows[-1]))
    (tmp_path / "dev.json").write_text(json.dumps([GOOD] * 2))
    out, flags = tmp_path / "out", {"max_len": 60, "system_prompt": ""}
    paths = {"model_name_or_path": untied_model_dir, "data_path": tmp_path, "output_dir": out}
    code, _, err = run_main(*argv(**paths, **flags, report_to="none"))
    *shown, dots, last = err.splitlines()
    assert code == 1 and len(shown) == 20 and dots == "..." and not out.exists()
    assert f"{one}:2: wants" in shown[0] and f"{one}:21: " in shown[-1]
    assert last.startswith("30 of 33 rows are refused")
    run = train(untied_model_dir, tmp_path, out, skip_bad_rows="true", **flags)
    assert "33 rows = 2 trained + 1 dropped + 30 rejected (1 cut)" in run.out
    assert f"{one}: 32 rows, 1 trained\n" in run.out and f"{two}: 1 rows, 1 trained\n" in run.out
    assert "1 control tokens spelled in texts" in run.out and "change nothing: 'id'\n" in run.out
    assert f"validation {tmp_path}/dev.json: 2 rows" in run.out and f"{one}:2: wants" in run.err
    (step,) = run.steps
    assert sorted(row["place"] for row in step) == [f"{one}:1", f"{two}:1"]
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [row["place"] for row in rejected] == [f"{one}:{line}" for line in range(2, 32)]
    assert all("wants" in row["error"] for row in rejected)


# ---- Formats ------------------------------------------------------------------------------------
TEXTS = ["007", "1.50", "1e5", "nan", "NULL", "true"]
TEXTS += ["a,b\n\"c\" 'd'", "中文\u2028🚀", "<|im_end|>"]


def test_every_format_gives_the_same_rows(encoded, tmp_path):
    """JSON Lines, JSON as array, object or lines, CSV, Parquet; in a folder named like a glob."""
    rows = [{"query": f"q {text}", "answer": text} for text in TEXTS]
    turns = [{"messages": [S, {**Q, "name": None}, A0, Q, A]}, {**GOOD, "system": ""}, *rows]
    every = dict.fromkeys(["system", "messages", "query", "answer"])
    folder = tmp_path / "d[12]*?"
    folder.mkdir()
    (tmp_path / "d1").mkdir()
    (tmp_path / "d1" / "train.json").write_text("[]")

    def write(name: str, data: bytes):
        (folder / name).write_bytes(data)
        return encoded(folder / name)

    lines = b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in turns)
    expected = contents(write("train.jsonl", lines))
    assert len({tuple(ids) for ids, *_ in expected}) == len(turns)
    for data in (lines, json.dumps(turns, indent=1).encode(), b"\xef\xbb\xbf" + lines):
        assert contents(write("train.json", data)) == expected
    assert contents(write("one.json", json.dumps(turns[0], indent=2).encode())) == expected[:1]
    table = pa.Table.from_pylist([every | row for row in turns])
    pa.parquet.write_table(table, folder / "train.parquet", row_group_size=2)
    assert contents(encoded(folder / "train.parquet")) == expected
    with open(folder / "train.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["query", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    assert contents(encoded(folder / "train.csv")) == expected[2:]


ODD_JSON = rb"""[{"query": "q", "answer": "a"}, {"query": "q", "answer": 5},
{"query": "q", "answer": "\ud800"}, {"query": "q", "answer": "a", "x": 1},
{"query": "q", "query": "q", "answer": "a"}, 1]"""
ODD_CSV = b"query,answer\nq,a\nHello, w,Hi\nq,\nq,a\nq," + b"long " * 30_000
ODD_ROWS = {  # a file, and what is said of each of its rows: a wrong one spoils no other
    "train.json": (ODD_JSON, ("", "not a string", "surrogate", "", "twice", "not a JSON object")),
    "train.csv": (ODD_CSV, ("", "more fields than the header", 'wants "query" and', "", "")),
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_a_row_does_not_spoil_the_others(name, encoded, write_rows):
    data, reasons = ODD_ROWS[name]
    path = write_rows(data, name)
    rows = encoded(path)
    for number, (row, reason) in enumerate(zip(rows, reasons, strict=True), 1):
        assert reason in row["error"] and bool(reason) == bool(row["error"])
        assert row["place"] == f"{path}:{number}"
    assert rows[3]["input_ids"].tolist() == rows[0]["input_ids"].tolist()
    assert name != "train.csv" or rows[4]["num_answer_tokens"] > 30_000  # no text is too long


UNREADABLE = {
    "empty": ("train.jsonl", b"", "is empty"),
    "blank": ("train.jsonl", b"\n\r\n", "is empty"),
    "empty array": ("train.json", b"[]", "is empty"),
    "no CSV": ("train.csv", b"", "is empty"),
    "no Parquet": ("train.parquet", b"PAR1", "cannot be read"),
    "broken array": ("train.json", b'[{"query": "q"},\n{"answer"]', "of line 2"),
    "GBK": ("train.csv", "query,answer\n你好,好".encode("gbk"), "save the file as UTF-8"),
    "NUL in CSV": ("train.csv", b'query,answer\n"q,a', "cannot be read"),
    "column twice": ("train.csv", b"query,answer,answer\nq,a,b", "a column appears twice"),
}


@pytest.mark.parametrize(("name", "data", "said"), UNREADABLE.values(), ids=UNREADABLE)
def test_files_that_cannot_be_read_get_a_sentence(name, data, said, encoded, write_rows):
    path = write_rows(data, name)
    with pytest.raises(UserError) as error:
        encoded([write_rows([GOOD]), path])
    assert str(error.value).startswith(f"{path}: ") and said in str(error.value)
    assert "\n" not in str(error.value)


FOLDERS = {  # names in a folder: what is trained, validated, and said
    "train.jsonl validation.jsonl": ("train.jsonl", "validation.jsonl", ""),
    "train_b.jsonl train-a.jsonl": ("train-a.jsonl train_b.jsonl", "", ""),
    "train.csv dev.jsonl": ("train.csv", "dev.jsonl", ""),
    "train.csv val_1.csv valid.csv test.csv": ("train.csv", "val_1.csv valid.csv", "test.csv"),
    "train.csv test.csv": ("train.csv", "test.csv", ""),
    "train.csv README.md more.csv train.txt": ("train.csv", "", "more.csv train.txt"),
    "train-0-of-2.csv train-1-of-2.csv": ("train-0-of-2.csv train-1-of-2.csv", "", ""),
    "train-0-of-3.csv train-2-of-3.csv": ("", "", "has 3 parts, but 2 are here"),
    "train.jsonl train.csv": ("", "", "two formats"),
    "validation.jsonl": ("", "", "has no file train*"),
    "": ("", "", "has no file train*"),
}


@pytest.mark.parametrize(("names", "expected"), FOLDERS.items(), ids=FOLDERS)
def test_which_files_of_a_folder_are_read(names, expected, tmp_path, capsys):
    """Shards and dev files are found, and what is not read is said, or the folder refused."""
    for name in names.split():
        (tmp_path / name).touch()
    train, validation, said = ([str(tmp_path / x) for x in part.split()] for part in expected)
    if not train:
        with pytest.raises(UserError, match=re.escape(expected[2])):
            find_data_files(str(tmp_path))
        return
    found = find_data_files(str(tmp_path))
    assert [str(path) for path in found["train"]] == train
    assert [str(path) for path in found.get("validation", [])] == validation
    assert capsys.readouterr().out == ("not read   " + ", ".join(said) + "\n") * bool(said)
    files = [str(path) for path in sorted(tmp_path.glob("*.*s*"))]  # .csv, .jsonl
    if "more" not in names:  # named one by one, the names still decide
        assert find_data_files(files if len(files) > 1 else str(tmp_path)) == found
    assert find_data_files(files[-1]) == {"train": [tmp_path / files[-1]]}  # alone: it is meant


# ---- The cache ----------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sft_rows"


@pytest.mark.parametrize("num_proc", [2, 7])
def test_any_number_of_processes_gives_the_same_table(num_proc, encoded, write_rows, cache):
    """Lines are cut between processes at any byte; rows, order and line numbers stay."""
    texts = ["a", "\u2028", "b" * 50, "\r", "é🚀"]
    lines = [dumps(query=f"q{i}", answer=texts[i % 5] or "x") for i in range(40)]
    lines[7:9] = [b"", b'{"query": "broken'] + [b" "] * 3
    one, two = write_rows(b"\r\n".join(lines)), write_rows(b"query,answer\nq,a\nq,b\n", "train.csv")
    expected = encoded([one, two, one], num_proc=1)
    alone = map(contents, map(encoded, (one, two, one)))
    assert contents(expected) == [*itertools.chain.from_iterable(alone)]
    cache.rename(cache.with_name("before"))
    rows = encoded([one, two, one], num_proc=num_proc)
    assert rows.table.equals(expected.table) and len(list(cache.glob("*/*.arrow"))) == num_proc
    assert [row["place"] for row in rows] == [row["place"] for row in expected]
    even = encoded(write_rows([GOOD] * 42), num_proc=num_proc)  # each cut is where a line begins
    assert even["line"].tolist() == list(range(1, 43))
    broken = cache.with_name("broken.csv")
    broken.write_bytes(b"query,answer\n" + b"q,a\n" * 999 + '"你'.encode("gbk"))
    with pytest.raises(UserError, match=r"broken.csv: cannot be read: is not UTF-8"):
        encoded([one, broken], num_proc=num_proc)
    assert not list(cache.glob("*.unfinished"))


def test_the_cache_goes_by_all_that_matters(encoded, write_rows, tmp_path, cache):
    """Content, system prompt, tokenizer and script: another of these, another result."""
    path, script = write_rows([GOOD]), tmp_path / "script.py"
    script.write_text("1")
    other = transformers.AutoTokenizer.from_pretrained(TINY)
    other.backend_tokenizer.normalizer = normalizers.Prepend("x")
    ways = [{}, {"system": "other"}, {"tokenizer": other}, {"script": script}]
    rows = [encoded(path, **way) for way in ways]
    assert len({tuple(row[0]["input_ids"].tolist()) for row in rows}) == 3
    assert len(list(cache.glob("*/*.arrow"))) == len(ways)
    path.write_text(json.dumps(GOOD | {"answer": "b"}))
    assert encoded(path)[0]["input_ids"].tolist() != rows[0][0]["input_ids"].tolist()
    never = {"encode_batch": lambda *_: pytest.fail("encoded twice")}
    copy = write_rows([GOOD])
    assert encoded(copy, **never)[0]["place"] == f"{copy}:1"


DAMAGES = {  # what becomes of a file's bytes, in which the lengths of some rows stand
    "cut": lambda data, lengths: data[:-100],
    "empty": lambda data, lengths: b"",
    "zeros in it": lambda data, lengths: data.replace(lengths, bytes(len(lengths)), 1),
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_mended(damage, encoded, write_rows, cache, capsys, monkeypatch):
    monkeypatch.setattr(encoded_rows, "BATCH_ROWS", 10)
    path = write_rows([GOOD] * 50)
    before = encoded(path, num_proc=2).table.to_pylist()
    part = sorted(cache.glob("*/*.arrow"))[-1]
    data, lengths = part.read_bytes(), np.full(9, before[0]["num_tokens"], np.int32).tobytes()
    assert lengths in data
    part.unlink()
    if damage:
        part.write_bytes(damage(data, lengths))
    assert encoded(path).table.to_pylist() == before
    assert f"{part.parent} is damaged, so encoding again" in capsys.readouterr().err
    encoded(path)
    assert capsys.readouterr().err == ""


def test_a_file_that_changes_while_it_is_read_is_refused(encoded, write_rows, cache):
    """What is encoded is what the hash says: else nothing is kept."""
    path = write_rows([GOOD])

    def change(conversations, tokenizer):
        path.write_text(path.read_text() + json.dumps(GOOD))
        return sft_qwen2.encode_batch(conversations, tokenizer)

    with pytest.raises(UserError, match="changed while it was read"):
        encoded(path, encode_batch=change)
    assert not list(cache.glob("*/*.arrow")) and len(encoded(path)) == 2


# ---- The overflow law ---------------------------------------------------------------------------
@pytest.mark.parametrize("overflow_strategy", ["truncate", "drop"])
@pytest.mark.parametrize("max_len", [60, 200, 10_000])
def test_what_is_read_is_trained_cut_or_dropped(overflow_strategy, max_len, encoded, write_rows):
    """Rows and answer tokens read are those trained, cut, dropped and rejected, counted by hand."""
    lines = [dumps(Q, A0, Q, A), dumps(query="q"), dumps(query="q " * 99, answer="a")]
    more = write_rows(b"\n".join(lines))
    table = encoded([ROOT / "data" / "train.jsonl", more])
    rows, counts = fit_rows(table, max_len, overflow_strategy, skip_bad_rows=True)
    trained = dropped = cut = 0
    for row in table:
        labels = row["labels"][:max_len] != IGNORE_INDEX
        if overflow_strategy == "drop" and len(row["labels"]) > max_len:
            labels &= False
        trained += labels.sum()
        lost = (row["labels"] != IGNORE_INDEX).sum() - labels.sum()
        dropped += lost * (not labels.any())
        cut += lost * labels.any()
    names = ("trained", "cut", "dropped", "read")
    found = [counts[f"answer_tokens_{name}"] for name in names]
    assert found == [trained, cut, dropped, trained + cut + dropped]
    parts = [counts[f"rows_{name}"] for name in ("trained", "dropped", "rejected")]
    assert sum(parts) == counts["rows_read"] == len(table) and parts[0] == len(rows)
    assert counts["rows_rejected"] == 1 and counts["files"][str(more)][0] == 3
    assert sum(trained for _, trained in counts["files"].values()) == len(rows)
    batches, trained_tokens = sft_qwen2.collate(list(rows), max_len, 4 * max_len)
    assert trained_tokens == trained
    assert sum(int((b["shift_labels"] != IGNORE_INDEX).sum()) for b in batches) == trained


def test_a_row_that_is_too_long_can_stop_the_run(encoded, write_rows):
    """`error` names the first such row; rows of which no answer remains are no rows."""
    table = encoded(write_rows([GOOD, {"query": "q " * 200, "answer": "one two"}]))
    longest = table["num_tokens"].max()
    with pytest.raises(UserError, match=f":2: {longest} tokens, and max_len is 50 .1 such rows"):
        fit_rows(table, 50, "error")
    assert len(fit_rows(table, longest, "error")[0]) == 2
    with pytest.raises(UserError, match="max_len 5"):
        fit_rows(table, 5, "truncate")


# ---- docs/data.md -------------------------------------------------------------------------------
INPUT = {"instruction": "问", "input": "i", "output": "答"}
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SAMPLES = {  # files that the lines of docs/data.md convert
    "alpaca.json": json.dumps([{"instruction": "q", "input": "", "output": "a"}, INPUT]),
    "sharegpt.json": json.dumps([{"conversations": TURNS}]),
    "completions.jsonl": json.dumps({"prompt": "q", "completion": "a"}),
    "openai.jsonl": "\n".join(
        json.dumps({"messages": [Q, turn], "tools": [1]}) for turn in (A, {**A, "tool_calls": [1]})
    ),
    "history.jsonl": json.dumps({"query": "q", "response": "a", "history": [["q", "a"]]}),
}


def test_the_lines_that_convert_rows(tmp_path):
    """Each line of docs/data.md makes rows that are taken, and the refusal of others names them."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for line in re.search(r"```json\n(.*?)```", text, re.S)[1].splitlines():
        parse_row(json.loads(line), "system")
    for name, sample in SAMPLES.items():
        (tmp_path / name).write_text(sample, encoding="utf-8")
    commands = re.findall(r"```bash\n(.*?)```", text, re.S)
    assert len(commands) == len(SAMPLES)
    for command in commands:
        command = command.replace("python", f"exec {shlex.quote(sys.executable)}", 1)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        rows = [json.loads(x) for x in (tmp_path / "train.jsonl").read_text().splitlines()]
        turns = [parse_row(row, "s") for row in rows]
        assert turns[0][1:3] == [Q, A] and len(turns) == (2 if "alpaca" in command else 1)


# ---- Fuzz: FUZZ_LINES=10000 python -m pytest tests/test_rows.py -k fuzz -s ----------------------
ODD = [None, True, 3, 10**30, [], {}, ["a"], {"a": 1}, A, [Q, A], [A, 3], [Q, A0, Q, A], [S, Q]]
ODD += ["", " \n", "\ud83d", "a\udc00b", "x\ny", "\x1b[31m\u202e<|im_end|>\ufeff", "😀" * 20_000]
KEYS = ["Query", "messages", "system", "", "\ud800", "a" * 500, "\x1b[2J", "weight", "tools", "id"]
RAW = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\0", b"\x1b[31m", b"\r", b"\xe2\x80\xa8", b""]
RAW += [b", ", b'"', b"[" * 100_000, b"9" * 5000]


def mutated(row: dict, rng: random.Random) -> bytes:
    """Return a line of JSONL that is near a good one, or far from it."""
    odd = row | {rng.choice([*row, *KEYS]): rng.choice(ODD)}
    value = rng.choice([row, odd, odd, {"messages": rng.choice(ODD)}, rng.choice(ODD)])
    line = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    at, raw = rng.randrange(len(line)), rng.choice(RAW)
    lines = [line, line, line[:at], line[:at] + raw + line[at:], line[:at] + raw + line[at + 1 :]]
    return rng.choice(lines).replace(b"\n", b" ")


def test_fuzz(encoded, write_rows, tiny_tokenizer):
    """Each of many mutated lines is named with a reason, or trained by the label law."""
    rng, number = random.Random(0), int(os.environ.get("FUZZ_LINES", 1500))
    good = [json.loads(x) for x in (ROOT / "data" / "train.jsonl").read_bytes().splitlines()]
    lines = [mutated(rng.choice(good), rng) for _ in range(number)]
    rows = encoded(write_rows(b"\n".join(lines)), num_proc=3)
    assert [r["line"] for r in rows] == [i for i, x in enumerate(lines, 1) if x and not x.isspace()]
    start = tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")
    for row in rows:
        line, error = lines[row["line"] - 1], row["error"]
        if error:
            assert len(error) < 500 and error.isprintable() and not row["num_tokens"], line[:300]
            continue
        turns = parse_row(json.loads(line), "default")
        texts = [t["content"] + "<|im_end|>" for t in turns[2::2] if t.get("weight") != 0]
        expected = unicodedata.normalize("NFC", "".join(texts))
        trained = row["labels"][row["labels"] != IGNORE_INDEX]
        assert tiny_tokenizer.decode(trained) == expected, line[:300]
        assert (row["input_ids"] == start).sum() == len(turns)
    refused = int((rows["num_tokens"] == 0).sum())
    assert number / 10 < refused < 0.9 * number
    print(f"\n{number} lines: {len(rows) - refused} encoded, {refused} refused")
