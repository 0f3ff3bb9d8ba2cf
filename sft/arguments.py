"""The command line: flags, a JSON file of arguments, and what is refused and why."""

import json
import os
import re
from pathlib import Path

import torch
import transformers

from sft.memory_plan import GPUS

# Each process saves its share; one a machine reads the model's files, and hands out the weights.
FSDP_CONFIG = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}


def process_defaults(argv: list[str]) -> dict:
    """Return the TrainingArguments of one of torchrun's processes: FSDP2 on GPUs, DDP on CPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or any("--deepspeed" in flag for flag in argv):
        return {}
    if not torch.cuda.is_available():
        return {"use_cpu": True, "ddp_backend": "gloo"}
    return {"fsdp": True, "fsdp_config": FSDP_CONFIG}


def parse_arguments(argv: list[str], script_arguments, defaults: dict) -> tuple:
    """Return (ScriptArguments, TrainingArguments); one line and exit code 2 if they are wrong."""
    classes = (script_arguments, transformers.TrainingArguments)
    usage = "%(prog)s [arguments.json] [--flag value ...]"
    parser = transformers.HfArgumentParser(classes, allow_abbrev=False, usage=usage)
    parser.print_usage = lambda file=None: None  # an error is one line, without the usage
    try:
        if argv and argv[0].endswith(".json"):  # becomes flags, so that one parser checks both
            values = json.loads(Path(argv[0]).read_text(encoding="utf-8")).items()
            values = [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in values]
            argv = [f"--{k}={v}" for k, v in values if v != "null"] + argv[1:]
        parser.set_defaults(**defaults, **process_defaults(argv))
        args, training_args, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
        if args.device_map.startswith("{"):
            args.device_map = json.loads(args.device_map)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    if unknown:
        parser.error(f"unknown argument {unknown[0]} (--help lists all)")
    if training_args.bf16 or training_args.fp16:
        parser.error("leave --bf16 and --fp16 out: the number format follows from the GPU")
    if training_args.load_best_model_at_end or training_args.save_strategy == "best":
        parser.error("no best checkpoint is kept: leave --load_best_model_at_end out")
    if args.gpus and not (args.dry_run and re.fullmatch(GPUS, args.gpus)):
        parser.error("--gpus is for --dry_run, and reads NUMBERxGIB: 4x80, or 2x80,1x40")
    values = vars(args) | vars(training_args)
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
    for name in ("max_len", "tokens_per_forward", *sizes):
        if values[name] is not None and values[name] <= 0:
            parser.error(f"--{name} must be positive")
    for name in training_args.report_to:  # TrainingArguments have imported what is asked here
        if name not in transformers.integrations.get_available_reporting_integrations():
            parser.error(f"--report_to {name}: there is none, or its package is not installed")
    return args, training_args
