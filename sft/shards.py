"""Checkpoints that any number of processes resume: one process's are whole, many's in shards."""

import io
import pickle
import re
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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


class AnyProcesses:
    """Mixin for transformers.Trainer, which alone resumes whole ones whole, shards in shards."""

    def _load_from_checkpoint(self, checkpoint: str, model=None) -> None:
        for contents in Path(checkpoint).glob("*/.metadata"):
            ContentsReader(io.BytesIO(contents.read_bytes())).load()
        shards = Path(checkpoint, "pytorch_model_fsdp_0")
        if shards.exists() == self.is_fsdp_enabled:
            return super()._load_from_checkpoint(checkpoint, model)
        weights = state_dict.get_model_state_dict(self.model)  # its own tensors, to be filled
        if self.model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        if shards.exists():
            return dcp.load({"model": weights}, checkpoint_id=shards, no_dist=True)
        return dcp.load(weights, storage_reader=dcp.HuggingFaceStorageReader(checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        shards = Path(checkpoint or "", "optimizer_0")
        if checkpoint is None or shards.exists() == self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer, options = self.optimizer.optimizer, {"map_location": "cpu", "weights_only": True}
        state = state_dict.get_optimizer_state_dict(self.model, optimizer)  # made, all zeros
        if shards.exists():
            dcp.load({"optimizer": state}, checkpoint_id=shards, no_dist=True)
            state_dict.set_optimizer_state_dict(self.model, optimizer, state)
        else:
            fill_shards(optimizer, torch.load(f"{checkpoint}/optimizer.pt", mmap=True, **options))
        self.lr_scheduler.load_state_dict(torch.load(f"{checkpoint}/scheduler.pt", **options))


def fill_shards(optimizer, whole: dict) -> None:
    """Fill the state of the optimizer's shards from that of one process."""
    for group, old in zip(optimizer.param_groups, whole["param_groups"], strict=True):
        for p, number in zip(group["params"], old["params"], strict=True):
            for name, value in whole["state"][number].items():
                mine = optimizer.state[p][name]
                if isinstance(mine, DTensor):
                    place = (mine.shape, mine.device_mesh, mine.placements)
                    (rows, *_), (first, *_) = compute_local_shape_and_global_offset(*place)
                    mine, value = mine.to_local(), value.narrow(0, first, rows)
                mine.copy_(value)
        group.update({**old, "params": group["params"]})  # the learning rate
