"""Draw docs/picture.svg for the READMEs: which tokens are trained, and the losses of a run.

    python sft_qwen2.py configs/tiny.json && python docs/make_pictures.py outputs/tiny

The conversation is encoded by the trainer's own functions with the stand-in's tokenizer, and the
losses are read from the run's metrics.jsonl.
"""

import json
import sys
from html import escape
from pathlib import Path

import numpy as np
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sft_qwen2  # noqa: E402
from sft.examples import mark_trained_tokens  # noqa: E402

CONVERSATION = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "3 加 3 呢？"},
        {"role": "assistant", "content": "等于 6。"},
    ]
}
CONTEXT, TRAINED, LINE = "#8a8f98", "#0a7d33", 20  # colours, and pixels from line to line
WIDTH, HEIGHT, LEFT, TOP = 860, 270, 470, 50  # of the picture; where the curve begins
PLOT_WIDTH, PLOT_HEIGHT = 360, 170
NAMES = ("loss", "eval_loss")
HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">
<style>text {{ font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }}
.context {{ fill: {CONTEXT} }} .trained {{ fill: {TRAINED}; font-weight: bold }}</style>
<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="white"/>"""


def text_at(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def draw_conversation() -> list[str]:
    """Return a text element for each line of the conversation, a tspan for each kind of token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-qwen2")
    row = sft_qwen2.encode(CONVERSATION["messages"], tokenizer)
    row = {name: np.array(ids) for name, ids in row.items()}
    lines = mark_trained_tokens(row, tokenizer, color=False).split("\n")
    elements = [text_at(20, 28, "trained: green; context: grey", "context")]
    for number, line in enumerate(lines):
        context, _, trained = line.partition("⟦")
        spans = {"context": context, "trained": trained.removesuffix("⟧")}
        spans = [f'<tspan class="{kind}">{escape(x)}</tspan>' for kind, x in spans.items() if x]
        y = TOP + 5 + LINE * number
        elements.append(f'<text x="20" y="{y}" xml:space="preserve">{"".join(spans)}</text>')
    return elements


def draw_losses(logs: list[dict]) -> list[str]:
    """Return the elements of the curve: a line of the losses, a dot for each eval_loss."""
    losses = {name: [(log["step"], log[name]) for log in logs if name in log] for name in NAMES}
    last = max(step for points in losses.values() for step, _ in points)
    highest = max(loss for points in losses.values() for _, loss in points)

    def place(step, loss) -> tuple[float, float]:
        x = LEFT + PLOT_WIDTH * step / last
        return round(x, 1), round(TOP + PLOT_HEIGHT * (1 - loss / highest), 1)

    bottom, right = TOP + PLOT_HEIGHT, LEFT + PLOT_WIDTH
    axes = f"M{LEFT} {TOP} V{bottom} H{right}"
    elements = [f'<path d="{axes}" fill="none" stroke="{CONTEXT}"/>']
    elements.append(text_at(LEFT, 28, "cross entropy of a trained token", "context"))
    elements.append(text_at(LEFT - 6, TOP + 5, f"{highest:.1f}", "context", "end"))
    elements.append(text_at(LEFT - 6, bottom, "0", "context", "end"))
    elements.append(text_at(right, bottom + 20, f"step {last}", "context", "end"))
    points = " ".join(f"{x},{y}" for x, y in (place(*point) for point in losses["loss"]))
    elements.append(f'<polyline points="{points}" fill="none" stroke="{CONTEXT}"/>')
    elements.append(text_at(right, place(*losses["loss"][-1])[1] - 12, "loss", "context", "end"))
    for step, loss in losses["eval_loss"]:
        x, y = place(step, loss)
        anchor, label = ("end", x + 4) if step == last else ("start", x + 8)
        elements.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{TRAINED}"/>')
        if step in (0, last):  # labels between them would overlap
            text = f"eval_loss {loss:.4f}"
            elements.append(text_at(label, y - 8, text, "trained", anchor))
    return elements


def main() -> None:
    metrics = Path(sys.argv[1], "metrics.jsonl").read_text(encoding="utf-8")
    logs = [json.loads(line) for line in metrics.splitlines()]
    elements = [HEAD, *draw_conversation(), *draw_losses(logs), "</svg>\n"]
    (ROOT / "docs" / "picture.svg").write_text("\n".join(elements), encoding="utf-8")


if __name__ == "__main__":
    main()
