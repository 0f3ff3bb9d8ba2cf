"""The folder of a run: its record and what a resume compares, whole checkpoints, logs, signals."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from sft.memory_plan import Precision, rows_per_step
from sft.rows import UserError, as_user_error, say

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "wandb", "torchao")


def replace_text(path: Path, text: str) -> None:
    """Write a file so that, whatever happens, it is the old or the new one."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def open_run(args, training_args, precision: Precision, counts: dict, data_sha256: str):
    """Return the path of the checkpoint to resume from, or None; write output_dir/run.json.

    Raises UserError where a run would be overwritten, or continued on other terms.
    """
    output_dir = Path(training_args.output_dir)
    record, metrics = output_dir / "run.json", output_dir / "metrics.jsonl"
    settings, terms = training_args.to_dict(), {"rows_per_step": rows_per_step(training_args)}
    names = ("model_name_or_path", "system_prompt", "max_len", "overflow_strategy")
    terms |= {name: getattr(args, name) for name in names}
    names = ("seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")
    terms |= {name: settings[name] for name in names}
    terms |= {"train_file_sha256": data_sha256, "weights": str(precision.weights)}
    terms |= {"optim": precision.optim, "sharded": bool(training_args.fsdp)}
    checkpoint = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
    if not args.resume and (checkpoint or (output_dir / "config.json").exists()):
        raise UserError(f"{output_dir} holds a run: --resume continues it, --output_dir leaves it")
    if checkpoint:
        remedy = "put it back, or choose another --output_dir"
        with as_user_error((OSError, ValueError, KeyError), f"{record}: cannot be read; {remedy}"):
            old = json.loads(record.read_text(encoding="utf-8"))["terms"]
            changes = [f"{k} was {old[k]!r} and is {v!r}" for k, v in terms.items() if old[k] != v]
        if changes:
            raise UserError(f"{output_dir} cannot be resumed: {'; '.join(changes)}")
    if args.resume:
        print(f"resume     from {checkpoint or 'the beginning: no checkpoint was saved yet'}")
    # Without a shell, a machine that has no git would be an error.
    options = {"shell": True, "cwd": Path(__file__).parent, "capture_output": True, "text": True}
    about = {
        "terms": terms,
        "counts": counts,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "arguments": vars(args),
        "training_arguments": settings,
        "git": subprocess.run("git describe --always --dirty", **options).stdout.strip(),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    if training_args.should_save:  # one process for all
        shutil.rmtree(output_dir / "unfinished", ignore_errors=True)  # a save that was killed
        if metrics.exists():  # what was logged after the checkpoint will be logged again
            step = int(checkpoint.rpartition("-")[2]) if checkpoint else -1
            lines = [x for x in metrics.read_text().splitlines(True) if x.endswith("}\n")]
            lines = [line for line in lines if json.loads(line)["step"] <= step]
            replace_text(metrics, "".join(lines))
        replace_text(record, json.dumps(about, indent=2, ensure_ascii=False))
    return checkpoint


def start_wandb(training_args) -> None:
    """Start wandb, offline where there is no login or no answer: it must neither ask nor wait."""
    if "wandb" not in training_args.report_to or training_args.process_index > 0:
        return
    import wandb

    wanted = os.environ.get("WANDB_MODE")
    with suppress(Exception):  # what stands for a key is none
        wanted = wanted or ("online" if wandb.login(prompt=False, verify=False) else None)
    options = {"name": training_args.run_name, "dir": training_args.output_dir}
    options["project"] = os.environ.get("WANDB_PROJECT", "huggingface")
    options["settings"] = wandb.Settings(init_timeout=30, silent=True)
    for mode in dict.fromkeys((wanted or "offline", "offline")):
        try:
            wandb.init(mode=mode, **options)
            break
        except Exception as error:  # whatever it is, it must not cost the run
            print(f"wandb      not {mode}: {error}")
    else:  # or Trainer would start it once more, and raise
        training_args.report_to.remove("wandb")
    if wandb.run and wandb.run.offline:
        print(f"wandb      records offline; to upload: wandb sync {Path(wandb.run.dir).parent}")


def draw_losses(output_dir: Path) -> None:
    """Draw the losses of metrics.jsonl as loss.png, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    logs = list(map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines()))
    for name, style in (("loss", "-"), ("eval_loss", "o")):
        if points := [(log["step"], log[name]) for log in logs if name in log]:
            axes.plot(*zip(*points), style, label=name)
    axes.set(xlabel="optimizer step", ylabel="cross entropy of a trained token")
    axes.legend()
    figure.savefig(output_dir / "loss.png")
    print(f"losses     {output_dir / 'loss.png'}")


def train(trainer, checkpoint: str | None) -> int:
    """Train to the end and return 0, or to a SIGINT or SIGTERM, save, and return its number."""

    def stop(number, frame):
        trainer.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once
        name = signal.Signals(number).name
        say(f"{name}: saving after this step; a second one stops unsaved")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    remedy = "use more GPUs, or leave --fp32 out, and go on with --resume"
    try:  # training_step recovers by itself, as far as fewer tokens per forward pass can help
        with as_user_error(torch.OutOfMemoryError, f"out of memory outside the model; {remedy}"):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if trainer.bar is not None:
            trainer.bar.close()
            transformers.utils.logging.enable_progress_bar()
    if number := trainer.agreed_signal():
        step = trainer.state.global_step
        saved = Path(trainer.args.output_dir, f"checkpoint-{step}")
        if not saved.exists():
            trainer._save_checkpoint(trainer.model)
        where = "is saved; --resume continues from there" if saved.exists() else "is not saved"
        if trainer.is_world_process_zero():
            print(f"stopped    after step {step}, which {where}")
    return number
