"""Kill a run again and again, resume it each time, and compare it with the run never stopped.

    python benchmarks/crash.py --kills 50

A run of 40 steps on CPU, a checkpoint after each, meets SIGKILL at random moments: every second
one is aimed at a checkpoint being written, the others anywhere from the first line of main on.
After the last resume the weights must be equal bit for bit, and metrics.jsonl must hold every step
once, with the same loss. SIGTERM and SIGINT must save, exit with 128 + signal, and resume just as
exactly.

This process imports everything once and forks every run from there: a start costs no imports.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {  # before torch and datasets are imported
    "CUDA_VISIBLE_DEVICES": "",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # a thread pool would not survive the fork
    "TOKENIZERS_PARALLELISM": "false",
}
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import sft_qwen2  # noqa: E402

STEPS, ROWS_PER_STEP = 40, 5
ROWS = STEPS * ROWS_PER_STEP // 2  # two epochs: the second one's order is to be found again, too


def make_model(folder: Path) -> None:
    """Save a Qwen2 with random weights and the vocabulary of data/tiny-qwen2, but half as wide."""
    config = transformers.AutoConfig.from_pretrained(ROOT / "data" / "tiny-qwen2")
    config.hidden_size, config.intermediate_size = 64, 128
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).float().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-qwen2").save_pretrained(folder)


def make_data(path: Path, num_rows: int = ROWS) -> None:
    """Write the shortest rows of data/train.jsonl, in their order."""
    lines = (ROOT / "data" / "train.jsonl").read_bytes().splitlines(keepends=True)
    longest = sorted(map(len, lines))[num_rows - 1]
    path.write_bytes(b"".join([line for line in lines if len(line) <= longest][:num_rows]))


def arguments(folder: Path, output_dir: Path, **flags) -> list[str]:
    flags = {
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
        **flags,
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def start(argv: list[str], log: Path) -> int:
    """Fork a run of the script, its output appended to the log; return its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 70
    try:
        code = sft_qwen2.main(argv)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float | None = None, until=None) -> int | None:
    """Return the exit code (-signal if killed), or None once seconds have passed or until()."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if (end is not None and time.monotonic() >= end) or (until and until()):
            return None
        time.sleep(0.0005)


def stamp(path: Path) -> tuple | None:
    """Return what tells one folder of this name from the next, or None where there is none."""
    try:
        status = path.stat()
        return status.st_ino, status.st_ctime_ns
    except FileNotFoundError:
        return None


def wait_for_save(pid: int, aside: Path, rng: random.Random) -> int | None:
    """Wait until a checkpoint is half written, and stop the run there; return as wait() does.

    Which one and how many of its files are there is drawn. A stopped run cannot end its save, so
    that what is seen then is what a kill will find.
    """
    for _ in range(rng.randint(1, 6)):
        before = stamp(aside)
        code = wait(pid, until=lambda before=before: stamp(aside) not in (None, before))
        if code is not None:
            return code
    files = rng.randint(0, 8)  # of about 10
    while (code := wait(pid, until=lambda: count_files(aside) >= files)) is None:
        os.kill(pid, signal.SIGSTOP)
        if aside.exists():
            return None
        os.kill(pid, signal.SIGCONT)  # too late for this one
    return code


def count_files(folder: Path) -> int:
    try:
        return sum(path.is_file() for path in folder.rglob("*")) if folder.exists() else -1
    except FileNotFoundError:  # the save ended just now
        return -1


def kill_once(argv: list[str], output_dir: Path, rng: random.Random, run_s=None) -> dict:
    """Start a run and kill it: within run_s, or inside a save if None; return what happened."""
    aside, log = output_dir / "unfinished", output_dir.with_suffix(".log")
    before, pid = stamp(aside), start(argv, log)
    code = wait_for_save(pid, aside, rng) if run_s is None else wait(pid, rng.uniform(0, run_s))
    if code is None:
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
    # A save removes its folder when it ends: one that is there, and new, was cut short.
    in_save = code == -signal.SIGKILL and stamp(aside) not in (None, before)
    return {"code": code, "in_save": in_save, "files": count_files(aside) if in_save else 0}


def losses(output_dir: Path) -> list[tuple]:
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logs = [log for log in map(json.loads, lines) if "loss" in log]
    return [(log["step"], log["loss"], log["grad_norm"], log["learning_rate"]) for log in logs]


def differences(reference: Path, output_dir: Path) -> list[str]:
    """Return in what a finished run differs from the reference; nothing if in nothing."""
    found = []
    expected, weights = (load_file(x / "model.safetensors") for x in (reference, output_dir))
    if expected.keys() != weights.keys():
        found.append("other weights")
    else:
        names = [name for name in expected if not torch.equal(expected[name], weights[name])]
        found += [f"{len(names)} of {len(expected)} weights differ"] * bool(names)
    expected, logged = losses(reference), losses(output_dir)
    if [log[0] for log in logged] != [log[0] for log in expected]:
        found.append(f"metrics.jsonl has the steps {[log[0] for log in logged]}")
    elif logged != expected:
        steps = [a[0] for a, b in zip(expected, logged) if a != b]
        found.append(f"the losses of the steps {steps} differ")
    return found


def finish(argv: list[str], output_dir: Path) -> list[str]:
    """Run to the end; return what went wrong."""
    log = output_dir.with_suffix(".log")
    code = wait(start(argv, log))
    return [] if code == 0 else [f"exit code {code}: {log.read_text()[-2000:]}"]


def run_kills(folder: Path, kills: int, seed: int, run_s: float) -> dict:
    """Kill runs `kills` times, each run until it gets through; return the counts."""
    rng = random.Random(seed)
    counts = {"kills": 0, "in_saves": 0, "runs": 0, "resumes": 0, "differences": []}
    files = set()
    while counts["kills"] < kills:
        counts["runs"] += 1
        output_dir = folder / f"killed-{counts['runs']}"
        argv, code = arguments(folder, output_dir), None
        while code is None or (code == -signal.SIGKILL and counts["kills"] < kills):
            event = kill_once(argv, output_dir, rng, None if counts["kills"] % 2 == 0 else run_s)
            code, argv = event["code"], arguments(folder, output_dir, resume=True)
            counts["kills"] += code == -signal.SIGKILL
            counts["in_saves"] += event["in_save"]
            counts["resumes"] += 1
            files |= {event["files"]} if event["in_save"] else set()
        counts["resumes"] -= 1  # the first start of a run is none
        problems = [f"exit code {code}"] if code not in (0, -signal.SIGKILL) else []
        if code == -signal.SIGKILL:
            counts["resumes"] += 1
            problems = finish(argv, output_dir)
        problems = problems or differences(folder / "reference", output_dir)
        counts["differences"] += [f"{output_dir.name}: {problem}" for problem in problems]
        if problems or counts["runs"] > kills:  # more runs than kills: the kills find no target
            break
    return counts | {"files_there_when_killed": sorted(files)}


def run_signal(folder: Path, number: int, save_steps: int) -> list[str]:
    """Stop a run by a signal, resume it; return what is not as promised."""
    name = signal.Signals(number).name
    output_dir = folder / name
    argv, log = arguments(folder, output_dir, save_steps=save_steps), output_dir.with_suffix(".log")
    metrics, pid = output_dir / "metrics.jsonl", start(argv, log)
    code = wait(pid, until=lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    if code is None:
        os.kill(pid, number)
        code = wait(pid)
    found = [] if code == 128 + number else [f"exit code {code}"]
    found += [] if "saved" in log.read_text() else ["does not say that it saved"]
    found += [] if "could not" not in log.read_text() else ["says that it could not save"]
    found += [] if list(output_dir.glob("checkpoint-*")) else ["has no checkpoint"]
    found += [] if not (output_dir / "model.safetensors").exists() else ["exported a model"]
    found += finish([*argv, "--resume", "True"], output_dir)
    found = found or differences(folder / "reference", output_dir)
    return [f"{name}: {problem}" for problem in found]


def crash(folder: Path, kills: int, seed: int) -> dict:
    """Run all of it in the folder; return the counts and the differences."""
    torch.set_num_threads(1)
    sft_qwen2.quiet_libraries()
    for name in ("Trainer", "Qwen2ForCausalLM", "Qwen2Tokenizer", "pipeline"):
        getattr(transformers, name)  # loads its module, for every fork
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    code = wait(start(["--help"], folder / "help.log"))
    assert code == 0, (folder / "help.log").read_text()
    setup = os.fork()  # the parent itself computes nothing: threads would not survive the fork
    if setup == 0:
        make_model(folder / "model")
        os._exit(0)
    make_data(folder / "rows.jsonl")
    assert wait(setup) == 0
    reference, began = folder / "reference", time.monotonic()
    problems = finish(arguments(folder, reference), reference)
    assert not problems, problems
    assert len(losses(reference)) == STEPS
    run_s = time.monotonic() - began
    counts = run_kills(folder, kills, seed, run_s)
    for number, save_steps in ((signal.SIGTERM, 100), (signal.SIGINT, 1)):
        counts["differences"] += run_signal(folder, number, save_steps)
    return {"run_s": round(run_s, 1), "signals": 2, **counts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep all files here")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="crash-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    counts = crash(folder, args.kills, args.seed)
    counts["total_s"] = round(time.monotonic() - began, 1)
    if not args.folder:
        shutil.rmtree(folder)
    print(json.dumps(counts, indent=2))
    return 1 if counts["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
