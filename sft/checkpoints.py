"""Trainer's checkpoints: each whole or not there, resumed bit for bit, in one piece or in shards.

One process saves its checkpoint in one piece, and so do processes on the CPU. GPUs that share a
model save it in shards, which as many processes resume, or fewer.
"""

import io
import json
import math
import os
import pickle
import shutil
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from sft.console import say
from sft.errors import UserError, as_user_error, describe
from sft.export import (
    explain_failed_export,
    move_model,
    write_model,
    write_settings,
    write_weights,
)
from sft.optimizer import total_norm
from sft.run_record import (
    MANIFEST,
    RECORD,
    check_checkpoint,
    describe_progress,
    find_checkpoints,
    is_whole,
    read_record,
)
from sft.whole_files import ASIDE, measure_files, remove_aside, replace_text, sync_file, sync_files

WEIGHT_SHARDS = "pytorch_model_fsdp_0"  # accelerate's names of folders in a checkpoint
OPTIMIZER_SHARDS = "optimizer_0"
# The table of contents of shards is a pickle. These are all the classes that torch puts there.
METADATA_CLASSES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch", "bfloat16"),
    ("torch", "bool"),
    ("torch", "float16"),
    ("torch", "float32"),
    ("torch", "int64"),
    ("torch", "uint8"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
}
STATE = "trainer_state.json"
FAILURES = (Exception, CheckpointException)  # torch derives the latter from BaseException
RETRY_S = 60  # between two tries to write a model that nothing else holds
MAX_WAIT_S = 3600


# ---- Reading a checkpoint without running code from it ------------------------------------------
@contextmanager
def only_tensors_are_loaded():
    """A context in which torch.load reads tensors and numbers, whatever the environment says."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    # torch.distributed.checkpoint asks for whole pickles by itself.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value


class MetadataUnpickler(pickle.Unpickler):
    """Reads the table of contents of shards, and makes no object but those it is made of."""

    def find_class(self, module: str, name: str):
        if (module, name) not in METADATA_CLASSES:
            raise UserError(f"its .metadata would run {module}.{name}: do not resume it")
        return super().find_class(module, name)


def read_metadata(shards: Path):
    """Return the table of contents of shards; raises UserError where it would run code."""
    return MetadataUnpickler(io.BytesIO((shards / ".metadata").read_bytes())).load()


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, on the CPU, whether it is in one piece or in shards."""
    weights = {}
    shards = checkpoint / WEIGHT_SHARDS
    if not shards.is_dir():
        for path in checkpoint.glob("*.safetensors"):
            weights.update(load_file(path))
        return weights
    for name, entry in read_metadata(shards).state_dict_metadata.items():
        name = name.removeprefix("model.")  # the key under which accelerate saves all weights
        weights[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    fill_from_shards({"model": weights}, shards)
    return weights


def fill_from_shards(state: dict, shards: Path) -> None:
    """Copy what shards hold into the tensors of a state, in this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is only one process
        dcp.load(state, checkpoint_id=shards, no_dist=True)


# ---- The trainer --------------------------------------------------------------------------------
class CheckpointTrainer(Trainer):
    """Trainer whose checkpoints are whole or not there, and whose failed saves cost no run."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.args.restore_callback_states_from_checkpoint = True  # early stopping's counter
        self.output_dir = Path(self.args.output_dir)
        self.is_resuming = False  # until the first resumed step begins
        self.last_saved_step = None
        self.evaluation_is_due = False  # a resumed run was stopped in the evaluation of its step
        self.has_ended = False
        # state's best_metric, best_global_step and best_model_checkpoint as of the last whole save
        self.saved_best = (None, None, None)

    def train(self, resume_from_checkpoint: str | None = None, **options):
        """Train as Trainer does; raises UserError where a run cannot be resumed."""
        self.is_resuming = resume_from_checkpoint is not None
        if self.is_resuming:
            self.args.eval_on_start = False
        try:
            with only_tensors_are_loaded():
                return super().train(resume_from_checkpoint, **options)
        except FAILURES as error:
            if not self.is_resuming or isinstance(error, UserError):
                raise
            sentence = f"{resume_from_checkpoint} could not be resumed: {describe(error)}"
            raise UserError(sentence) from error

    # ---- Saving ----
    def _get_output_dir(self, trial=None) -> str:
        """Return the folder whose checkpoints Trainer may delete: none that is whole is there."""
        return str(self.output_dir / ASIDE)

    def _save_checkpoint(self, model, trial=None) -> None:
        """Save a checkpoint aside, and rename it once it is on the disk with its manifest.

        Where that fails in any process, all go on without this checkpoint.
        """
        step = self.state.global_step
        if self.last_saved_step == step:
            self.renew_state()
            return
        self.check_weights()
        self.store_flos()
        checkpoint = self.output_dir / f"checkpoint-{step}"
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(checkpoint)
        aside = self.output_dir / ASIDE / checkpoint.name
        is_saved = self.succeeds_everywhere(self.write_files, aside)
        if is_saved:
            is_saved = self.succeeds_everywhere(self.finish_save, aside, checkpoint)
        if is_saved:
            self.last_saved_step = step
            self.keep_best()
        else:
            self.restore_best()
        if self.args.should_save:
            self.remove_old_checkpoints()
            remove_aside(self.output_dir)
        self.accelerator.wait_for_everyone()

    def succeeds_everywhere(self, work, *arguments) -> bool:
        """Call work(*arguments), say its failure, and return whether it failed in no process."""
        num_failures = torch.zeros((), device=self.args.device)
        try:
            work(*arguments)
        except FAILURES as error:
            num_failures += 1
            name = f"checkpoint-{self.state.global_step}"
            reason = describe(error)
            say(f"{name} could not be saved; earlier ones are whole: {reason}", sys.stderr)
        return bool(self.accelerator.reduce(num_failures) == 0)

    def write_files(self, folder: Path) -> None:
        """Write this process's part of a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        # Shards come first: all processes write them together, and all know of a failure in one.
        self._save_optimizer_and_scheduler(str(folder))
        if self.args.should_save:
            write_settings(folder, self.model, self.processing_class, self.model.dtype)
            if not self.is_fsdp_enabled:
                write_weights(folder, self.model.state_dict(), self.model.dtype)
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))

    def finish_save(self, folder: Path, checkpoint: Path) -> None:
        """Add Trainer's state and the manifest, wait for the disk, and rename the folder."""
        if not self.args.should_save:
            return
        self.write_state(folder)
        sync_files(folder)
        sizes = measure_files(folder)
        sizes[STATE] = None  # it is renewed after an evaluation
        replace_text(folder / MANIFEST, json.dumps(sizes, indent=1) + "\n")
        os.replace(folder, checkpoint)

    def write_state(self, folder: Path) -> None:
        """Write Trainer's state and those of its callbacks."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        aside = folder / f"{STATE}.new"
        self.state.save_to_json(str(aside))
        sync_file(aside)
        os.replace(aside, folder / STATE)

    def renew_state(self) -> None:
        """Write the state of a step that is saved already, and was evaluated since then."""
        checkpoint = self.output_dir / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)
        self.keep_best()
        if not self.args.should_save:
            return
        try:
            self.write_state(checkpoint)
        except OSError as error:
            say(f"{checkpoint} lacks its evaluation: {describe(error)}", sys.stderr)
        self.remove_old_checkpoints()
        remove_aside(self.output_dir)

    def remove_old_checkpoints(self) -> None:
        """Remove the oldest checkpoints beyond save_total_limit, but the best and the last one."""
        limit = self.args.save_total_limit
        checkpoints = [path for path in find_checkpoints(self.output_dir) if is_whole(path)]
        if not limit or not checkpoints:
            return
        kept = {checkpoints[-1]}
        if self.state.best_model_checkpoint:
            kept.add(Path(self.state.best_model_checkpoint))
        num_surplus = max(len(checkpoints) - limit, 0)
        removable = [path for path in checkpoints if path not in kept]
        aside = self.output_dir / ASIDE
        for old in removable[:num_surplus]:
            try:
                # Half deleted it would look damaged, so it is deleted aside.
                aside.mkdir(exist_ok=True)
                os.replace(old, aside / old.name)
            except OSError as error:
                say(f"{old} could not be removed: {describe(error)}", sys.stderr)

    def check_weights(self) -> None:
        """Raise UserError where a weight is not finite: nothing of such a model is kept."""
        # After an evaluation FSDP2 has some parameters whole; state_dict() has all in shards.
        weights = self.model.state_dict()
        if not math.isfinite(total_norm(list(weights.values()))):
            raise UserError(
                f"after step {self.state.global_step} weights are infinite or NaN: not saved, "
                f"not exported; {describe_progress(self.output_dir)}, "
                "or begin anew with a lower --learning_rate"
            )

    # ---- Evaluating ----
    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler: bool = False) -> dict:
        """Evaluate as Trainer does. What is to be saved is saved before.

        So a run that ends in a long evaluation has lost no step. A resumed run evaluates again.
        """
        if self.control.should_save:
            self._save_checkpoint(self.model_wrapped, trial)
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Prepare and load all, as Trainer does, and evaluate where that is due."""
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self.evaluation_is_due:
            self.control.should_save = True
            self.control.should_training_stop = False  # the signal was for the run before
            metrics = super()._evaluate(None, None)  # what would be saved before is there
            self._determine_best_metric(metrics)
            self.renew_state()
            self.has_ended = self.control.should_training_stop
        return prepared

    def _run_epoch(self, **options) -> None:
        """Train an epoch as Trainer does, unless the evaluation before has ended the run."""
        if self.has_ended:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**options)

    # ---- The best checkpoint ----
    def _determine_best_metric(self, metrics: dict[str, float], trial=None) -> bool:
        """Return whether this step is the best one; only a step that is saved can be.

        An evaluation that a signal has ended has no metrics.
        """
        if not self.control.should_save or not metrics:
            return False
        return super()._determine_best_metric(metrics, trial)

    def keep_best(self) -> None:
        state = self.state
        self.saved_best = (state.best_metric, state.best_global_step, state.best_model_checkpoint)

    def restore_best(self) -> None:
        """Forget a best step whose checkpoint could not be saved."""
        metric, step, checkpoint = self.saved_best
        self.state.best_metric = metric
        self.state.best_global_step = step
        self.state.best_model_checkpoint = checkpoint

    def find_best(self) -> None:
        """Set the place of a resumed run's best checkpoint, as its folder may have been moved.

        Raises UserError where that checkpoint is damaged. Where it is gone, only later steps can
        be the best.
        """
        state = self.state
        if state.best_global_step is None:
            return
        best = self.output_dir / f"checkpoint-{state.best_global_step}"
        if best.exists():
            if self.args.load_best_model_at_end:
                check_checkpoint(best)
            state.best_model_checkpoint = str(best)
            return
        state.best_metric = None
        state.best_global_step = None
        state.best_model_checkpoint = None
        if self.args.load_best_model_at_end:
            say(f"best       {best} is gone: the best of the steps from here on is exported")

    def _load_best_model(self) -> None:
        check_checkpoint(Path(self.state.best_model_checkpoint))
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- Resuming ----
    def find_shards(self, checkpoint: str, name: str) -> Path | None:
        """Return the shards of that name in a checkpoint, or None where it is in one piece.

        Raises UserError where they would run code, or where one piece is to be read as shards.
        """
        shards = Path(checkpoint, name)
        if shards.is_dir():
            read_metadata(shards)
            return shards
        if self.is_fsdp_enabled:
            raise UserError(
                f"{checkpoint} was saved in one piece, and shards cannot be resumed from that: "
                "resume it by one process, without torchrun"
            )
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.find_shards(resume_from_checkpoint, WEIGHT_SHARDS)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = read_weights(Path(resume_from_checkpoint))
        report = self.model.load_state_dict(weights, strict=False)
        wrong = set(report.missing_keys) | set(report.unexpected_keys)
        if self.model.config.tie_word_embeddings:
            wrong.discard("lm_head.weight")
        if wrong:
            names = ", ".join(sorted(wrong)[:3])
            raise UserError(f"{resume_from_checkpoint} is not of this model: {names}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        shards = self.find_shards(checkpoint, OPTIMIZER_SHARDS)
        if shards is not None and not self.is_fsdp_enabled:
            self.load_optimizer_from_shards(shards)
            schedule = torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True)
            self.lr_scheduler.load_state_dict(schedule)
            return
        # To make the state of a sharded optimizer, torch takes a step with gradients of zero. A
        # gradient scaler refuses it, as it has scaled no loss yet.
        scaler = self.optimizer.scaler
        self.optimizer.scaler = None
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            self.optimizer.scaler = scaler

    def load_optimizer_from_shards(self, shards: Path) -> None:
        """Load the optimizer's state of several processes into this one."""
        optimizer = self.optimizer.optimizer
        state = get_optimizer_state_dict(self.model, optimizer)  # zeros, to be filled
        fill_from_shards({"optimizer": state}, shards)
        set_optimizer_state_dict(self.model, optimizer, state)

    def _init_training_state(self, max_steps, steps_per_epoch, num_epochs, checkpoint, trial):
        """Return (whole epochs, steps of the next one) that are done, as Trainer does.

        A run that had ended has done all of its epochs.
        """
        done = super()._init_training_state(
            max_steps, steps_per_epoch, num_epochs, checkpoint, trial
        )
        if checkpoint is not None:
            # Trainer would go on with the intervals of the run that was stopped.
            self.state.compute_steps(self.args, max_steps)
            control = self.state.stateful_callbacks["TrainerControl"]["args"]
            self.evaluation_is_due = control["should_evaluate"]
            self.find_best()
            self.last_saved_step = self.state.global_step
        self.keep_best()
        if self.state.global_step >= max_steps or self.has_lost_patience():
            return num_epochs, 0
        return done

    def has_lost_patience(self) -> bool:
        """Return whether early stopping had ended the run that is resumed."""
        early = self.state.stateful_callbacks.get("EarlyStoppingCallback")
        if early is None:
            return False
        waited = early["attributes"]["early_stopping_patience_counter"]
        return waited >= early["args"]["early_stopping_patience"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self.is_resuming = False  # this is the last that Trainer loads

    # ---- The trained model ----
    def export(self, dtype: torch.dtype) -> None:
        """Write an ordinary model folder to output_dir, weights rounded to dtype.

        Raises UserError where that fails. If no checkpoint has the weights, the error comes only
        after an hour of tries, in which there may be room again.
        """
        self.check_weights()
        weights = self.accelerator.get_state_dict(self.model)  # whole, where they are in shards
        if not self.args.should_save:
            return
        for num_tries_left in reversed(range(self.count_export_tries())):
            try:
                self.write_export(weights, dtype)
                return
            except Exception as error:  # each library has its own
                sentence = explain_failed_export(self.output_dir, error)
                if num_tries_left == 0:
                    raise UserError(f"{sentence}; {describe_progress(self.output_dir)}") from error
            say(f"{sentence}; no checkpoint has it: trying again every minute", sys.stderr)
            time.sleep(RETRY_S)

    def count_export_tries(self) -> int:
        """Return how often the export is tried: once, or every minute if nothing else is saved."""
        is_best_loaded = self.args.load_best_model_at_end and self.state.best_model_checkpoint
        if is_best_loaded or is_whole(self.output_dir / f"checkpoint-{self.state.global_step}"):
            return 1
        wait_s = MAX_WAIT_S
        if self.args.world_size > 1:  # then the other processes give up
            wait_s = min(wait_s, self.args.ddp_timeout // 2)
        return 1 + wait_s // RETRY_S

    def write_export(self, weights: dict, dtype: torch.dtype) -> None:
        """Write the model folder aside, and move its files into output_dir."""
        aside = self.output_dir / ASIDE
        try:
            write_model(aside, self.model, self.processing_class, weights, dtype)
            sync_files(aside)
            move_model(aside, self.output_dir)
        finally:
            remove_aside(self.output_dir)


# ---- A model folder from a checkpoint -----------------------------------------------------------
def export_checkpoint(checkpoint: Path) -> Path:
    """Write a checkpoint's weights as an ordinary model folder beside it, and return its path.

    The weights get the number format of the run's own export. Raises UserError.
    """
    folder = checkpoint.with_name(f"{checkpoint.name}-model")
    if folder.exists():
        raise UserError(f"{folder} is there already; rename it, and try again")
    check_checkpoint(checkpoint)
    with only_tensors_are_loaded(), as_user_error(f"{checkpoint} cannot be read", FAILURES):
        weights = read_weights(checkpoint)
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        with torch.device("meta"):
            model = transformers.Qwen2ForCausalLM(config)
        model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint)
        dtype = find_export_dtype(checkpoint, config.dtype)
    aside = folder.with_name(f"{folder.name}.unfinished")
    try:
        write_model(aside, model, tokenizer, weights, dtype)
        sync_files(aside)
        os.replace(aside, folder)
    except Exception as error:  # each library has its own
        raise UserError(explain_failed_export(folder, error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def find_export_dtype(checkpoint: Path, checkpoint_dtype: torch.dtype) -> torch.dtype:
    """Return the number format of the run's export; without its record, that of the checkpoint."""
    if not (checkpoint.parent / RECORD).exists():
        return checkpoint_dtype
    name = read_record(checkpoint.parent).get("export_dtype")
    if name is None:
        return checkpoint_dtype
    return getattr(torch, name)
