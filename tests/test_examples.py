"""Encoded examples: the cache that keeps them, the selection, and the overflow law."""

import errno
import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import ROOT
from tokenizers import normalizers

import sft_qwen2
from sft import conversations, data_files, encoding_cache, examples
from sft.conversations import parse_record
from sft.encoding_cache import EncodingCache, digest_code
from sft.errors import UserError
from sft.examples import (
    IGNORE_INDEX,
    Examples,
    get_column,
    mark_trained_tokens,
    print_counts,
    select_examples,
    split_examples,
    warn_of_shared_rows,
    write_rejected,
)

GOOD = {"query": "q", "answer": "a"}
Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
TRAIN = ROOT / "data" / "train.jsonl"


def case(name: str, *values):
    return pytest.param(*values, id=name)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of the cache, empty."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sft_examples"


@pytest.fixture
def encode(cache, tiny_tokenizer):
    """A function: a file or files, and what differs from the usual, to their encoded records."""

    def encode(paths, tokenizer=tiny_tokenizer, system_prompt="default", train_on="all"):
        if not isinstance(paths, list):
            paths = [paths]
        args = SimpleNamespace(system_prompt=system_prompt, train_on=train_on)
        return sft_qwen2.encode_files(paths, tokenizer, args)

    return encode


@pytest.fixture
def select(encode, write_rows):
    """A function: records, and what differs from the usual, to the examples selected of them."""

    def select(records, max_len=10_000, overflow_strategy="truncate", skip_bad_rows=False):
        path = write_rows(records)
        return select_examples(encode(path), [path], max_len, overflow_strategy, skip_bad_rows)

    return select


def folders_of(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def wanted_texts(messages: list[dict]) -> list[str]:
    """Return what is trained of a conversation: each answer of weight 1 with its <|im_end|>."""
    texts = []
    for message in messages[2::2]:
        if message.get("weight") != 0:
            texts.append(message["content"] + "<|im_end|>")
    return texts


# ---- What is encoded ----------------------------------------------------------------------------
def test_rows_of_our_own_data_are_encoded_as_the_script_encodes_them(encode, tokenizer):
    encoded = encode(TRAIN, tokenizer=tokenizer)
    lines = TRAIN.read_bytes().splitlines()
    assert len(encoded) == len(lines)
    for row, line in zip(encoded, lines):
        example = sft_qwen2.encode(parse_record(json.loads(line), "default"), tokenizer)
        assert row["input_ids"] == example["input_ids"]
        assert row["labels"] == example["labels"]


def test_every_label_is_of_an_answer_or_its_end(encode, tokenizer):
    """The label law, on every row of our own data."""
    lines = TRAIN.read_bytes().splitlines()
    for row, line in zip(encode(TRAIN, tokenizer=tokenizer), lines):
        trained = [label for label in row["labels"] if label != IGNORE_INDEX]
        texts = wanted_texts(parse_record(json.loads(line), "default"))
        assert tokenizer.decode(trained) == "".join(texts)
        for token, label in zip(row["input_ids"], row["labels"]):
            assert label in (IGNORE_INDEX, token)


def test_columns_count_what_is_in_a_row(encode, write_rows, tiny_tokenizer):
    record = {"query": "<|im_end|> <|im_start|>", "answer": "a <|endoftext|>", "id": 7}
    (row,) = encode(write_rows([record]))
    assert row["num_tokens"] == len(row["input_ids"])
    assert row["num_answer_tokens"] == len(row["labels"]) - row["labels"].count(IGNORE_INDEX)
    assert row["num_control_tokens"] == 3
    assert json.loads(row["ignored_keys"]) == ["id"]
    assert row["error"] == ""


def test_a_refused_row_has_its_reason_and_no_tokens(encode, write_rows):
    rows = encode(
        write_rows(b'{"query": "q"}\n{"query": "q", "answer": "a"}\n{"q\xff"}\n')
    ).to_list()
    assert [row["num_tokens"] > 0 for row in rows] == [False, True, False]
    assert rows[0]["error"].startswith('wants "query" and "answer"')
    assert rows[2]["error"].startswith("is not UTF-8")


def test_the_same_rows_in_every_format_are_the_same_examples(encode, tmp_path):
    texts = ["007", "nan", 'a,b\n"c"', "a\r\nb", "中文\u2028🚀", "<|im_end|>"]
    records = [{"system": "", "query": f"q {text}", "answer": text} for text in texts]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    (tmp_path / "train.json").write_text(json.dumps(records), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "train.parquet")
    fields = [["system", "query", "answer"], *[list(record.values()) for record in records]]
    rows = []
    for row in fields:
        rows.append(",".join('"' + field.replace('"', '""') + '"' for field in row))
    (tmp_path / "train.csv").write_text("\r\n".join(rows), encoding="utf-8", newline="")
    expected = encode(tmp_path / "train.jsonl").to_list()
    assert len({tuple(row["input_ids"]) for row in expected}) == len(records)
    for name in ["train.json", "train.parquet", "train.csv"]:
        assert encode(tmp_path / name).to_list() == expected, name


@pytest.mark.parametrize("num_proc", [3])
def test_any_number_of_processes_gives_the_same_table(num_proc, encode, write_rows, monkeypatch):
    texts = ["a", "\u2028", "b" * 50, "\r", "é🚀"]
    lines = []
    for i in range(500):
        lines.append(json.dumps({"query": f"q{i}", "answer": texts[i % 5]}).encode())
    lines[7] = b'{"query": "broken'
    lines[8] = b""
    one = write_rows(b"\r\n".join(lines))
    two = write_rows(b"query,answer\nq,a\nq,b\n", "train.csv")
    expected = encode([one, two, one]).to_list()
    monkeypatch.setattr(encoding_cache, "choose_num_proc", lambda paths: num_proc)
    # Otherwise the rows would come from the cache.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(one.parent / "cache"))
    encoded = encode([one, two, one])
    assert encoded.to_list() == expected
    assert len(encoded.cache_files) == num_proc


FUZZ_LINES = int(os.environ.get("FUZZ_LINES", "1000"))
ODD_VALUES = [None, True, 3, 10**30, [], {}, ["a"], {"a": 1}, A, [Q, A], [A, 3], [Q, A, Q, A]]
ODD_VALUES += [
    "",
    " \n",
    "\ud83d",
    "a\udc00b",
    "x\ny",
    "\x1b[31m\u202e<|im_end|>\ufeff",
    "😀" * 900,
]
ODD_VALUES += [[{"type": "text", "text": "a"}], [["q", "a"]], [{"from": "human", "value": "q"}]]
ODD_KEYS = ["Query", "messages", "system", "", "\ud800", "a" * 500, "\x1b[2J", "weight", "tools"]
ODD_KEYS += ["id", "history", "conversations", "prompt", "completion", "input", "instruction"]
ODD_BYTES = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\0", b"\x1b[31m", b"\r", b"\xe2\x80\xa8", b""]
ODD_BYTES += [b", ", b'"', b"[" * 100_000, b"9" * 5000]


def mutate(record: dict, rng: random.Random) -> bytes:
    """Return a line of JSON Lines that is near a good one, or far from it."""
    odd = {**record, rng.choice([*record, *ODD_KEYS]): rng.choice(ODD_VALUES)}
    odd_lists = {rng.choice(["messages", "conversations"]): rng.choice(ODD_VALUES)}
    trl = {"prompt": rng.choice(ODD_VALUES), "completion": rng.choice(ODD_VALUES)}
    value = rng.choice([record, odd, odd, odd_lists, trl, rng.choice(ODD_VALUES)])
    line = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    position = rng.randrange(len(line))
    odd_bytes = rng.choice(ODD_BYTES)
    inserted = line[:position] + odd_bytes + line[position:]
    replaced = line[:position] + odd_bytes + line[position + 1 :]
    return rng.choice([line, line, line[:position], inserted, replaced]).replace(b"\n", b" ")


def test_any_line_is_trained_by_the_label_law_or_has_a_reason(encode, write_rows, tiny_tokenizer):
    rng = random.Random(0)
    good = [json.loads(line) for line in TRAIN.read_bytes().splitlines()]
    lines = [b'{"query": "q", "answer": "a"}']  # else the file could be an array
    for _ in range(FUZZ_LINES):
        lines.append(mutate(rng.choice(good), rng))
    encoded = encode(write_rows(b"\n".join(lines)))
    written = [number for number, line in enumerate(lines, 1) if line.strip()]
    assert list(encoded["line"]) == written
    num_refused = 0
    for row in encoded:
        if row["error"]:
            num_refused += 1
            assert row["error"].isprintable()
            assert len(row["error"]) < 500
            assert row["num_tokens"] == 0
            continue
        messages = parse_record(
            json.loads(lines[row["line"] - 1].removeprefix(b"\xef\xbb\xbf")), "default"
        )
        trained = [label for label in row["labels"] if label != IGNORE_INDEX]
        expected = unicodedata.normalize("NFC", "".join(wanted_texts(messages)))
        assert tiny_tokenizer.decode(trained) == expected
    assert 0.1 < num_refused / len(encoded) < 0.9


# ---- The cache ----------------------------------------------------------------------------------
def test_what_is_encoded_is_found_again_by_content(encode, write_rows, monkeypatch):
    rows = encode(write_rows([GOOD])).to_list()

    def fail(*args, **kwargs):
        pytest.fail("encoded twice")

    monkeypatch.setattr(datasets.Dataset, "map", fail)
    assert encode(write_rows([GOOD], "another_name.jsonl")).to_list() == rows


@pytest.mark.parametrize(
    "change", ["content", "system_prompt", "train_on", "tokenizer", "second file"]
)
def test_another_cause_is_encoded_anew(change, encode, write_rows, cache, qwen2_tokenizer):
    path = write_rows([GOOD])
    encode(path)
    if change == "content":
        encode(write_rows([{"query": "q", "answer": "b"}]))
    elif change == "tokenizer":
        encode(path, tokenizer=qwen2_tokenizer)
    elif change == "second file":
        encode([path, path])
    elif change == "train_on":
        encode(path, train_on="last")
    else:
        encode(path, system_prompt="another")
    assert len(folders_of(cache)) == 2


def test_a_tokenizer_that_normalizes_otherwise_is_another(
    encode, write_rows, cache, tiny_model_dir
):
    import transformers

    path = write_rows([GOOD])
    encode(path)
    other = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    other.backend_tokenizer.normalizer = normalizers.Prepend("x")
    encode(path, tokenizer=other)
    assert len(folders_of(cache)) == 2


@pytest.fixture
def find_key(write_rows, tiny_tokenizer):
    """A function that returns the key under which a file's records are kept."""
    path = write_rows([GOOD])

    def find_key() -> str:
        backend = tiny_tokenizer.backend_tokenizer
        return EncodingCache([path], backend, {}, sft_qwen2.encode_records).key

    return find_key


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (sft_qwen2, "encode_texts"),
        (sft_qwen2, "encode_batch"),
        (sft_qwen2, "parse_records"),
        (conversations, "parse_weight"),
        (conversations, "make_object"),
        (examples, "parse_record"),
        (examples, "match_control_tokens"),
        (data_files, "read_csv"),
        (data_files, "skip_blanks"),
    ],
)
def test_other_code_is_encoded_anew(module, name, find_key, monkeypatch):
    key = find_key()
    original = getattr(module, name)

    def changed(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, changed)
    assert find_key() != key


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (conversations, "ROLES", {**conversations.ROLES, "bot": "assistant"}),
        (conversations, "NOT_TEXT", re.compile("\0")),
        (conversations, "WEIGHT_KEYS", ("weight",)),
        (data_files, "BOM", b""),
    ],
)
def test_other_constants_are_encoded_anew(module, name, value, find_key, monkeypatch):
    key = find_key()
    monkeypatch.setattr(module, name, value)
    assert find_key() != key


CODE = '''
LIMIT = 3


def encode(texts):
    """Encode."""
    return helper(texts)  # a comment


def helper(texts):
    return texts[:LIMIT]
'''
MOVED = '''
# This comment moves all lines.
LIMIT = 3


def helper(
    texts: list,
) -> list:
    """Help."""
    # why
    return texts[: LIMIT]


def encode(texts):
    return helper(texts)
'''


@pytest.mark.parametrize(
    ("code", "is_same"),
    [
        case("the same", CODE, True),
        case("comments, layout, annotations", MOVED, True),
        case("another constant", CODE.replace("3", "4"), False),
        case("another helper", CODE.replace("texts[:LIMIT]", "texts[-LIMIT:]"), False),
        case("another function", CODE.replace("helper(texts)  #", "texts  #"), False),
    ],
)
def test_only_what_code_does_counts(code, is_same, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for name, text in {"code_before": CODE, "code_after": code}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        digests.append(digest_code(__import__(name).encode))
    assert (digests[0] == digests[1]) == is_same


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["examples.arrow", "checksums.json"])
@pytest.mark.parametrize("damage", [cut, change_a_byte, empty])
def test_a_damaged_cache_is_said_and_made_again(damage, name, encode, write_rows, cache, capsys):
    path = write_rows([GOOD] * 50)
    expected = encode(path).to_list()
    (folder,) = folders_of(cache)
    damage(folder / name)
    assert encode(path).to_list() == expected
    assert f"{folder} is damaged, so rows are encoded again" in capsys.readouterr().err
    encode(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["examples.arrow", "checksums.json"])
def test_a_cache_of_which_a_file_is_gone_is_made_again(name, encode, write_rows, cache):
    path = write_rows([GOOD] * 50)
    expected = encode(path).to_list()
    (folder,) = folders_of(cache)
    (folder / name).unlink()
    assert encode(path).to_list() == expected


def test_only_the_encoded_rows_and_their_checksums_are_kept(encode, write_rows, cache):
    encode(write_rows([GOOD]))
    (folder,) = folders_of(cache)
    assert sorted(path.name for path in folder.iterdir()) == ["checksums.json", "examples.arrow"]


def test_a_file_that_changes_while_it_is_read_is_refused(write_rows, cache, tiny_tokenizer):
    path = write_rows([GOOD])
    found = EncodingCache([path], tiny_tokenizer.backend_tokenizer, {}, sft_qwen2.encode_records)
    with pytest.raises(UserError, match=f"{path}: changed while it was read"), found.lock():
        path.write_text("another text")
        found.complete()
    assert folders_of(cache) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, UserError])
def test_what_fails_leaves_nothing_behind(error, write_rows, cache, tiny_tokenizer):
    path = write_rows([GOOD])
    found = EncodingCache([path], tiny_tokenizer.backend_tokenizer, {}, sft_qwen2.encode_records)
    with pytest.raises(error), found.lock():
        (found.folder / "examples.arrow").write_bytes(b"half")
        raise error
    assert folders_of(cache) == []


@pytest.mark.parametrize(
    ("code", "said", "not_said"),
    [
        case("full disk", errno.ENOSPC, "make room", "may write"),
        case("quota", errno.EDQUOT, "make room", "may write"),
        case("permission", errno.EACCES, "where you may write", "make room"),
        case("read-only", errno.EROFS, "where you may write", "make room"),
        case("no locks", errno.ENOLCK, "a folder on a local disk", "make room"),
    ],
)
def test_errors_of_the_cache_folder_name_it_and_its_variable(
    code, said, not_said, write_rows, cache, tiny_tokenizer
):
    found = EncodingCache(
        [write_rows([GOOD])], tiny_tokenizer.backend_tokenizer, {}, sft_qwen2.encode_records
    )
    with pytest.raises(UserError) as error, found.lock():
        # As of an error in another process.
        raise OSError(code, "error") from RuntimeError("Traceback (most recent call last)")
    assert str(cache) in str(error.value)
    assert os.strerror(code) in str(error.value)
    assert "Traceback" not in str(error.value)
    assert "HF_DATASETS_CACHE" in str(error.value)
    assert said in str(error.value)
    assert not_said not in str(error.value)


def test_a_cache_folder_that_is_a_file_gets_a_sentence(encode, write_rows, cache):
    cache.parent.write_text("")
    with pytest.raises(UserError, match="set HF_DATASETS_CACHE to a folder"):
        encode(write_rows([GOOD]))


def test_a_folder_that_was_not_used_for_a_month_is_removed(encode, write_rows, cache):
    encode(write_rows([GOOD]))
    (unused,) = folders_of(cache)
    days_ago = time.time() - 31 * 24 * 3600
    os.utime(unused, (days_ago, days_ago))
    encode(write_rows([{"query": "q", "answer": "b"}]))
    assert unused not in folders_of(cache)
    assert len(folders_of(cache)) == 1


def test_a_folder_in_use_stays(encode, write_rows, cache):
    path = write_rows([GOOD])
    encode(path)
    (used,) = folders_of(cache)
    days_ago = time.time() - 29 * 24 * 3600
    os.utime(used, (days_ago, days_ago))
    encode(path)  # uses the folder today
    assert used.stat().st_mtime > time.time() - 3600


def test_what_others_keep_beside_stays(encode, write_rows, cache):
    others = cache / "of_others"
    others.mkdir(parents=True)
    os.utime(others, (0, 0))
    encode(write_rows([GOOD]))
    assert others.exists()


ENCODE_IN_A_PROCESS = """
import signal, sys, time
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it

sys.path.insert(0, {root!r})
import tokenizers

from sft.data_files import read_records
from sft.encoding_cache import EncodingCache


def encode_records(batch):
    with open({log!r}, "a") as file:
        file.write("a batch\\n")
    time.sleep({seconds})
    return {{"num_tokens": [1] * len(batch["text"])}}


paths = [Path({path!r})]
tokenizer = tokenizers.Tokenizer.from_file({tokenizer!r})
cache = EncodingCache(paths, tokenizer, {{}}, read_records)
try:
    with cache.lock():
        if not cache.is_complete:
            records = read_records(paths, cache.folder)
            options = dict(num_proc={num_proc}, cache_file_name=cache.file_name)
            records.map(encode_records, batched=True, new_fingerprint="0", **options)
            cache.complete()
    print(len(cache.load()))
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.fixture
def start_process(tmp_path, tiny_model_dir, write_rows):
    """A function that starts a process which encodes 300 rows and writes down when it does."""
    path = write_rows([GOOD] * 300)

    def start(seconds: int, num_proc: int | None):
        code = ENCODE_IN_A_PROCESS.format(
            root=str(ROOT),
            num_proc=num_proc,
            log=str(tmp_path / "log"),
            seconds=seconds,
            tokenizer=str(tiny_model_dir / "tokenizer.json"),
            path=str(path),
        )
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    return start


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_one_process_encodes_while_others_wait(start_process, tmp_path):
    first = start_process(seconds=3, num_proc=None)
    wait_for(tmp_path / "log")
    second = start_process(seconds=0, num_proc=None)
    outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert outputs == ["300\n", "300\n"]
    num_batches = len((tmp_path / "log").read_text().splitlines())
    assert num_batches == 1  # 300 rows


@pytest.mark.slow
def test_a_process_that_was_killed_leaves_work_to_the_next(start_process, tmp_path):
    first = start_process(seconds=600, num_proc=None)
    wait_for(tmp_path / "log")
    first.kill()
    first.communicate()
    second = start_process(seconds=0, num_proc=None)
    assert second.communicate(timeout=120)[0] == "300\n"


@pytest.mark.slow
def test_ctrl_c_ends_the_processes_that_encode_without_a_traceback(start_process, tmp_path):
    process = start_process(seconds=600, num_proc=2)
    wait_for(tmp_path / "log")
    os.killpg(process.pid, 2)  # as a terminal does: all processes get the signal
    output, error = process.communicate(timeout=120)
    assert output == "stopped\n"
    assert "Traceback" not in error


# ---- The overflow law ---------------------------------------------------------------------------
@pytest.fixture
def mixed_rows(encode, write_rows):
    """Rows of our own data and of all kinds: two turns, one refused, one long; with their paths."""
    context = {**A, "weight": 0}
    more = write_rows(
        [
            {"messages": [Q, context, Q, A]},
            {"query": "q"},
            {"query": "q " * 99, "answer": "a"},
            {"query": "q", "answer": "a " * 400},
        ]
    )
    paths = [TRAIN, more]
    return encode(paths), paths


@pytest.mark.parametrize("overflow_strategy", ["truncate", "drop"])
@pytest.mark.parametrize("max_len", [60, 200, 10_000])
def test_rows_and_answer_tokens_add_up(overflow_strategy, max_len, mixed_rows):
    """All that is read is trained, cut, dropped or rejected: compared with a count by hand."""
    encoded, paths = mixed_rows
    chosen = select_examples(encoded, paths, max_len, overflow_strategy, skip_bad_rows=True)
    num_trained = 0
    trained_tokens = 0
    cut_tokens = 0
    dropped_tokens = 0
    for row in encoded:
        labels = np.array(row["labels"])
        kept = np.count_nonzero(labels[:max_len] != IGNORE_INDEX)
        if overflow_strategy == "drop" and len(labels) > max_len:
            kept = 0
        lost = np.count_nonzero(labels != IGNORE_INDEX) - kept
        trained_tokens += kept
        if kept:
            num_trained += 1
            cut_tokens += lost
        else:
            dropped_tokens += lost
    counts = chosen.counts
    assert counts.num_trained == num_trained == len(chosen)
    assert counts.num_rejected == 1
    assert counts.num_rows == len(encoded)
    assert counts.num_rows == counts.num_trained + counts.num_dropped + counts.num_rejected
    assert counts.trained_tokens == trained_tokens
    assert counts.cut_tokens == cut_tokens
    assert counts.dropped_tokens == dropped_tokens
    assert counts.answer_tokens == trained_tokens + cut_tokens + dropped_tokens
    assert counts.files[str(paths[1])][0] == 4
    assert sum(trained for _, trained in counts.files.values()) == num_trained


@pytest.mark.parametrize("max_len", [60, 200, 10_000])
def test_an_example_is_its_row_cut_to_max_len(max_len, mixed_rows):
    encoded, paths = mixed_rows
    chosen = select_examples(encoded, paths, max_len, "truncate", skip_bad_rows=True)
    rows = {f"{paths[row['file']]}:{row['line']}": row for row in encoded}
    for i, example in enumerate(chosen):
        row = rows[example["source"]]
        assert example["input_ids"].tolist() == row["input_ids"][:max_len]
        assert example["labels"].tolist() == row["labels"][:max_len]
        assert chosen.lengths[i] == len(example["input_ids"])
        assert chosen.num_answer_tokens[i] == np.count_nonzero(example["labels"] != IGNORE_INDEX)
        assert chosen.num_answer_tokens[i] > 0


def test_a_cut_example_has_no_false_end(select, tiny_tokenizer):
    (example,) = select([{"query": "q", "answer": "a " * 400}], max_len=50)
    assert example["labels"][-1] != tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_row_of_exactly_max_len_tokens_is_not_dropped(select):
    (row,) = select([GOOD])
    (example,) = select([GOOD], max_len=len(row["labels"]), overflow_strategy="drop")
    assert np.array_equal(example["labels"], row["labels"])


def test_a_long_row_stops_the_run_if_that_is_asked(encode, write_rows):
    path = write_rows([GOOD, {"query": "q " * 200, "answer": "one two"}])
    encoded = encode(path)
    longest = int(get_column(encoded, "num_tokens").max())
    with pytest.raises(UserError, match=f"{path}:2: {longest} tokens, and max_len is 50 "):
        select_examples(encoded, [path], 50, "error", False)
    assert len(select_examples(encoded, [path], longest, "error", False)) == 2


@pytest.mark.parametrize("overflow_strategy", ["truncate", "drop"])
def test_where_nothing_fits_the_needed_max_len_is_said(overflow_strategy, encode, write_rows):
    path = write_rows([{"query": "q", "answer": "a"}, {"query": "q " * 99, "answer": "a"}])
    encoded = encode(path)
    shortest, longest = get_column(encoded, "num_tokens").tolist()
    with pytest.raises(UserError) as error:
        select_examples(encoded, [path], 5, overflow_strategy, False)
    assert f"rows have {shortest} to {longest} tokens" in str(error.value)
    assert f"raise --max_len to {shortest} or more" in str(error.value)


@pytest.mark.parametrize(("num_long", "is_warned"), [(1, False), (2, True), (3, True)])
def test_a_half_of_the_rows_dropped_is_a_warning(num_long, is_warned, select, capsys):
    long = [{"query": "q " * 99, "answer": "a"}] * num_long
    chosen = select([*long, *[GOOD] * (4 - num_long)], max_len=60)
    print_counts("train", chosen.counts)
    said = f"warning    {num_long} of 4 rows are dropped for their length; raise --max_len"
    assert (said in capsys.readouterr().out) == is_warned


# ---- Rows that are refused ----------------------------------------------------------------------
def test_equal_refusals_are_one_reason_with_its_first_places(select):
    with pytest.raises(UserError) as error:
        select([GOOD, *[{"query": "q"}] * 30, {"query": "q", "answer": 5}])
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith('30 rows: wants "query" and "answer"')
    assert re.fullmatch(r" +\S+:2, \S+:3, \S+:4, \.\.\.", lines[1])
    assert re.fullmatch(r'\S+:32: its "answer" is not a string', lines[2])
    assert lines[3].startswith("31 of 32 rows are refused; fix them, or train without them")


def test_at_most_twenty_reasons_are_shown(select):
    records = [{f"key{i}": "q"} for i in range(25)]
    with pytest.raises(UserError) as error:
        select([GOOD, *records])
    lines = str(error.value).splitlines()
    assert len(lines) == 22
    assert lines[20] == "... and 5 other reasons"


@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_where_all_rows_are_refused_skipping_is_no_advice(skip_bad_rows, select):
    with pytest.raises(UserError) as error:
        select([{"query": "q"}] * 3, skip_bad_rows=skip_bad_rows)
    assert "all 3 rows are refused; fix them" in str(error.value)
    assert "skip_bad_rows" not in str(error.value)


def test_skipped_rows_are_said(select, capsys):
    chosen = select([GOOD, {"query": "q"}], skip_bad_rows=True)
    assert len(chosen) == 1
    assert "1 of 2 rows are refused" in capsys.readouterr().out


def test_refused_rows_are_written_down(select, tmp_path):
    chosen = select([GOOD, {"query": "中"}, {"query": "q", "answer": 5}], skip_bad_rows=True)
    write_rejected({"train": chosen}, str(tmp_path))
    text = (tmp_path / "rejected.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["source"].rsplit(":")[-1] for row in rows] == ["2", "3"]
    assert rows[1]["error"] == 'its "answer" is not a string'


def test_a_file_behind_a_link_is_not_overwritten(select, tmp_path):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "rejected.jsonl").symlink_to(tmp_path / "notes")
    write_rejected({"train": select([GOOD])}, str(tmp_path))
    assert (tmp_path / "notes").read_text() == "mine"


# ---- A share of the rows for validation ---------------------------------------------------------
def numbered(count: int) -> list[dict]:
    return [{"query": f"q{i}", "answer": f"a{i}"} for i in range(count)]


def sources(chosen) -> list[str]:
    return [example["source"] for example in chosen]


def test_rows_drawn_for_validation_are_not_trained(select):
    chosen = select(numbered(50))
    train, validation = split_examples(chosen, 0.1, seed=1)
    assert len(validation) == 5
    assert not set(sources(train)) & set(sources(validation))
    assert sorted(sources(train) + sources(validation)) == sorted(sources(chosen))


def test_the_seed_draws_them(select):
    chosen = select(numbered(50))
    drawn = [sources(split_examples(chosen, 0.1, seed)[1]) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_counts_are_numbers_that_json_writes(select):
    train, validation = split_examples(select(numbered(50)), 0.1, seed=1)
    for counts in (train.counts, validation.counts):
        assert json.loads(json.dumps(asdict(counts))) == asdict(counts)


def test_rows_drawn_for_validation_are_counted(select):
    chosen = select([*numbered(50), {"query": "q"}], skip_bad_rows=True)
    train, validation = split_examples(chosen, 0.1, seed=1)
    counts = train.counts
    assert counts.num_rows == 51
    assert counts.num_rows == counts.num_trained + counts.num_held_out + counts.num_rejected
    assert counts.answer_tokens == counts.trained_tokens + counts.held_out_tokens
    assert counts.trained_tokens == train.num_answer_tokens.sum()
    assert counts.held_out_tokens == validation.counts.trained_tokens
    assert [trained for _, trained in counts.files.values()] == [45]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.999, 1.0, 1.5, -0.1, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(share, select):
    with pytest.raises(UserError, match="--validation_split"):
        split_examples(select(numbered(50)), share, seed=1)


def test_validation_rows_that_are_trained_are_a_warning(select, capsys):
    train = select(numbered(20))
    capsys.readouterr()
    warn_of_shared_rows(train, select(numbered(25)[17:]))
    out = capsys.readouterr().out
    assert out.startswith("warning    3 of 8 validation rows are training rows, too")
    assert re.search(r":1, \S+:2, \S+:3\)", out)


def test_other_rows_are_no_warning(select, capsys):
    train = select(numbered(20))
    capsys.readouterr()
    warn_of_shared_rows(train, select(numbered(25)[20:]))
    assert capsys.readouterr().out == ""


# ---- The digest that a resume compares ----------------------------------------------------------
def test_the_digest_is_of_the_content_not_of_the_place(select):
    assert select(numbered(9)).digest() == select(numbered(9)).digest()


def test_the_digest_is_of_the_order(select):
    chosen = select(numbered(9))
    assert chosen.digest([2, 1, 0]) == chosen.digest(np.array([2, 1, 0]))
    assert chosen.digest([2, 1, 0]) != chosen.digest([0, 1, 2])


@pytest.mark.parametrize(
    "records",
    [
        case("another text", [GOOD, {"query": "q", "answer": "b"}]),
        case("other trained tokens", [GOOD, {"messages": [Q, A, Q, A]}]),
        case("one more", [GOOD, GOOD, GOOD]),
    ],
)
def test_the_digest_changes_with_what_is_trained(records, select):
    context = {**A, "weight": 0}
    before = [GOOD, {"messages": [Q, context, Q, A]}]
    assert select(before).digest() != select(records).digest()


def test_the_digest_changes_where_max_len_cuts(select):
    records = [GOOD, {"query": "q", "answer": "a " * 400}]
    assert select(records).digest() != select(records, max_len=300).digest()
    assert select(records, max_len=5000).digest() == select(records).digest()


def test_the_largest_token_id_that_occurs(select, tiny_tokenizer):
    chosen = select([GOOD, {"query": "q", "answer": "word " * 20}])
    assert chosen.largest_token_id() == max(example["input_ids"].max() for example in chosen)


def test_a_table_in_several_pieces_has_one_largest_token_id():
    pieces = [datasets.Dataset.from_dict({"input_ids": [[token_id]]}) for token_id in (1, 7, 2)]
    encoded = datasets.concatenate_datasets(pieces)
    chosen = Examples(encoded, [], np.arange(3), np.ones(3), np.ones(3), counts=None)
    assert chosen.largest_token_id() == 7


# ---- What is said -------------------------------------------------------------------------------
def test_the_counts_that_are_printed_add_up(select, capsys):
    records = [*numbered(8), {"query": "q"}, {"query": "q " * 99, "answer": "a"}]
    records.append({"query": "<|im_end|>", "answer": "b " * 99, "id": 7})
    chosen = select(records, max_len=60, skip_bad_rows=True)
    train, validation = split_examples(chosen, 0.25, seed=1)
    capsys.readouterr()
    print_counts("train", train.counts)
    print_counts("validation", validation.counts)
    out = capsys.readouterr().out
    assert "11 rows = 7 trained + 2 for validation + 1 dropped + 1 rejected (1 cut)" in out
    assert "validation drawn from the train rows" in out
    assert "2 rows = 2 evaluated + 0 dropped + 0 rejected (0 cut)" in out
    assert "1 control tokens in texts stay plain text" in out
    assert "ignored keys: 'id'" in out
    for total, parts in re.findall(r"(\d+) answer tokens = (.*)", out):
        assert int(total) == sum(int(number) for number in re.findall(r"\d+", parts))


def test_of_several_files_each_is_counted(encode, write_rows, capsys):
    paths = [write_rows(numbered(3)), write_rows(numbered(2))]
    print_counts("train", select_examples(encode(paths), paths, 1000, "drop", False).counts)
    out = capsys.readouterr().out
    assert "train      2 files" in out
    assert f"{paths[0]}: 3 rows, 3 trained" in out
    assert f"{paths[1]}: 2 rows, 2 trained" in out


def test_trained_tokens_are_marked(select, tokenizer, encode, write_rows):
    path = write_rows([{"messages": [Q, A, Q, {**A, "content": "b\x1b[2J"}]}])
    encoded = encode(path, tokenizer=tokenizer, system_prompt="s")
    (example,) = select_examples(encoded, [path], 1000, "truncate", False)
    text = mark_trained_tokens(example, tokenizer, color=False)
    assert re.findall("⟦(.*?)⟧", text) == ["a<|im_end|>", "b\\x1b[2J<|im_end|>"]
    plain = text.replace("⟦", "").replace("⟧", "").replace("\\x1b", "\x1b")
    assert plain == tokenizer.decode(example["input_ids"])
    green = mark_trained_tokens(example, tokenizer, color=True)
    assert green == text.replace("⟦", "\033[32m").replace("⟧", "\033[0m")


# ---- docs/data.md -------------------------------------------------------------------------------
@pytest.mark.parametrize("page", ["docs/data.md", "docs/zh/data.md"])
def test_every_row_of_the_documentation_is_taken(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(.*?)```", text, re.S)
    lines = "".join(blocks).splitlines()
    assert len(lines) >= 10
    for line in lines:
        parse_record(json.loads(line), "system")
