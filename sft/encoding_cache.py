"""Encoded records are kept on disk, and found again by the content of all that made them."""

import ast
import errno
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
import filelock
import multiprocess
import tokenizers
import xxhash

from sft.console import say
from sft.data_files import RAW_FILE, read_records
from sft.errors import UserError, as_user_error

FILE_NAME = "examples.arrow"  # of several processes: examples_00000_of_00002.arrow, ...
CHECKSUMS = "checksums.json"  # is written last: a folder without it is unfinished
FOLDER_NAME = re.compile("[0-9a-f]{40}")
BYTES_PER_PROCESS = 5_000_000  # of data; fewer are encoded before a second process is ready
MAX_PROCESSES = 16  # each holds a tokenizer of about 200 MB
WAIT_BEFORE_SAYING_S = 5
UNUSED_S = 30 * 24 * 3600


class EncodingCache:
    """The folder that holds the encoded records of some files.

    The folder's name is a digest of the files' bytes, the tokenizer, the settings and the code that
    encodes: what would change the result has another folder. The folder holds the files that
    `Dataset.map` writes and their checksums.

    `is_complete` says whether the records are there. `num_proc` is for `Dataset.map`.
    """

    def __init__(
        self,
        paths: list[Path],
        tokenizer: tokenizers.Tokenizer,
        settings: dict,
        encode_records: Callable,
    ):
        self.paths = paths
        self.digests = hash_files(paths)
        causes = {
            "files": self.digests,
            "formats": [path.suffix.lower() for path in paths],
            "tokenizer": tokenizer.to_str(),
            "library": tokenizers.__version__,
            "settings": settings,
            "encoding": digest_code(encode_records),
            "reading": digest_code(read_records),
        }
        # `datasets` takes fingerprints of at most 64 characters, and adds some for each process.
        self.key = hashlib.sha256(json.dumps(causes).encode()).hexdigest()[:40]
        self.root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "sft_examples"
        self.folder = self.root / self.key
        self.file_name = str(self.folder / FILE_NAME)
        self.num_proc = choose_num_proc(paths)
        self.is_complete = False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time find out whether the records are there, and encode them.

        An unfinished folder is emptied before and removed after. Raises UserError for an OSError.
        """
        with cache_errors(self.root), interrupt_this_process_only():
            self.root.mkdir(parents=True, exist_ok=True)
            remove_unused(self.root)
            with wait_for_lock(f"{self.folder}.lock"):
                self.is_complete = is_whole(self.folder)
                if not self.is_complete:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    self.folder.mkdir()
                try:
                    yield
                finally:
                    if not self.is_complete:
                        shutil.rmtree(self.folder, ignore_errors=True)

    def complete(self) -> None:
        """Say that all records are in the folder. Raises UserError if a file changed meanwhile."""
        for path, before, now in zip(self.paths, self.digests, hash_files(self.paths)):
            if before != now:
                raise UserError(f"{path}: changed while it was read; start again")
        checksums = {}
        for path in sorted(self.folder.glob("examples*.arrow")):
            checksums[path.name] = checksum(path)
        (self.folder / CHECKSUMS).write_text(json.dumps(checksums))
        self.is_complete = True
        with suppress(PermissionError):  # Windows keeps the files that are still open
            (self.folder / RAW_FILE).unlink()

    def load(self) -> datasets.Dataset:
        """Return the encoded records, mapped into memory."""
        os.utime(self.folder)  # the folder was used today
        parts = []
        for name in read_checksums(self.folder):
            parts.append(datasets.Dataset.from_file(str(self.folder / name)))
        return datasets.concatenate_datasets(parts)


# ---- The folder ---------------------------------------------------------------------------------
@contextmanager
def cache_errors(root: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the cache, and the variable that moves it."""
    try:
        yield
    except OSError as error:
        # The cause of an error in another process is that process's whole traceback.
        reason = str(error)
        if error.errno:
            reason = os.strerror(error.errno)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{root}: encoded rows have no room here: {reason}; make room, or set "
                "HF_DATASETS_CACHE to a folder on another disk"
            ) from error
        raise UserError(
            f"{root}: encoded rows cannot be kept here: {reason}; set HF_DATASETS_CACHE to a "
            "folder on a local disk where you may write"
        ) from error
    except RuntimeError as error:
        if "abruptly died" not in str(error):  # as `datasets` says it
            raise
        raise UserError(
            "a process that encoded rows was killed; is there enough memory?"
        ) from error


@contextmanager
def interrupt_this_process_only() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt here, and not in the processes that encode.

    This process ends them. Each would print a traceback, and `datasets` would raise a TimeoutError.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    this_process = os.getpid()

    def interrupt(signum, frame) -> None:
        if os.getpid() == this_process:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except multiprocess.TimeoutError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def wait_for_lock(path: str) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=WAIT_BEFORE_SAYING_S)
    except filelock.Timeout:
        say("waiting    for another process that encodes the same rows")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_whole(folder: Path) -> bool:
    """Return whether a folder's files are all there and have the bytes that were written."""
    if not (folder / CHECKSUMS).exists():
        return False
    try:
        for name, expected in read_checksums(folder).items():
            if checksum(folder / name) != expected:
                raise ValueError(f"{name} has other bytes than were written")
    except (OSError, ValueError) as error:
        say(f"cache      {folder} is damaged, so rows are encoded again: {error}", sys.stderr)
        return False
    return True


def read_checksums(folder: Path) -> dict[str, str]:
    """Return {file name: checksum}; raises ValueError if the file that holds them is damaged."""
    checksums = json.loads((folder / CHECKSUMS).read_text())
    if not isinstance(checksums, dict) or not checksums:
        raise ValueError(f"{CHECKSUMS} names no files")
    return checksums


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def remove_unused(root: Path) -> None:
    """Remove the folders of this cache that no run has used for 30 days."""
    for folder in root.iterdir():
        with suppress(FileNotFoundError, filelock.Timeout):  # another process does the same
            is_old = folder.stat().st_mtime < time.time() - UNUSED_S
            if is_old and FOLDER_NAME.fullmatch(folder.name):
                with filelock.FileLock(f"{folder}.lock", timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)


def choose_num_proc(paths: list[Path]) -> int | None:
    """Return how many processes encode; None for this one, where the tokenizer has threads."""
    if sys.platform != "linux":  # elsewhere a process would import everything anew
        return None
    num_cores = len(os.sched_getaffinity(0))
    num_bytes = sum(path.stat().st_size for path in paths)
    num_proc = min(num_cores, MAX_PROCESSES, num_bytes // BYTES_PER_PROCESS)
    if num_proc < 2:
        return None
    return num_proc


# ---- What the folder's name is made of ----------------------------------------------------------
def hash_files(paths: list[Path]) -> list[str]:
    digests = []
    for path in paths:
        with as_user_error(f"{path}: cannot be read", OSError), open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests


def digest_code(function: Callable) -> str:
    """Return a digest of a function, and of what it uses of its own module and of sft/.

    Comments, docstrings, annotations and layout do not matter.
    """
    modules = (function.__module__, "sft.")
    codes = {}
    waiting = [function]
    seen = set()
    while waiting:
        item = waiting.pop()
        seen.add(item)
        tree = parse_source(item)
        # The script's module has two names: its own, and __main__ where it runs.
        module = item.__module__.removeprefix(function.__module__)
        codes[f"{module}.{item.__qualname__}"] = ast.unparse(tree)
        namespace = vars(sys.modules[item.__module__])
        for node in ast.walk(tree):
            if not isinstance(node, ast.Name) or node.id not in namespace:
                continue
            value = namespace[node.id]
            name = f"{module}.{node.id}"
            assert not getattr(value, "__name__", "").startswith("sft."), "import from sft by name"
            if inspect.isfunction(value) or inspect.isclass(value):
                if value.__module__.startswith(modules) and value not in seen:
                    waiting.append(value)
            elif isinstance(value, re.Pattern):
                codes[name] = value.pattern
            elif isinstance(value, str | bytes | int | float | tuple | list | dict):
                codes[name] = repr(value)
    return hashlib.sha256(json.dumps(codes, sort_keys=True).encode()).hexdigest()


def parse_source(item) -> ast.Module:
    """Return the syntax tree of a function or class, without docstrings and annotations."""
    with as_user_error(f"{item.__qualname__}: its code cannot be read", (OSError, SyntaxError)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(item)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return tree
