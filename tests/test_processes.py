"""Several processes: the rank law, shards and their checkpoints, and the end of one process."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import psutil
import pytest
import runs
import torch
import transformers
from runs import ROOT
from safetensors.torch import load_file

import sft_qwen2
from sft.rows import UserError
from sft.shards import ContentsReader

pytestmark = pytest.mark.slow
STEPS, ROWS, OVERFLOW, BEGIN = 4, 8, 2, 2  # rows of a step, in all processes, of unequal lengths
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}  # for 8-bit state


# ---- What a process does before main() -----------------------------------------------------------
def find_memory(gib: float) -> None:
    memory = SimpleNamespace(available=gib * 2**30)
    psutil.virtual_memory = lambda: memory


def overflow(first: int, last: int) -> None:
    """Let the last process's part of one gradient be infinite in these steps."""
    forward_backward = sft_qwen2.StepTrainer.forward_backward

    def broken(trainer, batches, trained_tokens):
        loss = forward_backward(trainer, batches, trained_tokens)
        is_last = trainer.args.process_index == trainer.args.world_size - 1
        if is_last and first <= trainer.state.global_step + 1 <= last:
            grad = next(trainer.model.parameters()).grad
            (grad.to_local() if trainer.is_fsdp_enabled else grad)[-1] = float("inf")
        return loss

    sft_qwen2.StepTrainer.forward_backward = broken


def allow_skipped(number: int) -> None:
    sft_qwen2.MAX_SKIPPED = number


def watch(path: Path) -> None:
    """Write rows encoded, seeds of the rounding, and in what gradients are summed, to the file."""

    def watched(module, name, tell):
        function = getattr(module, name)

        def call(*args, **kwargs):
            with open(path, "a") as file:
                file.write(json.dumps(tell(*args, **kwargs)) + "\n")
            return function(*args, **kwargs)

        setattr(module, name, call)

    watched(sft_qwen2, "encode_batch", lambda rows, _: {"rows": len(rows)} if len(rows) > 1 else {})
    watched(torch, "manual_seed", lambda seed: {"seed": seed} if seed > 2**32 else {})
    dtype = lambda input, **_: {"sum": str(input.dtype)}  # noqa: E731
    watched(torch.distributed, "reduce_scatter_single", dtype)  # FSDP2's


# ---- All runs, once ------------------------------------------------------------------------------
def arguments(folder: Path, output_dir: Path, world: int, model: str = "tied", **more) -> list[str]:
    values = {"model_name_or_path": folder / model, "data_path": folder / "data/train.jsonl"}
    values |= {"output_dir": output_dir, "save_steps": BEGIN, "save_total_limit": 9}
    values |= {"per_device_train_batch_size": ROWS // world, "gradient_accumulation_steps": 1}
    values |= {"tokens_per_forward": 120, "learning_rate": 3e-3, "report_to": "none"}
    return runs.argv(**(values | {"max_steps": STEPS} | more))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with data/ and two models, where each way to train the same rows has run."""
    folder = tmp_path_factory.mktemp("runs")
    runs.make_model(folder / "tied", dtype="bfloat16", **SIZES)
    runs.make_model(folder / "untied", tied=False, dtype="bfloat16", **SIZES)
    (folder / "data").mkdir()
    lines = (ROOT / "data" / "train.jsonl").read_bytes().splitlines(keepends=True)
    lines = [line for line in lines if len(line) < 500]
    (folder / "data" / "train.jsonl").write_bytes(b"".join(lines[::6]))
    (folder / "data" / "validation.jsonl").write_bytes(b"".join(lines[1::50]))

    def run(name, world, compute=None, begin=None, code=0, **more):
        """Run that many processes, which shard the model if compute is given; else each has all."""
        actions = [[partial(watch, folder / f"{name}.seen-{rank}")] for rank in range(world)]
        for rank, gib in enumerate(more.pop("free", ())):
            actions[rank].append(partial(find_memory, gib))
        for each in actions if compute else ():
            each.append(partial(forks.take_for_gpu, compute, world > 1))
        for action in more.pop("actions", ()):
            actions = [[*each, action] for each in actions]
        if begin:
            checkpoint = f"checkpoint-{BEGIN}"
            shutil.copytree(folder / begin / checkpoint, folder / name / checkpoint)
            shutil.copy(folder / begin / "run.json", folder / name)
        last = more.pop("last", {})
        argvs = [arguments(folder, folder / name, world, resume=bool(begin), **more)] * world
        argvs[-1] = argvs[-1] + runs.argv(**last)
        calls = [(forks.main_after, *each) for each in zip(actions, argvs)]
        ended = forks.run(folder / f"{name}.log", *calls, cache=folder / "cache")
        assert ended.codes == [code] * world, "".join(ended.texts)

    run("two", 2, data_path=folder / "data", free=[20, 10])  # it finds nothing encoded yet
    run("one", 1)
    evaluating = {"data_path": folder / "data", "eval_strategy": "steps", "eval_steps": BEGIN}
    run("shards", 4, "fp32", **evaluating)  # whole parameters are left behind where it saves
    run("one-untied", 1, model="untied")
    run("shards-untied", 2, "fp32", model="untied")
    for world in (1, 4):
        run(f"bf16-{world}", world, "bf16")
    for world in (1, 2):
        run(f"fp16-{world}", world, "fp16", actions=[partial(overflow, OVERFLOW, OVERFLOW)])
    run("bf16-4-2", 2, "bf16", begin="bf16-4")
    run("bf16-4-2-1", 1, "bf16", begin="bf16-4-2")
    run("fp16-2-1", 1, "fp16", begin="fp16-2", actions=[partial(overflow, OVERFLOW, OVERFLOW)])
    run("skipped", 1, "fp16", code=1, actions=[partial(overflow, 1, 9), partial(allow_skipped, 2)])
    run("other", 2, code=1, last={"learning_rate": 1e-3})
    return folder


def logged(run: Path, name: str = "loss") -> list[float]:
    return [log[name] for log in runs.read_logs(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def seen(run: Path, name: str) -> list[list]:
    """Return what each process of a run has told under this name."""
    lines = [path.read_text().splitlines() for path in sorted(run.parent.glob(f"{run.name}.seen*"))]
    return [[told[name] for told in map(json.loads, each) if name in told] for each in lines]


def text(run: Path, rank: int = 0) -> str:
    return Path(f"{run}.log-{rank}").read_text()


ALIKE = [("two", "one"), ("shards", "one"), ("shards-untied", "one-untied")]


@pytest.mark.parametrize(("run", "reference"), ALIKE)
def test_any_number_of_processes_trains_the_same(folder, run, reference):
    """The rank law: rows of very unequal length, the same losses and weights."""
    run, reference = folder / run, folder / reference
    assert len(logged(reference)) == STEPS
    np.testing.assert_allclose(logged(run), logged(reference), rtol=0, atol=1e-4)
    torch.testing.assert_close(weights(run), weights(reference), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("run", "reference"), [("bf16-4", "bf16-1"), ("fp16-2", "fp16-1")])
def test_shards_train_in_half_precision_as_one_process_does(folder, run, reference):
    """By the default optimizer: AdamW with 8-bit state, over bf16 weights with random rounding."""
    wanted = logged(folder / reference)
    np.testing.assert_allclose(logged(folder / run), wanted, rtol=0, atol=5e-3)
    np.testing.assert_allclose(wanted[:OVERFLOW], logged(folder / "one")[:OVERFLOW], rtol=1e-3)
    for formats in seen(folder / run, "sum"):  # of the gradients that processes exchange
        assert set(formats) == {"torch.float32"}


def test_an_overflow_in_one_shard_skips_the_step_in_all(folder):
    """Its rows are not trained, the schedule waits: as in one process, whose scale is the same."""
    for run in (folder / "fp16-1", folder / "fp16-2"):
        rates, norms = logged(run, "learning_rate"), logged(run, "grad_norm")
        assert [x == float("inf") for x in norms] == [s == OVERFLOW for s in range(1, STEPS + 1)]
        assert rates[OVERFLOW] == rates[OVERFLOW - 1] < rates[OVERFLOW - 2]
        assert logged(run, "skipped_steps") == [0, 1, 1, 1]
        scaler = torch.load(run / f"checkpoint-{STEPS}" / "scaler.pt")
        assert scaler["scale"] == 2**15
    assert "3 steps had infinite gradients in fp16" in text(folder / "skipped")


def test_processes_that_were_given_different_arguments_are_refused(folder):
    for rank in range(2):
        assert "learning_rate was 0.003, in process 1 0.001" in text(folder / "other", rank)


def test_rounding_differs_between_processes_and_steps(folder):
    seeds = [seed for each in seen(folder / "bf16-4", "seed") for seed in each]
    assert len(set(seeds)) == len(seeds) == 4 * STEPS


def test_the_export_of_shards_is_an_ordinary_model(folder):
    for run in (folder / "shards", folder / "bf16-4", folder / "fp16-2"):
        config = json.loads((run / "config.json").read_text())
        assert config["architectures"] == ["Qwen2ForCausalLM"] and config["use_cache"]
        assert weights(run).keys() == weights(folder / "one").keys()
        assert {x.dtype for x in weights(run).values()} == {torch.bfloat16}  # the base's
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            run, output_loading_info=True
        )
        assert type(model) is transformers.Qwen2ForCausalLM
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_one_process_speaks_and_each_row_is_encoded_once(folder):
    assert "eval_loss" in text(folder / "two") and text(folder / "two", rank=1) == ""
    names = {path.name.partition(".")[0] for path in folder.glob("*.seen-0")}
    encoded = [number for run in names for each in seen(folder / run, "rows") for number in each]
    files = [folder / "data" / f"{split}.jsonl" for split in ("train", "validation")]
    assert sorted(encoded) == sorted(len(file.read_bytes().splitlines()) for file in files)


def test_processes_plan_for_the_least_and_share_the_forward_passes(folder):
    """Of 20 and 10 GiB: nine tenths of 10, and of these each has a half."""
    assert "of 4.5 GiB" in text(folder / "two")
    passes = [text(folder / run) for run in ("one", "shards")]
    one, four = (int(re.search(r"(\d+) or so forward", said)[1]) for said in passes)
    assert one >= 4 and four == -(-one // 4)


RESUMED = [("bf16-4-2", "bf16-4"), ("bf16-4-2-1", "bf16-4"), ("fp16-2-1", "fp16-2")]


@pytest.mark.parametrize(("run", "reference"), RESUMED)
def test_fewer_processes_resume(folder, run, reference):
    """With the optimizer's state and the schedule; tests/crash.py resumes with as many."""
    run, reference = folder / run, folder / reference
    assert f"resume     from {run}/checkpoint-{BEGIN}" in text(run)
    assert logged(run, "learning_rate") == logged(reference, "learning_rate")
    assert logged(run)[:BEGIN] == logged(reference)[:BEGIN]
    np.testing.assert_allclose(logged(run), logged(reference), rtol=0, atol=5e-3)


def test_no_checkpoint_of_shards_runs_code(folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for part in ("optimizer_0", "pytorch_model_fsdp_0"):
        contents = folder / "bf16-4" / f"checkpoint-{BEGIN}" / part / ".metadata"
        assert ContentsReader(io.BytesIO(contents.read_bytes())).load()
    with pytest.raises(UserError, match=r"would run pathlib\.Path\.touch"):
        ContentsReader(io.BytesIO(pickle.dumps(Attack()))).load()
    assert not (tmp_path / "ran").exists()


# ---- torchrun itself ----------------------------------------------------------------------------
def torchrun(log: Path, argv: list[str], *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    command += [str(ROOT / "sft_qwen2.py"), *argv]
    with open(log, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def test_the_last_thing_that_torchrun_says_is_what_to_do(folder, tmp_path):
    argv = arguments(folder, tmp_path / "outputs", 2, data_path=tmp_path / "none")
    assert torchrun(tmp_path / "log", argv, "--standalone", "--nproc_per_node=2").wait(120)
    *_, last, _ = (tmp_path / "log").read_text().splitlines()  # and a line of ====
    sentence = f"{tmp_path}/none: does not exist; --data_path names your files or folder"
    assert re.fullmatch(r" +traceback : error in process \d: (.*)", last)[1] == sentence


def test_two_machines_train_together_and_the_end_of_one_process_ends_all(folder, tmp_path):
    """Two torchrun agents, as two machines run them, with one of them as the meeting point."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=7"]
    options += [f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]
    argv = arguments(folder, tmp_path / "outputs", 2, max_steps=400, save_steps=400)
    logs = [tmp_path / f"log-{machine}" for machine in range(2)]
    agents, end = [torchrun(log, argv, *options) for log in logs], time.monotonic() + 120
    metrics = tmp_path / "outputs" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= 3):
        assert agents[0].poll() is None and time.monotonic() < end, "".join(
            map(Path.read_text, logs)
        )
        time.sleep(0.1)
    pids = subprocess.run(["pgrep", "-P", str(agents[1].pid)], capture_output=True, text=True)
    os.kill(int(pids.stdout.split()[-1]), signal.SIGKILL)
    # A minute, not the half hour of a collective's time-out.
    assert 0 not in [agent.wait(60) for agent in agents]
    assert re.search(r"local_rank: \d\)[^[]+Signal 9", logs[1].read_text()), logs[1].read_text()
    found, wanted = (runs.read_logs(run)[0] for run in (tmp_path / "outputs", folder / "one"))
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-4)
