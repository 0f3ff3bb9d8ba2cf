"""The benchmarks: that they start, and that what they compare is the same work."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import forks
import pytest
import torch
import transformers
from runs import ROOT, TINY
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = ROOT / "benchmarks"
COMMANDS = [
    "boxes.py",
    "compiled.py",
    "encoding.py",
    "gpu.py",
    "memory.py",
    "pipeline.py",
    "precision.py",
    "roofline.py",
    "throughput.py",
]
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path():
    sys.path.append(str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def call_main(name: str, *words: str) -> int:
    """Call main() of a benchmark with these words on its command line."""
    sys.path.append(str(BENCHMARKS))
    sys.argv = [name, *words]
    return importlib.import_module(Path(name).stem).main()


@pytest.mark.slow
def test_help_says_what_a_benchmark_is_for(tmp_path):
    names = [name for name in COMMANDS if name != "boxes.py"]
    for name in names:
        ended = forks.run(tmp_path / name, (call_main, name, "--help"))
        assert ended.codes == [0], ended.texts
        assert ended.texts[0].startswith(f"usage: {name}")


def test_the_readme_names_all_benchmarks():
    readme = Path(BENCHMARKS, "README.md").read_text("utf-8")
    for name in COMMANDS:
        assert f"benchmarks/{name}" in readme, name


def test_the_readme_names_no_file_that_is_gone():
    readme = Path(BENCHMARKS, "README.md").read_text("utf-8")
    for word in readme.split():
        if word.startswith(("benchmarks/", "tests/")) and word.endswith(".py"):
            assert (ROOT / word).is_file(), word


def make_task(folder: Path):
    """Return examples of four to a step, for two steps."""
    import throughput

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    throughput.save_model(tokenizer, str(folder), SIZES)
    examples = throughput.RandomExamples(
        number=8, shortest=5, longest=60, skew=2.0, trained_share=0.5
    )
    options = {
        "output_dir": str(folder),
        "max_steps": 2,
        "seed": throughput.SEED,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "optim": "adamw_torch_fused",
    }
    return throughput.Task(
        folder=str(folder),
        tokenizer=tokenizer,
        examples=examples.make(len(tokenizer)),
        longest=60,
        options=options,
    )


@pytest.mark.slow
def test_all_ways_of_throughput_do_the_same_work(tmp_path):
    import throughput

    task = make_task(tmp_path)
    own = throughput.CONTENDERS["this trainer"](task)
    assert own.trained_tokens > 0
    for name in ("padded to longest", "dynamic padding"):
        result = throughput.CONTENDERS[name](task)
        assert result.first_step_loss == pytest.approx(own.first_step_loss, rel=1e-6), name
        assert result.trained_tokens == own.trained_tokens, name
        assert result.computed_tokens > own.computed_tokens, name
        assert result.layer_passes == 2, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_throughput_counts_the_matrix_products_that_run(checkpointing):
    import throughput

    config = transformers.Qwen2Config(**SIZES, vocab_size=128)
    model = transformers.Qwen2ForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    num_tokens = 100
    ids = torch.arange(num_tokens)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids)["loss"].backward()
    passes = 1 + checkpointing
    # The counter has no formula for attention on the CPU.
    attention = 4 * 64 * num_tokens * (num_tokens + 1) / 2 * 3 * (passes + 2)
    # The counter sees logits of every token. Here the first label does not count.
    labels = torch.cat([torch.tensor([-100]), ids[0]]).numpy()
    example = {"input_ids": ids[0].numpy(), "labels": labels}
    counted = throughput.count_matrix_flops(config, [example], passes) - attention
    assert counter.get_total_flops() == counted


def test_the_loss_for_an_older_pytorch_is_the_usual_one():
    from torch_2_11 import ChunkedCrossEntropy

    torch.manual_seed(0)
    hidden = torch.randn(1500, 16, requires_grad=True)  # two chunks, the second not full
    head = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (1500,))
    wanted = cross_entropy(hidden @ head.T, targets, reduction="sum")
    wanted_gradients = torch.autograd.grad(wanted, (hidden, head))
    found = ChunkedCrossEntropy.apply(hidden, head, targets)
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(torch.autograd.grad(found, (hidden, head)), wanted_gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_a_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    contenders = [
        "numerics",
        "fp16 resumed",
        "host memory",
        "this trainer",
        "this trainer, 23 GiB",
        "TRL",
        "this trainer, all checkpointed",
    ]
    words = ("--out", str(out), "--contenders", *contenders)
    ended = forks.run(tmp_path / "log", (call_main, "gpu.py", *words))
    assert ended.codes == [0], ended.texts
    report = json.loads(out.read_text())
    assert report["device"] is None
    assert "no GPU" in ended.texts[0]
    names = [check["name"] for check in report["numerics"]]
    assert "attention, torch.float32, cpu" in names
    assert "model's gradients, torch.float32, cpu" in names
    assert "fp16 resumed, cpu: weights" in names
    for check in report["numerics"]:
        assert check["error"] <= check["limit"], check
    facts = {fact["what"]: fact["figures"] for fact in report["facts"]}
    assert facts["a save"]["gb"] == pytest.approx(facts["a save"]["planned_gb"], rel=0.05)
    assert facts["40 answers"]["questions"] == 8  # of as many examples
    assert facts["host memory of a 0.5B"]["asked_gib"] > 0
    own = [run for run in report["runs"] if "this trainer" in run["contender"]]
    assert len(own) == 5  # two ways, short and long examples; short ones in host memory
    for run in report["runs"]:
        assert "error" not in run
        assert not run["void"]
        assert "s_per_step" not in run
        if "all checkpointed" in run["contender"]:
            assert run["layer_passes"] == 2
        assert ("host_gib" in run) == ("23 GiB" in run["contender"])
    if not importlib.util.find_spec("trl"):
        assert any(note.startswith("TRL: skipped") for note in report["notes"])
    shown = forks.run(tmp_path / "shown", (call_main, "gpu.py", "--show", str(out)))
    assert shown.texts[0] in ended.texts[0]
