"""The benchmarks that need other machines or hours: that they run, and count as they say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import throughput
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HAS_TRL = importlib.util.find_spec("trl") is not None  # no requirement of the project


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_a_gpu_and_says_what_is_missing(tmp_path):
    """All contenders but the compiled one, which is left to a GPU: the same work, the same loss."""
    contenders = ["numerics", "this trainer", "TRL", "this trainer, all checkpointed"]
    command, out = [sys.executable, BENCHMARKS / "gpu.py"], tmp_path / "gpu.json"
    options = {"capture_output": True, "text": True}
    done = subprocess.run([*command, "--out", out, "--contenders", *contenders], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert "no GPU" in done.stdout and report["device"] is None
    assert {"attention, torch.float32, cpu", "model's gradients, torch.float32, cpu"} <= {
        check["name"] for check in report["numerics"] if check["error"] <= check["limit"]
    }
    assert HAS_TRL or any(note.startswith("TRL: skipped") for note in report["notes"])
    runs = report["runs"]
    assert len(runs) == 2 * (2 + HAS_TRL)  # on short and on long rows
    for run in runs:
        (first, *_) = (other for other in runs if other["rows"] == run["rows"])
        assert not run["void"] and run["tokens"] > run["trained_tokens"] == first["trained_tokens"]
        assert run["first_step_loss"] == pytest.approx(first["first_step_loss"], rel=1e-6)
        again = "all checkpointed" in run["contender"] or "TRL" in run["contender"]
        assert run["layer_passes"] == 2 or not again
        assert run["planned_gib"] > 0 if "this trainer" in run["contender"] else run["padding"] >= 0
        for name in ("s_per_step", "tokens_per_s", "trained_tokens_per_s", "mfu", "peak_gib"):
            assert run[name] is None
    shown = subprocess.run([*command, "--show", out], **options).stdout
    assert shown and shown in done.stdout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_throughput_counts_the_matrix_products_that_run(checkpointing):
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
