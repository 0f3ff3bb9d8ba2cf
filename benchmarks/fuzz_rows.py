"""Feed the row reader with broken JSONL: each line is either encoded, or named with a reason.

    python benchmarks/fuzz_rows.py --lines 10000

The lines are rows of data/train.jsonl with bytes flipped, keys dropped or doubled, types changed,
nested deeply, very long, with control characters, BOM, invalid UTF-8, half surrogate pairs, cut
short. Checked of each line that passes: every label is its token or -100, and the trained tokens
decode to the answers and their <|im_end|>. No line may raise, hang, or make memory grow.
"""

import argparse
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(ROOT))

import sft_qwen2  # noqa: E402

CONTROLS = ["\0", "\x1b[31m", "\r", "\x07", "\u2028", "\ufeff", "\u202e", "\x85", "<|im_end|>"]
VALUES = [None, True, 3, -1.5e300, 10**30, [], {}, "", " \n", ["a"], {"a": 1}, [[]], "\ud83d", "😀"]


def dumps(row, rng: random.Random) -> bytes:
    return json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def flip_bytes(row: dict, rng: random.Random) -> bytes:
    line = bytearray(dumps(row, rng))
    for _ in range(rng.randint(1, 8)):
        line[rng.randrange(len(line))] ^= 1 << rng.randrange(8)
    return bytes(line)


def drop_key(row: dict, rng: random.Random) -> bytes:
    gone = rng.choice(list(row))
    return dumps({key: value for key, value in row.items() if key != gone}, rng)


def double_key(row: dict, rng: random.Random) -> bytes:
    key = rng.choice(list(row))
    return dumps(row, rng)[:-1] + b", " + dumps({key: row[key]}, rng)[1:]


def change_key(row: dict, rng: random.Random) -> bytes:
    key = rng.choice(list(row))
    other = rng.choice(["Query", "messages", "system", "", "\ud800", "a" * 500, "\x1b[2J", "x\ny"])
    return dumps({other if k == key else k: v for k, v in row.items()}, rng)


def change_value(row: dict, rng: random.Random) -> bytes:
    return dumps(row | {rng.choice([*row, "system"]): rng.choice(VALUES)}, rng)


def make_turns(row: dict, rng: random.Random) -> bytes:
    """Messages, with roles that alternate or not, or with something else among them."""
    roles = ["user", "assistant"] * rng.randint(1, 4)
    roles = [*rng.choice([[], ["system"]]), *roles]
    if rng.random() < 0.5:
        other = ["user", "tool", "system", 3, None, [], "\udc00", "x\ny", "ß" * 300]
        roles[rng.randrange(len(roles))] = rng.choice(other)
    turns = [{"role": role, "content": rng.choice(list(row.values()))} for role in roles]
    if rng.random() < 0.3:
        turns[rng.randrange(len(turns))] = rng.choice([*VALUES, {"role": "user"}])
    return dumps({"messages": rng.choice([turns, turns, turns, *VALUES])}, rng)


def nest(row: dict, rng: random.Random) -> bytes:
    depth = rng.choice([2, 50, 900, 5_000, 100_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    cut = rng.choice([depth, depth, depth // 2])
    return b'{"query": "q", "answer": ' + opening * depth + b"1" + closing * cut + b"}"


def make_long(row: dict, rng: random.Random) -> bytes:
    text = rng.choice(["a", "é", "学", " ", "a b ", "😀", "1", "\n"]) * rng.choice(
        [10_000, 200_000]
    )
    return dumps(row | {rng.choice(["query", "answer"]): text + rng.choice(["", "."])}, rng)


def add_controls(row: dict, rng: random.Random) -> bytes:
    key = rng.choice(list(row))
    text = row[key] if isinstance(row[key], str) else ""
    at = rng.randint(0, len(text))
    text = text[:at] + rng.choice(CONTROLS) * rng.randint(1, 3) + text[at:]
    return dumps(row | {key: text}, rng)


def add_raw_bytes(row: dict, rng: random.Random) -> bytes:
    line, raw = dumps(row, rng), [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\0"]
    at = rng.randint(0, len(line))
    return line[:at] + rng.choice([*raw, b"\x1b", b"\r", b"\xe2\x80\xa8"]) + line[at:]


def add_half_pair(row: dict, rng: random.Random) -> bytes:
    return dumps(
        row | {rng.choice(list(row)): rng.choice(["\ud83d", "a\udc00b", "\ude00\ud83d"])}, rng
    )


def begin_with_bom(row: dict, rng: random.Random) -> bytes:
    return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"]) + dumps(row, rng)


def encode_otherwise(row: dict, rng: random.Random) -> bytes:
    return dumps(row, rng).decode("utf-8", "replace").encode(rng.choice(["utf-16", "gb18030"]))


def cut_short(row: dict, rng: random.Random) -> bytes:
    line = dumps(row, rng)
    return line[: rng.randrange(len(line))]


def be_something_else(row: dict, rng: random.Random) -> bytes:
    digits = b'{"query": ' + b"9" * rng.choice([10, 5000]) + b', "answer": "a"}'
    others = [
        b"null",
        b"[]",
        b"1",
        b'"text"',
        b"NaN",
        b"",
        b" \t",
        b"\x0b\x0c",
        b"{}",
        b"//",
        digits,
    ]
    return rng.choice(others)


def change_nothing(row: dict, rng: random.Random) -> bytes:
    return dumps(row, rng)


RARE = (nest, make_long)  # they take most of the time
MUTATIONS = (
    *(flip_bytes, drop_key, double_key, change_key, change_value, make_turns, add_controls),
    *(add_raw_bytes, add_half_pair, begin_with_bom, encode_otherwise, cut_short),
    *(be_something_else, change_nothing),
)


def mutated_lines(count: int, seed: int):
    """Yield count lines, as bytes with the \\n that ends them."""
    rng = random.Random(seed)
    lines = (ROOT / "data" / "train.jsonl").read_bytes().splitlines()
    rows = [row for row in map(json.loads, lines) if len(str(row)) < 1000 and "query" in row]
    for _ in range(count):
        mutation = rng.choice(RARE if rng.random() < 0.02 else MUTATIONS)
        yield mutation(rng.choice(rows), rng) + b"\n"


def check_example(turns: list[dict], example: dict, tokenizer) -> None:
    """Assert the label law of an encoded row."""
    input_ids, labels = example["input_ids"], example["labels"]
    pairs = zip(input_ids, labels)
    assert all(label in (sft_qwen2.IGNORE_INDEX, token) for token, label in pairs)
    trained = [label for label in labels if label != sft_qwen2.IGNORE_INDEX]
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    expected = "".join(unicodedata.normalize("NFC", text) + sft_qwen2.IM_END for text in answers)
    assert tokenizer.decode(trained, clean_up_tokenization_spaces=False) == expected
    start = tokenizer.convert_tokens_to_ids(sft_qwen2.IM_START)
    assert input_ids.count(start) == len(turns)


def check_line(line: bytes, tokenizer) -> str | None:
    """Return why the line is refused, or None where it is encoded, as it should be."""
    try:
        turns = sft_qwen2.parse_row(sft_qwen2.parse_json(line), "system")
    except ValueError as error:
        reason = str(error)
        reason.encode()  # a reason is printed, and kept in an Arrow table
        assert 0 < len(reason) < 500 and reason.isprintable(), repr(reason)
        return reason
    check_example(turns, sft_qwen2.encode(turns, tokenizer), tokenizer)
    return None


def check_lines(path: Path, tokenizer) -> dict:
    """Check every line of the file by itself; return {line number: reason} and figures."""
    reasons, slowest_s, encoded = {}, 0.0, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            began = time.monotonic()
            try:
                reason = check_line(line, tokenizer)
            except Exception as error:
                raise AssertionError(f"line {number}: {line[:300]!r}") from error
            slowest_s = max(slowest_s, time.monotonic() - began)
            reasons |= {number: reason} if reason else {}
            encoded += reason is None
    return {"encoded": encoded, "reasons": reasons, "slowest_line_s": round(slowest_s, 2)}


def check_file(path: Path, tokenizer, checked: dict) -> None:
    """Assert that the whole file, read as in training, gives what its lines gave."""
    table = sft_qwen2.encode_file(path, tokenizer, "system")
    errors = {row["line"]: row["error"] for row in table.select_columns(["line", "error"])}
    assert {line: error for line, error in errors.items() if error} == checked["reasons"]
    _, counts = sft_qwen2.fit_rows(table, path, 8192, "truncate", True)
    assert counts["rows_read"] == checked["encoded"] + len(checked["reasons"])
    assert counts["rows_rejected"] == len(checked["reasons"])
    for what, others in {
        "rows": ("dropped", "rejected"),
        "answer_tokens": ("cut", "dropped"),
    }.items():
        parts = [counts[f"{what}_{name}"] for name in ("trained", *others)]
        assert counts[f"{what}_read"] == sum(parts), counts


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def fuzz(count: int, seed: int, folder: Path) -> dict:
    """Make the lines, check them one by one and as a file; return figures."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    tokenizer = sft_qwen2.load_tokenizer(str(ROOT / "data" / "tiny-qwen2"), "system")
    path, peaks = folder / "fuzz.jsonl", {}
    for part in (count // 10, count):  # memory is flat if ten times the lines need no more
        with open(path, "wb") as file:
            file.writelines(mutated_lines(part, seed))
        checked = check_lines(path, tokenizer)
        check_file(path, tokenizer, checked)
        peaks[f"peak_gib_at_{part}"] = round(peak_gib(), 3)
    kinds = Counter(re.split("[:;(]", reason)[0].strip() for reason in checked["reasons"].values())
    checked |= {"lines": count, "refused": len(checked.pop("reasons")), **peaks}
    return {**checked, "reasons": dict(kinds.most_common())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    sft_qwen2.quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        figures = fuzz(args.lines, args.seed, Path(folder))
    figures["total_s"] = round(time.monotonic() - began, 1)
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
