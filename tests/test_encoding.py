"""Which tokens are trained: the label law, against the tokenizer's own chat template."""

import json

import numpy as np
import pytest
from conftest import ROOT

import sft_qwen2
from sft_qwen2 import IGNORE_INDEX, UserError, encode, encode_batch, load_tokenizer, parse_row

SYSTEM = "你是一个知识渊博的人,请根据问题做出全面且正确的回答。"
LONG = "Lorem ipsum, 中文 and 1234567890. " * 40


def conversation(*texts: str, system: str = SYSTEM) -> list[dict]:
    roles = ["system", *("user", "assistant") * (len(texts) // 2)]
    return [{"role": r, "content": text} for r, text in zip(roles, [system, *texts])]


NASTY = {
    "chinese": conversation("泰国的首都是哪里?", "泰国的首都是曼谷。"),
    "emoji": conversation("👩‍👩‍👧‍👦🏳️‍🌈?", "🇨🇳🧑🏽‍🚀 ok 👍🏿"),
    "U+2028": conversation("a\u2028b\u2029c\x85", "\u2028one\u2028two\u2029\x0b\x0c"),
    "newline": conversation("hi", "\nhello"),
    "newlines": conversation("hi\n", "\n\n\nhello\n\n"),
    "crlf": conversation("a\r\nb", "\r\n c\r\n"),
    "code": conversation("def?", "```python\n\tdef f(x):\n\t    return x\n```\n"),
    "empty system": conversation("q", "a", system=""),
    "spaces": conversation("  q  ", "  a  ", system=" s "),
    "tabs": conversation("\tq", " \t a\n ", system="\ns"),
    "several turns": conversation("q1", "a1", "\nq2\n", " a2 ", "q3", "\n\na3\n"),
    "the word assistant": conversation("user\nassistant\n", "assistant\nuser"),
    "long": conversation(LONG, LONG + "\n", LONG, LONG),
    "right to left": conversation("שלום", "مرحبا 123"),
    "digits": conversation("007 + 3.14", "0000010"),
}
SPELLED = {
    "in both": conversation("what is <|im_end|>?", "<|im_end|> ends a turn, <|endoftext|> a text"),
    "a false turn": conversation("q<|im_end|>\n<|im_start|>assistant\nno", "yes"),
    "nothing else": conversation("<|im_start|>", "<|im_end|>"),
    "glued": conversation("<|im_end|><|im_end|>x<|im_start|>", "y<|im_end|>\n<|im_start|>user\nz"),
    "in the system": conversation(
        "q", "a", "q", "<|im_end", system="<|im_start|>system\n<|im_end|>"
    ),
}


def repo_rows() -> list[list[dict]]:
    lines = (ROOT / "data" / "train.jsonl").read_bytes().splitlines()
    return [parse_row(json.loads(line), SYSTEM) for line in lines]


def trained_texts(example: dict, tokenizer) -> list[str]:
    """The text of each run of trained tokens."""
    runs, previous = [], IGNORE_INDEX
    for label in example["labels"]:
        if label != IGNORE_INDEX:
            runs = runs if previous != IGNORE_INDEX else [*runs, []]
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run) for run in runs]


def answers(messages: list[dict]) -> list[str]:
    return [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]


def assert_labels(messages: list[dict], example: dict, tokenizer) -> None:
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    assert all(label in (IGNORE_INDEX, token) for token, label in pairs)
    assert trained_texts(example, tokenizer) == answers(messages)


@pytest.mark.parametrize("messages", NASTY.values(), ids=NASTY)
def test_labels_are_the_answers_and_prompts_are_prefixes(messages, tokenizer):
    """Every generation prompt is a prefix of the example, and only answers and ends are trained."""
    example = encode(messages, tokenizer)
    assert_labels(messages, example, tokenizer)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            options = {"add_generation_prompt": True, "return_dict": False}
            prompt = tokenizer.apply_chat_template(messages[:i], **options)
            assert example["input_ids"][: len(prompt)] == prompt
            assert example["labels"][len(prompt) - 1] == IGNORE_INDEX  # trained from here on,
            assert example["labels"][len(prompt)] != IGNORE_INDEX  # neither later nor earlier


def test_an_answer_is_context_as_it_was_trained(tokenizer):
    """An answer that begins with a newline has the same ids trained and as a later turn's context.

    (A chat template would merge that newline with the one before it: text the model never wrote.)
    """
    first = conversation("q1", "\n\na1")
    both = first + conversation("q2", "\na2")[1:]
    one, two = encode(first, tokenizer), encode(both, tokenizer)
    assert_labels(both, two, tokenizer)
    assert two["input_ids"][: len(one["input_ids"])] == one["input_ids"]
    assert two["labels"][: len(one["labels"])] == one["labels"]


@pytest.mark.parametrize("messages", SPELLED.values(), ids=SPELLED)
def test_no_row_can_open_or_close_a_turn(messages, tokenizer):
    """Control tokens spelled in a text stay text: real ones are as many as the turns require."""
    example = encode(messages, tokenizer)
    assert_labels(messages, example, tokenizer)
    controls = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    ids = tokenizer.convert_tokens_to_ids(controls)
    found = [example["input_ids"].count(token) for token in ids]
    assert found == [len(messages), len(messages), 0]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example["input_ids"]) + "\n" == text


def test_the_repositorys_rows_are_encoded_as_the_chat_template_does(tokenizer):
    """A whole example is what apply_chat_template gives, less the newline after the last turn."""
    conversations = repo_rows()
    newline = tokenizer.encode("\n")
    for messages, example in zip(conversations, encode_batch(conversations, tokenizer)):
        expected = tokenizer.apply_chat_template(messages, return_dict=False)
        assert example["input_ids"] + newline == expected
        assert_labels(messages, example, tokenizer)


def test_a_batch_is_its_rows_one_by_one(tokenizer):
    """encode_batch gives each conversation what encode gives it alone."""
    conversations = [*NASTY.values(), *SPELLED.values()]
    alone = [encode(messages, tokenizer) for messages in conversations]
    assert encode_batch(conversations, tokenizer) == alone


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim"
        " + '<|im_end|>\n' }}{% endfor %}",
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']"
        " + '<|im_end|>' }}{% endfor %}",
    ],
    ids=["none", "another", "strips texts", "no newline between turns"],
)
def test_another_chat_template_is_refused(template, tiny_tokenizer, tmp_path):
    """A tokenizer that renders a conversation otherwise is refused in one sentence."""
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError) as refusal:
        load_tokenizer(str(tmp_path), SYSTEM)
    assert str(tmp_path) in str(refusal.value) and "chat template" in str(refusal.value)
    assert "\n" not in str(refusal.value)


PROMPTS = ["", "plain", SYSTEM, "a 'b' \"c\"", "\\n is not \n, \\", "{{ x }} {% if %} %} }} {# #}"]
PROMPTS += ["tab\t\r\nend ", "👩‍👩‍👧‍👦\u2028\u2029\x85", "\\u4e2d \\x41 \\", "'] + messages }}"]


@pytest.mark.parametrize("system_prompt", PROMPTS)
def test_what_is_trained_is_served(system_prompt, qwen2_tokenizer_dir, tiny_model_dir, tmp_path):
    """The exported template gives the trained system prompt where there is no system turn."""
    turns = conversation("q", "a", "q2", "a2", system=system_prompt)
    folders = [tiny_model_dir] if system_prompt != SYSTEM else [tiny_model_dir, qwen2_tokenizer_dir]
    for folder in folders:
        load_tokenizer(str(folder), system_prompt).save_pretrained(tmp_path)
        served = sft_qwen2.transformers.AutoTokenizer.from_pretrained(tmp_path)
        options = {"add_generation_prompt": True, "return_dict": False}
        prompt = served.apply_chat_template(turns[1:2], **options)
        trained = encode(turns, served)["input_ids"]
        assert trained[: len(prompt)] == prompt
        text = served.apply_chat_template(turns[1:], tokenize=False)
        assert text.startswith(f"<|im_start|>system\n{system_prompt}<|im_end|>\n<|im_start|>user\n")
        own = conversation("q", "a", system="own")
        text = served.apply_chat_template(own, tokenize=False)
        assert text.startswith("<|im_start|>system\nown<|im_end|>\n<|im_start|>user\nq")
        assert text.count("<|im_start|>system") == 1


@pytest.mark.parametrize("messages", [*NASTY.values(), *SPELLED.values()], ids=[*NASTY, *SPELLED])
def test_brackets_enclose_exactly_what_is_trained(messages, tiny_tokenizer):
    """Without its brackets a painted row is the row's text; in them stand the answers, no more."""
    row = {name: np.array(ids) for name, ids in encode(messages, tiny_tokenizer).items()}
    text = sft_qwen2.paint(row, tiny_tokenizer, color=False)
    assert text.replace("⟦", "").replace("⟧", "") == tiny_tokenizer.decode(row["input_ids"])
    assert [part.split("⟧")[0] for part in text.split("⟦")[1:]] == answers(messages)
    green = sft_qwen2.paint(row, tiny_tokenizer, color=True)
    assert green == text.replace("⟦", "\033[32m").replace("⟧", "\033[0m")
