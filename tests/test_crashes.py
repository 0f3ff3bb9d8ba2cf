"""What must not cost a run: kills, signals, full memory, full disk, NaN, bad rows, wandb."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import sft_qwen2  # noqa: E402

STEPS, ROWS_PER_STEP, BUDGET = 4, 6, 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with model/, half as wide as data/tiny-qwen2, and rows.jsonl for four steps."""
    folder = tmp_path_factory.mktemp("crashes")
    config = transformers.AutoConfig.from_pretrained(ROOT / "data" / "tiny-qwen2")
    config.hidden_size, config.intermediate_size = 64, 128
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).float().save_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-qwen2")
    tokenizer.save_pretrained(folder / "model")
    lines = (ROOT / "data" / "train.jsonl").read_bytes().splitlines(keepends=True)
    rows = [line for line in lines if len(line) < 800]
    (folder / "rows.jsonl").write_bytes(b"".join(rows[: STEPS * ROWS_PER_STEP]))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A function: run main() in this process, let change(trainer) at the trainer before it trains.

    Returns output_dir, exit code, out, err, and the losses logged. Also checks the overflow law.
    """

    def run(output_dir, change=None, **flags) -> SimpleNamespace:
        defaults = {
            "model_name_or_path": folder / "model",
            "data_path": folder / "rows.jsonl",
            "output_dir": output_dir,
            "per_device_train_batch_size": ROWS_PER_STEP,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-3,
            "max_len": 512,
            "tokens_per_forward": BUDGET,
            "save_steps": 1,
            "report_to": "none",
            "gradient_checkpointing": False,
        }
        argv = [str(x) for name, value in (defaults | flags).items() for x in (f"--{name}", value)]
        build = sft_qwen2.build_trainer
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def build_and_change(*args):
            trainer = build(*args)
            if change:
                change(trainer)
            return trainer

        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft_qwen2, "build_trainer", build_and_change)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = sft_qwen2.main(argv)
                except SystemExit as stop:
                    code = stop.code
                except Exception:
                    traceback.print_exc()
                    code = "traceback"
        for number, handler in handlers.items():
            signal.signal(number, handler)
        result = SimpleNamespace(output_dir=Path(output_dir), code=code)
        result.out, result.err = out.getvalue(), err.getvalue()
        result.losses = read_losses(result.output_dir)
        code == 1 or check_counts(result.output_dir)
        return result

    return run


@pytest.fixture(scope="module")
def finished(run, folder):
    """A run to which nothing happened."""
    row_tokens = []
    result = run(
        folder / "finished", lambda trainer: row_tokens.extend(trainer.train_dataset["num_tokens"])
    )
    assert result.code == 0, result.err
    assert list(result.losses) == list(range(1, STEPS + 1))
    result.row_tokens = row_tokens
    return result


def read_losses(output_dir: Path) -> dict[int, float]:
    path = output_dir / "metrics.jsonl"
    logs = map(json.loads, path.read_text().splitlines() if path.is_file() else [])
    return {log["step"]: log["loss"] for log in logs if "loss" in log}


def check_counts(output_dir: Path) -> None:
    """The overflow law: rows and answer tokens read are those trained, dropped, cut, rejected."""
    path = output_dir / "run.json"
    for counts in json.loads(path.read_text())["counts"].values() if path.exists() else []:
        rows = [counts[f"rows_{name}"] for name in ("trained", "dropped", "rejected")]
        tokens = [counts[f"answer_tokens_{name}"] for name in ("trained", "cut", "dropped")]
        assert counts["rows_read"] == sum(rows)
        assert counts["answer_tokens_read"] == sum(tokens)


def check_refused(result, *words) -> None:
    """The run ended with exit code 1 and one sentence, which has these words."""
    assert result.code == 1, result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    for word in words:
        assert str(word) in result.err


def assert_same_weights(output_dir: Path, other: Path, **tolerance) -> None:
    mine, theirs = (load_file(x / "model.safetensors") for x in (output_dir, other))
    torch.testing.assert_close(mine, theirs, **(tolerance or {"rtol": 0, "atol": 0}))


def checkpoints(output_dir: Path) -> dict[str, bytes]:
    files = sorted(output_dir.glob("checkpoint-*/**/*"))
    return {str(file): file.read_bytes() for file in files if file.is_file()}


# ---- Kills, signals, resuming -------------------------------------------------------------------
def test_killed_or_stopped_runs_resume_exactly(tmp_path):
    """Five SIGKILLs, a SIGTERM and a SIGINT; benchmarks/crash.py says what is compared."""
    command = [sys.executable, str(ROOT / "benchmarks" / "crash.py"), "--kills", "5"]
    command += ["--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout[done.stdout.index("{") :])
    assert (counts["kills"], counts["differences"]) == (5, [])
    assert counts["in_saves"] >= 1


def test_a_signal_while_the_run_is_being_set_up_is_not_lost(run, finished, tmp_path):
    """Loading the checkpoint of a large model takes minutes: a stop in that time must count."""

    def signal_at_begin(trainer):
        begin = trainer.callback_handler.on_train_begin

        def interrupted(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return begin(*args, **kwargs)

        trainer.callback_handler.on_train_begin = interrupted

    stopped = run(tmp_path, signal_at_begin)
    assert stopped.code == 128 + signal.SIGTERM
    assert len(stopped.losses) < STEPS
    assert run(tmp_path, resume=True).code == 0
    assert_same_weights(tmp_path, finished.output_dir)


def test_two_processes_save_together_and_stop_at_the_same_step(folder, tmp_path):
    """Only one of them may clear and rename; a signal may reach them in different steps."""
    log, metrics = tmp_path / "log", tmp_path / "outputs" / "metrics.jsonl"
    flags = {"model_name_or_path": folder / "model", "data_path": folder / "rows.jsonl"}
    flags |= {"output_dir": tmp_path / "outputs", "per_device_train_batch_size": 2}
    flags |= {"gradient_accumulation_steps": 1, "num_train_epochs": 50, "save_steps": 1}
    flags |= {"report_to": "none", "use_cpu": True, "ddp_backend": "gloo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "sft_qwen2.py")]
    command += [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    end = time.monotonic() + 60
    while time.monotonic() < end and run.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 5:
            break
        time.sleep(0.1)
    run.terminate()
    try:
        run.wait(40)
    finally:
        run.kill()
    text = log.read_text()
    assert "could not be saved" not in text and "is saved" in text, text[-3000:]
    last = max(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    for step in (last - 1, last):
        names = {path.name for path in (tmp_path / "outputs" / f"checkpoint-{step}").iterdir()}
        assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= names


def test_a_run_is_not_overwritten(run, finished):
    before = checkpoints(finished.output_dir)
    check_refused(run(finished.output_dir), finished.output_dir, "--resume", "--output_dir")
    assert checkpoints(finished.output_dir) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_len": 256}, ("max_len", 512, 256)),
        ({"per_device_train_batch_size": 3}, ("rows_per_step", 6, 3)),
        ({"data_path": ROOT / "data" / "train.jsonl"}, ("train_file_sha256",)),
        ({"overflow_strategy": "drop"}, ("overflow_strategy", "truncate", "drop")),
        ({"system_prompt": "Other."}, ("system_prompt", "Other.")),
        ({"seed": 7}, ("seed", 42, 7)),
        ({"learning_rate": 1e-3}, ("learning_rate", 0.003, 0.001)),
        ({"lr_scheduler_type": "linear"}, ("lr_scheduler_type", "cosine", "linear")),
        ({"optim": "adafactor"}, ("optim", "adamw_torch_fused", "adafactor")),
    ],
)
def test_a_run_is_resumed_on_its_own_terms_only(run, finished, flags, words):
    check_refused(run(finished.output_dir, resume=True, **flags), "cannot be resumed", *words)


@pytest.mark.parametrize("epochs", [1, 0.75])
def test_a_finished_run_that_is_resumed_stays_as_it_is(run, tmp_path, epochs):
    """No step is added, also where the end is within an epoch, and the model is exported again."""
    first = run(tmp_path, num_train_epochs=epochs)
    weights = load_file(tmp_path / "model.safetensors")
    before = checkpoints(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # as if killed before the export
    again = run(tmp_path, num_train_epochs=epochs, resume=True)
    assert (first.code, again.code) == (0, 0), again.err
    assert list(again.losses) == list(range(1, int(STEPS * epochs) + 1))
    assert checkpoints(tmp_path) == before
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), weights, rtol=0, atol=0)


@pytest.mark.parametrize("record", [None, "", '{"terms": {'])
def test_a_run_without_a_whole_record_is_refused(run, tmp_path, record):
    (tmp_path / "checkpoint-1").mkdir()
    if record is not None:
        (tmp_path / "run.json").write_text(record)
    result = run(tmp_path, resume=True)
    (tmp_path / "run.json").unlink(missing_ok=True)
    check_refused(result, "run.json")


def test_the_record_of_a_run(finished, folder):
    about = json.loads((finished.output_dir / "run.json").read_text())
    assert about["arguments"]["max_len"] == 512
    assert about["training_arguments"]["learning_rate"] == 3e-3
    assert torch.__version__.startswith(about["versions"]["torch"])
    assert about["versions"]["transformers"] == transformers.__version__
    assert about["counts"]["train"]["rows_trained"] == STEPS * ROWS_PER_STEP
    assert about["terms"]["train_file_sha256"] == sft_qwen2.file_sha256(folder / "rows.jsonl")
    assert about["terms"]["rows_per_step"] == ROWS_PER_STEP


# ---- Out of memory ------------------------------------------------------------------------------
def fail_at(count: int, function, limit: int | None = None):
    """Return the function, out of memory at its count-th call."""
    calls = iter(range(1, 1_000_000))

    def failing(*args, **kwargs):
        if next(calls) == count:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        return function(*args, **kwargs)

    return failing


def out_of_memory_in_forward(count):
    def change(trainer):
        trainer.model.forward = fail_at(count, trainer.model.forward)

    return change


def out_of_memory_in_backward(count):
    """In the middle of a backward pass: the second layer has its gradients, the first has none."""

    def change(trainer):
        weight = trainer.model.model.layers[1].input_layernorm.weight
        weight.register_hook(fail_at(count, lambda gradient: gradient))

    return change


@pytest.mark.parametrize("where", [out_of_memory_in_forward, out_of_memory_in_backward])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_out_of_memory_changes_nothing_but_the_budget(run, finished, tmp_path, where, count):
    """Also in the second micro-batch of a step, when the first has left gradients."""
    seen, failing = [], where(count)

    def change(trainer):
        failing(trainer)
        forward = trainer.model.forward

        def watched(**batch):
            seen.append(batch["seq_lens"])
            return forward(**batch)

        trainer.model.forward = watched

    result = run(tmp_path, change)
    assert result.code == 0, result.err
    assert result.losses == pytest.approx(finished.losses, rel=1e-5)
    assert_same_weights(tmp_path, finished.output_dir, rtol=1e-4, atol=1e-4)
    said = [line for line in result.out.splitlines() if "for one forward pass" in line]
    assert len(said) == 1
    budget = int(said[0].split()[-1])
    assert budget < BUDGET
    assert all(sum(rows) <= budget or len(rows) == 1 for rows in seen[count:])


def test_out_of_memory_brings_gradient_checkpointing_first(run, finished, tmp_path):
    """Where micro-batches were thought to fit without it; the budget stays."""
    seen = []

    def change(trainer):
        out_of_memory_in_forward(3)(trainer)
        seen.append(trainer)

    result = run(tmp_path, change, gradient_checkpointing=True)
    assert result.code == 0, result.err
    assert result.losses == pytest.approx(finished.losses, rel=1e-5)
    assert "now with gradient checkpointing for all" in result.out
    assert "for one forward pass" not in result.out
    assert seen[0].plain_tokens == 0 and seen[0].tokens_per_forward == BUDGET
    assert all(layer.gradient_checkpointing for layer in seen[0].model.model.layers)


def memory_for(tokens: int):
    def change(trainer):
        forward = trainer.model.forward

        def limited(**batch):
            if sum(batch["seq_lens"]) > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory (a test)")
            return forward(**batch)

        trainer.model.forward = limited

    return change


def test_the_budget_falls_until_it_fits(run, finished, tmp_path):
    longest = max(finished.row_tokens)
    result = run(tmp_path, memory_for(longest + 10), tokens_per_forward=3000)
    assert result.code == 0, result.err
    assert result.losses == pytest.approx(finished.losses, rel=1e-5)


def test_a_row_that_cannot_fit_ends_the_run_with_a_sentence(run, tmp_path):
    result = run(tmp_path, memory_for(10))
    check_refused(result, "out of memory", "one row", "--max_len")
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("at_state", [2, 7])
def test_out_of_memory_in_the_optimizer_makes_no_wrong_step(
    run, finished, tmp_path, monkeypatch, at_state
):
    """The state of a parameter is two tensors: the second may fail when the first is there.

    The step is finished exactly, or the run ends with a sentence.
    """

    def change(trainer):
        create = trainer.create_optimizer

        def create_and_watch(*args):
            optimizer = create(*args)
            zeros_like = fail_at(at_state, torch.zeros_like)
            optimizer.register_step_pre_hook(
                lambda *_: monkeypatch.setattr(torch, "zeros_like", zeros_like)
            )
            return optimizer

        trainer.create_optimizer = create_and_watch

    result = run(tmp_path, change)
    if result.code != 0:
        check_refused(result, "out of memory")
        return
    assert result.losses == finished.losses
    assert_same_weights(tmp_path, finished.output_dir)


# ---- NaN ----------------------------------------------------------------------------------------
def check_broken_step(result, step: int, what: str, before: dict | None = None) -> None:
    """The run stopped at this step, named its rows, left the checkpoints alone, exported nothing"""
    check_refused(result, f"step {step}: its {what} is nan", "nothing is exported")
    lines = [int(part.split()[0].strip(",")) for part in result.err.split("rows.jsonl:")[1:]]
    assert len(set(lines)) == ROWS_PER_STEP
    assert set(lines) <= set(range(1, STEPS * ROWS_PER_STEP + 1))
    assert not (result.output_dir / "model.safetensors").exists()
    assert list(result.losses) == list(range(1, step))
    for path in result.output_dir.glob("checkpoint-*"):
        for weight in load_file(path / "model.safetensors").values():
            assert torch.isfinite(weight).all()
    assert all(checkpoints(result.output_dir).get(file) == x for file, x in (before or {}).items())


def test_a_nan_weight_in_the_model_stops_the_run_at_once(run, folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    with safe_open(model / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata=metadata)
    check_broken_step(run(tmp_path / "outputs", model_name_or_path=model), 1, "loss")


def at_step(step: int, action):
    """Return change(trainer): before the step, call action(trainer)."""

    def change(trainer):
        training_step = trainer.training_step

        def step_with_action(*args):
            if trainer.state.global_step + 1 == step:
                action(trainer)
            return training_step(*args)

        trainer.training_step = step_with_action

    return change


def test_a_weight_that_becomes_nan_stops_the_run(run, tmp_path):
    before = {}

    def spoil(trainer):
        before.update(checkpoints(tmp_path))
        trainer.model.model.norm.weight.data[5] = float("nan")

    result = run(tmp_path, at_step(3, spoil))
    assert len(before) > 10
    check_broken_step(result, 3, "loss", before)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_nan_gradients_stop_the_run_before_the_weights_change(run, tmp_path, max_grad_norm):
    weights, seen = [], {}

    def spoil(trainer):
        weights.extend(parameter.detach().clone() for parameter in trainer.model.parameters())
        weight = trainer.model.model.layers[0].mlp.up_proj.weight
        weight.register_hook(lambda gradient: gradient * float("nan"))

    def change(trainer):
        seen["trainer"] = trainer
        at_step(2, spoil)(trainer)

    result = run(tmp_path, change, max_grad_norm=max_grad_norm)
    check_broken_step(result, 2, "gradient norm")
    for before, parameter in zip(weights, seen["trainer"].model.parameters()):
        assert torch.equal(before, parameter)


# ---- A full disk --------------------------------------------------------------------------------
class SmallDisk:
    """A tmpfs of 16 MB, which can be filled for real."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system can be mounted by root only")

    def fill(self, leave_bytes: int = 0):
        with contextlib.suppress(OSError), open(self.path / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        size = (self.path / "filler").stat().st_size
        os.truncate(self.path / "filler", size - leave_bytes)

    def free(self):
        (self.path / "filler").unlink(missing_ok=True)

    def close(self):
        subprocess.run(["umount", "-l", str(self.path)], check=True)


class SmallFiles:
    """The same for those who may not mount: no file can grow beyond 100 kB."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, leave_bytes: int = 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, self.limits[1]))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    close = free


@pytest.fixture(params=[SmallDisk, SmallFiles])
def disk(request, tmp_path):
    disk = request.param(tmp_path / "disk")
    yield disk
    disk.close()


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(run, finished, disk):
    output_dir, kept = disk.path / "outputs", []

    def change(trainer):
        at_step(3, lambda trainer: disk.fill(1 << 20))(trainer)
        at_step(4, lambda trainer: (kept.extend(checkpoints(output_dir)), disk.free()))(trainer)

    result = run(output_dir, change)
    assert result.code == 0, result.err
    assert "checkpoint-3 could not be saved" in result.err
    assert {Path(file).parent.name for file in kept} == {"checkpoint-1", "checkpoint-2"}
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    assert not (output_dir / "unfinished").exists()
    assert result.losses.items() <= finished.losses.items()
    assert_same_weights(output_dir, finished.output_dir)


def test_a_log_that_cannot_be_written_does_not_stop_the_run(run, finished, tmp_path):
    """/dev/full is a disk without room for a single byte."""

    def change(trainer):
        metrics, kept = tmp_path / "metrics.jsonl", tmp_path / "kept"
        at_step(2, lambda trainer: (metrics.rename(kept), metrics.symlink_to("/dev/full")))(trainer)
        at_step(3, lambda trainer: kept.rename(metrics))(trainer)

    result = run(tmp_path, change)
    assert result.code == 0, result.err
    assert list(result.losses) == [step for step in finished.losses if step != 2]
    assert "No space left on device" in result.out
    assert_same_weights(tmp_path, finished.output_dir)


def test_a_run_stopped_on_a_full_disk_says_so_and_resumes(run, finished, disk):
    output_dir = disk.path / "outputs"

    def stop_on_full_disk(trainer):
        disk.fill(1 << 20)
        os.kill(os.getpid(), signal.SIGTERM)

    stopped = run(output_dir, at_step(3, stop_on_full_disk))
    disk.free()
    assert stopped.code == 128 + signal.SIGTERM
    assert "checkpoint-3 could not be saved" in stopped.err
    assert "step 3, which is saved" not in stopped.out
    resumed = run(output_dir, resume=True)
    assert resumed.code == 0 and f"resume     from {output_dir / 'checkpoint-2'}" in resumed.out
    assert resumed.losses == finished.losses
    assert_same_weights(output_dir, finished.output_dir)


def test_a_model_that_cannot_be_exported_ends_with_a_sentence(run, finished, disk):
    """Exit code 1; when there is room again, --resume exports what was trained."""
    output_dir = disk.path / "outputs"

    def change(trainer):
        save_model = trainer.save_model

        def save_on_full_disk(folder=None, _internal_call=False):
            if not _internal_call:
                disk.fill(300_000)
            save_model(folder, _internal_call)

        trainer.save_model = save_on_full_disk

    result = run(output_dir, change)
    disk.free()
    check_refused(result, output_dir, "--resume")
    assert run(output_dir, resume=True).code == 0
    assert_same_weights(output_dir, finished.output_dir)


# ---- Bad rows -----------------------------------------------------------------------------------
def test_bad_rows_are_left_out_and_kept_with_their_reasons(run, finished, folder, tmp_path):
    """Training is as if they had never been there."""
    lines = (folder / "rows.jsonl").read_bytes().splitlines(keepends=True)
    bad = {1: b"not json\n", 3: b'{"query": "q"}\n', 9: b'{"query": "\\ud83d", "answer": "a"}\n'}
    bad |= {12: b'{"query": "q", "answer": "\xff"}\n', 14: b'{"\\ud83d\\n": "q", "answer": "a"}\n'}
    for number, line in bad.items():
        lines.insert(number - 1, line)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(lines))
    refused = run(tmp_path / "refused", data_path=path)
    assert refused.code == 1 and "--skip_bad_rows" in refused.err
    assert not (tmp_path / "refused" / "model.safetensors").exists()
    result = run(tmp_path / "outputs", data_path=path, skip_bad_rows=True)
    assert result.code == 0, result.err
    for number in bad:
        assert f"{path}:{number}: " in refused.err and f"{path}:{number}: " in result.err
    counts = json.loads((tmp_path / "outputs" / "run.json").read_text())["counts"]["train"]
    assert (counts["rows_rejected"], counts["rows_trained"]) == (len(bad), len(finished.losses) * 6)
    assert result.losses == finished.losses
    rejected = (tmp_path / "outputs" / "rejected.jsonl").read_text().splitlines()
    for number, line in zip(bad, map(json.loads, rejected), strict=True):
        assert (line["file"], line["line"]) == (str(path), number) and line["error"]


def test_a_thousand_broken_lines(tmp_path):
    """benchmarks/fuzz_rows.py says what is checked of each."""
    import fuzz_rows

    figures = fuzz_rows.fuzz(1000, seed=1, folder=tmp_path)
    assert figures["encoded"] > 50 and figures["refused"] > 500 and figures["slowest_line_s"] < 10


# ---- wandb --------------------------------------------------------------------------------------
def fail(*args, **kwargs):
    raise RuntimeError("wandb is down (a test)")


def test_wandb_that_cannot_start_does_not_stop_the_run(run, finished, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", fail)
    result = run(tmp_path, report_to="wandb")
    assert result.code == 0, result.err
    assert "wandb is down" in result.out
    assert result.losses == finished.losses


def test_wandb_that_fails_in_mid_run_does_not_stop_it(run, finished, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    calls = iter(range(100))

    def change(trainer):
        monkeypatch.setattr(wandb, "log", lambda *args, **kwargs: next(calls) < 2 or fail())

    result = run(tmp_path, change, report_to="wandb")
    wandb.finish()
    assert result.code == 0, result.err
    assert next(calls) > 2
    assert "wandb is down" in result.out
    assert result.losses == finished.losses


def test_what_is_no_wandb_key_does_not_stop_the_run(run, tmp_path, monkeypatch):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    result = run(tmp_path, report_to="wandb")
    wandb.finish()
    assert result.code == 0, result.err
    assert "records offline" in result.out


def test_wandb_does_not_wait_for_long(run, tmp_path, monkeypatch):
    import wandb

    seen = []
    monkeypatch.setattr(wandb, "init", lambda **options: seen.append(options) or fail())
    run(tmp_path, report_to="wandb")
    assert seen[0]["settings"].init_timeout <= 60
