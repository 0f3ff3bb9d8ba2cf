"""What Qwen2-7B needs on boxes of GPUs, from the trainer's own plan, as a table for the README.

    python benchmarks/boxes.py

Each command trains 128 rows a step. Needed: GiB on the fullest GPU for rows of 8,192 tokens (the
default max_len), one at a time, with all layers computed again on the way back. Used: as planned,
for memory that is left is spent on computing less again. Free: what a card of that name has. With
--dry_run --gpus, the commands show the same plan; where the longest row is shorter, less is needed.
"""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import memory

from sft.memory_plan import GIB, fits

BOXES = {  # name: --gpus, processes
    "1 x 80 GB (A100, H100)": ("1x80", 1),
    "2 x 80 GB": ("2x80", 2),
    "4 x 80 GB": ("4x80", 4),
    "8 x 80 GB": ("8x80", 8),
    "2 machines of 8 x 80 GB": ("16x80", 16),
    "4 x 32 GB (V100)": ("4x32", 4),
    "8 x 32 GB (V100)": ("8x32", 8),
    "2 x 24 GB": ("2x24", 2),
    "4 x 24 GB": ("4x24", 4),
    "1 x 48 GB": ("1x48", 1),
    "4 x 48 GB": ("4x48", 4),
}


def command(processes: int) -> str:
    if processes == 1:
        return "python sft_qwen2.py"
    machines, number = max(1, processes // 8), min(processes, 8)
    flags = f"--nnodes {machines} " * (machines > 1) + f"--nproc_per_node {number}"
    return f"torchrun {flags} sft_qwen2.py --gradient_accumulation_steps {32 // processes}"


def main() -> None:
    warnings.filterwarnings("ignore")
    print("| GPUs | command | `--gpus` | needed | used | free |\n|---|---|---|---|---|---|")
    for name, (gpus, processes) in BOXES.items():
        job, plan = memory.plan_box(gpus, processes)
        needed, used, free = (max(x) / GIB for x in (plan.needed, plan.used, job.capacities))
        tokens = max(plan.tokens_per_forward, memory.ROW)
        enough = tokens <= plan.max_tokens_without_checkpointing or fits(job, tokens, plan.held)
        shown = f"`{command(processes)}`" if enough else "too small"
        used = f"{used:.1f}" if enough else "-"
        print(f"| {name} | {shown} | `{gpus}` | {needed:.1f} | {used} | {free:.1f} |")


if __name__ == "__main__":
    main()
