"""Imports all that a run needs, and computes nothing: what forks.py forks its processes from."""

import gc
import importlib

import transformers

from sft import callbacks

MODULES = "datasets wandb networkx torchao.optim torch._inductor.compile_fx sft_qwen2 sft.shards"
MODULES += " torch.distributed.checkpoint torch.distributed.fsdp torch.distributed.tensor"
callbacks.quiet_libraries()
for module in MODULES.split():
    importlib.import_module(module)
for name in ("Trainer", "Qwen2ForCausalLM", "Qwen2Tokenizer", "pipeline"):
    getattr(transformers, name)  # loads its module
transformers.conversion_mapping.get_checkpoint_conversion_mapping("qwen2")  # made once, for all
gc.freeze()
