"""The benchmarks that need other machines or hours: that they run, and count as they say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HAS_TRL = importlib.util.find_spec("trl") is not None  # no requirement of the project


@pytest.fixture(scope="module")
def throughput():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("throughput")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def gpu_report(tmp_path_factory):
    """What benchmarks/gpu.py says and writes on a machine without a GPU."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


def test_gpu_benchmark_runs_without_a_gpu_and_says_what_is_missing(gpu_report):
    printed, report = gpu_report
    assert "no GPU" in printed
    assert report["device"] is None
    assert report["versions"]["torch"] == torch.__version__
    names = {run["contender"] for run in report["runs"]}
    ways = ("", ", compiled", ", all checkpointed")
    assert {f"this trainer{way}" for way in ways} <= names
    assert any(name.startswith("TRL") for name in names) == HAS_TRL
    assert HAS_TRL or any(note.startswith("TRL: skipped") for note in report["notes"])
    for run in report["runs"]:
        assert run["rows"] in report["rows"]
        assert run["tokens"] > run["trained_tokens"] > 0
        assert run["planned_gib"] > 0 if "this trainer" in run["contender"] else run["padding"] >= 0
        for name in ("s_per_step", "tokens_per_s", "trained_tokens_per_s", "mfu", "peak_gib"):
            assert run[name] is None
    assert {"attention, torch.float32, cpu", "model's gradients, torch.float32, cpu"} <= {
        check["name"] for check in report["numerics"]
    }
    assert all(check["error"] <= check["limit"] for check in report["numerics"])


def test_gpu_benchmark_shows_a_report_again(gpu_report, tmp_path):
    printed, report = gpu_report
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    command = [sys.executable, BENCHMARKS / "gpu.py", "--show", tmp_path / "gpu.json"]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    assert shown and shown in printed


@pytest.mark.parametrize("rows", ["short", "long"])
def test_gpu_benchmark_gives_all_contenders_the_same_work(gpu_report, rows):
    runs = [run for run in gpu_report[1]["runs"] if run["rows"] == rows]
    assert len(runs) == 3 + HAS_TRL
    for run in runs:
        assert not run["void"]
        assert run["first_step_loss"] == pytest.approx(runs[0]["first_step_loss"], rel=1e-6)
        assert run["trained_tokens"] == runs[0]["trained_tokens"]
        repeated = "all checkpointed" in run["contender"] or "TRL" in run["contender"]
        assert run["layer_passes"] == 2 or not repeated


@pytest.mark.parametrize("checkpointing", [False, True])
def test_throughput_counts_the_matrix_products_that_run(throughput, checkpointing):
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    config = transformers.Qwen2Config(**sizes, **heads)
    model = transformers.Qwen2ForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokens, passes = 100, 1 + checkpointing
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids)["loss"].backward()
    # The counter has no formula for attention on the CPU.
    attention = 4 * 64 * tokens * (tokens + 1) / 2 * 3 * (passes + 2)
    row = {"input_ids": ids[0].tolist(), "labels": ids[0].tolist()}
    counted = throughput.matrix_flops(config, [row], passes) - attention
    assert counter.get_total_flops() == counted
