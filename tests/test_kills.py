"""Runs that are killed or stopped, at any moment, resume to the same weights, bit for bit."""

import json
import subprocess
import sys

import pytest
from runs import ROOT


@pytest.fixture(scope="module")
def crashes(tmp_path_factory) -> dict:
    """What tests/harness/crash.py counted; its text says how runs are killed and compared."""
    folder = tmp_path_factory.mktemp("crashes")
    command = [sys.executable, str(ROOT / "tests" / "harness" / "crash.py"), "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert "{" in done.stdout, done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.slow
def test_runs_resume_as_if_nothing_had_happened(crashes):
    assert crashes["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["one", "shards", "record", "save", "export"])
def test_runs_were_killed_in_every_place(crashes, where):
    assert crashes["num_killed"][where] > 0


@pytest.mark.slow
def test_runs_were_stopped_by_a_signal_and_resumed_from_earlier_checkpoints(crashes):
    assert len(crashes["stopped_by"]) > 0
    assert len(crashes["resumed_from"]) > 1
