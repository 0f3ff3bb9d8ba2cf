"""Attention and loss of the script against fp64, in each number format.

Where there is a GPU: python -m pytest --noconftest -m gpu tests/test_attention_and_loss.py
(conftest.py hides GPUs from the other tests).
"""

import inspect
import json
import math

import numpy as np
import pytest
import torch
import transformers
from torch.nn.attention import varlen
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import sft_qwen2
from sft_qwen2 import cross_entropy_sum, flatten, packed_attention, repeat_heads, varlen_attention

# Errors to allow in half precision: half of a last bit, twice.
HALF = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
LIMITS = {torch.float32: 1e-6, **HALF}
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NO_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU, or it is hidden"
)
CPU_AND_GPU = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
)


def hold(name: str, error: float, limit: float) -> None:
    """Assert that an error is small enough, and print it for benchmarks/gpu.py."""
    print("\nRESULT " + json.dumps({"name": name, "error": error, "limit": limit}))
    assert error <= limit


def relative(found, wanted) -> float:
    found = found.detach().double()
    wanted = wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


# ---- Loss ---------------------------------------------------------------------------------------
def make_inputs(dtype, share_of_likely: float = 0.7):
    """Return hidden [1500, 64], head [800, 64], targets [1500], and which targets are likely."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1500, 64, generator=generator)  # two chunks, the second not full
    head = 3 / 8 * torch.randn(800, 64, generator=generator)
    targets = torch.randint(0, 800, (1500,), generator=generator)
    likely = torch.rand(1500, generator=generator) < share_of_likely
    hidden[likely] += 1.2 * head[targets[likely]]
    return hidden.to(dtype), head.to(dtype), targets, likely


def exact_sum(hidden, head, targets):
    return cross_entropy(hidden.double() @ head.double().T, targets, reduction="sum")


def scale_of(dtype) -> float:
    """Return a factor of the loss as training has it: a divisor, or fp16's loss scale."""
    return 64.0 if dtype == torch.float16 else 1 / 1024


def differentiate(function, hidden, head, targets, scale: float = 1.0):
    """Return the loss, and the gradients of hidden and head of function(...) * scale, in fp64."""
    hidden = hidden.clone().requires_grad_()
    head = head.clone().requires_grad_()
    loss = function(hidden, head, targets)
    (loss * scale).backward()
    return loss.detach(), hidden.grad.double() / scale, head.grad.double() / scale


@CPU_AND_GPU
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_loss_and_gradients_are_those_of_fp64(device, dtype):
    hidden, head, targets, likely = (x.to(device) for x in make_inputs(dtype))
    scale = scale_of(dtype)
    loss, *found = differentiate(cross_entropy_sum, hidden, head, targets, scale)
    exact_loss, *exact = differentiate(exact_sum, hidden, head, targets, scale)
    assert loss.dtype == torch.float32
    # A single loss may be rounded to 8 or 11 bits, each in its own direction.
    hold(f"loss, {dtype}, {device}", relative(loss, exact_loss), LIMITS[dtype] / 10 + 3e-7)
    hold(f"hidden's gradient, {dtype}, {device}", relative(found[0], exact[0]), LIMITS[dtype])
    hold(f"head's gradient, {dtype}, {device}", relative(found[1], exact[1]), LIMITS[dtype])
    # With a softmax in half precision these would be wrong by the last bits of 1 - p.
    error = relative(found[0][likely], exact[0][likely])
    hold(f"gradient of likely tokens, {dtype}, {device}", error, LIMITS[dtype])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_flat_softmax_over_a_large_vocabulary_is_finite(dtype):
    hidden = torch.ones(3, 8, dtype=dtype)
    head = torch.zeros(152_064, 8, dtype=dtype)
    loss, *gradients = differentiate(cross_entropy_sum, hidden, head, torch.arange(3))
    assert float(loss) == pytest.approx(3 * math.log(152_064), rel=1e-3)
    for gradient in gradients:
        assert gradient.isfinite().all()


def test_no_position_means_no_loss_and_no_gradient():
    hidden, head, targets, _ = make_inputs(torch.float32)
    loss, of_hidden, of_head = differentiate(cross_entropy_sum, hidden[:0], head, targets[:0])
    assert loss == 0
    assert of_hidden.shape == (0, 64)
    assert not of_head.any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_decides_on_the_dtype_of_the_products(dtype):
    hidden, head, targets, _ = make_inputs(torch.float32)

    def autocast_sum(*inputs):
        with torch.autocast("cpu", dtype):
            return cross_entropy_sum(*inputs)

    scale = scale_of(dtype)
    loss, *found = differentiate(autocast_sum, hidden, head, targets, scale)
    wanted_loss, *wanted = differentiate(
        cross_entropy_sum, hidden.to(dtype), head.to(dtype), targets, scale
    )
    assert loss.dtype == torch.float32
    assert loss == wanted_loss
    for mine, theirs in zip(found, wanted):
        assert torch.equal(mine, theirs)


# ---- Attention ----------------------------------------------------------------------------------
def exact_attention(query, key, value, seq_lens):
    """Return causal attention [1, T, H, D] inside each example, in fp64."""
    outputs = []
    splits = [x[0].double().split(seq_lens, dim=1) for x in (query, key, value)]
    for q, k, v in zip(*splits):
        num_groups = len(q) // len(k)
        k = k.repeat_interleave(num_groups, dim=0)
        v = v.repeat_interleave(num_groups, dim=0)
        num_tokens = q.shape[1]
        future = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)[None]


def bounds_of(seq_lens, device="cpu") -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(seq_lens)], dtype=torch.int32, device=device)


@CPU_AND_GPU
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_attention_on_device(device, dtype):
    """On Ampere in half precision by varlen_attn, elsewhere example by example."""
    seq_lens = [1, 37, 200, 64]
    packing = {"seq_lens": seq_lens, "cu_seq_lens": bounds_of(seq_lens, device), "scaling": 1 / 8}
    torch.manual_seed(0)
    inputs = []
    for heads in (6, 2, 2):
        shape = (1, heads, sum(seq_lens), 64)
        inputs.append(torch.randn(shape, dtype=dtype, device=device, requires_grad=True))
    found = packed_attention(None, *inputs, None, **packing)[0]
    wanted = exact_attention(*inputs, seq_lens)
    hold(f"attention, {dtype}, {device}", relative(found, wanted), ERRORS[dtype])
    gradient = torch.randn_like(found)
    mine = torch.autograd.grad(found, inputs, gradient)
    theirs = torch.autograd.grad(wanted, inputs, gradient.double())
    error = max(relative(*pair) for pair in zip(mine, theirs))
    hold(f"attention's gradients, {dtype}, {device}", error, ERRORS[dtype])


def test_a_changed_token_changes_its_own_and_later_positions_of_its_example():
    seq_lens = [1, 37, 200, 64]
    packing = {"seq_lens": seq_lens, "cu_seq_lens": bounds_of(seq_lens), "scaling": 1 / 8}
    inputs = [torch.randn(1, heads, sum(seq_lens), 64) for heads in (6, 2, 2)]
    before = packed_attention(None, *inputs, None, **packing)[0]
    place = torch.tensor(sum(seq_lens[:2]) + 150)  # in the third example
    changed = [x.index_fill(2, place, 9.0) for x in inputs]
    after = packed_attention(None, *changed, None, **packing)[0]
    positions = (before != after).flatten(2).any(-1)[0].nonzero()[:, 0].tolist()
    assert positions == list(range(int(place), sum(seq_lens[:3])))


def test_what_the_kernel_is_asked_for(monkeypatch):
    """What the GPU's kernel computes by its arguments, computed here: causal, inside each row."""
    signature = inspect.signature(varlen.varlen_attn)
    seq_lens = [1, 37, 20]

    def compute_what_is_asked(*args, **options):
        asked = signature.bind(*args, **options)
        asked.apply_defaults()
        q, k, v, bounds, key_bounds, longest, *_ = asked.args
        asked = asked.arguments
        assert torch.equal(bounds, key_bounds)
        assert longest == asked["max_k"] == max(seq_lens)
        before, behind = (math.inf if n < 0 else n for n in asked["window_size"])
        example = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
        ahead = torch.arange(len(q)) - torch.arange(len(q))[:, None]
        is_seen = (example == example[:, None]) & (-before <= ahead) & (ahead <= behind)
        output = scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            attn_mask=is_seen,
            scale=asked["scale"],
            enable_gqa=asked["enable_gqa"],
        )
        return output[0].transpose(0, 1)

    if "enable_gqa" not in signature.parameters:
        pytest.skip("this PyTorch's kernel wants keys repeated")
    monkeypatch.setattr(sft_qwen2, "varlen_attn", compute_what_is_asked)
    inputs = [torch.randn(1, heads, sum(seq_lens), 64) for heads in (6, 2, 2)]
    found = varlen_attention(*inputs, seq_lens, bounds_of(seq_lens), 0.125)
    assert relative(found, exact_attention(*inputs, seq_lens)) < 1e-6


@pytest.mark.parametrize(
    ("capability", "is_there"), [((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_gpus_from_ampere_on_have_the_kernel(monkeypatch, capability, is_there):
    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16).as_subclass(OnGPU)
    assert sft_qwen2.has_varlen_kernel(query) == is_there


def test_the_kernel_is_for_half_precision_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    class OnGPU(torch.Tensor):
        is_cuda = True

    assert not sft_qwen2.has_varlen_kernel(torch.zeros(1, 1, 1, 64).as_subclass(OnGPU))


def test_repeated_heads_are_those_that_grouped_attention_uses():
    """Before Ampere: query heads 0 to 2 meet key head 0, 3 to 5 meet key head 1."""
    q, k, v = (torch.randn(1, heads, 20, 64) for heads in (6, 2, 2))
    grouped = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    repeated = scaled_dot_product_attention(
        q, repeat_heads(k, 3), repeat_heads(v, 3), is_causal=True
    )
    torch.testing.assert_close(repeated, grouped)


def test_attention_is_in_the_dtype_of_the_values():
    """Under autocast, queries and keys come in fp32."""
    q = torch.randn(1, 2, 5, 64)
    k = torch.randn(1, 2, 5, 64)
    v = torch.randn(1, 2, 5, 64, dtype=torch.float16)
    found = packed_attention(None, q, k, v, None, seq_lens=[2, 3], scaling=0.125)[0]
    assert found.dtype == torch.float16


# ---- The whole model ----------------------------------------------------------------------------
@CPU_AND_GPU
def test_model_on_device(device, tmp_path):
    """Three examples in a micro-batch, as the device trains them, against one by one in fp64."""
    config = transformers.Qwen2Config(
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = sft_qwen2.Qwen2ForCausalLM.from_pretrained(
        tmp_path, attn_implementation="packed_attention", dtype=dtype, device_map=device
    )
    plain = transformers.Qwen2ForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=dtype, device_map=device
    ).double()
    rows = [np.random.default_rng(n).integers(0, 2048, n) for n in (3, 90, 41)]
    batch = flatten([{"input_ids": row, "labels": row} for row in rows])
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            batch[name] = value.to(device)
    loss = model(**batch, num_items_in_batch=1)["loss"]
    exact = 0
    for row in rows:
        row = torch.tensor(row, device=device)
        exact += cross_entropy(plain(row[None]).logits[0, :-1], row[1:], reduction="sum")
    loss.backward()
    exact.backward()
    hold(f"model's loss, {dtype}, {device}", relative(loss, exact), ERRORS[dtype])
    pairs = zip(model.parameters(), plain.parameters())
    error = max(relative(p.grad, q.grad) for p, q in pairs)
    hold(f"model's gradients, {dtype}, {device}", error, 3 * ERRORS[dtype])
