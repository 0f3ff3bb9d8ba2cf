"""Kill and stop runs in every way, resume them, and compare with the run never stopped.

    python tests/crash.py                                                # as the tests run it
    python tests/crash.py --kills 50 --every 1 --resumes 8 --signals 4   # all of it

A run of two epochs on CPU, a checkpoint after each step, is killed at random moments, one process
or one of two that share a model in shards, and before every n-th system call of a save that also
deletes an old checkpoint, and of the export (Python's audit events, and fsync, which has none);
stopped by signals, in a pair of processes by one to the second; and resumed from each of its
checkpoints. In the end weights, the optimizer's state and losses must be those of the run never
stopped, bit for bit, and no checkpoint may be less than whole at any time.
"""

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import runs

os.environ |= runs.CPU_ONLY

import forks
import torch
from safetensors.torch import load_file

import sft_qwen2
from sft import callbacks
from sft.run_folder import (
    ASIDE,
    MANIFEST,
    WholeCheckpoints,
    check_checkpoint,
    whole_checkpoints,
)

STEPS, ROWS_PER_STEP = 6, 4
ROWS = STEPS * ROWS_PER_STEP // 2  # two epochs: the second one's order is to be found again, too
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}  # for 8-bit state
CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree")
SAVE = STEPS - 2  # the step whose save is killed: the one before is to be deleted in it
STATE = ("optimizer.pt", "scheduler.pt", ".distcp")  # ends of names, beside the weights


def make_data(path: Path, num_rows: int = ROWS) -> None:
    """Write the shortest rows of data/train.jsonl, in their order."""
    lines = (runs.ROOT / "data" / "train.jsonl").read_bytes().splitlines(keepends=True)
    longest = sorted(map(len, lines))[num_rows - 1]
    path.write_bytes(b"".join([line for line in lines if len(line) <= longest][:num_rows]))


def arguments(folder: Path, output_dir: Path, **flags) -> list[str]:
    places = {"model_name_or_path": folder / "model", "data_path": folder / "rows.jsonl"}
    usual = {"per_device_train_batch_size": ROWS_PER_STEP, "gradient_accumulation_steps": 1}
    usual |= {"num_train_epochs": 2, "learning_rate": 3e-3, "max_len": 512, "save_steps": 1}
    usual |= {"gradient_checkpointing": False, "report_to": "none", "output_dir": output_dir}
    return runs.argv(**(places | usual | flags))


# ---- In the processes that are to be stopped -----------------------------------------------------
def kill_at_call(where: str, number: int) -> None:
    """Die before that one of CALLS in the "export", or the "save" of step SAVE; 0: count them."""
    count, fsync, active = itertools.count(1), os.fsync, []
    name = {"export": "export", "save": "_save_checkpoint"}[where]
    method = getattr(WholeCheckpoints, name)

    def hook(event, args):
        if active and event in CALLS and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_fsync(descriptor):
        hook("open", ())
        fsync(descriptor)

    def watched(trainer, *args):
        active.extend([1] * (where == "export" or trainer.state.global_step == SAVE))
        method(trainer, *args)
        if active and number == 0:
            print(f"calls of {where}: {next(count) - 1}")
        active.clear()

    setattr(WholeCheckpoints, name, watched)
    os.fsync = counted_fsync
    sys.addaudithook(hook)


def count_calls() -> None:
    kill_at_call("save", 0)
    kill_at_call("export", 0)


def at_step(step: int, action, *args) -> None:
    """Let this process call action(*args) before it trains that step."""
    training_step = sft_qwen2.StepTrainer.training_step

    def watched(trainer, *rest):
        if trainer.state.global_step + 1 == step:
            action(*args)
        return training_step(trainer, *rest)

    sft_qwen2.StepTrainer.training_step = watched


# ---- Running and comparing -----------------------------------------------------------------------
def train(folder: Path, output_dir: Path, kind="one", last=None, outlive=0.0, **flags):
    """Run "one" process, a "pair" of them, or a pair with "shards"; the last calls last() first."""
    world = 1 if kind == "one" else 2
    flags = {"per_device_train_batch_size": ROWS_PER_STEP // world, **flags}
    actions = [[partial(forks.take_for_gpu, "bf16", True)] * (kind == "shards")] * world
    actions[-1] = actions[-1] + [last] * (last is not None)
    argv = arguments(folder, output_dir, **flags)
    calls = [(forks.main_after, each, argv) for each in actions]
    return forks.run(Path(f"{output_dir}.log"), *calls, outlive=outlive, cache=folder / "cache")


def losses(output_dir: Path) -> list[tuple]:
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(log[name] for name in names) for log in runs.read_logs(output_dir)]


def last_state(output_dir: Path) -> dict:
    """Return the digests of the last checkpoint's files of STATE."""
    manifest = json.loads((whole_checkpoints(output_dir)[-1] / MANIFEST).read_text())
    return {name: digest for name, digest in manifest.items() if name.endswith(STATE)}


def differences(reference: Path, output_dir: Path) -> list[str]:
    """Return in what a finished run differs from the reference; nothing if in nothing."""
    expected, weights = (load_file(x / "model.safetensors") for x in (reference, output_dir))
    names = [x for x in expected if x not in weights or not torch.equal(expected[x], weights[x])]
    found = [f"{len(names)} of {len(expected)} weights differ"] * bool(names)
    for what in (losses, last_state):
        found += [f"{what.__name__} differ"] * (what(reference) != what(output_dir))
    return found + ["something is left over"] * (output_dir / ASIDE).exists()


def finish(folder: Path, output_dir: Path, kind: str = "one", **flags) -> list[str]:
    """Check what is there, run to the end; return in what it differs from the reference."""
    for checkpoint in output_dir.glob("checkpoint-*"):
        check_checkpoint(checkpoint)
    ended = train(folder, output_dir, kind, **flags)
    if any(ended.codes):
        return [f"{output_dir.name}: {ended}"]
    found = differences(folder / kind, output_dir)
    return [f"{output_dir.name}: {problem}" for problem in found]


def run_kills(folder: Path, kind: str, kills: int, seed: int) -> tuple[dict, list[str]]:
    """Kill runs `kills` times at random moments, each run until it gets through; count."""
    rng, killed, in_saves, problems = random.Random(seed), 0, 0, []
    for number in range(4 * kills):
        output_dir, codes, step = folder / f"{kind}-{number}", None, 0
        while killed < kills and step < STEPS and (codes is None or any(codes)):
            # The alarm kills as SIGKILL does: nothing is installed to catch it.
            step, delay = rng.randint(step + 1, STEPS), rng.uniform(0.001, 0.1)
            last = partial(at_step, step, signal.setitimer, signal.ITIMER_REAL, delay)
            flags = {"outlive": rng.choice([0, 0.05, 0.5]), "resume": codes is not None}
            codes = train(folder, output_dir, kind, last, **flags).codes
            killed += codes[-1] == -signal.SIGALRM
            in_saves += (output_dir / ASIDE).exists()
        if codes:
            problems += finish(folder, output_dir, kind, resume=True)
    problems += [f"only {killed} kills"] * (killed < kills)
    return {f"kills_{kind}": killed, f"in_saves_{kind}": in_saves}, problems


def run_calls(folder: Path, where: str, number: int, every: int) -> tuple[dict, list[str]]:
    """Kill runs before every so many of the system calls of a save or of the export; count."""
    killed, problems = 0, []
    calls = range(1 + every // 2, number + 1, every)
    for call in calls:
        output_dir = folder / f"{where}-{call}"
        killed += train(folder, output_dir, last=partial(kill_at_call, where, call)).codes == [-9]
        steps = [int(path.name[11:]) for path in whole_checkpoints(output_dir)]
        if max(steps) not in ((SAVE - 1, SAVE) if where == "save" else (STEPS,)):
            problems.append(f"{output_dir.name}: the checkpoints are {steps}")
        problems += finish(folder, output_dir, resume=True)
    problems += [f"{where}: only {killed} kills"] * (killed < len(calls))
    return {f"calls_of_{where}": number, f"killed_in_{where}": killed}, problems


def run_resumes(folder: Path, resumes: int) -> tuple[dict, list[str]]:
    """Resume from each checkpoint of a run (the first so many, an epoch's last one among them)."""
    all_steps = folder / "all"
    problems = finish(folder, all_steps, save_total_limit=STEPS)
    steps = sorted(range(1, STEPS + 1), key=lambda step: abs(step - STEPS // 2))[:resumes]
    for step in steps:
        output_dir = folder / f"from-{step}"
        shutil.copytree(all_steps / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
        shutil.copy(all_steps / "run.json", output_dir)
        problems += finish(folder, output_dir, resume=True)
    return {"resumed_from": sorted(steps)}, problems


def run_signal(folder: Path, kind: str, number: int) -> tuple[dict, list[str]]:
    """Stop a run by a signal, of a pair of processes only the last; return what is wrong."""
    name = f"{signal.Signals(number).name}-{kind}"
    output_dir, last = folder / name, partial(at_step, 3, signal.raise_signal, number)
    ended = train(folder, output_dir, kind, last)
    saved = whole_checkpoints(output_dir)
    said, world = f"{saved[-1].name if saved else ''} is saved", len(ended.codes)
    right = ended.codes == [128 + number] * world and said in ended.texts[0]
    found = [] if right else [f"{name}: {ended}"]
    found += [f"{name} exported a model"] * (output_dir / "model.safetensors").exists()
    if kind == "pair" and not list(output_dir.glob("checkpoint-*/rng_state_1.pth")):
        found.append(f"{name} lacks a process's part")
    return {name: 1}, found + finish(folder, output_dir, kind, resume=True)


def crash(folder: Path, kills: int, seed: int, every: int, resumes: int, signals: int) -> dict:
    """Run all of it in the folder; return the counts and the differences."""
    runs.make_model(folder / "model", **SIZES)
    make_data(folder / "rows.jsonl")
    references = {}
    for kind, last in (("one", count_calls), ("pair", None), ("shards", None)):
        references[kind] = ended = train(folder, folder / kind, kind, last)
        assert not any(ended.codes) and len(losses(folder / kind)) == STEPS, ended
    ways = [("pair", signal.SIGTERM)]
    ways += [("one", number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)]
    results = [run_signal(folder, *way) for way in ways[:signals]]
    results += [run_kills(folder, kind, kills, seed) for kind in ("one", "shards")]
    for where, number in re.findall(r"calls of (\w+): (\d+)", references["one"].texts[0]):
        results.append(run_calls(folder, where, int(number), every))
    results.append(run_resumes(folder, resumes))
    counts = {name: count for found, _ in results for name, count in found.items()}
    return counts | {"differences": [problem for _, found in results for problem in found]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1, help="at random moments")
    parser.add_argument("--every", type=int, default=20, help="1: before each call of a save")
    parser.add_argument("--resumes", type=int, default=2, help="from so many checkpoints")
    parser.add_argument("--signals", type=int, default=1, help="so many of the four ways to stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep all files here")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="crash-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    callbacks.quiet_libraries()
    counts = crash(folder, args.kills, args.seed, args.every, args.resumes, args.signals)
    counts["total_s"] = round(time.monotonic() - began, 1)
    if not args.folder:
        shutil.rmtree(folder)
    print(json.dumps(counts, indent=2))
    return 1 if counts["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
