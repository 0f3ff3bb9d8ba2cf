"""What PyTorch asks of the module torch.simulated, as it asks torch.cuda."""

import torch

ops = torch.ops.simulated_devices


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return len(ops.busy_s())


def current_device() -> int:
    return ops.get_device()


def set_device(device) -> None:
    ops.set_device(torch.device(device).index)


class device:
    """A context in which this device is the current one."""

    def __init__(self, device):
        self.inside = torch.device(device).index
        self.outside = None

    def __enter__(self):
        self.outside = current_device()
        ops.set_device(self.inside)

    def __exit__(self, *error):
        ops.set_device(self.outside)


def synchronize(device=None) -> None:
    torch.accelerator.synchronize(device)


def empty_cache() -> None:
    """Memory that is released is free at once."""


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


# Random numbers are the CPU's.
def get_rng_state(device=None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state, device=None) -> None:
    """The CPU's state is set by who asks for this one, too."""


def manual_seed(seed) -> None:
    """The CPU's seed is set by who asks for this one, too."""


def manual_seed_all(seed) -> None:
    """As `manual_seed`."""
