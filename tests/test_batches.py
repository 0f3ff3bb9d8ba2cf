"""Micro-batches: bins, flattening, and the packing law."""

import random

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT

from sft.encoded_rows import IGNORE_INDEX
from sft.rows import parse_row
from sft_qwen2 import bin_rows, collate, encode, flatten, load_model

NO_MASK = {"full_attention": None}


def random_lengths(seed: int) -> tuple[list[int], int]:
    rng = random.Random(seed)
    budget = rng.choice([1, 7, 64, 512])
    return [rng.randint(1, rng.choice([3, 64, 700])) for _ in range(rng.randint(1, 80))], budget


@pytest.mark.parametrize("seed", range(40))
def test_bins_hold_every_row_once_within_the_budget(seed):
    """Every row is in one bin; one over the budget holds one row; no two would fit in one."""
    lengths, budget = random_lengths(seed)
    bins = bin_rows(lengths, budget)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    tokens = [sum(lengths[row] for row in rows) for rows in bins]
    assert all(total <= budget or len(rows) == 1 for total, rows in zip(tokens, bins))
    assert all(bins)
    smallest = sorted(tokens)[:2]
    assert len(bins) == 1 or sum(smallest) > budget


@pytest.mark.parametrize("multiple_of", [2, 3, 8])
@pytest.mark.parametrize("seed", range(20))
def test_bins_are_as_many_for_every_process(seed, multiple_of):
    """With several processes the bins are a multiple of their number, and the least such."""
    lengths, budget = random_lengths(seed)
    bins, least = bin_rows(lengths, budget, multiple_of), len(bin_rows(lengths, budget))
    assert len(bins) == -(-least // multiple_of) * multiple_of
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in rows) <= budget or len(rows) == 1 for rows in bins)
    assert all(bins) or len(lengths) < len(bins)


def test_a_micro_batch_is_its_rows_end_to_end():
    """Positions begin anew with each row, and no row is asked to predict the next one's token."""
    first = {"input_ids": np.array([5, 6, 7]), "labels": np.array([IGNORE_INDEX, 6, 7])}
    second = {"input_ids": np.array([8, 9]), "labels": np.array([8, 9])}
    batch = flatten([first, second])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["shift_labels"].tolist() == [[6, 7, -100, 9, -100]]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 5] and batch["seq_lens"] == [3, 2]


def test_processes_share_the_rows_of_a_step(rows):
    """Every row goes to one process, all run as many forward passes and know the same divisor."""
    alone, trained_tokens = collate(rows, 10_000, 300)
    shares = [collate(rows, 10_000, 300, rank, 3) for rank in range(3)]
    assert {divisor for _, divisor in shares} == {trained_tokens}
    assert len({len(batches) for batches, _ in shares}) == 1

    def sequences(batches):
        cut = [batch["input_ids"][0].split(batch["seq_lens"]) for batch in batches]
        return sorted(ids.tolist() for parts in cut for ids in parts if len(ids) > 1)

    together = [batch for batches, _ in shares for batch in batches]
    assert sequences(together) == sequences(alone)
    assert sequences(alone) == sorted(row["input_ids"].tolist() for row in rows)


def test_a_process_without_a_row_runs_a_forward_pass_of_no_weight(rows, model):
    """With fewer rows than processes, the others' loss and gradients are zero, not missing."""
    batches = [batch for rank in range(4) for batch in collate(rows[:2], 10_000, 300, rank, 4)[0]]
    losses = [model(**batch)["loss"] for batch in batches]
    assert len(losses) == 4 and sorted(loss.item() > 0 for loss in losses) == [
        False,
        False,
        True,
        True,
    ]
    sum(losses).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


# ---- The packing law ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rows(tiny_tokenizer) -> list[dict]:
    texts = [
        ("hi", "Hello!"),
        ("泰国的首都是哪里?", "泰国的首都是曼谷。"),
        ("a", "b"),
        ("Why? " * 9, "So."),
    ]
    texts += [("list", "one, two, three " * 20)]
    examples = []
    for query, answer in texts:
        messages = parse_row({"query": query, "answer": answer}, "be brief")
        example = encode(messages, tiny_tokenizer)
        examples.append({name: np.array(ids, dtype=np.int32) for name, ids in example.items()})
    return examples


@pytest.fixture(scope="module", params=["tied", "untied"])
def model_dir(request, untied_model_dir):
    return untied_model_dir if request.param == "untied" else ROOT / "data" / "tiny-qwen2"


@pytest.fixture(scope="module")
def model(model_dir):
    return load_model(model_dir, torch.float32)


@pytest.fixture(scope="module")
def plain(model_dir):
    """The same weights in transformers' own model and attention."""
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, **options)


def plain_loss(plain, row) -> torch.Tensor:
    """Cross entropy summed over a row's trained tokens, from the logits of that row alone."""
    ids, labels = (torch.from_numpy(row[name]).long() for name in ("input_ids", "labels"))
    logits = plain(ids[None]).logits[0, :-1]
    options = {"ignore_index": IGNORE_INDEX, "reduction": "sum"}
    return torch.nn.functional.cross_entropy(logits, labels[1:], **options)


def test_neighbours_do_not_change_logits(rows, model, plain):
    """A row's logits in a micro-batch are those of the row alone in transformers' own model."""
    batch = flatten(rows)
    del batch["shift_labels"]
    with torch.no_grad():
        packed = model(**batch, attention_mask=NO_MASK, use_cache=False).logits[0]
        for logits, row in zip(packed.split(batch["seq_lens"]), rows):
            alone = plain(torch.from_numpy(row["input_ids"]).long()[None]).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_neighbours_do_not_change_loss_and_gradients(checkpointing, rows, model, plain):
    """A micro-batch's loss and gradients are the sums of its rows' in transformers' own model."""
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    loss = model(**flatten(rows), num_items_in_batch=7)["loss"]
    loss.backward()
    expected = sum(plain_loss(plain, row) for row in rows) / 7
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    model.gradient_checkpointing_disable()
    for each in (model, plain):
        each.zero_grad()
        each.eval()


def test_the_loss_of_a_model_in_half_precision_is_exact(rows, model_dir, model):
    """Its logits are rounded, each another way: their mean is not. bf16 has 8 bits, or 0.4 %."""
    half = load_model(model_dir, torch.bfloat16)
    with torch.no_grad():
        rounded, exact = (each(**flatten(rows))["loss"] for each in (half, model))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=0)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="has no linear_cross_entropy to watch")
def test_under_autocast_the_head_computes_in_half_precision_too(rows, model):
    """PyTorch would leave this product in fp32, which is 8 times slower on a GPU."""
    seen, loss_of = [], torch.nn.functional.linear_cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        watched = lambda *args, **kwargs: seen.extend(args[:2]) or loss_of(*args, **kwargs)  # noqa: E731
        patch.setattr(torch.nn.functional, "linear_cross_entropy", watched)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**flatten(rows))["loss"]
    rounded.backward()
    assert {x.dtype for x in seen} == {torch.bfloat16} and rounded.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(rounded, model(**flatten(rows))["loss"], rtol=1e-3, atol=0)
    assert model.lm_head.weight.grad.dtype == torch.float32
    model.zero_grad()


def test_the_order_of_rows_does_not_matter(rows, model):
    """The same rows in another order have the same loss."""
    with torch.no_grad():
        losses = [model(**flatten(order))["loss"] for order in (rows, rows[::-1])]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_without_micro_batches_it_is_transformers_own_model(rows, model, plain, tiny_tokenizer):
    """A forward pass with padding, and generation, give what Qwen2ForCausalLM with sdpa gives."""
    ids = [{"input_ids": row["input_ids"].tolist()} for row in rows]
    batch = tiny_tokenizer.pad(ids, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        mine, theirs = model(**batch).logits, plain(**batch).logits
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(mine[real], theirs[real], rtol=1e-5, atol=1e-5)
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(**batch, **options), plain.generate(**batch, **options))


def test_it_is_a_qwen2_model(model):
    """The model saves itself, and is known to libraries, as Qwen2ForCausalLM."""
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert isinstance(model, transformers.Qwen2ForCausalLM)
