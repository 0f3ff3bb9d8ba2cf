"""Printing never ends a run, and what is printed cannot steer a terminal."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from sft.console import printable, split_columns

ROOT = Path(__file__).resolve().parents[1]
START = "from sft.console import outlive_console, say; outlive_console(); import sys; "
MANY_LINES = "[print('x' * 99) for _ in range(1000)]; "  # far more than a buffer of 8 kB
LEAVE_A_MARK = "open(sys.argv[1], 'w').close()"


def run(code: str, *arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", START + code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, timeout=60, **options)


@pytest.fixture
def closed_pipe():
    """A pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        yield file


@pytest.fixture
def full_disk():
    """A file that has no room for a single byte."""
    with open("/dev/full", "w") as file:
        yield file


@pytest.mark.parametrize("lines", [MANY_LINES, "print('one line'); "])
@pytest.mark.parametrize("console", ["closed_pipe", "full_disk"])
def test_a_run_outlives_the_reader_of_its_stdout(request, tmp_path, console, lines):
    stdout = request.getfixturevalue(console)
    mark = tmp_path / "finished"
    done = run(lines + LEAVE_A_MARK, mark, stdout=stdout, stderr=subprocess.PIPE)
    assert mark.exists()
    assert done.returncode == 0
    assert done.stderr == b""


def test_a_run_outlives_the_reader_of_its_stderr(closed_pipe, tmp_path):
    lines = "[print('x' * 99, file=sys.stderr) for _ in range(1000)]; "
    done = run(lines + LEAVE_A_MARK, tmp_path / "finished", stderr=closed_pipe)
    assert (tmp_path / "finished").exists()
    assert done.returncode == 0


def test_a_run_starts_without_stdout_and_stderr(tmp_path):
    """As a service may start it, and as >&- 2>&- does in a shell."""
    code = START + "say('out'); say('err', sys.stderr); " + LEAVE_A_MARK
    command = 'exec "$@" >&- 2>&-'
    words = [sys.executable, "-c", code, str(tmp_path / "finished")]
    done = subprocess.run(["sh", "-c", command, "sh", *words], cwd=ROOT, timeout=60)
    assert (tmp_path / "finished").exists()
    assert done.returncode == 0


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_a_terminal_of_few_characters_shows_escapes(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = run(r"say('a \U0001f600 b')", env=environment, capture_output=True)
    assert done.stdout == rb"a \U0001f600 b" + b"\n"
    assert done.stderr == b""


def test_a_line_reaches_a_pipe_at_once():
    """A log file can be followed while the run goes on."""
    command = [sys.executable, "-c", START + "print('first'); sys.stdin.read()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe) as process:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        process.stdin.close()
        assert ready == [process.stdout]
        assert process.stdout.readline() == b"first\n"


def test_progress_is_shown_on_a_terminal_only():
    code = (
        "import datasets; from sft.console import quiet_libraries; quiet_libraries(); "
        "datasets.Dataset.from_dict({'a': [1]}).map(lambda row: row)"
    )
    environment = dict(os.environ)
    environment.pop("HF_DATASETS_DISABLE_PROGRESS_BARS")
    assert run(code, env=environment, stderr=subprocess.PIPE).stderr == b""


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("\x1b[31mred\x07\x9b") == r"\x1b[31mred\x07\x9b"
    assert printable("a\rb") == r"a\rb"
    assert printable("abc\u202ecba") == r"abc\u202ecba"
    assert printable("\u2067abc\u2069") == r"\u2067abc\u2069"
    assert printable("\ud800") == r"\ud800"


def test_text_is_printed_as_it_is():
    text = "tab\tand\nnewline, 中文, é, 😀, \u2028"
    assert printable(text) == text


def test_wide_characters_take_two_columns():
    assert split_columns("abcde", 3) == ["abc", "de"]
    assert split_columns("中文a字", 4) == ["中文", "a字"]
    assert split_columns("a中文", 4) == ["a中", "文"]
    assert split_columns("ＡＢ", 2) == ["Ａ", "Ｂ"]
    assert split_columns("", 4) == [""]
