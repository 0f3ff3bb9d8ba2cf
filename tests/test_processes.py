"""Several processes: the rank law, sharding, checkpoints, and the end of one process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
STEPS, ROWS = 10, 8  # rows of an optimizer step, of all processes together


def flags(output_dir: Path, model: Path, world: int, **more) -> list[str]:
    values = {
        "model_name_or_path": model,
        "data_path": ROOT / "data",
        "output_dir": output_dir,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ROWS // world,
        "tokens_per_forward": 700,  # rows have 79 to 1462
        "max_steps": STEPS,
        "save_steps": 5,
        "learning_rate": 3e-3,
        "report_to": "none",
        **more,
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def make_job(folder: Path, model: Path, world: int, sharded: bool = False, **more) -> dict:
    folder.mkdir(exist_ok=True)
    job = {key: more.pop(key) for key in ("compute", "free") if key in more}
    argv = flags(folder / "outputs", model, world, **more)
    return {"world": world, "argv": argv, "folder": str(folder), "sharded": sharded, **job}


def launch(jobs: list[dict], cache: Path) -> list[list[int]]:
    command = [sys.executable, str(ROOT / "tests" / "launch.py"), json.dumps(jobs)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def losses(folder: Path) -> list[float]:
    lines = (folder / "outputs" / "metrics.jsonl").read_text().splitlines()
    return [log["loss"] for log in map(json.loads, lines) if "loss" in log]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "outputs" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tiny_model_dir, untied_model_dir, tmp_path_factory) -> Path:
    """A folder with a run for each way to train the same rows."""
    folder = tmp_path_factory.mktemp("processes")
    jobs = [  # two first: they find nothing encoded yet
        make_job(folder / "two", tiny_model_dir, 2, free=[20, 10]),
        make_job(folder / "one", tiny_model_dir, 1),
        make_job(folder / "four", tiny_model_dir, 4),
        make_job(folder / "sharded", tiny_model_dir, 2, sharded=True),
        make_job(folder / "one-untied", untied_model_dir, 1),
        make_job(folder / "sharded-untied", untied_model_dir, 2, sharded=True),
        make_job(folder / "sharded-bf16", tiny_model_dir, 2, sharded=True, compute="bf16"),
    ]
    codes = launch(jobs, folder / "cache")
    for job, processes in zip(jobs, codes):
        logs = "".join(path.read_text() for path in Path(job["folder"]).glob("log-*"))
        assert processes == [0] * job["world"], logs
    return folder


@pytest.mark.parametrize(
    ("run", "reference"),
    [("two", "one"), ("four", "one"), ("sharded", "one"), ("sharded-untied", "one-untied")],
)
def test_any_number_of_processes_trains_the_same(runs, run, reference):
    """The rank law: rows of very unequal length, the same losses and weights."""
    assert len(losses(runs / reference)) == STEPS
    assert losses(runs / reference)[-1] < losses(runs / reference)[0] - 0.1
    np.testing.assert_allclose(losses(runs / run), losses(runs / reference), rtol=0, atol=1e-4)
    torch.testing.assert_close(weights(runs / run), weights(runs / reference), rtol=0, atol=1e-3)


def test_sharded_layers_in_bf16(runs):
    """Layers are rounded to 8 bits; the loss and sums of gradients are not."""
    np.testing.assert_allclose(losses(runs / "sharded-bf16"), losses(runs / "one"), rtol=5e-4)
    assert losses(runs / "sharded-bf16") != losses(runs / "sharded")
    assert {tensor.dtype for tensor in weights(runs / "sharded-bf16").values()} == {torch.float32}


def test_the_export_of_shards_is_an_ordinary_model(runs):
    exported = runs / "sharded" / "outputs"
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["use_cache"]
    assert weights(runs / "sharded").keys() == weights(runs / "one").keys()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        exported, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model) is transformers.Qwen2ForCausalLM
    shards = list((exported / "checkpoint-10" / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert len(shards) == 2  # each process has saved its own


def test_one_process_speaks_and_each_row_is_encoded_once(runs):
    assert "eval_loss" in (runs / "two" / "log-0").read_text()
    assert (runs / "two" / "log-1").read_text() == ""
    encoded = [int(n) for file in runs.glob("*/encoded-*") for n in file.read_text().split()]
    assert sorted(encoded) == [24, 230]


def test_processes_plan_for_the_one_with_the_least(runs):
    """Of 20 and 10 GiB: nine tenths of 10, and of these each has a half."""
    assert "of 4.5 GiB" in (runs / "two" / "log-0").read_text()


def test_every_process_runs_its_share_of_the_forward_passes(runs):
    logs = [(runs / name / "log-0").read_text() for name in ("one", "four")]
    one, four = (int(re.search(r"(\d+) or so forward passes", log)[1]) for log in logs)
    assert one >= 4 and four == -(-one // 4)


@pytest.mark.parametrize("model", ["tiny_model_dir", "untied_model_dir"])
def test_gradients_of_shards_are_those_of_one_process(model, request, tmp_path):
    """The model's forward under fully_shard, with gradient checkpointing."""
    model_dir, jobs = str(request.getfixturevalue(model)), []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        jobs.append({"world": world, "folder": str(folder), "gradients": model_dir})
    assert launch(jobs, tmp_path / "cache") == [[0], [0, 0]], (tmp_path / "2/log-0").read_text()
    alone, shards = (torch.load(tmp_path / str(world) / "step.pt") for world in (1, 2))
    assert alone.pop("passes") > shards.pop("passes") > 1
    torch.testing.assert_close(shards, alone, rtol=1e-5, atol=1e-5)


def test_shards_are_resumed_by_any_number_of_processes(runs, tiny_model_dir, tmp_path):
    jobs = [
        make_job(tmp_path / "two", tiny_model_dir, 2, sharded=True, resume=True),
        make_job(tmp_path / "four", tiny_model_dir, 4, sharded=True, resume=True),
        make_job(tmp_path / "one", tiny_model_dir, 1, resume=True),
    ]
    for job in jobs:
        outputs = Path(job["folder"], "outputs")
        shutil.copytree(runs / "sharded" / "outputs", outputs)
        shutil.rmtree(outputs / "checkpoint-10")
        (outputs / "model.safetensors").unlink()
    assert launch(jobs, runs / "cache") == [[0, 0], [0] * 4, [1]]
    for name in ("two", "four"):
        text = (tmp_path / name / "log-0").read_text()
        assert "checkpoint-5" in text and "step 6/10" in text and "step 5/10" not in text
        np.testing.assert_allclose(losses(tmp_path / name), losses(runs / "one"), atol=1e-4)
        torch.testing.assert_close(
            weights(tmp_path / name), weights(runs / "one"), rtol=0, atol=1e-3
        )
    text = (tmp_path / "one" / "log-0").read_text()
    assert "cannot be resumed: sharded was True and is False" in text


# ---- torchrun itself ----------------------------------------------------------------------------
def torchrun(log: Path, argv: list[str], *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    command += [str(ROOT / "sft_qwen2.py"), *argv]
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def test_the_end_of_one_process_ends_all(tiny_model_dir, tmp_path):
    metrics, log = tmp_path / "outputs" / "metrics.jsonl", tmp_path / "log"
    argv = flags(tmp_path / "outputs", tiny_model_dir, 2, max_steps=400, save_steps=1)
    run = torchrun(log, argv, "--standalone", "--nproc_per_node=2")
    end = time.monotonic() + 90
    while time.monotonic() < end and run.poll() is None:
        if metrics.exists() and metrics.read_text().count('"loss"') >= 3:
            break
        time.sleep(0.1)
    pids = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout
    os.kill(int(pids.split()[-1]), signal.SIGKILL)
    assert run.wait(60) != 0  # a minute, not the half hour of a collective's time-out
    text = log.read_text()
    assert re.search(r"rank +: \d \(local_rank: \d\)", text) and "Signal 9" in text, text
    done = metrics.read_text().count('"loss"')
    again = torchrun(log, [*argv, "--resume"], "--standalone", "--nproc_per_node=2")
    while time.monotonic() < end + 60 and again.poll() is None:
        if metrics.read_text().count('"loss"') >= done + 2:
            break
        time.sleep(0.1)
    again.terminate()
    again.wait(60)
    assert re.search(r"resume +from \S+checkpoint-\d+", log.read_text()), log.read_text()
    steps = [
        json.loads(line)["step"] for line in metrics.read_text().splitlines() if "loss" in line
    ]
    assert sorted(set(steps)) == list(range(max(steps) + 1))


def test_two_machines_train_together(runs, tiny_model_dir, tmp_path):
    """Two torchrun agents, as two machines run them, with one of them as the meeting point."""
    from launch import free_port

    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=7"]
    options += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    argv = flags(tmp_path / "outputs", tiny_model_dir, 2)
    logs = [tmp_path / f"log-{machine}" for machine in range(2)]
    agents = [torchrun(log, argv, *options) for log in logs]
    assert [agent.wait(120) for agent in agents] == [0, 0], "".join(map(Path.read_text, logs))
    np.testing.assert_allclose(losses(tmp_path), losses(runs / "one"), rtol=0, atol=1e-4)
