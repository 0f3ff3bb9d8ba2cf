"""Tokens per second, the share of the GPUs' peak that they take (MFU), and the peak of memory."""

import time

import torch

GIB = 2**30

# Dense matrix products in half precision with sums in fp32, in teraFLOP/s: NVIDIA's own figures, by
# what torch.cuda.get_device_name() has in it. The first match counts. Where a data sheet counts
# with sparsity, this is half of that.
PEAK_TFLOPS = {
    # https://www.nvidia.com/en-us/data-center/a100/
    "A100": 312,
    # https://www.nvidia.com/en-us/data-center/h100/
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    # https://www.nvidia.com/en-us/data-center/h200/
    "H200": 989,
    # https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413
    "L40S": 362,
    # https://www.nvidia.com/en-gb/data-center/tesla-v100/
    "V100-PCIE": 112,
    "V100-SXM2": 125,
    "V100S-PCIE": 130,
    # https://www.nvidia.com/en-us/data-center/tesla-t4/
    "Tesla T4": 65,
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    "RTX 4090": 165,
}
# A part of a GPU, and smaller GPUs whose figures were not found: RTX 4090 D, RTX 4090 Laptop GPU.
SMALLER_GPUS = ("MIG", "RTX 4090 ", "H200 NVL")


def find_peak_tflops(gpu_name: str) -> float | None:
    """Return the teraFLOP/s of a GPU's data sheet, None where it is not cited here."""
    for name in SMALLER_GPUS:
        if name in gpu_name:
            return None
    for name, tflops in PEAK_TFLOPS.items():
        if name in gpu_name:
            return tflops
    return None


class Throughput:
    """Counts what was trained since the last metrics().

    `num_gpus`: those of all processes, 0 for the CPU.
    """

    def __init__(self, num_gpus: int):
        self.num_gpus = num_gpus
        self.peak_tflops = None
        if num_gpus > 0:
            self.peak_tflops = find_peak_tflops(torch.cuda.get_device_name())
        self.forget()

    def forget(self) -> None:
        self.start_s = None
        self.num_tokens = 0
        self.flops = 0

    def start(self) -> None:
        """Begin to take the time, if it is not being taken: evaluations and saves do not count."""
        if self.start_s is None:
            self.start_s = time.perf_counter()

    def add(self, num_tokens: int, flops: float) -> None:
        """Count the tokens and the floating point operations of a step, of all processes."""
        self.num_tokens += num_tokens
        self.flops += flops

    def metrics(self) -> dict[str, float]:
        """Return tokens_per_s, and on GPUs mfu (0 to 1, where known) and peak_gib; begin anew."""
        seconds = time.perf_counter() - self.start_s
        metrics = {"tokens_per_s": round(self.num_tokens / seconds)}
        if self.peak_tflops is not None:
            peak_flops = self.peak_tflops * 1e12 * self.num_gpus
            metrics["mfu"] = round(self.flops / seconds / peak_flops, 4)
        if self.num_gpus > 0:
            metrics["peak_gib"] = round(max_memory_bytes() / GIB, 2)
        self.forget()
        return metrics


def max_memory_bytes() -> int:
    """Return the most that this process has allocated on one of its GPUs."""
    return max(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
