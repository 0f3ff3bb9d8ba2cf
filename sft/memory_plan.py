"""What a training step needs of each GPU, and which GPU holds what: arithmetic.

benchmarks/memory.py holds it against traced steps. Sizes are in bytes. `config` is the model's,
`capacities` are the free bytes of each device, and `precision` is sft_qwen2.Precision: the dtype of
weights, the format of products, and the bytes of a weight, its gradient and its AdamW state.
"""

import bisect
import functools
import itertools
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sft.rows import UserError

GIB = 2**30
GPUS = r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*"  # 4x80: number x GiB
COMPUTE_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
LOGIT_SIZE = {"bf16": 8, "fp16": 2, "fp32": 4}  # in bf16: of one in fp32, and of two casts
LOSS_CHUNK = 1024  # positions whose logits exist at once: 0.9 GiB with gradients at V = 152,064
USABLE = 0.95  # of a device's free memory: the rest is for the CUDA context and gaps
OLDEST = {"bf16": (8, 0), "fp16": (7, 0)}  # least compute capability for which this is chosen
STATE_8BIT = 2 * (1 + 4 / 256)  # bytes of AdamW state: two codes, and a scale for each 256 of them
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FAST_TOKENS_CPU = 2048  # a micro-batch of more is slower: caches hold less of it
FAST_TOKENS_GPU = 4096  # a micro-batch of fewer leaves a GPU idle more than computing twice does
# TFLOP/s of dense half-precision matrix products, from the vendor's data sheets, for MFU. Of these
# names, the first that a GPU's full name contains is taken.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989, "H20": 148}
FEW_STEPS = 10  # of the optimizer: fewer hardly move the weights
PEAK_TFLOPS |= {"A100": 312, "A800": 312, "V100": 125}
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


# ---- Precision, and the plan ------
class Precision(NamedTuple):
    weights: torch.dtype
    compute: str  # bf16, fp16 or fp32
    optim: str
    bytes_per_parameter: float  # of weight, gradient and AdamW state
    reason: str


def choose_precision(capability: tuple | None, world_size: int, fp32: bool) -> Precision:
    """Return the number formats for a GPU's compute capability (None: no GPU).

    bf16 weights need stochastic rounding: most updates of AdamW at a learning rate of 1e-5 are less
    than half a bf16 step, and plain rounding loses them. fp16 always has fp32 weights behind it.
    (torch.cuda.is_bf16_supported is no guide: it counts the V100's emulation.)
    """
    if capability is None:
        return Precision(torch.float32, "fp32", "adamw_torch_fused", 16, "no GPU")
    gpu = "compute capability {}.{}".format(*capability)
    compute = "bf16" if capability >= (8, 0) else "fp16"
    if fp32 or world_size > 1:
        reason = f"{gpu}, {'--fp32' if fp32 else 'sharded'}"
        return Precision(torch.float32, compute, "adamw_torch_fused", 16, reason)
    weights = torch.bfloat16 if compute == "bf16" else torch.float32
    size = 2 * weights.itemsize + STATE_8BIT
    return Precision(weights, compute, "adamw_torch_8bit", size, gpu)


def find_devices(gpus: str | None, training_args) -> tuple[list[float], tuple[int, int] | None]:
    """Return the free bytes of each device to plan for, and their least compute capability.

    Of several processes each looks at its own device, and all plan for the one with the least:
    they must cut a step into micro-batches in the same way.
    """
    if gpus:
        capacities, processes = parse_gpus(gpus), training_args.world_size
        if processes not in (1, len(capacities)):
            raise UserError(f"--gpus has {len(capacities)} GPUs for {processes} processes")
        old = {16 * GIB, 32 * GIB} & set(capacities)  # V100s, and the T4
        capacities = capacities if processes == 1 else [min(capacities)] * processes
        return capacities, OLDEST["fp16" if old else "bf16"]
    import psutil  # comes with accelerate
    from accelerate.utils import gather_object

    world_size, device = training_args.world_size, training_args.device
    if device.type == "cuda":
        ids = [device.index] if world_size > 1 else range(torch.cuda.device_count())
        capability = min(torch.cuda.get_device_capability(i) for i in ids)
        free = [torch.cuda.mem_get_info(i)[0] for i in ids]
    else:  # of the machine's memory, a tenth is for other programs
        capability, processes = None, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free = [0.9 * psutil.virtual_memory().available / processes]
    if world_size > 1:
        free = [min(gather_object(free))] * (world_size if capability else 1)
        capability = capability and min(gather_object([capability]))
    return free, capability


class Plan(NamedTuple):
    device_map: dict | str | None
    tokens_per_forward: int  # of a micro-batch, at most
    plain_tokens: int  # at most, of one that fits without gradient checkpointing


def plan_memory(config, args, training_args, precision: Precision, capacities: list, longest: int):
    """Return the Plan and print what each device will hold; raises UserError if too much.

    `longest`: the tokens of the longest row. Unless --tokens_per_forward says otherwise,
    micro-batches are as large as fits; or as fits without checkpointing, if these are not too small
    to keep the device busy: a layer that is not recomputed saves a fifth of its time.
    """
    on_cpu = precision.compute == "fp32"
    world = 1 if on_cpu else training_args.world_size  # a CPU's processes have all weights each
    budget = training_args.per_device_train_batch_size * args.max_len
    budget = args.tokens_per_forward or (min(budget, FAST_TOKENS_CPU) if on_cpu else budget)
    if args.device_map != "auto" and world == 1:
        print("memory     not planned: the device map is your own")
        return Plan(args.device_map, budget, 0)
    # With checkpointing: the largest micro-batch that fits, or the one that is asked for.
    terms = (precision, capacities, world)
    if not args.tokens_per_forward:
        while budget > longest and not fits(config, budget, *terms):
            budget //= 2
    tokens = max(budget, longest)
    device_map, loads = place(config, tokens, *terms)
    if not fits(config, tokens, *terms):
        print_loads(loads, capacities, device_map)
        refuse_plan(config, args, precision, capacities, (tokens, longest), world)
    # Without: as many tokens as fit while layers stay on their devices, if that is enough.
    placed = (precision, device_map, capacities, world)
    plain = largest_plain(config, tokens, *placed)
    enough = FAST_TOKENS_GPU if training_args.gradient_checkpointing else longest
    if not args.tokens_per_forward and plain >= enough:
        budget = min(budget, plain)
    tokens = max(budget, longest)
    if not training_args.gradient_checkpointing and plain < tokens:
        raise UserError(f"too little memory for {tokens} tokens without gradient checkpointing")
    which = f"micro-batches over {plain:,} tokens" if plain else "all micro-batches"
    loads = peak_loads(config, tokens, plain, *placed)
    if plain >= tokens:  # then another split is the most even
        which = "nothing: memory suffices"
        device_map, loads = place(config, tokens, *terms, checkpointing=False)
    print_loads(loads, capacities, device_map)
    print(f"recompute  {which}")  # by gradient checkpointing
    if world == 1 and len(capacities) > 1:
        print_torchrun(config, precision, capacities, longest, training_args)
    on_gpu = training_args.device.type == "cuda"
    return Plan(device_map if on_gpu else None, budget, plain)


def print_loads(loads: list[float], capacities: list[float], device_map: dict | None) -> None:
    for gpu, (load, room) in enumerate(zip(loads, capacities)):
        parts = [part for part, at in (device_map or {}).items() if at == gpu]
        held = f" ({parts[gpu == 0]} to {parts[-1]})" if len(capacities) > 1 and parts else ""
        print(f"memory     device {gpu}: {load / GIB:.1f} of {room / GIB:.1f} GiB{held}")


def print_torchrun(config, precision: Precision, capacities: list, longest: int, training_args):
    """Say how all GPUs of one process could be used at once, for the same rows per step."""
    gpus = len(capacities)
    sharded = choose_precision(OLDEST[precision.compute], gpus, False)
    each = place(config, longest, sharded, capacities, gpus)[1][0]
    steps = max(1, round(training_args.gradient_accumulation_steps / gpus))
    flags = f"--nproc_per_node {gpus} sft_qwen2.py --gradient_accumulation_steps {steps}"
    way = f"at once: torchrun {flags}"
    if each > USABLE * min(capacities):
        way = "too small to work at once"
    print(f"devices    work in turn; {way} ({each / GIB:.1f} GiB each at least)")


def refuse_plan(config, args, precision: Precision, capacities: list, tokens: tuple, world: int):
    """Raise UserError, with what would fit. `tokens`: of a micro-batch, and of the longest row."""
    if precision.compute == "fp32":
        raise UserError("too little memory; to plan for another machine: --dry_run --gpus 4x80")
    single, sharded = (choose_precision(OLDEST[precision.compute], n, False) for n in (1, 2))
    ways = what_would_fit(config, *tokens, precision, sharded, capacities, world)
    if (args.fp32 or world > 1) and fits(config, tokens[0], single, capacities):
        ways.insert(0, "one process" + " without --fp32" * args.fp32)
    reserve = f"too little memory ({1 - USABLE:.0%} of it stays free)"
    raise UserError(f"{reserve}; what would fit: {'; '.join(ways) or 'a smaller model'}")


def plan_disk(config, precision: Precision, args, training_args) -> None:
    """Print what checkpoints and export take; raises UserError where the disk cannot hold them."""
    weights, checkpoint = disk_bytes(config, precision)
    kept = 0 if training_args.save_strategy == "no" else (training_args.save_total_limit or 2) + 1
    folder = Path(training_args.output_dir).resolve()
    folder = next(place for place in (folder, *folder.parents) if place.exists())
    needed, free = (weights + kept * checkpoint) / GIB, shutil.disk_usage(folder).free / GIB
    here = "" if args.gpus else f", {free:.1f} GiB free"  # else, it is another machine's disk
    print(f"disk       {needed:.1f} GiB for {kept} checkpoints and the export{here}")
    if needed > free and here:
        raise UserError("too little disk: lower --save_total_limit, or move --output_dir")


def plan_steps(budget: int, training_args, lengths: np.ndarray, bin_rows) -> None:
    """Print how many optimizer steps there will be, and the forward passes of one."""
    rows = rows_per_step(training_args)
    steps = math.ceil(math.ceil(len(lengths) / rows) * training_args.num_train_epochs)
    steps = training_args.max_steps if training_args.max_steps > 0 else steps
    sample = np.random.default_rng(0).permutation(lengths)[:rows].tolist()
    world_size = training_args.world_size
    passes = len(bin_rows(sample, budget, world_size)) // world_size
    each = f"{min(rows, len(lengths))} rows, {passes} or so forward passes of {budget} tokens"
    print(f"steps      {steps} of {each}")
    if steps < FEW_STEPS:
        print(f"{'':10} few to learn from: lower --gradient_accumulation_steps, or train longer")


def training_flops(config, num_parameters: int, lengths: np.ndarray) -> float:
    """Return the FLOPs of training on rows of these lengths, as MFU counts them.

    6 for each parameter and token, and 12 for each layer, value of the hidden size, and pair of
    tokens of a row (PaLM, arXiv:2204.02311, appendix B). What is computed twice counts once.
    """
    attention = 12 * config.num_hidden_layers * config.hidden_size * (lengths.astype(float) ** 2)
    return 6 * num_parameters * lengths.sum() + attention.sum()


def rows_per_step(training_args) -> int:
    """Return the rows of one optimizer step, of all processes together."""
    own = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    return own * training_args.world_size
