"""GPU memory of a training step, without a GPU: traced tensor by tensor, beside the formula's.

    python benchmarks/memory.py [--model 7B|1.5B|0.5B|all]

A forward and backward pass of the trainer's own model runs on tensors that have shapes but no
contents (FakeTensorMode), and MemTracker adds up those alive. First, one pass over 4 rows of 8,192
tokens, half of them answer tokens, with and without gradients from an earlier micro-batch, beside
the usual way (batched rows, all logits, bf16 AdamW). Then the formula the trainer plans with,
sft_qwen2.step_memory, against the trace. Exit code 1: the formula is off by more than 10 %, or a 7B
step of ours takes more than 60 GiB. Not counted: the CUDA context (0.5 GiB or so), the allocator's
gaps, and what the optimizer's own step needs, when the activations are gone. Attention is a fused
kernel's, and autocast keeps no copies of weights (cache_enabled=False).
"""

import argparse
import contextlib
import itertools
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.nn.attention.varlen
import torch.nn.modules.linear_cross_entropy
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

sys.path.insert(0, str(Path(__file__).parents[1]))
import sft_qwen2
from sft_qwen2 import GIB

ROW, BUDGETS = 8192, (2048, 8192, 32768)  # tokens
COLUMNS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
COLUMNS += ("intermediate_size", "vocab_size", "tie_word_embeddings")
MODELS = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
}


BF16 = sft_qwen2.choose_precision((9, 0), 1, False)
FP16 = sft_qwen2.choose_precision((7, 0), 1, False)  # autocast over fp32 weights
FP32 = sft_qwen2.choose_precision(None, 1, False)
USUAL = sft_qwen2.Precision(torch.bfloat16, "bf16", "adamw_torch", 8, "plain bf16 AdamW")
COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ModuleStats(WeakIdKeyDictionary):
    """MemTracker's peaks of each module, left out: they take three quarters of its time."""

    def values(self):
        return []


class GpuKernels(TorchDispatchMode):
    """What shapes do not show: memory inside CUDA kernels, and the number of answer tokens."""

    def __init__(self, num_trained: int):
        super().__init__()
        self.num_trained, self.seen = num_trained, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        buffers = []  # alive while the operation runs
        if func is torch.ops.torch_attn._varlen_attn_backward.default:
            shape = args[1].shape  # FlashAttention: dq in fp32, and dk and dv of each query head
            dtypes = [torch.float32, args[1].dtype, args[1].dtype]
            buffers = [torch.empty(shape, dtype=dtype) for dtype in dtypes]
        elif func is torch.ops.torch_nn._linear_cross_entropy_batch_chunked.default:
            # acc_policy "auto" on CUDA is "compact": fp32 logits, for bf16 also two casts of them.
            shape = (args[8], args[1].shape[0])
            copies = 2 if args[0].dtype == torch.bfloat16 else 0
            dtypes = [torch.float32, *[torch.bfloat16] * copies]
            buffers = [torch.empty(shape, dtype=dtype) for dtype in dtypes]
        elif len(args) > 1 and isinstance(args[1], list | tuple) and len(args[1]) == 1:
            mask = args[1][0]  # hidden[trained] and its gradient: how many, no fake mask can say
            if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
                index = torch.empty(self.num_trained, dtype=torch.int64)
                args = (args[0], [index] * mask.dim(), *args[2:])
        self.seen.add(func.name())
        result = func(*args, **(kwargs or {}))
        del buffers
        return result


def make_config(name: str):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    options = dict(zip(COLUMNS, MODELS[name]))
    return transformers.Qwen2Config(rope_parameters=rope, use_cache=False, **options)


def make_model(config, dtype: torch.dtype, usual: bool):
    """Return a model as sft_qwen2.load_model makes it, or a plain one, ready to train."""
    attention, bases = "sdpa", (transformers.Qwen2ForCausalLM,)
    if not usual:
        attention, bases = "row_attention", (sft_qwen2.AnswerLoss, *bases)
        transformers.AttentionInterface.register(attention, sft_qwen2.row_attention)
        masks = transformers.AttentionMaskInterface
        masks.register(attention, masks()["sdpa"])
    model_class = type("Qwen2ForCausalLM", bases, {})
    model = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_batch(tokens: int, usual: bool) -> dict:
    rows = max(1, tokens // ROW)
    if usual:
        ids = torch.empty(rows, tokens // rows, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids}
    ids = torch.empty(1, tokens, dtype=torch.int64)
    bounds = torch.empty(rows + 1, dtype=torch.int32)
    batch = {"input_ids": ids, "position_ids": ids.clone(), "shift_labels": ids.clone()}
    return {**batch, "cu_seq_lens": bounds, "seq_lens": [tokens // rows] * rows}


def trace(config, tokens: int, precision: sft_qwen2.Precision, gradients: bool = True) -> dict:
    """Return {"weights", "gradients", "optimizer", "activations", "peak"} in bytes.

    `gradients`: those that earlier micro-batches of the step left.
    """
    usual, autocast = precision is USUAL, contextlib.nullcontext()
    capability = (7, 0) if precision is FP16 else (9, 0)
    if precision.weights != COMPUTE[precision.compute]:
        autocast = torch.autocast("cpu", COMPUTE[precision.compute], cache_enabled=False)
    with (
        FakeTensorMode(),  # on the CPU, where PyTorch without CUDA can go backward
        mock.patch.object(FakeTensor, "is_cuda", property(lambda tensor: True)),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
    ):
        model = make_model(config, precision.weights, usual)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        parameters = weights // precision.weights.itemsize
        state = int(parameters * precision.bytes_per_parameter) - 2 * weights
        if gradients:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
        kernels, tracker = GpuKernels(tokens // 2), MemTracker()
        optimizer_state = torch.empty(state, dtype=torch.uint8)
        tracker.memory_tracking = ModuleStats()
        tracker.track_external(model, optimizer_state)
        with tracker, kernels:
            with autocast:
                loss = model(**make_batch(tokens, usual))["loss"]
            loss.backward()
    assert usual or "torch_nn::_linear_cross_entropy_batch_chunked" in kernels.seen
    assert precision is not BF16 or "torch_attn::_varlen_attn_backward" in kernels.seen
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    parts = {"weights": weights, "gradients": weights if gradients else 0, "optimizer": state}
    if not gradients:  # some are there at the peak
        parts["gradients"] = next(peak[kind] for kind in peak if kind == "Gradient")
    parts["activations"] = peak["Total"] - sum(parts.values())
    return {**parts, "peak": peak["Total"]}


def compare(name: str, tokens: int, precision: sft_qwen2.Precision) -> bool:
    """Print the traced peak of a later micro-batch and the formula's; return whether they agree."""
    config = make_config(name)
    traced = trace(config, tokens, precision)["peak"]
    parts = sft_qwen2.step_memory(config, tokens, precision)
    layers = config.num_hidden_layers * parts["layer"]
    formula = parts["embedding"] + layers + parts["head"] + parts["work"]
    error = formula / traced - 1
    formats = f"{precision.compute}, {str(precision.weights).removeprefix('torch.')}"
    figures = f"{traced / GIB:10.2f}{formula / GIB:10.2f}{error:+10.1%}"
    print(f"{name:5}{tokens:8,}  {formats:16}{figures}", flush=True)
    return abs(error) <= 0.10


def main() -> int:
    parser = argparse.ArgumentParser(description="GPU memory of a step: traced, and by formula.")
    parser.add_argument("--model", choices=[*MODELS, "all"], default="7B")
    model = parser.parse_args().model
    names = list(MODELS) if model == "all" else [model]
    warnings.filterwarnings("ignore")
    sft_qwen2.quiet_libraries()
    agree, parts = True, ("weights", "gradients", "optimizer", "activations", "peak")
    print(f"GiB at the peak of a micro-batch of 4 x {ROW:,} tokens, half of them answers")
    print("model  way    micro-batch" + "".join(f"{part:>12}" for part in parts))
    for name, (way, precision) in itertools.product(names, (("ours", BF16), ("usual", USUAL))):
        for batch in ("first", "later"):
            found = trace(make_config(name), 4 * ROW, precision, gradients=batch == "later")
            figures = "".join(f"{found[part] / GIB:12.2f}" for part in parts)
            print(f"{name:6} {way:6} {batch:11}{figures}", flush=True)
            agree &= (name, way) != ("7B", "ours") or found["peak"] <= 60 * GIB
    print("\nGiB at the peak of a later micro-batch, traced and by sft_qwen2.step_memory")
    print("model  tokens  compute, weights" + f"{'traced':>9}{'formula':>10}{'error':>10}")
    cases = [*((tokens, BF16) for tokens in BUDGETS), (ROW, FP16), (ROW, FP32)]
    for name, case in itertools.product(names, cases):
        agree &= compare(name, *case)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
