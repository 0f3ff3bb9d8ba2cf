"""Greedy answers to a few held-out questions, before and after training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from sft.console import printable, say, split_columns
from sft.conversations import IM_END, IM_START
from sft.examples import IGNORE_INDEX

NUM_QUESTIONS = 40
NUM_SHOWN = 3
PROMPT_TOKENS = 1024  # a longer prompt is not asked
ANSWER_TOKENS = 48  # a longer answer is shown, cut, and not counted
TEXT_COLUMNS = 69  # of 80, beside a label of 11
TEXT_LINES = 4  # of a question or an answer on the screen


@dataclass(frozen=True, kw_only=True)
class Question:
    """The prompt of a validation example and its first answer, which ends with <|im_end|>."""

    prompt_ids: list[int]
    answer_ids: list[int]

    def is_long(self) -> bool:
        return len(self.answer_ids) > ANSWER_TOKENS


def choose_questions(
    examples: Sequence[dict], end_id: int, is_in_shards: bool = False
) -> list[Question]:
    """Return the first questions with a short prompt, those with a short answer before others.

    Say why where there is none. An answer that was cut to max_len has no <|im_end|> (`end_id`),
    and is not asked for.
    """
    if not examples:
        say("questions  not asked: there are no validation examples")
        return []
    if is_in_shards:
        say("questions  not asked: in shards each token of an answer takes a second")
        return []
    questions = []
    for index in range(min(len(examples), 10 * NUM_QUESTIONS)):
        input_ids = examples[index]["input_ids"].tolist()
        trained = np.flatnonzero(examples[index]["labels"] != IGNORE_INDEX)
        start = int(trained[0])
        if start > PROMPT_TOKENS or end_id not in input_ids[start:]:
            continue
        end = input_ids.index(end_id, start) + 1
        prompt_ids = input_ids[:start]
        answer_ids = input_ids[start:end]
        questions.append(Question(prompt_ids=prompt_ids, answer_ids=answer_ids))
    if not questions:
        say("questions  not asked: no validation example has a short prompt and a whole answer")
    questions.sort(key=Question.is_long)
    return questions[:NUM_QUESTIONS]


# ---- Generation ---------------------------------------------------------------------------------
def answer_questions(model, questions: list[Question], end_id: int, max_tokens: int):
    """Return the ids that the model answers, of at most ANSWER_TOKENS tokens, as lists.

    At most max_tokens tokens of prompts run at once: what training holds, answering holds, too.
    """
    model.eval()
    answers = []
    prompts = []
    width = 0
    for question in questions:
        width = max(width, len(question.prompt_ids))
        if prompts and width * (len(prompts) + 1) > max_tokens:
            answers += generate(model, prompts, end_id)
            prompts = []
            width = len(question.prompt_ids)
        prompts.append(question.prompt_ids)
    if prompts:
        answers += generate(model, prompts, end_id)
    return answers


@torch.no_grad()
def generate(model, prompts: list[list[int]], end_id: int) -> list[list[int]]:
    """Return the most likely next tokens of each prompt, up to and including end_id, if it comes.

    Neither the model's generation_config nor a pad token has a part in it.
    """
    input_ids, mask = pad_left(prompts, end_id, model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = transformers.DynamicCache()
    columns = []
    has_ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    for _ in range(ANSWER_TOKENS):
        output = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,  # of a whole prompt they would take more memory than the model
        )
        input_ids = output.logits[:, -1:].argmax(dim=-1).to(model.device)
        columns.append(input_ids)
        has_ended |= input_ids[:, 0] == end_id
        if has_ended.all():
            break
        mask = torch.cat([mask, torch.ones_like(input_ids)], dim=1)
        positions = positions[:, -1:] + 1
    answers = torch.cat(columns, dim=1).tolist()
    for answer in answers:
        if end_id in answer:
            del answer[answer.index(end_id) + 1 :]
    return answers


def pad_left(prompts: list[list[int]], any_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input_ids and mask [prompts, longest]; what is before a prompt has mask 0."""
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), any_id, device=device)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt)
        input_ids[row, start:] = torch.tensor(prompt)
        mask[row, start:] = 1
    return input_ids, mask


# ---- What is printed ----------------------------------------------------------------------------
def print_answers(
    tokenizer, questions: list[Question], before: list[list[int]], after: list[list[int]]
) -> None:
    """Print the first few answers, and how many are those of the examples, token for token.

    `before`, `after`: answers as ids.
    """
    if not questions:
        return
    for index in range(min(len(questions), NUM_SHOWN)):
        prompt = tokenizer.decode(questions[index].prompt_ids)
        asked = prompt.split(f"{IM_START}user\n")[-1].split(IM_END)[0]
        print_text("question   ", asked)
        print_text("  before   ", read_answer(tokenizer, before[index]))
        print_text("  after    ", read_answer(tokenizer, after[index]))
    num_long = sum(map(Question.is_long, questions))
    num_short = len(questions) - num_long
    if num_short == 0:
        say(f"exact      not counted: all held-out answers have over {ANSWER_TOKENS} tokens")
        return
    exact_before = count_exact(questions, before)
    exact_after = count_exact(questions, after)
    say(f"exact      {exact_after} of {num_short} held-out answers (before: {exact_before})")


def count_exact(questions: list[Question], answers: list[list[int]]) -> int:
    num_exact = 0
    for question, answer in zip(questions, answers):
        if answer == question.answer_ids:
            num_exact += 1
    return num_exact


def read_answer(tokenizer, ids: list[int]) -> str:
    """Return an answer as text, with three dots where it goes on after ANSWER_TOKENS tokens."""
    text = tokenizer.decode(ids)
    if text.endswith(IM_END):
        return text.removesuffix(IM_END)
    return f"{text} ..."


def print_text(label: str, text: str) -> None:
    """Print a text beside its label, on a few lines of the screen at most."""
    one_line = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    pieces = split_columns(one_line, TEXT_COLUMNS)
    if len(pieces) > TEXT_LINES:
        pieces = [*pieces[:TEXT_LINES], "..."]
    say(label + pieces[0])
    for piece in pieces[1:]:
        say(" " * len(label) + piece)
