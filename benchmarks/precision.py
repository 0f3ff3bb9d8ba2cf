"""Does training in half precision keep up with fp32, in one process and over shards?

    python benchmarks/precision.py --data DATA/train.jsonl --validation DATA/validation.jsonl

At a learning rate of 1e-5 most updates are less than half a step between bf16 numbers: rounded to
the nearest, they are lost. A small Qwen2 (vocabulary of data/tiny-qwen2, random weights) is trained
for a while in fp32 and rounded to bf16: the base. From it the script trains on the same rows in the
same order in each way, over gloo processes on the CPU, which it takes for GPUs. "progress" is the
fall of the held-out loss as a share of fp32's; all are measured in fp32.

The gradients of one step of 128 rows, as one micro-batch and as 64, are compared with those of
plain PyTorch in fp64: bf16 weights have bf16 gradients, to which each micro-batch is added.

Writes results/precision.json. Exit code 1: a default makes less than 99 % of fp32's progress.
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import launch  # noqa: E402, first: it sets what torch reads when it is imported
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import sft_qwen2  # noqa: E402
from sft.encoded_rows import IGNORE_INDEX  # noqa: E402
from sft.rows import file_sha256, parse_row, read_rows  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "precision.json"
LAW, PACKAGES = 0.99, ("torch", "transformers", "torchao", "accelerate")
TOKENIZER = ROOT / "data" / "tiny-qwen2"
SHAPE = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 512}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
MAX_LEN, EVAL_ROWS, SYSTEM = 256, 256, "Be brief."
BASE = {"learning_rate": 1e-3, "max_steps": 90, "per_device_train_batch_size": 8}
CONTENDERS = {  # the number format of matrix products, processes, an optimizer instead of its own
    "fp32": ("fp32", 1, None),
    "bf16, plain AdamW": ("bf16", 1, "adamw_torch"),
    "bf16, default": ("bf16", 1, None),
    "bf16, default, 2 shards": ("bf16", 2, None),
    "bf16, default, 4 shards": ("bf16", 4, None),
    "fp16, default": ("fp16", 1, None),
    "fp16, default, 2 shards": ("fp16", 2, None),
    "fp16, default, 4 shards": ("fp16", 4, None),
}
GRADIENTS = {  # number format, processes, --fp32, micro-batches
    "fp32, 64 micro-batches": ("fp32", 1, False, 64),
    "bf16, 1 micro-batch": ("bf16", 1, False, 1),
    "bf16, 64 micro-batches": ("bf16", 1, False, 64),
    "bf16, 64 micro-batches, 2 shards": ("bf16", 2, False, 64),
    "bf16, 64 micro-batches, 4 shards": ("bf16", 4, False, 64),
    "bf16 over fp32 weights, 1 micro-batch": ("bf16", 1, True, 1),
    "bf16 over fp32 weights, 64 micro-batches": ("bf16", 1, True, 64),
    "bf16 over fp32 weights, 64 micro-batches, 4 shards": ("bf16", 4, True, 64),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="rows to train on")
    parser.add_argument("--validation", type=Path, required=True, help="rows to measure on")
    for name, default in (("steps", 60), ("rows_per_step", 32), ("gradient_rows", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def train(folder: Path, compute: str, processes: int, model, data, **flags) -> Path:
    """Run the script; return its output_dir."""
    flags |= {"model_name_or_path": model, "data_path": data, "output_dir": folder / "outputs"}
    flags |= {"lr_scheduler_type": "constant", "save_strategy": "no"}
    flags |= {"system_prompt": SYSTEM, "max_len": MAX_LEN, "report_to": "none"}
    flags["per_device_train_batch_size"] //= processes
    flags = {"gradient_accumulation_steps": 1, "tokens_per_forward": 2048, **flags}
    argv = [str(text) for name, value in flags.items() for text in (f"--{name}", value)]
    job = {"world": processes, "compute": compute, "folder": str(folder), "argv": argv}
    codes = launch.run(job)
    assert not any(codes), (folder / "log-0").read_text()
    return folder / "outputs"


def encode_rows(path: Path, number: int, tokenizer) -> list[dict]:
    """Return the first rows of a file, cut to MAX_LEN tokens."""
    turns = [parse_row(row, SYSTEM) for _, row in itertools.islice(read_rows(path), number)]
    rows = [sft_qwen2.encode(conversation, tokenizer) for conversation in turns]
    return [{name: np.array(ids)[:MAX_LEN] for name, ids in row.items()} for row in rows]


def held_out_loss(model_dir: Path, rows: list[dict]) -> float:
    """Return the mean loss over the trained tokens of the rows, computed in fp32."""
    model = sft_qwen2.load_model(str(model_dir), torch.float32)
    batches, trained_tokens = sft_qwen2.collate(rows, MAX_LEN, 2048)
    with torch.no_grad():
        return sum(model(**batch)["loss"].item() for batch in batches) / trained_tokens


def make_base(folder: Path, tokenizer, data: Path) -> Path:
    """Return the folder of the base model: bf16's numbers, kept as fp32; trained once."""
    causes = repr((SHAPE, BASE, MAX_LEN)) + file_sha256(data)
    base = Path(tempfile.gettempdir(), f"base-{hashlib.sha256(causes.encode()).hexdigest()[:16]}")
    if not base.exists():
        torch.manual_seed(0)
        config = transformers.Qwen2Config(vocab_size=len(tokenizer), **SHAPE)
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "start")
        tokenizer.save_pretrained(folder / "start")
        trained = train(folder / "base", "fp32", 1, folder / "start", data, **BASE)
        model = transformers.Qwen2ForCausalLM.from_pretrained(trained)
        model.to(torch.bfloat16).float().save_pretrained(trained)
        trained.rename(base)
    return base


def compare_progress(folder: Path, base: Path, rows: list[dict], args) -> list[dict]:
    """Return and print the results of CONTENDERS."""
    start, found = load_file(base / "model.safetensors"), []
    print("\n| | held-out loss | progress | weights changed | s |\n|---|---|---|---|---|")
    before, with_optim = held_out_loss(base, rows), sft_qwen2.with_optim
    print(f"| base | {before:.4f} | | | |", flush=True)
    for name, (compute, processes, optim) in CONTENDERS.items():
        if optim:  # the script itself would not
            sft_qwen2.with_optim = lambda precision, _, optim=optim: precision._replace(optim=optim)
        sizes = {"per_device_train_batch_size": args.rows_per_step, "max_steps": args.steps}
        sizes |= {"learning_rate": 1e-5}
        began = time.time()
        model = train(folder / name, compute, processes, base, args.data, **sizes)
        seconds, sft_qwen2.with_optim = time.time() - began, with_optim
        loss = held_out_loss(model, rows)
        weights = load_file(model / "model.safetensors").items()
        changed = torch.cat([(w != start[key]).float().flatten() for key, w in weights]).mean()
        found.append({"name": name, "held_out_loss": loss, "weights_changed": changed.item()})
        found[-1]["progress"] = share = (before - loss) / (before - found[0]["held_out_loss"])
        print(f"| {name} | {loss:.4f} | {share:.2%} | {changed:.0%} | {seconds:.0f} |", flush=True)
    return [{"name": "base", "held_out_loss": before}, *found]


def save_gradients(trainer) -> None:
    """In place of check_gradients: save them, whole, and end the process."""
    grads = {name: p.grad.detach() for name, p in trainer.model.named_parameters()}
    grads = {k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in grads.items()}
    if trainer.args.process_index == 0:
        torch.save(grads, Path(trainer.args.output_dir, "gradients.pt"))
    raise SystemExit(0)


def exact_gradients(base: Path, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return the gradients of the mean loss of a trained token, by plain PyTorch in fp64."""
    model = transformers.Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float64)
    trained_tokens = sum((row["labels"] != IGNORE_INDEX).sum() for row in rows)
    for row in rows:
        ids, labels = (torch.from_numpy(row[name]) for name in ("input_ids", "labels"))
        logits = model(ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        (loss / trained_tokens).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def compare_gradients(folder: Path, base: Path, tokenizer, args) -> list[dict]:
    """Return and print how far the gradients of GRADIENTS are from exact_gradients."""
    lines = args.data.read_bytes().splitlines(keepends=True)[: args.gradient_rows]
    (folder / "rows.jsonl").write_bytes(b"".join(lines))
    rows = encode_rows(folder / "rows.jsonl", len(lines), tokenizer)
    lengths, saved, found = [len(row["input_ids"]) for row in rows], {}, []
    sft_qwen2.StepTrainer.check_gradients = save_gradients
    for name, (compute, processes, fp32, number) in GRADIENTS.items():
        budgets = range(max(lengths), sum(lengths) + 1)
        budget = next(b for b in budgets if len(sft_qwen2.bin_rows(lengths, b)) <= number)
        flags = {"per_device_train_batch_size": len(rows), "max_steps": 1, "fp32": fp32}
        flags |= {"max_grad_norm": 0, "tokens_per_forward": budget, "learning_rate": 1e-5}
        output_dir = train(folder / name, compute, processes, base, folder / "rows.jsonl", **flags)
        saved[name] = torch.load(output_dir / "gradients.pt")
    exact = exact_gradients(base, rows)
    print("\n| gradients | error | of the worst tensor |\n|---|---|---|")
    for name, grads in saved.items():
        errors = {key: (grads[key].double() - g).norm() for key, g in exact.items()}
        norm = torch.stack([g.norm() for g in exact.values()]).norm()
        error = (torch.stack(list(errors.values())).norm() / norm).item()
        worst = max((error / exact[key].norm()).item() for key, error in errors.items())
        found.append({"name": name, "error": error, "worst_tensor": worst})
        print(f"| {name} | {error:.3%} | {worst:.3%} |")
    return found


def main() -> int:
    args, folder = parse_arguments(), Path(tempfile.mkdtemp(prefix="precision-"))
    launch.load_modules()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    found = {"command": shlex.join(["python", *sys.argv]), "versions": versions}
    found["machine"] = f"{platform.machine()}, CPU only, a thread a process"
    print(f"$ {found['command']}\n{versions}")
    base = make_base(folder, tokenizer, args.data)
    rows = encode_rows(args.validation, EVAL_ROWS, tokenizer)
    found["progress"] = compare_progress(folder, base, rows, args)
    found["gradients"] = compare_gradients(folder, base, tokenizer, args)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    defaults = [way["progress"] for way in found["progress"] if "default" in way["name"]]
    print(f"\nat least {LAW:.0%} of fp32's progress: {'yes' if min(defaults) >= LAW else 'NO'}")
    return 0 if min(defaults) >= LAW else 1


if __name__ == "__main__":
    sys.exit(main())
