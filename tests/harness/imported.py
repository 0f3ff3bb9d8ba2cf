"""Imports all that a run needs, and computes nothing: forks.py forks its processes from this."""

import gc
import importlib

import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from sft.console import quiet_libraries

MODULES = [
    "datasets",
    "networkx",
    "sft_qwen2",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torchao.optim",
    "wandb",
]
CLASSES = ["Trainer", "Qwen2ForCausalLM", "Qwen2Tokenizer", "pipeline"]

quiet_libraries()
for module in MODULES:
    importlib.import_module(module)
for name in CLASSES:
    getattr(transformers, name)  # transformers imports the module of a name when it is asked for
get_checkpoint_conversion_mapping("qwen2")  # made once, for all
gc.freeze()  # a collection in a child would copy all of these objects
