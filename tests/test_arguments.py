"""Arguments: every flag has its effect, is refused with a reason, or is said to have none."""

import dataclasses
import itertools
import json

import pytest
import torch
import transformers
from conftest import ROOT

from sft.arguments import FLAGS, process_defaults, with_optim
from sft.memory_plan import choose_precision
from sft_qwen2 import TRAINING_DEFAULTS, ScriptArguments, parse_arguments

OWN = {f.name: f for f in dataclasses.fields(ScriptArguments) if f.init}
THEIRS = {f.name: f for f in dataclasses.fields(transformers.TrainingArguments)}
ACCEPTED = {name: f for name, f in (OWN | THEIRS).items() if name in OWN or name in FLAGS["works"]}


def parse(*argv):
    return parse_arguments([str(arg) for arg in argv], ScriptArguments, TRAINING_DEFAULTS)


def refusal(capsys, *argv) -> str:
    """Return the one line with which arguments are refused, by exit code 2."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    err = capsys.readouterr().err
    assert (stop.value.code, err[:7], err.count("\n")) == (2, "error: ", 1), (argv, err)
    return err


def is_number(field) -> bool:
    return "int" in str(field.type) or "float" in str(field.type)


def other_value(name: str) -> str:
    """Return a value of the field that is not its default, as it stands on a command line."""
    if "bool" in str(THEIRS[name].type):
        return str(TRAINING_DEFAULTS.get(name, THEIRS[name].default) is not True)
    return "spawn" if "context" in name else "7" if is_number(THEIRS[name]) else "x"


def test_every_field_stands_in_one_table():
    """Each field of the installed TrainingArguments works, is refused, or is harmless: just one."""
    names = [name for table in ("works", "refused", "harmless") for name in FLAGS[table]]
    assert len(names) == len(set(names))
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than 5.17
    assert set(names) - newer <= set(THEIRS) <= set(names)
    assert {name for name in ACCEPTED if is_number(ACCEPTED[name])} == set(FLAGS["range"])
    assert set(FLAGS["choice"]) | set(FLAGS["useless"]) <= set(ACCEPTED)
    assert not set(FLAGS["hint"]) & (set(OWN) | set(THEIRS))


def test_what_would_not_work_is_refused(capsys):
    """A refused field that is not at its default ends with its reason; so does another's name."""
    for name in set(FLAGS["refused"]) & set(THEIRS):
        sentence = refusal(capsys, f"--{name}={other_value(name)}")
        assert f"--{name}: {FLAGS['refused'][name]}" in sentence
    for name, hint in FLAGS["hint"].items():
        assert f"argument --{name}: {hint}" in refusal(capsys, f"--{name}", "0.03")


def test_what_has_no_effect_is_named(capsys):
    """A harmless field is accepted, and one line says that it has no effect, and why."""
    for name, reason in FLAGS["harmless"].items():
        parse("--dataloader_num_workers", 2, f"--{name}", other_value(name))
        assert f"--{name} has no effect: {reason}\n" in capsys.readouterr().out


def test_help_shows_what_works(capsys):
    """--help names every flag that works with its default, no other one, in 80 lines at most."""
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and len(out.splitlines()) <= 80
    flags = "  ".join(line[2:] for line in out.splitlines() if line[2:4] == "--")[2:].split("  --")
    shown = dict((*flag.split(" ", 1), "")[:2] for flag in flags)
    assert set(shown) == set(ACCEPTED)
    defaults = {name: ACCEPTED[name].default for name in ACCEPTED}
    defaults |= TRAINING_DEFAULTS | {"optim": None}
    defaults["data_path"] = "data/"  # a list of one
    assert all(shown[name] == str(defaults[name] or "") for name in shown)


def test_flags_stand_above_the_file(tmp_path):
    """Values are the flag's, else the file's, else the walk-through's, else Trainer's."""
    values = {"learning_rate": 2e-5, "max_len": 100, "gradient_checkpointing": False}
    values |= {"system_prompt": "--own \"'\n", "report_to": ["wandb"], "tokens_per_forward": None}
    values["lr_scheduler_kwargs"] = {"num_cycles": 0.4}
    (tmp_path / "run.json").write_text(json.dumps(values))
    read = parse(tmp_path / "run.json", "--max_len", 50, "--save_steps", 2)
    read = vars(read[0]) | vars(read[1])
    assert {name: read[name] for name in values} == values | {"max_len": 50}
    names = "save_steps weight_decay lr_scheduler_type warmup_steps model_name_or_path "
    names += "per_device_train_batch_size gradient_accumulation_steps"
    values = [2, 0.003, "cosine", 0.03, "Qwen/Qwen2-7B-Instruct", 4, 32]
    assert [read[name] for name in names.split()] == values


WRONG = {  # flags or a file of arguments, and what must be in their refusal
    "{": "broken JSON",
    '{"max_len": 1, "max_len": 2}': "twice",
    '{"save_total_limit": null}': "save_total_limit",
    '{"learning_rate": NaN}': "--learning_rate",
    "missing.json": "missing.json",
    "--learning_rat 1": "is it --learning_rate?",
    "--warmup_ratio=0.03": "--warmup_steps 0.03",
    "--warmup_steps 2.5": "whole",
    "--report_to tensorbord": "tensorbord",
    "--eval_steps 20": "--eval_strategy no",
    "--lr_scheduler_type constant --warmup_steps 9": "--lr_scheduler_type constant",
    "--lr_scheduler_type cosine_with_min_lr": "min_lr_rate",
    "--gpus 4x80": "--dry_run False",
    "--dry_run --gpus 1000x80": "256",
}


def test_wrong_arguments_are_one_line(capsys, tmp_path):
    """Of a wrong argument, or file of them, one line names it, or leads out."""
    for text, word in WRONG.items():
        (tmp_path / "run.json").write_text(text)
        argv = [tmp_path / "run.json"] if text.startswith("{") else text.split()
        assert word in refusal(capsys, *argv)
    numbers = [name for name in ACCEPTED if is_number(ACCEPTED[name])]
    choices = [*FLAGS["choice"], "overflow_strategy", "lr_scheduler_type", "fp32"]
    bad_numbers = ("nan", "inf", "-inf", "-1e-9", "1e39", "-2", "", "1,5", "one")
    cases = list(itertools.product(numbers, bad_numbers))
    cases += itertools.product(choices, ("never", "best", "None", "0.5"))
    assert len(cases) >= 201
    for name, bad in cases:
        assert name in refusal(capsys, f"--{name}={bad}", "--dry_run")


@pytest.mark.parametrize("optim", [None, *FLAGS["choice"]["optim"].split()])
def test_only_stochastic_rounding_has_bf16_weights(optim):
    """--optim is taken as it is given, also where it is Trainer's default, over fp32 weights."""
    chosen = parse(*(["--optim", optim] if optim else []))[0].chosen_optim
    for own in (choose_precision(gpu, False) for gpu in ((8, 0), (7, 0), None)):
        precision = with_optim(own, chosen)
        assert precision == own if optim in (None, own.optim) else precision.optim == optim
        rounds = precision.optim == "adamw_torch_8bit"
        assert precision.weights == torch.float32 or rounds
        size = (4 if precision.weights == torch.bfloat16 else 8) + (2 if rounds else 8)
        assert precision.bytes_per_parameter == pytest.approx(size, rel=0.02)  # blocks' scales
        assert ("fifth" in precision.reason) == (own.weights != precision.weights)


def test_processes_share_the_model(monkeypatch, capsys):
    """torchrun's processes have FSDP2 on GPUs, and DDP on CPU."""
    assert process_defaults(False) == {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process_defaults(False) == {"use_cpu": True, "ddp_backend": "gloo"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert process_defaults(False)["fsdp"] and process_defaults(True)["use_cpu"]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "torchrun" in refusal(capsys)


STEPS = "--eval_strategy steps --eval_steps"
EFFECTS = {  # what is other than in a run without them
    "loss": "--weight_decay 0.9 | --max_grad_norm 0.001 | --optim adafactor | --adam_beta1 0.1 | "
    "--adam_beta2 0.1 | --adam_epsilon 0.1 | --seed 1 | --data_seed 1 | --num_train_epochs 2 | "
    "--per_device_train_batch_size 4 | --gradient_accumulation_steps 2 | --max_steps 3 | "
    "--logging_steps 2 | --logging_steps 3 --logging_first_step True | --logging_strategy epoch",
    "learning_rate": "--learning_rate 1e-3 | --lr_scheduler_type linear | --warmup_steps 2 | "
    '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":0.5} | '
    f"--lr_scheduler_type reduce_lr_on_plateau {STEPS} 1 --lr_scheduler_kwargs "
    '{"patience":0,"threshold":10}',
    "eval_loss": f"{STEPS} 2 | {STEPS} 1 --eval_delay 3",
    "checkpoints": "--save_strategy epoch | --save_strategy steps --save_steps 1 | "
    "--save_strategy steps --save_steps 1 --save_total_limit 0",
    "": "--gradient_checkpointing False | --activation_checkpointing False | --use_cpu True | "
    "--dataloader_num_workers 2 --per_device_eval_batch_size 1 --torch_empty_cache_steps 1 "
    "--remove_unused_columns False --label_names x --use_cache True",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", EFFECTS)
def test_each_flag_has_its_effect(what, untied_model_dir, train, tmp_path):
    """A flag that works changes what it is for; one that has no effect changes nothing."""
    lines = (ROOT / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(lines[:8]))
    usual = "--save_strategy no --per_device_train_batch_size 2 --gradient_accumulation_steps 1"
    usual += " --learning_rate 1e-2"

    def run(flags: str) -> dict:
        words, folder = f"{usual} {flags}".replace("--", "").split(), tmp_path / f"outputs{flags}"
        seen = train(untied_model_dir, tmp_path, folder, **dict(zip(words[::2], words[1::2])))
        logs, names = seen.trainer.state.log_history, ("loss", "learning_rate", "eval_loss")
        found = {name: [(log["step"], log[name]) for log in logs if name in log] for name in names}
        return found | {"checkpoints": sorted(path.name for path in folder.glob("checkpoint-*"))}

    before = run("")
    for flags in EFFECTS[what].split(" | "):
        after = run(flags)
        assert after[what] != before[what] if what else after == before, flags
