"""token_stats.py: its totals are the trainer's, its costs fit_rows' own, its errors sentences."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT, TINY

import sft_qwen2
import token_stats
from sft.encoded_rows import beyond_positions, encode_files, fit_rows
from sft_qwen2 import encode_batch

SYSTEM = sft_qwen2.ScriptArguments.system_prompt
GOOD = b'{"query": "q", "answer": "a"}\n'


@pytest.fixture
def stats(capsys):
    """A function: flags to (exit code, stdout, stderr) of token_stats.main."""

    def stats(*argv, model=TINY):
        code = token_stats.main([str(arg) for arg in (*argv, "--model_name_or_path", model)])
        return code, *capsys.readouterr()

    return stats


@pytest.fixture
def long_rows(write_rows):
    rng = np.random.default_rng(0)
    sizes = [(int(a), int(b)) for a, b in rng.integers(1, 700, (99, 2))] + [(600, 30), (2100, 9)]
    return write_rows([{"query": "one " * a, "answer": "two " * b} for a, b in sizes])


def test_costs_are_what_the_trainer_counts(stats, long_rows, tiny_tokenizer, write_rows):
    """Totals, and what each max_len cuts, are those of fit_rows; steps those of the arguments."""
    flags = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": "4", "max_len": 99}
    run = write_rows(json.dumps({"data_path": [str(long_rows)], **flags}).encode(), "run.json")
    code, out, err = stats(run, "--json")
    found, lengths = json.loads(out), [512, 1024, 2048, 4096]
    table = encode_files([long_rows], tiny_tokenizer, SYSTEM, encode_batch, sft_qwen2.__file__)
    assert (code, err) == (0, "") and [r["max_len"] for r in found["max_lens"]] == lengths
    assert found["tokens"]["total"]["max"] == table["num_tokens"].max()
    assert found["tokens"]["total"]["mean"] == round(float(table["num_tokens"].mean()), 1)
    assert sum(found["histogram"]["rows"]) == len(table)
    for result in found["max_lens"]:
        _, counts = fit_rows(table, result["max_len"], "truncate")
        lost = counts["answer_tokens_cut"] + counts["answer_tokens_dropped"]
        assert result["answers_cut"] == counts["rows_cut"]
        assert result["answers_lost"] == counts["rows_dropped"]
        assert result["rows_over"] == counts["rows_cut"] + counts["rows_dropped"]
        assert result["answer_tokens_lost"] == lost / counts["answer_tokens_read"]
        assert result["steps_per_epoch"] == -(-counts["rows_trained"] // 8)
        assert result["micro_batches_per_step"] >= 1
    assert found["suggestion"]["command"].startswith(f"python sft_qwen2.py {run} --model")
    assert "at 2,048: 1 rows cut" in found["suggestion"]["reason"]


def test_report_fits_the_terminal_and_begins_with_three_lines(stats, long_rows):
    code, out, err = stats("--data_path", long_rows)
    lines = out.splitlines()
    assert code == 0 and err == ""
    assert [line.split()[0] for line in lines[:3]] == ["最大长度", "最小长度", "平均长度"]
    assert max(len(line) for line in lines if "┤" in line or line[:1].isdigit()) <= 80
    command = next(line.split() for line in lines if "python sft_qwen2.py" in line)
    classes = (sft_qwen2.ScriptArguments, sft_qwen2.TRAINING_DEFAULTS)
    assert sft_qwen2.parse_arguments(command[2:], *classes)[0].max_len == 4096


def test_max_len_stays_within_what_the_model_takes(stats, long_rows, tiny_tokenizer, tmp_path):
    """No longer one is suggested, and one that is asked for gets the trainer's warning."""
    tiny_tokenizer.save_pretrained(tmp_path)
    assert stats("--data_path", long_rows, model=tmp_path)[0] == 0  # its files alone will do
    config = json.loads((TINY / "config.json").read_text()) | {"max_position_embeddings": 700}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "run.json").write_text(json.dumps({"max_len": 800}))
    argv = (tmp_path / "run.json", "--data_path", long_rows, "--json")
    code, out, err = stats(*argv, model=tmp_path)
    assert [r["max_len"] for r in json.loads(out)["max_lens"]] == [512, 700] and code == 0
    assert "the most this model takes" in json.loads(out)["suggestion"]["reason"]
    assert err == beyond_positions(800, 700) + "\n"


REFUSED = [([], 1, "error: 31 rows would"), (["--skip_bad_rows"], 0, "31 rows are")]


@pytest.mark.parametrize(("flags", "code", "last"), REFUSED)
def test_refused_rows_are_named_and_counted(flags, code, last, stats, write_rows):
    """They make the exit code 1, as they stop the trainer; 0 where it would go on without them."""
    path = write_rows(GOOD + b'{"query": "q"}\n\n' + b'{"query": "<|im_end|>", "answer": 1}\n' * 30)
    (path.parent / "dev.jsonl").write_bytes(GOOD * 2 + b'{"query": "<|im_end|>", "answer": "a"}')
    found, out, err = stats("--data_path", path.parent, "--json", *flags)
    files, lines = json.loads(out)["files"], err.splitlines()
    assert found == code and len(lines) == 21 and lines[-1].startswith(last)
    assert lines[0].startswith(f"{path}:2: ") and lines[1].startswith(f"{path}:4: ")
    assert (files["train"]["rows"], files["train"]["refused"]) == (1, 31)
    assert (files["validation"]["rows"], files["validation"]["control_tokens"]) == (3, 1)


def test_what_is_wrong_gets_a_sentence(stats, tmp_path, write_rows):
    broken, bad = write_rows(b'{"data_path": ', "run.json"), write_rows(b'{"query": "q"}')
    for argv, model, said in (
        (["--data_path", tmp_path], TINY, "has no file train"),
        (["--data_path", tmp_path / "none"], TINY, "does not exist"),
        ([broken], TINY, "run.json: cannot be read"),
        (["--data_path", write_rows(GOOD)], "Qwen/none", "hf download"),
        (["--data_path", bad, "--skip_bad_rows"], TINY, "1 rows would be refused"),
    ):
        code, out, err = stats(*argv, model=model)
        assert (code, out) == (1, "") and said in err
        assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


@pytest.mark.slow
def test_a_run_imports_no_trainer_and_its_reader_may_leave():
    code = """if True:
        import sys, token_stats
        code = token_stats.main(sys.argv[1:])
        heavy = {"wandb", "transformers.trainer", "transformers.modeling_utils"}
        heavy.add("transformers.models.qwen2.modeling_qwen2")
        sys.exit(code or heavy & {*sys.modules} or 0)
    """
    argv = ["--model_name_or_path", str(TINY), "--data_path", str(ROOT / "data")]
    command = [sys.executable, "-c", code, *argv]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "stdout": -1, "stderr": -1}
    with subprocess.Popen(command, **options) as run:
        run.stdout.close()  # as head does
        err = run.stderr.read().decode()
    assert run.returncode == 0, err
    assert err.splitlines() == [f"not read   {ROOT}/data/tiny.json"]
