"""What ends a run from outside: a signal, a process that dies, memory that others took."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import transformers

from sft.console import say
from sft.errors import UserError, describe

# Windows has no SIGHUP.
HANDLED_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
# A launcher passes on what the terminal has already sent to all of its processes.
REPEATS_S = 1.0
NO_MEMORY = (
    "the memory of this machine (not of its GPUs) is used up; end other programs or use fewer "
    "processes, then go on with --resume"
)
LOST_PROCESS = (
    "another process of this run has ended or does not answer; what it printed says why; "
    "go on with --resume"
)


class StopOnSignal(transformers.TrainerCallback):
    """While its context lasts, a signal saves after the step and ends training in all processes.

    `signal_number` is the first signal that this process got, 0 before. After is_requested() it
    is one that any process got. A second signal ends the process at once.
    """

    def __init__(self):
        self.signal_number = 0
        self.earlier_handlers = {}

    def __enter__(self):
        for number in HANDLED_SIGNALS:
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN:  # nohup asks that SIGHUP has no effect
                self.earlier_handlers[number] = handler
        self.handle_signals(self.request)
        return self

    def __exit__(self, *_):
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)

    def handle_signals(self, handler) -> None:
        for number in self.earlier_handlers:
            signal.signal(number, handler)

    def request(self, number: int, frame) -> None:
        """Note the signal; drop its repeats for a moment, then let the next one end the process."""
        self.handle_signals(signal.SIG_IGN)
        self.signal_number = number
        name = signal.Signals(number).name
        with suppress(RuntimeError):  # the signal came in the middle of another line
            say(f"{name}: saving after this step; a second one stops at once, unsaved")
        time.sleep(REPEATS_S)
        self.handle_signals(signal.SIG_DFL)

    def is_requested(self, args: transformers.TrainingArguments) -> bool:
        """Return whether any process got a signal. All processes must ask at the same point."""
        if args.world_size > 1:
            number = torch.tensor(self.signal_number, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.signal_number = int(number)
        return self.signal_number > 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.is_requested(args):
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Trainer takes a stop for the end of an epoch, which would be evaluated."""
        if self.is_requested(args) and not float(state.epoch).is_integer():
            control.should_evaluate = False


@contextmanager
def explain_failures() -> Iterator[None]:
    """Turn what others did to this process into a UserError: memory taken, a process that died."""
    try:
        yield
    except MemoryError as error:
        raise UserError(NO_MEMORY) from error
    except RuntimeError as error:
        # Gloo's errors, and those of PyTorch's allocator on the CPU, have no class of their own.
        if "DefaultCPUAllocator" in str(error):
            raise UserError(NO_MEMORY) from error
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise UserError(f"{LOST_PROCESS} ({describe(error)})") from error
        raise
