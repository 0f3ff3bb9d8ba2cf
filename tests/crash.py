"""Kill and stop runs in every way, resume them, and compare with the run never stopped.

    python tests/crash.py                                                # as the tests run it
    python tests/crash.py --kills 50 --every 1 --resumes 8 --signals 4   # all of it

A run of two epochs on CPU, a checkpoint after each step, is killed at random moments, and before
every n-th system call of a save that also deletes an old checkpoint, and of the export (Python's
audit events, and fsync, which has none); stopped by signals, in a pair of processes by one to the
second; and resumed from each of its checkpoints. In the end weights and losses must be those of
the run never stopped, bit for bit, and no checkpoint may be less than whole at any time.

This process imports everything once and forks every run from there: a start costs no imports.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
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

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import sft_qwen2  # noqa: E402
from sft import callbacks  # noqa: E402
from sft.run_folder import ASIDE, WholeCheckpoints, check_checkpoint, whole_checkpoints  # noqa: E402

STEPS, ROWS_PER_STEP = 8, 4
ROWS = STEPS * ROWS_PER_STEP // 2  # two epochs: the second one's order is to be found again, too
CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree")
SAVE = STEPS - 2  # the step whose save is killed: the one before is to be deleted in it


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


def kill_at_call(where: str, number: int) -> None:
    """Die before that one of CALLS in the "export", or the "save" of step SAVE; 0: count them."""
    count, fsync = itertools.count(1), os.fsync
    active = []

    def hook(event, args):
        if active and event in CALLS and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_fsync(descriptor):
        hook("open", ())
        fsync(descriptor)

    name = "export" if where == "export" else "_save_checkpoint"
    method = getattr(WholeCheckpoints, name)

    def watched(trainer, *args):
        active.extend([1] * (where == "export" or trainer.state.global_step == SAVE))
        method(trainer, *args)
        if active and number == 0:
            active.clear()
            Path(trainer.args.output_dir + ".calls").write_text(str(next(count) - 1))
        active.clear()

    setattr(WholeCheckpoints, name, watched)
    os.fsync = counted_fsync
    sys.addaudithook(hook)


def at_step(step: int, action) -> None:
    """Let this process call action() before it trains that step."""
    training_step = sft_qwen2.StepTrainer.training_step

    def watched(trainer, *args):
        if trainer.state.global_step + 1 == step:
            action()
        return training_step(trainer, *args)

    sft_qwen2.StepTrainer.training_step = watched


def start(argv: list[str], log: Path, before=lambda: None, rank: int = 0, port: int = 0) -> int:
    """Fork a run of the script, its output appended to the log; return its process id.

    `before` is called in the new process. With a port it is one of two, of this rank.
    """
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if port:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
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


def losses(output_dir: Path) -> list[tuple]:
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logs = [log for log in map(json.loads, lines) if "loss" in log]
    return [(log["step"], log["loss"], log["grad_norm"], log["learning_rate"]) for log in logs]


def differences(reference: Path, output_dir: Path) -> list[str]:
    """Return in what a finished run differs from the reference; nothing if in nothing."""
    expected, weights = (load_file(x / "model.safetensors") for x in (reference, output_dir))
    names = [x for x in expected if x not in weights or not torch.equal(expected[x], weights[x])]
    found = [f"{len(names)} of {len(expected)} weights differ"] * bool(names)
    found += ["metrics.jsonl differs"] * (losses(reference) != losses(output_dir))
    return found + ["something is left over"] * (output_dir / ASIDE).exists()


def finish(argv: list[str], output_dir: Path, reference: Path) -> list[str]:
    """Check what is there, run to the end; return what went wrong."""
    for checkpoint in output_dir.glob("checkpoint-*"):
        check_checkpoint(checkpoint)
    log = output_dir.with_suffix(".log")
    code = wait(start(argv, log))
    return differences(reference, output_dir) if code == 0 else [f"{code}: {log.read_text()}"]


def run_kills(folder: Path, kills: int, seed: int) -> dict:
    """Kill runs `kills` times at random moments, each run until it gets through; count."""
    rng, counts, problems = random.Random(seed), {"kills": 0, "in_saves": 0}, []
    alarm = lambda delay: lambda: signal.setitimer(signal.ITIMER_REAL, delay)  # noqa: E731
    for number in range(4 * kills):
        output_dir, code, step = folder / f"killed-{number}", None, 0
        while counts["kills"] < kills and code != 0 and step < STEPS:
            step, delay = rng.randint(step + 1, STEPS), rng.uniform(0.001, 0.1)
            argv = arguments(folder, output_dir, resume=code is not None)
            # The alarm kills as SIGKILL does: nothing is installed to catch it.
            before = lambda step=step, delay=delay: at_step(step, alarm(delay))  # noqa: E731
            code = wait(start(argv, output_dir.with_suffix(".log"), before))
            counts["kills"] += code == -signal.SIGALRM
            counts["in_saves"] += (output_dir / ASIDE).exists()
        if code is not None:
            argv = arguments(folder, output_dir, resume=True)
            problems += finish(argv, output_dir, folder / "reference")
    problems += [f"only {counts['kills']} kills"] * (counts["kills"] < kills)
    return counts | {"differences": problems}


def run_calls(folder: Path, every: int) -> dict:
    """Kill runs before every so many system calls of a save and of the export; count."""
    counts = {"calls": {}, "killed_at_calls": 0, "differences": []}
    for where in ("save", "export"):
        counting = folder / f"{where}-0"
        argv = arguments(folder, counting)
        wait(start(argv, folder / "calls.log", lambda where=where: kill_at_call(where, 0)))
        counts["calls"][where] = number = int(Path(f"{counting}.calls").read_text())
        for call in range(1 + every // 2, number + 1, every):
            output_dir = folder / f"{where}-{call}"
            log, argv = output_dir.with_suffix(".log"), arguments(folder, output_dir)
            code = wait(start(argv, log, lambda w=where, call=call: kill_at_call(w, call)))
            counts["killed_at_calls"] += code == -signal.SIGKILL
            problems = [] if code == -signal.SIGKILL else [f"exit code {code}"]
            steps = [int(path.name[11:]) for path in whole_checkpoints(output_dir)]
            if max(steps) not in ((SAVE - 1, SAVE) if where == "save" else (STEPS,)):
                problems.append(f"the checkpoints are {steps}")
            argv = arguments(folder, output_dir, resume=True)
            problems += finish(argv, output_dir, folder / "reference")
            counts["differences"] += [f"{output_dir.name}: {problem}" for problem in problems]
    return counts


def run_resumes(folder: Path, resumes: int) -> dict:
    """Resume from each checkpoint of a run (the first so many, an epoch's last one among them)."""
    all_steps = folder / "all"
    argv = arguments(folder, all_steps, save_total_limit=STEPS)
    problems = finish(argv, all_steps, folder / "reference")
    steps = sorted(range(1, STEPS + 1), key=lambda step: abs(step - STEPS // 2))[:resumes]
    for step in steps:
        output_dir = folder / f"from-{step}"
        shutil.copytree(all_steps / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
        shutil.copy(all_steps / "run.json", output_dir)
        argv = arguments(folder, output_dir, resume=True)
        found = finish(argv, output_dir, folder / "reference")
        problems += [f"from step {step}: {problem}" for problem in found]
    return {"resumed_from": sorted(steps), "differences": problems}


def run_processes(folder: Path, output_dir: Path, pair: bool, number: int = 0, **flags):
    """Run one process, or a pair; return (exit codes, log).

    The last one has these flags, and sends itself this signal in its third step.
    """
    log, size = output_dir.with_suffix(".log"), ROWS_PER_STEP // (1 + pair)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1] * pair
    shared = {"per_device_train_batch_size": size, "resume": flags.pop("resume", False)}
    argvs = [arguments(folder, output_dir, **shared)] * pair
    argvs.append(arguments(folder, output_dir, **shared, **flags))
    stop = [lambda: None] * pair
    stop.append(lambda: number and at_step(3, lambda: os.kill(os.getpid(), number)))
    pids = [start(argv, log, stop[rank], rank, port) for rank, argv in enumerate(argvs)]
    codes = [wait(pid, 100) for pid in pids]
    for pid, code in zip(pids, codes):
        if code is None:  # it hangs
            os.kill(pid, signal.SIGKILL)
            wait(pid)
    return codes, log.read_text()


def run_signal(folder: Path, number: int, pair: bool) -> list[str]:
    """Stop a run by a signal, of a pair of processes only the last; return what is wrong."""
    name = signal.Signals(number).name + "-pair" * pair
    output_dir, reference = folder / name, folder / ("pair" if pair else "reference")
    if not reference.exists():
        run_processes(folder, reference, pair)
    codes, text = run_processes(folder, output_dir, pair, number)
    saved = whole_checkpoints(output_dir)
    found = [] if codes == [128 + number] * (1 + pair) else [f"exit codes {codes}: {text}"]
    found += [] if saved and f"{saved[-1].name} is saved" in text else ["says not what is saved"]
    found += ["exported a model"] * (output_dir / "model.safetensors").exists()
    found += ["lacks a process's part"] * (pair and not (saved[-1] / "rng_state_1.pth").exists())
    codes, text = run_processes(folder, output_dir, pair, resume=True)
    found += differences(reference, output_dir) if not any(codes) else [text]
    if pair:
        codes, text = run_processes(folder, folder / "other", pair, learning_rate=1e-3)
        refused = codes == [1, 1] and text.count("learning_rate was 0.003, in process 1 0.001") == 2
        found += [] if refused else [f"processes that differ: {codes}, {text}"]
    return [f"{name}: {problem}" for problem in found]


def crash(folder: Path, kills: int, seed: int, every: int, resumes: int, signals: int) -> dict:
    """Run all of it in the folder; return the counts and the differences."""
    torch.set_num_threads(1)
    callbacks.quiet_libraries()
    for name in ("Trainer", "Qwen2ForCausalLM", "Qwen2Tokenizer", "pipeline"):
        getattr(transformers, name)  # loads its module, for every fork
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    setup = os.fork()  # the parent itself computes nothing: threads would not survive the fork
    if setup == 0:
        make_model(folder / "model")
        os._exit(0)
    make_data(folder / "rows.jsonl")
    assert wait(setup) == 0
    reference, log = folder / "reference", folder / "reference.log"
    assert wait(start(arguments(folder, reference), log)) == 0, log.read_text()
    assert len(losses(reference)) == STEPS
    results = [run_kills(folder, kills, seed), run_calls(folder, every)]
    results.append(run_resumes(folder, resumes))
    ways = [(signal.SIGTERM, True)]
    ways += [(number, False) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)]
    ways = ways[:signals]
    problems = [problem for way in ways for problem in run_signal(folder, *way)]
    problems += [problem for result in results for problem in result.pop("differences")]
    counts = {name: count for result in results for name, count in result.items()}
    return {"signals": len(ways), **counts, "differences": problems}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1, help="at random moments")
    parser.add_argument("--every", type=int, default=30, help="1: before each call of a save")
    parser.add_argument("--resumes", type=int, default=2, help="from so many checkpoints")
    parser.add_argument("--signals", type=int, default=1, help="so many of the four ways to stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep all files here")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="crash-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    counts = crash(folder, args.kills, args.seed, args.every, args.resumes, args.signals)
    counts["total_s"] = round(time.monotonic() - began, 1)
    if not args.folder:
        shutil.rmtree(folder)
    print(json.dumps(counts, indent=2))
    return 1 if counts["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
