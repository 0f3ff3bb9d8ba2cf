"""Arguments: every flag has its effect, is refused with a reason, or is said to have none."""

import dataclasses
import json

import pytest
import torch
import transformers

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
    """Return a value of the field that is not its default, as a text that argparse can read."""
    choices = {"train_sampling_strategy": "sequential", "hub_strategy": "end"}
    choices["dataloader_multiprocessing_context"] = "spawn"
    if "bool" in str(THEIRS[name].type):
        default = sft_qwen2.TRAINING_DEFAULTS.get(name, THEIRS[name].default)
        return str(default is not True)
    return choices.get(name, "7" if is_number(THEIRS[name]) else "x")


# ---- The tables ---------------------------------------------------------------------------------
def test_every_field_stands_in_one_table():
    """Each field of the installed TrainingArguments works, is refused, or is harmless: just one."""
    names = [name for table in ("works", "refused", "harmless") for name in FLAGS[table]]
    assert len(names) == len(set(names))
    assert set(names) - NEWER <= set(THEIRS) <= set(names)
    assert {name for name in ACCEPTED if is_number(ACCEPTED[name])} == set(FLAGS["range"])
    assert set(FLAGS["choice"]) | set(FLAGS["useless"]) <= set(ACCEPTED)
    assert not set(FLAGS["hint"]) & (set(OWN) | set(THEIRS))


@pytest.mark.parametrize("name", sorted(set(FLAGS["refused"]) & set(THEIRS)))
def test_what_would_not_work_is_refused(name, refusal):
    """A refused field, set to something else than its default, ends with its reason."""
    assert f"--{name}: {FLAGS['refused'][name]}" in refusal(f"--{name}", other_value(name))


@pytest.mark.parametrize("name", sorted(FLAGS["harmless"]))
def test_what_has_no_effect_is_named(name, capsys):
    """A harmless field is accepted, and one line says that it has no effect, and why."""
    workers = ["--dataloader_num_workers", 2] if "prefetch" in name else []  # as Trainer asks for
    parse(f"--{name}", other_value(name), *workers)
    assert f"--{name} has no effect: {FLAGS['harmless'][name]}\n" in capsys.readouterr().out


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


# ---- What is read -------------------------------------------------------------------------------
def test_defaults_are_the_walk_throughs():
    """Without arguments the run is the one the documentation walks through."""
    args, training_args = parse()
    assert (args.model_name_or_path, args.max_len) == ("Qwen/Qwen2-7B-Instruct", 8192)
    assert (args.overflow_strategy, training_args.output_dir) == ("truncate", "./outputs")
    rows = (training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps)
    assert (rows, training_args.num_train_epochs) == ((4, 32), 1)
    schedule = (training_args.learning_rate, training_args.lr_scheduler_type)
    assert (*schedule, training_args.warmup_steps) == (1e-5, "cosine", 0.03)
    assert (training_args.weight_decay, training_args.max_grad_norm) == (0.003, 1)
    steps = (training_args.logging_steps, training_args.save_steps, training_args.save_total_limit)
    assert (steps, training_args.report_to) == ((1, 5, 2), ["wandb"])


def test_flags_stand_above_the_file(tmp_path):
    """Arguments come from a JSON file, and a flag overrides the file's value of that name."""
    path = tmp_path / "run.json"
    values = {"learning_rate": 2e-5, "max_len": 100, "gradient_checkpointing": False}
    values |= {"system_prompt": "--own \"'\n", "report_to": ["wandb"], "warmup_steps": 7}
    values |= {"tokens_per_forward": None, "lr_scheduler_kwargs": {"num_cycles": 0.4}}
    path.write_text(json.dumps(values))
    args, training_args = parse(path, "--max_len", 50, "--per_device_train_batch_size", 2)
    assert (args.max_len, training_args.per_device_train_batch_size) == (50, 2)
    assert (args.system_prompt, args.tokens_per_forward) == (values["system_prompt"], None)
    assert training_args.learning_rate == 2e-5 and training_args.warmup_steps == 7
    assert training_args.gradient_checkpointing is False and training_args.save_steps == 5
    assert training_args.report_to == ["wandb"]
    assert training_args.lr_scheduler_kwargs == {"num_cycles": 0.4}


FILES = {  # of arguments, and the word that must be in their refusal
    "{": "broken JSON",
    "": "broken JSON",
    '["--max_len"]': "object",
    '{"max_len": 1, "max_len": 2}': "twice",
    '{"max_length": 1}': "--max_length",
    '{"max_length": null}': "--max_length",
    '{"save_total_limit": null}': "save_total_limit",
    '{"max_len": "long"}': "max_len",
    '{"max_len": [1]}': "max_len",
    '{"max_len": true}': "max_len",
    '{"learning_rate": NaN}': "--learning_rate",
    '{"overflow_strategy": true}': "overflow_strategy",
}


@pytest.mark.parametrize("text", FILES)
def test_a_wrong_file_of_arguments_is_one_line(text, refusal, tmp_path):
    """A file of arguments that is broken or holds a wrong one is answered as a wrong flag is."""
    (tmp_path / "run.json").write_text(text)
    assert FILES[text] in refusal(tmp_path / "run.json")


BAD_NUMBERS = ("nan", "inf", "-inf", "-1e-9", "1e39", "-2", "", "1,5", "one")
BAD_CHOICES = ("never", "best", "None", "0.5")


def test_wrong_values_are_refused(refusal):
    """Each wrong value of each number and choice is one sentence that names its flag."""
    cases = [(n, bad) for n in ACCEPTED if is_number(ACCEPTED[n]) for bad in BAD_NUMBERS]
    choices = [*FLAGS["choice"], "overflow_strategy", "eval_strategy", "logging_strategy"]
    choices += ["lr_scheduler_type", "log_level", "device_map", "fp32", "resume", "use_cpu"]
    cases += [(name, bad) for name in choices for bad in BAD_CHOICES]
    for name, bad in cases:
        assert name in refusal(f"--{name}={bad}", "--dry_run")
    assert len(cases) > 201


WRONG = {  # flags, and what must be in their refusal
    "--learning_rat 1": "is it --learning_rate?",
    "--max_l 1": "--max_l:",
    "data": "argument data",
    "missing.json": "missing.json",
    "--max_len": "max_len",
    "--warmup_ratio 0.03": "--warmup_steps 0.03",
    "--evaluation_strategy steps": "--eval_strategy steps",
    "--no_cuda": "--use_cpu",
    "--bf16": "--fp32",
    "--deepspeed ds.json": "torchrun",
    "--resume_from_checkpoint True": "--resume",
    "--max_steps 0": "--max_steps",
    "--seed 4294967296": "--seed",
    "--adam_beta2 1": "[0, 1)",
    "--warmup_steps 2.5": "whole",
    "--optim sgd": "adamw_torch_fused",
    "--optim lion": "adamw_torch_fused",
    "--report_to tensorbord": "tensorbord",
    "--report_to wandb,none": "none",
    "--eval_steps 20": "--eval_strategy no",
    "--early_stopping_patience 2": "--eval_strategy no",
    "--load_best_model_at_end": "--eval_strategy no",
    "--load_best_model_at_end --eval_strategy epoch": "save and eval strategy to match",
    "--lr_scheduler_type constant --warmup_steps 9": "--lr_scheduler_type constant",
    "--lr_scheduler_type cosine_with_min_lr": "min_lr_rate",
    '--lr_scheduler_kwargs {"min_lr":0.1}': "--lr_scheduler_kwargs",
    "--lr_scheduler_kwargs {x": "--lr_scheduler_kwargs",
    "--optim adafactor --adam_beta1 0.8": "--optim adafactor",
    '--device_map {"model":"disk"}': "--device_map",
    "--device_map {model:0}": "--device_map",
    "--gpus 4x80": "--dry_run False",
    "--dry_run --gpus 80": "NUMBERxGIB",
    "--dry_run --gpus 1000x80": "256",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_flag_is_one_line(flags, refusal):
    """A wrong argument ends with exit code 2 and one line that leads out."""
    assert WRONG[flags] in refusal(*flags.split())


# ---- What follows from flags --------------------------------------------------------------------
def test_patience_needs_a_best_and_outlives_a_resume():
    _, training_args = parse("--early_stopping_patience", 2, "--eval_strategy", "epoch")
    assert (
        training_args.metric_for_best_model == "eval_loss" and not training_args.greater_is_better
    )
    assert training_args.restore_callback_states_from_checkpoint


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("capability", [(8, 0), (7, 0), None])
@pytest.mark.parametrize("optim", [None, *FLAGS["choice"]["optim"].split()])
def test_only_stochastic_rounding_has_bf16_weights(optim, capability, fp32):
    """--optim is taken as it is given, also where it is Trainer's default, over fp32 weights."""
    chosen = parse("--optim", optim)[0].chosen_optim if optim else parse()[0].chosen_optim
    own = choose_precision(capability, 1, fp32)
    precision = with_optim(own, chosen)
    assert precision == own if optim in (None, own.optim) else precision.optim == optim
    rounds = precision.optim == "adamw_torch_8bit"
    assert precision.weights == torch.float32 or rounds
    size = (4 if precision.weights == torch.bfloat16 else 8) + (2.0625 if rounds else 8)
    assert precision.bytes_per_parameter == pytest.approx(size, abs=0.04)  # of blocks' scales
    assert ("quarter" in precision.reason) == (own.weights != precision.weights)


def test_processes_share_the_model(monkeypatch, refusal):
    """torchrun's processes have FSDP2 on GPUs, and no device map of their own."""
    assert process_defaults(False) == {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process_defaults(False) == {"use_cpu": True, "ddp_backend": "gloo"}
    assert "one process" in refusal("--device_map", "balanced")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert process_defaults(False)["fsdp"] and process_defaults(True)["use_cpu"]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "torchrun" in refusal()
