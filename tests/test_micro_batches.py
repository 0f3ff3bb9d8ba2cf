"""Micro-batches: bins, flattening, and the packing law."""

import math
import random

import numpy as np
import pytest
import torch
import transformers
from runs import TINY

from sft.conversations import parse_record
from sft.examples import IGNORE_INDEX
from sft.model_files import load_weights
from sft_qwen2 import (
    Qwen2ForCausalLM,
    StepSampler,
    bin_by_tokens,
    collate,
    encode,
    flatten,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BUDGETS = [1, 7, 64, 512]
PROCESSES = [1, 2, 3, 8]


# ---- Bins ---------------------------------------------------------------------------------------
def draw_lengths(seed: int) -> list[int]:
    rng = random.Random(seed)
    longest = rng.choice([3, 64, 700])
    return [rng.randint(1, longest) for _ in range(rng.randint(1, 80))]


@pytest.mark.parametrize("num_processes", PROCESSES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_example_is_in_one_bin(budget, num_processes):
    for seed in range(10):
        lengths = draw_lengths(seed)
        bins = bin_by_tokens(lengths, budget, num_processes)
        indices = [index for bin in bins for index in bin]
        assert sorted(indices) == list(range(len(lengths)))


@pytest.mark.parametrize("num_processes", PROCESSES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_bin_is_within_the_budget_or_one_example(budget, num_processes):
    for seed in range(10):
        lengths = draw_lengths(seed)
        for bin in bin_by_tokens(lengths, budget, num_processes):
            num_tokens = sum(lengths[index] for index in bin)
            assert num_tokens <= budget or len(bin) == 1


@pytest.mark.parametrize("num_processes", PROCESSES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_bins_are_the_next_multiple_of_the_processes(budget, num_processes):
    for seed in range(10):
        lengths = draw_lengths(seed)
        num_least = len(bin_by_tokens(lengths, budget))
        num_bins = len(bin_by_tokens(lengths, budget, num_processes))
        assert num_bins == math.ceil(num_least / num_processes) * num_processes


@pytest.mark.parametrize("num_processes", PROCESSES)
def test_a_bin_is_empty_only_where_there_are_fewer_examples_than_bins(num_processes):
    for seed in range(40):
        lengths = draw_lengths(seed)
        bins = bin_by_tokens(lengths, 64, num_processes)
        assert all(bins) or len(lengths) < len(bins)


@pytest.mark.parametrize("budget", BUDGETS)
def test_no_two_bins_fit_into_one(budget):
    for seed in range(10):
        lengths = draw_lengths(seed)
        bins = bin_by_tokens(lengths, budget)
        num_tokens = sorted(sum(lengths[index] for index in bin) for bin in bins)
        assert len(bins) == 1 or num_tokens[0] + num_tokens[1] > budget


# ---- The order of examples ----------------------------------------------------------------------
def test_an_epoch_has_every_example_once():
    steps = list(StepSampler(61, 16, seed=42))
    assert [len(step) for step in steps] == [16, 16, 16, 13]
    assert sorted(index for step in steps for index in step) == list(range(61))


def test_seed_and_epoch_decide_the_order():
    sampler = StepSampler(61, 16, seed=42)
    first = list(sampler)
    assert list(StepSampler(61, 16, seed=42)) == first
    assert list(StepSampler(61, 16, seed=43)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first


# ---- With examples, and a model whose head is its embedding or is not ---------------------------
@pytest.fixture(scope="module")
def examples(tiny_tokenizer) -> list[dict]:
    texts = [
        ("hi", "Hello!"),
        ("泰国的首都是哪里?", "泰国的首都是曼谷。"),
        ("a", "b"),
        ("Why? " * 9, "So."),
        ("list", "one, two, three " * 20),
    ]
    made = []
    for query, answer in texts:
        messages = parse_record({"query": query, "answer": answer}, "be brief")
        encoded = encode(messages, tiny_tokenizer)
        made.append({name: np.array(ids, np.int32) for name, ids in encoded.items()})
    return made


@pytest.fixture(scope="module", params=["tied", "untied"])
def models(request, untied_model_dir):
    """(The script's model, the same weights in transformers' own model and attention)."""
    folder = TINY if request.param == "tied" else untied_model_dir
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    own = load_weights(
        Qwen2ForCausalLM, str(folder), torch.float32, attn_implementation="packed_attention"
    )
    return own, plain


def count_labels(examples: list[dict]) -> int:
    return sum(int((example["labels"] != IGNORE_INDEX).sum()) for example in examples)


def test_a_micro_batch_is_its_examples_end_to_end(examples):
    batch = flatten(examples)
    joined = np.concatenate([example["input_ids"] for example in examples])
    lengths = [len(example["input_ids"]) for example in examples]
    assert batch["input_ids"][0].tolist() == joined.tolist()
    assert batch["seq_lens"] == lengths
    assert batch["cu_seq_lens"].tolist() == [0, *np.cumsum(lengths).tolist()]
    assert batch["position_ids"][0].tolist() == [i for n in lengths for i in range(n)]


def test_a_trained_position_predicts_the_label_after_it(examples):
    batch = flatten(examples)
    labels = np.concatenate([example["labels"] for example in examples])
    positions = batch["trained_positions"].numpy()
    np.testing.assert_array_equal(labels[positions + 1], batch["targets"].numpy())
    assert len(positions) == count_labels(examples)


def test_processes_share_the_examples_of_a_step(examples):
    """Every example goes to one process, and all run as many forward passes."""
    shares = [collate(examples, 300, rank, 3)[0] for rank in range(3)]
    assert len({len(micro_batches) for micro_batches in shares}) == 1
    found = []
    for micro_batches in shares:
        for batch in micro_batches:
            found += batch["input_ids"][0].split(batch["seq_lens"])
    wanted = sorted(example["input_ids"].tolist() for example in examples)
    assert sorted(ids.tolist() for ids in found if len(ids) > 1) == wanted


def test_all_processes_know_the_divisor(examples):
    divisors = [collate(examples, 300, rank, 3)[1] for rank in range(3)]
    assert divisors == [count_labels(examples)] * 3


def test_a_process_without_an_example_runs_a_forward_pass_without_weight(examples, models):
    """Its loss and gradients are zero, not missing."""
    model = models[0]
    batches = [collate(examples[:2], 300, rank, 4)[0][0] for rank in range(4)]
    losses = [model(**batch, num_items_in_batch=1)["loss"] for batch in batches]
    assert sorted(loss.item() > 0 for loss in losses) == [False, False, True, True]
    sum(losses).backward()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
    model.zero_grad()


# ---- The packing law ----------------------------------------------------------------------------
def test_neighbours_do_not_change_logits(examples, models):
    """An example's logits in a micro-batch are those of it alone in transformers' own model."""
    model, plain = models
    batch = flatten(examples)
    with torch.no_grad():
        packed = model(
            batch["input_ids"],
            position_ids=batch["position_ids"],
            seq_lens=batch["seq_lens"],
            cu_seq_lens=batch["cu_seq_lens"],
            attention_mask={"full_attention": None},
            use_cache=False,
        ).logits[0]
        for logits, example in zip(packed.split(batch["seq_lens"]), examples):
            alone = plain(torch.from_numpy(example["input_ids"]).long()[None]).logits[0]
            torch.testing.assert_close(logits, alone, **CLOSE)


def plain_loss(plain, example) -> torch.Tensor:
    """Return the summed cross entropy of one example's labels, from its logits alone."""
    input_ids = torch.from_numpy(example["input_ids"]).long()
    labels = torch.from_numpy(example["labels"]).long()
    logits = plain(input_ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_neighbours_do_not_change_loss_and_gradients(checkpointing, examples, models):
    """A micro-batch's loss and gradients are the sums of its examples' in transformers' model."""
    model, plain = models
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    loss = model(**flatten(examples), num_items_in_batch=7)["loss"]
    loss.backward()
    expected = sum(plain_loss(plain, example) for example in examples) / 7
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    model.gradient_checkpointing_disable()
    for each in models:
        each.zero_grad()
        each.eval()


def test_with_padding_it_is_transformers_own_model(examples, models, tiny_tokenizer):
    texts = [{"input_ids": example["input_ids"].tolist()} for example in examples]
    batch = tiny_tokenizer.pad(texts, padding_side="left", return_tensors="pt")
    is_real = batch["attention_mask"].bool()
    with torch.no_grad():
        mine, theirs = (model(**batch).logits for model in models)
    torch.testing.assert_close(mine[is_real], theirs[is_real], **CLOSE)


def test_it_generates_as_transformers_own_model(examples, models, tiny_tokenizer):
    texts = [{"input_ids": example["input_ids"].tolist()} for example in examples]
    batch = tiny_tokenizer.pad(texts, padding_side="left", return_tensors="pt")
    mine, theirs = (model.generate(**batch, max_new_tokens=8, do_sample=False) for model in models)
    assert torch.equal(mine, theirs)


def test_logits_can_be_asked_for_the_last_position_alone(examples, models):
    """Generation asks so: logits of a whole prompt take gigabytes."""
    input_ids = torch.from_numpy(examples[-1]["input_ids"]).long()[None]
    with torch.no_grad():
        logits = models[0](input_ids, logits_to_keep=1).logits
    assert logits.shape[1] == 1


def test_generation_asks_for_no_logits_of_the_prompt(examples, models, monkeypatch):
    model = models[0]
    shapes = []
    head = model.lm_head.forward
    monkeypatch.setattr(
        model.lm_head, "forward", lambda hidden: shapes.append(hidden.shape[1]) or head(hidden)
    )
    input_ids = torch.from_numpy(examples[-1]["input_ids"]).long()[None]
    model.generate(input_ids, max_new_tokens=3, do_sample=False)
    assert set(shapes) == {1}
