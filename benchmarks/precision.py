"""How much each number format learns at a learning rate of 1e-5, beside fp32, on the CPU.

    python benchmarks/precision.py --data gsm8k/train.jsonl --validation gsm8k/validation.jsonl

A small Qwen2 is trained in fp32, and its weights are rounded to bf16: this is the base. Each
contender is a run of the script from this base on the same examples in the same order, on a CPU
that the script takes for a GPU of that format. Its progress is how far the held-out loss fell, as
a share of how far fp32 made it fall. All losses are computed in fp32.

Then the gradients of one step are compared with those of plain PyTorch in fp64: in how many
micro-batches a step is cut may cost little in bf16, whose sums are rounded.

The exit code is 1 if a default format makes less than 99 % of fp32's progress.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "harness")]

import runs  # noqa: E402

os.environ.update(runs.CPU_ONLY)

import forks  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import sft.plan  # noqa: E402
import sft_qwen2  # noqa: E402
from sft.conversations import parse_record  # noqa: E402
from sft.examples import IGNORE_INDEX  # noqa: E402
from sft.model_files import load_weights  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "precision.json"
LEAST_PROGRESS = 0.99  # of a default format
PACKAGES = ("torch", "transformers", "torchao", "accelerate")
RUN_LIMIT_S = 3600
SYSTEM_PROMPT = "Be brief."
MAX_LEN = 256
NUM_HELD_OUT = 256
NUM_GRADIENT_EXAMPLES = 128
TOKENS_PER_FORWARD = 2048
SIZES = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 512}
FLAGS_OF_BASE = {"learning_rate": 1e-3, "max_steps": 90, "per_device_train_batch_size": 8}


@dataclass
class Contender:
    """A way to train: the format of matrix products, in so many processes that share the model."""

    name: str
    compute: str
    num_processes: int = 1
    plain_adamw: bool = False  # torch's own, over the weights that the default optimizer has
    fp32: bool = False  # --fp32
    num_micro_batches: int = 0  # for the comparison of gradients


CONTENDERS = [
    Contender("fp32", "fp32"),
    Contender("bf16, plain AdamW", "bf16", plain_adamw=True),
    Contender("bf16, default", "bf16"),
    Contender("bf16, default, 2 shards", "bf16", num_processes=2),
    Contender("fp16, default", "fp16"),
    Contender("fp16, default, 2 shards", "fp16", num_processes=2),
]
GRADIENTS = [
    Contender("fp32, 64 micro-batches", "fp32", num_micro_batches=64),
    Contender("bf16, 1 micro-batch", "bf16", num_micro_batches=1),
    Contender("bf16, 64 micro-batches", "bf16", num_micro_batches=64),
    Contender("bf16, 64 micro-batches, 2 shards", "bf16", num_processes=2, num_micro_batches=64),
    Contender("bf16 over fp32 weights, 64 micro-batches", "bf16", fp32=True, num_micro_batches=64),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSONL to train on")
    parser.add_argument("--validation", type=Path, required=True, help="JSONL to measure on")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows_per_step", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


# ---- Runs of the script -------------------------------------------------------------------------
def use_plain_adamw() -> None:
    """Let the script take torch's AdamW, which rounds to the nearest, over bf16 weights."""
    choose_precision = sft.plan.choose_precision

    def choose_plain(*arguments):
        return dataclasses.replace(choose_precision(*arguments), optim="adamw_torch")

    sft.plan.choose_precision = choose_plain


def save_gradients() -> None:
    """Let the script save the gradients of its first step, whole, and end there."""

    class GradientTrainer(sft_qwen2.SFTTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            gradients = {}
            for name, p in self.model.named_parameters():
                gradients[name] = p.grad
                if isinstance(p.grad, DTensor):
                    gradients[name] = p.grad.full_tensor()
            if self.args.process_index == 0:
                torch.save(gradients, self.output_dir / "gradients.pt")
            raise SystemExit(0)

    sft_qwen2.SFTTrainer = GradientTrainer


def train(folder: Path, contender: Contender, model: Path, data: Path, actions=(), **flags) -> Path:
    """Run the script to its end; return its output_dir."""
    output_dir = folder / "outputs"
    num_examples = flags.pop("per_device_train_batch_size")
    all_flags = {
        "model_name_or_path": model,
        "data_path": data,
        "output_dir": output_dir,
        "per_device_train_batch_size": num_examples // contender.num_processes,
        "gradient_accumulation_steps": 1,
        "tokens_per_forward": TOKENS_PER_FORWARD,
        "fp32": contender.fp32,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "system_prompt": SYSTEM_PROMPT,
        "max_len": MAX_LEN,
        "report_to": "none",
        **flags,
    }
    if contender.num_processes == 1:
        all_flags["use_cpu"] = True  # transformers refuses bf16 products elsewhere without a GPU
    actions = [(forks.take_for_gpu, contender.compute, contender.num_processes > 1), *actions]
    if contender.plain_adamw:
        actions.append((use_plain_adamw,))
    call = (forks.main_after, actions, runs.argv(**all_flags))
    with mock.patch.object(forks, "HANGS_S", RUN_LIMIT_S):
        ended = forks.run(folder / "log", *[call] * contender.num_processes)
    assert not any(ended.codes), ended.texts[0]
    return output_dir


def make_base(folder: Path, tokenizer, data: Path) -> Path:
    """Return the folder of a trained model whose fp32 weights are numbers of bf16."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **SIZES,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    fp32 = Contender("base", "fp32")
    base = train(folder / "base", fp32, folder / "start", data, **FLAGS_OF_BASE)
    model = transformers.Qwen2ForCausalLM.from_pretrained(base)
    model.to(torch.bfloat16).float().save_pretrained(base)
    return base


# ---- What was learnt ----------------------------------------------------------------------------
def encode_lines(lines: list[str], tokenizer) -> list[dict]:
    """Return the examples {"input_ids": [T], "labels": [T]} of JSONL lines, cut to MAX_LEN."""
    examples = []
    for line in lines:
        messages = parse_record(json.loads(line), SYSTEM_PROMPT)
        example = sft_qwen2.encode(messages, tokenizer)
        examples.append(
            {
                "input_ids": np.array(example["input_ids"][:MAX_LEN]),
                "labels": np.array(example["labels"][:MAX_LEN]),
            }
        )
    return examples


def read_lines(path: Path, number: int) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [line for line, _ in zip(file, range(number))]


def held_out_loss(model_dir: Path, examples: list[dict]) -> float:
    """Return the mean loss over the trained tokens of the examples, computed in fp32."""
    model = load_weights(
        sft_qwen2.Qwen2ForCausalLM,
        str(model_dir),
        torch.float32,
        attn_implementation="packed_attention",
    )
    micro_batches, num_trained_tokens = sft_qwen2.collate(examples, TOKENS_PER_FORWARD)
    loss_sum = 0.0
    with torch.no_grad():
        for micro_batch in micro_batches:
            loss_sum += model(**micro_batch, num_items_in_batch=1)["loss"].item()
    return loss_sum / num_trained_tokens


def share_of_changed_weights(model_dir: Path, base: Path) -> float:
    """Return which share of all weights is another number than in the base."""
    before = load_file(base / "model.safetensors")
    num_changed = 0
    num_weights = 0
    for name, weights in load_file(model_dir / "model.safetensors").items():
        num_changed += int((weights != before[name]).sum())
        num_weights += weights.numel()
    return num_changed / num_weights


def compare_progress(folder: Path, base: Path, held_out: list[dict], args) -> list[dict]:
    """Train each contender; return and print what each has learnt."""
    base_loss = held_out_loss(base, held_out)
    results = [{"name": "base", "held_out_loss": base_loss}]
    print("\n| | held-out loss | progress | weights changed | s |\n|---|---|---|---|---|")
    print(f"| base | {base_loss:.4f} | | | |", flush=True)
    fp32_gain = None
    for contender in CONTENDERS:
        began_s = time.monotonic()
        model_dir = train(
            folder / contender.name,
            contender,
            base,
            args.data,
            learning_rate=1e-5,
            max_steps=args.steps,
            per_device_train_batch_size=args.rows_per_step,
        )
        duration_s = time.monotonic() - began_s
        loss = held_out_loss(model_dir, held_out)
        gain = base_loss - loss
        if fp32_gain is None:
            fp32_gain = gain
        changed = share_of_changed_weights(model_dir, base)
        results.append(
            {
                "name": contender.name,
                "held_out_loss": loss,
                "weights_changed": changed,
                "progress": gain / fp32_gain,
            }
        )
        print(
            f"| {contender.name} | {loss:.4f} | {gain / fp32_gain:.1%} | {changed:.0%} "
            f"| {duration_s:.0f} |",
            flush=True,
        )
    return results


# ---- Gradients ----------------------------------------------------------------------------------
def find_tokens_per_forward(lengths: list[int], num_micro_batches: int) -> int:
    """Return the smallest budget that cuts examples of these lengths into so many, or fewer."""
    budget = max(lengths)
    while len(sft_qwen2.bin_by_tokens(lengths, budget)) > num_micro_batches:
        budget += 1
    return budget


def compute_exact_gradients(base: Path, examples: list[dict]) -> dict[str, torch.Tensor]:
    """Return the gradients of the mean loss of a trained token, by plain PyTorch in fp64."""
    model = transformers.Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float64)
    num_trained_tokens = sft_qwen2.count_trained_tokens(examples)
    for example in examples:
        input_ids = torch.from_numpy(example["input_ids"])
        labels = torch.from_numpy(example["labels"])
        logits = model(input_ids[None]).logits[0, :-1]
        loss_sum = torch.nn.functional.cross_entropy(
            logits, labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
        )
        (loss_sum / num_trained_tokens).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def measure_errors(found: dict, exact: dict) -> tuple[float, float]:
    """Return the relative errors of all gradients together, and of the worst tensor."""
    error_squares = 0.0
    squares = 0.0
    worst = 0.0
    for name, gradient in exact.items():
        error = (found[name].double() - gradient).norm().item()
        norm = gradient.norm().item()
        error_squares += error**2
        squares += norm**2
        worst = max(worst, error / norm)
    return (error_squares / squares) ** 0.5, worst


def compare_gradients(folder: Path, base: Path, tokenizer, data: Path) -> list[dict]:
    """Return and print how far the gradients of a step are from the exact ones."""
    lines = read_lines(data, NUM_GRADIENT_EXAMPLES)
    file = folder / "rows.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    examples = encode_lines(lines, tokenizer)
    lengths = [len(example["input_ids"]) for example in examples]
    exact = compute_exact_gradients(base, examples)
    results = []
    print("\n| gradients | error | of the worst tensor |\n|---|---|---|")
    for contender in GRADIENTS:
        output_dir = train(
            folder / contender.name,
            contender,
            base,
            file,
            actions=[(save_gradients,)],
            max_steps=1,
            max_grad_norm=0,
            per_device_train_batch_size=len(examples),
            tokens_per_forward=find_tokens_per_forward(lengths, contender.num_micro_batches),
        )
        found = torch.load(output_dir / "gradients.pt", weights_only=True)
        error, worst = measure_errors(found, exact)
        results.append({"name": contender.name, "error": error, "worst_tensor": worst})
        print(f"| {contender.name} | {error:.2%} | {worst:.2%} |", flush=True)
    return results


def main() -> int:
    args = parse_arguments()
    folder = Path(tempfile.mkdtemp(prefix="precision-"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs.TINY)
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, CPU only, a thread a process",
    }
    base = make_base(folder, tokenizer, args.data)
    held_out = encode_lines(read_lines(args.validation, NUM_HELD_OUT), tokenizer)
    results["progress"] = compare_progress(folder, base, held_out, args)
    results["gradients"] = compare_gradients(folder, base, tokenizer, args.data)
    args.out.write_text(json.dumps(results, indent=1) + "\n")

    is_enough = True
    for result in results["progress"]:
        if "default" in result["name"] and result["progress"] < LEAST_PROGRESS:
            print(f"{result['name']}: less than {LEAST_PROGRESS:.0%} of fp32's progress")
            is_enough = False
    return 0 if is_enough else 1


if __name__ == "__main__":
    sys.exit(main())
