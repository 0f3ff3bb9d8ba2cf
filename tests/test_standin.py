"""The stand-in model of data/: it learns something true, from rows that do not hold the answers.

That it does, by the README's first command, is in test_readme.py.
"""

import importlib.util
import itertools
import json
import re

import pytest
from runs import ROOT

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


def says(text: str, value: str) -> bool:
    """Whether the text has a name, in English a whole word of any case, or all of these numbers."""
    if numbers := re.findall(r"\d+", value):
        return set(numbers) <= set(re.findall(r"\d+", text))
    if value.isascii():
        return re.search(rf"(?<![a-z]){value}(?![a-z])", text, re.IGNORECASE) is not None
    return value in text


def tells(row: dict, item) -> bool:
    """Whether two lines of a row have all of an item, such as a land and its capital.

    In any words and language; but no fraction is a product, nor are the 36 kinds of two dice, and
    "from small to large" is not about the opposites.
    """
    lines = re.sub(r"\d+/\d+|36 种|从小到大", "", row_text(row)).split("\n")
    for text in map("\n".join, itertools.pairwise(filter(None, lines))):
        if all(says(text, item.en[key]) or says(text, item.zh[key]) for key in item.en):
            return True
    return False


def test_no_row_tells_what_is_asked(maker):
    """Of 40 different things, each is told by its own answer, and by no training row at all."""
    train, validation = read_rows("train.jsonl"), read_rows("validation.jsonl")
    items = [item for held_out in maker.held_out_items().values() for item in held_out]
    assert len({(*item.en.values(), item.key) for item in items}) == len(validation) == 40
    for item in items:
        assert sum(tells(row, item) for row in validation) == 1
        assert [number for number, row in enumerate(train, 1) if tells(row, item)] == []
    chinese = [re.search("[一-鿿]", row["answer"] + row["query"]) is not None for row in validation]
    assert 20 <= sum(chinese) <= 24  # an English question may be for a Chinese word


def test_the_base_has_not_read_what_is_asked(maker):
    """Of facts it reads statements, but no question; of sums and the like not even those."""
    unseen = {row["query"] for row in read_rows("validation.jsonl")}
    for name, items in maker.held_out_items().items():
        for item in items:
            for language in maker.LANGUAGES:
                forms, values = getattr(maker.TASKS[name], language), getattr(item, language)
                told = () if maker.TASKS[name].facts else (forms.answer,)
                unseen |= {form.format(**values) for form in (*forms.questions, *told)}
    documents = maker.draw_documents(seed=0)
    texts = "\n".join(next(documents) for _ in range(4_000))
    found = [text for text in unseen if text in texts]
    assert [x for x in found if re.search(rf"(?<!\d)(?<!\d, ){re.escape(x)}", texts)] == []


def test_the_rows_are_those_that_the_script_writes(maker):
    train, validation = maker.question_rows()
    assert read_rows("validation.jsonl") == validation
    assert read_rows("train.jsonl")[: len(train)] == train
