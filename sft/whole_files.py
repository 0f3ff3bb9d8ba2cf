"""Files that are whole or not there: written aside, synced to the disk, then renamed."""

import errno
import os
import shutil
from pathlib import Path

ASIDE = "unfinished-save"  # the folder in output_dir where everything is written first
OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that, whatever happens, the old or the new text is on the disk."""
    aside = path.with_name(path.name + ".new")
    aside.unlink(missing_ok=True)  # a link there would be written through
    # Names of files may hold bytes that are not UTF-8.
    with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def measure_files(folder: Path) -> dict[str, int]:
    """Return {path inside the folder: size in bytes} of all its files."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            sizes[name] = path.stat().st_size
    return sizes


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with open(path, "r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())


def sync_files(folder: Path) -> None:
    """Wait until the content of all files of a folder is on the disk."""
    for name in measure_files(folder):
        sync_file(folder / name)


def remove_aside(output_dir: Path) -> None:
    """Remove what an unfinished save has left in output_dir."""
    aside = output_dir / ASIDE
    if aside.is_symlink():  # what the link leads to belongs to others
        aside.unlink()
    else:
        shutil.rmtree(aside, ignore_errors=True)


def is_out_of_space(error: BaseException) -> bool:
    """Return whether a file could not be written because the disk or the quota is full."""
    if isinstance(error, OSError):
        return error.errno in OUT_OF_SPACE
    # safetensors has an exception of its own, whose text holds the number.
    text = str(error)
    return any(f"(os error {number})" in text for number in OUT_OF_SPACE)
