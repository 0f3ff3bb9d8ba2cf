"""The stand-in model of data/: it learns something true, from rows that do not hold the answers."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"


@pytest.fixture(scope="module")
def maker():
    """data/make_tiny_qwen2.py as a module."""
    spec = importlib.util.spec_from_file_location("make_tiny_qwen2", DATA / "make_tiny_qwen2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_rows(name: str) -> list[dict]:
    lines = (DATA / name).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def row_text(row: dict) -> str:
    turns = [turn["content"] for turn in row.get("messages", [])]
    return "\n".join([*turns, *(row[key] for key in ("query", "answer") if key in row)])


def numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", text))


def says(text: str, name: str) -> bool:
    """Whether the text has the name: English as a whole word, of any case; Chinese anywhere."""
    if name.isascii():
        return re.search(rf"(?<![a-z]){name}(?![a-z])", text, re.IGNORECASE) is not None
    return name in text


def number_words(maker, text: str) -> list[str]:
    """The numbers from 10 to 999 that the text spells in English or in Chinese."""
    spelled = {maker.in_english(n): str(n) for n in range(10, 1000)}
    spelled |= {maker.in_chinese(n): str(n) for n in range(10, 1000)}
    english = re.findall(r"[a-z]+(?:-[a-z]+)?(?: hundred(?: and [a-z]+(?:-[a-z]+)?)?)?", text)
    chinese = re.findall(f"[{maker.CHINESE_DIGITS}十百]+", text)
    return [spelled[found] for found in english + chinese if found in spelled]


def facts(maker) -> list[list[set[str]]]:
    """Each fact of the tables as two sets of names: [{Norway, 挪威}, {Oslo, 奥斯陆}]."""
    found = [[{row[0]}, {row[1]}] for row in maker.table(maker.WORDS)]
    for table in (maker.CAPITALS, maker.OPPOSITES, maker.ELEMENTS):
        found += [[{row[0], row[2]}, {row[1], row[3]}] for row in maker.table(table)]
    return found


def contents(maker, row: dict) -> set[tuple]:
    """What a row asks or tells, apart from its wording and language."""
    text = row_text(row).replace("从小到大", "")  # sorting, not the opposites 大 and 小
    sides = [[any(says(text, name) for name in names) for names in fact] for fact in facts(maker)]
    found = {("fact", i) for i, (left, right) in enumerate(sides) if left and right}
    found |= {("number", n) for n in number_words(maker, text) if n in numbers(text)}
    units = [{large, large_zh} for large, _, large_zh, _, _ in maker.table(maker.UNITS)]
    small = [{small, small_zh} for _, small, _, small_zh, _ in maker.table(maker.UNITS)]
    for i, (one, other) in enumerate(zip(units, small, strict=True)):
        if all(any(name in text for name in names) for names in (one, other)):
            counted = re.findall(rf"(\d+) ?(?:{'|'.join(sorted(one))})", text)
            found |= {("unit", i, n) for n in counted}
    for a, sign, b in re.findall(r"(\d+) ([+×加乘]) (?=(\d+))", text):
        found.add(("+" if sign in "+加" else "×", *numbers(f"{a} {b}")))
    user_turns = [turn["content"] for turn in row.get("messages", []) if turn["role"] == "user"]
    for query in (row.get("query", ""), *user_turns):
        asked, told = numbers(query), numbers(row_text(row))
        if len(asked) == 2:  # in any words and order; the result tells what is done with them
            a, b = map(int, asked)
            signs = [sign for sign, c in (("+", a + b), ("×", a * b)) if str(c) in told]
            found |= {(sign, *asked) for sign in signs or ["<"]}
        elif len(asked) > 2:
            found.add(("sorted", *asked))
    return found


def test_every_question_has_a_content_and_its_answer_is_true(maker):
    """The 40 held-out questions, 20 in each language, ask for 40 different things."""
    rows = read_rows("validation.jsonl")
    asked = [contents(maker, row) for row in rows]
    assert all(asked)
    assert len(rows) == len(set().union(*asked)) == 40
    assert sum(row["query"].isascii() or "×" in row["query"] for row in rows) >= 20
    assert sum(re.search("[一-鿿]", row["answer"] + row["query"]) is not None for row in rows) >= 20
    for row in rows:
        if equation := re.fullmatch(r"(\d+) ([+×加乘]) (\d+) (?:=|等于) (\d+)[.。]", row["answer"]):
            a, sign, b, c = equation.groups()
            assert int(c) == (int(a) + int(b) if sign in "+加" else int(a) * int(b))


def test_what_is_asked_is_in_no_form_in_the_training_rows(maker):
    """No training row has a held-out question's fact, sum, number, ... in any words or language."""
    held_out = set().union(*(contents(maker, row) for row in read_rows("validation.jsonl")))
    for number, row in enumerate(read_rows("train.jsonl"), 1):
        assert not contents(maker, row) & held_out, f"train.jsonl:{number}"


def test_the_base_has_not_read_what_is_asked(maker):
    """Of facts it reads statements, but no question; of sums and the like not even those."""
    items = maker.held_out_items()
    asked = {name: {item.key for item in items[name]} for name in items}
    questions, secrets = set(), set()
    for name, task in maker.TASKS.items():
        for item in items[name]:
            for language in maker.LANGUAGES:
                forms, values = getattr(task, language), getattr(item, language)
                questions |= {question.format(**values) for question in forms.questions}
                secrets |= set() if task.facts else {forms.answer.format(**values)}
    held_out = {row["query"] for row in read_rows("validation.jsonl")}
    assert held_out <= questions and all(len(keys) == 4 for keys in asked.values())
    documents = maker.draw_documents(seed=0)
    texts = "\n".join(next(documents) for _ in range(4_000))
    unseen = sorted(questions | secrets)
    assert [
        text for text in unseen if re.search(rf"(?<!\d)(?<!\d, ){re.escape(text)}", texts)
    ] == []


def test_the_rows_are_those_that_the_script_writes(maker):
    train, validation = maker.question_rows()
    assert read_rows("validation.jsonl") == validation
    assert read_rows("train.jsonl")[: len(train)] == train


def test_the_training_rows_show_every_feature():
    """Beside the short questions: several turns, own system prompts, code, Chinese, long rows."""
    rows = read_rows("train.jsonl")
    assert len(rows) >= 150
    turns = [row["messages"] for row in rows if "messages" in row]
    assert len(turns) >= 20 and any(len(messages) >= 6 for messages in turns)
    assert sum(messages[0]["role"] == "system" for messages in turns) >= 3
    assert sum("system" in row for row in rows) >= 4
    assert sum("```" in row_text(row) for row in rows) >= 5
    assert max(len(row_text(row)) for row in rows) > 3000


def test_the_weights_are_small_and_the_configuration_qwen2s(tiny_model_dir, tiny_tokenizer):
    assert (tiny_model_dir / "model.safetensors").stat().st_size <= 8_000_000
    config = json.loads((tiny_model_dir / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["tie_word_embeddings"]
    assert (config["dtype"], config["max_position_embeddings"]) == ("bfloat16", 32768)
    assert config["vocab_size"] == len(tiny_tokenizer)
    assert json.loads((DATA / "tiny.json").read_text())["system_prompt"].isascii()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 7])
def test_fine_tuning_teaches_what_was_not_trained(seed, tmp_path):
    """The README's first command: held-out answers exact after training, and none before it."""
    argv = ["sft_qwen2.py", "data/tiny.json", "--output_dir", tmp_path / "out", "--seed", seed]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    exact = r"^exact +(\d+) of (\d+) held-out answers \(before: (\d+)\)"
    found = re.search(exact, done.stdout, re.MULTILINE)
    right, asked, before = map(int, found.groups())
    assert asked == len(read_rows("validation.jsonl")) and before == 0
    assert right >= 0.8 * asked
