"""What a run tells: lines on the screen, metrics.jsonl, and reporters such as wandb."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from sft.console import say
from sft.errors import describe

LINE_COLUMNS = 80
CURVE_COLUMNS = 40
BLOCKS = "▁▂▃▄▅▆▇"
WANDB_START_S = 30  # until a run without an answer records offline
WANDB_FINISH_S = 60  # until a finished run no longer waits for its upload
TRUE_VALUES = ("1", "ON", "YES", "TRUE")


# ---- Lines on the screen ------------------------------------------------------------------------
class RunLines(transformers.TrainerCallback):
    """Prints a line for each logged step, evaluation and save, and a block at the end."""

    def __init__(self):
        self.start_s = time.monotonic()
        self.first_step = 1
        self.skipped_steps = 0
        self.num_logged_steps = 0
        self.first_logged_step = 0
        self.first_logged_s = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start_s = time.monotonic()
        self.first_step = state.global_step + 1

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            newly_skipped = logs.get("skipped_steps", 0) - self.skipped_steps
            self.skipped_steps += newly_skipped
            say(format_step(state.global_step, state.max_steps, logs, newly_skipped))
            self.say_time_left(state)
        if "eval_loss" in logs:
            say(format_evaluation(state.log_history))

    def say_time_left(self, state) -> None:
        """Say once, at the second logged step, how long the rest takes if that is over a minute.

        The first step does not count: it may compile.
        """
        self.num_logged_steps += 1
        if self.num_logged_steps == 1:
            self.first_logged_step = state.global_step
            self.first_logged_s = time.monotonic()
        if self.num_logged_steps != 2:
            return
        num_steps_left = state.max_steps - state.global_step
        elapsed_s = time.monotonic() - self.first_logged_s
        left_s = elapsed_s / (state.global_step - self.first_logged_step) * num_steps_left
        if left_s > 60:
            say(f"time       about {format_seconds(left_s)} for {num_steps_left:,} more steps")

    def on_save(self, args, state, control, **kwargs) -> None:
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and checkpoint.is_dir():  # on a full disk there is none
            say(f"save       step {state.global_step}  {checkpoint}")

    def print_summary(self, args, state, exported_dtype: str) -> None:
        """Print what a finished run did and what is in args.output_dir; draw its losses there."""
        if not state.is_world_process_zero:
            return
        write_loss_curve(Path(args.output_dir, "loss.svg"), state.log_history)
        say(f"trained    {self.describe_steps(state)}")
        losses = [log["loss"] for log in state.log_history if "loss" in log]
        if losses:
            say(f"loss       {draw_curve(losses)} {losses[0]:.2f} -> {losses[-1]:.2f}")
        best = find_best_evaluation(state.log_history)
        if best is not None:
            say(f"best       step {best['step']}  eval_loss {best['eval_loss']:.4f}")
        exported_step = state.global_step
        if args.load_best_model_at_end and state.best_global_step is not None:
            exported_step = state.best_global_step
        say(f"model      {args.output_dir}: the weights of step {exported_step}, {exported_dtype}")
        say(f"chat       vllm serve {args.output_dir}; docs/serving.md has other ways")
        say(f"logs       metrics.jsonl, loss.svg and run.json in {args.output_dir}")

    def describe_steps(self, state) -> str:
        if self.first_step > state.global_step:
            return f"nothing more: step {state.global_step} was reached before"
        seconds = format_seconds(time.monotonic() - self.start_s)
        text = f"steps {self.first_step} to {state.global_step} in {seconds}"
        if state.global_step < state.max_steps:
            text += f", not {state.max_steps}: eval_loss no longer fell"
        return text


def format_step(step: int, max_steps: int, logs: dict, newly_skipped: int) -> str:
    """Return the line of a step: as much of its figures as 80 columns hold."""
    parts = [f"loss {logs['loss']:.4f}"]
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.1e}")
    if "grad_norm" in logs:
        parts.append(format_grad_norm(logs["grad_norm"]))
    if newly_skipped > 0:
        parts.append(f"skipped {newly_skipped}")
    if "tokens_per_s" in logs:
        parts.append(f"{logs['tokens_per_s']:,} tok/s")
    if "epoch" in logs:
        parts.append(f"epoch {logs['epoch']:.2f}")
    if "mfu" in logs:
        parts.append(f"mfu {logs['mfu']:.0%}")
    if "peak_gib" in logs:
        parts.append(f"{logs['peak_gib']:.1f} GiB")
    line = f"step {step}/{max_steps}"
    for part in parts:
        if len(line) + 2 + len(part) <= LINE_COLUMNS:
            line += f"  {part}"
    return line


def format_grad_norm(grad_norm: float) -> str:
    if grad_norm < 1000:
        return f"grad {grad_norm:.2f}"
    return f"grad {grad_norm:.1e}"


def format_evaluation(log_history: list[dict]) -> str:
    """Return the line of the last evaluation, which is marked if it is better than all before."""
    evaluations = [log for log in log_history if "eval_loss" in log]
    last = evaluations.pop()
    line = f"eval       step {last['step']}  eval_loss {last['eval_loss']:.4f}"
    best_before = find_best_evaluation(evaluations)
    if best_before is not None and last["eval_loss"] < best_before["eval_loss"]:
        line += " (best)"
    return line


def find_best_evaluation(log_history: list[dict]) -> dict | None:
    """Return the log entry of the lowest eval_loss, None where nothing was evaluated."""
    evaluations = [log for log in log_history if "eval_loss" in log]
    if not evaluations:
        return None
    return min(evaluations, key=lambda log: log["eval_loss"])


def format_seconds(seconds: float) -> str:
    """Return a time as people say it."""
    minutes = round(seconds) // 60
    if minutes == 0:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"


def draw_curve(losses: list[float]) -> str:
    """Return a line of blocks, each as high as the mean of its part of the losses."""
    num_blocks = min(len(losses), CURVE_COLUMNS)
    means = []
    for block in range(num_blocks):
        start = block * len(losses) // num_blocks
        end = (block + 1) * len(losses) // num_blocks
        means.append(sum(losses[start:end]) / (end - start))
    lowest = min(means)
    height = (max(means) - lowest) or 1.0
    curve = ""
    for mean in means:
        curve += BLOCKS[round((mean - lowest) / height * (len(BLOCKS) - 1))]
    return curve


# ---- Files --------------------------------------------------------------------------------------
class MetricsFile(transformers.TrainerCallback):
    """Keeps output_dir/metrics.jsonl equal to the log history, which checkpoints keep as well."""

    def __init__(self):
        self.num_written = 0  # entries of the log history; 0 means that the file is not theirs

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Drop what a killed run wrote after the checkpoint that this run goes on from."""
        self.write(args, state)

    def on_log(self, args, state, control, **kwargs) -> None:
        self.write(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Write what could not be written before, if the disk has room by now."""
        self.write(args, state)

    def write(self, args, state) -> None:
        new_entries = state.log_history[self.num_written :]
        if not state.is_world_process_zero or not new_entries:
            return
        path = Path(args.output_dir, "metrics.jsonl")
        try:
            if self.num_written == 0:
                path.unlink(missing_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                for entry in new_entries:
                    file.write(json.dumps(entry) + "\n")
            self.num_written = len(state.log_history)
        except OSError as error:
            self.num_written = 0  # the last line may be torn
            say(f"metrics.jsonl lacks step {state.global_step}: {error}", sys.stderr)


def write_loss_curve(path: Path, log_history: list[dict]) -> None:
    """Draw the losses of the steps (blue) and of the evaluations (orange) as an SVG file."""
    logs = [log for log in log_history if "loss" in log or "eval_loss" in log]
    losses = [log.get("loss", log.get("eval_loss")) for log in logs]
    if not losses or not math.isfinite(sum(losses)):
        return
    lowest = min(losses)
    height = (max(losses) - lowest) or 1.0
    last_step = logs[-1]["step"] or 1
    points = {"loss": "", "eval_loss": ""}
    for log, loss in zip(logs, losses):
        name = "loss" if "loss" in log else "eval_loss"
        x = 60 + 720 * log["step"] / last_step
        y = 360 - 340 * (loss - lowest) / height
        points[name] += f"{x:.1f},{y:.1f} "
    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 400">
<polyline points="{points["loss"]}" fill="none" stroke="steelblue"/>
<polyline points="{points["eval_loss"]}" fill="none" stroke="darkorange"/>
<text x="5" y="25">{max(losses):.3g}</text>
<text x="5" y="365">{lowest:.3g}</text>
<text x="680" y="390">step {last_step}</text>
</svg>
"""
    try:
        path.write_text(svg, encoding="utf-8")
    except OSError as error:  # the run is finished all the same
        say(f"{path.name} is not written: {error}", sys.stderr)


# ---- Reporters: wandb and others ----------------------------------------------------------------
class GuardedCallbackHandler(CallbackHandler):
    """Calls callbacks as Trainer's own handler does, but drops a reporter that raises."""

    def call_event(self, event, args, state, control, **kwargs):
        kwargs["model"] = self.model
        kwargs["processing_class"] = self.processing_class
        kwargs["optimizer"] = self.optimizer
        kwargs["lr_scheduler"] = self.lr_scheduler
        kwargs["train_dataloader"] = self.train_dataloader
        kwargs["eval_dataloader"] = self.eval_dataloader
        for callback in self.callbacks.copy():
            try:
                result = getattr(callback, event)(args, state, control, **kwargs)
            except Exception as error:
                if not isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
                    raise
                self.callbacks.remove(callback)
                name = type(callback).__name__
                say(f"report     {name} failed and is left out from now on: {describe(error)}")
                continue
            if result is not None:
                control = result
        return control


def set_up_reporting(trainer: transformers.Trainer) -> RunLines:
    """Let the trainer print and write as this file does, and outlive its reporters."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    run_lines = RunLines()
    trainer.add_callback(MetricsFile())
    trainer.add_callback(run_lines)
    handler = trainer.callback_handler
    trainer.callback_handler = GuardedCallbackHandler(
        handler.callbacks,
        handler.model,
        handler.processing_class,
        handler.optimizer,
        handler.lr_scheduler,
    )
    return run_lines


@contextmanager
def wandb_run(training_args, run_id: str | None) -> Iterator[str | None]:
    """Keep a wandb run for the context, if report_to asks for one; yield its id, else None.

    `run_id` is that of the run to continue. The first process alone has a run. The run is marked
    failed where the context raises. Whatever wandb does, training goes on.
    """
    wants_wandb = "wandb" in training_args.report_to
    run = None
    if wants_wandb and training_args.process_index == 0 and not is_wandb_disabled():
        run = start_wandb(training_args, run_id)
    if run is None:
        if wants_wandb:  # or its callback would start a run of its own
            training_args.report_to.remove("wandb")
        yield None
        return
    exit_code = 1
    try:
        yield run.id
        exit_code = 0
    finally:
        finish_wandb(run, exit_code)


def is_wandb_disabled() -> bool:
    is_disabled = os.environ.get("WANDB_DISABLED", "").upper() in TRUE_VALUES
    return is_disabled or os.environ.get("WANDB_MODE") == "disabled"


def start_wandb(training_args, run_id: str | None):
    """Return a new wandb run: offline without a key or an answer, None where that fails, too."""
    import wandb

    options = {
        "project": os.environ.get("WANDB_PROJECT", "huggingface"),
        "name": training_args.run_name,
        "dir": training_args.output_dir,
        "id": run_id,
        "resume": "allow",
        "settings": wandb.Settings(
            init_timeout=WANDB_START_S, finish_timeout=WANDB_FINISH_S, silent=True
        ),
    }
    try:
        run = wandb.init(mode=choose_wandb_mode(), **options)
    except Exception as error:  # wandb has no common class of errors
        say(f"wandb      {describe(error)}")
        run = start_wandb_offline(options)
    if run is None:
        return None
    if run.offline:
        say(f"wandb      records offline; to upload:\n           {sync_command(run)}")
    else:
        say(f"wandb      {run.url}")
    return run


def start_wandb_offline(options: dict):
    import wandb

    try:
        return wandb.init(mode="offline", **options)
    except Exception as error:
        say(f"wandb      left out: {describe(error)}")
        return None


def choose_wandb_mode() -> str:
    """Return the mode of the environment, or online; offline where that would ask for a key."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or "online"
    if mode == "offline":
        return mode
    has_key = wandb.login(prompt=False, verify=False)  # raises where the key cannot be one
    if not has_key:
        return "offline"
    return mode


def finish_wandb(run, exit_code: int) -> None:
    try:
        run.finish(exit_code)
    except Exception as error:
        say(f"wandb      {describe(error)}; to upload: {sync_command(run)}")


def sync_command(run) -> str:
    return f"wandb sync {Path(run.dir).parent}"
