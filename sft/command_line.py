"""The command line: options from flags and from a JSON file, each of them checked.

The options are the fields of a dataclass, made by `option`. A mistake ends the process with exit
code 2 and one line that says what is wrong and what to do.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import textwrap
import types
import typing
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

from sft.console import printable
from sft.errors import as_user_error
from sft.option_hints import explain_bare_word, explain_name, explain_word

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3e38  # of float32
MAX_GPUS = 256
MAX_CHECKED_STEPS = 100_000
INDENT = " " * 6  # of a sentence of --help
GPUS = re.compile(
    r"[1-9][0-9]{0,3}x[1-9][0-9]{0,3}(,[1-9][0-9]{0,3}x[1-9][0-9]{0,3})*(:(bf16|fp16))?"
)

# These say what to do now. A run's record has them, and they are no part of the run.
NOT_OF_THE_RUN = ("resume", "export", "dry_run", "gpus")

# An option, another option, its values by which the first has no effect, and what to do.
NO_EFFECT = (
    ("gpus", "dry_run", (False,), "add --dry_run"),
    ("eval_steps", "eval_strategy", ("no", "epoch"), "add --eval_strategy steps"),
    ("save_steps", "save_strategy", ("no", "epoch"), "leave it out"),
    ("save_total_limit", "save_strategy", ("no",), "leave it out"),
    ("warmup_steps", "lr_scheduler_type", ("constant",), "use constant_with_warmup"),
    ("lr_scheduler_kwargs", "lr_scheduler_type", ("constant",), "leave it out"),
    ("lr_scheduler_kwargs", "lr_scheduler_type", ("constant_with_warmup",), "leave it out"),
    ("adam_beta1", "optim", ("adafactor",), "leave it out"),
    ("adam_beta2", "optim", ("adafactor",), "leave it out"),
    ("adam_epsilon", "optim", ("adafactor",), "leave it out"),
)


# ---- Options ------------------------------------------------------------------------------------
class UsageError(ValueError):
    """A mistake on the command line: printed as one line, exit code 2."""


class MoreThanOneValue(UsageError):
    """A JSON text that goes on after its value."""


def option(default, help_text: str, *, group: str | None = None, choices=None, **about):
    """Return a field of a dataclass of options.

    `about`: at_least, above, at_most or below for numbers; is_path; is_comma_separated for lists.
    `group` is the title of the section of --help that begins with this option.
    """
    metadata = {"help": help_text, "group": group, "choices": choices, **about}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One option, as `option` declared it."""

    name: str
    group: str  # title of its section of --help
    kind: type  # str, int, float, bool, list (of texts) or dict
    default: object
    about: dict


def list_options(options_class) -> dict[str, Option]:
    """Return {name: Option} of a dataclass's fields."""
    annotations = typing.get_type_hints(options_class)
    defaults = options_class()
    options = {}
    group = ""
    for field in dataclasses.fields(options_class):
        group = field.metadata["group"] or group
        options[field.name] = Option(
            name=field.name,
            group=group,
            kind=find_kind(annotations[field.name]),
            default=getattr(defaults, field.name),
            about=dict(field.metadata),
        )
    return options


def find_kind(annotation) -> type:
    """Return the type of an option's values: int for `int | None`, list for `list[str]`."""
    if typing.get_origin(annotation) is types.UnionType:
        annotation = typing.get_args(annotation)[0]
    return typing.get_origin(annotation) or annotation


# ---- Parsing -------------------------------------------------------------------------------------
def parse(argv: list[str], options_class, only: list[str] | None = None):
    """Return the dataclass of options that the words of a command line give.

    The first word may be a JSON file of arguments, or a run's run.json. Flags win over the file.
    `only` names the options that may be flags, where a program needs few; the file may have all.
    A mistake prints one line and raises SystemExit(2). --help raises SystemExit(0).
    """
    # All processes of a machine have the same command line.
    is_first_process = os.environ.get("LOCAL_RANK", "0") == "0"
    options = list_options(options_class)
    flags = options
    if only is not None:
        flags = {name: options[name] for name in only}
    if "--help" in argv or "-h" in argv:
        if is_first_process:
            print(format_help(flags))
        raise SystemExit(0)
    try:
        args, notes = read_arguments(argv, options_class, options, flags)
        if only is None:
            check_reporters(args.report_to)
    except UsageError as error:
        if is_first_process:
            message = " ".join(str(error).split())
            print(f"error: {printable(message)}", file=sys.stderr)
        raise SystemExit(2) from None
    if is_first_process:
        for note in notes:
            print(f"note: {printable(note)}", file=sys.stderr)
    return args


def read_arguments(argv: list[str], options_class, options: dict, flags: dict) -> tuple:
    """Return the checked options, and a note on each one of the file that has no effect."""
    words = list(argv)
    from_file = {}
    file = None
    if words and not words[0].startswith("-"):
        file = words.pop(0)
        from_file = read_arguments_file(file, options)
    refuse_idle_flags(words, options, flags)
    from_flags = read_flags(words, flags)
    args = options_class(**{**from_file, **from_flags})
    check_best(args)
    notes = []
    for name, reason in find_options_without_effect(args, options, from_flags):
        if name in from_flags:
            raise UsageError(f"--{name} {show(from_flags[name])}: {reason}")
        notes.append(f"{file}: {name} {reason}")
    return args, notes


def refuse_idle_flags(words: list[str], options: dict, flags: dict) -> None:
    """Raise UsageError for an option of the trainer that a program without use for it is given."""
    for word in words:
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in options and name not in flags:
            raise UsageError(f"--{name}: leave it out here; it is for sft_qwen2.py")


def read_flags(words: list[str], options: dict[str, Option]) -> dict:
    """Return {name: value} of the options that are given as flags."""
    parser = WordParser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    for option in options.values():
        names = [f"--{option.name}"]
        if "_" in option.name:
            names.append("--" + option.name.replace("_", "-"))
        settings = {}
        if option.kind is bool:
            settings = {"nargs": "?", "const": "true"}
        if option.kind is list:
            settings = {"nargs": "+"}
        parser.add_argument(*names, dest=option.name, **settings)
    known, unknown = parser.parse_known_args(words)
    if unknown:
        # Other words may be values of the unknown options.
        mistakes = [unknown[0], *(word for word in unknown[1:] if word.startswith("--"))]
        raise UsageError("; ".join(explain_word(word, options) for word in mistakes))
    values = {}
    for name, given in vars(known).items():
        label = f"--{name} {shorten(show(given))}"
        value = read_text(options[name], given, label)
        values[name] = check_value(options[name], value, label)
    return values


class WordParser(argparse.ArgumentParser):
    """Splits a command line into names and words; what is wrong with them is a UsageError."""

    def error(self, message: str):
        """Raise UsageError. The one thing that can be wrong here is a value that is missing."""
        found = re.match(r"argument (--\w+)", message)
        if found is None:
            raise UsageError(message)
        name = found[1]
        raise UsageError(f"{name} needs a value; one that begins with - is written {name}=-1")


def read_text(option: Option, given: str | list[str], label: str):
    """Return the value that an option's words on the command line mean; raises UsageError."""
    if option.kind is bool:
        return read_bool(given, label)
    if option.kind is dict:
        value = parse_json(given, label)
        return check_type(option, value, label)
    if option.kind in (int, float):
        try:
            return option.kind(given)
        except ValueError:
            raise UsageError(f"{label}: must be {describe_number(option)}") from None
    if option.about.get("is_comma_separated"):
        return ",".join(given).split(",")
    return given


def read_bool(text: str, label: str) -> bool:
    """Return the truth that transformers reads in the same words."""
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise UsageError(f"{label}: must be true or false")


# ---- The JSON file -------------------------------------------------------------------------------
def read_arguments_file(file: str, options: dict[str, Option]) -> dict:
    """Return {name: value} of a JSON file of arguments, or of a run's run.json.

    A null is no value. Raises UsageError.
    """
    arguments = load_arguments_file(file)
    values = {}
    for name, value in arguments.items():
        if name not in options:
            meant = explain_name(name, options)
            raise UsageError(f"{file}: unknown option {json.dumps(name)}: {meant}")
        if value is None:
            continue
        option = options[name]
        label = f"{file}: {json.dumps(name)}: {shorten(json.dumps(value, ensure_ascii=False))}"
        value = check_type(option, value, label)
        values[name] = check_value(option, value, label)
    return values


def load_arguments_file(file: str) -> dict:
    """Return the object in a JSON file; of a run's record, what is in its "arguments"."""
    if not file.endswith(".json"):
        raise UsageError(explain_bare_word(file))
    try:
        text = Path(file).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # the bytes, or a NUL in the name
        raise UsageError(f"{file}: is not UTF-8") from error
    try:
        arguments = parse_json(text, file)
    except MoreThanOneValue as error:
        raise UsageError(f"{error}; if these are rows: --data_path {file}") from error
    if not isinstance(arguments, dict):
        raise UsageError(
            f"{file}: is no JSON object of arguments; if these are rows: --data_path {file}"
        )
    if "arguments" not in arguments:
        return arguments
    record = arguments["arguments"]
    if not isinstance(record, dict):
        raise UsageError(f'{file}: "arguments" is no JSON object')
    for name in NOT_OF_THE_RUN:
        record.pop(name, None)
    return record


def parse_json(text: str, label: str):
    """Return what a JSON text says; raises UsageError, also for a key that is there twice."""
    try:
        return json.loads(text, object_pairs_hook=make_object, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        kind = UsageError
        if error.msg == "Extra data":  # as on the second line of JSONL
            kind = MoreThanOneValue
        raise kind(f"{label}: broken JSON at line {error.lineno}: {error.msg}") from error
    except UsageError as error:
        raise UsageError(f"{label}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{label}: broken JSON: {error}") from error


def make_object(pairs: list[tuple]) -> dict:
    """Return the object of these keys and values; raises UsageError for a key that comes twice."""
    made = {}
    for name, value in pairs:
        if name in made:
            raise UsageError(f"{json.dumps(name)} is there twice")
        made[name] = value
    return made


def refuse_constant(text: str):
    raise UsageError(f"{text} is no number of JSON")


# ---- Values --------------------------------------------------------------------------------------
def check_type(option: Option, value, label: str):
    """Return a value of JSON as the option has it; raises UsageError for one of another type."""
    if option.kind is list:
        if isinstance(value, str):
            value = [value]
            if option.about.get("is_comma_separated"):
                value = value[0].split(",")
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return value
        raise UsageError(f"{label}: must be a text or a list of texts")
    if option.kind is bool and not isinstance(value, bool):
        raise UsageError(f"{label}: must be true or false")
    if option.kind is dict and not isinstance(value, dict):
        raise UsageError(f"{label}: must be a JSON object")
    if option.kind is str and not isinstance(value, str):
        raise UsageError(f"{label}: must be a text")
    if option.kind in (int, float):
        is_number = isinstance(value, int | option.kind) and not isinstance(value, bool)
        if not is_number:
            raise UsageError(f"{label}: must be {describe_number(option)}")
    return value


def check_value(option: Option, value, label: str):
    """Return the value, of the option's type; raises UsageError where it cannot be used.

    A ~ at the beginning of a path becomes the home folder, as in TrainingArguments.
    """
    if option.kind in (int, float):
        check_number(option, value, label)
        value = option.kind(value)
        if counts_steps(option) and value.is_integer():
            value = int(value)
    if option.kind is str:
        check_text(option, value, label)
        if option.about.get("is_path"):
            value = os.path.expanduser(value)
    if option.kind is list:
        if not value:
            raise UsageError(f"{label}: is empty")
        for text in value:
            check_text(option, text, label)
        if option.about.get("is_path"):
            value = [os.path.expanduser(text) for text in value]
    choices = option.about["choices"]
    if choices and value not in choices:
        raise UsageError(f"{label}: must be one of {', '.join(choices)}")
    if option.name == "gpus":
        check_gpus(value, label)
    return value


def check_number(option: Option, value: float, label: str) -> None:
    """Raise UsageError for a number outside the option's limits; its default is in them."""
    if value == option.default:
        return
    largest = option.about.get("at_most", LARGEST_INT)
    if option.kind is float and not counts_steps(option):
        largest = LARGEST_FLOAT
    if value > largest:
        raise UsageError(f"{label}: must be at most {largest}")
    if not is_within_limits(option, value):
        raise UsageError(f"{label}: must be {describe_number(option)}")
    if counts_steps(option) and value > 1 and value != int(value):
        raise UsageError(f"{label}: above 1 it is a number of steps, and must be whole")


def is_within_limits(option: Option, value: float) -> bool:
    """Return whether a number is in the option's limits; NaN and infinity are in none."""
    limits = option.about
    if not math.isfinite(value):
        return False
    if "at_least" in limits and value < limits["at_least"]:
        return False
    if "above" in limits and value <= limits["above"]:
        return False
    return "below" not in limits or value < limits["below"]


def counts_steps(option: Option) -> bool:
    """Return whether the option is a number of steps that may be a share of all, below 1."""
    return option.kind is float and option.name.endswith("_steps")


def describe_number(option: Option) -> str:
    """Return in words what numbers an option takes."""
    words = "a number"
    if option.kind is int:
        words = "a whole number"
    limits = []
    for name in ("at_least", "above", "below"):
        if name in option.about:
            limits.append(f"{name.replace('_', ' ')} {option.about[name]}")
    return " ".join([words, " and ".join(limits)]).strip()


def check_text(option: Option, text: str, label: str) -> None:
    """Raise UsageError for a text that could not be written to a file, or names no path."""
    if "\0" in text:
        raise UsageError(f"{label}: has a NUL")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{label}: is not UTF-8; set the terminal to UTF-8") from error
    if option.about.get("is_path") and not text.strip():
        raise UsageError(f"{label}: is empty")


def check_gpus(gpus: str, label: str) -> None:
    """Raise UsageError for a text of --gpus that does not read like 4x80 or 2x80,1x40:fp16."""
    form = f"must read like 4x80 or 2x80,1x40 (GB) or 4x32:fp16; at most {MAX_GPUS} GPUs"
    if GPUS.fullmatch(gpus) is None:
        raise UsageError(f"{label}: {form}")
    counts = re.findall(r"([0-9]+)x", gpus)
    if sum(map(int, counts)) > MAX_GPUS:
        raise UsageError(f"{label}: {form}")


def check_reporters(report_to: list[str]) -> None:
    """Raise UsageError where a run cannot report to one of these."""
    if len(set(report_to)) < len(report_to):
        raise UsageError(f"--report_to {','.join(report_to)}: names one twice")
    if "none" in report_to:
        if len(report_to) > 1:
            raise UsageError(f"--report_to {','.join(report_to)}: none stands alone")
        return
    for name in report_to:
        if name == "wandb" and importlib.util.find_spec("wandb"):
            continue  # The usual case. The list of all takes seconds to import.
        available = transformers.integrations.get_available_reporting_integrations()
        if name not in available:
            names = ", ".join([*available, "none"])
            raise UsageError(
                f"--report_to {name}: unknown, or its package is not installed; there are {names}"
            )


# ---- Options that go together --------------------------------------------------------------------
def find_options_without_effect(args, options: dict[str, Option], from_flags: dict) -> list[tuple]:
    """Return (name, reason) of each option that is given, and changes nothing.

    A file may hold all options at their defaults. These are not taken for given.
    """
    found = []
    for name, other, values, advice in NO_EFFECT:
        is_given = name in from_flags or getattr(args, name) != options[name].default
        other_value = getattr(args, other)
        if is_given and other_value in values:
            reason = f"has no effect with --{other} {show(other_value)}; {advice}"
            found.append((name, reason))
    epochs = "num_train_epochs"
    is_given = epochs in from_flags or args.num_train_epochs != options[epochs].default
    if is_given and args.max_steps > 0:
        reason = f"has no effect with --max_steps {args.max_steps}; leave one of them out"
        found.append((epochs, reason))
    return found


def check_best(args) -> None:
    """Raise UsageError unless evaluations and checkpoints come when the best one is wanted."""
    if args.early_stopping_patience is not None and args.eval_strategy == "no":
        raise UsageError(
            f"--early_stopping_patience {args.early_stopping_patience}: needs evaluations; "
            "add --eval_strategy epoch, or --eval_strategy steps --eval_steps N"
        )
    if not args.load_best_model_at_end:
        return
    needs = "--load_best_model_at_end: needs a checkpoint of each evaluation;"
    eval_steps = args.eval_steps or args.logging_steps  # as Trainer does
    if args.eval_strategy == "no":
        raise UsageError(f"{needs} add --eval_strategy epoch --save_strategy epoch")
    if args.eval_strategy == "epoch" and args.save_strategy != "epoch":
        raise UsageError(f"{needs} add --save_strategy epoch")
    if args.eval_strategy == "epoch":
        return
    steps = show(eval_steps)
    if args.save_strategy != "steps":
        raise UsageError(f"{needs} add --save_strategy steps --save_steps {steps}")
    # A share of all steps is rounded up, so that only the same share gives the same steps.
    is_share = min(args.save_steps, eval_steps) < 1
    if is_share and args.save_steps == eval_steps:
        return
    if is_share or args.save_steps % eval_steps != 0:
        raise UsageError(
            f"{needs} --save_steps {show(args.save_steps)} is no multiple of "
            f"--eval_steps {steps}: add --save_steps {steps}"
        )


# ---- Help ----------------------------------------------------------------------------------------
def format_help(options: dict[str, Option]) -> str:
    """Return the text of --help: each option with its default, and a sentence."""
    lines = [f"python {Path(sys.argv[0]).name} [arguments.json] [--option value ...]"]
    group = ""
    for option in options.values():
        if option.group != group:
            group = option.group
            lines.append("")
            lines.append(group)
        default = show(option.default) or "(none)"
        lines.append(f"  --{option.name} {default}")
        sentence = option.about["help"]
        if option.about["choices"]:
            sentence += f" One of: {', '.join(option.about['choices'])}."
        lines.append(textwrap.fill(sentence, 80, initial_indent=INDENT, subsequent_indent=INDENT))
    return "\n".join(lines)


def show(value) -> str:
    """Return a value as it is written on the command line; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return " ".join(value)
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value)


def shorten(text: str) -> str:
    """Return the beginning of a text that is too long for a message."""
    if len(text) <= 80:
        return text
    return text[:80] + "..."


# ---- The environment -----------------------------------------------------------------------------
def drop_foreign_environment() -> list[str]:
    """Remove variables that would decide what the plan decides; return their names, and print them.

    `accelerate launch` and `accelerate config` set ACCELERATE_* and FSDP_*, which choose number
    formats, compilation and shards. TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD lets checkpoints run code.
    What torchrun sets stays. To be called before TrainingArguments is made.
    """
    found = []
    for name in sorted(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name == "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD":
            del os.environ[name]
            found.append(name)
    if found and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: ignored in the environment: {', '.join(found)}", file=sys.stderr)
    return found


# ---- The schedule --------------------------------------------------------------------------------
def check_schedule(training_args: "transformers.TrainingArguments", num_steps: int) -> None:
    """Raise UserError unless each of num_steps steps has a rate from 0 to the learning rate.

    The schedule is the one that training will have, made by transformers for the same rate. Of more
    than MAX_CHECKED_STEPS steps, as many are checked.
    """
    kind = training_args.lr_scheduler_type.value
    kwargs = training_args.lr_scheduler_kwargs or {}
    given = f"--lr_scheduler_type {kind} --lr_scheduler_kwargs '{json.dumps(kwargs)}'"
    num_warmup_steps = training_args.get_warmup_steps(num_steps)
    num_scheduled_steps = num_steps
    if num_warmup_steps > 0:  # The trainer leaves out the first step of a warm-up, whose rate is 0.
        num_scheduled_steps = num_steps + 1
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=training_args.learning_rate)
    with warnings.catch_warnings(), as_user_error(f"{given}: makes no schedule"):
        warnings.simplefilter("ignore")
        schedule = transformers.get_scheduler(
            kind, optimizer, num_warmup_steps, num_scheduled_steps, kwargs
        )
    factor_of_step = schedule.lr_lambdas[0]
    # The schedule is asked once more behind the last step.
    num_checked = min(num_scheduled_steps + 1, MAX_CHECKED_STEPS)
    steps = np.linspace(0, num_scheduled_steps, num_checked).round().astype(int)
    for step in steps.tolist():
        with as_user_error(f"{given}: no learning rate at step {step}"):
            check_factor(factor_of_step(step), training_args.learning_rate)


def check_factor(factor: float, learning_rate: float) -> None:
    """Raise ValueError unless the factor of the learning rate is a number from 0 to 1."""
    rate = factor * learning_rate
    if not math.isfinite(rate) or rate < 0:
        raise ValueError(f"it is {rate}")
    if factor > 1 + 1e-6:
        raise ValueError(f"it is {rate}, above --learning_rate {learning_rate}")
