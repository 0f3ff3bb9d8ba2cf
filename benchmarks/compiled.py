"""What torch.compile of each layer's MLP and norms gains on the CPU, at the layers of Qwen2-0.5B.

    python benchmarks/compiled.py [--layers 4] [--micro_batches 12]

One process, one model with random fp32 weights and the stand-in's small vocabulary, so that layers
take nearly all of the time. Each micro-batch goes forward and backward as it is and compiled, in
turns, the first of the two changing. Micro-batches have 300 to 2,000 tokens, each another number,
of examples of 100 to 500. `dynamic=True` compiles for all lengths. Three micro-batches warm up.

Times are the CPU's for one thread, which other programs on the machine hardly change. The answer is
the median of the ratios of both times of a micro-batch. The seconds to compile are what the clock
says of the first compiled micro-batch beyond the plain one.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

from throughput import SEED, be_quiet  # isort: skip  # finds the script, too

import numpy as np
import torch
import transformers
from torch._dynamo.utils import counters

import sft_qwen2
from sft.memory_model import QWEN2_SIZES

VOCAB_SIZE = 4096
NUM_WARM_UPS = 3


def make_layers(num_layers: int) -> sft_qwen2.Qwen2ForCausalLM:
    """Return a model with so many layers of Qwen2-0.5B."""
    sizes = QWEN2_SIZES["Qwen2-0.5B"]
    config = transformers.Qwen2Config(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        num_hidden_layers=num_layers,
        vocab_size=VOCAB_SIZE,
        use_cache=False,
    )
    torch.manual_seed(SEED)
    model = sft_qwen2.Qwen2ForCausalLM._from_config(
        config, dtype=torch.float32, attn_implementation="packed_attention"
    )
    return model.train()


def list_parts(model) -> list[torch.nn.Module]:
    """Return what is compiled of a model: each layer's MLP and norms."""
    parts = []
    for layer in model.model.layers:
        parts += [layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
    return parts


def compile_parts(model, backend: str = "inductor") -> None:
    """Let each layer's MLP and norms run compiled, once for micro-batches of all lengths."""
    for part in list_parts(model):
        part.forward = torch.compile(part.forward, dynamic=True, backend=backend)


def list_forwards(model) -> list:
    return [part.forward for part in list_parts(model)]


def make_micro_batches(number: int) -> list[dict]:
    """Return micro-batches of changing lengths, whose later half of each example is trained."""
    random = np.random.default_rng(SEED)
    micro_batches = []
    for num_tokens in random.permutation(np.linspace(300, 2000, number).astype(int)):
        examples = []
        left = int(num_tokens)
        while left > 0:
            length = min(left, int(random.integers(100, 500)))
            left -= length
            input_ids = random.integers(0, VOCAB_SIZE, length)
            labels = input_ids.copy()
            labels[: length // 2] = sft_qwen2.IGNORE_INDEX
            examples.append({"input_ids": input_ids, "labels": labels})
        micro_batches.append(sft_qwen2.flatten(examples))
    return micro_batches


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A forward and a backward pass."""

    cpu_s: float
    clock_s: float
    loss: float


def run(model, micro_batch: dict) -> Pass:
    model.zero_grad()
    start_s = time.perf_counter()
    cpu_start_s = time.process_time()
    loss = model(**micro_batch, num_items_in_batch=len(micro_batch["targets"]))["loss"]
    loss.backward()
    return Pass(
        cpu_s=time.process_time() - cpu_start_s,
        clock_s=time.perf_counter() - start_s,
        loss=loss.item(),
    )


def run_both(model, forwards: dict[str, list], micro_batch: dict, ways: list[str]) -> dict:
    """Return {way: Pass} of a micro-batch; `forwards`: what each part calls in each way."""
    passes = {}
    for way in ways:
        for part, forward in zip(list_parts(model), forwards[way]):
            part.forward = forward
        passes[way] = run(model, micro_batch)
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro_batches", type=int, default=12, help="after three to warm up")
    args = parser.parse_args()
    be_quiet()
    torch.set_num_threads(1)
    model = make_layers(args.layers)
    forwards = {"plain": list_forwards(model)}
    compile_parts(model)
    forwards["compiled"] = list_forwards(model)
    ways = ["plain", "compiled"]
    ratios = []
    errors = []
    for number, micro_batch in enumerate(make_micro_batches(NUM_WARM_UPS + args.micro_batches)):
        passes = run_both(model, forwards, micro_batch, ways)
        ways.reverse()
        plain = passes["plain"]
        compiled = passes["compiled"]
        num_tokens = sum(micro_batch["seq_lens"])
        both = f"{plain.cpu_s:.2f} s, compiled {compiled.cpu_s:.2f} s"
        print(f"{num_tokens:5} tokens: {both}", flush=True)
        errors.append(abs(compiled.loss / plain.loss - 1))
        if number == 0:
            compiling_s = compiled.clock_s - plain.clock_s
        if number >= NUM_WARM_UPS:
            ratios.append(plain.cpu_s / compiled.cpu_s)
    print(f"speed      {statistics.median(ratios):.3f} x ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"compiling  {compiling_s:.1f} s, {counters['stats']['unique_graphs']} graphs")
    print(f"loss       differs by at most {max(errors):.1e}")


if __name__ == "__main__":
    main()
