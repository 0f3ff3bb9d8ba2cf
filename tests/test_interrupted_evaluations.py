"""A run that ends in an evaluation loses no step, and evaluates again when it is resumed."""

import json
import signal

import pytest
import runs
import torch
from safetensors.torch import load_file

import sft_qwen2
from sft import signals

STEPS_PER_EPOCH = 2
LAST_STEP = 6
pytestmark = pytest.mark.slow
FLAGS = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-3,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "save_total_limit": 0,
    "report_to": "none",
}


class Killed(BaseException):
    """The end of the process."""


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(signals, "REPEATS_S", 0)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict:
    """Flags for a small model, 8 rows to train on and 10 to evaluate, 4 at once."""
    folder = tmp_path_factory.mktemp("places")
    for name, num_rows in (("train", 8), ("validation", 10)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for number in range(num_rows):
                row = {"query": f"{number} + 1?", "answer": f"{number + 1}, I {name}."}
                file.write(json.dumps(row) + "\n")
    model = runs.make_model(folder / "model", num_hidden_layers=1)
    return {"model_name_or_path": model, "data_path": folder}


def train(places, output_dir, at_evaluation=None, at_step=None, **flags) -> runs.Run:
    """Run the script. `at_evaluation`, `at_step`: (number of a step, what is called there)."""

    class Trainer(sft_qwen2.SFTTrainer):
        def sum_losses(self, *args):
            if at_evaluation and self.state.global_step == at_evaluation[0]:
                at_evaluation[1]()
            return super().sum_losses(*args)

        def forward_backward(self, *args):
            if at_step and self.state.global_step + 1 == at_step[0]:
                at_step[1]()
            return super().forward_backward(*args)

    words = runs.argv(**{**places, "output_dir": output_dir, **FLAGS, **flags})
    run = runs.watch(*words, trainer_class=Trainer)
    run.output_dir = output_dir
    return run


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def reference(places, tmp_path_factory) -> runs.Run:
    """A run to which nothing happened."""
    return train(places, tmp_path_factory.mktemp("reference"))


def evaluations(run) -> list[tuple]:
    return [(log["step"], log["eval_loss"]) for log in runs.read_logs(run.output_dir, "eval_loss")]


def assert_same_end(run, reference) -> None:
    """Assert that a run ended as the reference: evaluations, best step, exported weights."""
    assert run.code == 0, run.err
    assert evaluations(run) == evaluations(reference)
    state, expected = run.trainer.state, reference.trainer.state
    assert state.global_step == expected.global_step
    assert state.best_global_step == expected.best_global_step
    exported = load_file(run.output_dir / "model.safetensors")
    for name, weight in load_file(reference.output_dir / "model.safetensors").items():
        assert torch.equal(exported[name], weight)


@pytest.mark.parametrize("step", [STEPS_PER_EPOCH, LAST_STEP])
def test_a_signal_in_an_evaluation_loses_nothing(places, reference, tmp_path, step):
    stopped = train(places, tmp_path, at_evaluation=(step, terminate))
    assert stopped.code == 128 + signal.SIGTERM
    assert f"checkpoint-{step} is saved" in stopped.out
    assert step not in dict(evaluations(stopped))
    assert_same_end(train(places, tmp_path, resume=True), reference)


def test_a_signal_in_an_evaluation_saves_a_step_that_was_not_to_be_saved(places, tmp_path):
    flags = {"save_strategy": "steps", "save_steps": 100, "load_best_model_at_end": False}
    stopped = train(places, tmp_path, at_evaluation=(STEPS_PER_EPOCH, terminate), **flags)
    assert f"checkpoint-{STEPS_PER_EPOCH} is saved" in stopped.out
    resumed = train(places, tmp_path, resume=True, **flags)
    assert len(resumed.steps) == LAST_STEP - STEPS_PER_EPOCH
    assert STEPS_PER_EPOCH in dict(evaluations(resumed))


def test_the_last_evaluation_is_that_of_the_exported_weights(places, reference, tmp_path):
    """Where the best step is not the last one, its weights are evaluated once more."""
    steps = [step for step, _ in evaluations(reference)]
    assert steps == [0, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH, LAST_STEP]
    unchanged = train(places, tmp_path, learning_rate=0)
    assert unchanged.trainer.state.best_global_step == STEPS_PER_EPOCH
    assert [step for step, _ in evaluations(unchanged)] == [*steps, LAST_STEP]


def test_a_kill_in_an_evaluation_loses_no_step(places, reference, tmp_path):
    with pytest.raises(Killed):
        train(places, tmp_path, at_evaluation=(STEPS_PER_EPOCH, kill))
    resumed = train(places, tmp_path, resume=True)
    assert len(resumed.steps) == LAST_STEP - STEPS_PER_EPOCH
    assert_same_end(resumed, reference)


def test_a_signal_in_the_evaluation_that_is_made_again(places, reference, tmp_path):
    for flags in ({}, {"resume": True}):
        stopped = train(places, tmp_path, at_evaluation=(STEPS_PER_EPOCH, terminate), **flags)
        assert stopped.code == 128 + signal.SIGTERM
    assert stopped.steps == []
    assert_same_end(train(places, tmp_path, resume=True), reference)


def test_a_stop_within_an_epoch_is_not_evaluated_as_its_end(places, reference, tmp_path):
    stopped = train(places, tmp_path, at_step=(STEPS_PER_EPOCH + 1, terminate))
    assert stopped.code == 128 + signal.SIGTERM
    assert [step for step, _ in evaluations(stopped)] == [0, STEPS_PER_EPOCH]
    assert_same_end(train(places, tmp_path, resume=True), reference)


def test_an_evaluation_that_is_made_again_can_end_the_run(places, tmp_path):
    flags = {"early_stopping_patience": 1, "learning_rate": 0}
    whole = train(places, tmp_path / "whole", **flags)
    end = whole.trainer.state.global_step
    assert end < LAST_STEP
    stopped = train(places, tmp_path / "stopped", at_evaluation=(end, terminate), **flags)
    assert stopped.code == 128 + signal.SIGTERM
    resumed = train(places, tmp_path / "stopped", resume=True, **flags)
    assert resumed.steps == []
    assert_same_end(resumed, whole)


def test_a_signal_in_the_first_evaluation_stops_at_once(places, reference, tmp_path):
    stopped = train(places, tmp_path, at_evaluation=(0, terminate))
    assert stopped.code == 128 + signal.SIGTERM
    assert "nothing is saved" in stopped.err
    assert stopped.steps == []
    assert_same_end(train(places, tmp_path, resume=True), reference)
