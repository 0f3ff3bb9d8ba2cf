"""What benchmarks/gpu.py checks with whole small runs, and measures of a trainer between steps."""

import contextlib
import shutil
import time
from pathlib import Path
from unittest import mock

import forks
import runs
import torch
from safetensors.torch import load_file

import sft.plan
from sft.plan import Plan
from sft.precision import choose_precision
from sft.sample_answers import ANSWER_TOKENS, NUM_QUESTIONS, Question, answer_questions
from sft.throughput import GIB

GB = 10**9
NUM_STEPS = 4
SAVED_STEP = 2
# Two runs on a GPU add up in different orders, and fp16 rounds what they add to 11 bits.
MAX_LOSS_ERROR = 1e-3
MAX_WEIGHT_ERROR = 1e-3


# ---- A resumed run ------------------------------------------------------------------------------
def take_fp16(device: str):
    """Return a context in which the script takes this device for a V100, which multiplies in fp16.

    On the CPU that lasts as long as the process.
    """
    if device == "cpu":
        forks.take_for_gpu("fp16", shard=False)
        return contextlib.nullcontext()

    def choose(_, fp32: bool, optim: str):
        return choose_precision((7, 0), fp32, optim)

    return mock.patch.object(sft.plan, "choose_precision", choose)


def resume_in_fp16(folder: Path, device: str) -> list[dict]:
    """Return how far a run that is resumed is from the one that was not stopped."""
    model = runs.make_model(folder / "model", hidden_size=128, intermediate_size=256)
    flags = {
        "model_name_or_path": model,
        "data_path": runs.ROOT / "data" / "train.jsonl",
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "save_steps": SAVED_STEP,
        "learning_rate": 1e-3,
        "optim": "adamw_torch_fused",  # has nothing to compile
        "report_to": "none",
    }
    whole = folder / "whole"
    resumed = folder / "resumed"
    with take_fp16(device):
        run_script(**flags, output_dir=whole)
        last = f"checkpoint-{NUM_STEPS}"
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns(last))
        run_script(**flags, output_dir=resumed, resume="true")
    wanted_losses = [log["loss"] for log in runs.read_logs(whole)]
    losses = [log["loss"] for log in runs.read_logs(resumed)]
    pairs = zip(losses, wanted_losses, strict=True)
    loss_error = max(abs(loss - wanted) for loss, wanted in pairs)
    wanted = load_file(whole / "model.safetensors")
    found = load_file(resumed / "model.safetensors")
    weight_error = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    scales = []
    for run in (whole, resumed):
        scales.append(torch.load(run / f"checkpoint-{NUM_STEPS}" / "scaler.pt")["scale"])
    name = f"fp16 resumed, {device}"
    return [
        {"name": f"{name}: losses", "error": loss_error, "limit": MAX_LOSS_ERROR},
        {"name": f"{name}: weights", "error": weight_error, "limit": MAX_WEIGHT_ERROR},
        {"name": f"{name}: loss scale", "error": abs(scales[0] - scales[1]), "limit": 0},
    ]


def run_script(**flags) -> None:
    """Call main() with these flags."""
    code, _, errors = runs.run_main(*runs.argv(**flags))
    assert code == 0, errors


# ---- Of one trainer -----------------------------------------------------------------------------
def count_different(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> int:
    """Return how many values of all weights differ."""
    number = 0
    for name, weight in wanted.items():
        number += int((found[name] != weight).sum())
    return number


def measure_save(trainer, plan: Plan) -> dict[str, float]:
    """Return the seconds of a save, until the disk has it, and its gigabytes."""
    planned_bytes = plan.disk.checkpoint_bytes
    free_bytes = shutil.disk_usage(trainer.output_dir).free
    figures = {"planned_gb": planned_bytes / GB}
    if free_bytes < 1.2 * planned_bytes:
        return {**figures, "free_gb": free_bytes / GB}
    start = time.perf_counter()
    trainer._save_checkpoint(trainer.model)
    figures["seconds"] = time.perf_counter() - start
    checkpoint = trainer.output_dir / f"checkpoint-{trainer.state.global_step}"
    assert checkpoint.is_dir(), "nothing was saved"
    num_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    shutil.rmtree(checkpoint)
    return {**figures, "gb": num_bytes / GB}


def measure_answers(trainer, plan: Plan, examples: list[dict]) -> dict[str, float]:
    """Return the seconds of the sample answers, and the memory that they add."""
    end_id = trainer.model.config.vocab_size - 1
    questions = []
    for example in examples[:NUM_QUESTIONS]:
        prompt_ids = example["input_ids"].tolist()
        questions.append(Question(prompt_ids=prompt_ids, answer_ids=[end_id] * ANSWER_TOKENS))
    is_on_gpu = torch.cuda.is_available()
    if is_on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
    start = time.perf_counter()
    answers = answer_questions(trainer.model, questions, end_id, plan.tokens_per_forward)
    figures = {
        "questions": len(answers),
        "seconds": time.perf_counter() - start,
        "longest_prompt": max(len(question.prompt_ids) for question in questions),
    }
    if is_on_gpu:
        figures["more_gib"] = (torch.cuda.max_memory_allocated() - before_bytes) / GIB
    return figures
