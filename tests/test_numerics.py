"""sft/numerics.py against fp64, against PyTorch's own, and through saving and loading.

Where there is a GPU: python -m pytest --noconftest -m gpu tests/test_numerics.py
(conftest.py hides GPUs from the other tests).
"""

import inspect
import io
import json
import math
import os
import sysconfig

import numpy as np
import pytest
import torch
import torch_2_11
import transformers
from torch.nn.attention import varlen
from torch.nn.functional import cross_entropy

import sft_qwen2
from sft.numerics import (
    BLOCK,
    adamw_8bit_class,
    check_compiler,
    cross_entropy_sum,
    varlen_attention,
)
from sft.rows import UserError

# torch.compile, its distributed checkpoints and FakeTensor warn of their own doings.
pytestmark = pytest.mark.filterwarnings("ignore")

HALF = {torch.bfloat16: 4e-3, torch.float16: 1e-3}  # errors to allow: half of a last bit, twice
LIMITS = {torch.float32: 1e-6, **HALF}
WAYS = ["library", "2.11"]


# ---- The loss -----------------------------------------------------------------------------------
@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The loss by linear_cross_entropy, and by the benchmarks' stand-in for an older PyTorch."""
    if request.param == "2.11":
        torch_2_11.install(monkeypatch.setattr)
    elif torch.nn.functional.linear_cross_entropy is torch_2_11.summed_cross_entropy:
        pytest.skip("this PyTorch has no linear_cross_entropy")


def make_inputs(dtype, easy=0.7):
    """Return hidden [1500, 64], head [800, 64], targets [1500]; this share of tokens is likely."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1500, 64, generator=generator)  # two chunks, the second not full
    head = 3 / 8 * torch.randn(800, 64, generator=generator)
    targets = torch.randint(0, 800, (1500,), generator=generator)
    likely = torch.rand(1500, generator=generator) < easy
    hidden[likely] += 1.2 * head[targets[likely]]
    return hidden.to(dtype), head.to(dtype), targets, likely


def exact_sum(hidden, head, targets):
    return cross_entropy(hidden.double() @ head.double().T, targets, reduction="sum")


def differentiate(function, hidden, head, targets, scale=1.0):
    """Return the loss, and the gradients of hidden and head, of function(...) * scale, in fp64."""
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    loss = function(*leaves, targets)
    (loss * scale).backward()
    return loss.detach(), *(x.grad.double() / scale for x in leaves)


def relative(found, wanted) -> float:
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_loss_and_gradients_are_those_of_fp64(way, dtype):
    *inputs, likely = make_inputs(dtype)
    scale = 1 / 1024 if dtype != torch.float16 else 64.0  # as a divisor, and a loss scale, would
    loss, *found = differentiate(cross_entropy_sum, *inputs, scale)
    exact_loss, *exact = differentiate(exact_sum, *inputs, scale)
    assert loss.dtype == torch.float32
    # A single loss may be rounded: to 8 or 11 bits, each in its own direction.
    assert relative(loss.double(), exact_loss) < LIMITS[dtype] / 10 + 3e-7
    for gradient, wanted in zip(found, exact):
        assert relative(gradient, wanted) < LIMITS[dtype]
    # With a softmax in half precision, these would be wrong by their last bits of 1 - p.
    assert relative(found[0][likely], exact[0][likely]) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_flat_softmax_over_a_large_vocabulary_is_finite(way, dtype):
    hidden, head = torch.ones(3, 8, dtype=dtype), torch.zeros(152_064, 8, dtype=dtype)
    loss, *gradients = differentiate(cross_entropy_sum, hidden, head, torch.arange(3))
    assert abs(float(loss) / (3 * torch.tensor(152_064.0).log()) - 1) < 1e-3
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_no_position_means_no_loss_and_no_gradient(way):
    hidden, head, targets, _ = make_inputs(torch.float32)
    loss, *gradients = differentiate(cross_entropy_sum, hidden[:0], head, targets[:0])
    assert loss == 0 and gradients[0].shape == (0, 64) and not gradients[1].any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_decides_on_the_dtype_of_the_products(way, dtype):
    hidden, head, targets, _ = make_inputs(torch.float32)

    def autocast_sum(*inputs):
        with torch.autocast("cpu", dtype):
            return cross_entropy_sum(*inputs)

    scale = 1 / 1024 if dtype != torch.float16 else 64.0
    loss, *found = differentiate(autocast_sum, hidden, head, targets, scale)
    halves = (hidden.to(dtype), head.to(dtype), targets)
    half_loss, *wanted = differentiate(cross_entropy_sum, *halves, scale)
    assert loss.dtype == torch.float32 and loss == half_loss
    assert all(torch.equal(*pair) for pair in zip(found, wanted))


# ---- AdamW with 8-bit state ---------------------------------------------------------------------
@pytest.fixture
def eager():
    """Optimizer steps that are not compiled: the same sums, without the wait for a compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


SHAPES = {"matrix": (64, BLOCK), "narrow": (128, 96), "small": (16, BLOCK), "norm": (8192,)}


def make_optimizer(shapes=SHAPES, **options):
    """Return bf16 parameters by name, and an optimizer over them."""
    generator = torch.Generator().manual_seed(1)
    made = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    parameters = {name: torch.nn.Parameter(value) for name, value in made.items()}
    options = {"lr": 1e-2, "seed": 0, "bf16_stochastic_round": True} | options
    return parameters, adamw_8bit_class()(parameters.values(), **options)


def step(parameters, optimizer, seed=0, size=1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.grad = size * torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def formats(parameters, optimizer) -> dict:
    states = {name: optimizer.state[p]["exp_avg_sq"] for name, p in parameters.items()}
    return {name: getattr(state, "block_size", state.dtype) for name, state in states.items()}


EXPECTED = {"matrix": BLOCK, "narrow": torch.float32, "small": torch.float32, "norm": torch.float32}


def test_saved_and_loaded_it_steps_on_as_if_never_stopped(eager):
    """Matrices have state of 8 bits, and all else of fp32, before and after."""
    assert BLOCK == 128  # it divides 896, 1536, 3584, 8192: no block straddles rows of any Qwen2
    parameters, optimizer = make_optimizer()
    for number in range(2):
        step(parameters, optimizer, number)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "values": parameters}, file)
    file.seek(0)
    saved = torch.load(file)
    others, loaded = make_optimizer()
    loaded.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for name, value in saved["values"].items():
            others[name].copy_(value)
    torch.rand(3)  # what others draw does not matter
    for these, by in ((parameters, optimizer), (others, loaded)):
        assert formats(these, by) == EXPECTED
        step(these, by, 2)
    for name, value in parameters.items():
        assert torch.equal(value, others[name]), name


@pytest.mark.slow  # it compiles
def test_random_rounding_differs_by_seed_and_step_and_leaves_other_draws_alone():
    """Compiled, as in a run: there the random bits come from a seed that the device draws.

    Without gradients only weight decay moves the weights, in each step as far.
    """
    results = []
    for seed in (0, 0, 1):
        parameters, optimizer = make_optimizer({"matrix": (64, BLOCK)}, seed=seed, weight_decay=0.3)
        began, draws = parameters["matrix"].detach().clone(), torch.get_rng_state()
        for _ in range(2):
            with torch.no_grad():
                parameters["matrix"].copy_(began)
            step(parameters, optimizer, size=0.0)
            results.append(parameters["matrix"].detach().clone())
        assert torch.equal(draws, torch.get_rng_state())
    first, second, first_again, second_again, *others = results
    assert torch.equal(first, first_again) and torch.equal(second, second_again)
    for other in (second, *others):
        assert 0.1 < (first != other).float().mean() < 0.9


# ---- What compiling needs -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "device, variable, names", [("cuda", "CC", "gcc or clang"), ("cpu", "CXX", r"g\+\+")]
)
def test_a_missing_compiler_is_named(monkeypatch, tmp_path, device, variable, names):
    monkeypatch.delenv(variable, raising=False)
    check_compiler(device)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=rf"missing: {names} \({variable} names another\)"):
        check_compiler(device)
    compiler = tmp_path / "my-compiler"
    compiler.write_text("")
    os.chmod(compiler, 0o755)
    monkeypatch.setenv(variable, "my-compiler")
    check_compiler(device)
    monkeypatch.setattr(sysconfig, "get_path", lambda *args: str(tmp_path))
    with pytest.raises(UserError, match=r": [^:]+/Python\.h \(of python3-dev\)$"):
        check_compiler(device)


# ---- What each device computes in its own way ---------------------------------------------------
NO_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU, or it is hidden"
)
GPU = [pytest.mark.gpu, NO_GPU]
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def hold(name: str, error: float, limit: float) -> None:
    """Assert it, and print it for benchmarks/gpu.py."""
    print("\nRESULT " + json.dumps({"name": name, "error": error, "limit": limit}))
    assert error <= limit


def exact_attention(qkv, seq_lens):
    """Return causal attention [1, T, H, D] inside each row, in fp64."""
    outputs = []
    for q, k, v in zip(*(x[0].double().split(seq_lens, dim=1) for x in qkv)):
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        future = torch.ones(2 * q.shape[1:2], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)[None]


@CPU_AND_GPU
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_attention_on_device(device, dtype):
    """On Ampere, in half precision, by varlen_attn; elsewhere row by row."""
    seq_lens = [1, 37, 200, 64]
    bounds = torch.tensor([0, *np.cumsum(seq_lens)], dtype=torch.int32, device=device)
    bounds = {"seq_lens": seq_lens, "cu_seq_lens": bounds, "scaling": 64**-0.5}
    options = {"dtype": dtype, "device": device, "requires_grad": True}
    torch.manual_seed(0)
    qkv = [torch.randn(1, heads, sum(seq_lens), 64, **options) for heads in (6, 2, 2)]
    found = sft_qwen2.row_attention(None, *qkv, None, **bounds)[0]
    wanted = exact_attention(qkv, seq_lens)
    hold(f"attention, {dtype}, {device}", relative(found.double(), wanted), ERRORS[dtype])
    gradient = torch.randn_like(found)
    pairs = zip(*(torch.autograd.grad(x, qkv, gradient.to(x.dtype)) for x in (found, wanted)))
    error = max(relative(*pair) for pair in pairs)
    hold(f"attention's gradients, {dtype}, {device}", error, ERRORS[dtype])
    last = torch.tensor(sum(seq_lens[:3]) - 1, device=device)  # of the third row
    changed = [x.detach().index_fill(2, last, 9.0) for x in qkv]
    other = sft_qwen2.row_attention(None, *changed, None, **bounds)[0]
    assert (other != found).flatten(2).any(-1).nonzero().tolist() == [[0, int(last)]]


@pytest.mark.parametrize("repeats_keys", [False, True])
def test_what_the_kernel_is_asked_for(monkeypatch, repeats_keys):
    """What the GPU's kernel computes by its arguments, computed here: causal, inside each row."""
    kernel = inspect.signature(varlen.varlen_attn)

    def varlen_attn(*args, **options):
        asked = kernel.bind(*args, **options)
        asked.apply_defaults()
        q, k, v, bounds, k_bounds, longest, *_ = asked.args
        asked = asked.arguments
        assert asked["enable_gqa"] != repeats_keys and bounds.equal(k_bounds)
        assert asked["scale"] == 0.125 and longest == asked["max_k"] == max(seq_lens)
        before, behind = (math.inf if n < 0 else n for n in asked["window_size"])
        row = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
        ahead = torch.arange(len(q)) - torch.arange(len(q))[:, None]
        seen = (row == row[:, None]) & (-before <= ahead) & (ahead <= behind)
        qkv = (x.transpose(0, 1)[None] for x in (q, k, v))
        options = {"attn_mask": seen, "scale": asked["scale"], "enable_gqa": asked["enable_gqa"]}
        found = torch.nn.functional.scaled_dot_product_attention(*qkv, **options)
        return found[0].transpose(0, 1)

    if "enable_gqa" not in kernel.parameters:
        pytest.skip("this PyTorch's kernel wants keys repeated")
    attention = torch_2_11.repeat_keys(varlen_attn) if repeats_keys else varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", attention)
    seq_lens = [1, 37, 20]
    bounds = torch.tensor([0, *np.cumsum(seq_lens)], dtype=torch.int32)
    qkv = [torch.randn(1, heads, sum(seq_lens), 64) for heads in (6, 2, 2)]
    found = varlen_attention(*qkv, seq_lens, bounds, 0.125)
    assert relative(found.double(), exact_attention(qkv, seq_lens)) < 1e-6


def test_attention_is_in_the_dtype_of_the_values():
    """Under autocast, queries and keys come in fp32."""
    formats = (torch.float32, torch.float32, torch.float16)
    q, k, v = (torch.randn(1, 2, 5, 64, dtype=dtype) for dtype in formats)
    found = sft_qwen2.row_attention(None, q, k, v, None, seq_lens=[2, 3], scaling=0.125)[0]
    assert found.dtype == torch.float16


@CPU_AND_GPU
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_loss_on_device(device, dtype):
    *inputs, _ = (x.to(device) for x in make_inputs(dtype))
    scale = 1 / 1024 if dtype != torch.float16 else 64.0
    loss, *found = differentiate(cross_entropy_sum, *inputs, scale)
    exact_loss, *wanted = differentiate(exact_sum, *inputs, scale)
    hold(f"loss, {dtype}, {device}", relative(loss.double(), exact_loss), ERRORS[dtype] / 10)
    error = max(relative(*pair) for pair in zip(found, wanted))
    hold(f"loss's gradients, {dtype}, {device}", error, ERRORS[dtype] / 2)


@CPU_AND_GPU
def test_model_on_device(device, tmp_path):
    """Three rows in a micro-batch, as the device trains them, against one by one in fp64."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048}
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).save_pretrained(tmp_path)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options = {"dtype": dtype, "device_map": device}
    model = sft_qwen2.model_class().from_pretrained(
        tmp_path, attn_implementation="row_attention", **options
    )
    plain = transformers.Qwen2ForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", **options
    ).double()
    ids = [np.random.default_rng(n).integers(0, 2048, n) for n in (3, 90, 41)]
    batch = sft_qwen2.flatten([{"input_ids": row, "labels": row} for row in ids])
    batch |= {name: x.to(device) for name, x in batch.items() if isinstance(x, torch.Tensor)}
    loss, exact = model(**batch)["loss"], 0
    for row in ids:
        row = torch.tensor(row, device=device)
        exact += cross_entropy(plain(row[None]).logits[0, :-1], row[1:], reduction="sum")
    loss.backward()
    exact.backward()
    hold(f"model's loss, {dtype}, {device}", relative(loss.double(), exact), ERRORS[dtype])
    pairs = zip(model.parameters(), plain.parameters())
    error = max(relative(p.grad.double(), q.grad.double()) for p, q in pairs)
    hold(f"model's gradients, {dtype}, {device}", error, 3 * ERRORS[dtype])


@pytest.mark.slow  # it compiles
@CPU_AND_GPU
def test_an_update_below_the_last_bit_arrives_on_device(device):
    """At a rate of 1e-5, over bf16 weights: all of it, in the mean. Plain rounding loses it."""
    torch.manual_seed(0)
    began = (0.02 * torch.randn(1024, 512, device=device)).bfloat16()
    weights, exact = (torch.nn.Parameter(x) for x in (began.clone(), began.double()))
    weights.grad = torch.randn_like(weights)
    exact.grad = weights.grad.double()
    options = {"lr": 1e-5, "weight_decay": 0.003}
    adamw_8bit_class()([weights], seed=0, bf16_stochastic_round=True, **options).step()
    torch.optim.AdamW([exact], **options).step()
    moved, wanted = weights.detach().double() - began, exact.detach() - began
    share = float((moved * wanted.sign()).sum() / wanted.abs().sum())
    hold(f"update's share that is lost, {device}", abs(share - 1), 0.05)
