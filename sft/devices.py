"""Which GPUs there are, whether they can be used, and how much memory is free."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sft.errors import UserError
from sft.throughput import GIB, find_peak_tflops

BF16_GPU = (8, 0)  # compute capability of an A100
FP16_GPU = (7, 0)  # compute capability of a V100
DRIVER_FILE = Path("/proc/driver/nvidia/version")
CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")  # which control groups this process is in

REFERENCE_GPUS = {BF16_GPU: "A100", FP16_GPU: "V100-SXM2"}  # stand for GPUs of unknown speed


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices of a run: all GPUs of one process, or one device for each of several."""

    kind: str  # "cuda" or "cpu"
    names: list[str]
    free_bytes: list[float]
    capability: tuple[int, int] | None  # the least compute capability; None on the CPU
    num_processes: int
    is_assumed: bool  # planned for another machine, by --gpus
    host_free_bytes: float | None  # None where the machine is assumed

    @property
    def is_one_process_on_several_gpus(self) -> bool:
        return self.kind == "cuda" and self.num_processes == 1 and len(self.names) > 1

    def with_processes(self, num_processes: int) -> "Devices":
        """Return these devices for so many processes, on GPUs like the smallest."""
        return replace(
            self,
            names=[self.names[0]] * num_processes,
            free_bytes=[min(self.free_bytes)] * num_processes,
            num_processes=num_processes,
        )


# ---- Whether this machine's GPUs can be used ----------------------------------------------------
def has_only_apple_gpu() -> bool:
    """Return whether the only GPU is Apple's. The trainer does not use it: the CPU trains."""
    return torch.backends.mps.is_available() and not torch.cuda.is_available()


def check_machine(training_args) -> None:
    """Raise UserError where GPUs are there but cannot be trained on; --use_cpu asks for none."""
    if training_args.device.type == "cpu":
        if not training_args.use_cpu and not are_gpus_hidden():
            check_driver(torch.version.cuda, read_driver_version())
        return
    capabilities = []
    for gpu in range(torch.cuda.device_count()):
        capabilities.append(torch.cuda.get_device_capability(gpu))
    check_architectures(capabilities, torch.cuda.get_arch_list())
    if "LOCAL_RANK" in os.environ and training_args.world_size == 1 and len(capabilities) > 1:
        raise UserError(
            f"torchrun started one process for {len(capabilities)} GPUs: "
            "use --nproc_per_node gpu, or start the script by python"
        )


def are_gpus_hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def read_driver_version() -> str | None:
    """Return the version of NVIDIA's driver, as "535.104.05", or None where there is none."""
    if not DRIVER_FILE.exists():
        return None
    version = re.search(r"\s(\d{3,}\.[\d.]+)", DRIVER_FILE.read_text())
    if version is None:
        return None
    return version[1]


def check_driver(cuda_version: str | None, driver_version: str | None) -> None:
    """Raise UserError where a driver is there, and PyTorch for CUDA, but no GPU was found."""
    if cuda_version and driver_version:
        raise UserError(
            f"PyTorch for CUDA {cuda_version} finds no GPU with NVIDIA driver {driver_version}: "
            "update the driver (CUDA 13 needs 580), install PyTorch for an older CUDA, "
            "or add --use_cpu"
        )


def check_architectures(capabilities: list[tuple[int, int]], architectures: list[str]) -> None:
    """Raise UserError where PyTorch has no kernels for one of the GPUs.

    `architectures`: as torch.cuda.get_arch_list() gives them. Kernels for sm_80 run on GPUs of
    compute capability 8.0 to 8.9. compute_80 can be compiled for all from 8.0.
    """
    for major, minor in capabilities:
        usable = set()
        for older in range(minor + 1):
            usable.add(f"sm_{major}{older}")
        for older in range(50, 10 * major + minor + 1):
            usable.add(f"compute_{older}")
        if usable.isdisjoint(architectures):
            raise UserError(
                f"PyTorch has no kernels for a GPU of compute capability {major}.{minor}, "
                f"only for {' '.join(architectures)}: install a build that has them "
                "(a V100 needs the one for CUDA 12.6; see the README)"
            )


# ---- What there is ------------------------------------------------------------------------------
def find_devices(args, training_args) -> Devices:
    """Return the devices to plan for: those of --gpus, or this machine's.

    Raises UserError where --gpus has not one GPU for each process.
    """
    if args.gpus:
        return assume_devices(args.gpus, training_args.world_size)
    if training_args.device.type == "cuda":
        return find_gpus(training_args)
    return find_cpu(training_args.world_size)


def assume_devices(gpus: str, num_processes: int) -> Devices:
    """Return the Devices of a text like 4x80, 2x80,1x40 or 4x32:fp16 (number x GB).

    80 "GB" have 78.6 GiB free: a card has about 0.99 GiB for each GB of its name (79.2, 31.7 of
    32, 23.7 of 24), and a CUDA context takes 0.6. Without a suffix, GPUs multiply in bf16.
    """
    groups, _, suffix = gpus.partition(":")
    names = []
    free_bytes = []
    for group in groups.split(","):
        number, size = group.split("x")
        for _ in range(int(number)):
            names.append(f"{size} GB")
            free_bytes.append((0.99 * int(size) - 0.6) * GIB)
    if num_processes not in (1, len(names)):
        raise UserError(f"--gpus {gpus} has {len(names)} GPUs for {num_processes} processes")
    if num_processes > 1:
        # All processes plan for the smallest GPU, since they must cut a step in the same way.
        free_bytes = [min(free_bytes)] * num_processes
    capability = BF16_GPU
    if suffix == "fp16":
        capability = FP16_GPU
    return Devices(
        kind="cuda",
        names=names,
        free_bytes=free_bytes,
        capability=capability,
        num_processes=num_processes,
        is_assumed=True,
        host_free_bytes=None,
    )


def find_gpus(training_args) -> Devices:
    """Return all GPUs of one process, or the least of several processes' for each of them."""
    num_processes = training_args.world_size
    numbers = range(torch.cuda.device_count())
    if num_processes > 1:
        numbers = [training_args.device.index]
    names = []
    free_bytes = []
    capabilities = []
    for number in numbers:
        names.append(torch.cuda.get_device_name(number))
        free_bytes.append(torch.cuda.mem_get_info(number)[0])
        capabilities.append(torch.cuda.get_device_capability(number))
    if num_processes > 1:
        from accelerate.utils import gather_object

        names = gather_object(names)
        free_bytes = [min(gather_object(free_bytes))] * num_processes
        capabilities = gather_object(capabilities)
    return Devices(
        kind="cuda",
        names=names,
        free_bytes=free_bytes,
        capability=min(capabilities),
        num_processes=num_processes,
        is_assumed=False,
        host_free_bytes=measure_host_memory(),
    )


def find_cpu(num_processes: int) -> Devices:
    """Return the CPU with this process's share of the free memory, less a tenth for others."""
    name = "CPU"
    if has_only_apple_gpu():
        name = "CPU: Apple GPUs are not used"
    host_free_bytes = measure_host_memory()
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free_bytes = 0.9 * host_free_bytes / num_local_processes
    if num_processes > 1:
        from accelerate.utils import gather_object

        free_bytes = min(gather_object([free_bytes]))
    return Devices(
        kind="cpu",
        names=[name],
        free_bytes=[free_bytes],
        capability=None,
        num_processes=num_processes,
        is_assumed=False,
        host_free_bytes=host_free_bytes,
    )


# ---- Memory of the host -------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class GroupFiles:
    """Names of the files in which a control group says what its processes may use."""

    limit: str
    used: str
    statistics: str
    cache_key: str  # of the line in `statistics` with the bytes of files that were read


GROUPS_V1 = GroupFiles(
    limit="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    statistics="memory.stat",
    cache_key="total_inactive_file",
)
GROUPS_V2 = GroupFiles(
    limit="memory.max",
    used="memory.current",
    statistics="memory.stat",
    cache_key="inactive_file",
)


def measure_host_memory() -> float:
    """Return the bytes that this machine and the container around this process have free.

    psutil knows the machine only. The limits of containers and of Slurm's jobs stand in the files
    of their control groups.
    """
    import psutil  # comes with accelerate

    return min([psutil.virtual_memory().available, *list_limits()])


def list_limits() -> list[float]:
    """Return the bytes that each control group of this process leaves free, if it has a limit."""
    limits = []
    for line in read_text(CGROUP_MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = GROUPS_V2
            top = CGROUP_ROOT
        elif "memory" in controllers.split(","):
            files = GROUPS_V1
            top = CGROUP_ROOT / "memory"
        else:
            continue
        group = top / path.strip("/")
        while group.is_relative_to(top):
            limits += measure_group_memory(group, files)
            group = group.parent
    return limits


def measure_group_memory(group: Path, files: GroupFiles) -> list[float]:
    """Return the bytes that a control group leaves free in a list, which is empty without a limit.

    Files that the group has read count as used, but the kernel gives up their memory on demand.
    """
    limit = read_text(group / files.limit)
    used = read_text(group / files.used)
    if not limit.isdecimal() or not used.isdecimal():
        return []  # no such group, or "max"
    cache = 0
    for line in read_text(group / files.statistics).splitlines():
        key, _, value = line.partition(" ")
        if key == files.cache_key:
            cache = int(value)
    return [int(limit) - int(used) + cache]


def read_text(path: Path) -> str:
    """Return a file's text without blanks around it, "" where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# ---- Speed --------------------------------------------------------------------------------------
def choose_reference_gpu(devices: Devices) -> str | None:
    """Return the name of a GPU whose speed the plan's times assume; None on the CPU.

    This is the GPU itself where its peak is known, and an A100 or V100 where it is not.
    """
    if devices.kind == "cpu":
        return None
    name = devices.names[0]
    if find_peak_tflops(name) is not None:
        return name
    if devices.capability >= BF16_GPU:
        return REFERENCE_GPUS[BF16_GPU]
    return REFERENCE_GPUS[FP16_GPU]
