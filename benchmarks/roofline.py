"""Where the time of a micro-batch of Qwen2-7B goes on an H100: estimated, nothing is measured.

    python benchmarks/roofline.py [--tokens 4906] [--recompute]

The trainer's own model runs forward and backward on tensors without contents, and every operator is
written down. A matrix product takes its FLOPs at PRODUCT_FLOPS, or its bytes at BYTES_PER_S if that
is longer. Every other operator reads its inputs and writes its outputs once, at BYTES_PER_S. Views
take nothing. Attention and the loss are one operator each for the recorder, so theirs is a formula.
Layers are alike: one and two are recorded, and the others are counted like the second. Launches by
the host and the optimizer's step are left out: this is what a GPU does that never waits.

Half of the tokens are trained, and examples have 512 tokens. A second micro-batch of a step is
shown: it adds to gradients that are there.

Then two figures that are computed: the bytes of a checkpoint, and those that a micro-batch sends
from one machine to the other where 16 processes on two machines share the model (FSDP2). Layers are
gathered twice, the embedding twice, the head once, in bf16. Gradients are sent once, in fp32. In a
ring, 15 of 16 parts of all that pass each link.
"""

import argparse
import collections
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "harness")]

# ruff: noqa: E402
from recorded_steps import (
    TRAINED_SHARE,
    GpuKernels,
    make_batch,
    make_config,
    make_model,
    pretend_gpu,
)

from sft.memory_model import QWEN2_SIZES, Job, count_parameters
from sft.precision import choose_precision
from sft.step_time import training_flops
from sft.throughput import PEAK_TFLOPS

MODEL = "Qwen2-7B"
GPU = "H100"
# What an H100 SXM is taken to reach. Its data sheet has 989 TFLOP/s in bf16 and 3.35 TB/s:
# https://www.nvidia.com/en-us/data-center/h100/
PRODUCT_FLOPS = 650e12
BYTES_PER_S = 2.7e12
# FlashAttention-2: https://arxiv.org/abs/2307.08691, figures 5 and 6, is at 335 TFLOP/s both ways.
ATTENTION_FLOPS = 335e12
EXAMPLE_TOKENS = 512
NUM_PROCESSES = 16
LINK_BYTES_PER_S = 100e9 / 8
GB = 1e9
FP32_BYTES = 4
BF16_BYTES = 2
# Operators that move nothing, and those whose time is a formula; views are known by themselves.
NOT_COUNTED = ("prim::", "aten::empty", "aten::_unsafe_view", "varlen", "linear_cross_entropy")
PRODUCTS = "products of layers"
ELEMENTWISE = "elementwise work and copies"


class Operators(TorchDispatchMode):
    """Adds up the seconds of operators, of products and of all others."""

    def __init__(self):
        super().__init__()
        self.seconds = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name()
        if func.is_view or any(part in name for part in NOT_COUNTED):
            return result
        flops = 0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        num_bytes = count_bytes((args, kwargs)) + count_bytes(result)
        group = ELEMENTWISE
        if flops > 0:
            group = PRODUCTS
        self.seconds[group] += max(flops / PRODUCT_FLOPS, num_bytes / BYTES_PER_S)
        return result


def count_bytes(tree) -> int:
    """Return the bytes of all tensors of an operator's arguments or results."""
    num_bytes = 0
    for tensor in tree_leaves(tree):
        if isinstance(tensor, torch.Tensor):
            num_bytes += tensor.numel() * tensor.element_size()
    return num_bytes


def record_layers(num_layers: int, tokens: int, recompute: bool) -> collections.Counter:
    """Return the seconds of each group of operators in a model of so many layers."""
    config = make_config(MODEL, num_hidden_layers=num_layers)
    job = Job(config=config, precision=choose_precision((9, 0), fp32=False, optim="auto"))
    with pretend_gpu(job):
        model = make_model(config, job.precision.weights, recompute)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        batch = make_batch(tokens, num_examples=max(1, tokens // EXAMPLE_TOKENS))
        with GpuKernels(), Operators() as operators:
            model(**batch, num_items_in_batch=1)["loss"].backward()
    return operators.seconds


def loss_s(config, num_trained: int) -> float:
    """Return the seconds of the loss: its logits twice, once in each direction, and two gradients.

    Forward, fp32 logits are passed over seven times: a product writes them, their maximum is
    read, it is subtracted, exp, and the sum. Backward all of that comes again, then a scaling and a
    cast to bf16.
    """
    num_logits = num_trained * config.vocab_size
    products = 4 * 2 * num_logits * config.hidden_size
    passes = 7 + 7 + 2 + 1
    num_bytes = num_logits * (passes * FP32_BYTES + BF16_BYTES)
    return products / PRODUCT_FLOPS + num_bytes / BYTES_PER_S


def attention_s(config, tokens: int, recompute: bool) -> float:
    """Return the seconds of causal attention: 4 FLOPs a pair and value forward, 10 backward."""
    passes = 1
    if recompute:
        passes = 2
    pairs = tokens * EXAMPLE_TOKENS / 2
    values = config.num_hidden_layers * config.hidden_size
    return (4 * passes + 10) * pairs * values / ATTENTION_FLOPS


# ---- What is saved and sent ---------------------------------------------------------------------
def checkpoint_bytes(config, capability: tuple[int, int], fp32: bool) -> float:
    precision = choose_precision(capability, fp32, optim="auto")
    return count_parameters(config).model * precision.checkpoint_bytes_per_parameter


def message_bytes(config) -> float:
    """Return the bytes that a micro-batch sends over each link of a ring of all processes."""
    counts = count_parameters(config)
    gathered = 2 * config.num_hidden_layers * counts.layer + 3 * counts.table
    sent_share = (NUM_PROCESSES - 1) / NUM_PROCESSES
    return sent_share * (gathered * BF16_BYTES + counts.model * FP32_BYTES)


# ---- The command --------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4906, help="of the micro-batch")
    parser.add_argument("--recompute", action="store_true", help="all layers in the backward pass")
    args = parser.parse_args()
    config = QWEN2_SIZES[MODEL]
    one = record_layers(1, args.tokens, args.recompute)
    two = record_layers(2, args.tokens, args.recompute)
    seconds = {}
    for group in (PRODUCTS, ELEMENTWISE):
        seconds[group] = one[group] + (config.num_hidden_layers - 1) * (two[group] - one[group])
    num_trained = int(TRAINED_SHARE * args.tokens)
    seconds["loss"] = loss_s(config, num_trained)
    seconds["attention"] = attention_s(config, args.tokens, args.recompute)
    total = sum(seconds.values())
    way = "nothing recomputed"
    if args.recompute:
        way = "layers recomputed"
    print(f"estimated  {MODEL} on {GPU}, {args.tokens:,} tokens, {way}\n")
    print("| what | ms | share |\n|---|--:|--:|")
    for group, part in seconds.items():
        print(f"| {group} | {1000 * part:.0f} | {part / total:.0%} |")
    lengths = [EXAMPLE_TOKENS] * (args.tokens // EXAMPLE_TOKENS)
    lengths.append(args.tokens % EXAMPLE_TOKENS)
    mfu = training_flops(config, lengths, num_trained) / total / (PEAK_TFLOPS[GPU] * 1e12)
    print(f"| all | {1000 * total:.0f} | MFU {mfu:.0%} |\n")
    for name, capability, fp32 in (
        ("by default", (8, 0), False),
        ("in fp16", (7, 0), False),
        ("--fp32", (8, 0), True),
    ):
        print(f"checkpoint {checkpoint_bytes(config, capability, fp32) / GB:.1f} GB {name}")
    sent = message_bytes(config)
    print(f"messages   {sent / GB:.0f} GB, {sent / LINK_BYTES_PER_S:.1f} s at 100 Gb/s")


if __name__ == "__main__":
    main()
