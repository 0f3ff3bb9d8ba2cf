"""What a training step needs of each GPU, and which GPU holds what: arithmetic, without torch.

benchmarks/memory.py holds it against traced steps. Sizes are in bytes. `config` is the model's,
`capacities` are the free bytes of each device, and `precision` is sft_qwen2.Precision: the dtype of
weights, the format of products, and the bytes of a weight, its gradient and its AdamW state.
"""

import bisect
import functools
import itertools
import math

GIB = 2**30
GPUS = r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*"  # 4x80: number x GiB
COMPUTE_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
LOGIT_SIZE = {"bf16": 8, "fp16": 2, "fp32": 4}  # in bf16: of one in fp32, and of two casts
LOSS_CHUNK = 1024  # positions whose logits exist at once: 0.9 GiB with gradients at V = 152,064
USABLE = 0.95  # of a device's free memory: the rest is for the CUDA context and gaps
USABLE_PLAIN = 0.90  # without checkpointing, where most is activations: the allocator leaves gaps


def parse_gpus(gpus: str) -> list[int]:
    """Return the bytes of each GPU of a text like GPUS: of "2x80,1x40" those of three."""
    groups = [group.split("x") for group in gpus.split(",")]
    return [int(gib) * GIB for number, gib in groups for _ in range(int(number))]


# ---- What a step needs --------------------------------------------------------------------------
def kv_size(config) -> int:  # the width of a layer's keys, and of its values
    return config.hidden_size // config.num_attention_heads * config.num_key_value_heads


def count_parameters(config) -> dict[str, int]:
    """Return the number of parameters in the "matrices" of a layer, a "layer", and the "model"."""
    hidden, kv = config.hidden_size, kv_size(config)
    matrices = hidden * (2 * hidden + 2 * kv + 3 * config.intermediate_size)  # q o, k v, the MLP's
    layer = matrices + 3 * hidden + 2 * kv  # two norms, and biases of q, k and v
    tables = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    model = tables + layer * config.num_hidden_layers + hidden
    return {"matrices": matrices, "layer": layer, "model": model}


def layer_activations(config, tokens: int, compute: str, stream: int) -> tuple[int, int]:
    """Return the bytes a layer keeps for its backward pass, and the most that this adds to them.

    `stream`: the bytes of a number of the residual stream, which passes from layer to layer.
    """
    hidden, wide, size = config.hidden_size, config.intermediate_size, COMPUTE_SIZE[compute]
    casts = size < stream  # autocast: each product keeps casts of its two operands
    # Of both norms, computed in fp32: the input, and the result before it is scaled.
    numbers = 2 * (4 + stream)
    # The input of q, k and v and the input of gate and up; of casts, one for each of the five.
    numbers += size * (5 if casts else 2)
    # Attention: q and the output. Where rows go one by one (bf16's kernel takes them all), the
    # outputs joined; in fp16, on GPUs before Ampere, also a key and a value for each query head.
    numbers += size * {"bf16": 2, "fp16": 5, "fp32": 3}[compute]
    keys = 0 if compute == "fp16" else 2 * kv_size(config)
    # The MLP: gate, silu(gate), up, and the product.
    kept = tokens * (hidden * numbers + size * (keys + 4 * wide))
    kept += count_parameters(config)["matrices"] * size * casts
    # Halfway back through the MLP the product is gone, and gradients exist: its own, those of
    # silu(gate) and of up, and that of the residual stream.
    return kept, tokens * (2 * wide * size + hidden * stream)


def step_memory(config, tokens: int, precision, world: int = 1, checkpointing: bool = True):
    """Return the bytes of an "embedding", a "layer", a "head" and the "work" of a micro-batch.

    A device's peak is "work" once, and the parts it holds. With checkpointing, a layer keeps only
    its input, and is computed again on the way back.
    """
    layer, weight = count_parameters(config)["layer"], precision.weights.itemsize
    stream, each = weight, precision.bytes_per_parameter
    if world > 1:  # FSDP2 shares out weights, gradients and state, and casts weights it gathers
        stream = weight = COMPUTE_SIZE[precision.compute]
        each /= world
    kept, work = layer_activations(config, tokens, precision.compute, stream)
    if checkpointing:
        checkpoint = tokens * config.hidden_size * stream
        work += kept - (checkpoint if stream == 4 else 0)  # in fp32, it is a norm's input as well
        kept = checkpoint
    # The loss: the head's gradient in the format of products, and at most every position's last
    # state, normed and picked, with its gradient. Besides a chunk of logits and, where weights are
    # cast, those of the head; or later the gradient once more in fp32, cast or scaled.
    size, matrix = COMPUTE_SIZE[precision.compute], config.vocab_size * config.hidden_size
    chunk = min(LOSS_CHUNK, tokens) * config.vocab_size * LOGIT_SIZE[precision.compute]
    fp32 = matrix * 4 if precision.weights.itemsize == 4 else 0
    tied = matrix * weight if config.tie_word_embeddings else 0  # waits for the embedding's
    loss = tokens * config.hidden_size * (4 * weight + 4)
    if world > 1:
        # In fp32 a gradient is sent, and its share comes back; a tied head's only in the end. And
        # there are weights of this layer and the next, and gradients of one.
        fp32 = 0 if tied else fp32
        loss += fp32 / world + 3 * layer * weight
        work += max(matrix * weight, fp32) + 3 * layer * weight
    cast = matrix * size if size < precision.weights.itemsize else 0
    loss += matrix * size + max(cast + chunk, fp32)
    return {
        "embedding": matrix * each + max(0, matrix * weight - work),  # comes last
        "layer": layer * each + kept,
        "head": (0 if tied else matrix * each) + max(tied, loss - work),
        "work": work,
    }


def disk_bytes(config, precision) -> tuple[float, float]:
    """Return the bytes of the exported model, and of a checkpoint: weights and AdamW state."""
    parameters = count_parameters(config)["model"]
    weights = parameters * precision.weights.itemsize
    return weights, parameters * precision.bytes_per_parameter - weights  # no gradients


# ---- Which GPU holds what -----------------------------------------------------------------------
def layer_names(config) -> list[str]:
    return [f"model.layers.{i}" for i in range(config.num_hidden_layers)]


def split_layers(costs: list[float], capacities: list[float], fixed: float = 0) -> list[int]:
    """Return each item's GPU, in order, so that the largest (costs + fixed) / capacity is least.

    A GPU may get none.
    """

    @functools.cache
    def best(first: int, gpu: int) -> tuple[float, list[int]]:  # of items and GPUs from these on
        if gpu == len(capacities):
            return (math.inf if first < len(costs) else 0), []
        options = []
        for end in range(first, len(costs) + 1):
            load = (sum(costs[first:end]) + fixed) / capacities[gpu] if end > first else 0
            rest_load, rest = best(end, gpu + 1)
            options.append((max(load, rest_load), [gpu] * (end - first) + rest))
        return min(options)

    return best(0, 0)[1]


def device_loads(config, parts: dict, device_map: dict | None, num_devices: int) -> list[float]:
    """Return the bytes needed on each device; without a map, each holds all parts."""
    costs = [parts["embedding"], *[parts["layer"]] * config.num_hidden_layers, parts["head"]]
    if device_map is None:
        return [sum(costs) + parts["work"]] * num_devices
    names = ["model.embed_tokens", *layer_names(config), "lm_head"]
    loads = [parts["work"] * (gpu in device_map.values()) for gpu in range(num_devices)]
    for name, cost in zip(names, costs):
        loads[device_map[name]] += cost
    return loads


def place(
    config, tokens: int, precision, capacities: list[float], world: int = 1, checkpointing=True
):
    """Return (device map, bytes needed on each device): whole layers in order, as even as can be.

    Several processes have no map: each has its share of the parameters, and all activations.
    """
    parts = step_memory(config, tokens, precision, world, checkpointing)
    if world > 1:
        return None, device_loads(config, parts, None, world)
    costs = [parts["embedding"], *[parts["layer"]] * config.num_hidden_layers, parts["head"]]
    if config.tie_word_embeddings:  # the head is the embedding, and stays with it
        costs[0] += costs.pop()
    gpus = split_layers(costs, capacities, parts["work"])
    head = gpus[0] if config.tie_word_embeddings else gpus[-1]
    device_map = {"model.rotary_emb": gpus[0], "model.embed_tokens": gpus[0]}
    device_map |= dict(zip(layer_names(config), gpus[1:]))
    device_map |= {"model.norm": gpus[-1], "lm_head": head}
    return device_map, device_loads(config, parts, device_map, len(capacities))


def fits(config, tokens: int, precision, capacities: list[float], world: int = 1) -> bool:
    """Return whether a micro-batch fits, with checkpointing."""
    loads = place(config, tokens, precision, capacities, world)[1]
    return all(load <= USABLE * room for load, room in zip(loads, capacities))


def largest_plain(config, most: int, precision, device_map, capacities: list[float], world: int):
    """Return the tokens of the largest micro-batch, up to `most`, that fits without checkpointing.

    0 if none does. The layers stay where the device map has them.
    """

    def is_too_large(tokens: int) -> bool:
        parts = step_memory(config, tokens, precision, world, checkpointing=False)
        loads = device_loads(config, parts, device_map, len(capacities))
        return any(load > USABLE_PLAIN * room for load, room in zip(loads, capacities))

    return bisect.bisect_left(range(1, most + 1), True, key=is_too_large)


def peak_loads(config, tokens: int, plain: int, precision, device_map, capacities, world: int):
    """Return the bytes needed on each device for micro-batches of up to `tokens` tokens.

    Those of up to `plain` tokens are without checkpointing.
    """
    cases = [(min(tokens, plain), False)] if plain else []
    cases += [(tokens, True)] if tokens > plain else []
    parts = (step_memory(config, most, precision, world, again) for most, again in cases)
    loads = [device_loads(config, part, device_map, len(capacities)) for part in parts]
    return [max(device) for device in zip(*loads)]


def what_would_fit(config, tokens: int, longest: int, precision, sharded, capacities, world: int):
    """Return remedies, in words: fewer tokens at once, or more GPUs like the first.

    `longest`: the tokens of the longest row. `sharded`: the precision of several processes.
    """
    halves, numbers, same = (tokens >> i for i in range(1, 16)), range(2, 65), capacities[:1]
    less = (n for n in halves if n >= longest and fits(config, n, precision, capacities, world))
    split = (n for n in numbers if fits(config, tokens, precision, same * n))
    ranks = (n for n in numbers if fits(config, longest, sharded, same * n, n))
    ways = [f"--tokens_per_forward {n}" for n in itertools.islice(less, 1)]
    ways += [f"{n} such GPUs" for n in itertools.islice(split, 1)]
    least = f"with --tokens_per_forward {longest}"
    return ways + [f"torchrun --nproc_per_node {n} {least}" for n in itertools.islice(ranks, 1)]
