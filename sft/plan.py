"""What a run will do, decided before anything is loaded, and whether it can be done."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sft.devices import Devices, find_devices
from sft.errors import UserError
from sft.limits import (
    Limits,
    can_fit,
    choose_host_memory,
    list_least_bytes,
    list_needed_bytes,
    list_usable_bytes,
    list_used_bytes,
    plan_micro_batches,
    plan_pipeline,
)
from sft.memory_model import (
    QWEN2_SIZES,
    Job,
    count_parameters,
    loading_host_bytes,
    pinned_host_bytes,
    with_config,
    with_precision,
    with_shards,
)
from sft.placement import make_device_map
from sft.precision import Precision, choose_precision
from sft.step_time import Workload, list_device_times, measure_workload
from sft.throughput import GIB

MAX_SHARDS_TRIED = 64
MIN_MAX_LEN = 64  # tokens; no example of use is shorter
GB = 1e9  # as disks are sold


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The bytes that a run writes to output_dir."""

    checkpoint_bytes: float
    num_checkpoints: int  # at most, with the one that is being written
    export_bytes: float
    free_bytes: float | None  # with what a resumed run replaces; None for another machine

    @property
    def needed_bytes(self) -> float:
        return self.export_bytes + self.num_checkpoints * self.checkpoint_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, decided."""

    args: object  # the script's arguments
    job: Job
    devices: Devices
    workload: Workload
    limits: Limits
    device_map: dict[str, int] | None  # of one process on GPUs
    needed_bytes: list[float]  # of each device at the least: the longest example, recomputed
    used_bytes: list[float]  # of each device at the most
    usable_bytes: list[float]  # of each device, for a step
    disk: Disk

    @property
    def precision(self) -> Precision:
        return self.job.precision

    @property
    def in_host_memory(self) -> tuple[str, ...]:
        """Return what is kept in host memory: nothing, "state", or "state" and "gradients"."""
        return self.job.in_host_memory

    @property
    def tokens_per_forward(self) -> int:
        return self.limits.tokens_per_forward

    @property
    def max_tokens_without_checkpointing(self) -> int:
        return self.limits.max_tokens_without_checkpointing

    @property
    def window_tokens(self) -> int | None:
        return self.limits.window_tokens

    @property
    def modules_by_device(self) -> list[list[str]]:
        return self.limits.modules_by_device

    @property
    def largest_micro_batch(self) -> int:
        """Return the tokens of the largest micro-batch."""
        return max(self.tokens_per_forward, self.workload.longest)

    @property
    def recomputes(self) -> bool:
        """Return whether the largest micro-batch or window is recomputed."""
        most_tokens = self.window_tokens or self.largest_micro_batch
        return most_tokens > self.max_tokens_without_checkpointing

    @property
    def working_devices(self) -> list[int]:
        """Return the numbers of the devices that hold something."""
        return [number for number, modules in enumerate(self.modules_by_device) if modules]

    @property
    def device_times(self) -> list[float]:
        """Return how long each working device takes for a micro-batch, in times of a layer."""
        return list_device_times(
            self.job.config, self.modules_by_device, self.workload.trained_share
        )


def plan_run(config, args, training_args, lengths: np.ndarray, num_trained_tokens: int) -> Plan:
    """Return the Plan for a model and its training examples, whether or not it can be carried out.

    `lengths`: tokens of each example, after cutting [number of examples].
    """
    devices = find_devices(args, training_args)
    workload = measure_workload(training_args, lengths, num_trained_tokens)
    num_shards = 1
    if devices.kind == "cuda":
        num_shards = devices.num_processes
    job = Job(
        config=config,
        precision=choose_precision(devices.capability, args.fp32, args.optim),
        num_shards=num_shards,
    )
    job = choose_host_memory(job, devices, workload.longest)
    if devices.is_one_process_on_several_gpus:
        limits = plan_pipeline(job, devices, args, workload)
    else:
        limits = plan_micro_batches(job, devices, args, workload.longest)
    device_map = None
    if devices.kind == "cuda" and devices.num_processes == 1:
        device_map = make_device_map(job, limits.modules_by_device)
    return Plan(
        args=args,
        job=job,
        devices=devices,
        workload=workload,
        limits=limits,
        device_map=device_map,
        needed_bytes=list_least_bytes(job, devices, limits, workload.longest),
        used_bytes=list_used_bytes(job, limits, workload.longest),
        usable_bytes=list_usable_bytes(job, devices),
        disk=measure_disk(job, args),
    )


def measure_disk(job: Job, args) -> Disk:
    """Return the Disk of a run. What is in host memory is in its checkpoints all the same."""
    parameters = count_parameters(job.config).model
    num_checkpoints = 0
    if args.save_strategy != "no":
        num_checkpoints = args.save_total_limit + 1
    free_bytes = None
    if not args.gpus:
        free_bytes = measure_free_disk(Path(args.output_dir), replaces_checkpoints=args.resume)
    return Disk(
        checkpoint_bytes=parameters * job.precision.checkpoint_bytes_per_parameter,
        num_checkpoints=num_checkpoints,
        export_bytes=parameters * job.precision.weights.itemsize,
        free_bytes=free_bytes,
    )


def measure_free_disk(folder: Path, replaces_checkpoints: bool) -> float:
    """Return the bytes that are free where a folder is or will be, and those that it replaces."""
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if replaces_checkpoints:
        for file in folder.glob("checkpoint-*/**/*"):
            if file.is_file():
                free_bytes += file.stat().st_size
    return free_bytes


# ---- Whether it can be done ---------------------------------------------------------------------
def check_plan(plan: Plan) -> None:
    """Raise UserError where the plan cannot be carried out, with what could."""
    # Adafactor mixes whole tensors with shards.
    if plan.precision.optim == "adafactor" and plan.job.num_shards > 1:
        raise UserError("--optim adafactor cannot train shards: leave it out, or start one process")
    check_device_memory(plan)
    check_host_memory(plan)
    working = plan.working_devices
    if plan.device_map and len(working) == 1 and working != [0]:
        # Trainer would move the whole model to GPU 0.
        raise UserError(f"only GPU {working[0]} has room: set CUDA_VISIBLE_DEVICES={working[0]}")
    free_bytes = plan.disk.free_bytes
    if free_bytes is not None and plan.disk.needed_bytes > free_bytes:
        raise UserError(
            f"too little disk: checkpoints and export take {plan.disk.needed_bytes / GB:.1f} GB, "
            f"{free_bytes / GB:.1f} GB are free; lower --save_total_limit, or move --output_dir"
        )


def check_device_memory(plan: Plan) -> None:
    """Raise UserError where the largest micro-batch does not fit."""
    if plan.limits.fits:
        return
    tokens = plan.largest_micro_batch
    if not plan.args.gradient_checkpointing and can_fit(plan.job, plan.devices, tokens):
        raise UserError(
            f"too little memory for {tokens} tokens without gradient checkpointing: "
            "leave out --gradient_checkpointing false, or lower --tokens_per_forward"
        )
    raise UserError(f"too little memory; {list_remedies(plan)}")


def check_host_memory(plan: Plan) -> None:
    """Raise UserError where the host has not what the plan would keep or load there."""
    free_bytes = plan.devices.host_free_bytes
    if free_bytes is None or plan.devices.kind == "cpu":
        return
    pinned = pinned_host_bytes(plan.job)
    if pinned > free_bytes:
        raise UserError(
            f"too little host memory: {name_host_contents(plan.job)} take {pinned / GIB:.1f} GiB, "
            f"{free_bytes / GIB:.1f} GiB are free; {list_remedies(plan)}"
        )
    loading = loading_host_bytes(plan.job)
    if loading > free_bytes:
        raise UserError(
            f"too little host memory: fp32 weights take {loading / GIB:.1f} GiB while they load, "
            f"{free_bytes / GIB:.1f} GiB are free; {list_remedies(plan)}"
        )


def name_host_contents(job: Job) -> str:
    """Return what is in host memory, in words."""
    if "gradients" in job.in_host_memory:
        return "AdamW state, gradients"
    return "AdamW state"


def list_remedies(plan: Plan) -> str:
    """Return what fits: first on this machine, then on others."""
    ways = []
    ways += list_smaller_micro_batches(plan)
    ways += list_smaller_formats(plan)
    ways += list_smaller_models(plan)
    ways.append("LoRA by another trainer (docs/choosing.md)")
    if plan.devices.kind == "cpu":
        ways.append("a GPU (--dry_run --gpus 1x80 plans for one)")
    else:
        ways += list_more_gpus(plan)
    return f"what fits: {'; '.join(ways)}"


def can_train(job: Job, plan: Plan, tokens: int) -> bool:
    """Return whether a job fits on the plan's devices, and what it needs of the host."""
    job = choose_host_memory(job, plan.devices, tokens)
    if not can_fit(job, plan.devices, tokens):
        return False
    free_bytes = plan.devices.host_free_bytes
    if free_bytes is None or plan.devices.kind == "cpu":
        return True
    return pinned_host_bytes(job) + loading_host_bytes(job) <= free_bytes


def list_smaller_micro_batches(plan: Plan) -> list[str]:
    """Return the flag with the most tokens that fit, of half as many, a quarter and so on."""
    tokens = plan.largest_micro_batch // 2
    while tokens >= plan.workload.longest:
        # What is in host memory depends on the longest example only.
        if can_fit(plan.job, plan.devices, tokens):
            return [f"--tokens_per_forward {tokens}"]
        tokens //= 2
    while tokens >= MIN_MAX_LEN:
        if can_train(plan.job, plan, tokens):
            return [f"--max_len {tokens}"]
        tokens //= 2
    return []


def list_smaller_formats(plan: Plan) -> list[str]:
    """Return --fp32 and --optim, if it fits without them."""
    default = choose_precision(plan.devices.capability, False, "auto")
    job = with_precision(plan.job, default)
    if default == plan.precision or not can_train(job, plan, plan.largest_micro_batch):
        return []
    ways = []
    if plan.args.fp32:
        ways.append("no --fp32")
    if plan.args.optim != "auto":
        ways.append("no --optim")
    return [" and ".join(ways)]


def list_smaller_models(plan: Plan) -> list[str]:
    """Return the largest model of the family that fits, with its memory."""
    tokens = plan.workload.longest
    default = choose_precision(plan.devices.capability, False, "auto")
    for name, sizes in reversed(QWEN2_SIZES.items()):
        job = with_precision(with_config(plan.job, sizes), default)
        is_smaller = count_parameters(sizes).model < count_parameters(plan.job.config).model
        if is_smaller and can_train(job, plan, tokens):
            job = choose_host_memory(job, plan.devices, tokens)
            needed = max(list_needed_bytes(job, plan.devices, tokens))
            return [f"a smaller model, {name} in {needed / GIB:.1f} GiB"]
    return []


def list_more_gpus(plan: Plan) -> list[str]:
    """Return the least processes whose shards fit on GPUs like the smallest of these."""
    for num_processes in range(2, MAX_SHARDS_TRIED + 1):
        devices = plan.devices.with_processes(num_processes)
        if can_fit(with_shards(plan.job, num_processes), devices, plan.largest_micro_batch):
            return [f"{num_processes} such GPUs (torchrun --nproc_per_node {num_processes})"]
    return []
