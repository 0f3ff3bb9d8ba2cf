"""Several devices that PyTorch takes for real ones, without any hardware: "simulated:0" and so on.

    import simulated_devices
    simulated_devices.start(4)
    torch.ones(3, device="simulated:2")
    simulated_devices.reset()
    ...
    simulated_devices.measure()["elapsed_s"]

devices.cpp says what is simulated and how. A process that has started them keeps them, and its CPU
tensors are not affected. Tests use a process of their own nevertheless, because PyTorch knows only
one such kind of device, and libraries look for it.
"""

import shutil
from pathlib import Path

import torch
from torch.utils import cpp_extension

from simulated_devices import device_module

SOURCE = Path(__file__).parent / "devices.cpp"


def find_missing_tool() -> str | None:
    """Return the name of a program that building needs and that is not there, or None."""
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return compiler
    if not cpp_extension.is_ninja_available():
        return "ninja"
    return None


def start(num_devices: int) -> None:
    """Make devices "simulated:0" to "simulated:{num_devices - 1}".

    The first time on a machine this compiles devices.cpp, which takes half a minute of a core.
    """
    cpp_extension.load(
        "simulated_devices", [str(SOURCE)], extra_cflags=["-O1"], is_python_module=False
    )
    torch.ops.simulated_devices.start(num_devices)
    torch.utils.rename_privateuse1_backend("simulated")
    torch._register_device_module("simulated", device_module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def set_speed(
    *,
    launch_s: float = 1e-5,
    kernel_s: float = 1e-5,
    flops_per_s: float = 1e12,
    copy_s: float = 1e-5,
    queue_length: int = 1024,
) -> None:
    """Set the seconds of a launch, a kernel and a copy, and the length of a launch queue.

    A matrix product takes flops / flops_per_s on top of kernel_s.
    """
    torch.ops.simulated_devices.set_speed(launch_s, kernel_s, flops_per_s, copy_s, queue_length)


def reset() -> None:
    """Begin to measure: all devices are idle, and a peak is what is allocated now."""
    torch.ops.simulated_devices.reset()


def measure() -> dict:
    """Return what host and devices have done since `reset`, in simulated seconds and bytes."""
    ops = torch.ops.simulated_devices
    return {
        "elapsed_s": ops.elapsed_s(),
        "host_s": ops.host_s(),  # until the host had told everything
        "busy_s": ops.busy_s(),  # of each device
        "host_waits": ops.host_waits(),  # the reason of each
        "received_copies": ops.received_copies(),  # by each device from other devices
        "allocated_bytes": ops.allocated_bytes(),
        "peak_bytes": ops.peak_bytes(),
    }
