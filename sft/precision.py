"""Number formats of a run: of the weights, of the matrix products, and of the optimizer's state."""

from dataclasses import dataclass

import torch

BF16_CAPABILITY = (8, 0)  # GPUs of this compute capability and newer multiply in bf16
STATE_BLOCK = 128  # values of 8-bit state share one fp32 scale

# AdamW keeps two values for each parameter. Adafactor keeps sums of rows and columns, which are
# next to nothing beside a matrix.
STATE_BYTES = {
    "adamw_torch_8bit": 2 * (1 + torch.float32.itemsize / STATE_BLOCK),
    "adamw_torch_fused": 2 * torch.float32.itemsize,
    "adamw_torch": 2 * torch.float32.itemsize,
    "adafactor": 0.01,
}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Formats of a run, and what a parameter takes in them."""

    weights: torch.dtype
    compute: torch.dtype  # of matrix products and of what they keep
    optim: str  # Trainer's name of the optimizer
    state_bytes: float  # of the optimizer's state, for one parameter
    reason: str

    @property
    def bytes_per_parameter(self) -> float:
        """Return the bytes of a parameter's weight, gradient and optimizer state together."""
        return 2 * self.weights.itemsize + self.state_bytes

    @property
    def checkpoint_bytes_per_parameter(self) -> float:
        """Return the bytes of a parameter in a checkpoint, which has no gradients."""
        return self.weights.itemsize + self.state_bytes

    @property
    def needs_autocast(self) -> bool:
        """Return whether products have another format than the weights."""
        return self.compute != self.weights


def choose_precision(capability: tuple[int, int] | None, fp32: bool, optim: str) -> Precision:
    """Return the formats for a GPU of this compute capability; None is a CPU.

    Only the 8-bit AdamW rounds bf16 weights stochastically. At a learning rate of 1e-5, an update
    is mostly smaller than half a step of bf16, and plain rounding loses it: with another
    optimizer, weights are fp32. fp16 weights could not be unscaled, so fp16 has fp32 weights, too.
    (torch.cuda.is_bf16_supported is no guide: it is true for a V100, which emulates bf16.)
    """
    if capability is None:
        optim = choose_optim(optim, default="adamw_torch_fused")
        return make_precision(torch.float32, torch.float32, optim, "CPU")
    version = f"compute capability {capability[0]}.{capability[1]}"
    default = "adamw_torch_8bit"
    if fp32:
        default = "adamw_torch_fused"
    optim = choose_optim(optim, default=default)
    if capability < BF16_CAPABILITY:
        return make_precision(torch.float32, torch.float16, optim, version)
    if fp32:
        return make_precision(torch.float32, torch.bfloat16, optim, f"{version}, --fp32")
    if optim != "adamw_torch_8bit":
        reason = f"{version}; bf16 weights would lose small updates of {optim}"
        return make_precision(torch.float32, torch.bfloat16, optim, reason)
    return make_precision(torch.bfloat16, torch.bfloat16, optim, version)


def choose_optim(optim: str, default: str) -> str:
    """Return the optimizer that was asked for, or the default for "auto"."""
    if optim == "auto":
        return default
    return optim


def make_precision(weights, compute, optim: str, reason: str) -> Precision:
    """Return the Precision of these formats."""
    return Precision(
        weights=weights,
        compute=compute,
        optim=optim,
        state_bytes=STATE_BYTES[optim],
        reason=reason,
    )


def name_format(dtype: torch.dtype) -> str:
    """Return the name of a format without the library's: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
