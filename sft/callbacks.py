"""What happens around the steps: signals, logs, wandb, a console that goes away."""

import io
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch
import transformers

from sft.rows import UserError, as_user_error, cause, say
from sft.run_folder import saved_so_far


# ---- The console --------------------------------------------------------------------------------
def quiet_libraries() -> None:
    """Leave the console to what the user must know; what fails still raises."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console in GBK cannot write all of a row
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Of kernels for other machines, and of each try to reach the hub.
    for name in ("torchao", "torch.utils._pytree", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        transformers.utils.logging.disable_progress_bar()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def tell_torchrun(sentence: str) -> None:
    """Let torchrun, where it started this process, end its own report with the sentence."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"py_callstack": sentence, "timestamp": int(time.time())}
        text = json.dumps({"message": {"message": sentence, "extraInfo": about}})
        Path(path).write_text(text, encoding="utf-8")


class Console:
    """A text stream whose writing never fails: a run outlives the pipe or disk that it logs to."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


@contextmanager
def lasting_console():
    """Let stdout and stderr be Consoles, for as long as the context lasts."""
    streams = (sys.stdout, sys.stderr)
    try:
        with redirect_stdout(Console(sys.stdout)), redirect_stderr(Console(sys.stderr)):
            yield
    finally:
        for stream in streams:
            try:
                stream.flush()
            except OSError:  # or Python would try it once more at its exit, and complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- Callbacks ----------------------------------------------------------------------------------
class StopOnSignal(transformers.TrainerCallback):
    """While its context lasts, a SIGINT, SIGTERM or SIGHUP to any process saves and ends training.

    Then `number` is the signal's in all processes, after the same step; else it is 0.
    """

    def __init__(self):
        self.number, self.since, self.before = 0, 0.0, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
                self.before[number] = signal.signal(number, self.stop)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number, frame) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
            name = signal.Signals(number).name
            say(f"{name}: saving after this step; a second one stops at once, unsaved")
        elif time.monotonic() > self.since + 1:  # torchrun repeats what the terminal sent to all
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def agree(self, args) -> int:
        """Return the signal that any process got, or 0."""
        if args.world_size > 1:
            number = torch.tensor(self.number, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.number = int(number)
        return self.number

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.agree(args):
            control.should_save = control.should_training_stop = True


class MetricsLog(transformers.TrainerCallback):
    """Keeps output_dir/metrics.jsonl equal to the log history, which checkpoints keep as well."""

    def __init__(self):
        self.written = 0  # entries; 0: the file is to be written anew

    def on_log(self, args, state, control, **kwargs) -> None:
        path, new = Path(args.output_dir, "metrics.jsonl"), state.log_history[self.written :]
        if not state.is_world_process_zero or not new:
            return
        try:
            if not self.written:
                path.unlink(missing_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(log) + "\n" for log in new)
            self.written = len(state.log_history)
        except OSError as error:  # a full disk; the next time there may be room for all
            self.written = 0
            say(f"metrics.jsonl lacks step {state.global_step}: {error}", sys.stderr)

    # At the beginning what a killed run wrote goes, and later comes what a reporter kept from it.
    on_train_begin = on_evaluate = on_train_end = on_log


def train(trainer, stop: StopOnSignal, checkpoint: str | None) -> int:
    """Train to the end and return 0, or until a signal, save, and return its number."""
    # Steps recover by themselves, as far as fewer tokens at once can help.
    remedy = "use more GPUs, or leave --fp32 out, and go on with --resume"
    with stop, as_user_error(f"out of memory outside the model; {remedy}", torch.OutOfMemoryError):
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except (UserError, torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except BaseException as error:  # each file of a checkpoint has its own
            if not checkpoint or trainer.step_rows:
                raise
            remedy = "cannot be read; remove it to go on from the one before"
            why = cause(error).partition(". ")[0]  # torch goes on with bad advice
            raise UserError(f"{checkpoint}: {remedy}: {why}") from error
        number = stop.agree(trainer.args)
    if number and trainer.is_world_process_zero():
        step, saved = trainer.state.global_step, saved_so_far(trainer.args.output_dir)
        print(f"stopped    after step {step}; {saved}")
    return number


# ---- wandb ---------------------------------------------------------------------------------------
@contextmanager
def wandb_run(training_args, wait_s: float = 60):
    """A context with wandb on, if it is to be: offline where there is no login or no answer.

    It neither asks nor waits, and ends after at most wait_s: its server may be gone by then.
    """
    if "wandb" not in training_args.report_to or training_args.process_index > 0:
        yield
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
        yield
        return
    upload = f"to upload: wandb sync {Path(wandb.run.dir).parent}"
    if wandb.run.offline:
        print(f"wandb      records offline; {upload}")
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        finish = threading.Thread(target=wandb.finish, args=(exit_code,), daemon=True)
        finish.start()
        finish.join(wait_s)
        if finish.is_alive():
            print(f"wandb      no answer for {wait_s:.0f} s; {upload}")
