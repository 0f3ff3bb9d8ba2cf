"""GPU memory of training steps without a GPU: recorded tensor by tensor, planned, and allocated.

    python benchmarks/memory.py [--models 7B 1.5B 0.5B]     # writes results/memory.json

Forward and backward passes of the trainer's own model run on tensors that have shapes but no
contents (FakeTensorMode), as one process or the first of several (FSDP2, whose messages go
nowhere), and every storage that comes, goes or changes its size is recorded.

1. One micro-batch of 4 x 8,192 tokens, half of them answers, with gradients of an earlier one,
   beside the usual way: batched rows, all logits, bf16 AdamW.
2. The peak of such micro-batches beside the formula that the trainer plans with.
3. Three optimizer steps of 128 short, long or mixed rows, cut into micro-batches as planned for a
   box, allocated one by one as PyTorch's caching allocator with expandable segments does, with the
   update's state and temporaries, in the memory that is free there.

Exit code 1: the formula is off by more than 10 %, or a planned step runs out of memory. Not
recorded, but set aside in 3: 0.45 GiB for kernels' workspaces, and 0.6 for NCCL. What streams of
FSDP2 cannot share is not simulated.
"""

import argparse
import contextlib
import json
import platform
import shlex
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed
import torch.nn.attention.varlen
import torch.nn.modules.linear_cross_entropy
import transformers
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
import sft_qwen2
from sft.memory_plan import (
    GIB,
    LOSS_CHUNK,
    Job,
    Precision,
    choose_precision,
    device_loads,
    fits,
    parse_gpus,
    place,
    plan_memory,
)

MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "memory.json"
ROW = 8192  # tokens
COLUMNS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
COLUMNS += ("intermediate_size", "vocab_size", "tie_word_embeddings")
MODELS = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
}
BF16 = choose_precision((9, 0), False)
FP16 = choose_precision((7, 0), False)  # autocast over fp32 weights
FP32 = choose_precision(None, False)
BF16_FP32 = choose_precision((9, 0), True)  # --fp32
USUAL = Precision(torch.bfloat16, torch.bfloat16, "adamw_torch", 8, "plain bf16 AdamW")
BOXES = (("1x80", 1), ("1x48", 1), ("2x80", 2), ("8x80", 8), ("4x24", 4), ("4x32", 4))
ROWS = {"short": (100, 900), "long": (4000, 8000), "mixed": (50, ROW)}  # tokens, at least and most
WORKSPACES, NCCL = 0.45 * GIB, 0.6 * GIB


# ---- Recording a micro-batch --------------------------------------------------------------------
def make_config(name: str):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    options = dict(zip(COLUMNS, MODELS[name]))
    return transformers.Qwen2Config(rope_parameters=rope, use_cache=False, **options)


def make_model(config, precision: Precision, checkpointing: bool):
    """Return a model as sft_qwen2.load_model makes it, or a plain one, ready to train."""
    attention, bases = "sdpa", (transformers.Qwen2ForCausalLM,)
    if precision is not USUAL:
        attention, bases = "row_attention", (sft_qwen2.AnswerLoss, *bases)
        transformers.AttentionInterface.register(attention, sft_qwen2.row_attention)
        masks = transformers.AttentionMaskInterface
        masks.register(attention, masks()["sdpa"])
    model_class = type("Qwen2ForCausalLM", bases, {})
    options = {"dtype": precision.weights, "attn_implementation": attention}
    model = model_class._from_config(config, **options)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@contextlib.contextmanager
def process_of(shards: int):
    """Be the first of `shards` processes, the others of which do not exist; give their mesh."""
    if shards == 1:
        yield None
        return
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=shards)
    try:
        yield torch.distributed.init_device_mesh("cpu", (shards,), mesh_dim_names=("fsdp",))
    finally:
        torch.distributed.destroy_process_group()


def shard(model, precision: Precision, mesh):
    """Return the model as accelerate shards it: layers, embedding, and norm with head."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        precision.compute_dtype, reduce_dtype=torch.float32
    )
    # Where accelerate is told of a mixed precision, it makes the weights fp32.
    same = precision.weights == precision.compute_dtype
    accelerator = mock.Mock(torch_device_mesh=mesh, mixed_precision="no" if same else "yes")
    accelerator.state.fsdp_plugin = plugin
    accelerator.parallelism_config.fsdp_dim_names = ("fsdp",)
    return fsdp2_prepare_model(accelerator, model)


def make_batch(tokens: int, rows: int, usual: bool) -> dict:
    if usual:
        ids = torch.empty(rows, tokens // rows, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids}
    ids = torch.empty(1, tokens, dtype=torch.int64)
    bounds = torch.empty(rows + 1, dtype=torch.int32)
    batch = {"input_ids": ids, "position_ids": ids.clone(), "shift_labels": ids.clone()}
    return {**batch, "cu_seq_lens": bounds, "seq_lens": [tokens // rows] * rows}


def chunk_of_logits(num_rows: int, head) -> list[torch.Tensor]:
    """Return what the loss's kernel has on CUDA: in half precision fp32 logits and two casts."""
    dtypes = [torch.float32] if head.dtype == torch.float32 else [torch.float32, *[head.dtype] * 2]
    return [torch.empty(num_rows, head.shape[0], dtype=dtype) for dtype in dtypes]


def loss_gradients(hidden, head, targets, *options, loss_grad_output):
    """Return the gradients of single losses with what this takes on CUDA, not on the CPU."""
    logits = chunk_of_logits(min(LOSS_CHUNK, len(hidden)), head)
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


class Recorder(TorchDispatchMode):
    """Writes down (number of a storage, its bytes from now on) when one comes, goes or changes."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.events, self.numbers, self.num_seen = [], {}, 0
        for tensor in known:
            self.see(tensor)
        self.events.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return result

    def see(self, tensor) -> None:
        tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self.numbers:
            self.num_seen += 1
            self.numbers[storage._cdata] = self.num_seen
            self.events.append((self.num_seen, storage.nbytes()))
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key: int) -> None:
        self.events.append((self.numbers.pop(key), 0))

    @contextlib.contextmanager
    def watching_sizes(self):
        """FSDP2 gives weights back, and takes room for them again, by changing storages' sizes."""
        resize = torch.UntypedStorage.resize_

        def watched(storage, size: int):
            resize(storage, size)
            if storage._cdata in self.numbers:
                self.events.append((self.numbers[storage._cdata], size))

        with mock.patch.object(torch.UntypedStorage, "resize_", watched):
            yield


def record(config, tokens: int, precision: Precision, checkpointing: bool, shards=1, rows=1):
    """Return .weights and .state (bytes of each parameter and of all AdamW state), .first, .later.

    These are the events of two micro-batches, the second of which finds gradients.
    """
    usual, autocast, half = precision is USUAL, contextlib.nullcontext(), precision.compute_dtype
    if precision.weights != half and shards == 1:
        autocast = torch.autocast("cpu", half, cache_enabled=False)
    capability = (7, 0) if half == torch.float16 else (9, 0)
    loss_module = torch.nn.modules.linear_cross_entropy
    backward = "_linear_cross_entropy_batch_chunked_accumulator"
    with (
        process_of(shards) as mesh,
        FakeTensorMode(),  # on the CPU, where PyTorch without CUDA can go backward
        mock.patch.object(FakeTensor, "is_cuda", property(lambda tensor: True)),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        mock.patch.object(loss_module, backward, loss_gradients),
    ):
        model = make_model(config, precision, checkpointing)
        model = shard(model, precision, mesh) if mesh else model
        weights = [getattr(p, "_local_tensor", p) for p in model.parameters()]
        kernels, recorder, found = GpuKernels(tokens // 2), Recorder(weights), []
        sizes = [w.numel() * w.element_size() for w in weights]
        with recorder, kernels, recorder.watching_sizes():
            for _ in range(2):
                with autocast:
                    loss = model(**make_batch(tokens, rows, usual))["loss"]
                loss.backward()
                loss = None
                found.append(recorder.events.copy())
                recorder.events.clear()
    assert usual or any("linear_cross_entropy_batch_chunked" in name for name in kernels.seen)
    varlen = "torch_attn::_varlen_attn_backward" in kernels.seen
    assert usual or varlen == (half == torch.bfloat16)
    each = precision.bytes_per_parameter / precision.weights.itemsize - 2
    return SimpleNamespace(weights=sizes, state=sum(sizes) * each, first=found[0], later=found[1])


def peak_bytes(trace) -> float:
    """Return the most that is alive at once in a later micro-batch, all included."""
    alive, most = {}, 0
    now = sum(trace.weights) + trace.state
    for number, size in [*trace.first, (None, 0), *trace.later]:
        most = 0 if number is None else most  # a later micro-batch begins
        now += size - alive.pop(number, 0)
        if size:
            alive[number] = size
        most = max(most, now)
    return most


# ---- Allocating steps ---------------------------------------------------------------------------
class OutOfMemory(Exception):
    pass


class ExpandableAllocator:
    """PyTorch's allocator with expandable segments: one range of addresses, of 20 MiB pages.

    A block goes where it fits best among free ranges with memory; else into the first free range,
    which gets pages as needed. When there are none left, free ranges give up their whole pages.
    Blocks of up to 1 MiB have a segment of their own, here without gaps.
    """

    PAGE = 20 * MIB

    def __init__(self, capacity: float):
        self.capacity, self.small, self.blocks, self.pages = capacity, 0, {}, set()
        self.free, self.ends, self.end = {}, {}, 0  # start: size, and end: start, of free ranges
        self.most_reserved = self.allocated = 0

    def reserved(self) -> int:
        return len(self.pages) * self.PAGE + -(-self.small // (2 * MIB)) * 2 * MIB

    def missing(self, start: int, size: int) -> set[int]:
        pages = range(start // self.PAGE, -(-(start + size) // self.PAGE))
        return set(pages) - self.pages

    def allocate(self, key, size: int) -> None:
        size = -(-max(size, 1) // 512) * 512
        self.allocated += size
        if size <= MIB:
            self.small += size
            self.blocks[key] = (None, size)
        else:
            self.blocks[key] = (self.find(size), size)
        self.most_reserved = max(self.most_reserved, self.reserved())
        if self.reserved() > self.capacity:
            raise OutOfMemory(f"{size / GIB:.2f} GiB beside {self.allocated / GIB:.2f}")

    def find(self, size: int) -> int:
        """Return the address of a new block; its pages are there."""
        fitting = sorted((room, start) for start, room in self.free.items() if room >= size)
        start = next((start for _, start in fitting if not self.missing(start, size)), None)
        if start is None:
            start = min((start for _, start in fitting), default=None)
            if start is None:  # at the end, from where the last free range begins
                start = self.ends.get(self.end, self.end)
                self.remove(start)
                self.end = max(self.end, start + size)
                self.put(start, self.end - start)
            missing = self.missing(start, size)
            if self.reserved() + len(missing) * self.PAGE > self.capacity:
                for first, room in self.free.items():
                    whole = range(-(-first // self.PAGE), (first + room) // self.PAGE)
                    self.pages -= set(whole)
            self.pages |= self.missing(start, size)
        room = self.remove(start)
        if room > size:
            self.put(start + size, room - size)
        return start

    def remove(self, start: int) -> int:
        if size := self.free.pop(start, 0):
            del self.ends[start + size]
        return size

    def put(self, start: int, size: int) -> None:
        self.free[start], self.ends[start + size] = size, start

    def release(self, key) -> None:
        start, size = self.blocks.pop(key)
        self.allocated -= size
        if start is None:
            self.small -= size
            return
        if (before := self.ends.get(start)) is not None:
            size += self.remove(before)
            start = before
        self.put(start, size + self.remove(start + size))


class Trainer:
    """Steps of recorded micro-batches, scaled to other numbers of tokens, in an allocator."""

    def __init__(self, traces: dict, precision: Precision, allocator: ExpandableAllocator):
        self.allocator, self.precision, self.count = allocator, precision, 0
        self.weights = traces[True][0][1].weights
        self.events = {kind: self.scale(*pair) for kind, pair in traces.items()}
        for i, size in enumerate(self.weights):
            allocator.allocate(("weight", i), size)

    @staticmethod
    def scale(small, large) -> list[list[tuple]]:
        """Return [(number, bytes at no tokens, bytes a token)] of two of (tokens, trace)."""
        (few, a), (many, b) = small, large
        scaled = []
        for ours, theirs in ((a.first, b.first), (a.later, b.later)):
            assert [n for n, _ in ours] == [n for n, _ in theirs]
            slopes = [(y - x) / (many - few) for (_, x), (_, y) in zip(ours, theirs)]
            parts = [(n, x - k * few, k) for (n, x), k in zip(ours, slopes)]
            scaled.append(parts)
        return scaled

    def micro_batch(self, tokens: int, checkpointing: bool, first: bool) -> None:
        """Leave gradients after the first one, as recorded."""
        self.count += first
        for number, fixed, each in self.events[checkpointing][0 if first else 1]:
            key, size = (self.count, number), round(fixed + each * tokens)
            if key in self.allocator.blocks:
                self.allocator.release(key)
            if size > 0:
                self.allocator.allocate(key, size)

    def update(self) -> None:
        """Make the state at first, then change one parameter after the other; free gradients."""
        each = self.precision.bytes_per_parameter / self.precision.weights.itemsize - 2
        for i, size in enumerate(self.weights):
            if ("state", i) not in self.allocator.blocks:
                self.allocator.allocate(("state", i), round(size * each))
            copies = [("copy", j) for j in range(2)]  # fp32 ones of the parameter
            for key in copies:
                self.allocator.allocate(key, 4 * size // self.precision.weights.itemsize)
            for key in copies:
                self.allocator.release(key)
        for key in [key for key in self.allocator.blocks if key[0] == self.count]:
            self.allocator.release(key)


def draw_lengths(kind: str, rng, num_rows: int = 128) -> list[int]:
    least, most = ROWS[kind]
    drawn = least * (most / least) ** rng.random(num_rows)  # more short ones than long ones
    return drawn.astype(int).tolist()


def plan_box(gpus: str, processes: int) -> tuple:
    """Return the Job and the Plan of the 7B on a box, for rows of up to ROW tokens."""
    capacities, capability = parse_gpus(gpus)
    job = Job(make_config("7B"), choose_precision(capability, False), capacities, processes)
    args = SimpleNamespace(tokens_per_forward=None, max_len=ROW, device_map="auto")
    training_args = SimpleNamespace(per_device_train_batch_size=4, gradient_checkpointing=True)
    return job, plan_memory(job, args, training_args, ROW)


def record_pairs(job: Job) -> dict:
    """Return recordings of {with checkpointing: two (tokens, trace)} for a box's micro-batches."""
    traces = {}
    for checkpointing, sizes in ((False, (2048, 4096)), (True, (8192, 16384))):
        made = (record(job.config, n, job.precision, checkpointing, job.num_shards) for n in sizes)
        traces[checkpointing] = list(zip(sizes, made))
    return traces


def simulate(job: Job, plan, traces: dict, kind: str) -> dict:
    """Run three steps of one process; return how full its GPU was, or where it was too full."""
    capacity = job.capacities[0] - WORKSPACES - NCCL * (job.num_shards > 1)
    allocator = ExpandableAllocator(capacity)
    result = {"rows": kind, "fits": True, "micro_batches": 0}
    try:
        trainer = Trainer(traces, job.precision, allocator)
        for step in range(3):
            lengths = draw_lengths(kind, np.random.default_rng(step))
            bins = sft_qwen2.bin_rows(lengths, plan.tokens_per_forward, job.num_shards)
            for i, rows in enumerate(bins[:: job.num_shards]):
                tokens = max(1, sum(lengths[row] for row in rows))
                plain = tokens <= plan.max_tokens_without_checkpointing
                trainer.micro_batch(tokens, not plain, i == 0)
                result["micro_batches"] += 1
            trainer.update()
    except OutOfMemory as error:
        result |= {"fits": False, "error": f"step {step}: {error}"}
    return {**result, "most_reserved_gib": round(allocator.most_reserved / GIB, 2)}


# ---- The three parts ----------------------------------------------------------------------------
def beside_the_usual_way(name: str) -> list[dict]:
    found = []
    for way, precision in (("this trainer", BF16), ("usual", USUAL)):
        trace = record(make_config(name), 4 * ROW, precision, checkpointing=True, rows=4)
        peak, weights = peak_bytes(trace), sum(trace.weights)
        sizes = {"weights": weights, "gradients": weights, "optimizer": trace.state}
        sizes |= {"activations": peak - sum(sizes.values()), "peak": peak}
        row = {"model": name, "way": way}
        found.append(row | {f"{part}_gib": round(n / GIB, 2) for part, n in sizes.items()})
        print(*found[-1].values(), sep="\t", flush=True)
    return found


def compare(name: str, tokens: int, precision: Precision, checkpointing: bool, shards: int) -> dict:
    """Return the peak as recorded and by the formula; without the update, which is not recorded."""
    config = make_config(name)
    traced = peak_bytes(
        record(config, tokens, precision, checkpointing, shards, max(1, tokens // ROW))
    )
    job = Job(config, precision._replace(optim="recorded without"), [1], shards)
    (formula,) = device_loads(job, tokens, place(job, tokens)[:1], checkpointing)
    compute, weights = (str(x).removeprefix("torch.") for x in precision[1::-1])
    case = {"model": name, "tokens": tokens, "compute": compute, "weights": weights}
    case |= {"kept": "inputs" if checkpointing else "all", "processes": shards}
    case |= {"traced_gib": round(traced / GIB, 2), "formula_gib": round(formula / GIB, 2)}
    case["error_percent"] = round(100 * (formula / traced - 1), 1)
    print(*case.values(), sep="\t", flush=True)
    return case


def comparisons() -> list[tuple]:
    """Return (tokens, precision, with checkpointing, processes) of part 2."""
    cases = [(tokens, BF16, True, 1) for tokens in (2048, ROW, 4 * ROW)]
    cases += [(ROW, precision, True, 1) for precision in (FP16, FP32)]
    kinds = (BF16, FP16, BF16_FP32, FP32)
    cases += [(tokens, kind, False, 1) for tokens in (2048, ROW) for kind in kinds]
    kept = (True, False)
    cases += [(n, BF16, again, shards) for shards in (2, 8) for n in (2048, ROW) for again in kept]
    cases += [(n, FP16, again, 4) for n in (2048, ROW) for again in kept]
    return [*cases, (ROW, BF16_FP32, True, 8)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["7B"])
    names = parser.parse_args().models
    warnings.filterwarnings("ignore")
    sft_qwen2.quiet_libraries()
    print("1. a later micro-batch of 4 x 8,192 tokens (GiB)")
    usual = [row for name in names for row in beside_the_usual_way(name)]
    print("2. recorded, and by the formula")
    compared = [compare(name, *case) for name in names for case in comparisons()]
    print("3. three steps in the memory that is free")
    steps = []
    for gpus, processes in BOXES if "7B" in names else ():
        job, plan = plan_box(gpus, processes)
        box = {"box": gpus, "processes": processes, "free_gib": round(job.capacities[0] / GIB, 1)}
        box |= {"needed_gib": round(plan.needed[0] / GIB, 1)}
        box |= {"planned_gib": round(plan.used[0] / GIB, 1), "tokens": plan.tokens_per_forward}
        refused = plan.max_tokens_without_checkpointing == 0 and not fits(job, ROW)
        traces = {} if refused else record_pairs(job)
        for kind in () if refused else ROWS:
            steps.append(box | simulate(job, plan, traces, kind))
            print(*steps[-1].values(), sep="\t", flush=True)
        if refused:  # before the model is loaded
            steps.append(box | {"refused": True})
            print(*steps[-1].values(), sep="\t", flush=True)
    machine = f"{platform.machine()}, CPU only; torch {torch.__version__}"
    found = {"command": shlex.join(["python", *sys.argv]), "machine": machine}
    found |= {"usual": usual, "formula": compared, "steps": steps}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    good = all(abs(case["error_percent"]) <= 10 for case in compared)
    return 0 if good and all(step.get("fits", True) for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
