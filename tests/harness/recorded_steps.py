"""Micro-batches of the trainer's own model, recorded tensor by tensor without a GPU.

Forward and backward passes run on tensors that have shapes but no contents (FakeTensorMode), as one
process, as the first of several (FSDP2, whose messages go nowhere), or as one device of a pipeline.
Every storage that comes, goes or changes its size is written down.

Shapes: T tokens of a micro-batch, C hidden size, N trained tokens, V vocabulary.
"""

import contextlib
import weakref
from dataclasses import dataclass
from unittest import mock

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

import sft_qwen2
from sft.memory_model import LOSS_CHUNK_TOKENS, QWEN2_SIZES, Job, Share, list_modules, make_share
from sft.pipeline import MicroBatchInFlight, Pipeline, go_back_one_part

TRAINED_SHARE = 0.5
LOSS_MODULE = torch.nn.modules.linear_cross_entropy
LOSS_BACKWARD = "_linear_cross_entropy_batch_chunked_accumulator"


@dataclass(frozen=True, kw_only=True)
class MicroBatchEvents:
    """What a micro-batch does to memory: (number of a storage, its bytes from now on).

    Numbers are those of the micro-batch alone, but for its gradients, which stay.
    """

    forward: list[tuple[int, float]]
    backward: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Two micro-batches on a device."""

    tokens: int
    weight_bytes: list[int]  # of each parameter
    first: MicroBatchEvents  # of a step: it leaves gradients
    later: MicroBatchEvents  # it finds gradients


# ---- The model ----------------------------------------------------------------------------------
def make_config(name: str, **changes):
    """Return transformers' config of a model of memory_model.QWEN2_SIZES."""
    sizes = {**vars(QWEN2_SIZES[name]), **changes}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return transformers.Qwen2Config(rope_parameters=rope, use_cache=False, **sizes)


def make_model(config, dtype: torch.dtype, recompute: bool):
    """Return the trainer's model, ready to train."""
    model = sft_qwen2.Qwen2ForCausalLM._from_config(
        config, dtype=dtype, attn_implementation="packed_attention"
    )
    return prepare(model, recompute)


def make_usual_model(config, dtype: torch.dtype):
    """Return transformers' model, which computes all logits at once."""
    model = transformers.Qwen2ForCausalLM._from_config(
        config, dtype=dtype, attn_implementation="sdpa"
    )
    return prepare(model, recompute=True)


def prepare(model, recompute: bool):
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_batch(tokens: int, num_examples: int) -> dict:
    """Return a micro-batch of tensors without contents, as sft_qwen2.flatten makes it."""
    num_trained = int(TRAINED_SHARE * tokens)
    return {
        "input_ids": torch.empty(1, tokens, dtype=torch.int64),
        "position_ids": torch.empty(1, tokens, dtype=torch.int64),
        "trained_positions": torch.empty(num_trained, dtype=torch.int64),
        "targets": torch.empty(num_trained, dtype=torch.int64),
        "seq_lens": [tokens // num_examples] * num_examples,
        "cu_seq_lens": torch.empty(num_examples + 1, dtype=torch.int32),
    }


def make_usual_batch(tokens: int, num_examples: int) -> dict:
    """Return examples side by side, with labels at all positions."""
    ids = torch.empty(num_examples, tokens // num_examples, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


# ---- Shards -------------------------------------------------------------------------------------
@contextlib.contextmanager
def be_first_process(num_processes: int):
    """Be the first of several processes, the others of which do not exist; give their mesh."""
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=0, world_size=num_processes
    )
    try:
        yield torch.distributed.init_device_mesh("cpu", (num_processes,), mesh_dim_names=("fsdp",))
    finally:
        torch.distributed.destroy_process_group()


def shard_model(model, job: Job, mesh):
    """Return the model as accelerate shards it: layers, embedding, and norm with head."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    needs_autocast = job.precision.needs_autocast
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=job.precision.compute,
        reduce_dtype=torch.float32,
        cast_forward_inputs=not needs_autocast,
    )
    # accelerate makes the weights fp32 where it is told of a mixed precision.
    mixed_precision = "no"
    if needs_autocast:
        mixed_precision = "yes"
    accelerator = mock.Mock(torch_device_mesh=mesh, mixed_precision=mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.parallelism_config.fsdp_dim_names = ("fsdp",)
    sharded = fsdp2_prepare_model(accelerator, model)
    if needs_autocast:
        # The residual stream stays in fp32, as in one process.
        sharded.model.embed_tokens.register_forward_hook(lambda module, args, out: out.float())
    return sharded


# ---- What shapes do not show --------------------------------------------------------------------
def make_logits(num_positions: int, head: torch.Tensor) -> list[torch.Tensor]:
    """Return what the loss has on CUDA for so many positions: see LOGIT_BYTES of memory_model."""
    dtypes = [head.dtype]
    if head.dtype == torch.bfloat16:
        dtypes = [torch.float32, torch.bfloat16]
    return [torch.empty(num_positions, head.shape[0], dtype=dtype) for dtype in dtypes]


def make_loss_gradients(hidden, head, targets, *options, loss_grad_output):
    """Return the gradients of single losses, with what this takes on CUDA and not on the CPU."""
    logits = make_logits(min(LOSS_CHUNK_TOKENS, len(hidden)), head)
    hidden_gradient = torch.empty_like(hidden)
    head_gradient = torch.empty_like(head)
    del logits
    return None, hidden_gradient, head_gradient, None


class GpuKernels(TorchDispatchMode):
    """Adds the memory that CUDA's kernels take inside."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.seen.add(name)
        inside = []  # alive while the operation runs
        if func is torch.ops.torch_attn._varlen_attn_backward.default:
            query = args[1]
            # FlashAttention: dq in fp32, and dk and dv of each query head.
            for dtype in (torch.float32, query.dtype, query.dtype):
                inside.append(torch.empty(query.shape, dtype=dtype))
        elif name.startswith("torch_nn::_linear_cross_entropy_batch_chunked"):
            chunk_tokens = args[8]
            if name.endswith("no_reduction"):
                chunk_tokens = args[6]
            inside += make_logits(chunk_tokens, args[1])
        result = func(*args, **(kwargs or {}))
        del inside
        return result


@contextlib.contextmanager
def pretend_gpu(job: Job):
    """Let fake tensors of the CPU take the paths of a GPU. PyTorch without CUDA has no others.

    fp32 products are those of a CPU, and take its paths.
    """
    is_gpu = job.precision.compute != torch.float32
    capability = (9, 0)
    if job.precision.compute == torch.float16:
        capability = (7, 0)
    with (
        FakeTensorMode(),
        mock.patch.object(FakeTensor, "is_cuda", property(lambda tensor: is_gpu)),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        mock.patch.object(LOSS_MODULE, LOSS_BACKWARD, make_loss_gradients),
    ):
        yield


# ---- Recording ----------------------------------------------------------------------------------
class Recorder(TorchDispatchMode):
    """Writes down (number of a storage, its bytes from now on) when one comes, goes or changes."""

    def __init__(self, known: list[torch.Tensor]):
        """`known`: tensors that are there before, and are not written down."""
        super().__init__()
        self.events = []
        self.numbers = {}
        self.num_seen = 0
        for tensor in known:
            self.see(tensor)
        self.events.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return result

    def see(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self.numbers:
            self.num_seen += 1
            self.numbers[storage._cdata] = self.num_seen
            self.events.append((self.num_seen, storage.nbytes()))
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key: int) -> None:
        self.events.append((self.numbers.pop(key), 0))

    def take_events(self) -> list[tuple[int, float]]:
        events = self.events.copy()
        self.events.clear()
        return events

    @contextlib.contextmanager
    def watch_sizes(self):
        """See that FSDP2 gives weights back, and takes room again, by changing storages' sizes."""
        resize = torch.UntypedStorage.resize_

        def watched_resize(storage, size: int):
            resize(storage, size)
            if storage._cdata in self.numbers:
                self.events.append((self.numbers[storage._cdata], size))

        with mock.patch.object(torch.UntypedStorage, "resize_", watched_resize):
            yield


def autocast_of(job: Job):
    if not job.precision.needs_autocast:
        return contextlib.nullcontext()
    return torch.autocast("cpu", job.precision.compute, cache_enabled=False)


def list_local_weights(model) -> list[torch.Tensor]:
    """Return the parameters, or this process's shards of them."""
    weights = []
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            parameter = parameter._local_tensor
        weights.append(parameter)
    return weights


def send_gradients_to_host(model) -> None:
    """Take each gradient from the device, after an earlier sum has come to be added to it."""
    sent = set()

    def send(parameter):
        if parameter in sent:
            parameter.grad.add_(torch.empty_like(parameter))
        sent.add(parameter)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(send)


def record(job: Job, tokens: int, *, recompute: bool, num_examples: int = 1) -> Recording:
    """Return the Recording of one process that computes one micro-batch after the other."""
    with contextlib.ExitStack() as stack:
        mesh = None
        if job.num_shards > 1:
            mesh = stack.enter_context(be_first_process(job.num_shards))
        stack.enter_context(pretend_gpu(job))
        model = make_model(job.config, job.precision.weights, recompute)
        if mesh is not None:
            model = shard_model(model, job, mesh)
        if "gradients" in job.in_host_memory:
            send_gradients_to_host(model)
        recording, seen = record_passes(model, make_batch, tokens, num_examples, autocast_of(job))
    assert any("linear_cross_entropy_batch_chunked" in name for name in seen)
    has_varlen = "torch_attn::_varlen_attn_backward" in seen
    assert has_varlen == (job.precision.compute == torch.bfloat16)
    return recording


def record_usual(job: Job, tokens: int, num_examples: int) -> Recording:
    """Return the Recording of the usual way: batched examples, all logits, all recomputed."""
    with pretend_gpu(job):
        model = make_usual_model(job.config, job.precision.weights)
        recording, _ = record_passes(
            model, make_usual_batch, tokens, num_examples, autocast_of(job)
        )
    return recording


def record_passes(model, make, tokens: int, num_examples: int, autocast) -> tuple[Recording, set]:
    """Return the Recording of two micro-batches, and the names of all operators."""
    weights = list_local_weights(model)
    recorder = Recorder(weights)
    kernels = GpuKernels()
    events = []
    with recorder, kernels, recorder.watch_sizes():
        for _ in range(2):
            with autocast:
                batch = make(tokens, num_examples)
                if "targets" in batch:
                    batch["num_items_in_batch"] = tokens
                loss = model(**batch)["loss"]
            loss.backward()
            del batch, loss
            events.append(MicroBatchEvents(forward=recorder.take_events(), backward=[]))
    sizes = [weight.numel() * weight.element_size() for weight in weights]
    recording = Recording(tokens=tokens, weight_bytes=sizes, first=events[0], later=events[1])
    return recording, kernels.seen


# ---- One device of a pipeline -------------------------------------------------------------------
class DeviceOfPipeline:
    """The part of a model that one device of a pipeline holds, with what it is sent."""

    def __init__(self, job: Job, share: Share, recompute: bool):
        config = transformers.Qwen2Config.from_dict(job.config.to_dict())
        config.num_hidden_layers = share.num_layers
        config.layer_types = config.layer_types[: share.num_layers]
        self.job = job
        self.share = share
        self.model = make_model(config, job.precision.weights, recompute)
        dtype = None
        if job.precision.needs_autocast:
            dtype = job.precision.compute
        self.pipeline = Pipeline(self.model, autocast_dtype=dtype)
        if not share.has_embedding:
            self.model.model.embed_tokens = None
        if not share.has_head:
            self.model.lm_head = None
            self.model.model.norm = None

    def make_hidden(self, tokens: int) -> torch.Tensor:
        """Return hidden states, or their gradient, that another device sends [1, T, C]."""
        shape = (1, tokens, self.job.config.hidden_size)
        return torch.empty(shape, dtype=self.job.precision.weights)

    def start(self, tokens: int) -> MicroBatchInFlight:
        """Return a micro-batch with its inputs, as Pipeline.place puts them on a device."""
        inputs = make_batch(tokens, num_examples=1)
        head_size = self.job.config.hidden_size // self.job.config.num_attention_heads
        shape = (1, tokens, head_size)
        dtype = self.job.precision.weights
        rotations = (torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))
        layer_inputs = {
            "attention_mask": None,
            "use_cache": False,
            "position_embeddings": rotations,
            "seq_lens": inputs.pop("seq_lens"),
            "cu_seq_lens": inputs.pop("cu_seq_lens"),
        }
        inputs["layer_inputs"] = {part.device: layer_inputs for part in self.pipeline.parts}
        batch = MicroBatchInFlight(inputs)
        if not self.share.has_embedding:
            batch.carried = self.make_hidden(tokens)
        return batch

    def run_forward(self, batch: MicroBatchInFlight) -> None:
        """Run this device's parts, as Pipeline.run_forward does."""
        with self.pipeline.autocast():
            for part in self.pipeline.parts:
                if batch.carried is not None:
                    batch.leaves.append(batch.carried.requires_grad_())
                output = self.pipeline.run_layers(part, batch)
                batch.ends.append(torch.autograd.graph.get_gradient_edge(output))
                batch.carried = output.detach()
                del output
        if not self.share.has_last_layer:
            batch.carried = None  # sent to the next device

    def run_back(self, batch: MicroBatchInFlight, tokens: int) -> None:
        """Run the loss, if it is here, and this device's parts back."""
        if self.share.has_head:
            self.pipeline.start_back(batch, divisor=tokens, scaler=None)
        if not self.share.has_last_layer:
            batch.carried = self.make_hidden(tokens)
        while batch.ends:
            go_back_one_part(batch)
        batch.carried = None


def record_device(job: Job, modules: list[str], tokens: int, *, recompute: bool) -> Recording:
    """Return the Recording of the device of a pipeline that holds these modules."""
    share = make_share(job.config, modules)
    assert not job.config.tie_word_embeddings, "a tied head would be on the first device"
    with pretend_gpu(job):
        device = DeviceOfPipeline(job, share, recompute)
        if "gradients" in job.in_host_memory:
            send_gradients_to_host(device.model)
        weights = list_local_weights(device.model)
        recorder = Recorder(weights)
        events = []
        with recorder, GpuKernels():
            for _ in range(2):
                batch = device.start(tokens)
                device.run_forward(batch)
                forward = recorder.take_events()
                device.run_back(batch, tokens)
                del batch
                backward = recorder.take_events()
                events.append(MicroBatchEvents(forward=forward, backward=backward))
    sizes = [weight.numel() * weight.element_size() for weight in weights]
    return Recording(tokens=tokens, weight_bytes=sizes, first=events[0], later=events[1])


def record_share(
    job: Job, modules: list[str], tokens: int, *, recompute: bool, is_pipeline: bool
) -> Recording:
    """Return the Recording of a device, whether or not it is one of a pipeline."""
    if is_pipeline:
        return record_device(job, modules, tokens, recompute=recompute)
    assert modules == list_modules(job.config)
    return record(job, tokens, recompute=recompute)


# ---- Playing what was recorded ------------------------------------------------------------------
class Sum:
    """Memory without gaps: the sum of all blocks, and the most that it was."""

    def __init__(self):
        self.blocks = {}
        self.allocated = 0
        self.most = 0

    def allocate(self, key, size: float) -> None:
        self.blocks[key] = size
        self.allocated += size
        self.most = max(self.most, self.allocated)

    def release(self, key) -> None:
        self.allocated -= self.blocks.pop(key)


def play(events: list[tuple[int, float]], memory, micro_batch) -> None:
    """Give and take back what was recorded of a micro-batch; `memory`: a Sum, or the like."""
    for number, size in events:
        key = (micro_batch, number)
        if key in memory.blocks:
            memory.release(key)
        if size > 0:
            memory.allocate(key, size)


def play_window(events: list[MicroBatchEvents], memory, window) -> None:
    """Run micro-batches forward, then back: all of a pipeline's window, or a single one."""
    for number, micro_batch in enumerate(events):
        play(micro_batch.forward, memory, (window, number))
    for number, micro_batch in enumerate(events):
        play(micro_batch.backward, memory, (window, number))


def find_peak(job: Job, recording: Recording, num_micro_batches: int = 1) -> float:
    """Return the most bytes in a later window of so many micro-batches, all included."""
    memory = Sum()
    parameters = sum(recording.weight_bytes) / job.precision.weights.itemsize
    resident = sum(recording.weight_bytes)
    if "state" not in job.in_host_memory:
        resident += parameters * job.precision.state_bytes
    later = [recording.later] * (num_micro_batches - 1)
    play_window([recording.first, *later], memory, window=0)
    memory.most = 0
    play_window([recording.later, *later], memory, window=1)
    return resident + memory.most
