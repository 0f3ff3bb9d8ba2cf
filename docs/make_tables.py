"""Print the table of docs/choosing.md: the smallest GPU for each model, and hours of training.

    python docs/make_tables.py

From the trainer's own plan (sft/memory_plan.py), not measured. For rows of up to so many tokens:
GiB needed with one row at a time, all layers computed again on the way back, and the smallest card
that has them. Hours: 10 million tokens in rows of 1,000, where one A100 reaches 40 % of its peak.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import memory  # noqa: E402

from sft import memory_plan as plan  # noqa: E402

CARDS = {"bf16": (8, 12, 16, 24, 40, 48, 80), "fp16": (8, 12, 16, 24, 32)}  # GB, as they are sold
COLUMNS = {"bf16, 2,048": (2048, "bf16"), "bf16, 8,192": (8192, "bf16")}
COLUMNS |= {"fp16 (V100, T4), 2,048": (2048, "fp16")}


def smallest_card(model: str, tokens: int, dtype: str) -> str:
    """Return the GiB that rows of so many tokens need, and the smallest card that has them."""
    args = SimpleNamespace(tokens_per_forward=None, max_len=tokens)
    training_args = SimpleNamespace(per_device_train_batch_size=4, gradient_checkpointing=True)
    for card in CARDS[dtype]:
        capacities, capability = plan.parse_gpus(f"1x{card}:{dtype}")
        precision = plan.choose_precision(capability, False)
        job = plan.Job(memory.make_config(model), precision, capacities, 1)
        if plan.fits(job, tokens):
            break
    needed = plan.plan_memory(job, args, training_args, tokens).needed[0] / plan.GIB
    return (
        f"{needed:.1f} GiB: {card} GB" if plan.fits(job, tokens) else f"{needed:.1f} GiB: several"
    )


def hours(model: str) -> str:
    config, rows = memory.make_config(model), np.full(10_000, 1000)
    flops = plan.training_flops(config, plan.count_parameters(config)["model"], rows)
    return f"{flops / (0.4 * plan.peak_tflops('A100') * 1e12) / 3600:.2g} h"


def main() -> None:
    print(f"| model | {' | '.join(COLUMNS)} | 10 million tokens |")
    print("|---|" + "---|" * (len(COLUMNS) + 1))
    for model in memory.MODELS:
        cards = (smallest_card(model, *column) for column in COLUMNS.values())
        print(f"| {model} | {' | '.join(cards)} | {hours(model)} |")


if __name__ == "__main__":
    main()
