"""The stand-in model of data/ has read nothing of what is asked, nor do the training rows tell it.

Whether the model learns to answer is tested with the README's first command.
"""

import importlib.util
import itertools
import json
import re
import sys

import pytest
from runs import ROOT, TINY

DATA = ROOT / "data"
# These lines speak of other things: fractions, the ways two dice fall, the order of numbers.
NO_FACTS = re.compile(r"\d+/\d+|36 种|从小到大")


@pytest.fixture(scope="module")
def maker():
    """tools/make_tiny_qwen2.py as a module."""
    path = ROOT / "tools" / "make_tiny_qwen2.py"
    spec = importlib.util.spec_from_file_location("make_tiny_qwen2", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for the module of a class
    spec.loader.exec_module(module)
    return module


def read_rows(name: str) -> list[dict]:
    with open(DATA / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_text(row: dict) -> str:
    """Return what is said in a row: its turns, or its question and answer, a line each."""
    texts = [turn["content"] for turn in row.get("messages", [])]
    for key in ("query", "answer"):
        if key in row:
            texts.append(row[key])
    return "\n".join(texts)


def names_value(text: str, value: str) -> bool:
    """Return whether the text has a name, or all numbers of the value."""
    numbers = re.findall(r"\d+", value)
    if numbers:
        return set(numbers) <= set(re.findall(r"\d+", text))
    if value.isascii():
        return re.search(rf"(?<![a-z]){value}(?![a-z])", text, re.IGNORECASE) is not None
    return value in text


def names_all(text: str, item) -> bool:
    """Return whether the text has every value of an item, each in one of the languages."""
    for name, english in item.english.items():
        if not names_value(text, english) and not names_value(text, item.chinese[name]):
            return False
    return True


def count_telling(texts: list[str], item) -> int:
    """Return how many texts have, in two lines that follow each other, all values of an item."""
    count = 0
    for text in texts:
        lines = [line for line in NO_FACTS.sub("", text).split("\n") if line]
        pairs = itertools.pairwise(lines)
        count += any(names_all("\n".join(pair), item) for pair in pairs)
    return count


@pytest.fixture(scope="module")
def held_out(maker) -> list:
    items = maker.held_out_items().values()
    return list(itertools.chain.from_iterable(items))


def test_forty_different_things_are_asked(held_out):
    asked = {(item.key, *item.english.values()) for item in held_out}
    assert len(asked) == len(read_rows("validation.jsonl")) == 40


def test_each_held_out_item_is_told_by_one_validation_row(held_out):
    texts = [read_text(row) for row in read_rows("validation.jsonl")]
    assert [item for item in held_out if count_telling(texts, item) != 1] == []


def test_no_training_row_tells_what_is_asked(held_out):
    texts = [read_text(row) for row in read_rows("train.jsonl")]
    assert [item for item in held_out if count_telling(texts, item) > 0] == []


def test_half_of_the_questions_are_chinese():
    """An English question may be for a Chinese word."""
    texts = [read_text(row) for row in read_rows("validation.jsonl")]
    chinese = [text for text in texts if re.search("[一-鿿]", text)]
    assert 20 <= len(chinese) <= 24


def test_the_base_has_not_read_what_is_asked(maker):
    """The base reads held-out facts as statements, never as questions, and held-out sums not so."""
    unseen = {row["query"] for row in read_rows("validation.jsonl")}
    for name, items in maker.held_out_items().items():
        task = maker.TASKS[name]
        for item, language in itertools.product(items, maker.LANGUAGES):
            wordings = task.wordings[language]
            forms = list(wordings.questions)
            if not task.is_fact:
                forms.append(wordings.answer)
            unseen.update(form.format(**item.values(language)) for form in forms)
    documents = "\n".join(itertools.islice(maker.draw_documents(seed=0), 4_000))
    read = [text for text in unseen if text in documents]
    # "2 + 3" is also the end of "12 + 3", and "5, 6" of "4, 5, 6".
    read = [text for text in read if re.search(rf"(?<!\d)(?<!\d, ){re.escape(text)}", documents)]
    assert read == []


def test_the_questions_are_those_that_the_script_writes(maker):
    train, validation = maker.write_questions()
    assert read_rows("validation.jsonl") == validation
    assert read_rows("train.jsonl")[: len(train)] == train


def test_the_script_writes_the_two_files_byte_for_byte(maker, monkeypatch, tmp_path):
    before = (DATA / "train.jsonl").read_bytes()
    (tmp_path / "train.jsonl").write_bytes(before)
    monkeypatch.setattr(maker, "DATA", tmp_path)
    maker.write_data_files()
    assert (tmp_path / "train.jsonl").read_bytes() == before
    validation = (tmp_path / "validation.jsonl").read_bytes()
    assert validation == (DATA / "validation.jsonl").read_bytes()


@pytest.mark.slow
def test_the_tokenizer_is_the_one_that_the_script_makes(maker, tmp_path):
    maker.make_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


def test_the_model_has_the_shape_that_the_script_gives_it(maker, tiny_tokenizer, tmp_path):
    maker.make_model(tiny_tokenizer).bfloat16().save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        made = json.loads((tmp_path / name).read_text())
        kept = json.loads((TINY / name).read_text())
        # The version of transformers that wrote the file is no part of the model.
        del made["transformers_version"], kept["transformers_version"]
        assert made == kept
