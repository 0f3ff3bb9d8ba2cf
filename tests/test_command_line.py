"""The command line: each option has its effect or is refused, and each mistake is one line."""

import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
import transformers

from sft.command_line import check_schedule, drop_foreign_environment, parse
from sft.errors import UserError
from sft.option_hints import EXPLAINED, RENAMED
from sft_qwen2 import SFTArguments, make_training_arguments

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {field.name: field for field in dataclasses.fields(SFTArguments)}
TRAINER_FIELDS = [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
TYPES = typing.get_type_hints(SFTArguments)
NUMBERS = [name for name in FIELDS if TYPES[name] in (int, float, int | None, float | None)]
CHOICES = [name for name in FIELDS if FIELDS[name].metadata["choices"]]
TRUTHS = [name for name in FIELDS if TYPES[name] is bool]


def parse_words(*words) -> SFTArguments:
    return parse([str(word) for word in words], SFTArguments)


def refusal(capsys, *words) -> str:
    """Return the line by which a command line is refused, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        parse_words(*words)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.fixture
def write_arguments(tmp_path):
    """A function: an object, or the bytes of a file, to the path of a file of arguments."""

    def write(content, name="arguments.json") -> Path:
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        path.write_bytes(content)
        return path

    return write


# ---- Flags ---------------------------------------------------------------------------------------
def test_without_words_all_is_at_its_default():
    assert parse_words() == SFTArguments()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model_name_or_path", "models/mine", "models/mine"),
        ("system_prompt", "", ""),
        ("max_len", "512", 512),
        ("max_steps", "-1", -1),
        ("learning_rate", "1e-5", 1e-5),
        ("warmup_steps", "0.03", 0.03),
        ("warmup_steps", "20", 20),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
        ("data_seed", "0", 0),
        ("report_to", "none", ["none"]),
        ("optim", "adafactor", "adafactor"),
        ("export", "outputs/checkpoint-5", "outputs/checkpoint-5"),
    ],
)
def test_a_flag_sets_its_option(name, text, value):
    assert getattr(parse_words(f"--{name}", text), name) == value


def test_an_equals_sign_sets_an_option():
    assert parse_words("--system_prompt=--begins with dashes").system_prompt[:2] == "--"


def test_dashes_stand_for_underlines():
    assert parse_words("--max-len", 77).max_len == 77


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize(
    ("words", "value"),
    [([], True), (["true"], True), (["True"], True), (["false"], False), (["0"], False)],
)
def test_a_truth_needs_no_word(name, words, value):
    epochs = ["--eval_strategy=epoch", "--save_strategy=epoch"]
    assert getattr(parse_words(*epochs, f"--{name}", *words), name) is value


def test_several_paths_are_several_words():
    assert parse_words("--data_path", "a", "b, c", "--fp32").data_path == ["a", "b, c"]


def test_a_home_folder_is_expanded():
    home = os.path.expanduser("~")
    assert parse_words("--data_path=~/rows").data_path == [f"{home}/rows"]
    assert parse_words("--output_dir=~/out").output_dir == f"{home}/out"


def test_defaults_are_not_shared():
    parse_words().data_path.append("x")
    assert parse_words().data_path == ["data/"]


def test_whole_steps_are_whole_numbers():
    """Sentences print them, and "20.0 steps" would read badly."""
    assert repr(parse_words("--save_steps", "20").save_steps) == "20"


# ---- Numbers, choices, types ---------------------------------------------------------------------
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-2", "1e39", "", "1,5", "one", "None"])
def test_what_is_no_usable_number_is_refused(capsys, name, text):
    assert f"--{name}" in refusal(capsys, f"--{name}={text}", "--eval_strategy=steps")


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_limits(name):
    assert {"at_least", "above"} & set(FIELDS[name].metadata)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("adam_beta1", "1"),
        ("adam_beta2", "1"),
        ("adam_epsilon", "0"),
        ("validation_split", "1"),
        ("num_train_epochs", "0"),
        ("eval_steps", "0"),
        ("save_steps", "0"),
        ("logging_steps", "0"),
        ("warmup_steps", "-0.01"),
        ("learning_rate", "-1e-9"),
        ("max_len", "0"),
        ("max_len", "2147483648"),
        ("max_steps", "0"),
        ("tokens_per_forward", "0"),
        ("early_stopping_patience", "0"),
        ("per_device_train_batch_size", "0"),
        ("gradient_accumulation_steps", "0"),
        ("ddp_timeout", "0"),
        ("save_total_limit", "-1"),
        ("seed", "-1"),
        ("seed", "4294967296"),
        ("data_seed", "4294967296"),
        ("weight_decay", "-0.1"),
        ("max_grad_norm", "-1"),
        ("max_len", "1.0"),
        ("warmup_steps", "2.5"),
        ("logging_steps", "1.5"),
    ],
)
def test_a_number_outside_its_limits_is_refused(capsys, name, text):
    assert f"--{name} {text}: " in refusal(capsys, f"--{name}={text}", "--eval_strategy=steps")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("adam_beta1", "0"),
        ("adam_beta2", "0.9999"),
        ("adam_epsilon", "1e-30"),
        ("validation_split", "0"),
        ("validation_split", "0.999"),
        ("num_train_epochs", "0.001"),
        ("eval_steps", "0.001"),
        ("warmup_steps", "0"),
        ("learning_rate", "0"),
        ("max_len", "1"),
        ("max_len", "2147483647"),
        ("max_steps", "1"),
        ("tokens_per_forward", "1"),
        ("early_stopping_patience", "1"),
        ("save_total_limit", "0"),
        ("seed", "0"),
        ("seed", "4294967295"),
        ("data_seed", "4294967295"),
        ("max_grad_norm", "0"),
        ("logging_steps", "0.5"),
    ],
)
def test_the_ends_of_a_closed_interval_are_taken(name, text):
    args = parse_words(f"--{name}={text}", "--eval_strategy=steps")
    assert getattr(args, name) == float(text)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("text", ["best", "None", "", "Epoch"])
def test_another_choice_is_refused(capsys, name, text):
    choices = ", ".join(FIELDS[name].metadata["choices"])
    assert f"must be one of {choices}" in refusal(capsys, f"--{name}={text}")


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_can_be_taken(name):
    for choice in FIELDS[name].metadata["choices"]:
        assert getattr(parse_words(f"--{name}", choice), name) == choice


@pytest.mark.parametrize("kind", ["cosine_warmup_with_min_lr", "reduce_lr_on_plateau", "greedy"])
def test_schedules_that_do_not_work_here_are_refused(capsys, kind):
    assert "must be one of" in refusal(capsys, "--lr_scheduler_type", kind)


def test_a_truth_is_true_or_false(capsys):
    assert "--fp32 maybe: must be true or false" in refusal(capsys, "--fp32", "maybe")


@pytest.mark.parametrize("name", ["output_dir", "model_name_or_path", "data_path", "export"])
def test_a_path_is_not_empty(capsys, name):
    assert f"--{name} : is empty" in refusal(capsys, f"--{name}", "")


def test_a_text_that_is_not_utf8_is_refused(capsys):
    assert "is not UTF-8" in refusal(capsys, "--system_prompt", "\udcc4\udce3")


def test_a_flag_without_its_value_is_named(capsys):
    assert "--max_len needs a value" in refusal(capsys, "--max_len")


def test_a_flag_before_another_flag_is_named(capsys):
    assert "--output_dir needs a value" in refusal(capsys, "--output_dir", "--fp32")


def test_a_long_value_does_not_fill_the_screen(capsys):
    assert len(refusal(capsys, "--optim", "x" * 10_000)) < 300


def test_a_value_cannot_write_to_the_terminal(capsys):
    assert "\x1b" not in refusal(capsys, "--optim", "\x1b[31mred\nline")


@pytest.mark.parametrize("kwargs", ["{", "[1]", "2", '{"a": 1, "a": 2}', '{"min_lr": NaN}'])
def test_schedule_numbers_are_one_json_object(capsys, kwargs):
    assert "--lr_scheduler_kwargs" in refusal(capsys, "--lr_scheduler_kwargs", kwargs)


# ---- Names ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RENAMED)
def test_another_scripts_name_leads_to_ours(capsys, name):
    sentence = refusal(capsys, f"--{name}", "3")
    assert f"unknown option --{name}: it is --{RENAMED[name]}\n" in sentence


@pytest.mark.parametrize("name", EXPLAINED)
def test_what_is_not_offered_is_explained(capsys, name):
    assert f"unknown option --{name}: {EXPLAINED[name]}\n" in refusal(capsys, f"--{name}", "3")


def test_hints_are_for_names_that_are_no_options():
    assert not set(RENAMED) & set(FIELDS)
    assert not set(EXPLAINED) & set(FIELDS)
    assert set(RENAMED.values()) <= set(FIELDS)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr", "--learning_rate"),
        ("--epochs", "--num_train_epochs"),
        ("--batch_size", "--per_device_train_batch_size"),
        ("--grad_accum", "--gradient_accumulation_steps"),
        ("--seq_len", "--max_len"),
        ("--max_seq_length", "--max_len"),
        ("--bf16", "--fp32"),
        ("--fp16", "--fp32"),
        ("--deepspeed", "torchrun"),
        ("--fsdp", "torchrun"),
        ("--lora_r", "LLaMA-Factory"),
        ("--warmup_ratio", "--warmup_steps 0.03"),
        ("--device_map", "by memory"),
        ("--dataset", "--data_path"),
        ("--val_data", "--data_path"),
        ("--val_size", "--validation_split"),
        ("--config", "first word"),
        ("--model", "--model_name_or_path"),
        ("--eval_step", "--eval_steps"),
        ("--eval_every", "--eval_steps"),
        ("--evaluation_strategy", "--eval_strategy steps"),
        ("--no_cuda", "--use_cpu"),
        ("--packing", "nothing is padded"),
        ("--logging_dir", "TENSORBOARD_LOGGING_DIR"),
        ("--overwrite_output_dir", "--output_dir"),
        ("--resume_from_checkpoint", "--resume"),
        ("--push_to_hub", "hf upload"),
        ("--no_gradient_checkpointing", "--gradient_checkpointing false"),
        ("--learning_rat", "--learning_rate?"),
        ("--gradient-accumulation-stesp", "--gradient_accumulation_steps?"),
        ("--data_pat", "--data_path?"),
        ("-lr", "--learning_rate"),
        ("--batch-size", "--per_device_train_batch_size"),
        ("--lr=1e-4", "--learning_rate"),
        ("--frobnicate", "--help lists all"),
    ],
)
def test_a_mistyped_option_leads_to_the_right_one(capsys, typed, meant):
    sentence = refusal(capsys, typed, "3")
    assert f"unknown option {typed.split('=')[0]}: " in sentence
    assert meant in sentence


def test_all_mistyped_options_are_named_at_once(capsys):
    sentence = refusal(capsys, "--epochs", "3", "--max_len", "5", "--dataset", "x")
    assert "--epochs: it is --num_train_epochs" in sentence
    assert "--dataset: it is --data_path" in sentence


@pytest.mark.parametrize("name", sorted(set(TRAINER_FIELDS) - set(FIELDS)))
def test_trainers_other_options_are_refused_with_a_reason(capsys, name):
    """None of them is taken for an option of a similar name."""
    sentence = refusal(capsys, f"--{name}", "3")
    assert "leave it out" in sentence or "it is --" in sentence
    assert "is it --" not in sentence


@pytest.mark.parametrize("name", ["data/train.jsonl", "rows.csv", "rows.parquet", "data/"])
def test_bare_data_leads_to_data_path(capsys, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    assert f"rows are given as --data_path {name}\n" in refusal(capsys, name)


def test_bare_data_after_a_flag_leads_to_data_path(capsys):
    assert "--data_path x.jsonl\n" in refusal(capsys, "--max_len", 5, "x.jsonl")


def test_a_file_of_arguments_behind_a_flag_is_named(capsys):
    assert "x.json: the JSON file of arguments is the first" in refusal(
        capsys, "--max_len", 5, "x.json"
    )


def test_a_word_that_is_nothing_is_named(capsys):
    assert "nothing: belongs to no option" in refusal(capsys, "nothing")


# ---- The file of arguments -----------------------------------------------------------------------
def test_flags_win_over_the_file_and_the_file_over_defaults(write_arguments):
    file = write_arguments({"max_len": 100, "learning_rate": 2e-5})
    args = parse_words(file, "--max_len", 50)
    assert args == SFTArguments(max_len=50, learning_rate=2e-5)


def test_a_file_may_hold_every_option(write_arguments):
    values = dataclasses.asdict(SFTArguments())
    assert parse_words(write_arguments(values)) == SFTArguments()


def test_a_runs_record_is_a_file_of_arguments(write_arguments):
    args = parse_words("--max_len", 99, "--report_to", "none", "--data_path", "a", "b")
    record = {"arguments": dataclasses.asdict(args), "fingerprint": {"x": 1}}
    assert parse_words(write_arguments(record, "run.json")) == args


@pytest.mark.parametrize("name", ["resume", "dry_run", "export", "gpus"])
def test_a_record_does_not_say_what_to_do_now(write_arguments, name):
    record = {"arguments": {"max_len": 99, name: "anything"}}
    assert parse_words(write_arguments(record)) == SFTArguments(max_len=99)


@pytest.mark.parametrize("paths", ["a.jsonl", ["a.jsonl"]])
def test_data_path_is_a_text_or_a_list(write_arguments, paths):
    assert parse_words(write_arguments({"data_path": paths})).data_path == ["a.jsonl"]


def test_reporters_in_one_text_are_parted(capsys, write_arguments):
    file = write_arguments({"report_to": "none,none"})
    assert "names one twice" in refusal(capsys, file)


@pytest.mark.parametrize("name", FIELDS)
def test_null_is_not_given(write_arguments, name):
    assert parse_words(write_arguments({name: None})) == SFTArguments()


def test_a_whole_number_will_do_for_a_number(write_arguments):
    assert parse_words(write_arguments({"num_train_epochs": 3})).num_train_epochs == 3.0


def test_a_byte_order_mark_is_no_error(write_arguments):
    file = write_arguments('\ufeff{"max_len": 3}'.encode())
    assert parse_words(file).max_len == 3


def wrong_types() -> list[tuple]:
    """Return an option, and a value of JSON that has another type than the option's."""
    samples = {"text": "3", "number": 3, "truth": True, "list": [["x"]], "object": {"a": 1}}
    fitting = {str: "text", int: "number", float: "number", bool: "truth", dict: "object"}
    cases = []
    for name in FIELDS:
        kinds = [kind for kind in fitting if TYPES[name] in (kind, kind | None)]
        for sample, value in samples.items():
            is_list_of_text = not kinds and sample == "text"
            if not is_list_of_text and (not kinds or fitting[kinds[0]] != sample):
                cases.append((name, value))
    return cases


@pytest.mark.parametrize(("name", "value"), wrong_types())
def test_a_value_of_another_type_is_refused(capsys, write_arguments, name, value):
    sentence = refusal(capsys, write_arguments({name: value}))
    assert f'arguments.json: "{name}": ' in sentence
    assert "must be " in sentence


def test_a_fraction_is_no_whole_number(capsys, write_arguments):
    assert "must be a whole number" in refusal(capsys, write_arguments({"max_len": 3.5}))


def test_limits_hold_in_the_file_too(capsys, write_arguments):
    assert "must be a number at least 0" in refusal(capsys, write_arguments({"adam_beta1": 1}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "broken JSON at line 1"),
        (b'{"max_len": 1,\n}', "broken JSON at line 2"),
        (b"", "broken JSON"),
        (b'{"max_len": 1, "max_len": 2}', '"max_len" is there twice'),
        (b'{"learning_rate": NaN}', "NaN is no number"),
        (b'{"learning_rate": Infinity}', "Infinity is no number"),
        (b'{"learning_rate": 1e999}', "must be at most"),
        (b'{"max_len": 1' + b"0" * 400 + b"}", "must be at most"),
        (b'{"max_len": 1' + b"0" * 5000 + b"}", "broken JSON"),
        (b'{"system_prompt": "a\\u0000b"}', "has a NUL"),
        (b'{"system_prompt": "\\ud800"}', "is not UTF-8"),
        ('{"system_prompt": "你"}'.encode("gbk"), "is not UTF-8"),
        (b"[" * 100_000, "broken JSON"),
        (b"[]", "is no JSON object of arguments"),
        (b"3", "is no JSON object of arguments"),
        (b'[{"query": "a", "answer": "b"}]', "--data_path"),
        (b'{"query": "a", "answer": "b"}', "--data_path"),
        (b'{"query": "a", "answer": "b"}\n{"query": "a", "answer": "b"}', "--data_path"),
        (b'{"data_path": []}', "is empty"),
        (b'{"data_path": [""]}', "is empty"),
        (b'{"output_dir": ""}', "is empty"),
        (b'{"lr": 1}', 'unknown option "lr": it is --learning_rate'),
        (b'{"arguments": [1]}', '"arguments" is no JSON object'),
        (b'{"arguments": {"lr": 1}}', 'unknown option "lr": it is --learning_rate'),
    ],
)
def test_a_wrong_file_of_arguments_is_one_line(capsys, write_arguments, content, reason):
    sentence = refusal(capsys, write_arguments(content))
    assert "arguments.json: " in sentence
    assert reason in sentence


def test_a_file_of_arguments_that_is_not_there_is_named(capsys):
    assert "missing.json: cannot be read: No such file" in refusal(capsys, "missing.json")


def test_a_folder_is_no_file_of_arguments(capsys, tmp_path):
    (tmp_path / "x.json").mkdir()
    assert "x.json: cannot be read: Is a directory" in refusal(capsys, tmp_path / "x.json")


def test_the_projects_own_file_of_arguments_is_right():
    assert parse_words(ROOT / "configs" / "tiny.json").max_len == 2048


def test_another_program_takes_the_flags_that_it_needs(capsys, write_arguments):
    """token_stats.py reads the same file by the same rules, and few flags."""
    file = str(write_arguments({"learning_rate": 2e-5, "max_len": 100}))
    only = ["data_path", "max_len"]
    args = parse([file, "--data_path", "a"], SFTArguments, only)
    assert (args.data_path, args.max_len, args.learning_rate) == (["a"], 100, 2e-5)
    with pytest.raises(SystemExit):
        parse([file, "--learning-rate", "1"], SFTArguments, only)
    assert "--learning_rate: leave it out here" in capsys.readouterr().err


# ---- Options that go together --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "idle", "cause"),
    [
        ("--gpus 4x80", "--gpus 4x80", "add --dry_run"),
        ("--eval_steps 20", "--eval_steps 20", "--eval_strategy no; add --eval_strategy steps"),
        ("--eval_steps 20 --eval_strategy epoch", "--eval_steps 20", "--eval_strategy epoch"),
        ("--save_steps 20 --save_strategy no", "--save_steps 20", "--save_strategy no"),
        ("--save_steps 20 --save_strategy epoch", "--save_steps 20", "--save_strategy epoch"),
        ("--save_steps 5 --save_strategy epoch", "--save_steps 5", "--save_strategy epoch"),
        ("--save_total_limit 3 --save_strategy no", "--save_total_limit 3", "--save_strategy no"),
        ("--warmup_steps 9 --lr_scheduler_type constant", "--warmup_steps 9", "with_warmup"),
        (
            '--lr_scheduler_kwargs {"a":1} --lr_scheduler_type constant',
            "--lr_scheduler_kwargs",
            "--lr_scheduler_type constant",
        ),
        (
            '--lr_scheduler_kwargs {"a":1} --lr_scheduler_type constant_with_warmup',
            "--lr_scheduler_kwargs",
            "--lr_scheduler_type constant_with_warmup",
        ),
        ("--adam_beta1 0.8 --optim adafactor", "--adam_beta1 0.8", "--optim adafactor"),
        ("--adam_beta2 0.8 --optim adafactor", "--adam_beta2 0.8", "--optim adafactor"),
        ("--adam_epsilon 0.1 --optim adafactor", "--adam_epsilon 0.1", "--optim adafactor"),
        ("--num_train_epochs 2 --max_steps 3", "--num_train_epochs 2", "--max_steps 3"),
    ],
)
def test_a_flag_without_effect_is_refused(capsys, words, idle, cause):
    sentence = refusal(capsys, *words.split())
    assert idle in sentence
    assert "has no effect with" in sentence
    assert cause in sentence


def test_an_option_of_the_file_that_a_flag_makes_idle_is_named(capsys, write_arguments):
    file = write_arguments({"save_steps": 100})
    args = parse_words(file, "--save_strategy", "no")
    note = "arguments.json: save_steps has no effect with --save_strategy no"
    assert note in capsys.readouterr().err
    assert args.save_strategy == "no"


def test_nothing_is_said_where_all_has_its_effect(capsys):
    parse_words(ROOT / "configs" / "tiny.json", "--eval_strategy", "steps", "--eval_steps", 20)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("", "--eval_strategy epoch --save_strategy epoch"),
        ("--eval_strategy epoch", "--save_strategy epoch"),
        ("--eval_strategy epoch --save_strategy no", "--save_strategy epoch"),
        ("--eval_strategy steps --eval_steps 20", "--save_steps 20"),
        ("--eval_strategy steps --eval_steps 0.2", "--save_steps 0.2"),
        ("--eval_strategy steps --eval_steps 0.1 --save_steps 0.2", "--save_steps 0.1"),
        ("--eval_strategy steps --logging_steps 3", "--save_steps 3"),
        (
            "--eval_strategy steps --eval_steps 20 --save_strategy epoch",
            "--save_strategy steps --save_steps 20",
        ),
    ],
)
def test_the_best_needs_a_checkpoint_of_each_evaluation(capsys, words, remedy):
    """The refusal ends with flags to copy, and with them the command line is right."""
    given = ["--load_best_model_at_end", *words.split()]
    sentence = refusal(capsys, *given)
    assert sentence.endswith(f"add {remedy}\n")
    args = parse_words(*given, *remedy.split(), "--report_to", "none")
    assert make_training_arguments(args).load_best_model_at_end


@pytest.mark.parametrize(
    "words",
    [
        "--eval_strategy epoch --save_strategy epoch",
        "--eval_strategy steps --eval_steps 5",
        "--eval_strategy steps --eval_steps 5 --save_steps 10",
        "--eval_strategy steps --eval_steps 0.3 --save_steps 0.3",
        "--eval_strategy steps",
    ],
)
def test_the_best_is_kept_where_checkpoints_and_evaluations_meet(words):
    args = parse_words("--load_best_model_at_end", *words.split(), "--report_to", "none")
    training_args = make_training_arguments(args)
    assert training_args.metric_for_best_model == "eval_loss"
    assert training_args.greater_is_better is False


def test_early_stopping_needs_evaluations(capsys):
    assert "--eval_strategy epoch" in refusal(capsys, "--early_stopping_patience", 3)


@pytest.mark.parametrize(
    "gpus", ["1x80", "4x80", "2x80,1x40", "4x32:fp16", "4x16:bf16", "256x80", "128x80,128x40:fp16"]
)
def test_gpus_to_plan_for(gpus):
    assert parse_words("--dry_run", "--gpus", gpus).gpus == gpus


@pytest.mark.parametrize(
    "gpus",
    [
        "",
        "80",
        "4x",
        "x80",
        "0x80",
        "4x0",
        "4X80",
        "4x80,",
        "4x-80",
        "4 x 80",
        "1x23.7",
        "4x80:fp32",
        "4x80:fp16,1x40",
        "257x80",
        "200x80,57x40",
        "٤x80",
        "4x80\n",
    ],
)
def test_other_gpus_are_refused(capsys, gpus):
    assert "must read like 4x80" in refusal(capsys, "--dry_run", f"--gpus={gpus}")


# ---- Reporters -----------------------------------------------------------------------------------
def test_reporters_are_parted_by_commas(monkeypatch):
    available = "transformers.integrations.get_available_reporting_integrations"
    monkeypatch.setattr(available, lambda: ["wandb", "tensorboard"])
    both = ["wandb", "tensorboard"]
    assert parse_words("--report_to", "wandb,tensorboard").report_to == both
    assert parse_words("--report_to", "wandb", "tensorboard").report_to == both


@pytest.mark.parametrize("reporter", ["tensorbord", "all", "Wandb", ""])
def test_an_unknown_reporter_is_refused(capsys, reporter):
    assert f"--report_to {reporter}: unknown" in refusal(capsys, "--report_to", reporter)


def test_none_stands_alone(capsys):
    assert "none stands alone" in refusal(capsys, "--report_to", "wandb,none")


# ---- Processes, help -----------------------------------------------------------------------------
def test_one_process_of_a_machine_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse_words("--lr", 1)
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.fixture
def help_text(capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_words("--help")
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", FIELDS)
def test_help_has_each_option_with_its_default_and_a_sentence(help_text, name):
    default = getattr(SFTArguments(), name)
    words = default
    if isinstance(default, bool) or default == {}:
        words = json.dumps(default)
    if isinstance(default, list):
        words = default[0]
    if default is None:
        words = "(none)"
    if isinstance(default, float) and default == int(default):
        words = int(default)
    assert f"\n  --{name} {words}\n      " in help_text
    text = " ".join(help_text.split())
    assert FIELDS[name].metadata["help"] in text
    assert FIELDS[name].metadata["help"].endswith(".")


@pytest.mark.parametrize("name", CHOICES)
def test_help_has_all_choices(help_text, name):
    choices = ", ".join(FIELDS[name].metadata["choices"])
    assert f"One of: {choices}." in " ".join(help_text.split())


def test_help_fits_the_screen(help_text):
    """No line is longer than 80 columns, and no section than a screen of 24 lines."""
    sections = help_text.split("\n\n")
    assert len(sections) > 5
    assert max(len(line) for line in help_text.splitlines()) <= 80
    assert max(len(section.splitlines()) for section in sections) <= 24


# ---- The environment -----------------------------------------------------------------------------
FOREIGN = {
    "ACCELERATE_MIXED_PRECISION": "fp8",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7",
    "FSDP_VERSION": "1",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_variable_is_dropped_and_named(capsys, monkeypatch, name):
    monkeypatch.setenv(name, FOREIGN[name])
    assert drop_foreign_environment() == [name]
    assert name not in os.environ
    assert capsys.readouterr().err == f"note: ignored in the environment: {name}\n"


def test_what_torchrun_sets_stays(capsys, monkeypatch):
    own = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"]
    for name in own:
        monkeypatch.setenv(name, "0")
    assert drop_foreign_environment() == []
    assert set(own) <= set(os.environ)
    assert capsys.readouterr().err == ""


def describe_trainer(output_dir) -> dict:
    """Return what the environment could have decided of a Trainer."""
    args = parse_words("--report_to", "none", "--output_dir", output_dir)
    training_args = make_training_arguments(args)
    trainer = transformers.Trainer(torch.nn.Linear(2, 2), training_args)
    accelerator = trainer.accelerator
    return {
        "device": str(training_args.device),
        "training precision": training_args.mixed_precision,
        "precision": accelerator.mixed_precision,
        "autocast": accelerator.native_amp,
        "compiler": str(accelerator.state.dynamo_plugin.backend),
        "processes": str(accelerator.distributed_type),
        "shards": trainer.is_fsdp_enabled,
        "deepspeed": training_args.deepspeed_plugin,
        "accumulation": accelerator.gradient_accumulation_steps,
    }


def test_the_environment_decides_nothing(monkeypatch, tmp_path):
    usual = describe_trainer(tmp_path)
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    drop_foreign_environment()
    assert describe_trainer(tmp_path) == usual


# ---- TrainingArguments ---------------------------------------------------------------------------
def test_training_arguments_have_the_options_of_their_names(tmp_path):
    words = "--max_steps 3 --learning_rate 2e-4 --lr_scheduler_type linear --warmup_steps 2"
    words += " --weight_decay 0.5 --max_grad_norm 0.7 --adam_beta1 0.1 --adam_beta2 0.2"
    words += " --adam_epsilon 0.3 --seed 7 --data_seed 8 --eval_strategy steps --eval_steps 4"
    words += " --save_strategy steps --save_steps 8 --save_total_limit 9 --logging_steps 10"
    words += " --run_name mine --ddp_timeout 11 --per_device_train_batch_size 12"
    words += " --gradient_accumulation_steps 13 --report_to none"
    args = parse_words("--output_dir", tmp_path, *words.split())
    training_args = make_training_arguments(args)
    shared = set(FIELDS) & set(TRAINER_FIELDS) - {"optim", "report_to"}
    assert len(shared) > 25
    expected = {name: getattr(args, name) for name in shared}
    assert {name: getattr(training_args, name) for name in shared} == expected
    assert training_args.report_to == []


@pytest.mark.parametrize("value", [True, False])
def test_gradient_checkpointing_is_passed_on(tmp_path, value):
    args = SFTArguments(output_dir=str(tmp_path), gradient_checkpointing=value)
    assert make_training_arguments(args).gradient_checkpointing is value


def test_schedule_numbers_are_passed_on(tmp_path):
    kwargs = {"num_cycles": 0.4}
    args = SFTArguments(output_dir=str(tmp_path), lr_scheduler_kwargs=kwargs)
    assert make_training_arguments(args).lr_scheduler_kwargs == kwargs


def test_a_loss_that_is_nan_is_seen(tmp_path):
    args = SFTArguments(output_dir=str(tmp_path))
    assert make_training_arguments(args).logging_nan_inf_filter is False


@pytest.mark.parametrize("patience", [None, 3])
def test_early_stopping_counts_on_after_a_resume(tmp_path, patience):
    args = SFTArguments(
        output_dir=str(tmp_path), eval_strategy="epoch", early_stopping_patience=patience
    )
    training_args = make_training_arguments(args)
    assert training_args.restore_callback_states_from_checkpoint is (patience is not None)


def test_processes_on_gpus_share_the_model(monkeypatch):
    import sft_qwen2

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = sft_qwen2.settings_of_processes(SFTArguments())
    assert settings["fsdp"] is True
    assert settings["fsdp_config"]["state_dict_type"] == "SHARDED_STATE_DICT"
    assert settings["fsdp_config"]["cpu_ram_efficient_loading"] is True


def test_apples_gpus_are_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    args = SFTArguments(output_dir=str(tmp_path))
    assert make_training_arguments(args).use_cpu is True


PROCESS = """
import sys, torch
from sft.command_line import parse
from sft_qwen2 import SFTArguments, make_training_arguments
training_args = make_training_arguments(parse(sys.argv[1:], SFTArguments))
timeout = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout
line = f"{training_args.world_size} {training_args.device.type} {timeout.seconds}\\n"
sys.stdout.write(line)  # at once: two processes write to this pipe
sys.stdout.flush()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_on_the_cpu_meet_and_have_the_timeout(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    command += ["--ddp_timeout", "77", "--report_to", "none", "--output_dir", str(tmp_path)]
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths).strip(os.pathsep)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("2 cpu 77") == 2


# ---- The schedule --------------------------------------------------------------------------------
def schedule_error(kind: str, num_steps: int = 100, learning_rate: float = 1e-5, **options) -> str:
    """Return the sentence by which a schedule is refused; nothing where it is taken."""
    args = SFTArguments(
        lr_scheduler_type=kind, learning_rate=learning_rate, report_to=["none"], **options
    )
    try:
        check_schedule(make_training_arguments(args), num_steps)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"num_cycles": 2}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"power": 2, "lr_end": 1e-8}),
        ("cosine_with_min_lr", {"min_lr": 1e-6}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("inverse_sqrt", {}),
        ("warmup_stable_decay", {"num_decay_steps": 10}),
        ("warmup_stable_decay", {"num_decay_steps": 10, "num_stable_steps": 50}),
    ],
)
@pytest.mark.parametrize("warmup_steps", [0, 0.03, 1, 20])
def test_schedules_that_work_are_taken(kind, kwargs, warmup_steps):
    options = {"lr_scheduler_kwargs": kwargs, "warmup_steps": warmup_steps}
    assert schedule_error(kind, 100, **options) == ""


def test_every_schedule_that_can_be_chosen_is_tried_here():
    mark = test_schedules_that_work_are_taken.pytestmark[1]
    tried = {kind for kind, kwargs in mark.args[1]}
    assert tried == set(FIELDS["lr_scheduler_type"].metadata["choices"])


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "inverse_sqrt"])
@pytest.mark.parametrize("warmup_steps", [0, 0.03, 500])
def test_a_run_of_few_steps_has_a_schedule(kind, num_steps, warmup_steps):
    assert schedule_error(kind, num_steps, warmup_steps=warmup_steps) == ""


def test_a_rate_of_zero_is_a_rate():
    assert schedule_error("cosine", learning_rate=0.0) == ""


@pytest.mark.parametrize(
    ("kind", "kwargs", "reason"),
    [
        ("polynomial", {"lr_end": 1e-3}, "smaller than initial lr"),
        ("polynomial", {"power": -1}, "at step 4: "),
        ("polynomial", {"lr_end": -1.0}, "it is -"),
        ("polynomial", {"power": "two"}, "unsupported operand"),
        ("cosine", {"num_cycles": 1e308}, "math domain error"),
        ("cosine", {"cycles": 1}, "unexpected keyword"),
        ("linear", {"last_epoch": 3}, "initial_lr"),
        ("cosine_with_min_lr", {}, "min_lr"),
        ("cosine_with_min_lr", {"min_lr": 1e-3}, "above --learning_rate 1e-05"),
        ("inverse_sqrt", {"timescale": -5}, "above --learning_rate 1e-05"),
        ("inverse_sqrt", {"timescale": 0}, "division by zero"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "x"}, "Unknown decay type"),
        ("warmup_stable_decay", {"num_decay_steps": 9, "min_lr_ratio": -1}, "it is -"),
    ],
)
def test_a_schedule_without_a_rate_at_each_step_is_refused(kind, kwargs, reason):
    """A library would raise later, some in the middle of the run, or give a rate that ruins it."""
    sentence = schedule_error(kind, lr_scheduler_kwargs=kwargs)
    assert f"--lr_scheduler_type {kind} --lr_scheduler_kwargs" in sentence
    assert reason in sentence


def test_a_polynomial_schedule_needs_more_than_its_last_rate():
    """Its default last rate is 1e-7."""
    assert "smaller than initial lr" in schedule_error("polynomial", learning_rate=1e-8)


@pytest.mark.parametrize("num_steps", [100, 5_000_000])
def test_a_schedule_is_checked_to_its_end(num_steps):
    """With this power the rate falls until the last step, where it would be infinite."""
    kwargs = {"power": -1e-6, "lr_end": 9.99e-6}
    sentence = schedule_error("polynomial", num_steps, warmup_steps=0, lr_scheduler_kwargs=kwargs)
    assert f"no learning rate at step {num_steps}: " in sentence


def test_a_schedule_may_end_where_it_has_no_more_rates():
    """A power of 0.5 of what is left is complex behind the end. Training does not go there."""
    assert schedule_error("polynomial", 1000, lr_scheduler_kwargs={"power": 0.5}) == ""
