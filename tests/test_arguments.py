"""Arguments: every flag has its effect, is refused with a reason, or is said to have none."""

import dataclasses
import json

import pytest
import torch
import transformers
from conftest import ROOT

import sft_qwen2
from sft.arguments import FLAGS, process_defaults, with_optim
from sft.memory_plan import choose_precision

OWN = {f.name: f for f in dataclasses.fields(sft_qwen2.ScriptArguments) if f.init}
THEIRS = {f.name: f for f in dataclasses.fields(transformers.TrainingArguments)}
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than transformers 5.17
ACCEPTED = {name: f for name, f in (OWN | THEIRS).items() if name in OWN or name in FLAGS["works"]}


def parse(*argv):
    defaults = (sft_qwen2.ScriptArguments, sft_qwen2.TRAINING_DEFAULTS)
    return sft_qwen2.parse_arguments([str(arg) for arg in argv], *defaults)


@pytest.fixture
def refusal(capsys):
    """A function: arguments to the one line with which they are refused, by exit code 2."""

    def refuse(*argv) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(*argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: "), (argv, err)
        assert err.count("\n") == 1 and len(err) < 400, err
        return err

    return refuse


def is_number(field) -> bool:
    return "int" in str(field.type) or "float" in str(field.type)


def other_value(name: str) -> str:
    """Return a value of the field that is not its default, as it stands on a command line."""
    if "bool" in str(THEIRS[name].type):
        return str(sft_qwen2.TRAINING_DEFAULTS.get(name, THEIRS[name].default) is not True)
    return "spawn" if "context" in name else "7" if is_number(THEIRS[name]) else "x"


def test_every_field_stands_in_one_table():
    """Each field of the installed TrainingArguments works, is refused, or is harmless: just one."""
    names = [name for table in ("works", "refused", "harmless") for name in FLAGS[table]]
    assert len(names) == len(set(names))
    assert set(names) - NEWER <= set(THEIRS) <= set(names)
    assert {name for name in ACCEPTED if is_number(ACCEPTED[name])} == set(FLAGS["range"])
    assert set(FLAGS["choice"]) | set(FLAGS["useless"]) <= set(ACCEPTED)
    assert not set(FLAGS["hint"]) & (set(OWN) | set(THEIRS))


def test_what_would_not_work_is_refused(refusal):
    """A refused field that is not at its default ends with its reason; so does another's name."""
    for name in set(FLAGS["refused"]) & set(THEIRS):
        assert f"--{name}: {FLAGS['refused'][name]}" in refusal(f"--{name}={other_value(name)}")
    for name, hint in FLAGS["hint"].items():
        assert f"argument --{name}: {hint}" in refusal(f"--{name}", "0.03")


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
    flags = [line for line in out.splitlines() if line.startswith("  --")]
    shown = dict((*f.split(" ", 1), "")[:2] for line in flags for f in line[4:].split("  --"))
    assert set(shown) == set(ACCEPTED)
    defaults = {name: ACCEPTED[name].default for name in ACCEPTED}
    defaults |= sft_qwen2.TRAINING_DEFAULTS | {"optim": None}
    assert all(shown[name] == str(defaults[name] or "") for name in shown)


def test_defaults_are_the_walk_throughs():
    """Without arguments the run is the one the documentation walks through."""
    args, training_args = map(vars, parse())
    assert (args["model_name_or_path"], args["max_len"]) == ("Qwen/Qwen2-7B-Instruct", 8192)
    names = "per_device_train_batch_size gradient_accumulation_steps num_train_epochs learning_rate"
    names += " lr_scheduler_type warmup_steps weight_decay max_grad_norm save_steps logging_steps"
    values = [training_args[name] for name in names.split()]
    assert values == [4, 32, 1, 1e-5, "cosine", 0.03, 0.003, 1, 5, 1]


def test_flags_stand_above_the_file(tmp_path):
    """Arguments come from a JSON file, and a flag overrides the file's value of that name."""
    values = {"learning_rate": 2e-5, "max_len": 100, "gradient_checkpointing": False}
    values |= {"system_prompt": "--own \"'\n", "report_to": ["wandb"], "tokens_per_forward": None}
    values["lr_scheduler_kwargs"] = {"num_cycles": 0.4}
    (tmp_path / "run.json").write_text(json.dumps(values))
    read = parse(tmp_path / "run.json", "--max_len", 50, "--save_steps", 2)
    read = vars(read[0]) | vars(read[1])
    assert {name: read[name] for name in values} == values | {"max_len": 50}
    assert (read["save_steps"], read["weight_decay"]) == (2, 0.003)


FILES = {  # of arguments, and what must be in their refusal
    "{": "broken JSON",
    '{"max_len": 1, "max_len": 2}': "twice",
    '{"max_length": null}': "--max_length",
    '{"save_total_limit": null}': "save_total_limit",
    '{"max_len": [1]}': "max_len",
    '{"learning_rate": NaN}': "--learning_rate",
}
WRONG = {  # flags, and what must be in their refusal
    "--learning_rat 1": "is it --learning_rate?",
    "data": "argument data",
    "missing.json": "missing.json",
    "--warmup_ratio=0.03": "--warmup_steps 0.03",
    "--max_steps 0": "--max_steps",
    "--adam_beta2 1": "[0, 1)",
    "--warmup_steps 2.5": "whole",
    "--report_to tensorbord": "tensorbord",
    "--eval_steps 20": "--eval_strategy no",
    "--load_best_model_at_end --eval_strategy epoch": "save and eval strategy to match",
    "--lr_scheduler_type constant --warmup_steps 9": "--lr_scheduler_type constant",
    "--lr_scheduler_type cosine_with_min_lr": "min_lr_rate",
    "--lr_scheduler_kwargs {x": "--lr_scheduler_kwargs",
    '--device_map {"model":"disk"}': "--device_map",
    "--gpus 4x80": "--dry_run False",
    "--dry_run --gpus 1000x80": "256",
}
BAD_NUMBERS = ("nan", "inf", "-inf", "-1e-9", "1e39", "-2", "", "1,5", "one")
BAD_CHOICES = ("never", "best", "None", "0.5")


def test_wrong_arguments_are_one_line(refusal, tmp_path):
    """Of a wrong argument, or file of them, one line names it, or leads out."""
    for text, word in FILES.items():
        (tmp_path / "run.json").write_text(text)
        assert word in refusal(tmp_path / "run.json")
    for flags, word in WRONG.items():
        assert word in refusal(*flags.split())
    names = [name for name in ACCEPTED if is_number(ACCEPTED[name])]
    cases = [(name, bad) for name in names for bad in BAD_NUMBERS]
    names = [*FLAGS["choice"], "overflow_strategy", "eval_strategy", "logging_strategy"]
    names += ["lr_scheduler_type", "log_level", "device_map", "fp32", "resume", "use_cpu"]
    cases += [(name, bad) for name in names for bad in BAD_CHOICES]
    assert len(cases) >= 201
    for name, bad in cases:
        assert name in refusal(f"--{name}={bad}", "--dry_run")


@pytest.mark.parametrize("optim", [None, *FLAGS["choice"]["optim"].split()])
def test_only_stochastic_rounding_has_bf16_weights(optim):
    """--optim is taken as it is given, also where it is Trainer's default, over fp32 weights."""
    chosen = parse(*(["--optim", optim] if optim else []))[0].chosen_optim
    for own in (choose_precision(gpu, 1, False) for gpu in ((8, 0), (7, 0), None)):
        precision = with_optim(own, chosen)
        assert precision == own if optim in (None, own.optim) else precision.optim == optim
        rounds = precision.optim == "adamw_torch_8bit"
        assert precision.weights == torch.float32 or rounds
        size = (4 if precision.weights == torch.bfloat16 else 8) + (2 if rounds else 8)
        assert precision.bytes_per_parameter == pytest.approx(size, rel=0.02)  # blocks' scales
        assert ("quarter" in precision.reason) == (own.weights != precision.weights)


def test_processes_share_the_model(monkeypatch, refusal):
    """torchrun's processes have FSDP2 on GPUs, DDP on CPU, and no device map of their own."""
    assert process_defaults(False) == {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process_defaults(False) == {"use_cpu": True, "ddp_backend": "gloo"}
    assert "one process" in refusal("--device_map", "balanced")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert process_defaults(False)["fsdp"] and process_defaults(True)["use_cpu"]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "torchrun" in refusal()


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
    "eval_loss": f"{STEPS} 2 | --eval_strategy epoch | {STEPS} 1 --eval_delay 3",
    "checkpoints": "--save_strategy epoch | --save_strategy steps --save_steps 1 | "
    "--save_strategy steps --save_steps 1 --save_total_limit 0",
    "": "--gradient_checkpointing False | --activation_checkpointing False | --use_cpu True | "
    "--dataloader_num_workers 2 --per_device_eval_batch_size 1 "
    "--torch_empty_cache_steps 1 --remove_unused_columns False --label_names x --use_cache True",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", EFFECTS)
def test_each_flag_has_its_effect(what, untied_model_dir, train, tmp_path):
    """A flag that works changes what it is for; one that has no effect changes nothing."""
    for split, rows in (("train", 8), ("validation", 3)):
        lines = (ROOT / "data" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{split}.jsonl").write_text("".join(lines[:rows]))
    usual = "save_strategy no per_device_train_batch_size 2 gradient_accumulation_steps 1 "

    def run(flags: str) -> dict:
        words, folder = (usual + flags.replace("--", "")).split(), tmp_path / f"outputs{flags}"
        seen = train(untied_model_dir, tmp_path, folder, **dict(zip(words[::2], words[1::2])))
        logs, names = seen.trainer.state.log_history, ("loss", "learning_rate", "eval_loss")
        found = {name: [(log["step"], log[name]) for log in logs if name in log] for name in names}
        return found | {"checkpoints": sorted(path.name for path in folder.glob("checkpoint-*"))}

    before = run("--learning_rate 1e-2")
    for flags in EFFECTS[what].split(" | "):
        after = run(f"--learning_rate 1e-2 {flags}")
        assert after[what] != before[what] if what else after == before, flags
