"""token_stats.py: its totals are the trainer's, its costs fit_rows' own, its errors sentences."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import sft_qwen2
import token_stats
from sft_qwen2 import encode_file, find_data_files, fit_rows

SYSTEM = sft_qwen2.ScriptArguments.system_prompt
GOOD = b'{"query": "q", "answer": "a"}\n'


@pytest.fixture
def stats(capsys, tiny_model_dir):
    """A function: a data path and flags to (exit code, stdout, stderr) of token_stats.main."""

    def stats(data_path, *flags, model=tiny_model_dir):
        argv = ["--model_name_or_path", model, "--data_path", data_path, *flags]
        code = token_stats.main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return stats


@pytest.fixture
def long_rows(write_rows):
    rng = np.random.default_rng(0)
    sizes = [(int(a), int(b)) for a, b in rng.integers(1, 700, (300, 2))] + [(600, 30), (2100, 9)]
    return write_rows([{"query": "one " * a, "answer": "two " * b} for a, b in sizes])


def test_totals_are_those_of_the_chat_template_row_by_row(stats, tiny_tokenizer):
    path = ROOT / "data" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    lengths = []
    for row in rows:
        turns = row.get("messages") or [
            {"role": role, "content": row[key]}
            for key, role in (("system", "system"), ("query", "user"), ("answer", "assistant"))
            if key in row
        ]
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": SYSTEM}, *turns]
        ids = tiny_tokenizer.apply_chat_template(turns, return_dict=False)
        lengths.append(len(ids) - len(tiny_tokenizer.encode("\n")))  # after the last <|im_end|>
    table = encode_file(path, tiny_tokenizer, SYSTEM)
    assert table["num_tokens"][:].tolist() == [len(row["input_ids"]) for row in table]
    code, out, _ = stats(ROOT / "data", "--json")
    total = json.loads(out)["tokens"]["total"]
    assert code == 0
    assert (total["min"], total["max"]) == (min(lengths), max(lengths))
    assert total["mean"] == round(sum(lengths) / len(lengths), 1)
    assert sorted(lengths) == sorted(table["num_tokens"][:].tolist())
    assert sum(json.loads(out)["histogram"]["rows"]) == len(rows)


def test_costs_are_what_the_trainer_counts(stats, long_rows, tiny_model_dir):
    _, out, _ = stats(long_rows, "--json")
    tokenizer = sft_qwen2.load_tokenizer(str(tiny_model_dir), SYSTEM)
    table, found = encode_file(long_rows, tokenizer, SYSTEM), json.loads(out)
    assert [r["max_len"] for r in found["max_lens"]] == [512, 1024, 2048, 4096]
    for result in found["max_lens"]:
        _, counts = fit_rows(table, long_rows, result["max_len"], "truncate")
        lost = counts["answer_tokens_cut"] + counts["answer_tokens_dropped"]
        assert result["answers_cut"] == counts["rows_cut"]
        assert result["answers_lost"] == counts["rows_dropped"]
        assert result["rows_over"] == counts["rows_cut"] + counts["rows_dropped"]
        assert result["answer_tokens_lost"] == lost / counts["answer_tokens_read"]
        assert result["steps_per_epoch"] == -(-counts["rows_trained"] // 128)
        assert result["micro_batches_per_step"] >= 1
    assert found["suggestion"]["max_len"] == 4096
    assert "at 2,048: 1 rows cut" in found["suggestion"]["reason"]


def test_report_fits_the_terminal_and_begins_with_three_lines(stats, long_rows):
    code, out, err = stats(long_rows)
    lines = out.splitlines()
    assert code == 0 and err == ""
    assert [line.split()[0] for line in lines[:3]] == ["最大长度", "最小长度", "平均长度"]
    assert max(len(line) for line in lines if "┤" in line or line[:1].isdigit()) <= 80
    command = next(line.split() for line in lines if "python sft_qwen2.py" in line)
    argv = command[2:]
    assert sft_qwen2.parse_arguments(argv)[0].max_len == 4096


def test_max_len_stays_within_what_the_model_takes(stats, long_rows, tiny_model_dir, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 700}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, out, _ = stats(long_rows, "--json", model=tmp_path)
    found = json.loads(out)
    assert [r["max_len"] for r in found["max_lens"]] == [512, 700]
    assert "the most this model takes" in found["suggestion"]["reason"]
    (tmp_path / "config.json").unlink()  # the tokenizer's files alone will do
    assert stats(long_rows, model=tmp_path)[0] == 0


def test_refused_rows_are_named_and_counted(stats, write_rows):
    path = write_rows(GOOD + b'{"query": "q"}\n\n' + b'{"query": "q", "answer": 1}\n' * 30)
    code, out, err = stats(path, "--json")
    assert code == 1
    assert json.loads(out)["files"]["train"] | {"path": ""} == {
        "path": "",
        "rows": 1,
        "refused": 31,
        "longest": json.loads(out)["tokens"]["total"]["max"],
        "control_tokens": 0,
    }
    lines = err.splitlines()
    assert len(lines) == 21 and "31 rows would be refused" in lines[-1]
    assert lines[0].startswith(f"{path}:2: ") and lines[1].startswith(f"{path}:4: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b'{"query": "q", "answer"', ":1: is broken JSON"),
        (b'{"query": "q", "answer": ["a"]}', ":1: its assistant text is not a string"),
        (b'\xef\xbb\xbf{"query": "q", "answer": "a"}', ":1: begins with a byte order mark"),
        (GOOD + b'{"query": "q\\u0000", "answer": "a"}', ":2: its user text has a NUL"),
        (GOOD + b'{"answer": "a"}', ':2: wants "query" and "answer"'),
    ],
)
def test_bad_files_get_a_sentence(stats, write_rows, content, said):
    code, _, err = stats(write_rows(content))
    assert code == 1 and said in err and "Traceback" not in err


def test_missing_things_get_a_sentence(stats, tmp_path, write_rows, monkeypatch):
    for path in (tmp_path, tmp_path / "no such folder"):
        code, out, err = stats(path)
        assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
    code, _, err = stats(write_rows(GOOD), model="Qwen/none")
    assert code == 1 and "hf download" in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = stats(write_rows(GOOD), "--plot", tmp_path / "x.png")
    assert code == 1 and "pip install matplotlib" in err and "最大长度" in out
    with pytest.raises(SystemExit) as stop:
        token_stats.main(["--data", "data"])
    assert stop.value.code == 2


def test_plot_is_a_picture(stats, tmp_path, long_rows):
    pytest.importorskip("matplotlib")
    assert stats(long_rows, "--plot", tmp_path / "x.png")[0] == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_validation_and_control_tokens_are_told(stats, write_rows):
    path = write_rows([{"query": "<|im_start|> <|im_end|>", "answer": "a"}])
    (path.parent / "validation.jsonl").write_bytes(GOOD * 2)
    code, out, _ = stats(path.parent)
    assert code == 0
    assert "train.jsonl: 1 rows" in out and "2 control tokens" in out
    assert "validation.jsonl: 2 rows" in out
    assert set(find_data_files(str(path.parent))) == {"train", "validation"}


def test_help_is_quick_and_a_run_imports_no_trainer(tmp_path, tiny_model_dir):
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "token_stats.py", "--help"], check=True, stdout=-3)
    assert time.perf_counter() - start < 2
    code = (
        "import sys, token_stats; code = token_stats.main(sys.argv[1:]); "
        "never = ('accelerate', 'wandb', 'transformers.trainer', 'transformers.modeling_utils',"
        " 'transformers.models.qwen2.modeling_qwen2'); "
        "sys.exit(code or str([name for name in never if name in sys.modules] or ''))"
    )
    argv = ["--model_name_or_path", str(tiny_model_dir), "--data_path", str(ROOT / "data")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *argv, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path.cwd())
    assert done.stderr.strip() == ""
    assert json.loads(done.stdout)["suggestion"]["max_len"] == 2048
