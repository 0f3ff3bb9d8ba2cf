"""What is printed, and that printing never ends a run."""

import io
import os
import re
import sys
import unicodedata
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


def split_columns(text: str, num_columns: int) -> list[str]:
    """Return a text in pieces that take at most so many columns of a terminal, at least one."""
    pieces = [""]
    used = 0
    for character in text:
        width = 1
        if unicodedata.east_asian_width(character) in "WF":
            width = 2
        if used + width > num_columns:
            pieces.append("")
            used = 0
        pieces[-1] += character
        used += width
    return pieces


def quiet_libraries() -> None:
    """Silence what libraries say about their own affairs; whatever fails still raises."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    is_first_process = os.environ.get("RANK", "0") == "0"
    if not sys.stderr.isatty() or not is_first_process:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


# ---- A console that goes away -------------------------------------------------------------------
class LastingFile(io.FileIO):
    """A file that drops what it cannot write: its reader is gone, or its disk is full."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outlive_console() -> None:
    """Let a run go on where stdout and stderr cannot be written, or lack a character."""
    if os.name != "posix":  # a console of Windows is no file
        return
    if sys.stdout is sys.__stdout__:  # else a test or a notebook has put its own there
        sys.stdout = lasting_stream(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = lasting_stream(sys.stderr)


def lasting_stream(stream) -> io.TextIOBase:
    if stream is None:  # the process was started with this stream closed
        return open(os.devnull, "w")
    buffer = io.BufferedWriter(LastingFile(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True)
