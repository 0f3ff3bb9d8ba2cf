"""The bytes that a training step needs on a device, by arithmetic: nothing is loaded.

benchmarks/memory.py compares the formulas with recorded steps: they are off by at most 3 %.

Shapes: T tokens of a micro-batch, H hidden size, F intermediate size, K size of all keys of a
token, V vocabulary. "Stream" is the residual stream, which passes from layer to layer [T, H]: it
has the format of the weights. All results are bytes of one device.
"""

from dataclasses import dataclass, replace

import torch

from sft.pipeline import MAX_LAYERS_PER_PART
from sft.precision import Precision
from sft.throughput import GIB

LOSS_CHUNK_TOKENS = 1024  # positions whose logits exist at once
WORKSPACE_BYTES = 0.5 * GIB  # of cuBLAS, of attention and of other kernels
NCCL_BYTES = 0.6 * GIB  # of messages between processes
USABLE_SHARE = 0.95  # of what these leave free; the rest is for gaps between blocks
FP32_BYTES = 4

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"

# What one number of a chunk of logits takes while the loss is computed: bf16 logits are fp32 with
# a bf16 copy, the others are changed in place. (linear_cross_entropy of torch 2.13, "compact".)
LOGIT_BYTES = {torch.bfloat16: 4 + 2, torch.float16: 2, torch.float32: 4}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What the formulas read of a model's config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool


# From the config.json of each model. Qwen2.5's models of these names have the same sizes.
QWEN2_SIZES = {
    "Qwen2-0.5B": ModelSizes(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen2-1.5B": ModelSizes(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen2-7B": ModelSizes(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, in which formats, and what of it is not on the device.

    `config`: the model's, or a ModelSizes. `num_shards`: processes that share all parameters
    (FSDP2). `in_host_memory`: "state" of the optimizer, "gradients".
    """

    config: object
    precision: Precision
    num_shards: int = 1
    in_host_memory: tuple[str, ...] = ()

    @property
    def stream_bytes(self) -> int:
        """Return the bytes of a number of the residual stream."""
        return self.precision.weights.itemsize

    @property
    def host_bytes_per_parameter(self) -> float:
        total = 0
        if "state" in self.in_host_memory:
            total += self.precision.state_bytes
        if "gradients" in self.in_host_memory:
            total += self.precision.weights.itemsize
        return total

    @property
    def device_bytes_per_parameter(self) -> float:
        """Return the bytes that a parameter takes on its device all the time."""
        on_devices = self.precision.bytes_per_parameter - self.host_bytes_per_parameter
        return on_devices / self.num_shards


# ---- Parameters ---------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters."""

    layer_matrices: int
    layer: int  # the matrices, two norms, and the biases of q, k and v
    largest_matrix: int  # of a layer
    table: int  # embedding or head
    model: int


def count_parameters(config) -> ParameterCounts:
    hidden = config.hidden_size
    keys = count_key_values(config)
    attention = 2 * hidden * hidden + 2 * hidden * keys  # q and output, k and v
    mlp = 3 * hidden * config.intermediate_size  # gate, up and down
    layer = attention + mlp + 3 * hidden + 2 * keys
    table = config.vocab_size * hidden
    num_tables = 2
    if config.tie_word_embeddings:
        num_tables = 1
    return ParameterCounts(
        layer_matrices=attention + mlp,
        layer=layer,
        largest_matrix=hidden * config.intermediate_size,
        table=table,
        model=num_tables * table + config.num_hidden_layers * layer + hidden,
    )


def count_key_values(config) -> int:
    """Return K, the numbers of a token's keys in all heads of a layer."""
    head_size = config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads * head_size


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of a model that is on one device."""

    num_layers: int
    has_last_layer: bool
    has_embedding: bool
    has_head: bool
    num_tables: int  # a tied head is no table of its own

    @property
    def num_parts(self) -> int:
        """Return the parts of a pipeline that these layers make."""
        return -(-self.num_layers // MAX_LAYERS_PER_PART)


def list_modules(config) -> list[str]:
    """Return the names of what is placed as a whole, in the order of the forward pass."""
    names = [EMBEDDING]
    for number in range(config.num_hidden_layers):
        names.append(name_layer(number))
    if not config.tie_word_embeddings:
        names.append(HEAD)
    return names


def name_layer(number: int) -> str:
    return f"model.layers.{number}"


def make_share(config, modules: list[str]) -> Share:
    """Return the Share of these modules; a tied head is where the embedding is."""
    has_embedding = EMBEDDING in modules
    num_tables = int(has_embedding) + int(HEAD in modules)
    return Share(
        num_layers=len(modules) - num_tables,
        has_last_layer=name_layer(config.num_hidden_layers - 1) in modules,
        has_embedding=has_embedding,
        has_head=HEAD in modules or (config.tie_word_embeddings and has_embedding),
        num_tables=num_tables,
    )


# ---- Activations --------------------------------------------------------------------------------
def list_activations(job: Job, tokens: int) -> dict[str, int]:
    """Return the bytes that one layer keeps of `tokens` tokens for its backward pass, by tensor."""
    size = job.precision.compute.itemsize
    hidden = tokens * job.config.hidden_size
    keys = tokens * count_key_values(job.config)
    wide = tokens * job.config.intermediate_size
    kept = {
        # RMSNorm computes in fp32, and keeps what it multiplies in its last line.
        "inputs of both norms": 2 * hidden * FP32_BYTES,
        "both norms before they are scaled": 2 * hidden * job.stream_bytes,
        # q, k and v read one tensor, gate and up another.
        "inputs of the products": 2 * hidden * size,
        "queries": hidden * size,
        "keys and values": 2 * keys * size,
        "output of attention": hidden * size,
        "gate, silu(gate), up and their product": 4 * wide * size,
    }
    if size < job.stream_bytes:
        # Autocast casts the input of each of five products anew.
        kept["inputs of the products"] = 5 * hidden * size
        if job.num_shards == 1:
            # FSDP gathers weights in the format of products: then there is nothing to cast.
            kept["casts of weights"] = count_parameters(job.config).layer_matrices * size
    if job.precision.compute != torch.bfloat16:
        # Attention runs example by example, and the outputs are joined.
        kept["outputs of attention, joined"] = hidden * size
    if job.precision.compute == torch.float16:
        # V100's kernel wants a key and a value for each query head.
        kept["keys and values"] = 2 * hidden * size
    return kept


def activation_bytes(job: Job, tokens: int) -> int:
    """Return the bytes that one layer keeps of `tokens` tokens for its backward pass."""
    return sum(list_activations(job, tokens).values())


def checkpoint_bytes(job: Job, tokens: int) -> int:
    """Return the bytes that a recomputed layer keeps instead: its input."""
    return tokens * job.config.hidden_size * job.stream_bytes


def layer_gradient_bytes(job: Job, tokens: int) -> int:
    """Return the most that a layer's backward pass adds to its activations.

    This is halfway through the MLP. The product of silu(gate) and up is gone. Its gradient, those
    of both factors, and that of the stream are there.
    """
    wide = tokens * job.config.intermediate_size
    size = job.precision.compute.itemsize
    return (3 - 1) * wide * size + checkpoint_bytes(job, tokens)


# ---- A step -------------------------------------------------------------------------------------
def step_memory(
    job: Job,
    modules: list[str],
    tokens: int,
    *,
    recompute: bool,
    window_tokens: int | None = None,
) -> dict[str, float]:
    """Return the bytes of a device that holds `modules`, at each moment that can be the fullest.

    `tokens`: of a micro-batch that is not the first of its step. `recompute`: a layer keeps only
    its input, and is computed again in the backward pass. `window_tokens`: of all micro-batches
    that are in flight in a pipeline; None where there is no pipeline.
    """
    share = make_share(job.config, modules)
    counts = count_parameters(job.config)
    parameters = share.num_layers * counts.layer + share.num_tables * counts.table
    resident = parameters * job.device_bytes_per_parameter
    kept = kept_bytes(job, share, tokens, recompute, window_tokens)
    terms = one_process_terms(job, share, tokens)
    if job.num_shards > 1:
        terms = sharded_terms(job, tokens)
    memory = {"update": resident + update_bytes(job, share, parameters)}
    if share.has_head:
        memory["loss"] = resident + kept + terms["loss"]
    if share.num_layers > 0:
        memory["layer"] = resident + kept + terms["layer"]
        memory["layer"] += layer_gradient_bytes(job, tokens)
        if recompute:
            memory["layer"] += activation_bytes(job, tokens)
            if job.stream_bytes == FP32_BYTES:
                # The norm's input in fp32 is the checkpoint itself.
                memory["layer"] -= checkpoint_bytes(job, tokens)
    if share.has_embedding:
        memory["embedding"] = resident + terms["embedding"]
    return memory


def peak_bytes(job: Job, modules: list[str], tokens: int, **options) -> float:
    """Return the bytes that a device needs at the fullest moment, 0 for one that holds nothing."""
    if not modules:
        return 0
    return max(step_memory(job, modules, tokens, **options).values())


def kept_bytes(
    job: Job, share: Share, tokens: int, recompute: bool, window_tokens: int | None
) -> int:
    """Return what a device's layers keep from the forward to the backward pass."""
    in_flight = window_tokens or tokens
    kept_by_layer = activation_bytes(job, in_flight)
    if recompute:
        kept_by_layer = checkpoint_bytes(job, in_flight)
    kept = share.num_layers * kept_by_layer
    if window_tokens is None:
        return kept
    stream = checkpoint_bytes(job, window_tokens)
    if not recompute:
        kept += share.num_parts * stream  # the input of a part, for the gradient it will have
    if share.has_last_layer:
        kept += stream  # the last hidden states, until their loss is computed
    head_size = job.config.hidden_size // job.config.num_attention_heads
    rotations = 2 * window_tokens * head_size * job.stream_bytes  # cosines and sines
    return kept + rotations


def one_process_terms(job: Job, share: Share, tokens: int) -> dict[str, float]:
    """Return what each moment adds to what is kept, where parameters are not sharded."""
    size = job.precision.compute.itemsize
    weight = job.precision.weights.itemsize
    counts = count_parameters(job.config)
    table_gradient = counts.table * weight
    staged_table = 0  # an earlier sum of gradients that comes from the host to be added to
    staged_matrix = 0
    if "gradients" in job.in_host_memory:
        staged_table = table_gradient
        staged_matrix = counts.largest_matrix * weight
    # The gradient of a tied head waits until the embedding has its own.
    waiting_gradient = 0
    if job.config.tie_word_embeddings and share.has_head:
        waiting_gradient = table_gradient
    head_cast = 0
    fp32_gradient = 0  # cast from the format of products, then scaled and added
    if size < weight:
        head_cast = counts.table * size
    if weight == FP32_BYTES:
        fp32_gradient = table_gradient
    logits = head_cast + logits_bytes(job, tokens)
    head = max(logits, fp32_gradient, staged_table)
    return {
        "loss": last_hidden_bytes(job, tokens) + counts.table * size + head,
        "layer": waiting_gradient + staged_matrix,
        "embedding": table_gradient + waiting_gradient + staged_table,
    }


def sharded_terms(job: Job, tokens: int) -> dict[str, float]:
    """Return what each moment adds to what is kept, where parameters are sharded (FSDP2).

    A layer, the embedding, and the head are gathered when their turn comes, in the format of
    products. Gradients are sent in fp32.
    """
    size = job.precision.compute.itemsize
    weight = job.precision.weights.itemsize
    counts = count_parameters(job.config)
    gathered_layer = counts.layer * size
    gathered_table = counts.table * size
    table_gradient = counts.table * size
    shard = counts.table * (FP32_BYTES + weight) / job.num_shards  # in fp32, and as it is kept
    sent_table = counts.table * FP32_BYTES + shard
    head = gathered_table + logits_bytes(job, tokens)
    waiting = counts.table * FP32_BYTES  # the head's gradient, until the next one is sent
    waiting_at_embedding = 0
    if job.config.tie_word_embeddings:
        waiting = gathered_table + table_gradient  # they go when the embedding has its gradient
        waiting_at_embedding = waiting
    else:
        head = max(head, sent_table)
    return {
        "loss": last_hidden_bytes(job, tokens) + table_gradient + gathered_layer + head,
        # Weights of this layer and of the next one, and this one's gradients.
        "layer": 3 * gathered_layer + waiting,
        "embedding": table_gradient + sent_table + waiting_at_embedding,
    }


def last_hidden_bytes(job: Job, tokens: int) -> int:
    """Return the bytes of the last hidden states where every position is trained.

    They are there in fp32 in the norm, before they are scaled, after that, picked by position, and
    as their gradient.
    """
    return tokens * job.config.hidden_size * (FP32_BYTES + 4 * job.stream_bytes)


def logits_bytes(job: Job, tokens: int) -> int:
    """Return the bytes of a chunk of logits."""
    num_logits = min(LOSS_CHUNK_TOKENS, tokens) * job.config.vocab_size
    return num_logits * LOGIT_BYTES[job.precision.compute]


def update_bytes(job: Job, share: Share, parameters: int) -> float:
    """Return what the optimizer's step adds to what is on the device all the time."""
    counts = count_parameters(job.config)
    largest = counts.largest_matrix
    if share.num_tables > 0:
        largest = counts.table
    # What is in host memory comes for one parameter at a time.
    visiting = largest * job.host_bytes_per_parameter
    temporary = {
        "adamw_torch_8bit": 2 * FP32_BYTES * largest,  # two fp32 copies of a parameter
        "adamw_torch_fused": 0,
        "adamw_torch": FP32_BYTES * parameters,  # the square root of all second moments at once
        "adafactor": 3 * FP32_BYTES * largest,  # the update, its square, and their quotient
    }
    return visiting + temporary[job.precision.optim] / job.num_shards


# ---- What fits ----------------------------------------------------------------------------------
def usable_bytes(job: Job, free_bytes: float) -> float:
    """Return what a step may take of a device's free bytes."""
    reserved = WORKSPACE_BYTES
    if job.num_shards > 1:
        reserved += NCCL_BYTES
    return max(1, USABLE_SHARE * (free_bytes - reserved))


def pinned_host_bytes(job: Job) -> float:
    """Return the bytes of host memory that hold the optimizer's state and gradients."""
    return count_parameters(job.config).model * job.host_bytes_per_parameter


def loading_host_bytes(job: Job) -> float:
    """Return the bytes of host memory that loading takes on each machine.

    For shards, one process of a machine reads all weights, and makes them fp32 where they shall be.
    bf16 weights stay in their files, which are mapped. A single process reads tensor by tensor.
    """
    if job.num_shards == 1 or job.precision.weights != torch.float32:
        return 0
    return count_parameters(job.config).model * FP32_BYTES


def with_config(job: Job, config) -> Job:
    return replace(job, config=config, in_host_memory=())


def with_precision(job: Job, precision: Precision) -> Job:
    return replace(job, precision=precision, in_host_memory=())


def with_host_memory(job: Job, in_host_memory: tuple[str, ...]) -> Job:
    return replace(job, in_host_memory=in_host_memory)


def with_shards(job: Job, num_shards: int) -> Job:
    return replace(job, num_shards=num_shards, in_host_memory=())
