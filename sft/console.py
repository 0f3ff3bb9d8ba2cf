"""What is printed, and that printing never ends a run."""

import io
import logging
import os
import re
import sys
import warnings

import tqdm

# A terminal obeys these: control characters but tab and newline, and marks that reorder text.
NOT_PRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def say(text: str, file=None) -> None:
    """Print a line to stdout (or `file`) at once, above a progress bar that is on the screen."""
    stream = file or sys.stdout
    tqdm.tqdm.write(text, file=stream)
    stream.flush()


def printable(text: str) -> str:
    """Return a text of the user's data with what a terminal would obey written as escapes."""
    return NOT_PRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def quiet_libraries() -> None:
    """Silence what libraries say about their own affairs; whatever fails still raises."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torchao", "torch.utils._pytree", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    is_first_process = os.environ.get("RANK", "0") == "0"
    if not sys.stderr.isatty() or not is_first_process:
        transformers.utils.logging.disable_progress_bar()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


class LastingFile(io.FileIO):
    """A file that drops what cannot be written: its reader is gone, or its disk is full."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def keep_printing(stream):
    """Return the process's stdout or stderr as a stream whose writing never raises."""
    raw = LastingFile(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=True
    )
