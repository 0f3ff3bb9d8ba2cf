"""What Qwen2-7B needs on boxes of GPUs, from the trainer's own plan, as a table for the README.

    python benchmarks/boxes.py

Each command trains 128 examples a step, of 50 to 8,192 tokens (the default max_len). Needed: GiB on
the fullest GPU for the longest example alone, recomputed in the backward pass. Used: as planned,
for memory that is left is spent on larger micro-batches and on recomputing less. Usable: what a
card of that name has free, less workspaces and gaps. Host: GiB of host memory that hold optimizer
state, and gradients. At work: of one process, the share of time that its GPUs compute, at best.
All of this is computed, nothing is measured. --dry_run --gpus shows the same for one's own data.
"""

import math
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent))
import memory

from sft.memory_model import pinned_host_bytes
from sft.plan import Plan
from sft.step_time import busy_share, count_windows
from sft.throughput import GIB

BOXES = {  # name: (--gpus, processes)
    "1 x 24 GB": ("1x24", 1),
    "1 x 40 GB": ("1x40", 1),
    "1 x 48 GB": ("1x48", 1),
    "1 x 80 GB (A100, H100)": ("1x80", 1),
    "2 x 24 GB": ("2x24", 1),
    "4 x 24 GB": ("4x24", 1),
    "4 x 24 GB, shards": ("4x24", 4),
    "8 x 24 GB": ("8x24", 1),
    "4 x 32 GB (V100)": ("4x32:fp16", 1),
    "4 x 32 GB (V100), shards": ("4x32:fp16", 4),
    "8 x 32 GB (V100), shards": ("8x32:fp16", 8),
    "4 x 48 GB, shards": ("4x48", 4),
    "2 x 80 GB": ("2x80", 1),
    "2 x 80 GB, shards": ("2x80", 2),
    "4 x 80 GB": ("4x80", 1),
    "4 x 80 GB, shards": ("4x80", 4),
    "8 x 80 GB, shards": ("8x80", 8),
    "2 machines of 8 x 80 GB": ("16x80", 16),
}
HEAD = ("GPUs", "command", "`--gpus`", "needed", "used", "usable", "host", "at work")


def make_command(processes: int) -> str:
    if processes == 1:
        return "python sft_qwen2.py"
    flags = f"--nproc_per_node {min(processes, 8)}"
    if processes > 8:
        flags = f"--nnodes {processes // 8} {flags}"
    accumulation = 32 // processes
    return f"torchrun {flags} sft_qwen2.py --gradient_accumulation_steps {accumulation}"


def make_lengths() -> np.ndarray:
    """Return lengths of which the longest is max_len."""
    lengths = memory.draw_lengths("mixed", 10_000)
    lengths[0] = memory.MAX_LEN
    return lengths


def describe_work(plan: Plan) -> str:
    """Return the share of time that the GPUs of one process compute, at best."""
    if plan.window_tokens is None:
        return ""
    tokens = plan.workload.tokens_of_a_step
    num_windows = count_windows(tokens, plan.window_tokens)
    num_micro_batches = math.ceil(tokens / plan.tokens_per_forward)
    return f"{100 * busy_share(plan.device_times, num_micro_batches, num_windows):.0f} %"


def list_cells(name: str, gpus: str, processes: int, lengths: np.ndarray) -> list[str]:
    plan = memory.make_plan(gpus, processes, lengths)
    command = f"`{make_command(processes)}`"
    used = f"{max(plan.used_bytes) / GIB:.1f}"
    if not plan.limits.fits:
        command = "too small"
        used = "-"
    host = ""
    if plan.in_host_memory:
        host = f"{pinned_host_bytes(plan.job) / GIB:.1f}"
    needed = f"{max(plan.needed_bytes) / GIB:.1f}"
    usable = f"{min(plan.usable_bytes) / GIB:.1f}"
    return [name, command, f"`{gpus}`", needed, used, usable, host, describe_work(plan)]


def main() -> None:
    warnings.filterwarnings("ignore")
    lengths = make_lengths()
    print(f"| {' | '.join(HEAD)} |")
    print("|---" * len(HEAD) + "|")
    for name, (gpus, processes) in BOXES.items():
        print(f"| {' | '.join(list_cells(name, gpus, processes, lengths))} |")


if __name__ == "__main__":
    main()
