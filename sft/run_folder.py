"""What a run keeps on disk: its lock and record, whole checkpoints, logs, the exported model.

In output_dir only names like OWN are ever replaced or deleted, and only if run.json is a run's.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from sft.memory_plan import Precision, rows_per_step
from sft.model_folder import write_model
from sft.numerics import total_norm
from sft.rows import UserError, as_user_error, cause, say

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "wandb", "torchao")
ASIDE, MANIFEST, LOCK = "unfinished-save", "manifest.json", ".sft_qwen2.lock"
OWN = re.compile(
    rf"{ASIDE}|run\.json|metrics\.jsonl|rejected\.jsonl|checkpoint-\d+|chat_template\.jinja"
    r"|((generation_|tokenizer_)?config|tokenizer)\.json|model.*\.safetensors(\.index\.json)?"
)
# Arguments that may differ when a run is resumed: they change neither the rows (whose digests are
# compared, as is the number of rows in a step) nor, beyond the rounding of sums, what is learnt.
FREE = re.compile(
    r"output_dir|data_path|skip_bad_rows|tokens_per_forward|resume|dry_run|gpus|optim"
    r"|per_device_\w+|gradient_accumulation_steps|(gradient|activation)_checkpointing\w*|use_cpu"
    r"|logging_\w+|log_\w+|disable_tqdm|report_to|run_name|project|do_\w+|skip_memory_metrics"
    r"|save_(strategy|steps|total_limit)|ddp_\w+|fsdp\w*|local_rank|torch_empty_cache_steps"
    r"|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|\w+_context)"
)


# ---- Files that are whole or not there ----------------------------------------------------------
def replace_text(path: Path, text: str) -> None:
    """Write a file so that, whatever happens, it is the old or the new one."""
    aside = path.with_name(path.name + ".new")
    aside.unlink(missing_ok=True)  # it may be a link to a file of others
    # Bytes of names that are no UTF-8 become escapes of JSON.
    with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def describe_files(folder: Path) -> dict[str, list]:
    """Return {name: [bytes, SHA-256]} of a folder's files, all of which are then on disk."""

    def describe(path: Path) -> list:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]

    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    paths.pop(MANIFEST, None)
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(describe, paths.values())))


def whole_checkpoints(output_dir) -> list[Path]:
    """Return the checkpoints that have a manifest, the last one last."""
    found = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{MANIFEST}")]
    found = [path for path in found if OWN.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def saved_so_far(output_dir) -> str:
    """Return in words what --resume would go on from."""
    names = [path.name for path in whole_checkpoints(output_dir)]
    return f"{names[-1]} is saved; --resume goes on from there" if names else "nothing is saved"


def check_checkpoint(folder: Path) -> None:
    """Raise UserError unless the checkpoint's files are those that were saved."""
    remedy = f"put it back as it was, or remove {folder} to go on from the one before"
    with as_user_error(f"{folder}: is not whole; {remedy}"):
        saved = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        found = describe_files(folder)
    if wrong := sorted(x for x in saved | found if saved.get(x) != found.get(x)):
        raise UserError(f"{folder}: not as it was saved: {', '.join(wrong)}; {remedy}")


# ---- The record, and what a resume compares -----------------------------------------------------
def resume_terms(args, training_args, precision: Precision, rows: dict) -> dict:
    """Return all that decides what is learnt, data files by their hashes, as JSON returns it."""
    values = vars(args) | training_args.to_dict()
    terms = {name: value for name, value in values.items() if not FREE.fullmatch(name)}
    terms |= {"rows_per_step": rows_per_step(training_args), "optim": precision.optim}
    terms |= {"weights": str(precision.weights)}
    terms |= {f"{split}_sha256": table.sha256 for split, table in rows.items()}
    return json.loads(json.dumps(terms, default=str))


def differences(old: dict, new: dict, word: str) -> str:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name)!r}, {word} {new.get(name)!r}" for name in names)


def compare_processes(settings: dict, world_size: int) -> None:
    """Raise UserError where a process was given other rows or arguments than the first."""
    every = [settings] * world_size
    if world_size > 1:
        with as_user_error("another process ended, whose error says why"):
            torch.distributed.all_gather_object(every, settings)
    for rank, other in enumerate(every):
        if found := differences(every[0], other, f"in process {rank}"):
            raise UserError(f"the processes must be given the same: {found}")


def find_checkpoint(output_dir: Path, terms: dict, resume: bool, check: bool = True) -> str | None:
    """Return the path of the checkpoint to resume from, or None where a run begins.

    Raises UserError where something would be overwritten, continued on other terms, or is damaged.
    `check`: whether to read and compare all of the checkpoint's files.
    """
    names = [p.name for p in output_dir.iterdir()] if output_dir.is_dir() else []
    names = sorted(filter(OWN.fullmatch, names))
    steps = [int(name.partition("-")[2]) for name in names if name.startswith("checkpoint-")]
    last = output_dir / f"checkpoint-{max(steps, default=0)}"
    if names:
        about = f"{output_dir} holds {names[0]} and no whole run.json: it is no run's folder, or"
        about += " a damaged one; choose another --output_dir"
        with as_user_error(about):
            old = dict(json.loads((output_dir / "run.json").read_text(encoding="utf-8"))["terms"])
        if not resume and (steps or "config.json" in names):
            raise UserError(f"{output_dir} holds a run: --resume goes on, --output_dir leaves it")
        if resume and (changes := differences(old, terms, "now")):
            raise UserError(f"{output_dir} cannot be resumed on other terms: {changes}")
        if not steps and "config.json" in names:
            raise UserError(f"{output_dir} holds a model, but no checkpoint to resume from")
    if steps and check:
        check_checkpoint(last)
        with as_user_error(f"{last}: damaged; remove it to go on from the one before"):
            state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
            if terms["load_best_model_at_end"] and (best := state["best_model_checkpoint"]):
                check_checkpoint(output_dir / Path(best).name)
    return str(last) if steps else None


@contextmanager
def lock_folder(output_dir: Path):
    """Keep other runs out of output_dir; raises UserError if one is in it. A kill releases it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with open(lock, "r+", encoding="utf-8") as file:
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{output_dir} is in use by {file.read()}; wait or stop it") from error
        except OSError as error:
            say(f"{output_dir} cannot be locked; let no other run use it: {error}", sys.stderr)
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
        yield


@contextmanager
def open_run(args, training_args, terms: dict, counts: dict):
    """A context: the run's folder is locked, checked and its record written.

    Yields the path of the checkpoint to resume from, or None; raises UserError.
    """
    output_dir, writes = Path(training_args.output_dir), training_args.should_save
    settings = vars(args) | training_args.to_dict()
    with lock_folder(output_dir) if writes else nullcontext():
        checkpoint = find_checkpoint(output_dir, terms, args.resume, check=writes)
        own = ("local_rank", "output_dir", "data_path", "model_name_or_path")  # a machine's
        shared = {name: str(x) for name, x in settings.items() if name not in own}
        compare_processes(shared | terms, training_args.world_size)
        if args.resume:
            print(f"resume     from {checkpoint or 'the beginning: no checkpoint was saved yet'}")
        if writes:
            shutil.rmtree(output_dir / ASIDE, ignore_errors=True)  # a save that was killed
            versions = {name: importlib.metadata.version(name) for name in PACKAGES}
            about = {"terms": terms, "counts": counts, "versions": versions, "settings": settings}
            text = json.dumps(about, indent=2, ensure_ascii=False, default=str)
            replace_text(output_dir / "run.json", text)
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # no checkpoint runs code
        yield checkpoint


# ---- What Trainer saves -------------------------------------------------------------------------
class WholeCheckpoints:
    """Mixin for transformers.Trainer: a checkpoint is whole or not there, a model is finite."""

    def _get_output_dir(self, trial=None) -> str:
        """Return where Trainer may write, and delete what it takes for old: aside."""
        return os.path.join(self.args.output_dir, ASIDE)

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, checkpoint, trial):
        """Return (epochs, steps of the next) that are done; of a run that had ended, all."""
        done = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        if (best / MANIFEST).exists():  # output_dir may have been moved
            self.state.best_model_checkpoint = str(best)
        ended = self.state.global_step >= max_steps
        if early := self.state.stateful_callbacks.get("EarlyStoppingCallback"):
            waited = early["attributes"]["early_stopping_patience_counter"]
            ended |= waited >= early["args"]["early_stopping_patience"]
        return (epochs, 0) if ended else done

    def log(self, logs: dict, start_time=None) -> None:
        """Log as Trainer does; what a reporter raises must not cost the run."""
        try:
            super().log(logs, start_time)
        except Exception as error:  # wandb's and others', of whatever kind
            say(f"step {self.state.global_step} is not reported: {error}", sys.stderr)

    def check_weights(self) -> None:
        """Raise UserError where a weight is not finite: nothing of such a model is kept."""
        # After an evaluation FSDP2 has some parameters whole; state_dict() has them in shards.
        if not math.isfinite(total_norm(list(self.model.state_dict().values()))):
            raise UserError(
                f"after step {self.state.global_step} weights are infinite or NaN: not saved, not "
                f"exported; {saved_so_far(self.args.output_dir)}, or lower --learning_rate"
            )

    def fails(self, action) -> bool:
        """Run it; return whether it failed in any process. Training can go on without it."""
        error = None
        try:
            action()
        except KeyboardInterrupt:
            raise
        except BaseException as caught:  # each library has its own for a full disk
            error, name = cause(caught), f"checkpoint-{self.state.global_step}"
            say(f"{name} could not be saved; earlier ones are whole: {error}", sys.stderr)
        failed = torch.tensor(float(error is not None), device=self.args.device)
        return bool(self.accelerator.reduce(failed) > 0)  # when all have done their part

    def _save_checkpoint(self, model, trial=None) -> None:
        """Save a checkpoint aside, and rename it once it is on disk with its manifest."""
        self.check_weights()
        final = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        best = self.state.best_model_checkpoint
        failed = self.fails(partial(super()._save_checkpoint, model, trial))
        if self.state.best_model_checkpoint != best:  # it is this one, still aside
            self.state.best_model_checkpoint = str(final)
        if failed or self.fails(partial(self.finish_save, final)):
            self.state.best_model_checkpoint = best
        if self.args.should_save:
            shutil.rmtree(self._get_output_dir(), ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def finish_save(self, final: Path) -> None:
        if not self.args.should_save:
            return
        saved = Path(self._get_output_dir(), final.name)
        self.state.save_to_json(str(saved / "trainer_state.json"))  # now with the best one's place
        replace_text(saved / MANIFEST, json.dumps(describe_files(saved), indent=1))
        if not final.exists():  # saved twice: on a signal, and at the end of an epoch
            os.replace(saved, final)
        whole = whole_checkpoints(self.args.output_dir)
        kept = {final, Path(self.state.best_model_checkpoint or final)}
        surplus = len(whole) - max(self.args.save_total_limit or len(whole), len(kept))
        for old in [path for path in whole if path not in kept][: max(surplus, 0)]:
            os.replace(old, saved.with_name(old.name))  # half deleted, it would look damaged

    def export(self, dtype: torch.dtype, end_token: str) -> None:
        """Write an ordinary model folder to output_dir: aside, then renamed, config.json last.

        Weights are rounded to dtype, and generation stops at end_token. Raises UserError.
        """
        self.check_weights()
        output_dir, aside = Path(self.args.output_dir), Path(self._get_output_dir())
        weights = self.accelerator.get_state_dict(self.model)  # whole, where they are sharded
        model = self.accelerator.unwrap_model(self.model)
        if not self.args.should_save:
            return
        failure = f"{output_dir}: the model is not written; make room, then --resume"
        try:
            with as_user_error(failure):
                write_model(aside, model, self.processing_class, weights, dtype, end_token)
                for name in sorted(describe_files(aside), key="config.json".__eq__):
                    os.chmod(aside / name, (aside / "config.json").stat().st_mode)
                    os.replace(aside / name, output_dir / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
