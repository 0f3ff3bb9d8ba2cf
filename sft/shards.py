"""Checkpoints in shards, which as many processes resume, or fewer, down to one."""

import io
import pickle
import re
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict

from sft.rows import UserError

# What the table of contents of shards, a pickle, is made of: classes that hold names and numbers.
PARTS = re.compile(
    r"torch\.distributed\.checkpoint\.(metadata\.(\w+Metadata|Metadata|MetadataIndex|StorageMeta"
    r"|TensorProperties|_MEM_FORMAT_ENCODING)|filesystem\._StorageInfo)"
    r"|torch\.(Size|b?float\d+|u?int\d+|serialization\._get_layout)|pathlib(\._local)?\.\w+Path"
)


class ContentsReader(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        """Return a class of PARTS; raises UserError for any other: no checkpoint runs code."""
        if not PARTS.fullmatch(f"{module}.{name}"):
            raise UserError(f"a checkpoint's .metadata would run {module}.{name}: do not resume it")
        return super().find_class(module, name)


class ShardedCheckpoints:
    """Mixin for transformers.Trainer, which alone resumes shards as shards, whole ones whole."""

    def find_shards(self, checkpoint: str, part: str) -> Path | None:
        """Return the shards of a part that one process is to read whole, or None.

        Raises UserError where they would run code, or where whole ones are to be sharded.
        """
        shards = Path(checkpoint, part)
        if shards.exists():
            ContentsReader(io.BytesIO((shards / ".metadata").read_bytes())).load()
            return None if self.is_fsdp_enabled else shards
        if self.is_fsdp_enabled:
            raise UserError(f"{checkpoint}: one process saved it; resume it without torchrun")
        return None

    def _load_from_checkpoint(self, checkpoint: str, model=None) -> None:
        shards = self.find_shards(checkpoint, "pytorch_model_fsdp_0")
        if shards is None:
            return super()._load_from_checkpoint(checkpoint, model)
        weights = state_dict.get_model_state_dict(self.model)  # its own tensors, to be filled
        if self.model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        dcp.load({"model": weights}, checkpoint_id=shards, no_dist=True)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        shards = checkpoint and self.find_shards(checkpoint, "optimizer_0")
        if not shards:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer = self.optimizer.optimizer
        state = state_dict.get_optimizer_state_dict(self.model, optimizer)  # made, all zeros
        dcp.load({"optimizer": state}, checkpoint_id=shards, no_dist=True)
        state_dict.set_optimizer_state_dict(self.model, optimizer, state)
        schedule = torch.load(f"{checkpoint}/scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)
