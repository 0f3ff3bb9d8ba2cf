"""The command line: flags, a JSON file of arguments, and what is refused and why (flags.toml)."""

import dataclasses
import difflib
import itertools
import json
import os
import re
import sys
import tomllib
from pathlib import Path

import torch
import transformers

from sft import callbacks
from sft.memory_plan import GPUS, STATE_8BIT, Precision
from sft.rows import parse_json, say

# Each process saves its share; one a machine reads the model's files, and hands out the weights.
FSDP_CONFIG = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}


def read_flags() -> dict[str, dict[str, str]]:
    """Return the tables of flags.toml, each as {name: sentence}."""
    tables = tomllib.loads(Path(__file__).with_name("flags.toml").read_text(encoding="utf-8"))
    for table, rows in tables.items():
        tables[table] = {name: text for text, names in rows.items() for name in names.split()}
    return tables


FLAGS = read_flags()


class Parser(transformers.HfArgumentParser):
    """Errors are one line; --help shows the script's own flags, and those of Trainer that work."""

    def error(self, message: str):
        """Print one line, and end the process with exit code 2."""
        found = re.match(r"argument --(\w+)", message)  # argparse could not read its value
        name = found and found[1]
        if name in FLAGS["refused"]:
            message = f"--{name}: {FLAGS['refused'][name]}"
        elif name in FLAGS["choice"]:
            message = f"--{name}: must be one of {FLAGS['choice'][name]}"
        message = f"error: {' '.join(message.split())}"
        callbacks.tell_torchrun(message)
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # the others have the same arguments
        self.exit(2, f"{message}\n" if first else None)

    def format_help(self) -> str:
        """Return two lines for flags that belong together: names with defaults, and a sentence."""
        own = dataclasses.fields(self.dataclass_types[0])
        helps = {field.name: field.metadata["help"] for field in own if field.init} | FLAGS["works"]
        lines = ["python sft_qwen2.py [arguments.json] [--flag value ...]"]
        for text, names in itertools.groupby(helps, helps.get):
            defaults = {name: self.get_default(name) or "" for name in names}
            defaults |= {k: " ".join(v) for k, v in defaults.items() if isinstance(v, list)}
            flags = [f"--{name} {default}".strip() for name, default in defaults.items()]
            lines += ["  " + "  ".join(flags), f"      {text}"]
        return "\n".join([*lines, "Trainer's other flags are refused, or have no effect.", ""])


def with_optim(precision: Precision, chosen_optim: str | None) -> Precision:
    """Return the precision with the optimizer of --optim, where one was chosen.

    Only the 8-bit AdamW rounds bf16 weights by chance; the others get fp32 weights.
    """
    if chosen_optim in (None, precision.optim):
        return precision
    state = STATE_8BIT if chosen_optim == "adamw_torch_8bit" else 8
    changed = {"optim": chosen_optim, "bytes_per_parameter": 2 * torch.float32.itemsize + state}
    if precision.weights != torch.float32:
        why = f"fp32 weights: over bf16, {chosen_optim} learns about a fifth as much"
        changed |= {"weights": torch.float32, "reason": f"{precision.reason}; {why}"}
    return precision._replace(**changed)


def is_within(value: float, interval: str) -> bool:
    """Return whether the value is in an interval as "[0, 1)"; NaN is in none."""
    low, high = map(float, interval[1:-1].split(", "))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def check_values(values: dict, defaults: dict, own: set[str]) -> None:
    """Raise ValueError, a sentence, for the first value that is refused; print what is ignored.

    `own`: the names of the script's arguments. A default needs no check.
    """
    for name in (name for name in values if values[name] not in (None, defaults[name])):
        value, given = values[name], f"--{name} {values[name]}"
        if name not in own and name not in FLAGS["works"] | FLAGS["harmless"]:
            reason = FLAGS["refused"].get(name, "this script does not know it yet")
            raise ValueError(f"--{name}: {reason}")
        if "\0" in str(value) or (name, value) == ("output_dir", ""):
            raise ValueError(f"{given!r}: is empty or has a NUL")
        choices, interval = FLAGS["choice"].get(name), FLAGS["range"].get(name)
        if choices and str(value) not in choices.split():
            raise ValueError(f"{given}: must be one of {choices}")
        if interval and not is_within(value, interval):
            raise ValueError(f"{given}: must be a number in {interval}")
        if name.endswith("_steps") and value > 1 and value != int(value):
            raise ValueError(f"{given}: above 1 it is a number of steps, and must be whole")
        other, *idle = FLAGS["useless"].get(name, name).split()
        if str(values[other]) in idle:
            raise ValueError(f"{given}: has no effect with --{other} {values[other]}")
        if name in FLAGS["harmless"] and os.environ.get("RANK", "0") == "0":
            say(f"note       --{name} has no effect: {FLAGS['harmless'][name]}")


def unknown_argument(argument: str, names: list[str]) -> ValueError:
    """Return the error of an argument that no flag took, with what may be meant."""
    argument = argument.split("=")[0]
    name = argument.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    hint = FLAGS["hint"].get(name) or (f"is it --{near[0]}?" if near else "--help lists all")
    return ValueError(f"unknown argument {argument}: {hint}")


def read_schedule(name: str, text: str) -> dict:
    """Return --lr_scheduler_kwargs; raises ValueError where no schedule can be made of them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        kwargs = json.loads(text)
        transformers.get_scheduler(name, optimizer, 0, 1000, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"--lr_scheduler_kwargs {text}: not for {name}: {error}") from error
    return kwargs


def process_defaults(use_cpu: bool) -> dict:
    """Return the TrainingArguments of one of torchrun's processes: FSDP2 on GPUs, DDP on CPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return {}
    if use_cpu or not torch.cuda.is_available():
        return {"use_cpu": True, "ddp_backend": "gloo"}
    return {"fsdp": True, "fsdp_config": FSDP_CONFIG}


def read_values(parser: Parser, argv: list[str]) -> dict:
    """Return {name: value} of all arguments, each checked; raises ValueError or OSError."""
    defaults = vars(parser.parse_args([]))
    if argv and argv[0].endswith(".json"):  # becomes flags, so that one parser checks both
        file = parse_json(Path(argv[0]).read_bytes())
        if not isinstance(file, dict) or None in file:
            wrong = file[None] if isinstance(file, dict) else file
            raise ValueError(f"{argv[0]} {wrong if isinstance(wrong, str) else 'is a list'}")
        file = {k: v for k, v in file.items() if v is not None or defaults.get(k, k) is not None}
        paths = file.pop("data_path", [])
        paths = paths if isinstance(paths, list) else [paths]
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in file.items()}
        flags = ["--data_path", *map(str, paths)] * bool(paths)
        argv = flags + [f"--{k}={text}" for k, text in texts.items()] + argv[1:]
    known, unknown = parser.parse_known_args(argv)
    own = {field.name for field in dataclasses.fields(parser.dataclass_types[0])}
    if unknown:
        raise unknown_argument(unknown[0], [*own, *FLAGS["works"]])
    values = vars(known)
    check_values(values, defaults, own)
    gpus, counts = values["gpus"], re.findall(r"(\d+)x", values["gpus"] or "")
    if gpus is not None and not (re.fullmatch(GPUS, gpus) and sum(map(int, counts)) <= 256):
        raise ValueError(f"--gpus {gpus}: reads NUMBERxGIB, as 4x80 or 2x80,1x40; at most 256 GPUs")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError(f"DeepSpeed: {FLAGS['refused']['deepspeed']}")
    schedule, kwargs = values["lr_scheduler_type"], values["lr_scheduler_kwargs"] or "{}"
    reporters = values["report_to"]
    values |= {
        "lr_scheduler_kwargs": read_schedule(schedule, kwargs),
        "report_to": json.loads(reporters) if reporters[:1] == "[" else reporters.split(","),
        "disable_tqdm": values["disable_tqdm"] or not sys.stderr.isatty(),  # it would fill a file
    }
    if values["early_stopping_patience"]:  # it needs a best, and is to go on after a resume
        values |= {"metric_for_best_model": "eval_loss"}
        values |= {"restore_callback_states_from_checkpoint": True}
    return values | process_defaults(values["use_cpu"])


def parse_arguments(argv: list[str], script_arguments, defaults: dict) -> tuple:
    """Return (ScriptArguments, TrainingArguments); one line and exit code 2 if they are wrong."""
    parser = Parser((script_arguments, transformers.TrainingArguments), allow_abbrev=False)
    parser.set_defaults(**defaults, optim=None)
    try:
        values = read_values(parser, argv)
        given = {name: value for name, value in values.items() if value is not None}
        args, training_args = parser.parse_dict(given)
        available = transformers.integrations.get_available_reporting_integrations()
        for name in set(training_args.report_to).difference(available):
            why = "unknown, or its package is not installed (pip install tensorboard)"
            raise ValueError(f"--report_to {name}: {why}")
    except (OSError, ValueError, TypeError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:  # what reports to wandb and others is imported here
        parser.exit(130, "stopped    before anything began\n")
    args.chosen_optim = values["optim"]
    return args, training_args
