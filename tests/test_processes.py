"""Several processes: the rank law, number formats in shards, and what all must agree on."""

import json
import re
from pathlib import Path

import forks
import numpy as np
import pytest
import runs
import torch
from runs import ROOT
from safetensors.torch import load_file

import sft_qwen2

pytestmark = pytest.mark.slow
NUM_STEPS = 4
EXAMPLES_PER_STEP = 8  # in all processes, of unequal lengths
OVERFLOWING_STEP = 2
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}  # for 8-bit state


# ---- Actions in a process before main() ---------------------------------------------------------
def overflow(steps: list[int]) -> None:
    """Let the last process's part of one gradient be infinite in these steps."""

    class OverflowingTrainer(sft_qwen2.SFTTrainer):
        def forward_backward(self, *args):
            loss = super().forward_backward(*args)
            is_last = self.args.process_index == self.args.world_size - 1
            if is_last and self.state.global_step + 1 in steps:
                grad = next(self.model.parameters()).grad
                if self.is_fsdp_enabled:
                    grad = grad.to_local()
                grad[-1] = float("inf")
            return loss

    sft_qwen2.SFTTrainer = OverflowingTrainer


def allow_few_skips() -> None:
    sft_qwen2.MAX_CONSECUTIVE_SKIPS = 2


def watch(path: Path) -> None:
    """Write facts to a file, as JSON.

    They are dtypes of hidden states and exchanged gradients, seeds of the rounding, and whether the
    weights come from another process.
    """

    def tell(**fact):
        with open(path, "a") as file:
            file.write(json.dumps(fact) + "\n")

    class WatchedTrainer(sft_qwen2.SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            layer = self.model.model.layers[0]
            layer.register_forward_hook(lambda *call: tell(hidden=str(call[-1].dtype)))

    sft_qwen2.SFTTrainer = WatchedTrainer
    load_weights = sft_qwen2.load_weights
    reduce_scatter = torch.distributed.reduce_scatter_single
    manual_seed = torch.manual_seed

    def watched_load(*args, weights_are_sent, **kwargs):
        tell(is_sent=weights_are_sent)
        return load_weights(*args, weights_are_sent=weights_are_sent, **kwargs)

    def watched_reduce_scatter(*args, **kwargs):
        tensor = kwargs.get("input", args[1] if len(args) > 1 else None)
        tell(exchanged=str(tensor.dtype))
        return reduce_scatter(*args, **kwargs)

    def watched_seed(seed):
        if seed > 2**32:  # the rounding's
            tell(seed=seed)
        return manual_seed(seed)

    sft_qwen2.load_weights = watched_load
    torch.distributed.reduce_scatter_single = watched_reduce_scatter
    torch.manual_seed = watched_seed


# ---- All runs, once -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder where each way to train the same rows has run."""
    folder = tmp_path_factory.mktemp("processes")
    runs.make_model(folder / "tied", dtype="bfloat16", **SIZES)
    runs.make_model(folder / "untied", tied=False, dtype="bfloat16", **SIZES)
    (folder / "data").mkdir()
    lines = (ROOT / "data" / "train.jsonl").read_bytes().splitlines(keepends=True)
    lines = [line for line in lines if len(line) < 500]
    (folder / "data" / "train.jsonl").write_bytes(b"".join(lines[::8][:25]))  # a last step of one
    (folder / "data" / "validation.jsonl").write_bytes(b"".join(lines[1::50]))

    def run(name, num_processes, compute=None, actions=(), exit_code=0, last=None, **flags):
        shared = {
            "model_name_or_path": folder / "tied",
            "data_path": folder / "data",
            "output_dir": folder / name,
            "per_device_train_batch_size": EXAMPLES_PER_STEP // num_processes,
            "gradient_accumulation_steps": 1,
            "tokens_per_forward": 120,
            "learning_rate": 3e-3,
            "save_steps": 2,
            "report_to": "none",
            **flags,
        }
        calls = []
        for rank in range(num_processes):
            argv = runs.argv(**shared)
            if last and rank == num_processes - 1:
                argv += runs.argv(**last)
            chosen = []
            if compute:
                chosen.append((forks.take_for_gpu, compute, num_processes > 1))
            chosen.append((watch, folder / f"{name}.seen-{rank}"))
            chosen += actions
            calls.append((forks.main_after, chosen, argv))
        ended = forks.run(folder / f"{name}.log", *calls, cache=folder / "cache")
        assert ended.codes == [exit_code] * num_processes, "".join(ended.texts)

    run("one", 1)
    run("two", 2)
    run("shards", 4, "fp32", eval_strategy="steps", eval_steps=2)
    run("one-untied", 1, model_name_or_path=folder / "untied")
    run("shards-untied", 2, "fp32", model_name_or_path=folder / "untied")
    for num_processes in (1, 4):
        run(f"bf16-{num_processes}", num_processes, "bf16")
    for num_processes in (1, 2):
        skip = [(overflow, [OVERFLOWING_STEP])]
        run(f"fp16-{num_processes}", num_processes, "fp16", actions=skip)
    always = [(overflow, list(range(1, 9))), (allow_few_skips,)]
    run("skipped", 1, "fp16", actions=always, exit_code=1)
    run("other", 2, exit_code=1, last={"learning_rate": 1e-3})
    return folder


def logged(run: Path, name: str = "loss") -> list[float]:
    return [log[name] for log in runs.read_logs(run, name)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def seen(run: Path, name: str) -> list[list]:
    """Return what each process of a run has told under this name."""
    told = []
    for path in sorted(run.parent.glob(f"{run.name}.seen-*")):
        facts = [json.loads(line) for line in path.read_text().splitlines()]
        told.append([fact[name] for fact in facts if name in fact])
    return told


def text(run: Path, rank: int = 0) -> str:
    return Path(f"{run}.log-{rank}").read_text()


# ---- The rank law -------------------------------------------------------------------------------
ALIKE = [("two", "one"), ("shards", "one"), ("shards-untied", "one-untied")]


@pytest.mark.parametrize(("run", "reference"), ALIKE)
def test_any_number_of_processes_has_the_same_losses(folder, run, reference):
    assert len(logged(folder / reference)) == NUM_STEPS
    np.testing.assert_allclose(logged(folder / run), logged(folder / reference), atol=1e-4)


@pytest.mark.parametrize(("run", "reference"), ALIKE)
def test_any_number_of_processes_trains_the_same_weights(folder, run, reference):
    torch.testing.assert_close(
        weights(folder / run), weights(folder / reference), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize(("run", "reference"), ALIKE)
def test_eval_loss_is_that_of_all_processes(folder, run, reference):
    """A process alone would log its own share of the sum."""
    mine = logged(folder / run, "eval_loss")
    theirs = logged(folder / reference, "eval_loss")
    np.testing.assert_allclose([mine[0], mine[-1]], [theirs[0], theirs[-1]], atol=1e-3)


@pytest.mark.parametrize(("run", "num_readers"), [("one", 1), ("two", 2), ("shards", 1)])
def test_one_process_reads_the_weights_of_a_model_in_shards(folder, run, num_readers):
    """In fp32 they take 30 GB of host memory for a 7B, in each process that reads them."""
    is_sent = [sent for of_rank in seen(folder / run, "is_sent") for sent in of_rank]
    assert is_sent == [False] * num_readers + [True] * (len(is_sent) - num_readers)


# ---- Number formats -----------------------------------------------------------------------------
@pytest.mark.parametrize(("run", "reference"), [("bf16-4", "bf16-1"), ("fp16-2", "fp16-1")])
def test_shards_train_in_half_precision_as_one_process_does(folder, run, reference):
    """By the default optimizer: AdamW with 8-bit state; bf16 weights are rounded at random."""
    np.testing.assert_allclose(logged(folder / run), logged(folder / reference), atol=6e-3)


@pytest.mark.parametrize("run", ["bf16-4", "fp16-2", "shards"])
def test_shards_exchange_gradients_in_fp32(folder, run):
    for formats in seen(folder / run, "exchanged"):
        assert set(formats) == {"torch.float32"}


@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        ("bf16-1", "torch.bfloat16"),
        ("bf16-4", "torch.bfloat16"),
        ("fp16-1", "torch.float32"),
        ("fp16-2", "torch.float32"),
    ],
)
def test_hidden_states_have_the_same_format_in_shards(folder, run, dtype):
    """In fp16 they would overflow: autocast keeps them in fp32, and so do shards."""
    for formats in seen(folder / run, "hidden"):
        assert set(formats) == {dtype}


def test_shards_exchange_gradients_after_each_micro_batch(folder):
    """Otherwise each process would hold the gradients of the whole model."""
    for formats in seen(folder / "shards", "exchanged"):
        assert len(formats) > 3 * NUM_STEPS


def test_rounding_differs_between_processes_and_steps(folder):
    seeds = [seed for of_rank in seen(folder / "bf16-4", "seed") for seed in of_rank]
    assert len(seeds) == 4 * NUM_STEPS
    assert len(set(seeds)) == len(seeds)


# ---- fp16's skipped steps -----------------------------------------------------------------------
@pytest.mark.parametrize("run", ["fp16-1", "fp16-2"])
def test_an_overflow_in_one_shard_skips_the_step_in_all(folder, run):
    norms = logged(folder / run, "grad_norm")
    overflowed = [step for step, norm in enumerate(norms, 1) if norm == float("inf")]
    assert overflowed == [OVERFLOWING_STEP]
    assert logged(folder / run, "skipped_steps") == [0, 1, 1, 1]


@pytest.mark.parametrize("run", ["fp16-1", "fp16-2"])
def test_the_schedule_waits_for_a_skipped_step(folder, run):
    rates = logged(folder / run, "learning_rate")
    assert rates[OVERFLOWING_STEP] == rates[OVERFLOWING_STEP - 1] < rates[OVERFLOWING_STEP - 2]


def test_many_skipped_steps_in_a_row_stop_the_run(folder):
    """The last of them is named, not the one that begins."""
    expected = "step 3: 3 steps in a row had infinite gradients in fp16"
    assert expected in text(folder / "skipped")


# ---- What all must agree on ---------------------------------------------------------------------
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_with_different_arguments_are_refused(folder, rank):
    assert "learning_rate was 0.003, in process 1 0.001" in text(folder / "other", rank)


def test_the_first_process_prints_for_all(folder):
    assert re.search(r"^step 1/4 ", text(folder / "two"), re.MULTILINE)
    assert text(folder / "two", rank=1) == ""
