"""How many tokens are computed at once, what is recomputed, and which device holds which layers."""

import math
from dataclasses import dataclass

import torch

from sft.devices import Devices, choose_reference_gpu
from sft.memory_model import Job, list_modules, peak_bytes, usable_bytes, with_host_memory
from sft.placement import ModulesByDevice, place_by_memory, place_by_time
from sft.step_time import (
    RECOMPUTED,
    UTILIZATION,
    Workload,
    busy_share,
    count_windows,
    list_device_times,
    min_pipeline_tokens,
)
from sft.throughput import find_peak_tflops

MAX_TOKENS_ON_CPU = 2048  # of a micro-batch: caches hold less of a larger one, which is slower
MIN_TOKENS_ON_GPU = 4096  # of a micro-batch: a smaller one idles more than recomputing costs
PIPELINE_TOKENS = 4096  # of a micro-batch, where a step is long
MICRO_BATCHES_PER_DEVICE = 8  # of a pipeline's step, where it is short
MIN_GAIN = 1.05  # of a smaller window over a larger one, by an estimate


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is computed at once.

    A micro-batch of at most `max_tokens_without_checkpointing` tokens is not recomputed. In a
    pipeline, this counts the tokens of a window: of all micro-batches in flight.
    """

    tokens_per_forward: int  # of a micro-batch; a longer example is one by itself
    max_tokens_without_checkpointing: int
    window_tokens: int | None  # None where there is no pipeline
    modules_by_device: ModulesByDevice
    fits: bool


# ---- What fits ----------------------------------------------------------------------------------
def list_usable_bytes(job: Job, devices: Devices) -> list[float]:
    """Return what a step may take of each device."""
    return [usable_bytes(job, free) for free in devices.free_bytes]


def list_host_levels(job: Job, devices: Devices) -> list[tuple[str, ...]]:
    """Return what may be kept in host memory, from nothing to the most."""
    levels = [()]
    is_one_gpu_process = devices.kind == "cuda" and devices.num_processes == 1
    if is_one_gpu_process and job.precision.optim == "adamw_torch_8bit":
        levels.append(("state",))
        if job.precision.weights == torch.bfloat16:
            levels.append(("state", "gradients"))
    return levels


def choose_host_memory(job: Job, devices: Devices, tokens: int) -> Job:
    """Return the Job with the least in host memory for which a micro-batch of `tokens` fits.

    Where nothing helps, this is the Job with the most in host memory.
    """
    for level in list_host_levels(job, devices):
        job = with_host_memory(job, level)
        if can_fit(job, devices, tokens):
            break
    return job


def can_fit(job: Job, devices: Devices, tokens: int) -> bool:
    """Return whether one micro-batch of so many tokens fits, recomputed, in the best places."""
    return is_within(list_needed_bytes(job, devices, tokens), list_usable_bytes(job, devices))


def is_within(needed_bytes: list[float], capacities: list[float]) -> bool:
    return all(needed <= capacity for needed, capacity in zip(needed_bytes, capacities))


def list_needed_bytes(job: Job, devices: Devices, tokens: int) -> list[float]:
    """Return the bytes of each device for one micro-batch, recomputed, in the best places."""
    if not devices.is_one_process_on_several_gpus:
        return list_peaks(job, place_everywhere(job, devices), tokens, recompute=True)
    options = {"recompute": True, "window_tokens": tokens}
    capacities = list_usable_bytes(job, devices)
    modules_by_device = place_by_memory(job, capacities, tokens, **options)
    return list_peaks(job, modules_by_device, tokens, **options)


def list_peaks(job: Job, modules_by_device: ModulesByDevice, tokens: int, **options) -> list[float]:
    """Return the bytes of each device at its fullest moment; `options`: those of step_memory."""
    return [peak_bytes(job, modules, tokens, **options) for modules in modules_by_device]


def list_least_bytes(job: Job, devices: Devices, limits: Limits, tokens: int) -> list[float]:
    """Return the bytes of each device for one micro-batch, recomputed, where the modules are.

    If a plan does not fit, places are the best ones, to say how little is missing.
    """
    if not limits.fits:
        return list_needed_bytes(job, devices, tokens)
    window_tokens = None
    if limits.window_tokens is not None:
        window_tokens = tokens
    return list_peaks(
        job, limits.modules_by_device, tokens, recompute=True, window_tokens=window_tokens
    )


def list_used_bytes(job: Job, limits: Limits, longest: int) -> list[float]:
    """Return the most bytes of each device, of what is recomputed and of what is not."""
    tokens = max(limits.tokens_per_forward, longest)
    in_flight = limits.window_tokens or tokens
    kept_tokens = min(in_flight, limits.max_tokens_without_checkpointing)
    used = list_kept_peaks(job, limits.modules_by_device, tokens, kept_tokens, limits.window_tokens)
    if in_flight > kept_tokens:
        recomputed = list_peaks(
            job,
            limits.modules_by_device,
            tokens,
            recompute=True,
            window_tokens=limits.window_tokens,
        )
        used = [max(pair) for pair in zip(used, recomputed)]
    return used


def list_kept_peaks(
    job: Job,
    modules_by_device: ModulesByDevice,
    tokens: int,
    kept_tokens: int,
    window_tokens: int | None,
) -> list[float]:
    """Return the bytes of each device with all activations of `kept_tokens` tokens.

    These are a micro-batch, or a window of micro-batches of `tokens` tokens.
    """
    if window_tokens is None:
        return list_peaks(job, modules_by_device, kept_tokens, recompute=False)
    tokens = min(tokens, kept_tokens)
    return list_peaks(job, modules_by_device, tokens, recompute=False, window_tokens=kept_tokens)


def max_kept_tokens(
    job: Job,
    devices: Devices,
    modules_by_device: ModulesByDevice,
    tokens: int,
    window_tokens: int | None,
) -> int:
    """Return how many tokens fit without recomputing: at most a micro-batch's, or a window's."""
    if window_tokens is not None and job.precision.needs_autocast:
        return 0  # each micro-batch in flight would keep its own cast of all weights
    capacities = list_usable_bytes(job, devices)
    low = 0
    high = window_tokens or tokens
    while low < high:
        middle = (low + high + 1) // 2
        peaks = list_kept_peaks(job, modules_by_device, tokens, middle, window_tokens)
        if is_within(peaks, capacities):
            low = middle
        else:
            high = middle - 1
    return low


def place_everywhere(job: Job, devices: Devices) -> ModulesByDevice:
    """Return all modules for the only device, or for the device of each process."""
    return [list_modules(job.config) for _ in devices.free_bytes]


# ---- One device for each process ----------------------------------------------------------------
def plan_micro_batches(job: Job, devices: Devices, args, longest: int) -> Limits:
    """Return the Limits of a process that computes one micro-batch after the other.

    The largest micro-batch that fits is taken, at most what one forward pass has by the arguments.
    A smaller one is taken where it need not be recomputed, and still keeps a GPU busy: a layer that
    is not recomputed saves a fifth of its time. (But not where all gradients go to the host after
    each micro-batch.)
    """
    tokens = args.tokens_per_forward or choose_micro_batch(job, devices, args, longest)
    most_tokens = max(tokens, longest)
    modules_by_device = place_everywhere(job, devices)
    kept_tokens = max_kept_tokens(job, devices, modules_by_device, most_tokens, None)
    keeps_all = not args.gradient_checkpointing
    if kept_tokens >= MIN_TOKENS_ON_GPU and "gradients" not in job.in_host_memory:
        keeps_all = True
    if keeps_all and args.tokens_per_forward is None:
        tokens = max(1, min(tokens, kept_tokens))
        most_tokens = max(tokens, longest)
    fits = kept_tokens >= most_tokens
    if args.gradient_checkpointing and not fits:
        fits = can_fit(job, devices, most_tokens)
    return Limits(
        tokens_per_forward=tokens,
        max_tokens_without_checkpointing=kept_tokens,
        window_tokens=None,
        modules_by_device=modules_by_device,
        fits=fits,
    )


def choose_micro_batch(job: Job, devices: Devices, args, longest: int) -> int:
    """Return the tokens of the largest micro-batch that fits, or fewer than the longest example."""
    tokens = args.per_device_train_batch_size * args.max_len
    if devices.kind == "cpu":
        tokens = min(tokens, MAX_TOKENS_ON_CPU)
    while tokens > longest and not can_fit(job, devices, tokens):
        if "gradients" in job.in_host_memory:
            # All gradients move for each micro-batch: half of the tokens would take a tenth longer.
            tokens -= max(1, tokens // 8)
        else:
            tokens //= 2
    return tokens


# ---- One process with several GPUs --------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Window:
    """What may be in flight in a pipeline at once."""

    tokens: int
    recompute: bool


@dataclass(frozen=True, kw_only=True)
class PlacedWindow:
    """A window that fits."""

    tokens: int
    modules_by_device: ModulesByDevice
    speed: float  # useful work of all devices, as a share of what they could do


def plan_pipeline(job: Job, devices: Devices, args, workload: Workload) -> Limits:
    """Return the Limits of a process whose GPUs work at once, each on its own layers.

    Micro-batches are smaller than they would best be only where nothing fits else.
    """
    tokens_per_forward = args.tokens_per_forward
    if tokens_per_forward is None:
        tokens_per_forward = choose_pipeline_micro_batch(job, devices, args, workload)
    limits = choose_window(job, devices, args, workload, tokens_per_forward)
    is_asked_for = args.tokens_per_forward is not None
    while not limits.fits and not is_asked_for and tokens_per_forward > workload.longest:
        tokens_per_forward //= 2
        limits = choose_window(job, devices, args, workload, tokens_per_forward)
    return limits


def choose_window(
    job: Job, devices: Devices, args, workload: Workload, tokens_per_forward: int
) -> Limits:
    """Return the Limits with the fastest window that fits.

    A large window fills and empties the pipeline less often. A small one may need no recomputing.
    """
    micro_batch_tokens = max(tokens_per_forward, workload.longest)
    placed = place_windows(job, devices, args, workload, tokens_per_forward)
    if not placed:
        modules_by_device = place_by_memory(
            job,
            list_usable_bytes(job, devices),
            micro_batch_tokens,
            recompute=True,
            window_tokens=micro_batch_tokens,
        )
        return Limits(
            tokens_per_forward=tokens_per_forward,
            max_tokens_without_checkpointing=0,
            window_tokens=micro_batch_tokens,
            modules_by_device=modules_by_device,
            fits=False,
        )
    fastest = placed[0]
    for window in placed:
        if window.speed > MIN_GAIN * fastest.speed:
            fastest = window
    kept_tokens = max_kept_tokens(
        job, devices, fastest.modules_by_device, micro_batch_tokens, fastest.tokens
    )
    return Limits(
        tokens_per_forward=tokens_per_forward,
        max_tokens_without_checkpointing=kept_tokens,
        window_tokens=fastest.tokens,
        modules_by_device=fastest.modules_by_device,
        fits=True,
    )


def place_windows(
    job: Job, devices: Devices, args, workload: Workload, tokens_per_forward: int
) -> list[PlacedWindow]:
    """Return the windows that fit, with the layers of each GPU by even time."""
    micro_batch_tokens = max(tokens_per_forward, workload.longest)
    placed = []
    for window in list_windows(job, args, workload, micro_batch_tokens):
        modules_by_device = place_by_time(
            job,
            list_usable_bytes(job, devices),
            micro_batch_tokens,
            workload.trained_share,
            recompute=window.recompute,
            window_tokens=window.tokens,
        )
        if modules_by_device is None:
            continue
        speed = busy_share(
            list_device_times(job.config, modules_by_device, workload.trained_share),
            num_micro_batches=math.ceil(workload.tokens_of_a_step / tokens_per_forward),
            num_windows=count_windows(workload.tokens_of_a_step, window.tokens),
        )
        if window.recompute:
            speed /= RECOMPUTED
        placed.append(
            PlacedWindow(tokens=window.tokens, modules_by_device=modules_by_device, speed=speed)
        )
    return placed


def list_windows(job: Job, args, workload: Workload, micro_batch_tokens: int) -> list[Window]:
    """Return the windows to try: the whole step, a half of it, a quarter, down to a micro-batch."""
    tokens = max(micro_batch_tokens, workload.tokens_of_the_largest_step)
    windows = []
    while True:
        # Under autocast, each micro-batch in flight would keep its own cast of all weights.
        if not job.precision.needs_autocast:
            windows.append(Window(tokens=tokens, recompute=False))
        if args.gradient_checkpointing:
            windows.append(Window(tokens=tokens, recompute=True))
        if tokens == micro_batch_tokens:
            return windows
        tokens = max(micro_batch_tokens, tokens // 2)


def choose_pipeline_micro_batch(job: Job, devices: Devices, args, workload: Workload) -> int:
    """Return the tokens of a micro-batch that keep a pipeline full, and its host ahead of it.

    A pipeline fills and empties at the pace of a step's longest micro-batch, which is never
    shorter than its longest example: shorter micro-batches beside that gain nothing.
    """
    num_devices = len(devices.names)
    peak_tflops = find_peak_tflops(choose_reference_gpu(devices))
    least = min_pipeline_tokens(job.config, num_devices, UTILIZATION * peak_tflops * 1e12)
    share = int(workload.tokens_of_a_step / (MICRO_BATCHES_PER_DEVICE * num_devices))
    tokens = max(least, workload.longest_of_a_typical_step, min(PIPELINE_TOKENS, share))
    return min(tokens, args.per_device_train_batch_size * args.max_len)
