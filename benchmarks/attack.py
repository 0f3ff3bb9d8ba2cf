"""Attack the script with full disks, bad files, tampered folders, wrong flags, signals and kills.

    python benchmarks/attack.py                          # a few of each kind, drawn by --seed
    python benchmarks/attack.py --number 0 --only files  # all of one kind

Every run must end in one sentence with exit code 1 or 2, or be the run that nothing happened to:
the same weights and losses to the bit, after --resume where it was stopped. No traceback, no code
from data, models or checkpoints, no escape sequence on the terminal, nothing of others touched.
Runs are forked from this process, as in tests/crash.py; as root, some disks are real ones (tmpfs).

Writes results/attack.json. Exit code 1: there were problems, which are printed.
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import crash  # first: it sets what torch reads when it is imported
import forks
import pyarrow as pa
import pyarrow.parquet
import runs
import torch

import sft_qwen2
from sft import arguments, encoded_rows, run_folder

LINE = b'{"query": "What is 2 + 2?", "answer": "4"}'
STEPS, SIGNALS = 4, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KINDS = ("flags", "files", "tampering", "disks", "signals", "kills")


class Touch:
    """What runs code when it is unpickled: it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def start(argv: list[str], log: Path, before) -> int:
    """Fork a run of the script, its output appended to the log; return its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 70
    try:
        before()
        code = sft_qwen2.main(argv)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float = 600) -> int | None:
    """Return the exit code (-signal if killed), or None once seconds have passed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


class Attacker:
    """Runs of the script in a folder; counts of what became of them, and problems."""

    def __init__(self, folder: Path):
        self.folder, self.ran, self.reference = folder, folder / "ran", folder / "reference"
        self.counts, self.problems, self.number, self.case = {}, [], 0, ""

    def problem(self, what: str) -> None:
        self.problems.append(f"{self.kind}, {self.case}: {what}")
        self.counts[self.kind]["problems"] += 1
        print(f"PROBLEM {self.problems[-1]}", flush=True)

    def new_folder(self) -> Path:
        """Return where a run may write, with a file in it that is not the run's."""
        self.number += 1
        output_dir = self.folder / f"run-{self.number}"
        output_dir.mkdir()
        (output_dir / "notes.txt").write_text("mine")
        return output_dir

    def argv(self, output_dir: Path, **flags) -> list[str]:
        """Return the arguments of the reference run: a bad row, and an evaluation on the way."""
        if flags.pop("evaluates", True):
            flags = {"eval_strategy": "steps", "eval_steps": 2} | flags
        flags = {"data_path": self.folder / "data"} | flags
        flags = {"num_train_epochs": 1, "skip_bad_rows": True} | flags
        return crash.arguments(self.folder, output_dir, **flags)

    def run(self, argv: list[str], before=lambda: None) -> int:
        """Start a run whose console is a pipe, which no full disk reaches; return its id."""
        self.number += 1
        console = self.folder / f"console-{self.number}"
        os.mkfifo(console)
        self.console = os.open(console, os.O_RDONLY | os.O_NONBLOCK)

        def begin():
            sys.stdout, sys.stderr = (
                os.fdopen(n, "w", 1, errors="backslashreplace", closefd=False) for n in (1, 2)
            )
            before()

        return start(argv, console, begin)

    def end(self, pid: int, console: int, seconds: float = 120) -> tuple[int | None, str]:
        """Wait; return (exit code, what the run said), having looked for what no run may do."""
        parts, until, code = [], time.monotonic() + seconds, None
        while code is None and time.monotonic() < until:
            code = wait(pid, 0.05)
            with suppress(BlockingIOError):
                while part := os.read(console, 2**16):
                    parts.append(part)
        os.close(console)
        text = b"".join(parts).decode(errors="replace")
        if code is None:
            os.kill(pid, signal.SIGKILL)
            wait(pid)
            self.problem(f"does not end: {text[-300:]}")
        for bad in ("Traceback", "\x1b"):
            if bad in text:
                self.problem(f"{bad!r}, exit code {code}: {text[text.index(bad) :][-600:]}")
        if self.ran.exists():
            self.ran.unlink()
            self.problem("code was run")
        return code, text

    def attempt(self, argv: list[str], before=lambda: None, finish=False, words="") -> int | None:
        """Run; it must be refused with a sentence that has these words, or, if it may, finish."""
        code, text = self.end(self.run(argv, before), self.console)
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        self.refused |= code in (1, 2)
        if code in (1, 2) and not (len(errors) == 1 and len(errors[0]) > 20 and words in text):
            self.problem(f"exit code {code} without its sentence: {text[-500:]}")
        elif code not in (1, 2) and not (code == 0 and finish):
            self.problem(f"exit code {code}: {text[-300:]}")
        return code

    def compare(self, output_dir: Path, before=lambda: None) -> None:
        """Resume the run; count it if it ends as the reference did."""
        for checkpoint in run_folder.whole_checkpoints(output_dir):
            run_folder.check_checkpoint(checkpoint)
        code, text = self.end(self.run(self.argv(output_dir, resume=True), before), self.console)
        found = crash.differences(self.reference, output_dir) if code == 0 else [text[-500:]]
        if found or (output_dir / "notes.txt").read_text() != "mine":
            self.problem(f"resumed, exit code {code}: {found}")
        self.counts[self.kind]["same"] += code == 0 and not found

    def run_shards(self, output_dir: Path, *actions, **more) -> tuple[list, str]:
        """Run two processes that share the model out; return (exit codes, what they said)."""
        more |= {"per_device_train_batch_size": crash.ROWS_PER_STEP // 2, "save_total_limit": 9}
        actions = [partial(forks.take_for_gpu, "fp32", True), *actions]
        call = (forks.main_after, actions, self.argv(output_dir, **more))
        ended = forks.run(self.folder / "shards.log", call, call)
        return ended.codes, "".join(ended.texts)

    def begin(self, kind: str) -> None:
        self.kind, self.counts[kind] = kind, Counter(tried=0, refused=0, same=0, problems=0)

    def draw(self, kind: str, cases: dict, number: int, rng: random.Random) -> None:
        """Call so many of {name: function}, drawn by chance; all for 0."""
        self.begin(kind)
        for self.case in rng.sample(sorted(cases), min(number or len(cases), len(cases))):
            self.refused = False
            cases[self.case]()
            self.counts[kind].update(tried=1, refused=self.refused)
            for left in self.folder.glob("run-*"):
                notes = left / "notes.txt"
                if notes.exists() and notes.read_text() != "mine":
                    self.problem("a file of others was changed")
                shutil.rmtree(left, ignore_errors=True)

    def set_up(self) -> None:
        """Make the model, the data, and the run to which nothing happens."""
        if (pid := os.fork()) == 0:  # the parent computes nothing: threads would not survive a fork
            runs.make_model(self.folder / "model")
            os._exit(0)
        wait(pid)
        train, validation = (self.folder / "data" / f"{x}.jsonl" for x in ("train", "validation"))
        train.parent.mkdir()
        crash.make_data(train, STEPS * crash.ROWS_PER_STEP)
        validation.write_bytes(b"\n".join(train.read_bytes().splitlines()[:2]))
        train.write_bytes(train.read_bytes() + b'{"query": "cut')
        self.reference.mkdir()
        code, text = self.end(self.run(self.argv(self.reference)), self.console)
        assert code == 0, text


def at(owner, name: str, action) -> None:
    """Let the function or method of this name call action() before anything else."""
    function = getattr(owner, name)

    def acting(*args, **kwargs):
        action()
        return function(*args, **kwargs)

    setattr(owner, name, acting)


def moments(cache: Path) -> dict:
    """Return {name of a moment: function that lets this process call action() then}."""

    def encoding(action):
        os.environ["HF_DATASETS_CACHE"] = str(cache)
        encoded_rows.BYTES_PER_PROCESS = 500  # in several processes
        at(encoded_rows, "encode_parts", action)

    return {
        "start": lambda action: (
            os.environ.update(HF_DATASETS_CACHE=str(cache)),
            at(sft_qwen2, "run", action),
        ),
        "encoding": encoding,
        "record": lambda action: at(run_folder, "lock_folder", action),
        "rejected": lambda action: at(encoded_rows, "write_rejected", action),
        "load": lambda action: at(sft_qwen2, "load_model", action),
        **{f"step {n}": lambda action, n=n: crash.at_step(n, action) for n in (1, 2, STEPS)},
        "evaluation": lambda action: at(sft_qwen2.StepTrainer, "evaluate", action),
        "save": lambda action: at(run_folder.WholeCheckpoints, "_save_checkpoint", action),
        "manifest": lambda action: at(run_folder, "describe_files", action),
        "export": lambda action: at(run_folder.WholeCheckpoints, "export", action),
        "answers": lambda action: at(sft_qwen2.answers, "print_answers", action),
    }


# ---- Tables -------------------------------------------------------------------------------------
# Values to refuse, beside those beyond the ranges of flags.toml: a flag, then values.
FLAGS = r"""
overflow_strategy|x||None; lr_scheduler_type|x||None; eval_strategy|x||None; log_level|x||None
logging_strategy|x||None; skip_bad_rows|maybe|2|nan; fp32|maybe|2|nan; resume|maybe|2; dry_run|maybe
gradient_checkpointing|maybe|2|nan; load_best_model_at_end|maybe|2; use_cpu|maybe|2|nan
full_determinism|maybe|2; disable_tqdm|maybe|2; logging_first_step|maybe|nan; data_path|no\0where|*.x|
device_map||cpu|{|[]|{"model": "cpu"}|{"model": 0.5}|{"": null}; model_name_or_path|gpt2|a\0b||../..
gpus||x|4x|0x80|-1x80|4x80,|999x80|4x0|4x80:int8; report_to|x||[|[1]|{"a": 1}|wandb,x|[[]]
lr_scheduler_kwargs|{|[]|1|{"x": 1}|{"num_cycles": "a"}|{"num_cycles": null}; output_dir||a\0b|\udcff\0
output_dir|notes.txt|notes.txt/x|/proc/x|/dev/null|/dev/null/x; system_prompt|<|im_end|>
"""
ARGUMENT_FILES = r"""
[1]; 1; "x"; {"a"; ; null; {"seed": 1, "seed": 2}; {"sede": 1}; {"seed": [1]}; {"seed": NaN}; {"": 1}
{"a b": 1}; {"-h": 1}; {"fp32": 3}; {"data_path": 1}; {"data_path": [1]}; {"data_path": []}; {"\ud800": 1}
{"output_dir": {}}; {"output_dir": "a\u0000"}; {"gpus": "4x80\n", "dry_run": true}; {"seed": 1}}
"""
# Lines of JSONL to refuse. $u and $a are turns, $w the beginning of an assistant's.
ROWS = r"""
1; "x"; "\u001b[2J"; [1]; []; {}; null; NaN; true; {"query": "a"; {"query": "a", "answer": "b"}}; "
{"query": "a", "query": "b", "answer": "c"}; {"query": "a", "answer": ""}; {"query": "a", "answer": " "}
{"query": "a", "answer": 1}; {"query": "a", "answer": null}; {"query": "a", "answer": []}
{"query": {}, "answer": "b"}; {"query": true, "answer": "b"}; {"query": "a\u0000", "answer": "b"}
{"query": "a", "answer": "\ud800"}; {"query": "\udfff\ud800", "answer": "b"}; {"messages": "x"}
{"instruction": "a", "output": "b"}; {"query": "a", "answer": "b", "tools": [1]}; {"messages": []}
{"query": "a", "answer": "b", "image": [1]}; {"query": "a", "answer": "b", "history": [["a", "b"]]}
{"query": "a", "answer": "b", "weight": 0}; {"query": "a", "answer": "b", "system": [1]}
{"messages": ["x"]}; {"messages": [[]]}; {"messages": [$u]}; {"messages": [$a, $u]}; {"messages": [$a]}
{"messages": [$u, $a, $u]}; {"messages": {"role": "user"}}; {"messages": [null, $u, $a]}
{"messages": [$u, $w "weight": 2}]}; {"messages": [$u, $w "weight": "0"}]}; {"messages": [$u, $w "loss": []}]}
{"messages": [$u, $w "weight": {}}]}; {"messages": [$u, $w "weight": 0}]}; {"messages": [$u, $w "loss": 0.5}]}
{"messages": [$u, $w "tool_calls": "x"}]}; {"messages": [$u, $w "name": "x"}]}; {"messages": [$u, {}]}
{"messages": [{"role": [], "content": "x"}, $a]}; {"messages": [{"role": "\u001b[2J", "content": "x"}, $a]}
{"messages": [{"role": "tool", "content": "x"}, $a]}; {"messages": [{"role": null, "content": "x"}, $a]}
{"messages": [{"role": "system", "content": 1}, $u, $a]}; {"messages": [{"role": "system"}, $u, $a]}
{"messages": [$u, $a], "query": "a", "answer": "b"}; {"messages": [{"role": "user"}, $a]}
"""
TABLES = r"""
a,b\n1,2\n; query,query\na,b\n; query,answer\na,b\n"x; query,answer\na,b\na,b,c\n; query,answer\na,b\na\n
query\nx\n; query,answer\na,b\n\0,x\n; \nquery,answer\na,b\n; ,\n,\n; query,answer\n"a"b,c\n
\x1b[2J,answer\na,b\n; query,answer; answer\nx\n; query,answer\na,b\n"a\n; query,answer\na,\xff\n
"""
TEXTS = r"""
[; []; {}; null; 1; ["\u001b[2J"]; [""]; [NaN]; [[{"query": "a", "answer": "b"}]]; [{"query": "a"}
{"data": [{"query": "a", "answer": "b"}]}; [{"query": "a", "answer": "b"}]]; [{"query": "a", "answer": "\xc4"}]
"""
TEMPLATES = """{{ x.__class__.__mro__ }}; {% for i in range(10**9) %}{% endfor %}; {{; {{ 1 / 0 }}
{% include '/etc/passwd' %}; {{ raise_exception('x') }}; ; {{ messages[9].x.y }}; {{ cycler.__init__ }}"""
WAYS = ("flip", "flip again", "half", "empty", "remove", "pickle", "plain pickle", "[]", "null")
VALUES = (None, -1, 0, "x", 1e30, [], {}, True, 10**9)


def split(table: str) -> list[str]:
    return [x for line in table.strip("\n").splitlines() for x in line.split("; ")]


def unescape(text: str) -> bytes:
    """Return the bytes that a text with escapes of Python means."""
    return text.encode().decode("unicode_escape").encode("latin-1")


# ---- The kinds of attacks: {name of a case: function} -------------------------------------------
def flags(attacker: Attacker, rng: random.Random) -> dict:
    """Values of each flag, and files of arguments, that must be refused."""
    table, wrong, dry = arguments.FLAGS, [], {"dry_run": True}
    for name, interval in table["range"].items():
        low, high = interval[1:-1].split(", ")
        beyond = [high if interval[-1] == ")" else f"{float(high) * 2:.0f}", "nan", "inf", "-2"]
        beyond += [low] if interval[0] == "(" else []
        wrong += [(name, x) for x in (*beyond, "many", "1e999", "0x10", "1,5")]
    wrong += [(name, "x") for x in ("choice", "refused", "hint") for name in table[x]]
    for name, *values in (x.split("|") for x in split(FLAGS)):
        values = ["<|im_end|>"] if name == "system_prompt" else values
        wrong += [(name, x.replace(r"\0", "\0").replace(r"\udcff", "\udcff")) for x in values]

    def case(name, value):
        folder = attacker.new_folder()
        value = str(folder / value) if name == "output_dir" and value else value
        more = {} if name in ("output_dir", "dry_run") else dry
        attacker.attempt([*attacker.argv(folder, **more), f"--{name}", value])

    def file_case(text):
        path = attacker.new_folder() / "arguments.json"
        path.write_text(text)
        attacker.attempt([str(path), *attacker.argv(path.parent, **dry)[2:]])

    cases = {f"--{name} {x!r}": partial(case, name, x) for name, x in wrong}
    files = [*split(ARGUMENT_FILES), "[" * 10**5, '{"seed": ' + "1" * 5000 + "}"]
    cases |= {f"file {text!r:.40}": partial(file_case, text) for text in files}
    for odd in ("--seed", "seed", "--=1", "--", "-x", "no.json", "--seed 1 2"):
        argv = [*odd.split(), *attacker.argv(attacker.folder / "x", **dry)]
        cases[odd] = partial(attacker.attempt, argv)
    return cases


def bad_tables(rng: random.Random) -> dict[str, bytes]:
    """Return files of Parquet that must be refused."""
    strings, year = pa.array(["a", "b"]), pa.array([2**62, 1], pa.timestamp("us"))
    bad = pa.array([b"\xff\xfe", b"\xc4"]).buffers()
    columns = {"ints": pa.array([1, 2]), "nulls": pa.nulls(2), "bytes": pa.array([b"a", b"b"])}
    columns |= {"lists": pa.array([["a"]] * 2), "structs": pa.array([{"a": "b"}] * 2)}
    columns |= {"text": pa.Array.from_buffers(pa.string(), 2, [None, *bad[1:]]), "years": year}
    columns |= {"maps": pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int32()))}
    columns |= {"null": pa.array(["a", None]), "good": strings}
    tables = {name: pa.table({"query": strings, "answer": x}) for name, x in columns.items()}
    tables |= {"other": pa.table({"a": strings}), "no rows": pa.table({"query": strings})[:0]}
    tables["twice"] = pa.Table.from_arrays([strings] * 3, ["query", "answer", "answer"])
    tables["odd years"] = pa.table({"query": strings, "answer": strings, "x": year})
    files = {}
    for name, table in tables.items():
        pyarrow.parquet.write_table(table, sink := pa.BufferOutputStream())
        files[name] = sink.getvalue().to_pybytes()
    good = files.pop("good")
    return files | {f"cut at {i}": good[:i] for i in (4, 50, len(good) // 2, len(good) - 1)}


def files(attacker: Attacker, rng: random.Random) -> dict:
    """Rows, files and paths that must be refused, each also with --skip_bad_rows."""

    def read(path, words="", finish=False, before=lambda: None):
        for skip in (False, True):
            more = {"skip_bad_rows": skip, "dry_run": not skip, "save_strategy": "no"}
            argv = attacker.argv(attacker.new_folder(), evaluates=False, data_path=path, **more)
            attacker.attempt(argv, before, finish or skip, words)

    def case(name, content, place=""):
        path = attacker.new_folder() / name
        path.write_bytes(content)
        read(path, f"{path}:{place}")

    def special(make, finish=False, change=None):
        folder = attacker.new_folder()
        (folder / "notes.jsonl").write_bytes(LINE)
        path = make(folder) or folder
        act = lambda: change and change(path / "train.jsonl")
        read(path, "", finish, lambda: at(encoded_rows, "encode_parts", act))

    def named(*names, content=LINE):
        return lambda folder: [(folder / name).write_bytes(content) for name in names] and None

    turn = '{"role": "%s", "content": "x"}'
    rows = ROWS.replace("$u", turn % "user").replace("$a", turn % "assistant")
    rows = [x.encode() for x in split(rows.replace("$w", turn[:-1] % "assistant" + ","))]
    rows += [b'"\x1b[2J"', b"\0" + LINE, LINE.decode().encode("utf-16-le"), "“好".encode("gbk")]
    rows += [LINE[:-1] + b', "x": ' + x + b"}" for x in (b"[" * 10**5 + b"]" * 10**5, b"1" * 5000)]
    cases = {f"row {row[:70]}": partial(case, "train.jsonl", LINE + b"\n" + row + b"\n" + LINE, "2: ")
             for row in rows}  # fmt: skip
    whole = [b"", b"\n \n", b"\xef\xbb\xbf", b"\xff\xfe{\0", bytes(4096), rng.randbytes(4096)]
    whole += [b"\x1f\x8b" + rng.randbytes(99), b"\xef\xbb" + LINE, b"PAR1" + rng.randbytes(99)]
    for suffix in ("jsonl", "json", "csv", "parquet"):
        name = f"train.{suffix}"
        cases |= {f"{name} {i}": partial(case, name, x) for i, x in enumerate(whole)}
    for name, table in {"train.csv": TABLES, "train.json": TEXTS}.items():
        texts = [text if name == "train.json" else unescape(text) for text in split(table)]
        texts = [text.encode() if isinstance(text, str) else text for text in texts]
        cases |= {f"{name} {text!r}": partial(case, name, text) for text in texts}
    cases["lines"] = partial(case, "train.jsonl", LINE + b"\r" + LINE)
    for name, content in bad_tables(rng).items():
        cases[f"parquet {name}"] = partial(case, "train.parquet", content)
    link = lambda target: lambda folder: os.symlink(target, folder / "train.jsonl")
    makes = {
        "folder": lambda x: (x / "train.jsonl").mkdir(),
        "pipe": lambda x: os.mkfifo(x / "train.json"),
    }
    makes |= {
        "loop": link("train.jsonl"),
        "endless": link("/dev/zero"),
        "dangling": link("nowhere"),
    }
    makes |= {
        "nothing": lambda x: None,
        "glob": lambda x: x / "*.jsonl",
        "device": lambda x: "/dev/null",
    }
    makes |= {"bidi": named("train\u202e.csv"), "escape": named("train\x1b[2J.jsonl")}
    makes |= {"part": named("train-00000-of-00002.jsonl"), "two": named("train.csv", "train.json")}
    fine = {x: named(x) for x in ("train\n.jsonl", "train\udcff.jsonl", "train[0-9]*?.jsonl")}
    hidden = {"query": "\x1b[2J\x07\u202e", "answer": "b", "\x1b]0;x": 1, "n": float("inf")}
    fine["hidden"] = named("train.jsonl", content=json.dumps(hidden).encode())
    cases |= {x: partial(special, make, x in fine) for x, make in (makes | fine).items()}
    new = lambda folder: named("train.jsonl", content=LINE + b" " * rng.randrange(99))(folder)
    changes = {"grows": lambda path: path.write_bytes(LINE * 2), "is gone": Path.unlink}
    changes["is replaced"] = lambda path: os.replace(path.with_name("notes.jsonl"), path)
    return cases | {f"{x} while read": partial(special, new, False, f) for x, f in changes.items()}


def damage(path: Path, how: str, ran: Path, rng: random.Random) -> None:
    """Change a file in one of the WAYS."""
    content = path.read_bytes()
    i = rng.randrange(min(len(content), 4096))
    flipped = content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1 :]
    if how == "remove":
        path.unlink()
    elif how == "pickle":
        torch.save(Touch(ran), path)
    else:
        texts = {"half": content[: len(content) // 2], "empty": b"", "[]": b"[]", "null": b"null"}
        path.write_bytes({"plain pickle": pickle.dumps(Touch(ran)), **texts}.get(how, flipped))


def edit(path: Path, values: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tampering(attacker: Attacker, rng: random.Random) -> dict:
    """Changed files of checkpoints (of one process, and of two shards), records and models."""
    folder, cases, ran = attacker.folder, {}, attacker.ran
    stop = lambda: crash.at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    (folder / "one").mkdir()
    attacker.end(attacker.run(attacker.argv(folder / "one"), stop), attacker.console)
    assert attacker.run_shards(folder / "two")[0] == [0, 0]
    bases = {"one": folder / "one" / "checkpoint-3", "two": folder / "two" / "checkpoint-2"}

    def resumed(base, change, manifest=True, shards=False):
        output_dir = attacker.new_folder()
        checkpoint = output_dir / bases[base].name
        shutil.copytree(bases[base], checkpoint)
        shutil.copy(bases[base].parent / "run.json", output_dir)
        change(checkpoint)
        if manifest:
            found = json.dumps(run_folder.describe_files(checkpoint))
            (checkpoint / run_folder.MANIFEST).write_text(found)
        if shards:
            codes, text = attacker.run_shards(output_dir, resume=True)
            attacker.refused = codes == [1, 1] and "Traceback" not in text and not ran.exists()
            if not attacker.refused:
                attacker.problem(f"two processes, {codes}: {text[-900:]}")
        else:
            attacker.attempt(attacker.argv(output_dir, resume=True), finish=manifest)

    def trained(change):
        model = attacker.new_folder() / "model"
        shutil.copytree(folder / "model", model)
        change(model)
        more = {"model_name_or_path": model, "max_steps": 1, "save_strategy": "no"}
        attacker.attempt(attacker.argv(attacker.new_folder(), **more), finish=True)

    for how in WAYS:
        hurt = lambda name, how=how: lambda x: damage(x / name, how, ran, rng)
        for base, checkpoint in bases.items():
            for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
                name = str(path.relative_to(checkpoint))
                for known in (False, True):
                    case = partial(resumed, base, hurt(name), known)
                    cases[f"{base}: {name} {how}{', with a manifest to match' * known}"] = case
                if how == "plain pickle" and (".metadata" in name or "distcp" in name):
                    cases[f"shards: {name}"] = partial(resumed, base, hurt(name), True, True)
        cases[f"run.json {how}"] = partial(resumed, "one", hurt("../run.json"))
        for path in sorted((folder / "model").iterdir()):
            cases[f"model: {path.name} {how}"] = partial(trained, hurt(path.name))
    keys = "global_step epoch log_history stateful_callbacks best_model_checkpoint max_steps x"
    for key, value in itertools.product(keys.split(), (*VALUES, "../..", [1])):
        change = lambda x, k=key, v=value: edit(x / "trainer_state.json", {k: v})
        cases[f"state {key} {value}"] = partial(resumed, "one", change)
    targets = ("notes.txt", "..", "nowhere")
    names = (run_folder.LOCK, run_folder.ASIDE, "metrics.jsonl", "rejected.jsonl", "run.json.new")
    for name, target in itertools.product(names, targets):
        change = lambda x, n=name, t=target: os.symlink(t, x.parent / n)
        cases[f"link {name} to {target}"] = partial(resumed, "one", change)
    evil = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n"
    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    code = {"auto_map": auto | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}

    def coded(model, name, values):
        (model / "custom_generate").mkdir()
        for path in (model / "evil.py", model / "custom_generate" / "generate.py"):
            path.write_text(evil)
        edit(model / name, values)

    own = [code, code | {"model_type": "evil"}, {"tokenizer_class": "Evil"}, {"model_type": "evil"}]
    own += [{"custom_generate": "evil.py"}, {"quantization_config": {"quant_method": "bnb"}}]
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        for values in own:
            change = lambda x, n=name, v=values: coded(x, n, v)
            cases[f"code: {name} {values}"] = partial(trained, change)
        known = json.loads((folder / "model" / name).read_text())
        for key, value in itertools.product(known, VALUES):
            change = lambda x, n=name, k=key, v=value: edit(x / n, {k: v})
            cases[f"model: {name} {key} {value!r}"] = partial(trained, change)
    extra = {f"template {x}": ("chat_template.jinja", x) for x in split(TEMPLATES)}
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../x.safetensors"}}
    extra["index"] = ("model.safetensors.index.json", json.dumps(index))
    for name in ("adapter_config.json", "added_tokens.json", "vocab.json", "processor_config.json"):
        extra[f"also {name}"] = (name, "{")
    for name in ("pytorch_model.bin", "adapter_model.bin", "model-00001-of-00002.safetensors"):
        extra[f"also {name}"] = (name, "x")
    for name, (path, text) in extra.items():
        cases[name] = partial(trained, lambda x, p=path, t=text: (x / p).write_text(t))
    weights = "model.safetensors"
    for name in ("pytorch_model.bin", "model.safetensors.index.json"):  # in place of the weights
        change = lambda x, n=name: torch.save(Touch(ran), (x / weights).rename(x / n))
        cases[f"only {name}"] = partial(trained, change)
    return cases


def disks(attacker: Attacker, rng: random.Random) -> dict:
    """No file can grow beyond a size from a moment on; or the disk is small."""

    def room(output_dir, before=lambda: None, make_room=lambda: None):
        if attacker.attempt(attacker.argv(output_dir), before, finish=True) == 0:
            if not run_folder.whole_checkpoints(output_dir):  # no room for one; nothing to resume
                return
            for found in crash.differences(attacker.reference, output_dir):
                if found != "last_state differ":  # the last checkpoint may be the one without room
                    attacker.problem(f"exit code 0, but {found}")
        make_room()
        attacker.compare(output_dir)

    def full(moment, size):
        output_dir = attacker.new_folder()
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        room(output_dir, lambda: moments(output_dir / "cache")[moment](limit))

    def small(size, of_cache):
        output_dir = attacker.new_folder()
        disk, start = output_dir / ("cache" * of_cache), moments(output_dir / "cache")["start"]
        disk.mkdir(exist_ok=True)
        mount = lambda how: subprocess.run(
            f"mount -t tmpfs -o {how} none {disk}", shell=True, check=True
        )
        mount(f"size={size}k")
        try:
            (output_dir / "notes.txt").write_text("mine")
            before = partial(start, int) if of_cache else lambda: None
            room(output_dir, before, lambda: mount("remount,size=99m"))
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def shards(size):
        output_dir, reference = attacker.new_folder(), attacker.folder / "shards"
        if not reference.exists():
            assert attacker.run_shards(reference)[0] == [0, 0]
        limit = (resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        codes, text = attacker.run_shards(output_dir, partial(resource.setrlimit, *limit))
        if "Traceback" in text or set(codes) - {0, 1}:
            attacker.problem(f"{codes}: {text[-900:]}")
        codes, text = attacker.run_shards(output_dir, resume=True)
        found = crash.differences(reference, output_dir) if codes == [0, 0] else [text[-900:]]
        attacker.counts["disks"]["same"] += not found
        [attacker.problem(f"resumed: {x}") for x in found]

    sizes, cases = (0, 200, 10_000, 1_000_000, 2_000_000), {}
    for moment, size in itertools.product(moments(attacker.folder), sizes):
        cases[f"{moment}, {size} bytes"] = partial(full, moment, size)
    cases |= {f"shards, {x} bytes": partial(shards, x) for x in (20_000, 300_000, 1_000_000)}
    if os.getuid() == 0:
        for size in (8, 16, 64, 300, 1000, 2000, 3000, 4500, 5000, 6000, 7000, 9000, 12000, 14000):
            cases[f"disk of {size} KiB"] = partial(small, size, False)
        cases |= {f"cache of {x} KiB": partial(small, x, True) for x in (4, 8, 12, 16, 20)}
    return cases


def signals(attacker: Attacker, rng: random.Random) -> dict:
    """A signal at a moment, once or twice, or at any time; and two runs in one folder."""

    def stopped(number, moment, pauses):
        output_dir = attacker.new_folder()

        def send():
            for pause in pauses:
                os.kill(os.getpid(), number)
                time.sleep(pause)

        def before():
            if isinstance(moment, str):
                moments(output_dir / "cache")[moment](send)
            else:
                threading.Timer(moment, send).start()

        code, text = attacker.end(attacker.run(attacker.argv(output_dir), before), attacker.console)
        if code not in (0, 128 + number, -number):
            attacker.problem(f"exit code {code}: {text[-500:]}")
        attacker.compare(output_dir)

    def two_runs(step):
        output_dir = attacker.new_folder()
        argv, pause = attacker.argv(output_dir), partial(crash.at_step, step, time.sleep, 6)
        first, console = attacker.run(argv, pause), attacker.console
        time.sleep(3)
        attacker.attempt([*argv, "--resume", "True"], words="in use by")
        if attacker.end(first, console)[0] != 0:
            attacker.problem("the first of two runs did not end")
        attacker.compare(output_dir)

    cases = {f"two runs, {step}": partial(two_runs, step) for step in (1, 3)}
    for number in SIGNALS:
        times = {"once": [0], "twice": [0, 0], "twice, later": [1.2, 0]}
        for moment, (name, pauses) in itertools.product(moments(attacker.folder), times.items()):
            cases[f"{number.name} at {moment}, {name}"] = partial(stopped, number, moment, pauses)
        for i in range(6):
            cases[f"{number.name} at any time, {i}"] = partial(
                stopped, number, rng.uniform(0, 3), [0]
            )
    return cases


def kills(attacker: Attacker, number: int) -> None:
    """Run tests/crash.py; count its kills."""
    few = ["--kills", str(number), "--every", "30", "--resumes", "2", "--signals", "1"]
    all_of_it = ["--kills", "50", "--every", "1", "--resumes", "8", "--signals", "4"]
    command = [sys.executable, str(ROOT / "tests" / "crash.py"), *(few if number else all_of_it)]
    done = subprocess.run(command, capture_output=True, text=True)
    attacker.begin("kills")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    [attacker.problem(what[-900:]) for what in found["differences"]]
    tried = sum(n for name, n in found.items() if name.startswith("kill"))
    attacker.counts["kills"].update(tried=tried, same=tried - len(found["differences"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--number", type=int, default=8, help="of each kind; 0: all there are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", default="", help="only those whose names have this text")
    args = parser.parse_args()
    folder, began = Path(tempfile.mkdtemp(prefix="attack-")), time.monotonic()
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    importlib.import_module("imported")  # for every fork
    attacker = Attacker(folder)
    attacker.set_up()
    for kind in args.only:
        rng = random.Random(args.seed)
        if kind == "kills":
            kills(attacker, args.number)
        else:
            cases = {k: v for k, v in globals()[kind](attacker, rng).items() if args.case in k}
            attacker.draw(kind, cases, args.number, rng)
        print(
            f"{kind}: {dict(attacker.counts[kind])}, {time.monotonic() - began:.0f} s", flush=True
        )
    print("| attack | tried | refused | same after resume | problems |\n|---|--:|--:|--:|--:|")
    for kind, counts in attacker.counts.items():
        print(f"| {kind} | {' | '.join(map(str, counts.values()))} |")
    path = ROOT / "benchmarks" / "results" / "attack.json"
    about = json.loads(path.read_text()) if path.exists() else {}
    versions = {x: importlib.metadata.version(x) for x in ("torch", "transformers")}
    for kind, counts in attacker.counts.items():
        about[kind] = {"command": " ".join(sys.argv[1:]), "versions": versions, **counts}
    path.write_text(json.dumps(about, indent=1) + "\n")
    shutil.rmtree(folder)
    return 1 if attacker.problems else 0


if __name__ == "__main__":
    sys.exit(main())
