"""Micro-batches: bins, flattening, and the packing law."""

import itertools
import random

import numpy as np
import pytest
import torch
import transformers
from runs import TINY

from sft.encoded_rows import IGNORE_INDEX
from sft.rows import parse_row
from sft_qwen2 import bin_rows, collate, encode, flatten, load_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 8])
def test_bins_hold_every_row_once_within_the_budget(multiple_of):
    """Bins are as few as no two fit in one; and, of several processes, the next multiple of those.

    One over the budget holds one row.
    """
    for seed in range(40):
        rng = random.Random(seed)
        budget, longest = rng.choice([1, 7, 64, 512]), rng.choice([3, 64, 700])
        lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 80))]
        bins = bin_rows(lengths, budget, multiple_of)
        assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
        tokens = [sum(lengths[row] for row in rows) for rows in bins]
        assert all(total <= budget or len(rows) == 1 for total, rows in zip(tokens, bins))
        assert all(bins) or len(lengths) < len(bins)
        least = len(bin_rows(lengths, budget))
        assert len(bins) == -(-least // multiple_of) * multiple_of
        assert multiple_of > 1 or len(bins) == 1 or sum(sorted(tokens)[:2]) > budget


# ---- With rows, and a model whose head is its embedding or is not -------------------------------
@pytest.fixture(scope="module")
def rows(tiny_tokenizer) -> list[dict]:
    texts = [("hi", "Hello!"), ("泰国的首都是哪里?", "泰国的首都是曼谷。"), ("a", "b")]
    texts += [("Why? " * 9, "So."), ("list", "one, two, three " * 20)]
    rows = [parse_row({"query": q, "answer": a}, "be brief") for q, a in texts]
    examples = [encode(messages, tiny_tokenizer) for messages in rows]
    return [{name: np.array(ids, np.int32) for name, ids in x.items()} for x in examples]


@pytest.fixture(scope="module", params=["tied", "untied"])
def models(request, untied_model_dir):
    """(The script's model, the same weights in transformers' own model and attention)."""
    folder = TINY if request.param == "tied" else untied_model_dir
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return load_model(folder, torch.float32), plain


def test_processes_share_the_rows_of_a_step(rows):
    """Every row goes to one process, all run as many forward passes and know the same divisor."""
    shares = [collate(rows, 10_000, 300, rank, 3) for rank in range(3)]
    trained_tokens = sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
    assert [divisor for _, divisor in shares] == [trained_tokens] * 3
    assert len({len(batches) for batches, _ in shares}) == 1
    batches = [batch for batches, _ in shares for batch in batches]
    found = [ids for x in batches for ids in x["input_ids"][0].split(x["seq_lens"])]
    wanted = sorted(row["input_ids"].tolist() for row in rows)
    assert sorted(ids.tolist() for ids in found if len(ids) > 1) == wanted
    for batch in batches:
        assert batch["cu_seq_lens"].tolist() == [0, *itertools.accumulate(batch["seq_lens"])]


def test_a_process_without_a_row_runs_a_forward_pass_of_no_weight(rows, models):
    """With fewer rows than processes, the others' loss and gradients are zero, not missing."""
    model = models[0]
    batches = [batch for rank in range(4) for batch in collate(rows[:2], 10_000, 300, rank, 4)[0]]
    losses = [model(**batch)["loss"] for batch in batches]
    assert sorted(loss.item() > 0 for loss in losses) == [False, False, True, True]
    sum(losses).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


# ---- The packing law ----------------------------------------------------------------------------
def test_neighbours_do_not_change_logits(rows, models):
    """A row's logits in a micro-batch are those of the row alone in transformers' own model."""
    batch, (model, plain) = flatten(rows), models
    batch |= {"attention_mask": {"full_attention": None}, "use_cache": False, "shift_labels": None}
    with torch.no_grad():
        packed = model(**batch).logits[0]
        for logits, row in zip(packed.split(batch["seq_lens"]), rows):
            alone = plain(torch.from_numpy(row["input_ids"]).long()[None]).logits[0]
            torch.testing.assert_close(logits, alone, **CLOSE)


def plain_loss(plain, row) -> torch.Tensor:
    """Cross entropy summed over a row's trained tokens, from the logits of that row alone."""
    ids, labels = (torch.from_numpy(row[name]).long() for name in ("input_ids", "labels"))
    logits = plain(ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_neighbours_do_not_change_loss_and_gradients(checkpointing, rows, models):
    """A micro-batch's loss and gradients are the sums of its rows' in transformers' own model."""
    model, plain = models
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    loss = model(**flatten(rows), num_items_in_batch=7)["loss"]
    loss.backward()
    expected = sum(plain_loss(plain, row) for row in rows) / 7
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    model.gradient_checkpointing_disable()
    for each in models:
        each.zero_grad()
        each.eval()


def test_without_micro_batches_it_is_transformers_own_model(rows, models, tiny_tokenizer):
    """A forward pass with padding, and generation, give what Qwen2ForCausalLM with sdpa gives."""
    ids = [{"input_ids": row["input_ids"].tolist()} for row in rows]
    batch = tiny_tokenizer.pad(ids, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        mine, theirs = (model(**batch).logits for model in models)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(mine[real], theirs[real], **CLOSE)
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(*(model.generate(**batch, **options) for model in models))
