"""What is said to the user before and while a run begins."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
import time

import pytest
from conftest import ROOT


def assert_sentence(result) -> str:
    code, _, err = result
    assert code == 1 and "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_no_gpu_for_the_default_model(run_main):
    """Without a GPU the 7B is refused at once, with the command that works here."""
    begun = time.monotonic()
    assert "python sft_qwen2.py data/tiny.json" in assert_sentence(run_main())
    assert time.monotonic() - begun < 5


def test_a_model_that_is_not_there(run_main, tmp_path):
    """A model neither here nor on the hub is one sentence that says how to get one."""
    for name in ("no-such/model", tmp_path / "missing", tmp_path):
        argv = ["--model_name_or_path", name, "--data_path", ROOT / "data", "--report_to", "none"]
        message = assert_sentence(run_main(*argv, "--output_dir", tmp_path / "outputs"))
        assert str(name) in message and "download" in message


def test_no_compiler_for_the_8_bit_optimizer(run_main, tmp_path, monkeypatch):
    """It is asked for before the model is loaded, not found missing at the first step."""
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    argv = ["data/tiny.json", "--optim", "adamw_torch_8bit", "--output_dir", tmp_path / "outputs"]
    monkeypatch.chdir(ROOT)
    message = assert_sentence(run_main(*argv))
    assert "no-compiler" in message and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"use_sliding_window": True}])
def test_a_model_of_another_kind(config, run_main, tiny_model_dir, tmp_path):
    """A checkpoint that is no Qwen2 with full attention is refused before data is read."""
    whole = json.loads((tiny_model_dir / "config.json").read_text())
    del whole["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(whole | config))
    argv = ["--model_name_or_path", tmp_path, "--data_path", "missing", "--report_to", "none"]
    assert "Qwen2" in assert_sentence(run_main(*argv))


# ---- The process --------------------------------------------------------------------------------
IMPORT = """
import sys, logging, warnings
before = (list(logging.root.handlers), list(warnings.filters), list(sys.argv))
import sft_qwen2
assert before[0::2] == (list(logging.root.handlers), list(sys.argv))
heavy = [m for m in ("datasets", "wandb", "transformers.trainer") if m in sys.modules]
assert not heavy, heavy
"""


@pytest.mark.slow
def test_importing_has_no_effect(tmp_path):
    """Importing the script prints and writes nothing, and loads no Trainer."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    argv, options = [sys.executable, "-c", IMPORT], {"capture_output": True, "text": True}
    done = subprocess.run(argv, cwd=tmp_path, env=env, **options, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_console_that_lacks_characters(tmp_path):
    """On a console in GBK, what it cannot write is written as escapes: no run ends for that."""
    argv = [sys.executable, "sft_qwen2.py", "data/tiny.json", "--dry_run", "--system_prompt=🙂"]
    env = os.environ | {"PYTHONIOENCODING": "gbk"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode("gbk")
    assert b"\\U0001f642" in done.stdout and "example" in done.stdout.decode("gbk")


def run_at_a_terminal(folder, *flags) -> tuple[int, str]:
    """Return (exit code, output) of the script at a terminal of 80 columns, as a new user's."""
    argv = [sys.executable, ROOT / "sft_qwen2.py", *flags]
    env = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"HOME": str(folder), "TERM": "xterm"}
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = subprocess.Popen([str(arg) for arg in argv], cwd=ROOT, env=env, **streams)
    os.close(terminal)
    output = b""
    try:
        while block := os.read(ours, 65536):
            output += block
    except OSError:  # Linux's end of file at a terminal
        pass
    return process.wait(timeout=60), output.decode()


@pytest.mark.slow
def test_without_a_wandb_login(untied_model_dir, write_rows, tmp_path):
    """At a terminal, with wandb but no login, a run records offline, says so, and never asks."""
    data = write_rows([{"query": "q", "answer": "a"}])
    argv = ["--model_name_or_path", untied_model_dir, "--data_path", data, "--save_strategy", "no"]
    code, output = run_at_a_terminal(tmp_path, *argv, "--output_dir", tmp_path / "outputs")
    assert code == 0, output
    assert "offline" in output and "wandb sync" in output
    assert "(1) Create" not in output and "Enter your choice" not in output
    assert list((tmp_path / "outputs" / "wandb").glob("offline-run-*"))
    assert "\033[32ma<|im_end|>\033[0m" in output  # what is trained stands in green
    assert "Traceback" not in output


@pytest.mark.slow
def test_the_console_is_quiet(tmp_path):
    """A run of the stand-in: one bar that fits, 60 lines at most, none of them noise."""
    flags = ["data/tiny.json", "--max_steps", "12", "--logging_steps", "1"]
    code, output = run_at_a_terminal(tmp_path, *flags, "--output_dir", tmp_path / "outputs")
    assert code == 0, output
    lines = output.replace("\r\n", "\n").split("\n")
    shown = [re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", line) for line in lines]  # without cursor moves
    drawn = [part for line in shown for part in line.split("\r") if "it/s]" in part]
    assert any("12/12" in part for part in drawn) and max(map(len, drawn)) <= 80
    assert sum("'loss'" in line for line in lines) == 12  # log lines stay, each on a line
    assert len(lines) <= 60, output  # and the painted example is among them
    assert not re.search("warn|deprecat|Traceback|error", output, flags=re.I)
