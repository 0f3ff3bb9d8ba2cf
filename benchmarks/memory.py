"""GPU memory of a training step, without a GPU: traced tensor by tensor, beside the formula's.

    python benchmarks/memory.py [--model 7B|1.5B|0.5B|all]

A forward and backward pass of the trainer's own model runs on tensors that have shapes but no
contents (FakeTensorMode), and MemTracker adds up those alive. First, one pass over 4 rows of 8,192
tokens, half of them answer tokens, with and without gradients from an earlier micro-batch, beside
the usual way (batched rows, all logits, bf16 AdamW). Then the formula the trainer plans with,
memory_plan.step_memory, against the trace, with and without gradient checkpointing, and as one of 8
processes (FSDP2, whose messages go nowhere). Last, the largest micro-batch that is planned without
checkpointing. Exit code 1: the formula is off by more than 10 %, a 7B step of ours takes more than
60 GiB, or a planned micro-batch more than there is. Not counted: the CUDA context (0.5 GiB or so),
the allocator's gaps, NCCL's buffers, and what the optimizer's own step needs, when the activations
are gone. Attention is a fused kernel's, and autocast keeps no copies of weights between products
(cache_enabled=False).
"""

import argparse
import contextlib
import itertools
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.distributed
import torch.nn.attention.varlen
import torch.nn.modules.linear_cross_entropy
import transformers
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

sys.path.insert(0, str(Path(__file__).parents[1]))
import memory_plan
from memory_plan import GIB

import sft_qwen2

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
BF16_FP32 = sft_qwen2.choose_precision((9, 0), 1, True)  # --fp32, and several processes
USUAL = sft_qwen2.Precision(torch.bfloat16, "bf16", "adamw_torch", 8, "plain bf16 AdamW")
COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ModuleStats(WeakIdKeyDictionary):
    """MemTracker's peaks of each module, left out: they take three quarters of its time."""

    def values(self):
        return []


def chunk_of_logits(num_rows: int, head) -> list[torch.Tensor]:
    """Return what the loss's kernel has on CUDA: in bf16, fp32 logits and two casts of them."""
    dtypes = {torch.bfloat16: [torch.float32, torch.bfloat16, torch.bfloat16]}
    dtypes = dtypes.get(head.dtype, [head.dtype])
    return [torch.empty(num_rows, head.shape[0], dtype=dtype) for dtype in dtypes]


def loss_gradients(hidden, head, targets, *options, loss_grad_output):
    """Return the gradients of single losses with what this takes on CUDA, not on the CPU."""
    logits = chunk_of_logits(min(memory_plan.LOSS_CHUNK, len(hidden)), head)
    gradients = (torch.empty_like(hidden), torch.empty_like(head))
    del logits
    return None, *gradients, None


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
        elif func.name().startswith("torch_nn::_linear_cross_entropy_batch_chunked"):
            chunk = args[6] if func.name().endswith("no_reduction") else args[8]
            buffers = chunk_of_logits(chunk, args[1])
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


def make_model(config, dtype: torch.dtype, usual: bool, checkpointing: bool):
    """Return a model as sft_qwen2.load_model makes it, or a plain one, ready to train."""
    attention, bases = "sdpa", (transformers.Qwen2ForCausalLM,)
    if not usual:
        attention, bases = "row_attention", (sft_qwen2.AnswerLoss, *bases)
        transformers.AttentionInterface.register(attention, sft_qwen2.row_attention)
        masks = transformers.AttentionMaskInterface
        masks.register(attention, masks()["sdpa"])
    model_class = type("Qwen2ForCausalLM", bases, {})
    model = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@contextlib.contextmanager
def process_of(world: int):
    """Be the first of `world` processes, the others of which do not exist; give their mesh."""
    if world == 1:
        yield None
        return
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield torch.distributed.init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    finally:
        torch.distributed.destroy_process_group()


def shard(model, compute: str, mesh):
    """Return the model as accelerate shards it for Trainer."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    plugin.mixed_precision_policy = sft_qwen2.sharded_policy(compute)
    accelerator = mock.Mock(torch_device_mesh=mesh, mixed_precision=compute)
    accelerator.state.fsdp_plugin = plugin
    accelerator.parallelism_config.fsdp_dim_names = ("fsdp",)
    return fsdp2_prepare_model(accelerator, model)


def make_batch(tokens: int, usual: bool) -> dict:
    rows = max(1, tokens // ROW)
    if usual:
        ids = torch.empty(rows, tokens // rows, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids}
    ids = torch.empty(1, tokens, dtype=torch.int64)
    bounds = torch.empty(rows + 1, dtype=torch.int32)
    batch = {"input_ids": ids, "position_ids": ids.clone(), "shift_labels": ids.clone()}
    return {**batch, "cu_seq_lens": bounds, "seq_lens": [tokens // rows] * rows}


def trace(
    config,
    tokens: int,
    precision: sft_qwen2.Precision,
    gradients: bool = True,
    checkpointing: bool = True,
    world: int = 1,
) -> dict:
    """Return {"weights", "gradients", "optimizer", "activations", "peak"} in bytes.

    `gradients`: those that earlier micro-batches of the step left. Of several processes, two
    micro-batches are traced.
    """
    usual, autocast = precision is USUAL, contextlib.nullcontext()
    capability = (7, 0) if precision.compute == "fp16" else (9, 0)
    if precision.weights != COMPUTE[precision.compute]:
        autocast = torch.autocast("cpu", COMPUTE[precision.compute], cache_enabled=False)
    with (
        process_of(world) as mesh,
        FakeTensorMode(),  # on the CPU, where PyTorch without CUDA can go backward
        mock.patch.object(FakeTensor, "is_cuda", property(lambda tensor: True)),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        mock.patch.object(
            torch.nn.modules.linear_cross_entropy,
            "_linear_cross_entropy_batch_chunked_accumulator",
            loss_gradients,
        ),
    ):
        model = make_model(config, precision.weights, usual, checkpointing)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        parameters = weights // precision.weights.itemsize
        state = int(parameters * precision.bytes_per_parameter) - 2 * weights
        if mesh:
            model, weights, state = shard(model, precision.compute, mesh), None, state // world
        elif gradients:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
        kernels, tracker = GpuKernels(tokens // 2), MemTracker()
        optimizer_state = torch.empty(state, dtype=torch.uint8)
        tracker.memory_tracking = ModuleStats()
        tracker.track_external(model, optimizer_state)
        with tracker, kernels:
            for _ in range(2 if mesh else 1):
                tracker.reset_mod_stats()
                with autocast:
                    loss = model(**make_batch(tokens, usual))["loss"]
                loss.backward()
    assert usual or any("linear_cross_entropy_batch_chunked" in name for name in kernels.seen)
    varlen = "torch_attn::_varlen_attn_backward" in kernels.seen
    assert usual or varlen == (precision.compute == "bf16")
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    if mesh:
        return {"peak": peak["Total"]}
    parts = {"weights": weights, "gradients": weights if gradients else 0, "optimizer": state}
    if not gradients:  # some are there at the peak
        parts["gradients"] = next(peak[kind] for kind in peak if kind == "Gradient")
    parts["activations"] = peak["Total"] - sum(parts.values())
    return {**parts, "peak": peak["Total"]}


def compare(name: str, tokens: int, precision, checkpointing: bool, world: int) -> bool:
    """Print the traced peak of a later micro-batch and the formula's; return whether they agree."""
    config = make_config(name)
    options = {"checkpointing": checkpointing, "world": world}
    traced = trace(config, tokens, precision, **options)["peak"]
    parts = memory_plan.step_memory(config, tokens, precision, **options)
    (formula,) = memory_plan.device_loads(config, parts, None, 1)
    error = formula / traced - 1
    formats = f"{precision.compute}, {str(precision.weights).removeprefix('torch.')}"
    figures = f"{traced / GIB:10.2f}{formula / GIB:10.2f}{error:+10.1%}"
    kept = "inputs" if checkpointing else "all"
    print(f"{name:5}{tokens:8,}  {formats:18}{kept:8}{world:9}{figures}", flush=True)
    return abs(error) <= 0.10


def compare_largest(name: str, gpu: int) -> bool:
    """Print the largest micro-batch planned without checkpointing; return whether it fits."""
    config = make_config(name)
    device_map, _ = memory_plan.place(config, ROW, BF16, [gpu * GIB])
    largest = memory_plan.largest_plain(config, 10**6, BF16, device_map, [gpu * GIB], 1)
    traced = trace(config, largest, BF16, checkpointing=False)["peak"]
    print(f"{name:5}{gpu:8}{largest:12,}{traced / GIB:10.2f}", flush=True)
    return traced <= memory_plan.USABLE * gpu * GIB


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
    print("\nGiB at the peak of a later micro-batch, traced and by memory_plan.step_memory")
    print(
        f"model  tokens  {'compute, weights':18}{'kept':8}processes    traced   formula     error"
    )
    cases = [*((tokens, BF16, True, 1) for tokens in BUDGETS), (ROW, FP16, True, 1)]
    cases += [(ROW, FP32, True, 1)]
    single = itertools.product(BUDGETS[:2], (BF16, FP16, BF16_FP32, FP32), (False,), (1,))
    several = itertools.product(BUDGETS[:2], (BF16_FP32,), (True, False), (8,))
    for name, case in itertools.product(names, (*cases, *single, *several)):
        agree &= compare(name, *case)
    print("\nGiB at the peak of the largest micro-batch planned without checkpointing, bf16")
    print("model     GiB      tokens    traced")
    for name, gpu in (("7B", 80), ("7B", 141), ("1.5B", 24), ("0.5B", 24)):
        if name in names:
            agree &= compare_largest(name, gpu)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
