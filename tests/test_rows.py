"""Rows: what is refused and how it is said, file formats, and the overflow law."""

import json

import datasets
import numpy as np
import pytest
from conftest import ROOT

import sft_qwen2
from sft_qwen2 import IGNORE_INDEX, UserError, encode_file, fit_rows, read_rows

GOOD = {"query": "q", "answer": "a"}


@pytest.fixture
def refuse(run_main, tiny_model_dir, monkeypatch, tmp_path):
    """A function: a data path to the sentence the run stops with, before it loads a model."""

    def load_model(*args, **kwargs):
        raise AssertionError("loads a model before the data is known to be good")

    def refuse(path, *flags) -> str:
        monkeypatch.setattr(sft_qwen2, "load_model", load_model)
        argv = ["--model_name_or_path", tiny_model_dir, "--data_path", path, "--report_to", "none"]
        code, _, err = run_main(*argv, "--output_dir", tmp_path, *flags)
        assert code == 1
        assert "Traceback" not in err and err.startswith("error: ")
        return err

    return refuse


def turns(*pairs) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in pairs]}).encode()


def pair(query, answer) -> bytes:
    return json.dumps({"query": query, "answer": answer}).encode()


Q, A, S = ("user", "q"), ("assistant", "a"), ("system", "s")
BAD_ROWS = {
    "broken JSON": (b'{"query": "q", "answer": ', "JSON"),
    "cut string": (b'{"query": "q", "answer": "a', "JSON"),
    "two objects": (b'{"query": "q", "answer": "a"} {}', "JSON"),
    "an array": (b'["q", "a"]', "not a JSON object"),
    "a string": (b'"q"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "no query": (b'{"answer": "a"}', '"query" and "answer"'),
    "no answer": (b'{"query": "q"}', '"query" and "answer"'),
    "nothing": (b"{}", '"query" and "answer"'),
    "other names": (b'{"instruction": "q", "output": "a"}', "instruction"),
    "empty query": (pair("", "a"), "empty user"),
    "empty answer": (pair("q", ""), "empty assistant"),
    "blank answer": (pair("q", " \n\t\u3000"), "empty assistant"),
    "null answer": (pair("q", None), "not a string"),
    "number": (pair("q", 42), "not a string"),
    "list": (pair(["q"], "a"), "not a string"),
    "system not text": (b'{"system": 1, "query": "q", "answer": "a"}', "not a string"),
    "messages not a list": (b'{"messages": "q"}', "messages"),
    "messages of strings": (b'{"messages": ["q", "a"]}', "messages"),
    "no messages": (b'{"messages": []}', '"messages"'),
    "no content": (b'{"messages": [{"role": "user"}, {"role": "assistant"}]}', "not a string"),
    "unknown role": (turns(Q, ("tool", "t"), A), "tool"),
    "role not text": (turns(([], "q"), A), "roles"),
    "no role": (b'{"messages": [{"content": "q"}, {"content": "a"}]}', "roles"),
    "wrong order": (turns(A, Q), "assistant, user"),
    "two users": (turns(Q, Q, A), "alternate"),
    "late system": (turns(Q, S, A), "alternate"),
    "no assistant": (turns(S, Q), "assistant last"),
    "only system": (turns(S), "assistant last"),
    "user last": (turns(Q, A, Q), "assistant last"),
    "empty turn": (turns(Q, A, Q, ("assistant", "")), "empty assistant"),
    "cut short": (b'{"query": "q", "answer": "a', "Unterminated string"),
    "not UTF-8": (b'{"query": "q", "answer": "\xff"}', "UTF-8"),
    "latin-1": ('{"query": "q", "answer": "café"}'.encode("latin-1"), "UTF-8"),
    "UTF-16": ('{"query": "q"}'.encode("utf-16"), "UTF-8"),
    "BOM": (b'\xef\xbb\xbf{"query": "q", "answer": "a"}', "BOM"),
    "key twice": (b'{"query": "q", "answer": "a", "answer": "b"}', "twice"),
    "role twice": (b'{"messages": [{"role": "user", "role": "user"}]}', "twice"),
    "NUL": (pair("q", "a\0b"), "NUL"),
    "half a pair": (pair("q", "\ud83d"), "surrogate"),
    "deep": (b'{"query": "q", "answer": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "JSON"),
    "huge number": (b'{"query": "q", "answer": ' + b"9" * 10_000 + b"}", "JSON"),
}


@pytest.mark.parametrize("line, reason", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(line, reason, refuse, write_rows):
    """A bad row stops the run before the model is loaded, named as `file:line: reason`."""
    good = json.dumps(GOOD).encode()
    path = write_rows(b"\n".join([good, b"", good, line, good]) + b"\n")
    first, last = refuse(path).splitlines()
    where, _, said = first.removeprefix("error: ").partition(": ")
    assert where == f"{path}:4"
    assert reason in said and len(said) < 300
    assert last.startswith("1 of 4 rows are refused")


def test_all_bad_rows_are_counted(refuse, write_rows):
    """Of many bad rows the first are shown, each on its line, and all are counted."""
    path = write_rows([GOOD] * 1500 + [{"query": "q"}] * 1234 + [GOOD])
    *shown, dots, last = refuse(path).splitlines()
    assert len(shown) == 20 and f"{path}:1501: " in shown[0] and f"{path}:1520: " in shown[-1]
    assert dots == "..."
    assert last.startswith("1234 of 2735 rows are refused")


def test_lines_are_counted_as_editors_do(refuse, write_rows):
    """CRLF ends one line and blank lines count; U+2028 and its like inside a text end none."""
    text = '{"query": "a\u2028b\u2029c\x85d\x0ce", "answer": "\u2028"}'.replace("\x0c", "\\f")
    lines = [text, "", text, " \t", '{"query": "q"}', text]
    path = write_rows("\r\n".join(lines).encode())
    assert f"{path}:5: " in refuse(path)
    rows = [row for number, row in read_rows(path) if number != 5]
    assert rows == [{"query": "a\u2028b\u2029c\x85d\x0ce", "answer": "\u2028"}] * 3


def test_files_that_are_not_there(refuse, tmp_path):
    """A data path without data is named in one sentence: missing, empty, ambiguous, unknown."""
    empty, two, other = tmp_path / "empty", tmp_path / "two", tmp_path / "rows.txt"
    for folder in (empty, two):
        folder.mkdir()
    (empty / "validation.jsonl").write_text(json.dumps(GOOD))
    (two / "train.jsonl").write_text(json.dumps(GOOD))
    (two / "train.csv").write_text("query,answer\nq,a\n")
    other.write_text(json.dumps(GOOD))
    for path in (tmp_path / "missing", tmp_path / "missing.jsonl", empty, two, other):
        message = refuse(path)
        assert str(path) in message and message.count("\n") == 1


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize(
    "content", [b"", b"\n\r\n", b"\x00\xff{[,"], ids=["empty", "blank", "junk"]
)
def test_files_without_a_row(suffix, content, refuse, write_rows):
    """An empty or unreadable file of any format is named in a sentence, never a traceback."""
    path = write_rows(content, f"train.{suffix}")
    assert str(path) in refuse(path)


def test_bad_rows_of_other_formats_are_named(refuse, write_rows, tmp_path):
    """In JSON arrays, CSV and Parquet a refused row has its number from 1."""
    rows = [GOOD, {"query": "q", "answer": ""}, GOOD]
    paths = [write_rows(json.dumps(rows).encode(), "train.json")]
    paths += [write_rows(b"query,answer\nq,a\nq,\nq,a\n", "train.csv")]
    paths += [tmp_path / "train.parquet"]
    datasets.Dataset.from_list(rows).to_parquet(str(paths[-1]))
    for path in paths:
        message = refuse(path)
        assert f"{path}:2: " in message and "1 of 3 rows are refused" in message


def encodings(path, tokenizer) -> list[tuple]:
    table = encode_file(path, tokenizer, "default system")
    assert set(table["error"]) == {""}
    return [(row["input_ids"].tolist(), row["labels"].tolist()) for row in table]


def test_every_format_gives_the_same_encodings(tiny_tokenizer, write_rows, tmp_path):
    """The rows of a JSON Lines, JSON, CSV and Parquet file are encoded alike."""
    texts = ["007", "1.50", "1e5", "nan", "NULL", "None", "true", "a,b\n\"c\" 'd'", "中文\u2028🚀"]
    rows = [{"query": f"q {text}", "answer": text} for text in texts]
    expected = encodings(write_rows(rows), tiny_tokenizer)
    assert len({labels[-2] for _, labels in expected}) > 1
    table, paths = datasets.Dataset.from_list(rows), {}
    paths["json"] = write_rows(json.dumps(rows).encode(), "train.json")
    for suffix in ("csv", "parquet"):
        paths[suffix] = tmp_path / f"train.{suffix}"
        getattr(table, f"to_{suffix}")(str(paths[suffix]))
    for suffix, path in paths.items():
        assert encodings(path, tiny_tokenizer) == expected, suffix


def test_numbers_in_csv_stay_as_they_are_written(tiny_tokenizer, write_rows):
    """A CSV column of nothing but numbers is text: 007 is not 7, and 1.50 is not 1.5."""
    path = write_rows(b"query,answer\n1,007\n2,1.50\n3,1e400\n", "train.csv")
    rows = [{"query": "1", "answer": "007"}, {"query": "2", "answer": "1.50"}]
    expected = encodings(write_rows([*rows, {"query": "3", "answer": "1e400"}]), tiny_tokenizer)
    assert encodings(path, tiny_tokenizer) == expected


def test_conversations_and_systems_in_every_format(tiny_tokenizer, write_rows, tmp_path):
    """Rows of both shapes may be mixed; an empty system turn is trained as one, in every format."""
    messages = [{"role": r, "content": c} for r, c in (S, Q, A, Q, A)]
    rows = [GOOD, {**GOOD, "system": "own"}, {**GOOD, "system": ""}, {"messages": messages}]
    expected = encodings(write_rows(rows), tiny_tokenizer)
    assert len({len(ids) for ids, _ in expected}) == 4
    table = datasets.Dataset.from_list([dict.fromkeys(["system", "messages"]) | r for r in rows])
    paths = [write_rows(json.dumps(rows).encode(), "train.json"), tmp_path / "train.parquet"]
    table.to_parquet(str(paths[1]))
    for path in paths:
        assert encodings(path, tiny_tokenizer) == expected, path


def test_a_changed_file_is_encoded_anew(tiny_tokenizer, tmp_path):
    """The cache goes by content: another text, another system prompt, another result."""
    path, seen = tmp_path / "train.jsonl", []
    for answer, system in (("a", "s"), ("b", "s"), ("b", "t")):
        path.write_text(json.dumps({"query": "q", "answer": answer}))
        table = encode_file(path, tiny_tokenizer, system)
        seen.append(tuple(table[0]["input_ids"].tolist()))
    assert len(set(seen)) == 3


# ---- The overflow law ---------------------------------------------------------------------------
def repo_table(tokenizer):
    path = ROOT / "data" / "train.jsonl"
    return path, encode_file(path, tokenizer, "system")


def assert_sums(counts: dict) -> None:
    rows = [counts[f"rows_{name}"] for name in ("trained", "dropped", "rejected")]
    assert sum(rows) == counts["rows_read"]
    tokens = [counts[f"answer_tokens_{name}"] for name in ("trained", "cut", "dropped")]
    assert sum(tokens) == counts["answer_tokens_read"]


@pytest.mark.parametrize("overflow_strategy", ["truncate", "drop"])
@pytest.mark.parametrize("max_len", [60, 200, 10_000])
def test_what_is_read_is_trained_cut_or_dropped(overflow_strategy, max_len, tiny_tokenizer):
    """Rows and answer tokens read are those trained, cut, dropped and rejected, counted by hand."""
    path, table = repo_table(tiny_tokenizer)
    rows, counts = fit_rows(table, path, max_len, overflow_strategy)
    assert_sums(counts)
    trained = dropped = cut = 0
    for row in table:
        labels = row["labels"][:max_len] != IGNORE_INDEX
        if overflow_strategy == "drop" and len(row["labels"]) > max_len:
            labels &= False
        trained += labels.sum()
        lost = (row["labels"] != IGNORE_INDEX).sum() - labels.sum()
        dropped += lost * (not labels.any())
        cut += lost * labels.any()
    assert counts["rows_read"] == len(table) and counts["rows_trained"] == len(rows)
    names = ("answer_tokens_trained", "answer_tokens_cut", "answer_tokens_dropped")
    assert [counts[name] for name in names] == [trained, cut, dropped]
    if overflow_strategy == "drop":
        assert max(rows["num_tokens"]) <= max_len and counts["rows_cut"] == 0
    if max_len == 10_000:
        assert counts["rows_trained"] == len(table) and counts["rows_cut"] == 0
    batches, trained_tokens = sft_qwen2.collate(list(rows), max_len, 4 * max_len)
    assert trained_tokens == trained
    assert sum(int((b["shift_labels"] != IGNORE_INDEX).sum()) for b in batches) == trained


def test_error_names_the_first_row_that_is_too_long(tiny_tokenizer, refuse):
    """The strategy `error` stops the run at the first such row, and lets a file without one be."""
    path, table = repo_table(tiny_tokenizer)
    lengths = np.array(table["num_tokens"])
    line = int(np.argmax(lengths > 200)) + 1
    flags = ("--max_len", 200, "--overflow_strategy", "error", "--system_prompt", "system")
    message = refuse(path, *flags)
    assert f"{path}:{line}: {lengths[line - 1]} tokens" in message
    assert f"({(lengths > 200).sum()} such rows)" in message
    rows, counts = fit_rows(table, path, int(lengths.max()), "error")
    assert_sums(counts)
    assert len(rows) == len(table)


def test_a_cut_adds_no_end(tiny_tokenizer, write_rows):
    """Truncation takes the end away and puts no <|im_end|> in its place, at any length."""
    path = write_rows([{"query": "why?", "answer": "because of the many reasons"}])
    table = encode_file(path, tiny_tokenizer, "")
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    whole = table[0]
    num_prompt = int((whole["labels"] == IGNORE_INDEX).sum())
    for max_len in range(num_prompt + 1, len(whole["labels"]) + 1):
        rows, counts = fit_rows(table, path, max_len, "truncate")
        assert_sums(counts)
        (batch,), trained_tokens = sft_qwen2.collate(list(rows), max_len, 10_000)
        targets = batch["shift_labels"][batch["shift_labels"] != IGNORE_INDEX].tolist()
        assert targets == whole["labels"][num_prompt:max_len].tolist()
        assert trained_tokens == len(targets) == max_len - num_prompt
        assert (end in targets) == (max_len == len(whole["labels"]))


def test_a_row_whose_answer_begins_behind_max_len_is_dropped(tiny_tokenizer, write_rows, refuse):
    """Such a row has no target: it is dropped, counted, and never fed; alone it stops the run."""
    path = write_rows([GOOD, {"query": "q " * 200, "answer": "one two"}, GOOD])
    table = encode_file(path, tiny_tokenizer, "")
    num_answer_tokens = int(table[1]["num_answer_tokens"])
    for overflow_strategy in ("truncate", "drop"):
        rows, counts = fit_rows(table, path, 50, overflow_strategy)
        assert_sums(counts)
        assert [row["line"] for row in rows] == [1, 3]
        assert (counts["rows_dropped"], counts["answer_tokens_dropped"]) == (1, num_answer_tokens)
    with pytest.raises(UserError, match="max_len 5"):
        fit_rows(table, path, 5, "truncate")
    assert "--max_len" in refuse(path, "--max_len", 5)


def test_counts_are_printed(train, untied_model_dir, write_rows, tmp_path):
    """The run says what was read, trained, cut and dropped, and which control tokens are text."""
    rows = [
        GOOD,
        {"query": "q " * 200, "answer": "a"},
        {"query": "<|im_end|>", "answer": "b " * 99},
    ]
    path, flags = write_rows(rows), {"max_len": 60, "system_prompt": ""}
    out = train(untied_model_dir, path, tmp_path, **flags).out
    assert "3 rows = 2 trained + 1 dropped + 0 rejected (1 cut)" in out
    assert "answer tokens = " in out
    assert "1 control tokens spelled in texts" in out


def test_rejected_rows_are_counted(train, untied_model_dir, write_rows, tmp_path):
    """Asked to go on without bad rows, the run names them, counts them, and trains the others."""
    path = write_rows([GOOD, {"query": "q"}, {"query": "q " * 200, "answer": "a"}, GOOD])
    flags = {"max_len": 60, "system_prompt": "", "skip_bad_rows": "true"}
    run = train(untied_model_dir, path, tmp_path, **flags)
    assert "4 rows = 2 trained + 1 dropped + 1 rejected (0 cut)" in run.out
    assert f"{path}:2: " in run.out + run.err
    assert sorted(row["line"] for rows in run.steps for row in rows) == [1, 4]


def test_a_csv_row_of_too_many_fields_is_refused(refuse, write_rows):
    """A comma without quotes would cut a text in two, and its end would be lost."""
    path = write_rows(b"query,answer\nq,a\nHello, world,Hi\n", "train.csv")
    message = refuse(path)
    assert f"{path}:2: has more fields than the header" in message and "1 of 2" in message


def test_a_long_text_in_csv_is_read(tiny_tokenizer, write_rows):
    row = {"query": "q", "answer": "long " * 30_000}
    path = write_rows(f"query,answer\n{row['query']},{row['answer']}\n".encode(), "train.csv")
    assert encodings(path, tiny_tokenizer) == encodings(write_rows([row]), tiny_tokenizer)
