"""Several processes: the rank law, shards and their checkpoints, and the end of one process."""

import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file

from sft.rows import UserError
from sft.shards import ContentsReader

pytestmark = pytest.mark.slow
STEPS, ROWS, OVERFLOW = 6, 8, 3  # rows of a step, in all processes, of 63 to 1568 tokens each
DATA = ROOT / "data"
KILLS = int(os.environ.get("KILLS", 3))  # the long form: KILLS=50


def flags(output_dir: Path, model: Path, world: int, **more) -> list[str]:
    values = {"model_name_or_path": model, "data_path": DATA / "train.jsonl", "max_steps": STEPS}
    values |= {"output_dir": output_dir, "save_steps": 2, "save_total_limit": 9}
    values |= {"per_device_train_batch_size": ROWS // world, "gradient_accumulation_steps": 1}
    values |= {"tokens_per_forward": 250, "learning_rate": 3e-3, "report_to": "none", **more}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def launch(jobs: list[dict], cache: Path) -> list:
    command = [sys.executable, str(ROOT / "tests" / "launch.py"), json.dumps(jobs)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model_dir(untied_model_dir, tiny_tokenizer, tmp_path_factory) -> Path:
    """A small Qwen2 with random weights, with a tied head, and wide enough for 8-bit state."""
    folder = tmp_path_factory.mktemp("tied-qwen2")
    shape = {"hidden_size": 128, "intermediate_size": 512, "tie_word_embeddings": True}
    config = transformers.AutoConfig.from_pretrained(untied_model_dir, **shape)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(model_dir, untied_model_dir, tmp_path_factory) -> Path:
    """A folder with a run for each way to train the same rows."""
    folder, untied = tmp_path_factory.mktemp("runs"), untied_model_dir

    def job(name, world, compute=None, begin=None, model=model_dir, free=None, **more) -> dict:
        argv = flags(folder / name / "outputs", model, world, resume=begin is not None, **more)
        job = {"world": world, "folder": str(folder / name), "argv": argv, "compute": compute}
        job |= {"free": free, "begin": begin and [str(folder / begin[0]), begin[1]]}
        job |= {"overflow": OVERFLOW if compute == "fp16" else None}
        return {name: value for name, value in job.items() if value is not None}

    jobs = [
        job("two", 2, data_path=DATA, free=[20, 10]),  # the first: it finds nothing encoded yet
        job("one", 1),
        job("four", 4),
        job("shards", 2, "fp32", data_path=DATA, eval_strategy="steps", eval_steps=2),
        job("one-untied", 1, model=untied),
        job("shards-untied", 2, "fp32", model=untied),
        *(job(f"bf16-{world}", world, "bf16") for world in (1, 2, 4)),
        *(job(f"fp16-{world}", world, "fp16") for world in (1, 2)),
        job("bf16-2-2", 2, "bf16", begin=("bf16-2", 2)),
        job("bf16-4-2", 2, "bf16", begin=("bf16-4", 2)),
        job("bf16-4-2-1", 1, "bf16", begin=("bf16-4-2", 4)),
        job("bf16-1-4", 4, "bf16", begin=("bf16-1", 2)),
        job("fp16-2-1", 1, "fp16", begin=("fp16-2", 2)),
    ]
    for job, codes in zip(jobs, launch(jobs, folder / "cache")):
        texts = [path.read_text() for path in Path(job["folder"]).glob("log-*")]
        assert codes == [0] * job["world"], "".join(texts)
    return folder


def logs(folder: Path) -> list[dict]:
    lines = (folder / "outputs" / "metrics.jsonl").read_text().splitlines()
    return [log for log in map(json.loads, lines) if "loss" in log]


def logged(folder: Path, name: str = "loss") -> list[float]:
    return [log[name] for log in logs(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "outputs" / "model.safetensors")


def seen(folder: Path, name: str) -> list[list]:
    """Return what each process of a run has told under this name."""
    lines = [file.read_text().splitlines() for file in sorted(folder.glob("seen-*"))]
    return [[told[name] for told in map(json.loads, each) if name in told] for each in lines]


ALIKE = [("two", "one"), ("four", "one"), ("shards", "one"), ("shards-untied", "one-untied")]


@pytest.mark.parametrize(("run", "reference"), ALIKE)
def test_any_number_of_processes_trains_the_same(runs, run, reference):
    """The rank law: rows of very unequal length, the same losses and weights."""
    assert len(logged(runs / reference)) == STEPS
    np.testing.assert_allclose(logged(runs / run), logged(runs / reference), rtol=0, atol=1e-4)
    torch.testing.assert_close(weights(runs / run), weights(runs / reference), rtol=0, atol=1e-3)


@pytest.mark.parametrize("run", ["bf16-2", "bf16-4", "fp16-2"])
def test_shards_train_in_half_precision_as_one_process_does(runs, run):
    """By the default optimizer: AdamW with 8-bit state, over bf16 weights with random rounding."""
    reference = runs / f"{run[:4]}-1"
    np.testing.assert_allclose(logged(runs / run), logged(reference), rtol=0, atol=2e-3)
    np.testing.assert_allclose(logged(reference)[:3], logged(runs / "one")[:3], rtol=1e-3)
    for formats in seen(runs / run, "sum"):  # of the gradients that processes exchange
        assert set(formats) == {"torch.float32"}


def test_an_overflow_in_one_shard_skips_the_step_in_all(runs):
    """Its rows are not trained, the schedule waits: as in one process, whose scale is the same."""
    for run in (runs / "fp16-1", runs / "fp16-2"):
        rates, norms = logged(run, "learning_rate"), logged(run, "grad_norm")
        assert [x == float("inf") for x in norms] == [s == OVERFLOW for s in range(1, STEPS + 1)]
        assert rates[OVERFLOW] == rates[OVERFLOW - 1] < rates[OVERFLOW - 2]
        assert [log.get("skipped_steps", 0) for log in logs(run)] == [0, 0, 1, 1, 1, 1]
        scaler = torch.load(run / "outputs" / f"checkpoint-{STEPS}" / "scaler.pt")
        assert scaler["scale"] == 2**15


def test_rounding_differs_between_processes_and_steps(runs):
    seeds = [seed for each in seen(runs / "bf16-4", "seed") for seed in each]
    assert len(set(seeds)) == len(seeds) == 4 * STEPS
    resumed, reference = (seen(runs / run, "seed") for run in ("bf16-2-2", "bf16-2"))
    assert [each[-4:] for each in resumed] == [each[-4:] for each in reference]


def test_the_export_of_shards_is_an_ordinary_model(runs):
    for run in ("shards", "bf16-4", "fp16-2"):
        exported = runs / run / "outputs"
        config = json.loads((exported / "config.json").read_text())
        assert config["architectures"] == ["Qwen2ForCausalLM"] and config["use_cache"]
        assert weights(runs / run).keys() == weights(runs / "one").keys()
        assert {x.dtype for x in weights(runs / run).values()} == {torch.bfloat16}  # the base's
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            exported, output_loading_info=True
        )
        assert type(model) is transformers.Qwen2ForCausalLM
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_one_process_speaks_and_each_row_is_encoded_once(runs):
    assert "eval_loss" in (runs / "two" / "log-0").read_text()
    assert (runs / "two" / "log-1").read_text() == ""
    encoded = [number for run in runs.iterdir() for each in seen(run, "rows") for number in each]
    files = [DATA / f"{split}.jsonl" for split in ("train", "validation")]
    assert sorted(encoded) == sorted(len(file.read_bytes().splitlines()) for file in files)


def test_processes_plan_for_the_least_and_share_the_forward_passes(runs):
    """Of 20 and 10 GiB: nine tenths of 10, and of these each has a half."""
    texts = {run: (runs / run / "log-0").read_text() for run in ("one", "two", "four")}
    assert "of 4.5 GiB" in texts["two"]
    one, four = (int(re.search(r"(\d+) or so forward", texts[run])[1]) for run in ("one", "four"))
    assert one >= 4 and four == -(-one // 4)


def test_any_number_of_processes_resumes(runs):
    """With the optimizer's state and the schedule; by as many processes, to the last digit."""
    assert logged(runs / "bf16-2-2") == logged(runs / "bf16-2")
    torch.testing.assert_close(weights(runs / "bf16-2-2"), weights(runs / "bf16-2"), rtol=0, atol=0)
    for run, begin in [("bf16-4-2", 4), ("bf16-4-2-1", 4), ("bf16-1-4", 1), ("fp16-2-1", 2)]:
        reference = runs / f"{run[:4]}-{begin}"
        assert "resume     from" in (runs / run / "log-0").read_text()
        assert logged(runs / run, "learning_rate") == logged(reference, "learning_rate")
        assert logged(runs / run)[:2] == logged(reference)[:2]
        np.testing.assert_allclose(logged(runs / run), logged(reference), rtol=0, atol=2e-3)


def test_no_checkpoint_of_shards_runs_code(runs, tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for part in ("optimizer_0", "pytorch_model_fsdp_0"):
        contents = runs / "bf16-2" / "outputs" / "checkpoint-2" / part / ".metadata"
        assert ContentsReader(io.BytesIO(contents.read_bytes())).load()
    with pytest.raises(UserError, match=r"would run pathlib\.Path\.touch"):
        ContentsReader(io.BytesIO(pickle.dumps(Attack()))).load()
    assert not (tmp_path / "ran").exists()


def test_killed_shards_resume_exactly(model_dir, tmp_path):
    """SIGKILL at random moments: in the end losses, weights and 8-bit state are those without."""
    job = {"world": 2, "compute": "bf16", "kills": KILLS, "folder": str(tmp_path)}
    job["argv"] = flags(tmp_path, model_dir, 2, save_steps=1, save_total_limit=2)
    [counts] = launch([job], tmp_path / "cache")
    print(json.dumps(counts))
    reference, state = tmp_path / "0", Path("outputs", f"checkpoint-{STEPS}", "manifest.json")
    for number in range(1, counts["runs"] + 1):
        run = tmp_path / str(number)
        for name in ("loss", "grad_norm", "learning_rate"):
            assert logged(run, name) == logged(reference, name)
        torch.testing.assert_close(weights(run), weights(reference), rtol=0, atol=0)
        saved, expected = (json.loads((x / state).read_text()) for x in (run, reference))
        shards = [name for name in expected if name.endswith(".distcp")]
        assert len(shards) == 4 and [saved[x] for x in shards] == [expected[x] for x in shards]


# ---- torchrun itself ----------------------------------------------------------------------------
def torchrun(log: Path, argv: list[str], *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    command += [str(ROOT / "sft_qwen2.py"), *argv]
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def test_the_last_thing_that_torchrun_says_is_what_to_do(model_dir, tmp_path):
    argv = flags(tmp_path / "outputs", model_dir, 2, data_path=tmp_path / "none")
    assert torchrun(tmp_path / "log", argv, "--standalone", "--nproc_per_node=2").wait(120)
    *_, last, _ = (tmp_path / "log").read_text().splitlines()  # and a line of ====
    sentence = f"{tmp_path}/none: does not exist; --data_path names your files or folder"
    assert re.fullmatch(r" +traceback : error in process \d: (.*)", last)[1] == sentence


def test_the_end_of_one_process_ends_all(model_dir, tmp_path):
    metrics, log = tmp_path / "outputs" / "metrics.jsonl", tmp_path / "log"
    argv = flags(tmp_path / "outputs", model_dir, 2, max_steps=400)
    run, end = torchrun(log, argv, "--standalone", "--nproc_per_node=2"), time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= 3):
        assert run.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    pids = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout
    os.kill(int(pids.split()[-1]), signal.SIGKILL)
    assert run.wait(60) != 0  # a minute, not the half hour of a collective's time-out
    assert re.search(r"local_rank: \d\)[^[]+Signal 9", log.read_text()), log.read_text()


def test_two_machines_train_together(runs, model_dir, tmp_path):
    """Two torchrun agents, as two machines run them, with one of them as the meeting point."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=7"]
    options += [f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]
    argv = flags(tmp_path / "outputs", model_dir, 2)
    paths = [tmp_path / f"log-{machine}" for machine in range(2)]
    agents = [torchrun(path, argv, *options) for path in paths]
    assert [agent.wait(120) for agent in agents] == [0, 0], "".join(map(Path.read_text, paths))
    np.testing.assert_allclose(logged(tmp_path), logged(runs / "one"), rtol=0, atol=1e-4)
