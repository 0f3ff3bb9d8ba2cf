"""token_stats.py: what it counts is what the trainer trains, to the token."""

import contextlib
import io
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from runs import ROOT, TINY

import sft_qwen2
import token_stats
from sft.command_line import parse

GOOD = {"query": "q", "answer": "a"}
NO_ANSWER = {"query": "q"}
SYSTEM = "You are a helpful assistant."


def run(*words, model=TINY) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of token_stats.main."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = token_stats.main([*map(str, words), "--model_name_or_path", str(model)])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def measure(*words, model=TINY) -> dict:
    """Return the figures that --json gives of data without a mistake."""
    code, out, err = run(*words, "--json", model=model)
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def make_row(tiny_tokenizer):
    """A function: numbers of tokens to a row with a prompt and an answer of so many.

    The <|im_end|> after the answer is a token of the answer. Each digit is a token.
    """
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
    ]
    labels = sft_qwen2.encode(messages, tiny_tokenizer)["labels"]
    overhead = len(labels) - 1

    def make_row(prompt_tokens: int, answer_tokens: int) -> dict:
        question = "1" * (prompt_tokens - overhead)
        return {"system": SYSTEM, "query": question, "answer": "2" * (answer_tokens - 1)}

    return make_row


@pytest.fixture(scope="module")
def measure_rows(make_row, write_rows):
    """A function: (prompt tokens, answer tokens) of rows to the figures; `arguments` of a file."""

    def measure_rows(*sizes, **arguments) -> dict:
        path = write_rows([make_row(*size) for size in sizes])
        file = write_arguments(path.with_name("run.json"), arguments)
        return measure(file, "--data_path", path)

    return measure_rows


@pytest.fixture(scope="module")
def stats_of_data() -> dict:
    """The figures of data/."""
    return measure("--data_path", ROOT / "data")


def write_arguments(path: Path, arguments: dict) -> Path:
    path.write_text(json.dumps(arguments), encoding="utf-8")
    return path


def at(stats: dict, max_len: int) -> dict:
    (found,) = [candidate for candidate in stats["max_lens"] if candidate["max_len"] == max_len]
    return found


# ---- Counts -------------------------------------------------------------------------------------
def test_prompt_and_answer_are_counted_apart(measure_rows):
    tokens = measure_rows((60, 7), (70, 9))["tokens"]
    assert (tokens["prompt"]["min"], tokens["prompt"]["max"]) == (60, 70)
    assert (tokens["answer"]["min"], tokens["answer"]["max"]) == (7, 9)
    assert (tokens["total"]["min"], tokens["total"]["max"]) == (67, 79)


def test_mean_and_percentiles_are_those_of_the_rows(measure_rows):
    """A percentile is a length that a row has: of two, the longer one."""
    sizes = [(100, answer_tokens) for answer_tokens in range(2, 102)]
    answer = measure_rows(*sizes)["tokens"]["answer"]
    assert answer["mean"] == 51.5
    assert answer["p50"] == 52
    assert answer["p90"] == 92
    assert answer["p99"] == 101


def test_a_longest_row_of_exactly_512_tokens_needs_max_len_512(measure_rows):
    stats = measure_rows((500, 12), (60, 9))
    assert [candidate["max_len"] for candidate in stats["max_lens"]] == [512]
    assert stats["suggestion"]["max_len"] == 512


def test_a_row_of_513_tokens_needs_the_next_max_len(measure_rows):
    stats = measure_rows((500, 13), (60, 9))
    assert [candidate["max_len"] for candidate in stats["max_lens"]] == [512, 1024]
    assert stats["suggestion"]["max_len"] == 1024


@pytest.fixture(scope="module")
def candidate_512(measure_rows) -> dict:
    """What max_len 512 costs five rows at its edge."""
    rows = [(500, 12), (500, 13), (512, 10), (511, 10), (60, 5)]
    return at(measure_rows(*rows), 512)


def test_a_row_of_exactly_max_len_tokens_is_not_over(candidate_512):
    assert candidate_512["num_over"] == 3


def test_an_answer_that_begins_at_max_len_is_lost(candidate_512):
    assert candidate_512["num_lost"] == 1


def test_an_answer_that_begins_before_max_len_is_cut(candidate_512):
    assert candidate_512["num_cut"] == 2


def test_answer_tokens_behind_max_len_are_lost(candidate_512):
    assert candidate_512["lost_token_share"] == (1 + 10 + 9) / (12 + 13 + 10 + 10 + 5)


def test_costs_are_what_the_trainer_counts(measure_rows, write_rows, make_row, tiny_tokenizer):
    """The trainer prints rows and answer tokens that are trained, cut and dropped."""
    from sft.examples import select_examples

    sizes = [(57 * n % 700 + 60, 31 * n % 650 + 2) for n in range(1, 90)]
    stats = measure_rows(*sizes, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    paths = [write_rows([make_row(*size) for size in sizes])]
    args = sft_qwen2.SFTArguments(model_name_or_path=str(TINY))
    encoded = sft_qwen2.encode_files(paths, tiny_tokenizer, args)
    assert len(stats["max_lens"]) == 3
    for candidate in stats["max_lens"]:
        counts = select_examples(encoded, paths, candidate["max_len"], "truncate", False).counts
        lost_tokens = counts.cut_tokens + counts.dropped_tokens
        assert candidate["num_cut"] == counts.num_cut
        assert candidate["num_lost"] == counts.num_dropped
        assert candidate["num_over"] == counts.num_cut + counts.num_dropped
        assert candidate["lost_token_share"] == lost_tokens / counts.answer_tokens
        assert candidate["steps_per_epoch"] == -(-counts.num_trained // 8)


# ---- Steps --------------------------------------------------------------------------------------
STEP_OF_FOUR = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def test_micro_batches_have_at_most_batch_size_times_max_len_tokens(measure_rows):
    sizes = [(391, 9)] * 12  # 2 x 512 tokens hold two rows of 400
    assert at(measure_rows(*sizes, **STEP_OF_FOUR), 512)["micro_batches_per_step"] == 2


def test_micro_batches_have_at_most_tokens_per_forward_tokens(measure_rows):
    sizes = [(391, 9)] * 12
    stats = measure_rows(*sizes, **STEP_OF_FOUR, tokens_per_forward=400)
    assert at(stats, 512)["micro_batches_per_step"] == 4


def test_micro_batches_are_those_of_a_typical_step(measure_rows):
    """One row of ten is long, and so six of ten steps have short rows only: one micro-batch."""
    sizes = [(60, 4)] * 90 + [(760, 4)] * 10
    stats = measure_rows(*sizes, **STEP_OF_FOUR, tokens_per_forward=800)
    assert at(stats, 1024)["micro_batches_per_step"] == 1


def test_rows_that_are_lost_are_in_no_step(measure_rows):
    stats = measure_rows(*[(600, 9)] * 5, *[(60, 9)] * 4, **STEP_OF_FOUR)
    assert at(stats, 512)["steps_per_epoch"] == 1
    assert at(stats, 1024)["steps_per_epoch"] == 3


def test_rows_drawn_for_validation_are_in_no_step(measure_rows):
    sizes = [(60, 9)] * 9
    assert at(measure_rows(*sizes, **STEP_OF_FOUR), 512)["steps_per_epoch"] == 3
    stats = measure_rows(*sizes, **STEP_OF_FOUR, validation_split=0.12)
    assert at(stats, 512)["steps_per_epoch"] == 2


def test_validation_rows_are_drawn_from_those_that_are_not_lost(measure_rows):
    """One of ten; of all fifteen it would be two, and a step fewer."""
    sizes = [(600, 9)] * 5 + [(60, 9)] * 10
    stats = measure_rows(*sizes, **STEP_OF_FOUR, validation_split=0.12)
    assert at(stats, 512)["steps_per_epoch"] == 3


@pytest.mark.parametrize("names", [["train.jsonl"], ["train.jsonl", "validation.jsonl"]])
def test_a_validation_split_that_the_trainer_refuses(write_rows, names):
    """A share of one row is none, and a validation file leaves no share to draw."""
    files = [write_rows([GOOD], name) for name in names]
    code, _, err = run("--data_path", *files, "--validation_split", "0.1")
    assert code == 1
    assert "error: --validation_split" in err


# ---- The suggestion -----------------------------------------------------------------------------
def test_the_suggested_command_is_understood_by_the_trainer(stats_of_data):
    words = shlex.split(stats_of_data["suggestion"]["command"])
    assert words[:2] == ["python", "sft_qwen2.py"]
    args = parse(words[2:], sft_qwen2.SFTArguments)
    assert args.max_len == 2048
    assert args.data_path == [str(ROOT / "data")]
    assert args.model_name_or_path == str(TINY)


def test_few_rows_are_trained_in_more_steps(stats_of_data):
    """The 247 rows of data/ would make 2 steps; the plan gives the same advice."""
    command = stats_of_data["suggestion"]["command"]
    assert command.endswith("--num_train_epochs 3 --gradient_accumulation_steps 2")


def test_arguments_that_make_enough_steps_are_kept(tmp_path):
    arguments = {
        "data_path": [str(ROOT / "data")],
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 6,
    }
    file = write_arguments(tmp_path / "run.json", arguments)
    command = measure(file)["suggestion"]["command"]
    assert command == f"python sft_qwen2.py {file} --model_name_or_path {TINY} --max_len 2048"


def test_flags_stand_in_the_command_as_they_were_given(write_rows):
    folder = write_rows([GOOD]).parent
    words = ["--data_path", folder, "--system_prompt", "Be brief. It's late.", "--skip_bad_rows"]
    command = shlex.split(measure(*words)["suggestion"]["command"])
    args = parse(command[2:], sft_qwen2.SFTArguments)
    assert args.system_prompt == "Be brief. It's late."
    assert args.skip_bad_rows is True
    assert command[command.index("--skip_bad_rows") + 1].startswith("--")


def test_the_loss_of_half_the_length_is_told_where_it_is_small(measure_rows):
    reason = measure_rows((500, 30), (60, 90))["suggestion"]["reason"]
    assert "the smallest that cuts no row (longest: 530)" in reason
    assert "at 512: 1 rows cut, 15.00% of the answer tokens lost" in reason


def test_the_loss_of_half_the_length_is_not_told_where_it_is_large(measure_rows):
    reason = measure_rows((500, 30), (500, 30), (60, 90))["suggestion"]["reason"]
    assert reason == "the smallest that cuts no row (longest: 530)"


@pytest.fixture
def model_of_700_tokens(tiny_tokenizer, tmp_path):
    """A folder with a tokenizer and a config, but no weights."""
    tiny_tokenizer.save_pretrained(tmp_path)
    config = json.loads((TINY / "config.json").read_text())
    config["max_position_embeddings"] = 700
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_no_max_len_beyond_what_the_model_takes_is_suggested(
    make_row, write_rows, model_of_700_tokens
):
    path = write_rows([make_row(600, 200), make_row(60, 9)])
    stats = measure("--data_path", path, model=model_of_700_tokens)
    assert [candidate["max_len"] for candidate in stats["max_lens"]] == [512, 700]
    assert stats["suggestion"]["max_len"] == 700
    assert stats["suggestion"]["reason"].startswith("the most this model takes; longest row: 800")
    _, _, err = run("--data_path", path, model=model_of_700_tokens)
    assert "has 800 tokens, and the model takes 700; --max_len 700" in err


def test_a_tokenizer_alone_is_enough(tiny_tokenizer, tmp_path, write_rows):
    tiny_tokenizer.save_pretrained(tmp_path)
    assert measure("--data_path", write_rows([GOOD]), model=tmp_path)["tokens"]


# ---- What is shown ------------------------------------------------------------------------------
def test_the_report_begins_with_three_lines_and_fits_the_terminal():
    code, out, _ = run("--data_path", ROOT / "data")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("最大长度 longest: ")
    assert lines[1].startswith("最小长度 shortest: ")
    assert lines[2].startswith("平均长度 mean: ")
    tables = [line for line in lines if "|" in line or line[:1].isdigit()]
    assert max(map(len, tables)) <= 80


def test_the_histogram_counts_every_row_once(stats_of_data):
    stats = stats_of_data
    histogram = stats["histogram"]
    edges = histogram["edges"]
    assert sum(histogram["counts"]) == stats["files"]["train"]["num_examples"]
    assert edges[0] <= stats["tokens"]["total"]["min"]
    assert edges[-1] > stats["tokens"]["total"]["max"]
    assert len(histogram["counts"]) <= 16
    assert {after - before for before, after in itertools.pairwise(edges)} == {edges[1] - edges[0]}


def test_json_is_all_that_stdout_has(write_rows):
    """The trainer's functions name the files that they do not read; that goes to stderr."""
    folder = write_rows([GOOD]).parent
    (folder / "other.jsonl").write_text(json.dumps(GOOD))
    code, out, err = run("--data_path", folder, "--json")
    assert code == 0
    assert json.loads(out)["files"]["train"]["num_examples"] == 1
    assert "other.jsonl" in err


def test_each_split_has_counts_of_its_own(write_rows):
    train = write_rows([GOOD])
    validation = write_rows([GOOD, {"query": "<|im_end|>", "answer": "a"}], "dev.jsonl")
    files = measure("--data_path", train, validation)["files"]
    assert files["train"]["num_examples"] == 1
    assert files["train"]["num_control_tokens"] == 0
    assert files["validation"]["num_examples"] == 2
    assert files["validation"]["num_control_tokens"] == 1


# ---- Mistakes -----------------------------------------------------------------------------------
def test_refused_rows_are_named_and_the_others_counted(write_rows):
    path = write_rows([GOOD, NO_ANSWER, GOOD, {"query": "q", "answer": 5}])
    code, out, err = run("--data_path", path, "--json")
    assert code == 1
    assert f"{path}:2: " in err
    assert f"{path}:4: " in err
    assert err.splitlines()[-1].startswith("error: 2 rows would be refused")
    counts = json.loads(out)["files"]["train"]
    assert counts["num_refused"] == 2
    assert counts["num_examples"] == 2


def test_refused_rows_are_left_out_where_the_trainer_skips_them(write_rows):
    path = write_rows([GOOD, NO_ANSWER, NO_ANSWER])
    code, _, err = run("--data_path", path, "--skip_bad_rows")
    assert code == 0
    assert err.splitlines()[-1] == "2 rows are left out"


def test_refused_rows_are_no_rows_of_0_tokens(make_row, write_rows):
    path = write_rows([make_row(60, 9), NO_ANSWER, NO_ANSWER])
    total = measure("--data_path", path, "--skip_bad_rows")["tokens"]["total"]
    assert total["min"] == total["mean"] == total["p50"] == 69


def test_a_validation_row_that_is_refused_is_an_error_too(write_rows):
    validation = write_rows([NO_ANSWER, GOOD], "dev.jsonl")
    code, _, err = run("--data_path", write_rows([GOOD]), validation)
    assert code == 1
    assert f"{validation}:1: " in err


def test_no_row_at_all_is_left_to_skip_to(write_rows):
    code, _, err = run("--data_path", write_rows([NO_ANSWER]), "--skip_bad_rows")
    assert code == 1
    assert err.splitlines()[-1].startswith("error: 1 rows would be refused")


WRONG_FILES = {
    "no JSON": '{"data_path": ',
    "no object": "[1]",
    "an unknown option": '{"max_length": 5}',
    "a number for a path": '{"data_path": 5}',
    "a text for a number": '{"max_len": "long"}',
    "a text for a truth": '{"skip_bad_rows": "maybe"}',
    "a list for a text": '{"system_prompt": ["a"]}',
    "0 rows a step": '{"per_device_train_batch_size": 0}',
    "NaN": '{"num_train_epochs": NaN}',
}


@pytest.mark.parametrize("text", WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_a_wrong_file_of_arguments_gets_the_trainers_sentence(tmp_path, text):
    file = tmp_path / "run.json"
    file.write_text(text)
    code, out, err = run(file)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {file}: ")
    assert err.count("\n") == 1


def test_a_null_in_the_file_is_not_given(tmp_path, write_rows):
    arguments = {"system_prompt": None, "data_path": str(write_rows([GOOD]))}
    file = write_arguments(tmp_path / "run.json", arguments)
    default = measure("--data_path", arguments["data_path"])
    assert measure(file)["tokens"] == default["tokens"]


def test_a_folder_without_data_gets_a_sentence(tmp_path):
    code, out, err = run("--data_path", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")


def test_a_model_that_is_not_there_gets_a_sentence(write_rows, tmp_path):
    code, out, err = run("--data_path", write_rows([GOOD]), model=tmp_path / "none")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error():
    words = ["--model_name_or_path", str(TINY), "--data_path", str(ROOT / "data")]
    command = [sys.executable, str(Path(token_stats.__file__)), *words]
    environment = {**os.environ, **runs.CPU_ONLY}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()  # as head does
        err = process.stderr.read().decode()
    assert process.returncode == 0, err
    assert "Error" not in err
