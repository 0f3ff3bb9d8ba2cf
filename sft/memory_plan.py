"""Number formats, what a training step needs of each GPU, and which GPU holds what: arithmetic.

benchmarks/memory.py holds it against traced steps. Sizes are in bytes, `tokens` are those of a
micro-batch, `capacities` the free bytes of each device.
"""

import bisect
import functools
import itertools
import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sft.numerics import LOSS_CHUNK
from sft.rows import UserError

GIB = 2**30
GPUS = r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*(:(bf16|fp16))?"  # 4x80: number x GB

LOGIT_SIZE = {2: 8, 4: 4}  # of numbers of 2 bytes: one in fp32, and two casts
USABLE = 0.95  # of a device's free memory; the rest is for kernels' workspaces, NCCL's, and gaps
USABLE_WITHOUT_CHECKPOINTING = 0.90  # where most is activations, of changing sizes
MIN_CAPABILITY = {torch.bfloat16: (8, 0), torch.float16: (7, 0)}  # compute capability
STATE_8BIT = 2 * (1 + 4 / 128)  # bytes of AdamW state: two codes, and a scale for each 128 of them
MAX_TOKENS_CPU = 2048  # a micro-batch of more is slower: caches hold less of it
MIN_TOKENS_GPU = 4096  # a micro-batch of fewer leaves a GPU idle more than computing twice does
FEW_STEPS = 10  # of the optimizer: fewer hardly move the weights
TYPICAL_MFU = 0.4
# TFLOP/s of dense half-precision matrix products, from the vendor's data sheets. Of these names,
# the first that a GPU's full name contains is taken.
PEAK_TFLOPS = {"B200": 2250, "H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989, "H20": 148}
PEAK_TFLOPS |= {"A100": 312, "A800": 312, "L40S": 362, "A6000": 155, "V100": 125, "T4": 65}
OLDEST_DRIVER = 580  # for CUDA 13


# ---- Devices and precision ----------------------------------------------------------------------
class Precision(NamedTuple):
    weights: torch.dtype
    compute_dtype: torch.dtype  # of matrix products
    optim: str
    bytes_per_parameter: float  # of weight, gradient and AdamW state
    reason: str


def choose_precision(capability: tuple | None, fp32: bool) -> Precision:
    """Return the number formats for a GPU's compute capability (None: no GPU).

    bf16 weights need stochastic rounding: most updates of AdamW at a learning rate of 1e-5 are less
    than half a bf16 step, and plain rounding loses them. fp16 always has fp32 weights behind it.
    (torch.cuda.is_bf16_supported is no guide: it counts the V100's emulation.)
    """
    if capability is None:
        return Precision(torch.float32, torch.float32, "adamw_torch_fused", 16, "no GPU")
    ampere = capability >= MIN_CAPABILITY[torch.bfloat16]
    compute_dtype = torch.bfloat16 if ampere else torch.float16
    reason = "compute capability {}.{}".format(*capability)
    if fp32:
        return Precision(torch.float32, compute_dtype, "adamw_torch_fused", 16, f"{reason}, --fp32")
    weights = torch.bfloat16 if ampere else torch.float32
    size = 2 * weights.itemsize + STATE_8BIT
    return Precision(weights, compute_dtype, "adamw_torch_8bit", size, reason)


def check_launch(by_torchrun: bool, world_size: int, num_gpus: int) -> None:
    """Raise UserError where accelerate would refuse one process over several GPUs."""
    if by_torchrun and world_size == 1 and num_gpus > 1:
        remedy = f"--nproc_per_node {num_gpus}, or for one of them CUDA_VISIBLE_DEVICES=0 python"
        raise UserError(f"torchrun --nproc_per_node 1 sees {num_gpus} GPUs: use {remedy}")


def check_driver(cuda: str | None, is_available: bool, driver: str | None) -> None:
    """Raise UserError where a PyTorch built for CUDA cannot use the NVIDIA driver that is there."""
    if cuda and driver and not is_available:
        found = f"PyTorch, built for CUDA {cuda}, finds no GPU with NVIDIA driver {driver}"
        newer = f"update it (CUDA 13 needs {OLDEST_DRIVER}), install PyTorch for an older CUDA"
        raise UserError(f"{found}: {newer}, or --use_cpu")


def check_kernels(capabilities: list[tuple], arch_list: list[str]) -> None:
    """Raise UserError where PyTorch has no kernels for a GPU: those of sm_80 run on 8.0 to 8.9.

    `arch_list`: torch.cuda.get_arch_list(). Of compute_80, they are made at run time from 8.0 on.
    """
    for major, minor in capabilities:
        sm = {f"sm_{major}{lower}" for lower in range(minor + 1)}
        compute = {f"compute_{n}" for n in range(50, 10 * major + minor + 1)}
        if not (sm | compute) & set(arch_list):
            gpu = f"this PyTorch has no kernels for a GPU of compute capability {major}.{minor}"
            remedy = "install a build that has them (a V100: the one for CUDA 12.6; see README)"
            raise UserError(f"{gpu}, only {' '.join(arch_list)}: {remedy}")


def check_devices(training_args) -> None:
    """Raise UserError where this machine's GPUs are there, but could not be trained on."""
    device, num_gpus = training_args.device.type, torch.cuda.device_count()
    if device == "mps":  # its kernels for attention and loss were never compared with others
        raise UserError("Apple GPUs are untested, and not used: add --use_cpu")
    if device == "cuda":
        check_launch("LOCAL_RANK" in os.environ, training_args.world_size, num_gpus)
        capabilities = [torch.cuda.get_device_capability(gpu) for gpu in range(num_gpus)]
        check_kernels(capabilities, torch.cuda.get_arch_list())
    hidden = training_args.use_cpu or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if (file := Path("/proc/driver/nvidia/version")).exists() and not hidden:
        driver = re.search(r"\s(\d{3,}\.[\d.]+)", file.read_text())
        check_driver(torch.version.cuda, torch.cuda.is_available(), driver and driver[1])


def parse_gpus(gpus: str) -> tuple[list[float], tuple[int, int]]:
    """Return the free bytes of each GPU of a text like GPUS, and their least compute capability.

    Of 80 "GB", 78.6 GiB are free: a card's total is about 0.99 of its name in GiB (79.2 of 80, 31.7
    of 32, 23.7 of 24), and a CUDA context takes 0.6. Unless said, 16 and 32 GB are V100s (and T4).
    """
    gpus, _, dtype = gpus.partition(":")
    groups = [group.split("x") for group in gpus.split(",")]
    sizes = [int(size) for number, size in groups for _ in range(int(number))]
    dtype = dtype or ("fp16" if {16, 32} & set(sizes) else "bf16")
    capability = MIN_CAPABILITY[{"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]]
    return [(0.99 * size - 0.6) * GIB for size in sizes], capability


def find_devices(gpus: str | None, training_args) -> tuple[list[float], tuple[int, int] | None]:
    """Return the free bytes of each device to plan for, and their least compute capability.

    Of several processes each looks at its own device, and all plan for the one with the least:
    they must cut a step into micro-batches in the same way.
    """
    processes, device = training_args.world_size, training_args.device
    if gpus:
        capacities, capability = parse_gpus(gpus)
        if processes not in (1, len(capacities)):
            raise UserError(f"--gpus has {len(capacities)} GPUs for {processes} processes")
        return capacities if processes == 1 else [min(capacities)] * processes, capability
    import psutil  # comes with accelerate
    from accelerate.utils import gather_object

    if device.type == "cuda":
        ids = [device.index] if processes > 1 else range(torch.cuda.device_count())
        capability = min(torch.cuda.get_device_capability(i) for i in ids)
        free = [torch.cuda.mem_get_info(i)[0] for i in ids]
    else:  # of the machine's memory, a tenth is for other programs
        capability, neighbours = None, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free = [0.9 * psutil.virtual_memory().available / neighbours]
    if processes > 1:
        free = [min(gather_object(free))] * (processes if capability else 1)
        capability = capability and min(gather_object([capability]))
    return free, capability


# ---- What a step needs --------------------------------------------------------------------------
class Job(NamedTuple):
    config: object  # the model's
    precision: Precision
    capacities: list  # free bytes of each device
    num_shards: int  # processes that share the parameters (FSDP2); 1: each has what it trains


def kv_size(config) -> int:  # the width of a layer's keys, and of its values
    return config.hidden_size // config.num_attention_heads * config.num_key_value_heads


def count_parameters(config) -> dict[str, int]:
    """Return the parameters of the "matrices" of a layer, a "layer", a "table", the "model"."""
    hidden, kv = config.hidden_size, kv_size(config)
    matrices = hidden * (2 * hidden + 2 * kv + 3 * config.intermediate_size)  # q o, k v, the MLP's
    layer = matrices + 3 * hidden + 2 * kv  # two norms, and biases of q, k and v
    table = config.vocab_size * hidden  # embedding or head
    model = table * (1 if config.tie_word_embeddings else 2)
    model += layer * config.num_hidden_layers + hidden
    return {"matrices": matrices, "layer": layer, "table": table, "model": model}


def layer_activations(config, tokens: int, compute: torch.dtype, stream: int) -> tuple[int, int]:
    """Return the bytes a layer keeps for its backward pass, and the most that this adds to them.

    `stream`: the bytes of a number of the residual stream, which passes from layer to layer.
    """
    hidden, wide, size = config.hidden_size, config.intermediate_size, compute.itemsize
    casts = size < stream  # autocast: each product keeps casts of its two operands
    # Of both norms, computed in fp32: the input, and the result before it is scaled.
    numbers = 2 * (4 + stream)
    # The input of q, k and v and the input of gate and up; of casts, one for each of the five.
    numbers += size * (5 if casts else 2)
    # Attention: q and the output. Where rows go one by one (bf16's kernel takes them all), the
    # outputs joined; in fp16, on GPUs before Ampere, also a key and a value for each query head.
    numbers += size * {torch.bfloat16: 2, torch.float16: 5, torch.float32: 3}[compute]
    keys = 0 if compute == torch.float16 else 2 * kv_size(config)
    # The MLP: gate, silu(gate), up, and the product.
    kept = tokens * (hidden * numbers + size * (keys + 4 * wide))
    kept += count_parameters(config)["matrices"] * size * casts
    # Halfway back through the MLP the product is gone, and gradients exist: its own, those of
    # silu(gate) and of up, and that of the residual stream.
    return kept, tokens * (2 * wide * size + hidden * stream)


def step_memory(job: Job, tokens: int, names: list[str], checkpointing: bool = True) -> dict:
    """Return the bytes a device needs at each moment of a later micro-batch, and of the update.

    `names`: the modules that it holds. The largest is its peak. With checkpointing, a layer keeps
    only its input, and is computed again on the way back. Shards of a layer, of the embedding, and
    of the head are gathered when their turn comes, in the format of products, and gradients are
    sent in fp32 (FSDP2, as accelerate groups them).
    """
    config, precision, shards = job.config, job.precision, job.num_shards
    size, weight = precision.compute_dtype.itemsize, precision.weights.itemsize
    count, tied = count_parameters(config), config.tie_word_embeddings
    table, gathered = count["table"], count["layer"] * size
    stream = weight if shards == 1 else size
    kept, backward = layer_activations(config, tokens, precision.compute_dtype, stream)
    if checkpointing:
        checkpoint = tokens * config.hidden_size * stream
        backward += kept - (checkpoint if stream == 4 else 0)  # in fp32, a norm's input as well
        kept = checkpoint
    tables = [name for name in names if name in ("model.embed_tokens", "lm_head")]
    layers, head = len(names) - len(tables), "lm_head" in names or (tied and tables)
    parameters = layers * count["layer"] + len(tables) * table
    held = parameters * precision.bytes_per_parameter / shards
    # The loss: at most every position's last state, normed and picked, with its gradient; the
    # head's gradient; a chunk of logits, or later that gradient in fp32: cast, scaled, or sent.
    loss = tokens * config.hidden_size * (4 * stream + 4) + table * size
    chunk = min(LOSS_CHUNK, tokens) * config.vocab_size * LOGIT_SIZE[size]
    if shards == 1:
        cast = table * size if size < weight else 0
        loss += max(cast + chunk, 4 * table if weight == 4 else 0)
        waiting = table * weight if tied and head else 0  # for the gradient of the embedding
        backward += waiting
        embedding = table * weight + waiting
    else:
        sent = table * (4 + (4 + weight) / shards)  # and the share that comes back
        loss += gathered + max(table * size + chunk, 0 if tied else sent)
        waiting = table * 2 * size if tied else table * 4  # or sent, until the next is
        backward += waiting + 3 * gathered  # weights of this layer and the next, and gradients
        embedding = table * size + sent + (waiting if tied else 0)
    largest = table if tables else config.hidden_size * config.intermediate_size
    update = 8 * largest / shards if precision.optim == "adamw_torch_8bit" else 0  # two fp32 copies
    return {
        "loss": held + (layers * kept + loss if head else 0),
        "layer": held + (layers * kept + backward if layers else 0),
        "embedding": held + (embedding if "model.embed_tokens" in names else 0),
        "update": held + update,
    }


def training_flops(config, num_parameters: int, lengths: np.ndarray) -> float:
    """Return the FLOPs of training on rows of these lengths, as MFU counts them.

    6 for each parameter and token, and 12 for each layer, value of the hidden size, and pair of
    tokens of a row (PaLM, arXiv:2204.02311, appendix B). What is computed twice counts once.
    """
    attention = 12 * config.num_hidden_layers * config.hidden_size * (lengths.astype(float) ** 2)
    return 6 * num_parameters * lengths.sum() + attention.sum()


# ---- Which GPU holds what -----------------------------------------------------------------------
def split_items(load, num_items: int, capacities: list[float]) -> list[int]:
    """Return each item's GPU, in order, so that the largest load / capacity is least.

    `load(first, end)`: bytes of a GPU with the items from `first` to before `end`. It may get none.
    """

    @functools.cache
    def best(first: int, gpu: int) -> tuple[float, list[int]]:  # of items and GPUs from these on
        if gpu == len(capacities):
            return (math.inf if first < num_items else 0), []
        options = []
        for end in range(first, num_items + 1):
            share = load(first, end) / capacities[gpu] if end > first else 0
            rest_share, rest = best(end, gpu + 1)
            options.append((max(share, rest_share), [gpu] * (end - first) + rest))
        return min(options)

    return best(0, 0)[1]


def item_names(config) -> list[str]:
    """Return the modules to be placed, in order; a tied head goes with the embedding."""
    layers = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
    return ["model.embed_tokens", *layers, *([] if config.tie_word_embeddings else ["lm_head"])]


def make_device_map(job: Job, tokens: int, checkpointing: bool = True) -> dict | None:
    """Return the GPU of each module: whole layers in order, as even as can be; of shards, None."""
    if job.num_shards > 1 or job.precision.compute_dtype == torch.float32:
        return None
    names = item_names(job.config)

    @functools.cache
    def load(first: int, end: int) -> float:
        return max(step_memory(job, tokens, names[first:end], checkpointing).values())

    gpus = split_items(load, len(names), job.capacities)
    head = gpus[0 if job.config.tie_word_embeddings else -1]
    ends = {"model.rotary_emb": gpus[0], "model.norm": gpus[-1], "lm_head": head}
    return ends | dict(zip(names, gpus))


def held_modules(job: Job, device_map: dict | None) -> list[list[str]]:
    """Return the modules of each device, in order; without a map, each holds (a shard of) all."""
    names, gpus = item_names(job.config), range(len(job.capacities))
    return [[n for n in names if device_map is None or device_map[n] == gpu] for gpu in gpus]


def device_loads(job: Job, tokens: int, device_map: dict | None, checkpointing: bool = True):
    """Return the bytes needed on each device, at the moment when it needs the most."""
    held = held_modules(job, device_map)
    moments = [names and step_memory(job, tokens, names, checkpointing) for names in held]
    return [max(sizes.values()) if sizes else 0 for sizes in moments]


def fits(job: Job, tokens: int, device_map: dict | None, checkpointing: bool = True) -> bool:
    share = USABLE if checkpointing else USABLE_WITHOUT_CHECKPOINTING
    loads = device_loads(job, tokens, device_map, checkpointing)
    return all(load <= share * room for load, room in zip(loads, job.capacities))


# ---- The plan -----------------------------------------------------------------------------------
class Plan(NamedTuple):
    device_map: dict | str | None
    tokens_per_forward: int  # of a micro-batch, at most
    max_tokens_without_checkpointing: int  # of a micro-batch that fits without it
    capacities: list[float]  # free bytes of each device
    needed: list[float]  # at the least: micro-batches of the longest row, all recomputed
    used: list[float]


def plan_memory(job: Job, args, training_args, longest: int) -> Plan:
    """Return the Plan for rows of up to `longest` tokens, whether or not it fits.

    Unless --tokens_per_forward says otherwise, micro-batches are as large as fits; or as fits
    without checkpointing, if these are not too small to keep the device busy: a layer that is not
    recomputed saves a fifth of its time.
    """
    asked, on_cpu = args.tokens_per_forward, job.precision.compute_dtype == torch.float32
    budget = asked or training_args.per_device_train_batch_size * args.max_len
    budget = min(budget, MAX_TOKENS_CPU) if on_cpu and not asked else budget
    if args.device_map != "auto" and job.num_shards == 1:
        return Plan(args.device_map, budget, 0, [], [], [])
    # With checkpointing: the largest micro-batch that fits, or the one that is asked for.
    maps = functools.cache(lambda tokens: make_device_map(job, tokens))
    while not asked and budget > longest and not fits(job, budget, maps(budget)):
        budget //= 2
    tokens = max(budget, longest)
    device_map, least = maps(tokens), maps(longest)
    # Without: as many tokens as fit while layers stay on their devices, if that is enough.
    too_large = lambda tokens: not fits(job, tokens, device_map, False)  # noqa: E731
    plain = bisect.bisect_left(range(1, tokens + 1), True, key=too_large)
    enough = MIN_TOKENS_GPU if training_args.gradient_checkpointing else longest
    if not asked and plain >= enough:
        budget = min(budget, plain)
    tokens = max(budget, longest)
    if plain >= tokens:  # then another split is the most even
        device_map = make_device_map(job, tokens, checkpointing=False)
    cases = [(min(tokens, plain), False)] if plain else []
    cases += [(tokens, True)] if tokens > plain else []
    used = zip(*(device_loads(job, most, device_map, again) for most, again in cases))
    needed = device_loads(job, longest, least)
    return Plan(device_map, budget, plain, job.capacities, needed, [max(x) for x in used])


def print_plan(plan: Plan, job: Job, training_args, longest: int) -> None:
    """Print what each device needs and will use, what is computed twice, and a faster way."""
    if not plan.capacities:
        print("memory     not planned: the device map is your own")
        return
    held = held_modules(job, plan.device_map)
    for gpu, (names, *sizes) in enumerate(zip(held, plan.needed, plan.used, plan.capacities)):
        ends = (
            f" ({names[0]} to {names[-1]})" if names and plan.device_map and len(held) > 1 else ""
        )
        needed, used, room = (size / GIB for size in sizes)
        print(
            f"memory     device {gpu}: needs {needed:.1f}, uses {used:.1f} of {room:.1f} GiB{ends}"
        )
    plain = plan.max_tokens_without_checkpointing
    which = f"micro-batches over {plain:,} tokens" if plain else "all micro-batches"
    enough = plain >= max(plan.tokens_per_forward, longest)
    print(f"recompute  {'nothing: memory suffices' if enough else which}")
    if (gpus := len(plan.capacities)) > 1 and job.num_shards == 1:
        steps = max(1, round(training_args.gradient_accumulation_steps / gpus))
        flags = f"--nproc_per_node {gpus} sft_qwen2.py --gradient_accumulation_steps {steps}"
        small = not fits(shard_job(job, gpus), longest, None)
        way = "too small to work at once" if small else f"at once: torchrun {flags}"
        print(f"devices    work in turn; {way}")


def shard_job(job: Job, num_shards: int) -> Job:
    """Return the job for this many processes over GPUs like the smallest."""
    return job._replace(num_shards=num_shards, capacities=[min(job.capacities)] * num_shards)


def check_plan(plan: Plan, job: Job, args, training_args, longest: int) -> None:
    """Raise UserError where the plan cannot be carried out, with what would fit."""
    tokens = max(plan.tokens_per_forward, longest)
    if all(load <= USABLE * room for load, room in zip(plan.used, plan.capacities)):
        plain = plan.max_tokens_without_checkpointing
        if plan.capacities and plain < tokens and not training_args.gradient_checkpointing:
            raise UserError(f"too little memory for {tokens} tokens without gradient checkpointing")
        gpus = {*plan.device_map.values()} if isinstance(plan.device_map, dict) else set()
        if len(gpus) == 1 and plan.capacities and gpus != {0}:  # Trainer would move it to GPU 0
            raise UserError(f"only GPU {(gpu := gpus.pop())} has room: CUDA_VISIBLE_DEVICES={gpu}")
        return
    if job.precision.compute_dtype == torch.float32:
        raise UserError("too little memory; to plan for another machine: --dry_run --gpus 4x80")
    halves = (tokens >> i for i in range(1, 14))
    fewer = (n for n in halves if fits(job, n, make_device_map(job, n)))
    ways = [
        f"--{'tokens_per_forward' if n >= longest else 'max_len'} {n}"
        for n in itertools.islice(fewer, 1)
    ]
    enough = (n for n in range(2, 65) if fits(shard_job(job, n), tokens, None))
    ways += [f"torchrun --nproc_per_node {n}" for n in itertools.islice(enough, 1)]
    default = choose_precision(MIN_CAPABILITY[job.precision.compute_dtype], False)
    smaller = job._replace(precision=default)
    if args.fp32 and fits(smaller, tokens, make_device_map(smaller, tokens)):
        ways.insert(0, "no --fp32")
    reserve = f"too little memory ({1 - USABLE:.0%} of it stays free)"
    raise UserError(f"{reserve}; what would fit: {'; '.join(ways) or 'a smaller model'}")


def plan_disk(config, precision: Precision, args, training_args) -> None:
    """Print what checkpoints and export take; raises UserError where the disk cannot hold them."""
    parameters = count_parameters(config)["model"]
    weights = parameters * precision.weights.itemsize
    checkpoint = parameters * precision.bytes_per_parameter - weights  # no gradients
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
        print(f"{'':10} few to learn from: fewer rows per step, or more epochs, would make more")


def plan_cost(job: Job, gpus: str | None, training_args, lengths: np.ndarray) -> None:
    """Print the FLOPs of an epoch, and the hours it takes at TYPICAL_MFU of the GPUs' peak."""
    flops = training_flops(job.config, count_parameters(job.config)["model"], lengths)
    name = {torch.bfloat16: "A100", torch.float16: "V100"}.get(job.precision.compute_dtype, "CPU")
    if training_args.device.type == "cuda" and not gpus:
        name = torch.cuda.get_device_name()
    hours, busy = "", training_args.world_size  # one process has its GPUs work in turn
    if tflops := peak_tflops(name):
        time = flops / (TYPICAL_MFU * tflops * 1e12 * busy) / 3600
        hours = f", {time:.2g} h at {TYPICAL_MFU:.0%} of {busy} x {name}'s {tflops} TFLOP/s"
    print(f"cost       {flops:.2g} FLOPs an epoch{hours}")


def peak_tflops(gpu: str) -> float | None:
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu), None)


def rows_per_step(training_args) -> int:
    """Return the rows of one optimizer step, of all processes together."""
    own = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    return own * training_args.world_size
