"""Kill and stop runs in every way, resume them, and compare with the run that was never stopped.

    python tests/harness/crash.py                                            # as the tests run it
    python tests/harness/crash.py --kills 50 --every 1 --resumes 6 --signals 4   # all of it

A run has two epochs on the CPU and a checkpoint after each step. Some runs are killed at random
moments: one process, or one of two that share the model in shards. Some are killed at the system
calls of one save (which also deletes an old checkpoint), of the export, and of the write of
run.json. Some are stopped by signals, of a pair of processes by one to the second. Some resume from
an earlier checkpoint. Each is then resumed to its end. Its weights, optimizer state, schedule and
losses must be those of the run that was never stopped, bit for bit. No checkpoint may be less than
whole at any time.
"""

import argparse
import builtins
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import runs

os.environ.update(runs.CPU_ONLY)

import forks
import torch
from safetensors.torch import load_file

import sft_qwen2
from sft import run_record
from sft.console import quiet_libraries
from sft.errors import UserError
from sft.run_record import check_checkpoint, find_checkpoints, is_whole, step_of
from sft.whole_files import ASIDE

STEPS = 6
ROWS_PER_STEP = 4
NUM_ROWS = STEPS * ROWS_PER_STEP // 2  # two epochs: the order of the second is to be found, too
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}  # for 8-bit state
KILLED_SAVE = STEPS - 2  # the step whose save is killed; this save deletes an old checkpoint
AUDITED_CALLS = {
    "open",
    "os.chmod",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "shutil.rmtree",
}


def make_data(path: Path, num_rows: int = NUM_ROWS) -> None:
    """Write the shortest rows of data/train.jsonl, in their order."""
    lines = (runs.ROOT / "data" / "train.jsonl").read_bytes().splitlines(keepends=True)
    longest = sorted(map(len, lines))[num_rows - 1]
    short_lines = [line for line in lines if len(line) <= longest]
    path.write_bytes(b"".join(short_lines[:num_rows]))


def arguments(folder: Path, output_dir: Path, **flags) -> list[str]:
    """Return a command line for the folder's model and rows."""
    usual = {
        "model_name_or_path": folder / "model",
        "data_path": folder / "rows.jsonl",
        "output_dir": output_dir,
        "per_device_train_batch_size": ROWS_PER_STEP,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "max_len": 512,
        "save_steps": 1,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    return runs.argv(**{**usual, **flags})


# ---- In the processes that are to be killed -----------------------------------------------------
class CallCounter:
    """Counts a process's system calls on files, where it is active, and kills before one of them.

    These are Python's audit events, fsync, which has none, and the moment after a file was opened.
    """

    def __init__(self, killed_call: int | None = None):
        self.killed_call = killed_call
        self.is_active = False
        self.num_calls = 0
        sys.addaudithook(self.hear)
        os.fsync = self.call_before(os.fsync)
        builtins.open = self.call_after(builtins.open)
        io.open = builtins.open

    def count(self) -> None:
        if not self.is_active:
            return
        self.num_calls += 1
        if self.num_calls == self.killed_call:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event: str, args) -> None:
        if event in AUDITED_CALLS:
            self.count()

    def call_before(self, function):
        def counted(*args, **options):
            self.count()
            return function(*args, **options)

        return counted

    def call_after(self, function):
        def counted(*args, **options):
            result = function(*args, **options)
            self.count()
            return result

        return counted

    def watch(self, place: str, function, *args):
        """Return function(*args), counting; afterwards print the count."""
        self.is_active = True
        result = function(*args)
        self.is_active = False
        print(f"calls of {place}: {self.num_calls}")
        self.num_calls = 0
        return result


def watch_calls(place: str, killed_call: int | None = None) -> None:
    """Count the calls of a place, and die before that one of them."""
    counter = CallCounter(killed_call)
    write_record = run_record.write_record

    class CountingTrainer(sft_qwen2.SFTTrainer):
        def _save_checkpoint(self, *args):
            save = super()._save_checkpoint
            if place == "save" and self.state.global_step == KILLED_SAVE:
                counter.watch(place, save, *args)
            else:
                save(*args)

        def export(self, *args):
            export = super().export
            if place == "export":
                counter.watch(place, export, *args)
            else:
                export(*args)

    sft_qwen2.SFTTrainer = CountingTrainer
    if place == "record":
        run_record.write_record = lambda *args: counter.watch(place, write_record, *args)


def die_soon(delay_s: float) -> None:
    """Let an alarm kill this process as SIGKILL does: nothing is installed to catch it."""
    signal.setitimer(signal.ITIMER_REAL, delay_s)


# ---- Comparing ----------------------------------------------------------------------------------
def read_steps(output_dir: Path) -> list[tuple]:
    """Return what was logged of each step, but for times."""
    steps = []
    for log in runs.read_logs(output_dir):
        steps.append((log["step"], log["loss"], log["grad_norm"], log["learning_rate"]))
    return steps


def read_last_state(output_dir: Path) -> dict[str, bytes]:
    """Return the optimizer's and the schedule's files of the last checkpoint."""
    last = find_checkpoints(output_dir)[-1]
    state = {}
    for path in last.rglob("*"):
        if path.name in ("optimizer.pt", "scheduler.pt") or path.suffix == ".distcp":
            state[str(path.relative_to(last))] = path.read_bytes()
    return state


def differences(reference: Path, output_dir: Path) -> list[str]:
    """Return in what a finished run differs from the reference; nothing if in nothing."""
    found = []
    expected = load_file(reference / "model.safetensors")
    weights = load_file(output_dir / "model.safetensors")
    if list(expected) != list(weights):
        return ["the names of weights differ"]
    for name, weight in expected.items():
        if not torch.equal(weight, weights[name]):
            found.append(f"{name} differs")
    if read_steps(reference) != read_steps(output_dir):
        found.append("logged steps differ")
    if read_last_state(reference) != read_last_state(output_dir):
        found.append("the state of the optimizer or the schedule differs")
    if (output_dir / ASIDE).exists():
        found.append("something is left over")
    return found


# ---- Running ------------------------------------------------------------------------------------
@dataclass
class Crashes:
    """Runs in a folder that are killed, stopped and resumed: counts of them, and what went wrong.

    A kind of run is "one" process, a "pair" of them, or a pair that shares the model in "shards".
    """

    folder: Path
    num_killed: dict[str, int] = field(default_factory=dict)
    num_in_saves: dict[str, int] = field(default_factory=dict)
    num_calls: dict[str, int] = field(default_factory=dict)
    stopped_by: list[str] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def run(self, name: str, kind: str, *last_actions, outlive_s: float = 0.0, **flags):
        """Return a run that has ended; its last process calls the actions before main()."""
        output_dir = self.folder / name
        actions = []
        world_size = 2
        if kind == "one":
            world_size = 1
        if kind == "shards":
            actions.append((forks.take_for_gpu, "bf16", True))
        flags.setdefault("per_device_train_batch_size", ROWS_PER_STEP // world_size)
        words = arguments(self.folder, output_dir, **flags)
        calls = [(forks.main_after, actions, words)] * (world_size - 1)
        calls.append((forks.main_after, [*actions, *last_actions], words))
        log = Path(f"{output_dir}.log")
        return forks.run(log, *calls, outlive_s=outlive_s, cache=self.folder / "cache")

    def check_whole(self, name: str) -> None:
        """Note checkpoints that are less than whole."""
        for checkpoint in find_checkpoints(self.folder / name):
            try:
                check_checkpoint(checkpoint)
            except UserError as error:
                self.problems.append(f"{name}: {error}")

    def finish(self, name: str, kind: str, **flags) -> None:
        """Run to the end, and note in what the run differs from the reference of its kind."""
        self.check_whole(name)
        ended = self.run(name, kind, **flags)
        if any(ended.codes):
            self.problems.append(f"{name}: {ended}")
            return
        for difference in differences(self.folder / kind, self.folder / name):
            self.problems.append(f"{name}: {difference}")

    def make_reference(self, kind: str) -> None:
        ended = self.run(kind, kind)
        assert not any(ended.codes), ended
        assert len(read_steps(self.folder / kind)) == STEPS, ended

    def kill_at_random(self, kind: str, kills: int, seed: int) -> None:
        """Kill runs so many times, each run until it gets through to its end."""
        generator = random.Random(seed)
        self.num_killed[kind] = 0
        self.num_in_saves[kind] = 0
        num_runs = 0
        while self.num_killed[kind] < kills and num_runs < 4 * kills:
            num_runs += 1
            self.kill_until_done(f"{kind}-{num_runs}", kind, kills, generator)
        if self.num_killed[kind] < kills:
            self.problems.append(f"only {self.num_killed[kind]} kills of {kind}")

    def kill_until_done(self, name: str, kind: str, kills: int, generator) -> None:
        """Kill a run in later and later steps, and then resume it to its end."""
        step = 0
        is_done = False
        while not is_done and step < STEPS and self.num_killed[kind] < kills:
            step = generator.randint(step + 1, STEPS)
            delay_s = generator.uniform(0.001, 0.1)
            ended = self.run(
                name,
                kind,
                (forks.at_step, step, die_soon, delay_s),
                outlive_s=generator.choice([0, 0.05, 0.5]),
                resume=(self.folder / name).exists(),
            )
            is_done = not any(ended.codes)
            self.num_killed[kind] += ended.codes[-1] == -signal.SIGALRM
            self.num_in_saves[kind] += (self.folder / name / ASIDE).exists()
        if not is_done:
            self.finish(name, kind, resume=True)

    def kill_at_calls(self, place: str, every: int) -> None:
        """Kill runs at every so many of the system calls of a place."""
        counted = self.run(f"{place}-all", "one", (watch_calls, place))
        num_calls = int(re.search(rf"calls of {place}: (\d+)", counted.texts[0])[1])
        self.num_calls[place] = num_calls
        self.num_killed[place] = 0
        for call in range(1 + (every - 1) // 2, num_calls + 1, every):
            name = f"{place}-{call}"
            ended = self.run(name, "one", (watch_calls, place, call))
            if ended.codes == [-signal.SIGKILL]:
                self.num_killed[place] += 1
            else:
                self.problems.append(f"{name} was not killed: {ended}")
            self.check_progress(name, place)
            self.check_model(name)
            self.finish(name, "one", resume=True)

    def check_progress(self, name: str, place: str) -> None:
        """Note a killed run that has lost a checkpoint."""
        steps = []
        for checkpoint in find_checkpoints(self.folder / name):
            if is_whole(checkpoint):
                steps.append(step_of(checkpoint))
        last = max(steps, default=0)
        expected = {"record": [0], "save": [KILLED_SAVE - 1, KILLED_SAVE], "export": [STEPS]}
        if last not in expected[place]:
            self.problems.append(f"{name}: the last checkpoint is that of step {last}")

    def check_model(self, name: str) -> None:
        """Note a half-written model that looks whole: readers take a folder with a config.json."""
        output_dir = self.folder / name
        for part in ("model.safetensors", "tokenizer.json", "generation_config.json"):
            if (output_dir / "config.json").exists() and not (output_dir / part).exists():
                self.problems.append(f"{name} has a config.json, but no {part}")

    def resume_from_each(self, resumes: int) -> None:
        """Resume from so many checkpoints of a run, the last one of an epoch among them."""
        self.finish("all", "one", save_total_limit=STEPS)
        steps = sorted(range(1, STEPS + 1), key=lambda step: abs(step - STEPS // 2))
        for step in steps[:resumes]:
            name = f"from-{step}"
            checkpoint = f"checkpoint-{step}"
            shutil.copytree(self.folder / "all" / checkpoint, self.folder / name / checkpoint)
            shutil.copy(self.folder / "all" / "run.json", self.folder / name)
            self.finish(name, "one", resume=True)
            self.resumed_from.append(step)

    def stop_by_signal(self, kind: str, number: int) -> None:
        """Stop a run by a signal to its last process: all save, say so, and export nothing."""
        name = f"{signal.Signals(number).name}-{kind}"
        output_dir = self.folder / name
        ended = self.run(name, kind, (forks.at_step, 3, signal.raise_signal, number))
        self.stopped_by.append(name)
        if set(ended.codes) != {128 + number} or "checkpoint-3 is saved" not in ended.texts[0]:
            self.problems.append(f"{name}: {ended}")
        if (output_dir / "model.safetensors").exists():
            self.problems.append(f"{name} exported a model")
        if kind == "pair" and not (output_dir / "checkpoint-3" / "rng_state_1.pth").exists():
            self.problems.append(f"{name} lacks the second process's part")
        self.finish(name, kind, resume=True)


STOPS = [
    ("pair", signal.SIGTERM),
    ("one", signal.SIGINT),
    ("one", signal.SIGHUP),
    ("one", signal.SIGTERM),
]


def crash(folder: Path, kills: int, seed: int, every: int, resumes: int, signals: int) -> Crashes:
    """Return all crashes in the folder."""
    runs.make_model(folder / "model", **SIZES)
    make_data(folder / "rows.jsonl")
    crashes = Crashes(folder)
    for kind in ("one", "pair", "shards"):
        crashes.make_reference(kind)
    for kind, number in STOPS[:signals]:
        crashes.stop_by_signal(kind, number)
    for kind in ("one", "shards"):
        crashes.kill_at_random(kind, kills, seed)
    crashes.kill_at_calls("record", every=1)  # it has few
    crashes.kill_at_calls("save", every)
    crashes.kill_at_calls("export", every)
    crashes.resume_from_each(resumes)
    return crashes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1, help="at random moments")
    parser.add_argument("--every", type=int, default=20, help="1: at each system call")
    parser.add_argument("--resumes", type=int, default=2, help="from so many checkpoints")
    parser.add_argument("--signals", type=int, default=1, help="so many of the four ways to stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep all files here")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="crash-"))
    folder.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    began_s = time.monotonic()
    crashes = crash(folder, args.kills, args.seed, args.every, args.resumes, args.signals)
    results = asdict(crashes)
    results["folder"] = str(folder)
    results["total_s"] = round(time.monotonic() - began_s, 1)
    if not args.folder:
        shutil.rmtree(folder)
    print(json.dumps(results, indent=2))
    return int(bool(crashes.problems))


if __name__ == "__main__":
    sys.exit(main())
