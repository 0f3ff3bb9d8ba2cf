"""Files that are whole or not there, and what lies beside them."""

import errno
import os

import pytest
from safetensors import SafetensorError

from sft import whole_files


def test_a_text_is_not_written_through_a_link(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    for name in ("run.json", "run.json.new"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
    whole_files.replace_text(tmp_path / "run.json", "ours")
    assert (tmp_path / "run.json").read_text() == "ours"
    assert not (tmp_path / "run.json").is_symlink()
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_text_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor):
        events.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def watch_replace(source, target):
        events.append(f"rename {os.path.basename(source)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    whole_files.replace_text(tmp_path / "run.json", "text")
    assert events == ["sync run.json.new", "rename run.json.new"]


def test_what_a_link_leads_to_is_not_removed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / whole_files.ASIDE).symlink_to(tmp_path / "theirs")
    whole_files.remove_aside(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert (tmp_path / "theirs" / "file").exists()


def test_sizes_are_those_of_all_files(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "a").write_text("12")
    (tmp_path / "shards" / ".metadata").write_text("123")
    assert whole_files.measure_files(tmp_path) == {"a": 2, "shards/.metadata": 3}


ERRORS = [
    (OSError(errno.ENOSPC, "no room"), True),
    (OSError(errno.EDQUOT, "no room"), True),
    (OSError(errno.EFBIG, "too large"), False),
    (SafetensorError("I/O error: No space left on device (os error 28)"), True),
    (SafetensorError("I/O error: Permission denied (os error 13)"), False),
    (ValueError("os error 281"), False),
]


@pytest.mark.parametrize(("error", "is_out_of_space"), ERRORS)
def test_which_errors_room_would_mend(error, is_out_of_space):
    assert whole_files.is_out_of_space(error) == is_out_of_space
