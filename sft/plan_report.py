"""The plan on the screen, one fact a line, and what to change where a run would learn little."""

import math

from sft.devices import choose_reference_gpu
from sft.limits import plan_micro_batches
from sft.memory_model import EMBEDDING, HEAD, pinned_host_bytes, with_shards
from sft.plan import GB, Plan, name_host_contents
from sft.precision import name_format
from sft.step_time import (
    DISK_BYTES_PER_S,
    NVLINK_BYTES_PER_S,
    PCIE_BYTES_PER_S,
    RECOMPUTED,
    UTILIZATION,
    busy_share,
    count_windows,
    gradient_transfer_s,
    host_transfer_s,
    sharded_step_s,
    state_transfer_s,
    step_flops,
    training_flops,
)
from sft.throughput import GIB, find_peak_tflops

MIN_STEPS = 20  # fewer teach little, and evaluation or saving may never come
MIN_SPEEDUP = 1.15  # of another way to start the script, for it to be named
SAVING_SHARE = 0.1  # of a run's time that saving may take before it is named


def print_plan(plan: Plan, num_forward_passes: int) -> None:
    """Print what will be done. `num_forward_passes`: micro-batches of a typical step."""
    for line in describe_plan(plan, num_forward_passes):
        print(line)


def describe_plan(plan: Plan, num_forward_passes: int) -> list[str]:
    """Return the lines of the plan; time and disk are left out where the memory is not there."""
    lines = describe_precision(plan)
    lines += describe_memory(plan)
    lines += describe_host_memory(plan)
    if not plan.limits.fits:
        return lines
    lines.append(describe_recomputing(plan))
    if plan.devices.is_one_process_on_several_gpus:
        lines += describe_pipeline(plan, num_forward_passes)
    lines += describe_steps(plan, num_forward_passes)
    lines += describe_cost(plan, num_forward_passes)
    lines += describe_saving(plan, num_forward_passes)
    lines.append(describe_disk(plan))
    return lines


# ---- Formats and memory -------------------------------------------------------------------------
def describe_precision(plan: Plan) -> list[str]:
    """Return the formats, and why they were chosen."""
    precision = plan.precision
    formats = name_format(precision.weights)
    if precision.needs_autocast:
        formats = f"{name_format(precision.compute)} over {formats} weights"
    reason = precision.reason
    if plan.devices.kind == "cpu":
        reason = plan.devices.names[0]
    if plan.devices.is_assumed:
        groups, _, suffix = plan.args.gpus.partition(":")
        reason += ", assumed"
        if not suffix:
            reason += f"; for V100 or T4: --gpus {groups}:fp16"
    return [f"precision  {formats}, {precision.optim}", f"           {reason}"]


def describe_memory(plan: Plan) -> list[str]:
    """Return a line for each device; of several processes, all devices are like the first."""
    lines = []
    for device in range(len(plan.modules_by_device)):
        name = f"GPU {device}"
        if plan.devices.kind == "cpu":
            name = "CPU"
        elif plan.job.num_shards > 1:
            name = f"each of {plan.job.num_shards} GPUs"
        lines.append(f"memory     {name}: {describe_device(plan, device)}")
        if plan.job.num_shards > 1:
            return lines
    return lines


def describe_device(plan: Plan, device: int) -> str:
    needed = plan.needed_bytes[device] / GIB
    used = plan.used_bytes[device] / GIB
    usable = plan.usable_bytes[device] / GIB
    free = plan.devices.free_bytes[device] / GIB
    if not plan.limits.fits:
        needed = max(needed, used)
        return f"needs {needed:.1f} GiB, {usable:.1f} usable of {free:.1f} free"
    line = f"uses {used:.1f}, needs {needed:.1f} of {usable:.1f} usable GiB"
    if plan.devices.is_one_process_on_several_gpus:
        return f"{line}; {describe_modules(plan.modules_by_device[device])}"
    return f"{line} ({free:.1f} free)"


def describe_modules(modules: list[str]) -> str:
    """Return modules as "embedding, layers 0-6"."""
    parts = []
    layers = [name for name in modules if name not in (EMBEDDING, HEAD)]
    if EMBEDDING in modules:
        parts.append("embedding")
    if layers:
        first = layers[0].rpartition(".")[2]
        last = layers[-1].rpartition(".")[2]
        parts.append(f"layers {first}-{last}")
    if HEAD in modules:
        parts.append("head")
    return ", ".join(parts) or "nothing"


def describe_host_memory(plan: Plan) -> list[str]:
    """Return the line about host memory, if the plan keeps anything there."""
    if not plan.in_host_memory:
        return []
    num_devices = len(plan.working_devices)
    gib = pinned_host_bytes(plan.job) / GIB
    if "gradients" in plan.in_host_memory:
        price = f"{gradient_transfer_s(plan.job, num_devices):.1f} s a micro-batch"
    else:
        price = f"{state_transfer_s(plan.job, num_devices):.1f} s a step"
    speed = f"{PCIE_BYTES_PER_S / GB:.0f} GB/s (assumed)"
    line = f"host       {gib:.1f} GiB pinned: {name_host_contents(plan.job)}"
    return [f"{line}; about {price} at {speed}"]


def describe_recomputing(plan: Plan) -> str:
    kept = plan.max_tokens_without_checkpointing
    what = "micro-batches"
    if plan.window_tokens is not None:
        what = "windows"
    if not plan.recomputes:
        return "recompute  nothing: memory suffices"
    if kept == 0:
        return "recompute  all layers in the backward pass"
    return f"recompute  {what} over {kept:,} tokens"


# ---- Several GPUs of one process ----------------------------------------------------------------
def describe_pipeline(plan: Plan, num_forward_passes: int) -> list[str]:
    """Return how many GPUs work at once, and whether torchrun would be faster."""
    num_windows = count_windows(plan.workload.tokens_of_a_step, plan.window_tokens)
    in_flight = math.ceil(num_forward_passes / num_windows)
    percent = 100 * busy_share(plan.device_times, num_forward_passes, num_windows)
    number = len(plan.working_devices)
    line = f"devices    {number} at work at once, at best {percent:.0f} %"
    lines = [f"{line} ({in_flight} micro-batches in flight)"]
    lines += recommend_torchrun(plan, num_forward_passes)
    return lines


def recommend_torchrun(plan: Plan, num_forward_passes: int) -> list[str]:
    """Return the command for shards, if they are faster by estimate, with what that assumes."""
    own_s = estimate_step_s(plan, num_forward_passes)
    over_nvlink = own_s / estimate_sharded_s(plan, NVLINK_BYTES_PER_S)
    over_pcie = own_s / estimate_sharded_s(plan, PCIE_BYTES_PER_S)
    if over_pcie >= MIN_SPEEDUP:
        speed = f"{over_pcie:.1f} x as fast, even over PCIe ({PCIE_BYTES_PER_S / GB:.0f} GB/s"
    elif over_nvlink >= MIN_SPEEDUP:
        speed = f"{over_nvlink:.1f} x as fast over NVLink ({NVLINK_BYTES_PER_S / GB:.0f} GB/s"
    else:
        return []
    number = len(plan.devices.names)
    accumulation = max(1, round(plan.args.gradient_accumulation_steps / number))
    return [
        f"           by estimate, torchrun is {speed} assumed):",
        f"           torchrun --nproc_per_node {number} sft_qwen2.py "
        f"--gradient_accumulation_steps {accumulation}",
    ]


def estimate_sharded_s(plan: Plan, link_bytes_per_s: float) -> float:
    """Return the seconds of a step of one process for each GPU; infinite where that has no room."""
    num_shards = len(plan.devices.names)
    job = with_shards(plan.job, num_shards)
    devices = plan.devices.with_processes(num_shards)
    limits = plan_micro_batches(job, devices, plan.args, plan.workload.longest)
    if not limits.fits:
        return math.inf
    tokens = max(limits.tokens_per_forward, plan.workload.longest)
    return sharded_step_s(
        job,
        plan.workload,
        tokens_per_forward=tokens,
        recompute=tokens > limits.max_tokens_without_checkpointing,
        flops_per_s=find_flops_per_s(plan),
        link_bytes_per_s=link_bytes_per_s,
    )


# ---- Steps --------------------------------------------------------------------------------------
def describe_steps(plan: Plan, num_forward_passes: int) -> list[str]:
    workload = plan.workload
    num_examples = min(workload.examples_per_step, len(workload.lengths))
    passes = f"about {num_forward_passes} forward passes"
    if num_forward_passes == 1:
        passes = "1 forward pass"
    line = f"steps      {workload.num_steps} of {num_examples} examples, {passes} of up to"
    lines = [f"{line} {plan.largest_micro_batch:,} tokens"]
    if workload.num_steps < MIN_STEPS and plan.args.max_steps <= 0:
        flags = suggest_schedule(
            len(workload.lengths),
            plan.args.per_device_train_batch_size,
            plan.devices.num_processes,
        )
        words = [f"--{name} {value}" for name, value in flags.items()]
        rows = f"for {len(workload.lengths)} rows"
        lines.append(f"few steps  {workload.num_steps}; {rows}: {' '.join(words)}")
    lines += describe_intervals(plan)
    return lines


def suggest_schedule(
    num_examples: int, per_device_train_batch_size: int, num_processes: int = 1
) -> dict[str, int]:
    """Return {flag: value} with which so many examples make enough steps; docs/choosing.md.

    A step has 8 examples where there are fewer than 1,000, 32 up to 10,000, and 128 from there on.
    There are at least 3 epochs below 10,000 examples, and 2 above.
    """
    examples_per_step = 128
    num_epochs = 2
    if num_examples < 10_000:
        examples_per_step = 32
        num_epochs = 3
    if num_examples < 1_000:
        examples_per_step = 8
    at_once = per_device_train_batch_size * num_processes
    accumulation = max(1, round(examples_per_step / at_once))
    steps_per_epoch = math.ceil(num_examples / (accumulation * at_once))
    return {
        "num_train_epochs": max(num_epochs, math.ceil(MIN_STEPS / steps_per_epoch)),
        "gradient_accumulation_steps": accumulation,
    }


def describe_intervals(plan: Plan) -> list[str]:
    """Return a line for evaluation and for saving, if its interval is longer than the run."""
    args = plan.args
    num_steps = plan.workload.num_steps
    lines = []
    eval_steps = args.eval_steps or args.logging_steps
    fitting = max(1, num_steps // 5)
    if args.eval_strategy == "steps" and eval_steps > num_steps:
        interval = f"--eval_steps {eval_steps:.0f} of {num_steps} steps"
        lines.append(f"evaluation none before the end: {interval}; try --eval_steps {fitting}")
    if args.save_strategy == "steps" and args.save_steps > num_steps:
        interval = f"--save_steps {args.save_steps:.0f} of {num_steps} steps"
        lines.append(f"saving     not before the end: {interval}; try --save_steps {fitting}")
    return lines


# ---- Time and disk ------------------------------------------------------------------------------
def find_flops_per_s(plan: Plan) -> float:
    """Return the FLOP/s that one of the plan's GPUs is taken to reach."""
    return UTILIZATION * 1e12 * find_peak_tflops(choose_reference_gpu(plan.devices))


def count_busy_devices(plan: Plan, num_forward_passes: int) -> float:
    """Return the devices that compute, as a mean over the time."""
    if plan.window_tokens is None:
        return plan.devices.num_processes
    num_windows = count_windows(plan.workload.tokens_of_a_step, plan.window_tokens)
    share = busy_share(plan.device_times, num_forward_passes, num_windows)
    return share * len(plan.working_devices)


def estimate_s(plan: Plan, num_forward_passes: int, flops: float) -> float:
    """Return the seconds that so many FLOPs should take, with what is recomputed."""
    if plan.recomputes:
        flops *= RECOMPUTED
    return flops / (find_flops_per_s(plan) * count_busy_devices(plan, num_forward_passes))


def estimate_step_s(plan: Plan, num_forward_passes: int) -> float:
    """Return the seconds that a typical step should take."""
    computing_s = estimate_s(plan, num_forward_passes, step_flops(plan.job.config, plan.workload))
    return computing_s + host_transfer_s(plan.job, len(plan.working_devices), num_forward_passes)


def describe_cost(plan: Plan, num_forward_passes: int) -> list[str]:
    workload = plan.workload
    flops = training_flops(plan.job.config, workload.lengths, workload.num_trained_tokens)
    line = f"cost       {flops:.2g} FLOPs an epoch"
    if plan.devices.kind == "cpu":
        return [line]
    gpu = choose_reference_gpu(plan.devices)
    steps_per_epoch = math.ceil(len(workload.lengths) / workload.examples_per_step)
    hours = steps_per_epoch * estimate_step_s(plan, num_forward_passes) / 3600
    number = len(plan.working_devices)
    assumption = f"if {number} x {gpu} reach {100 * UTILIZATION:.0f} % of"
    return [
        f"{line}, about {hours:.2g} h",
        f"           {assumption} {find_peak_tflops(gpu)} TFLOP/s",
    ]


def describe_saving(plan: Plan, num_forward_passes: int) -> list[str]:
    """Return the line about saving, if this takes a large share of the time."""
    args = plan.args
    if args.save_strategy != "steps" or plan.devices.kind == "cpu":
        return []
    save_s = plan.disk.checkpoint_bytes / DISK_BYTES_PER_S
    step_s = estimate_step_s(plan, num_forward_passes)
    num_steps = plan.workload.num_steps
    interval = args.save_steps
    if interval < 1:
        interval = math.ceil(interval * num_steps)  # a share of all steps
    if interval > num_steps or save_s < SAVING_SHARE * (interval * step_s + save_s):
        return []
    rarer = math.ceil((1 - SAVING_SHARE) / SAVING_SHARE * save_s / step_s)
    rarer = min(rarer, num_steps)
    size = f"{plan.disk.checkpoint_bytes / GB:.0f} GB"
    steps = f"{save_s / step_s:.1f} steps at {DISK_BYTES_PER_S / GB:.0f} GB/s (assumed)"
    return [f"saving     {size}, as long as {steps}; try --save_steps {rarer}"]


def describe_disk(plan: Plan) -> str:
    disk = plan.disk
    line = f"disk       {disk.needed_bytes / GB:.1f} GB for {disk.num_checkpoints} checkpoints"
    line += " and the export"
    if disk.free_bytes is None:
        return line
    return f"{line}, {disk.free_bytes / GB:.1f} GB free"
