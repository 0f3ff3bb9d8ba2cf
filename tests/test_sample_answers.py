"""Held-out questions are asked greedily, and answers are counted token for token."""

import numpy as np
import pytest
import torch
import transformers

from sft.sample_answers import (
    ANSWER_TOKENS,
    NUM_QUESTIONS,
    PROMPT_TOKENS,
    Question,
    answer_questions,
    choose_questions,
    generate,
    print_answers,
)
from sft_qwen2 import Qwen2ForCausalLM

END = 7  # stands for <|im_end|> where no tokenizer has a part


def example(prompt: list[int], *turns: tuple[list[int], bool]) -> dict:
    """Return an example of a prompt and more turns, each with whether it is trained."""
    input_ids = list(prompt)
    labels = [-100] * len(prompt)
    for ids, is_trained in turns:
        input_ids += ids
        labels += ids if is_trained else [-100] * len(ids)
    return {"input_ids": np.array(input_ids, np.int32), "labels": np.array(labels, np.int32)}


@pytest.fixture(scope="module")
def model(untied_model_dir):
    return Qwen2ForCausalLM.from_pretrained(
        untied_model_dir, attn_implementation="packed_attention", dtype=torch.float32
    )


PROMPTS = [[11, 12, 13, 14, 15, 16, 17], [300], [42, 43, 44], [5, 6, 5, 6, 5, 6, 5, 6, 5]]


@pytest.fixture(scope="module")
def continuations(model) -> list[list[int]]:
    """What follows each prompt by itself, found without cache, mask and batch."""
    continuations = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + ANSWER_TOKENS:
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        assert END not in ids
        continuations.append(ids[len(prompt) :])
    return continuations


# ---- Questions ----------------------------------------------------------------------------------
def test_a_question_is_a_prompt_and_its_first_answer():
    examples = [
        example([1, 2, 3], ([4, 5, END], True)),
        example([1, 2], ([4, END], True), ([8, 9], False), ([5, 5, END], True)),
        example([1, 2], ([4, END], False), ([8, 9], False), ([5, 5, END], True)),
    ]
    questions = choose_questions(examples, END)
    assert [question.prompt_ids for question in questions] == [
        [1, 2, 3],
        [1, 2],
        [1, 2, 4, END, 8, 9],
    ]
    assert [question.answer_ids for question in questions] == [[4, 5, END], [4, END], [5, 5, END]]


def test_what_is_too_long_or_has_no_end_is_not_asked():
    examples = [
        example([1] * (PROMPT_TOKENS + 1), ([4, END], True)),
        example([1, END], ([4, 5], True)),  # cut to max_len
        example([1] * PROMPT_TOKENS, ([5, END], True)),
    ]
    (question,) = choose_questions(examples, END)
    assert question.answer_ids == [5, END]


def test_short_answers_come_first_and_40_are_asked():
    long = [4] * ANSWER_TOKENS + [END]
    examples = [example([1], (long, True))]
    examples += [example([2], ([4, END], True))] * NUM_QUESTIONS
    questions = choose_questions(examples, END)
    assert len(questions) == NUM_QUESTIONS
    assert not any(question.is_long() for question in questions)
    assert choose_questions(examples[:2], END)[1].is_long()


# ---- Generation ---------------------------------------------------------------------------------
@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
def test_answers_are_those_of_each_prompt_by_itself(model, continuations, max_tokens):
    questions = [Question(prompt_ids=prompt, answer_ids=[END]) for prompt in PROMPTS]
    assert answer_questions(model.train(), questions, END, max_tokens) == continuations


def test_answers_do_not_change_where_training_recomputes(model, continuations):
    """transformers keeps no cache of keys and values while it recomputes layers."""
    model.gradient_checkpointing_enable()
    model.train()
    questions = [Question(prompt_ids=prompt, answer_ids=[END]) for prompt in PROMPTS]
    answers = answer_questions(model, questions, END, max_tokens=1000)
    model.gradient_checkpointing_disable()
    assert answers == continuations


def test_answers_stop_at_their_end(model, continuations):
    for answer in continuations:
        end_id = answer[5]
        expected = []
        for each in continuations:
            if end_id in each:
                each = each[: each.index(end_id) + 1]
            expected.append(each)
        assert generate(model.eval(), PROMPTS, end_id) == expected


def test_no_more_runs_at_once_than_training_holds(model):
    """Nor are there logits but for the last position."""
    shapes = []

    def watch(module, arguments, kwargs, output):
        shapes.append((kwargs["input_ids"].shape, output.logits.shape))

    hook = model.register_forward_hook(watch, with_kwargs=True)
    questions = [Question(prompt_ids=prompt, answer_ids=[END]) for prompt in PROMPTS]
    answer_questions(model, questions, END, max_tokens=20)
    hook.remove()
    assert max(inputs.numel() for inputs, _ in shapes) == 18
    assert {logits[1] for _, logits in shapes} == {1}


def test_nothing_is_asked_where_there_are_no_questions(model):
    assert answer_questions(model, [], END, max_tokens=20) == []


class Parrot(torch.nn.Module):
    """A model that knows the answer to each prompt, and says <|im_end|> for ever after it."""

    device = torch.device("cpu")

    def __init__(self, questions: list[Question], end_id: int, vocab_size: int):
        super().__init__()
        self.answers = {tuple(q.prompt_ids): q.answer_ids for q in questions}
        self.end_id = end_id
        self.vocab_size = vocab_size

    def forward(self, input_ids, attention_mask, **kwargs):
        if input_ids.shape[1] > 1:
            self.num_said = 0
            self.prompts = []
            for ids, mask in zip(input_ids, attention_mask):
                self.prompts.append(tuple(ids[mask == 1].tolist()))
        logits = torch.zeros(len(input_ids), 1, self.vocab_size)
        for row, prompt in enumerate(self.prompts):
            answer = [*self.answers[prompt], *[self.end_id] * ANSWER_TOKENS]
            logits[row, 0, answer[self.num_said]] = 1
        self.num_said += 1
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def encode(tokenizer, system: str, question: str, answer: str) -> dict:
    start = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    prompt = tokenizer(f"{start}<|im_start|>assistant\n").input_ids
    return example(prompt, (tokenizer(f"{answer}<|im_end|>").input_ids, True))


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "<|im_end|>", None])
def test_right_answers_count_whatever_the_pad_token_is(tiny_model_dir, pad_token, capsys):
    """<|im_end|> as a pad token is the usual line of tutorials."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.pad_token = pad_token
    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    examples = [
        encode(tokenizer, "s", "What is 2 + 2?", "4"),
        encode(
            tokenizer, "a longer system turn", "And the capital of Portugal?", "Lisbon, 里斯本."
        ),
    ]
    questions = choose_questions(examples, end_id)
    parrot = Parrot(questions, end_id, len(tokenizer))
    answers = answer_questions(parrot, questions, end_id, max_tokens=1000)
    print_answers(tokenizer, questions, [[], []], answers)
    assert capsys.readouterr().out.splitlines() == [
        "question   What is 2 + 2?",
        "  before    ...",
        "  after    4",
        "question   And the capital of Portugal?",
        "  before    ...",
        "  after    Lisbon, 里斯本.",
        "exact      2 of 2 held-out answers (before: 0)",
    ]


# ---- What is printed ----------------------------------------------------------------------------
def test_exact_is_exact(tiny_tokenizer, capsys):
    ids = tiny_tokenizer("abc<|im_end|>").input_ids
    more = tiny_tokenizer("abcd<|im_end|>").input_ids
    questions = [Question(prompt_ids=[1], answer_ids=ids)] * 3
    print_answers(tiny_tokenizer, questions, [more, more, more], [ids[:-1], more, ids])
    assert "exact      1 of 3 held-out answers (before: 0)" in capsys.readouterr().out


def test_long_answers_are_shown_cut_without_a_score(tiny_tokenizer, capsys):
    end_id = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    record = encode(tiny_tokenizer, "s", "Count.", " ".join(map(str, range(60))))
    questions = choose_questions([record], end_id)
    parrot = Parrot(questions, end_id, len(tiny_tokenizer))
    answers = answer_questions(parrot, questions, end_id, max_tokens=1000)
    print_answers(tiny_tokenizer, questions, answers, answers)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  before   0 1 2 3 4 5")
    assert lines[-2].endswith(" ...")
    assert lines[-1] == "exact      not counted: all held-out answers have over 48 tokens"


def test_long_answers_beside_short_ones_do_not_count(tiny_tokenizer, capsys):
    short = Question(prompt_ids=[1], answer_ids=[5, END])
    long = Question(prompt_ids=[1], answer_ids=[5] * 60)
    print_answers(tiny_tokenizer, [short, long], [[5], [5]], [[5, END], [5] * 48])
    assert "exact      1 of 1 held-out answers (before: 0)" in capsys.readouterr().out


@pytest.mark.parametrize("examples", [None, []])
def test_it_is_said_that_there_are_no_validation_examples(examples, capsys):
    assert choose_questions(examples, END) == []
    out = capsys.readouterr().out
    assert out == "questions  not asked: there are no validation examples\n"


def test_it_is_said_that_no_example_can_be_asked(capsys):
    long_prompt = example([1] * (PROMPT_TOKENS + 1), ([4, END], True))
    assert choose_questions([long_prompt], END) == []
    assert "no validation example has a short prompt" in capsys.readouterr().out


def test_it_is_said_that_shards_are_not_asked(capsys):
    assert choose_questions([example([1], ([4, END], True))], END, is_in_shards=True) == []
    assert "in shards" in capsys.readouterr().out


def test_texts_keep_within_80_columns_and_four_lines(tiny_tokenizer, capsys):
    text = "一二三四五六七八九十" * 20
    record = encode(tiny_tokenizer, "s", text, "4")
    questions = choose_questions([record], tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"))
    print_answers(tiny_tokenizer, questions, [[5]], [[5]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "question   " + text[:34]
    assert lines[3] == " " * 11 + text[102:136]
    assert lines[4] == " " * 11 + "..."
    assert lines[5].startswith("  before   ")


def test_texts_cannot_steer_the_terminal(tiny_tokenizer, capsys):
    record = encode(tiny_tokenizer, "s", "\x1b[31mred\nor\tnot", "4")
    questions = choose_questions([record], tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"))
    print_answers(tiny_tokenizer, questions, [[5]], [[5]])
    assert capsys.readouterr().out.startswith(r"question   \x1b[31mred\nor\tnot")
