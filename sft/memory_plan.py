"""Number formats, what a training step needs of each GPU, and which GPU holds what, in bytes."""

import bisect
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
WORKSPACES, NCCL = 0.5 * GIB, 0.6 * GIB  # of kernels, and of messages between processes
USABLE = 0.95  # of what these leave free: the rest is for gaps (expandable segments: few)
MIN_CAPABILITY = {torch.bfloat16: (8, 0), torch.float16: (7, 0)}  # compute capability
STATE_8BIT = 2 * (1 + 4 / 128)  # bytes of AdamW state: two codes, and a scale for each 128 of them
MAX_TOKENS_CPU = 2048  # a micro-batch of more is slower: caches hold less of it
MIN_TOKENS_GPU = 4096  # a micro-batch of fewer leaves a GPU idle more than computing twice does
# TFLOP/s of dense half-precision products, by the vendor: the first in a GPU's full name counts.
PEAK_TFLOPS = {"B200": 2250, "H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989, "H20": 148}
PEAK_TFLOPS |= {"A100": 312, "A800": 312, "L40S": 362, "A6000": 155, "V100": 125, "T4": 65}


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
    compute_dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    weights = torch.float32 if fp32 or compute_dtype == torch.float16 else torch.bfloat16
    optim, state = ("adamw_torch_fused", 8) if fp32 else ("adamw_torch_8bit", STATE_8BIT)
    reason = "compute capability {}.{}".format(*capability) + ", --fp32" * fp32
    return Precision(weights, compute_dtype, optim, 2 * weights.itemsize + state, reason)


def check_devices(kind: str, gpus: list, arch_list: list, alone: bool, cuda: str, driver: str):
    """Raise UserError where this machine's GPUs are there, but could not be trained on.

    `kind`: of the chosen device. `gpus`: their compute capabilities. `arch_list`: PyTorch's, whose
    sm_80 is for 8.0 to 8.9, and compute_80 for all from 8.0. `alone`: torchrun started one process.
    """
    if kind == "mps":
        raise UserError("Apple GPUs are untested, and not used: add --use_cpu")
    if kind == "cpu" and cuda and driver:
        remedy = "update it (CUDA 13 needs 580), install PyTorch for an older CUDA, or --use_cpu"
        raise UserError(f"PyTorch for CUDA {cuda} sees no GPU by NVIDIA driver {driver}: {remedy}")
    for major, minor in gpus:
        usable = {f"sm_{major}{older}" for older in range(minor + 1)}
        usable |= {f"compute_{older}" for older in range(50, 10 * major + minor + 1)}
        if not usable & set(arch_list):
            found = f"PyTorch has no kernels for a GPU of compute capability {major}.{minor}"
            remedy = "install a build with them (a V100: the one for CUDA 12.6; see README)"
            raise UserError(f"{found}, only {' '.join(arch_list)}: {remedy}")
    if alone and len(gpus) > 1:
        raise UserError("torchrun for one of several GPUs: use --nproc_per_node gpu, or python")


def check_machine(training_args, file: Path = Path("/proc/driver/nvidia/version")) -> None:
    """Raise UserError as check_devices does, of this machine; --use_cpu needs no driver."""
    kind = training_args.device.type
    gpus = range(torch.cuda.device_count() if kind == "cuda" else 0)
    capabilities = [torch.cuda.get_device_capability(gpu) for gpu in gpus]
    alone = "LOCAL_RANK" in os.environ and training_args.world_size == 1
    hidden = training_args.use_cpu or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    driver = re.search(r"\s(\d{3,}\.[\d.]+)", file.read_text() if file.exists() else "")
    versions = (torch.version.cuda or "", driver[1] if driver and not hidden else "")
    check_devices(kind, capabilities, torch.cuda.get_arch_list(), alone, *versions)


def parse_gpus(gpus: str) -> tuple[list[float], tuple[int, int]]:
    """Return the free bytes of each GPU of a text like GPUS, and their least compute capability.

    Of 80 "GB" 78.6 GiB are free: a card has about 0.99 of its name in GiB (79.2 of 80, 31.7 of 32,
    23.7 of 24), and a CUDA context takes 0.6. Unless said, 16 and 32 GB are V100s (and T4).
    """
    gpus, _, dtype = gpus.partition(":")
    sizes = [int(size) for n, size in re.findall(r"(\d+)x(\d+)", gpus) for _ in range(int(n))]
    old = dtype == "fp16" or (not dtype and {16, 32} & set(sizes))
    return [(0.99 * size - 0.6) * GIB for size in sizes], (7, 0) if old else (8, 0)


def find_devices(gpus: str | None, training_args) -> tuple[list[float], tuple[int, int] | None]:
    """Return the free bytes of each device to plan for, and their least compute capability.

    All processes plan for the device with the least: they must cut a step in the same way.
    """
    processes = training_args.world_size
    if gpus:
        free, capability = parse_gpus(gpus)
        if processes not in (1, len(free)):
            raise UserError(f"--gpus has {len(free)} GPUs for {processes} processes")
        return free if processes == 1 else [min(free)] * processes, capability
    import psutil  # comes with accelerate
    from accelerate.utils import gather_object

    if training_args.device.type == "cuda":
        ids = [training_args.device.index] if processes > 1 else range(torch.cuda.device_count())
        capability = min(torch.cuda.get_device_capability(i) for i in ids)
        free = [torch.cuda.mem_get_info(i)[0] for i in ids]
    else:  # of the machine's memory, a tenth is for other programs
        free = 0.9 * psutil.virtual_memory().available
        free, capability = [free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))], None
    if processes > 1:
        free = [min(gather_object(free))] * (processes if capability else 1)
        capability = capability and min(gather_object([capability]))
    return free, capability


# ---- What a step needs: benchmarks/memory.py holds it against recorded steps ---------------------
class Job(NamedTuple):
    config: object  # the model's
    precision: Precision
    capacities: list  # free bytes of each device
    num_shards: int  # processes that share the parameters (FSDP2); 1: each has what it trains

    def over(self, n: int):  # this many processes, on GPUs like the smallest
        return self._replace(num_shards=n, capacities=[min(self.capacities)] * n)


def count_parameters(config) -> dict[str, int]:
    """Return the parameters of the "matrices" of a layer, a "layer", a "table", the "model"."""
    hidden = config.hidden_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    matrices = hidden * (2 * hidden + 2 * kv + 3 * config.intermediate_size)  # q o, k v, the MLP's
    layer = matrices + 3 * hidden + 2 * kv  # two norms, and biases of q, k and v
    table = config.vocab_size * hidden  # embedding or head
    model = table * (2 - config.tie_word_embeddings) + layer * config.num_hidden_layers + hidden
    return {"kv": kv, "matrices": matrices, "layer": layer, "table": table, "model": model}


def layer_activations(config, tokens: int, compute: torch.dtype, stream: int) -> tuple[int, int]:
    """Return the bytes a layer keeps for its backward pass, and the most that this adds to them.

    `stream`: the bytes of a number of the residual stream, which passes from layer to layer.
    """
    wide, size, count = config.intermediate_size, compute.itemsize, count_parameters(config)
    casts = size < stream  # autocast: each product keeps casts of its two operands
    # Both norms, computed in fp32: the input, and the result before it is scaled. The input of q, k
    # and v, and of gate and up; of casts, one for all five. Attention: q and the output; where rows
    # go singly (not in bf16) outputs joined; in fp16 a key and a value per query head. The MLP: 4.
    attention = {torch.bfloat16: 2, torch.float32: 3, torch.float16: 5}[compute]
    numbers = 2 * (4 + stream) + size * ((5 if casts else 2) + attention)
    keys = 0 if compute == torch.float16 else 2 * count["kv"]
    kept = tokens * (config.hidden_size * numbers + size * (keys + 4 * wide))
    kept += count["matrices"] * size * casts
    # Halfway back through the MLP its product is gone, and gradients exist: the product's, those
    # of silu(gate) and of up, and that of the residual stream.
    return kept, tokens * (2 * wide * size + config.hidden_size * stream)


def step_memory(job: Job, tokens: int, names: list[str], checkpointing: bool = True) -> dict:
    """Return the bytes a device needs at each moment of a later micro-batch, and of the update.

    `names`: the modules that it holds. With checkpointing, a layer keeps only its input, and is
    computed again on the way back. Shards of a layer, the embedding, and the head are gathered when
    their turn comes, in the format of products; gradients are sent in fp32 (accelerate's FSDP2).
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
    # head's gradient; a chunk of logits (in half precision fp32 ones and two casts), or later that
    # gradient in fp32: cast, scaled, or sent.
    loss = tokens * config.hidden_size * (4 * stream + 4) + table * size
    chunk = min(LOSS_CHUNK, tokens) * config.vocab_size * (8 if size == 2 else 4)
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
    largest = table if tables else config.hidden_size * config.intermediate_size * (layers > 0)
    update = 8 * largest / shards if precision.optim == "adamw_torch_8bit" else 0  # two fp32 copies
    return {
        "loss": held + (layers * kept + loss if head else 0),
        "layer": held + (layers * kept + backward if layers else 0),
        "embedding": held + (embedding if "model.embed_tokens" in names else 0),
        "update": held + update,
    }


def training_flops(config, num_parameters: int, lengths: np.ndarray) -> float:
    """Return the FLOPs of training on rows of these lengths, as MFU counts them: 6 for a parameter
    and token, 12 for a layer, value of the hidden size, and pair of a row's tokens (PaLM, app. B).
    """
    attention = 12 * config.num_hidden_layers * config.hidden_size * (lengths.astype(float) ** 2)
    return 6.0 * num_parameters * lengths.sum() + attention.sum()


# ---- Which GPU holds what -----------------------------------------------------------------------
def place(job: Job, tokens: int, checkpointing: bool = True) -> list[list[str]]:
    """Return the modules of each device: of shards all, else so that the fullest is least full.

    Whole layers, in order. Within a limit, filling each GPU leaves the fewest for the others.
    """
    layers = [f"model.layers.{i}" for i in range(job.config.num_hidden_layers)]
    names = ["model.embed_tokens", *layers, *["lm_head"] * (not job.config.tie_word_embeddings)]
    if job.num_shards > 1 or job.precision.compute_dtype == torch.float32:
        return [names] * len(job.capacities)

    def share(names: list[str], capacity: float) -> float:
        return max(step_memory(job, tokens, names, checkpointing).values()) / capacity

    def deal(limit: float) -> tuple[list, list]:  # what each holds, and what is left over
        held, rest = [], names
        for capacity in job.capacities:
            lengths = range(1, len(rest) + 1)
            key = lambda n: share(rest[:n], capacity)  # noqa: B023, E731
            fitting = bisect.bisect_right(lengths, limit, key=key)
            held, rest = [*held, rest[:fitting]], rest[fitting:]
        return held, rest

    spans = itertools.product(itertools.combinations(range(len(names) + 1), 2), {*job.capacities})
    shares = sorted({share(names[first:end], room) for (first, end), room in spans})
    return deal(shares[bisect.bisect_left(shares, True, key=lambda s: not deal(s)[1])])[0]


def device_loads(job: Job, tokens: int, held: list[list[str]], checkpointing: bool = True):
    """Return the bytes needed on each device, at the moment when it needs the most."""
    return [max(step_memory(job, tokens, names, checkpointing).values()) for names in held]


def fits(job: Job, tokens: int, held: list | None = None, checkpointing: bool = True) -> bool:
    """Return whether a micro-batch fits where the modules are held, or in their best places."""
    reserve = WORKSPACES + (NCCL if job.num_shards > 1 else 0)
    loads = device_loads(job, tokens, held or place(job, tokens), checkpointing)
    usable = [USABLE * (free - reserve) for free in job.capacities]
    return all(load <= room for load, room in zip(loads, usable) if load)


# ---- The plan -----------------------------------------------------------------------------------
class Plan(NamedTuple):
    device_map: dict | None  # of one process on GPUs
    tokens_per_forward: int  # of a micro-batch, at most
    max_tokens_without_checkpointing: int  # of a micro-batch that fits without it
    held: list[list[str]]  # modules of each device
    needed: list[float]  # bytes of each device at the least: one row at a time, all recomputed
    used: list[float]  # bytes of each device


def plan_memory(job: Job, args, training_args, longest: int) -> Plan:
    """Return the Plan for rows of up to `longest` tokens, whether or not it fits."""
    asked, on_cpu = args.tokens_per_forward, job.precision.compute_dtype == torch.float32
    budget = asked or training_args.per_device_train_batch_size * args.max_len
    budget = min(budget, MAX_TOKENS_CPU) if on_cpu and not asked else budget
    # With checkpointing: the largest micro-batch that fits, or the one that was asked for.
    while not asked and budget > longest and not fits(job, budget):
        budget //= 2
    tokens = max(budget, longest)
    held = place(job, tokens)
    # Without: as many tokens as fit while layers stay on their devices, if that keeps the devices
    # busy; a layer that is not computed again saves a fifth of its time.
    is_too_large = lambda n: not fits(job, n, held, checkpointing=False)  # noqa: E731
    plain = bisect.bisect_left(range(1, tokens + 1), True, key=is_too_large)
    enough = MIN_TOKENS_GPU if training_args.gradient_checkpointing else longest
    if not asked and plain >= enough:
        budget = min(budget, plain)
    tokens = max(budget, longest)
    if plain >= tokens:  # then another split is the most even
        held = place(job, tokens, checkpointing=False)
    cases = [(min(tokens, plain), False)] * (plain > 0) + [(tokens, True)] * (tokens > plain)
    used = zip(*(device_loads(job, most, held, again) for most, again in cases))
    used = [max(loads) for loads in used]
    needed = device_loads(job, longest, place(job, longest))
    if on_cpu or job.num_shards > 1:
        return Plan(None, budget, plain, held, needed, used)
    gpus = {name: gpu for gpu, names in enumerate(held) for name in names}
    gpus |= {"model.rotary_emb": gpus["model.embed_tokens"], "model.norm": max(gpus.values())}
    gpus = {"lm_head": gpus["model.embed_tokens"]} | gpus  # a tied one
    return Plan(gpus, budget, plain, held, needed, used)


def print_plan(plan: Plan, job: Job, args, training_args, lengths: np.ndarray, bin_rows) -> None:
    """Print all that will be: formats, memory, steps, time and disk."""
    precision, longest, world_size = job.precision, int(lengths.max()), training_args.world_size
    formats = " over ".join(str(dtype).removeprefix("torch.") for dtype in precision[1::-1])
    assumed = ", assumed: --gpus can end in :bf16 or :fp16" if args.gpus else ""
    print(f"precision  {formats} weights, {precision.optim} ({precision.reason}{assumed})")
    in_turn = job.num_shards == 1 and (gpus := len(plan.held)) > 1
    for gpu, names in enumerate(plan.held):
        sizes = [x[gpu] / GIB for x in (plan.needed, plan.used, job.capacities)]
        line = "memory     device {}: needs {:.1f}, uses {:.1f} of {:.1f} GiB".format(gpu, *sizes)
        print(line + (f" ({names[0]} to {names[-1]})" if names and in_turn else ""))
    plain = plan.max_tokens_without_checkpointing
    which = f"micro-batches over {plain:,} tokens" if plain else "all micro-batches"
    enough = plain >= max(plan.tokens_per_forward, longest)
    print(f"recompute  {'nothing: memory suffices' if enough else which}")
    if in_turn:
        fewer = max(1, round(training_args.gradient_accumulation_steps / gpus))
        way = f"at once: torchrun --nproc_per_node {gpus} sft_qwen2.py"
        way += f" --gradient_accumulation_steps {fewer}"
        at_once = fits(job.over(gpus), longest)
        print("devices    work in turn;", way if at_once else "too small to work at once")
    rows = rows_per_step(training_args)
    steps = math.ceil(math.ceil(len(lengths) / rows) * training_args.num_train_epochs)
    steps = training_args.max_steps if training_args.max_steps > 0 else steps
    sample = np.random.default_rng(0).permutation(lengths)[:rows].tolist()
    passes = len(bin_rows(sample, plan.tokens_per_forward, world_size)) // world_size
    each = f"{len(sample)} rows, {passes} or so forward passes of {plan.tokens_per_forward} tokens"
    few = "; few to learn from: more epochs, or fewer rows a step" if steps < 10 else ""
    print(f"steps      {steps} of {each}{few}")
    flops = training_flops(job.config, count_parameters(job.config)["model"], lengths)
    gpu = {torch.bfloat16: "A100", torch.float16: "V100"}.get(precision.compute_dtype, "CPU")
    if training_args.device.type == "cuda" and not args.gpus:
        gpu = torch.cuda.get_device_name()
    peak = peak_tflops(gpu) or 0  # the GPUs of one process work in turn
    hours = flops / (0.4 * peak * 1e12 * world_size or math.inf) / 3600
    speed = f": {hours:.2g} h if {world_size} x {gpu} reach 40 % of {peak} TFLOP/s" * (peak > 0)
    print(f"cost       {flops:.2g} FLOPs an epoch{speed}")
    needed, free, checkpoints = disk_bytes(job, training_args)
    here = "" if args.gpus else f", {free / GIB:.1f} GiB free"  # else, on another machine
    print(f"disk       {needed / GIB:.1f} GiB for {checkpoints} checkpoints and the export{here}")


def check_plan(plan: Plan, job: Job, args, training_args, longest: int) -> None:
    """Raise UserError where the plan cannot be carried out, with what would fit."""
    tokens, plain = max(plan.tokens_per_forward, longest), plan.max_tokens_without_checkpointing
    if tokens > plain and not fits(job, tokens, plan.held):
        if job.precision.compute_dtype == torch.float32:
            raise UserError("too little memory; to plan for another machine: --dry_run --gpus 4x80")
        fewer = (n for n in (tokens >> i for i in range(1, 14)) if fits(job, n))
        more = (n for n in range(2, 65) if fits(job.over(n), tokens))
        ways = [f"--{'tokens_per_forward' if n >= longest else 'max_len'} {n}" for n in fewer][:1]
        ways += [f"torchrun --nproc_per_node {n}" for n in itertools.islice(more, 1)]
        default = choose_precision(MIN_CAPABILITY[job.precision.compute_dtype], False)
        ways += ["no --fp32"] * (args.fp32 and fits(job._replace(precision=default), tokens))
        ways = "; ".join(ways) or "a smaller model"
        raise UserError(f"too little memory; what would fit: {ways}")
    if plain < tokens and not training_args.gradient_checkpointing:
        raise UserError(f"too little memory for {tokens} tokens without gradient checkpointing")
    gpus = [gpu for gpu, names in enumerate(plan.held) if names]
    if len(gpus) == 1 and gpus != [0]:  # Trainer would move all to GPU 0
        raise UserError(f"only GPU {gpus[0]} has room: use CUDA_VISIBLE_DEVICES={gpus[0]}")
    needed, free, _ = disk_bytes(job, training_args)
    if needed > free and not args.gpus:
        raise UserError("too little disk: lower --save_total_limit, or move --output_dir")


def disk_bytes(job: Job, training_args) -> tuple[float, float, int]:
    """Return the bytes that export and checkpoints take, those free, and how many of these."""
    parameters, precision = count_parameters(job.config)["model"], job.precision
    weights = parameters * precision.weights.itemsize
    checkpoint = parameters * precision.bytes_per_parameter - weights  # no gradients
    kept = 0 if training_args.save_strategy == "no" else (training_args.save_total_limit or 2) + 1
    folder = Path(training_args.output_dir).resolve()
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    return weights + kept * checkpoint, shutil.disk_usage(folder).free, kept


def peak_tflops(gpu: str) -> float | None:
    """Return the peak of a GPU of this name, in TFLOP/s, if it is known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu), None)


def rows_per_step(training_args) -> int:
    """Return the rows of one optimizer step, of all processes together."""
    own = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    return own * training_args.world_size
