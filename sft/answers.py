"""Answers to held-out questions, before and after training."""

import itertools

import numpy as np
import torch

from sft.encoded_rows import IGNORE_INDEX
from sft.rows import IM_END, IM_START, as_user_error, printable

# Validation rows that are asked before and after training: the first with prompt and answer of at
# most so many tokens; the first few of these are shown.
NUM_QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS, NUM_SHOWN = 40, 1024, 48, 3


def held_out_questions(rows) -> list[tuple[list[int], list[int]]]:
    """Return the token ids (prompt, answer) of the first validation rows with short ones.

    A row begins with what generation is given, and its first answer ends with <|im_end|>.
    """
    questions = []
    for row in itertools.islice(rows, 10 * NUM_QUESTIONS):
        ids, trained = row["input_ids"], row["labels"] != IGNORE_INDEX
        begin, end, *_ = [*(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        if begin <= QUESTION_TOKENS and end - begin <= ANSWER_TOKENS:
            questions.append((ids[:begin].tolist(), ids[begin:end].tolist()))
    return questions[:NUM_QUESTIONS]


def answer(model, tokenizer, questions: list[tuple]) -> list[str]:
    """Return the model's greedy answers, each with the <|im_end|> that ends it, if it comes."""
    if not questions:
        return []
    files = "generation_config.json and tokenizer_config.json"
    with as_user_error(f"the model cannot generate; see its {files}"):
        try:
            return generate(model, tokenizer, questions)
        except torch.OutOfMemoryError:
            if len(questions) == 1:
                return ["(out of memory)"]
    half = len(questions) // 2
    parts = (questions[:half], questions[half:])
    return [text for part in parts for text in answer(model, tokenizer, part)]


def generate(model, tokenizer, questions: list[tuple]) -> list[str]:
    prompts = {"input_ids": [prompt for prompt, _ in questions]}
    batch = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
    limit = {"max_new_tokens": ANSWER_TOKENS, "max_length": None}
    # The plain most likely token: the base's own generation_config may change its chances.
    options = {**limit, "do_sample": False, "repetition_penalty": 1.0}
    outputs = model.eval().generate(**batch, **options)
    texts = tokenizer.batch_decode(outputs[:, batch["input_ids"].shape[1] :])
    return [text.replace(tokenizer.pad_token, "") for text in texts]


def print_answers(tokenizer, questions: list[tuple], before: list[str], after: list[str]) -> None:
    """Print how many answers are those of the rows, and the first few."""
    if not questions:
        few = f"validation rows of at most {QUESTION_TOKENS} + {ANSWER_TOKENS} tokens"
        print(f"exact      nothing was asked: it takes one process, and {few}")
        return
    wanted = [tokenizer.decode(ids) for _, ids in questions]
    for (prompt, _), old, new in list(zip(questions, before, after))[:NUM_SHOWN]:
        asked = tokenizer.decode(prompt).split(f"{IM_START}user\n")[-1].split(IM_END)[0]
        print(f"question   {printable(asked)}\n  before   {old!r}\n  after    {new!r}")
    exact = [sum(map(str.__eq__, answers, wanted)) for answers in (before, after)]
    print(f"exact      {exact[1]} of {len(wanted)} held-out answers (before: {exact[0]})")
