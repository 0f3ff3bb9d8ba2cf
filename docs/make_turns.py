"""Draw docs/turns.svg: what four GPUs of one process do in a step, without turns and by turns.

    python docs/make_turns.py

The times are simulated by benchmarks/pipeline.py: the 7B on A100s, 8 micro-batches of 4,096 tokens.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import pipeline  # noqa: E402  # of benchmarks

NUM_GPUS = 4
NUM_MICRO_BATCHES = 8
TOKENS = 4096
LENGTH = 1000  # tokens of an example

WIDTH = 900
LEFT = 60  # where time begins
BAR_HEIGHT = 22
BAR_STEP = 26
PANEL_HEIGHT = 165
HEIGHT = 2 * PANEL_HEIGHT + 34
MIN_LABEL_WIDTH = 10  # of a bar that has room for its number
COLORS = {"forward": "#7fb3d5", "back": "#1f618d", "loss": "#d68910"}
TEXT_COLORS = {"forward": "#17202a", "back": "#ffffff", "loss": "#17202a"}
NAMES = {"forward": "forward", "back": "backward, with recomputing", "loss": "loss"}


def simulate(way: str) -> pipeline.Step:
    """Return a step that has run "in a row" or "in turns"."""
    machine = pipeline.Machine(NUM_GPUS)
    step = pipeline.Step(machine, pipeline.even_split(NUM_GPUS), TOKENS, LENGTH)
    if way == "in turns":
        step.run_in_turns(range(NUM_MICRO_BATCHES))
    else:
        step.run_in_a_row(range(NUM_MICRO_BATCHES))
    return step


def draw_text(x: float, y: float, text: str, color: str = "#17202a", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}">{text}</text>'


def draw_panel(title: str, step: pipeline.Step, top: float, pixels_per_s: float) -> list[str]:
    """Return the elements of one step: a row for each GPU, a bar for each part of its work."""
    share = step.machine.busy_share()
    elapsed_s = step.machine.elapsed_s()
    heading = f"{title}: {elapsed_s:.1f} s, GPUs work {100 * share:.0f} % of it"
    elements = [draw_text(LEFT, top + 16, heading)]
    for gpu in range(NUM_GPUS):
        y = top + 26 + BAR_STEP * gpu
        elements.append(draw_text(LEFT - 8, y + 15, f"GPU {gpu}", anchor="end"))
    for span in step.spans:
        elements += draw_bar(span, top + 26 + BAR_STEP * span.gpu, pixels_per_s)
    return elements


def draw_bar(span: pipeline.Span, y: float, pixels_per_s: float) -> list[str]:
    """Return a bar, and the number of its micro-batch where there is room."""
    x = LEFT + span.start * pixels_per_s
    width = (span.end - span.start) * pixels_per_s
    bar = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT}"'
    elements = [f'{bar} fill="{COLORS[span.direction]}" stroke="white" stroke-width="0.6"/>']
    if width >= MIN_LABEL_WIDTH:
        color = TEXT_COLORS[span.direction]
        number = str(span.micro_batch + 1)
        elements.append(draw_text(x + width / 2, y + 15, number, color, "middle"))
    return elements


def draw_legend(top: float) -> list[str]:
    elements = []
    x = LEFT
    for direction, name in NAMES.items():
        elements.append(
            f'<rect x="{x}" y="{top}" width="14" height="14" fill="{COLORS[direction]}"/>'
        )
        elements.append(draw_text(x + 20, top + 12, name))
        x += 40 + 7 * len(name)
    return elements


def main() -> None:
    in_a_row = simulate("in a row")
    in_turns = simulate("in turns")
    pixels_per_s = (WIDTH - LEFT - 20) / in_a_row.machine.elapsed_s()
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">\n'
        "<style>text { font: 12px ui-sans-serif, Helvetica, Arial, sans-serif }</style>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="white"/>'
    )
    elements = [head]
    elements += draw_panel("One micro-batch after the other", in_a_row, 4, pixels_per_s)
    elements += draw_panel("In turns", in_turns, PANEL_HEIGHT, pixels_per_s)
    elements += draw_legend(2 * PANEL_HEIGHT + 6)
    what = (
        f"simulated: Qwen2-7B, {NUM_GPUS} x A100, "
        f"{NUM_MICRO_BATCHES} micro-batches of {TOKENS:,} tokens"
    )
    elements.append(draw_text(WIDTH - 20, 2 * PANEL_HEIGHT + 18, what, anchor="end"))
    elements.append("</svg>\n")
    (ROOT / "docs" / "turns.svg").write_text("\n".join(elements), encoding="utf-8")


if __name__ == "__main__":
    main()
