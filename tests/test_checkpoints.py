"""Checkpoints: whole or not there, resumed to the bit, best kept, nothing run, nothing lost."""

import errno
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import runs
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)

from sft import checkpoints, export, run_record, whole_files
from sft.checkpoints import CheckpointTrainer
from sft.errors import UserError
from sft.whole_files import ASIDE

BATCH_SIZE = 4
STEPS_PER_EPOCH = 3
STEPS = 2 * STEPS_PER_EPOCH
FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Each training collects garbage, which need not look at all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ---- A small run --------------------------------------------------------------------------------
def make_examples(num_examples: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(num_examples):
        ids = torch.randint(3, 3000, (12,), generator=generator)
        examples.append({"input_ids": ids, "labels": ids})
    return examples


class Trainer(CheckpointTrainer):
    """Evaluates to the losses that it is given, by step."""

    eval_losses: dict = {}  # noqa: RUF012

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": self.eval_losses.get(self.state.global_step, 9.0)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class At(transformers.TrainerCallback):
    """Calls action(trainer) at an event after a step."""

    def __init__(self, event: str, step: int, action):
        self.step = step
        self.action = action
        self.trainer = None
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(self.trainer)


def stop(trainer):
    trainer.control.should_training_stop = True
    trainer.control.should_save = True


def make_trainer(model_dir, output_dir, *callbacks, eval_losses=None, early=None, **options):
    options = {
        "per_device_train_batch_size": BATCH_SIZE,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }
    if eval_losses:
        # Trainer then finds the best by eval_loss.
        options = {"eval_strategy": "steps", "eval_steps": 1, **options}
        options = {"metric_for_best_model": "eval_loss", "greater_is_better": False, **options}
        options = {"load_best_model_at_end": True, **options}
    callbacks = list(callbacks)
    if early:
        callbacks.append(transformers.EarlyStoppingCallback(early))
    trainer = Trainer(
        transformers.Qwen2ForCausalLM.from_pretrained(model_dir),
        transformers.TrainingArguments(str(output_dir), **options),
        train_dataset=make_examples(BATCH_SIZE * STEPS_PER_EPOCH),
        eval_dataset=make_examples(1),
        processing_class=transformers.AutoTokenizer.from_pretrained(model_dir),
        callbacks=callbacks,
    )
    trainer.eval_losses = eval_losses or {}
    for callback in callbacks:
        callback.trainer = trainer
    return trainer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return runs.make_model(tmp_path_factory.mktemp("model") / "tied", num_hidden_layers=1)


@pytest.fixture(scope="module")
def train(model_dir):
    """A function: train in output_dir and return the trainer."""

    def train(output_dir, *callbacks, resume_from=None, **options):
        trainer = make_trainer(model_dir, output_dir, *callbacks, **options)
        checkpoint = None
        if resume_from is not None:
            checkpoint = str(output_dir / f"checkpoint-{resume_from}")
        trainer.train(checkpoint)
        return trainer

    return train


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory):
    """A run to which nothing happened, with all of its checkpoints."""
    return train(tmp_path_factory.mktemp("reference"))


def saved_steps(output_dir) -> list[int]:
    found = run_record.find_checkpoints(Path(output_dir))
    return [run_record.step_of(path) for path in found if run_record.is_whole(path)]


def losses(trainer) -> list[tuple]:
    names = ("step", "loss", "grad_norm", "learning_rate")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [tuple(log[name] for name in names) for log in logs]


def assert_same(found, expected):
    """Assert that nested values are equal, tensors bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    else:
        assert found == expected


def assert_same_end(trainer, reference):
    """Assert that a run ended as the reference did: weights, losses, the optimizer's state."""
    assert losses(trainer) == losses(reference)
    assert_same(trainer.model.state_dict(), reference.model.state_dict())
    assert_same(trainer.optimizer.state_dict(), reference.optimizer.state_dict())
    assert not (trainer.output_dir / ASIDE).exists()


# ---- Stops and kills ----------------------------------------------------------------------------
@pytest.mark.parametrize("step", [2, STEPS_PER_EPOCH, 4])
def test_a_stopped_run_resumes_to_the_bit(train, reference, tmp_path, step):
    """Within an epoch, at its end, and in the next one."""
    train(tmp_path, At("on_step_end", step, stop), save_steps=100)
    assert saved_steps(tmp_path) == [step]
    resumed = train(tmp_path, resume_from=step)
    assert_same_end(resumed, reference)
    assert saved_steps(tmp_path) == list(range(step, STEPS + 1))


class Killed(BaseException):
    """The end of the process."""


class Count:
    """Counts the calls of functions that change files, and is killed before one of them."""

    def __init__(self, monkeypatch, number):
        self.number = number
        self.num_calls = 0
        self.is_active = False
        for module, name in (
            (os, "fsync"),
            (os, "replace"),
            (os, "rmdir"),
            (os, "unlink"),
            (os, "chmod"),
            (torch, "save"),
            (export, "save_file"),
        ):
            self.watch(monkeypatch, module, name)

    def watch(self, monkeypatch, module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            if self.is_active:
                self.num_calls += 1
                if self.num_calls == self.number:
                    raise Killed
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    def begin(self, trainer):
        self.is_active = True

    def end(self, trainer):
        self.is_active = False


def kill_in_save(train, output_dir, number) -> Count:
    """Train; in the save of step 3, which removes a checkpoint, be killed before a call."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        count = Count(monkeypatch, number)
        begin = At("on_step_end", 3, count.begin)
        end = At("on_save", 3, count.end)
        try:
            train(output_dir, begin, end, save_total_limit=2)
        except Killed:
            assert count.num_calls == number
    return count


@pytest.mark.slow
def test_a_run_killed_in_a_save_resumes_to_the_bit(train, reference, tmp_path):
    """Before every third call that changes a file; the save also removes a checkpoint."""
    num_calls = kill_in_save(train, tmp_path / "whole", 0).num_calls
    assert num_calls > 20
    for number in range(1, num_calls + 1, 3):
        output_dir = tmp_path / str(number)
        kill_in_save(train, output_dir, number)
        for checkpoint in run_record.find_checkpoints(output_dir):
            run_record.check_checkpoint(checkpoint)
        last = saved_steps(output_dir)[-1]
        assert last in (2, 3)
        whole_files.remove_aside(output_dir)  # as open_run does
        resumed = train(output_dir, resume_from=last, save_total_limit=2)
        assert_same_end(resumed, reference)
        assert saved_steps(output_dir) == [STEPS - 1, STEPS]


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(train, tmp_path, monkeypatch):
    synced = set()
    renamed = {}
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor):
        synced.add(os.stat(descriptor).st_ino)
        fsync(descriptor)

    def watch_replace(source, target):
        if Path(target).name == "checkpoint-1":
            for path in Path(source).rglob("*"):
                renamed[path.name] = path.stat().st_ino in synced
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    train(tmp_path, max_steps=1)
    assert {"model.safetensors", "optimizer.pt", "manifest.json"} <= renamed.keys()
    assert [name for name, is_synced in renamed.items() if not is_synced] == []


def test_a_checkpoint_is_saved_once_a_step(train, tmp_path, monkeypatch):
    """A signal and the end of an epoch may ask for the same one."""
    calls = []
    write_files = Trainer.write_files

    def watch(trainer, folder):
        calls.append(trainer.state.global_step)
        write_files(trainer, folder)

    monkeypatch.setattr(Trainer, "write_files", watch)
    train(tmp_path, At("on_epoch_end", STEPS_PER_EPOCH, stop))
    assert calls == [1, 2, 3]


# ---- A run that has ended -----------------------------------------------------------------------
@pytest.mark.parametrize("max_steps", [STEPS, STEPS - 2])
def test_a_run_that_has_ended_trains_nothing_more(train, tmp_path, max_steps):
    """Also where its end is within an epoch."""
    ended = train(tmp_path, max_steps=max_steps)
    resumed = train(tmp_path, resume_from=max_steps, max_steps=max_steps)
    assert_same(resumed.model.state_dict(), ended.model.state_dict())
    assert losses(resumed) == losses(ended)
    assert resumed.state.global_step == max_steps


LOSSES = {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.0, 5: 4.0, 6: 4.0}


@pytest.mark.parametrize("step", [3, 4])
def test_early_stopping_counts_on_after_a_stop(train, tmp_path, step):
    """Patience of two ends after step 4, once: also of a run that it has ended."""
    options = {"eval_losses": LOSSES, "early": 2}
    whole = train(tmp_path / "whole", **options)
    train(tmp_path / "stopped", At("on_step_end", step, stop), **options)
    resumed = train(tmp_path / "stopped", resume_from=step, **options)
    assert whole.state.global_step == resumed.state.global_step == 4
    assert losses(resumed) == losses(whole)
    assert_same(resumed.model.state_dict(), whole.model.state_dict())


def test_only_a_run_that_begins_is_evaluated_first(train, tmp_path):
    options = {"eval_losses": LOSSES, "eval_on_start": True}
    begun = train(tmp_path, At("on_step_end", 2, stop), **options)
    resumed = train(tmp_path, resume_from=2, **options)
    steps = []
    for trainer in (begun, resumed):
        logs = trainer.state.log_history
        steps.append([log["step"] for log in logs if "eval_loss" in log])
    assert steps == [[0, 1, 2], [0, 1, 2, 3, 4, 5, 6]]


# ---- Rotation and the best checkpoint -----------------------------------------------------------
def test_only_the_last_checkpoints_are_kept(train, tmp_path):
    (tmp_path / "checkpoint-1-mine").mkdir()
    train(tmp_path, save_total_limit=2)
    assert saved_steps(tmp_path) == [STEPS - 1, STEPS]
    assert (tmp_path / "checkpoint-1-mine").exists()


def test_a_checkpoint_goes_when_the_next_one_is_found_to_be_the_best(train, tmp_path, capsys):
    """The step is saved before it is evaluated, and only then is the best one before surplus."""
    falling = {step: 9.0 - step for step in range(1, STEPS + 1)}
    train(tmp_path, eval_losses=falling, save_total_limit=1)
    assert saved_steps(tmp_path) == [STEPS]
    assert "could not be removed" not in capsys.readouterr().err


def test_a_renewed_state_is_on_the_disk_before_it_replaces_the_old_one(
    train, tmp_path, monkeypatch
):
    synced = set()
    fsync, replace = os.fsync, os.replace
    unsynced = []

    def watch_fsync(descriptor):
        synced.add(os.stat(descriptor).st_ino)
        fsync(descriptor)

    def watch_replace(source, target):
        if Path(target).name == "trainer_state.json" and os.stat(source).st_ino not in synced:
            unsynced.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    train(tmp_path, eval_losses=LOSSES, max_steps=1)
    assert unsynced == []


@pytest.mark.parametrize(("limit", "steps"), [(1, [2, 6]), (2, [2, 6]), (3, [2, 5, 6])])
def test_the_best_checkpoint_is_kept_and_loaded(train, reference, tmp_path, limit, steps):
    trainer = train(tmp_path, eval_losses=LOSSES, save_total_limit=limit)
    assert saved_steps(tmp_path) == steps
    assert trainer.state.best_model_checkpoint == f"{tmp_path}/checkpoint-2"
    best = load_file(reference.output_dir / "checkpoint-2" / "model.safetensors")
    for name, weight in best.items():
        assert torch.equal(trainer.model.state_dict()[name], weight)


def test_the_best_checkpoint_survives_a_stop_and_a_move(train, tmp_path):
    train(tmp_path / "a", At("on_step_end", 4, stop), eval_losses=LOSSES, save_total_limit=1)
    (tmp_path / "a").rename(tmp_path / "b")
    trainer = train(tmp_path / "b", resume_from=4, eval_losses=LOSSES, save_total_limit=1)
    assert trainer.state.best_model_checkpoint == f"{tmp_path}/b/checkpoint-2"
    assert saved_steps(tmp_path / "b") == [2, 6]


def test_only_a_step_that_is_saved_can_be_the_best(train, tmp_path):
    losses = {1: 1.0, 2: 3.0, 3: 2.0, 4: 2.5, 5: 2.0, 6: 4.0}
    trainer = train(tmp_path, eval_losses=losses, save_steps=2)
    assert trainer.state.best_model_checkpoint == f"{tmp_path}/checkpoint-4"


@pytest.mark.parametrize(("later_loss", "best"), [(2.0, 5), (4.0, 2)])
def test_a_best_checkpoint_that_could_not_be_saved_is_not_the_best(
    train, reference, tmp_path, monkeypatch, later_loss, best
):
    """The best of those that were saved is loaded in the end, be it a later or an earlier one."""
    losses = {1: 5.0, 2: 3.0, 3: 1.0, 4: 4.0, 5: later_loss, 6: 4.0}
    fail_at(monkeypatch, 3, checkpoints, "sync_files")
    trainer = train(tmp_path, eval_losses=losses, save_total_limit=1)
    assert trainer.state.best_model_checkpoint == f"{tmp_path}/checkpoint-{best}"
    assert saved_steps(tmp_path) == [best, 6]
    weights = load_file(reference.output_dir / f"checkpoint-{best}" / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(trainer.model.state_dict()[name], weight)


def test_a_best_checkpoint_that_was_removed_does_not_bar_the_way(train, tmp_path, capsys):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 4.0, 5: 3.0, 6: 4.0}
    train(tmp_path, At("on_step_end", 4, stop), eval_losses=losses)
    shutil.rmtree(tmp_path / "checkpoint-2")
    trainer = train(tmp_path, resume_from=4, eval_losses=losses)
    assert f"{tmp_path}/checkpoint-2 is gone" in capsys.readouterr().out
    assert trainer.state.best_model_checkpoint == f"{tmp_path}/checkpoint-5"


def test_a_best_checkpoint_that_is_damaged_is_refused(train, tmp_path):
    train(tmp_path, At("on_step_end", 4, stop), eval_losses=LOSSES)
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint-2: not as it was saved"):
        train(tmp_path, resume_from=4, eval_losses=LOSSES)
    assert saved_steps(tmp_path)[-1] == 4  # before a step is trained in vain


def test_a_best_checkpoint_that_is_damaged_while_training_is_named(train, tmp_path):
    """The last checkpoint is whole: --resume exports the weights that it has."""

    def damage(trainer):
        (tmp_path / "checkpoint-2" / "model.safetensors").unlink()

    with pytest.raises(UserError, match=r"checkpoint-2: not as it was saved: model\.safetensors"):
        train(tmp_path, At("on_step_end", STEPS, damage), eval_losses=LOSSES)
    shutil.rmtree(tmp_path / "checkpoint-2")
    resumed = train(tmp_path, resume_from=STEPS, eval_losses=LOSSES)
    assert resumed.state.best_model_checkpoint is None
    resumed.export(torch.float32)
    assert (tmp_path / "model.safetensors").exists()


# ---- Failures -----------------------------------------------------------------------------------
def fail_at(monkeypatch, step, module, name, error=FULL_DISK):
    """Let a function fail in the save of a step."""
    function = getattr(module, name)
    write_files = Trainer.write_files
    current = []

    def watch(trainer, folder):
        current[:] = [trainer.state.global_step]
        write_files(trainer, folder)

    def call(*args, **kwargs):
        if current == [step]:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(Trainer, "write_files", watch)
    monkeypatch.setattr(module, name, call)


FAILURES = [
    (torch, "save"),
    (export, "save_file"),
    (export, "write_json"),
    (checkpoints, "sync_files"),
    (checkpoints, "replace_text"),
    (transformers.TrainerState, "save_to_json"),
]


@pytest.mark.parametrize(("module", "name"), FAILURES)
def test_a_save_that_fails_costs_one_checkpoint(
    train, reference, tmp_path, monkeypatch, capsys, module, name
):
    fail_at(monkeypatch, 3, module, name)
    trainer = train(tmp_path, save_total_limit=3)
    assert_same_end(trainer, reference)
    assert saved_steps(tmp_path) == [4, 5, 6]
    said = "checkpoint-3 could not be saved; earlier ones are whole: [Errno 28] No space left"
    assert said in capsys.readouterr().err


def test_a_save_that_fails_keeps_the_earlier_ones(train, tmp_path, monkeypatch):
    fail_at(monkeypatch, 3, checkpoints, "sync_files")
    train(tmp_path, save_total_limit=2, max_steps=3)
    assert saved_steps(tmp_path) == [1, 2]
    assert not (tmp_path / ASIDE).exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(train, tmp_path, value):
    def spoil(trainer):
        trainer.model.model.norm.weight.data[5] = value

    with pytest.raises(UserError, match=r"after step 3 weights are .* checkpoint-2 is saved"):
        train(tmp_path, At("on_step_end", 3, spoil))
    assert saved_steps(tmp_path) == [1, 2]
    trainer = train(tmp_path, save_strategy="no")
    spoil(trainer)
    with pytest.raises(UserError, match="not exported"):
        trainer.export(torch.float32)
    assert not (tmp_path / "model.safetensors").exists()


# ---- What cannot be resumed ---------------------------------------------------------------------
def raise_error(trainer):
    raise RuntimeError("memory is taken (a test)")


def test_what_fails_before_the_first_resumed_step_is_not_blamed_on_the_files(train, tmp_path):
    train(tmp_path, At("on_step_end", 2, stop))
    with pytest.raises(UserError) as error:
        train(tmp_path, At("on_train_begin", 2, raise_error), resume_from=2)
    sentence = f"{tmp_path}/checkpoint-2 could not be resumed: memory is taken (a test)"
    assert str(error.value) == sentence


def test_what_fails_later_is_what_it_is(train, tmp_path):
    train(tmp_path, At("on_step_end", 2, stop))
    with pytest.raises(RuntimeError, match="memory is taken"):
        train(tmp_path, At("on_step_begin", 2, raise_error), resume_from=2)
    with pytest.raises(RuntimeError, match="memory is taken"):
        train(tmp_path / "begun", At("on_train_begin", 0, raise_error))


class Attack:
    """What runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_runs_nothing(train, tmp_path, name):
    train(tmp_path / "run", At("on_step_end", 2, stop))
    torch.save(Attack(tmp_path / "ran"), tmp_path / "run" / "checkpoint-2" / name)
    with pytest.raises(UserError, match=r"checkpoint-2 could not be resumed") as error:
        train(tmp_path / "run", resume_from=2)
    assert "remove" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_the_environment_does_not_decide_what_is_loaded(train, reference, tmp_path, monkeypatch):
    train(tmp_path, At("on_step_end", 2, stop))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert_same_end(train(tmp_path, resume_from=2), reference)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_checkpoint_of_another_model_is_refused(train, tmp_path):
    train(tmp_path, At("on_step_end", 2, stop))
    other_dir = runs.make_model(tmp_path / "other", num_hidden_layers=2)
    trainer = make_trainer(other_dir, tmp_path)
    with pytest.raises(UserError, match=r"is not of this model: model\.layers\.1"):
        trainer.train(f"{tmp_path}/checkpoint-2")


# ---- The trained model --------------------------------------------------------------------------
def test_the_trained_model_is_an_ordinary_folder(reference, tmp_path, monkeypatch):
    trainer = reference
    monkeypatch.setattr(trainer, "output_dir", tmp_path)
    trainer.export(torch.bfloat16)
    exported = load_file(tmp_path / "model.safetensors")
    for name, weight in exported.items():
        assert torch.equal(weight, trainer.model.state_dict()[name].bfloat16())
    assert not (tmp_path / ASIDE).exists()
    assert not (tmp_path / "training_args.bin").exists()


class Disk:
    """A disk on which a model cannot be written for a number of tries."""

    def __init__(self, monkeypatch, num_failures):
        self.num_failures = num_failures
        self.num_tries = 0
        self.slept_s = 0
        self.write_model = checkpoints.write_model
        monkeypatch.setattr(checkpoints, "write_model", self.write)
        monkeypatch.setattr(checkpoints.time, "sleep", self.sleep)

    def write(self, *args):
        self.num_tries += 1
        if self.num_tries <= self.num_failures:
            folder = args[0]
            folder.mkdir()
            (folder / "half").write_text("half")
            raise FULL_DISK
        self.write_model(*args)

    def sleep(self, seconds):
        self.slept_s += seconds


def test_an_export_that_fails_waits_where_nothing_else_has_the_model(
    train, tmp_path, monkeypatch, capsys
):
    trainer = train(tmp_path, save_strategy="no", max_steps=1)
    disk = Disk(monkeypatch, 3)
    trainer.export(torch.float32)
    assert (tmp_path / "model.safetensors").exists()
    assert disk.slept_s == 180
    said = capsys.readouterr().err
    assert said.count("make room") == said.count("trying again every minute") == 3


def test_an_export_that_fails_for_an_hour_is_given_up(train, tmp_path, monkeypatch):
    trainer = train(tmp_path, save_strategy="no", max_steps=1)
    disk = Disk(monkeypatch, 1000)
    with pytest.raises(UserError, match=r"No space left.*; make room; nothing is saved"):
        trainer.export(torch.float32)
    assert disk.slept_s == 3600
    assert not (tmp_path / ASIDE).exists()


def test_an_export_that_fails_is_made_again_from_its_checkpoint(train, tmp_path, monkeypatch):
    trainer = train(tmp_path, max_steps=2)
    disk = Disk(monkeypatch, 1)
    with pytest.raises(UserError, match=r"make room; checkpoint-2 is saved; --resume"):
        trainer.export(torch.float32)
    assert disk.slept_s == 0
    train(tmp_path, resume_from=2, max_steps=2).export(torch.float32)
    assert (tmp_path / "model.safetensors").exists()


def test_several_processes_do_not_wait_until_the_others_give_up(train, tmp_path, monkeypatch):
    trainer = train(tmp_path, save_strategy="no", max_steps=1, ddp_timeout=600)
    assert trainer.count_export_tries() == 61
    monkeypatch.setattr(
        transformers.TrainingArguments, "world_size", property(lambda self: 2), raising=False
    )
    assert trainer.count_export_tries() == 6


# ---- A model folder from a checkpoint -----------------------------------------------------------
def test_any_checkpoint_becomes_a_model_folder(train, tmp_path):
    trainer = train(tmp_path, max_steps=2)
    (tmp_path / "run.json").write_text(
        json.dumps({"fingerprint": {}, "versions": [{}], "export_dtype": "bfloat16"})
    )
    folder = checkpoints.export_checkpoint(tmp_path / "checkpoint-2")
    assert folder == tmp_path / "checkpoint-2-model"
    trainer.export(torch.bfloat16)
    assert_same(load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (folder / name).read_text() == (tmp_path / name).read_text()
    with pytest.raises(UserError, match="is there already"):
        checkpoints.export_checkpoint(tmp_path / "checkpoint-2")


def test_a_checkpoint_that_was_moved_keeps_its_number_format(train, tmp_path):
    train(tmp_path / "run", max_steps=1)
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "checkpoint-1")
    folder = checkpoints.export_checkpoint(tmp_path / "checkpoint-1")
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_a_damaged_checkpoint_becomes_no_model_folder(train, tmp_path):
    train(tmp_path, max_steps=1)
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not as it was saved"):
        checkpoints.export_checkpoint(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1-model").exists()


def test_a_model_folder_that_cannot_be_written_leaves_nothing(train, tmp_path, monkeypatch):
    train(tmp_path, max_steps=1)
    Disk(monkeypatch, 1)
    with pytest.raises(UserError, match="make room"):
        checkpoints.export_checkpoint(tmp_path / "checkpoint-1")
    assert list(tmp_path.glob("checkpoint-1-*")) == []


def test_a_checkpoint_of_one_process_is_a_model_folder_for_transformers_4(train, tmp_path):
    train(tmp_path, max_steps=1)
    config = json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())
    words = json.loads((tmp_path / "checkpoint-1" / "tokenizer_config.json").read_text())
    assert config["rope_theta"] == 1e6
    assert config["torch_dtype"] == "float32"
    assert "additional_special_tokens" in words


GREEDY = """
import sys, transformers
for folder in sys.argv[1:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    for question in ("What is osmosis?", "葡萄牙的首都是哪里?", "Hi!"):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt")
        print(model.generate(**ids, max_new_tokens=30, do_sample=False).tolist())
"""


@pytest.mark.slow
def test_transformers_4_generates_the_same_tokens(tmp_path):
    """TRANSFORMERS_4 names the Python of an environment with transformers 4.57."""
    other = os.environ.get("TRANSFORMERS_4") or pytest.skip("TRANSFORMERS_4 is not set")
    trainer = make_trainer(runs.TINY, tmp_path, max_steps=2)
    trainer.train()
    trainer.export(torch.bfloat16)
    folders = [tmp_path, tmp_path / "checkpoint-2"]
    folders.append(checkpoints.export_checkpoint(tmp_path / "checkpoint-2"))
    outputs = []
    for python in (sys.executable, other):
        outputs.append(subprocess.check_output([python, "-c", GREEDY, *map(str, folders)]))
    assert outputs[0] == outputs[1]
    assert outputs[0].count(b"\n") == 9


# ---- Shards -------------------------------------------------------------------------------------
def save_in_shards(trainer, checkpoint, **changes):
    """Turn a checkpoint into shards, as processes save it; change options of the optimizer."""
    weights = get_model_state_dict(trainer.model)
    state = get_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer)
    state["param_groups"][0].update(changes)
    parts = {
        checkpoints.WEIGHT_SHARDS: {"model": weights},
        checkpoints.OPTIMIZER_SHARDS: {"optimizer": state},
    }
    for name, part in parts.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is only one process
            dcp.save(part, checkpoint_id=checkpoint / name, no_dist=True)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "optimizer.pt").unlink()


def test_one_process_resumes_shards_to_the_bit(train, reference, tmp_path):
    stopped = train(tmp_path, At("on_step_end", 2, stop))
    save_in_shards(stopped, tmp_path / "checkpoint-2")
    assert_same_end(train(tmp_path, resume_from=2), reference)


def test_the_values_in_shards_run_nothing(train, tmp_path):
    """Torch would read what is no tensor as a pickle of any kind."""
    stopped = train(tmp_path, At("on_step_end", 2, stop))
    save_in_shards(stopped, tmp_path / "checkpoint-2", eps=Attack(tmp_path / "ran"))
    with pytest.raises(UserError, match="checkpoint-2 could not be resumed") as error:
        train(tmp_path, resume_from=2)
    assert "remove" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_the_contents_of_shards_run_nothing(tmp_path):
    contents = pickle.dumps(Attack(tmp_path / "ran"))
    (tmp_path / ".metadata").write_bytes(contents)
    with pytest.raises(UserError, match=r"would run pathlib\.Path\.touch"):
        checkpoints.read_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()
