"""The folder of a run: who may write there, and what a resume compares."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest

from sft import run_record
from sft.errors import UserError

FINGERPRINT = {"precision": "bf16", "num_steps": 4, "num_train_epochs": 1.0, "betas": [0.9, 0.999]}
ONE_PROCESS = SimpleNamespace(should_save=True, world_size=1)


def make_args(output_dir, **changes):
    values = {"output_dir": str(output_dir), "model_name_or_path": "m", "data_path": ["data"]}
    values |= {"seed": 42, "resume": False, "dry_run": False, "export": None, "gpus": None}
    return SimpleNamespace(**{**values, **changes})


def open_run(output_dir, fingerprint=FINGERPRINT, about=None, **changes):
    """Open and leave a run; return the checkpoint that it goes on from."""
    args = make_args(output_dir, **changes)
    with run_record.open_run(args, ONE_PROCESS, fingerprint, about or {}) as checkpoint:
        return checkpoint


def add_checkpoint(output_dir, step) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "0").write_text("12345")
    (folder / "weights").write_text("123")
    (folder / "manifest.json").write_text(json.dumps({"shards/0": 5, "weights": 3}))
    return folder


def read(output_dir) -> dict:
    return json.loads((output_dir / "run.json").read_text())


@pytest.fixture
def stopped(tmp_path):
    """The folder of a run that was stopped after step 12, with a checkpoint of step 4, too."""
    open_run(tmp_path)
    add_checkpoint(tmp_path, 12)
    add_checkpoint(tmp_path, 4)
    return tmp_path


# ---- What is resumed ----------------------------------------------------------------------------
def test_a_run_goes_on_from_its_last_checkpoint(stopped, capsys):
    """The last one by number, not by name; what others have named alike is none."""
    (stopped / "checkpoint-99-mine").mkdir()
    assert open_run(stopped, resume=True) == f"{stopped}/checkpoint-12"
    assert f"resume     from {stopped}/checkpoint-12" in capsys.readouterr().out


def test_where_nothing_was_saved_a_run_begins(tmp_path, capsys):
    assert open_run(tmp_path, resume=True) is None
    assert "from the beginning" in capsys.readouterr().out
    assert open_run(tmp_path, resume=True, fingerprint={"num_steps": 9}) is None
    assert open_run(tmp_path) is None
    assert capsys.readouterr().out.count("resume") == 1


def test_a_second_run_is_told_both_ways_to_go_on(stopped):
    with pytest.raises(UserError) as error:
        run_record.check_output_dir(make_args(stopped))
    expected = f"{stopped} holds a run: --resume goes on with it, --output_dir {stopped}/b begins"
    assert expected in str(error.value)
    (stopped / "b").mkdir()
    with pytest.raises(UserError, match=f"--output_dir {stopped}/c begins a new one"):
        run_record.check_output_dir(make_args(stopped))


def test_a_run_that_is_to_be_resumed_passes_the_early_check(stopped):
    run_record.check_output_dir(make_args(stopped, resume=True))


def test_a_model_without_a_checkpoint_cannot_be_resumed(tmp_path):
    open_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        run_record.check_output_dir(make_args(tmp_path, resume=True))
    with pytest.raises(UserError, match="holds a run"):
        run_record.check_output_dir(make_args(tmp_path))


NAMES = [
    "run.json",
    "metrics.jsonl",
    "loss.svg",
    "rejected.jsonl",
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "checkpoint-3/x",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "unfinished-save/x",
]


@pytest.mark.parametrize("text", ["theirs", '{"fingerprint": {', '{"terms": {}}', "[]"])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_would_replace_is_refused(tmp_path, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    for resume in (True, False):
        with pytest.raises(UserError, match=r"run\.json.*--output_dir"):
            open_run(tmp_path, resume=resume)
    assert (tmp_path / name).read_text() == text


def test_what_others_keep_in_output_dir_is_not_touched(tmp_path):
    names = ["unfinished/x", "checkpoint-2-keep/x", "checkpoint-3x/x", "notes.json", "model.bin"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("theirs")
    assert open_run(tmp_path) is None
    for name in names:
        assert (tmp_path / name).read_text() == "theirs"


def test_what_a_killed_save_left_goes(stopped):
    (stopped / "unfinished-save" / "checkpoint-12").mkdir(parents=True)
    (stopped / "unfinished-save" / "checkpoint-12" / "stale").write_text("half")
    open_run(stopped, resume=True)
    assert not (stopped / "unfinished-save").exists()


# ---- Checkpoints --------------------------------------------------------------------------------
def drop(checkpoint):
    (checkpoint / "weights").unlink()


def cut(checkpoint):
    (checkpoint / "shards" / "0").write_text("1234")


def lengthen(checkpoint):
    with open(checkpoint / "weights", "a") as file:
        file.write("and more")


@pytest.mark.parametrize(
    ("damage", "name"), [(drop, "weights"), (cut, "shards/0"), (lengthen, "weights")]
)
def test_a_damaged_checkpoint_is_refused(stopped, damage, name):
    """The files were compared: only therefore may it be removed."""
    damage(stopped / "checkpoint-12")
    with pytest.raises(UserError) as error:
        open_run(stopped, resume=True)
    assert f"{stopped}/checkpoint-12: not as it was saved: {name}; " in str(error.value)
    assert "remove this checkpoint" in str(error.value)


def test_a_checkpoint_that_cannot_be_compared_is_kept(stopped):
    for text in ("", "[1]", None):
        manifest = stopped / "checkpoint-12" / "manifest.json"
        if text is None:
            manifest.unlink()
        else:
            manifest.write_text(text)
        with pytest.raises(UserError) as error:
            open_run(stopped, resume=True)
        assert "manifest.json cannot be read" in str(error.value)
        assert "remove" not in str(error.value)


def test_a_checkpoint_that_is_not_there(stopped):
    with pytest.raises(UserError, match="checkpoint-9: there is no such checkpoint"):
        run_record.check_checkpoint(stopped / "checkpoint-9")


def test_a_note_in_a_checkpoint_does_no_harm(stopped):
    (stopped / "checkpoint-12" / "note").write_text("the good one")
    assert open_run(stopped, resume=True)


def test_progress_is_told_from_whole_checkpoints(stopped):
    assert run_record.describe_progress(stopped).startswith("checkpoint-12 is saved; --resume")
    (stopped / "checkpoint-12" / "manifest.json").unlink()
    assert run_record.describe_progress(stopped).startswith("checkpoint-4 is saved; --resume")
    (stopped / "checkpoint-4" / "manifest.json").unlink()
    assert run_record.describe_progress(stopped) == "nothing is saved"


# ---- What is compared ---------------------------------------------------------------------------
def test_each_setting_that_differs_is_named(stopped):
    before = (stopped / "run.json").read_text()
    with pytest.raises(UserError) as error:
        open_run(stopped, {**FINGERPRINT, "precision": "fp16", "betas": (0.9, 0.95)}, resume=True)
    assert "precision was 'bf16', now 'fp16'" in str(error.value)
    assert "betas was [0.9, 0.999], now [0.9, 0.95]" in str(error.value)
    assert "num_steps" not in str(error.value)
    assert (stopped / "run.json").read_text() == before


def test_values_that_json_writes_otherwise_are_the_same(stopped):
    """A tuple comes back as a list, a path as a text."""
    assert open_run(stopped, {**FINGERPRINT, "betas": (0.9, 0.999)}, resume=True)


@pytest.mark.parametrize("name", FINGERPRINT)
def test_a_setting_of_another_version_is_no_lock(stopped, name):
    """What only one of the two records has is not compared."""
    fewer = {key: value for key, value in FINGERPRINT.items() if key != name}
    assert open_run(stopped, {**fewer, "new_setting": 1}, resume=True)


def test_more_epochs_of_a_run_that_has_ended(stopped):
    """The sentence says what can be done instead."""
    longer = {**FINGERPRINT, "num_train_epochs": 3.0, "num_steps": 12}
    with pytest.raises(UserError) as error:
        open_run(stopped, longer, resume=True)
    assert "to train its model further" not in str(error.value)  # there is none yet
    (stopped / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        open_run(stopped, longer, resume=True)
    assert "num_train_epochs was 1.0, now 3.0" in str(error.value)
    assert "leave out --resume" in str(error.value)
    expected = f"--model_name_or_path {stopped} --output_dir {stopped}/b --num_train_epochs 2"
    assert expected in str(error.value)
    with pytest.raises(UserError, match=r"--max_steps 8$"):
        open_run(stopped, {**FINGERPRINT, "num_steps": 12}, resume=True)
    shorter = {**FINGERPRINT, "num_train_epochs": 0.5, "num_steps": 2}
    for other in (shorter, {**longer, "precision": "fp16"}):
        with pytest.raises(UserError) as error:
            open_run(stopped, other, resume=True)
        assert "to train its model further" not in str(error.value)
    record = read(stopped)
    del record["fingerprint"]["num_steps"]  # as a version that had no such entry
    (stopped / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"now 3\.0$"):
        open_run(stopped, longer, resume=True)


def test_other_content_is_said_without_its_digest(tmp_path):
    open_run(tmp_path, {"model": "0123"})
    add_checkpoint(tmp_path, 4)
    with pytest.raises(UserError, match=r"model has other content now;"):
        open_run(tmp_path, {"model": "4567"}, resume=True)


class Gathered:
    """torch.distributed's answer to all_gather_object."""

    def __init__(self, others):
        self.others = others

    def __call__(self, settings_by_rank, settings):
        settings_by_rank[:] = [settings, *self.others]


def test_processes_that_were_given_other_settings_are_named(monkeypatch):
    distributed = run_record.torch.distributed
    monkeypatch.setattr(distributed, "all_gather_object", Gathered([{"a": 1}, {"a": 2, "b": 3}]))
    with pytest.raises(UserError) as error:
        run_record.compare_processes({"a": 1}, 3)
    expected = "the same: a was 1, in process 2 2; b was None, in process 2 3"
    assert expected in str(error.value)
    monkeypatch.setattr(distributed, "all_gather_object", Gathered([{"a": 1}]))
    run_record.compare_processes({"a": 1}, 2)


def test_processes_compare_arguments_and_the_checkpoint_but_no_paths(stopped, monkeypatch):
    compared = []

    def watch(settings, world_size):
        compared.append((settings, world_size))

    monkeypatch.setattr(run_record, "compare_processes", watch)
    args = make_args(stopped, resume=True, model_name_or_path="other")
    other_process = SimpleNamespace(should_save=False, world_size=2)
    with run_record.open_run(args, other_process, FINGERPRINT, {}):
        pass
    (settings, world_size), *_ = compared
    assert world_size == 2
    assert settings["seed"] == "42"
    assert settings["checkpoint"] == "checkpoint-12"
    assert settings["num_steps"] == 4
    assert {"model_name_or_path", "data_path", "output_dir"}.isdisjoint(settings)


def test_only_one_process_writes(tmp_path):
    args = make_args(tmp_path / "run")
    other_process = SimpleNamespace(should_save=False, world_size=1)
    with run_record.open_run(args, other_process, FINGERPRINT, {}) as checkpoint:
        assert checkpoint is None
    assert not (tmp_path / "run").exists()


# ---- The record ---------------------------------------------------------------------------------
def test_the_record_can_be_given_back_as_arguments(tmp_path):
    """It does not say again what was to be done with the run, as --resume."""
    open_run(tmp_path, about={"counts": {"rows": 3}}, resume=True, seed=7)
    record = read(tmp_path)
    assert record["arguments"]["seed"] == 7
    assert {"resume", "dry_run", "export"}.isdisjoint(record["arguments"])
    assert record["counts"] == {"rows": 3}
    assert record["fingerprint"] == FINGERPRINT


def test_names_that_are_not_utf_8_are_recorded(tmp_path):
    open_run(tmp_path, data_path=["\udcff"])
    assert "\\udcff" in (tmp_path / "run.json").read_text(encoding="utf-8")


def test_other_versions_are_said_and_kept(stopped, monkeypatch, capsys):
    before = read(stopped)["versions"]
    open_run(stopped, resume=True)
    assert read(stopped)["versions"] == before
    version = importlib.metadata.version

    def newer(package):
        return "9.9" if package == "torch" else version(package)

    monkeypatch.setattr(importlib.metadata, "version", newer)
    open_run(stopped, resume=True)
    said = f"versions   torch was '{before[0]['torch']}', now '9.9'\n"
    assert said in capsys.readouterr().out
    assert [versions["torch"] for versions in read(stopped)["versions"]][-1] == "9.9"
    assert len(read(stopped)["versions"]) == len(before) + 1
    open_run(stopped, resume=True)
    assert "versions   torch" not in capsys.readouterr().out


def test_a_resumed_run_keeps_what_was_added(stopped):
    """As the id of its wandb run; another run begins without."""
    run_record.add_to_record(stopped, wandb_run_id="abc")
    open_run(stopped, resume=True)
    assert run_record.read_record(stopped)["wandb_run_id"] == "abc"


def test_a_run_that_begins_has_its_own_record(tmp_path):
    open_run(tmp_path)
    run_record.add_to_record(tmp_path, wandb_run_id="abc")
    open_run(tmp_path)
    assert "wandb_run_id" not in run_record.read_record(tmp_path)


# ---- The lock -----------------------------------------------------------------------------------
LOCK = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from sft.run_record import lock_folder
with lock_folder(Path({folder!r})):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_until_it_is_free(tmp_path):
    with run_record.lock_folder(tmp_path):
        with pytest.raises(UserError, match=f"{tmp_path} is in use by another run"):
            open_run(tmp_path)
        assert not (tmp_path / "run.json").exists()
    assert open_run(tmp_path) is None


@pytest.mark.slow
def test_a_killed_run_leaves_its_folder_free(tmp_path):
    code = LOCK.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="is in use"):
        open_run(tmp_path)
    process.kill()
    process.communicate()
    assert open_run(tmp_path) is None


def test_a_disk_that_cannot_lock_is_said(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    assert open_run(tmp_path) is None
    assert "cannot be locked" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(UserError, match="cannot be made"):
        open_run(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot be made"):
        open_run(tmp_path / "file")


def test_the_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / run_record.LOCK).symlink_to(tmp_path / "theirs")
    open_run(tmp_path / "run")
    assert (tmp_path / "theirs").read_text() == "theirs"
