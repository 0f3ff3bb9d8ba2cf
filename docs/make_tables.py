"""Print the table of docs/choosing.md: the smallest GPU for each model, and hours of training.

    python docs/make_tables.py

From the trainer's own plan, not measured. For examples of up to so many tokens: GiB on one GPU for
the longest alone, recomputed in the backward pass, and the smallest card that has them; "+ host":
optimizer state, and gradients if need be, in host memory. Hours: 10 million tokens in examples of
1,000, 60 % of them trained, where one A100 reaches 40 % of its peak and nothing is recomputed.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import memory  # noqa: E402

from sft.memory_model import QWEN2_SIZES, pinned_host_bytes  # noqa: E402
from sft.plan import Plan  # noqa: E402
from sft.step_time import UTILIZATION, training_flops  # noqa: E402
from sft.throughput import GIB, find_peak_tflops  # noqa: E402

CARDS = {"bf16": (8, 12, 16, 24, 32, 40, 48, 80), "fp16": (8, 12, 16, 24, 32)}  # GB
COLUMNS = {
    "bf16, 2,048": (2048, "bf16"),
    "bf16, 8,192": (8192, "bf16"),
    "fp16 (V100, T4), 2,048": (2048, "fp16"),
}


def find_smallest_cards(name: str, tokens: int, number_format: str) -> str:
    """Return the smallest card, and the smallest that needs no host memory, with their GiB."""
    cells = []
    for card in CARDS[number_format]:
        lengths = np.full(1000, tokens, dtype=np.int32)
        plan = memory.make_plan(f"1x{card}:{number_format}", 1, lengths, name)
        if not plan.limits.fits:
            continue
        if not plan.in_host_memory:
            cells.append(describe(plan, card))
            break
        if not cells:
            cells.append(describe(plan, card))
    return "; ".join(cells) or "several"


def describe(plan: Plan, card: int) -> str:
    needed = f"{max(plan.needed_bytes) / GIB:.1f} GiB"
    if plan.in_host_memory:
        needed += f" + {pinned_host_bytes(plan.job) / GIB:.1f} host"
    return f"{needed}: {card} GB"


def estimate_hours(name: str) -> str:
    lengths = np.full(10_000, 1000)
    flops = training_flops(QWEN2_SIZES[name], lengths, int(0.6 * lengths.sum()))
    seconds = flops / (UTILIZATION * find_peak_tflops("A100") * 1e12)
    return f"{seconds / 3600:.2g} h"


def main() -> None:
    print(f"| model | {' | '.join(COLUMNS)} | 10 million tokens |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name in QWEN2_SIZES:
        cards = [find_smallest_cards(name, *column) for column in COLUMNS.values()]
        print(f"| {name} | {' | '.join(cards)} | {estimate_hours(name)} |")


if __name__ == "__main__":
    main()
