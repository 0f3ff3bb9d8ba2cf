"""The record of a run in its output_dir: who may write there, and what a resume compares.

In output_dir only files that a run makes are ever replaced or deleted, and only where run.json says
that a run made them.
"""

import importlib.metadata
import json
import re
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import filelock
import torch

from sft.console import say
from sft.errors import UserError, as_user_error
from sft.whole_files import ASIDE, measure_files, remove_aside, replace_text

RECORD = "run.json"
MANIFEST = "manifest.json"
LOCK = ".sft_qwen2.lock"
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "torchao", "wandb")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?")
OTHER_FILES = {
    ASIDE,
    RECORD,
    "metrics.jsonl",
    "loss.svg",
    "rejected.jsonl",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
# What is done with a run, and what only one machine knows: no part of what a run is.
ACTIONS = {"resume", "dry_run", "export"}
PLACES = {"model_name_or_path", "data_path", "output_dir"}
DIGESTS = {"model", "train_examples", "validation_examples"}
LENGTH_OF_RUN = {"num_train_epochs", "max_steps", "num_steps"}


# ---- Checkpoints --------------------------------------------------------------------------------
def step_of(checkpoint: Path) -> int:
    """Return the number of the step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, the last one last."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        if CHECKPOINT.fullmatch(path.name):
            found.append(path)
    return sorted(found, key=step_of)


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint was saved to its end."""
    return (checkpoint / MANIFEST).exists()


def describe_progress(output_dir: Path) -> str:
    """Return in words what --resume would go on from."""
    whole = [path for path in find_checkpoints(output_dir) if is_whole(path)]
    if not whole:
        return "nothing is saved"
    return f"{whole[-1].name} is saved; --resume goes on from there"


def check_checkpoint(checkpoint: Path) -> None:
    """Raise UserError unless the files of a checkpoint have the sizes that were saved."""
    if not CHECKPOINT.fullmatch(checkpoint.name) or not checkpoint.is_dir():
        names = ", ".join(path.name for path in find_checkpoints(checkpoint.parent)) or "none"
        raise UserError(
            f"{checkpoint}: there is no such checkpoint; in {checkpoint.parent} there are: {names}"
        )
    try:
        saved = dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{checkpoint}: its {MANIFEST} cannot be read, put it back as it was: {error}"
        ) from error
    found = measure_files(checkpoint)
    changed = []
    for name, size in saved.items():
        if name not in found or (size is not None and found[name] != size):
            changed.append(name)
    if changed:
        raise UserError(
            f"{checkpoint}: not as it was saved: {', '.join(changed)}; "
            "put it back as it was, or remove this checkpoint to go on without it"
        )


# ---- What may be in output_dir when a run begins ------------------------------------------------
def find_own_files(output_dir: Path) -> list[str]:
    """Return the names in output_dir that a run would replace or delete."""
    if not output_dir.is_dir():
        return []
    names = []
    for path in output_dir.iterdir():
        is_part = CHECKPOINT.fullmatch(path.name) or WEIGHTS.fullmatch(path.name)
        if is_part or path.name in OTHER_FILES:
            names.append(path.name)
    return sorted(names)


def read_record(output_dir: Path) -> dict:
    """Return the content of output_dir's run.json; raises UserError where there is no whole one."""
    path = output_dir / RECORD
    with as_user_error(f"{path} cannot be read; choose another --output_dir"):
        record = json.loads(path.read_text(encoding="utf-8"))
    is_record = isinstance(record, dict) and isinstance(record.get("fingerprint"), dict)
    if not is_record or not record.get("versions"):
        raise UserError(f"{path} is not of this version's runs; choose another --output_dir")
    return record


def add_to_record(output_dir: Path, **entries) -> None:
    """Add entries to run.json, or replace them there."""
    record = read_record(output_dir)
    record.update(entries)
    write_record(output_dir, record)


def write_record(output_dir: Path, record: dict) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
    replace_text(output_dir / RECORD, text + "\n")


def suggest_output_dir(output_dir: Path) -> Path:
    """Return a folder in output_dir that is not there yet, for another run."""
    for letter in "bcdefghijklmnopqrstuvwxyz":
        if not (output_dir / letter).exists():
            return output_dir / letter
    return output_dir / "another"


def check_output_dir(args) -> None:
    """Raise UserError where a run may neither begin nor go on in args.output_dir.

    Takes no time, so that the answer comes before data is read.
    """
    output_dir = Path(args.output_dir)
    names = find_own_files(output_dir)
    if not names:
        return
    begin = f"--output_dir {suggest_output_dir(output_dir)} begins a new one"
    if RECORD not in names:
        raise UserError(
            f"{output_dir} holds {names[0]}, but no {RECORD}: no run made this folder; {begin}"
        )
    read_record(output_dir)
    has_checkpoint = any(CHECKPOINT.fullmatch(name) for name in names)
    has_model = "config.json" in names
    if not args.resume and (has_checkpoint or has_model):
        raise UserError(f"{output_dir} holds a run: --resume goes on with it, {begin}")
    if args.resume and has_model and not has_checkpoint:
        raise UserError(
            f"{output_dir} holds a trained model, but no checkpoint to resume from; {begin}"
        )


# ---- What a resume compares ---------------------------------------------------------------------
def find_changes(old: dict, new: dict) -> list[str]:
    """Return the names of new that have another value in old; names of one alone do not count."""
    return [name for name in new if name in old and old[name] != new[name]]


def describe_changes(names: list[str], old: dict, new: dict, word: str = "now") -> str:
    changes = []
    for name in names:
        if name in DIGESTS:
            changes.append(f"{name} has other content {word}")
            continue
        changes.append(f"{name} was {old.get(name)!r}, {word} {new.get(name)!r}")
    return "; ".join(changes)


def check_fingerprint(output_dir: Path, old: dict, new: dict) -> None:
    """Raise UserError where a resumed run would learn something else than the one that began."""
    names = find_changes(old, new)
    if not names:
        return
    sentence = f"{output_dir} cannot be resumed with other settings: "
    sentence += describe_changes(names, old, new)
    has_model = (output_dir / "config.json").exists()
    if has_model and set(names) <= LENGTH_OF_RUN:
        sentence += suggest_further_training(output_dir, names, old, new)
    else:
        sentence += "; put them back, or go on in a new run from its weights (docs/recipes.md)"
    raise UserError(sentence)


def suggest_further_training(output_dir: Path, names: list[str], old: dict, new: dict) -> str:
    """Return how the model of a run that has ended is trained for what the new run adds to it."""
    if "num_steps" not in names or new["num_steps"] <= old["num_steps"]:
        return ""
    length = f"--max_steps {new['num_steps'] - old['num_steps']}"
    if "num_train_epochs" in names and "max_steps" not in names:
        length = f"--num_train_epochs {new['num_train_epochs'] - old['num_train_epochs']:g}"
    return (
        "; to train its model further, with a new schedule of the learning rate, leave out "
        f"--resume, and set --model_name_or_path {output_dir} "
        f"--output_dir {suggest_output_dir(output_dir)} {length}"
    )


def compare_processes(settings: dict, world_size: int) -> None:
    """Raise UserError where a process was given other settings than the first."""
    if world_size == 1:
        return
    settings_by_rank = [None] * world_size
    with as_user_error("another process ended, whose error says why"):
        torch.distributed.all_gather_object(settings_by_rank, settings)
    first = settings_by_rank[0]
    for rank, other in enumerate(settings_by_rank):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            changes = describe_changes(names, first, other, f"in process {rank}")
            raise UserError(f"the processes must be given the same: {changes}")


def read_versions() -> dict[str, str]:
    """Return {package: version} of what a run depends on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


# ---- The run ------------------------------------------------------------------------------------
@contextmanager
def lock_folder(output_dir: Path):
    """Keep other runs out of output_dir; raises UserError if one is in it. A kill releases it."""
    with as_user_error(f"{output_dir} cannot be made; choose another --output_dir"):
        output_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output_dir / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(
            f"{output_dir} is in use by another run; wait for it, or stop it"
        ) from error
    except (OSError, NotImplementedError) as error:
        say(f"{output_dir} cannot be locked; let no other run use it: {error}", sys.stderr)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def open_run(args, training_args, fingerprint: dict, about: dict):
    """A context in which output_dir is this run's: locked, checked, its record written.

    Yields the path of the checkpoint to resume from, or None where the run begins. ``fingerprint``
    holds what decides what is learnt, ``about`` what else run.json is to say. Raises UserError.
    """
    output_dir = Path(args.output_dir)
    fingerprint = json.loads(json.dumps(fingerprint, default=str))  # as run.json gives it back
    is_writer = training_args.should_save
    lock = nullcontext()
    if is_writer:
        lock = lock_folder(output_dir)
    with lock:
        checkpoint = find_checkpoint_to_resume(args, fingerprint)
        shared = {}
        for name, value in vars(args).items():
            if name not in PLACES:
                shared[name] = str(value)
        shared["checkpoint"] = checkpoint and Path(checkpoint).name
        compare_processes({**shared, **fingerprint}, training_args.world_size)
        if is_writer:
            remove_aside(output_dir)  # a save that was killed
            write_record(output_dir, make_record(args, fingerprint, about))
        yield checkpoint


def find_checkpoint_to_resume(args, fingerprint: dict) -> str | None:
    """Return the path of the checkpoint that --resume goes on from, or None where a run begins.

    Raises UserError where this run may not go on from there.
    """
    check_output_dir(args)
    if not args.resume:
        return None
    output_dir = Path(args.output_dir)
    checkpoints = find_checkpoints(output_dir)
    if not checkpoints:
        say("resume     from the beginning: no checkpoint was saved yet")
        return None
    record = read_record(output_dir)
    check_fingerprint(output_dir, record["fingerprint"], fingerprint)
    last = checkpoints[-1]
    check_checkpoint(last)
    say(f"resume     from {last}")
    old_versions = record["versions"][-1]
    versions = read_versions()
    names = find_changes(old_versions, versions)
    if names:
        say(f"versions   {describe_changes(names, old_versions, versions)}")
    return str(last)


def make_record(args, fingerprint: dict, about: dict) -> dict:
    """Return the content of run.json, which keeps what others have added to a resumed run's."""
    record = {"versions": []}
    output_dir = Path(args.output_dir)
    if args.resume and (output_dir / RECORD).exists():
        record = read_record(output_dir)
    arguments = {name: value for name, value in vars(args).items() if name not in ACTIONS}
    record["arguments"] = arguments
    record["fingerprint"] = fingerprint
    record.update(about)
    versions = read_versions()
    if versions not in record["versions"][-1:]:
        record["versions"].append(versions)
    return record
