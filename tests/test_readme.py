"""READMEs and docs say what the scripts do: commands, outputs, options, figures, both languages."""

import ast
import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from runs import ROOT
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

import sft_qwen2
import token_stats

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "docs")]
TEXTS = {p.name: p.read_text("utf-8") for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
ENGLISH, CHINESE = READMES = TEXTS["README.md"], TEXTS["README.zh-CN.md"]
RESULTS, OPTIONS = 1, 2  # their tables
DEFAULTS = sft_qwen2.TRAINING_DEFAULTS
HOSTS = r"https?://(?!arxiv|github|hf-mirror|keepachangelog|localhost|semver|thinkingmachines)"
OTHERS = "python3 . -m wandb vllm modelscope curl ctranslate2 ct2-transformers-converter"
OTHERS += " convert_hf_to_gguf.py llama-server"
OTHER_FLAGS = ("help", "jinja", "shutdown-timeout", "nproc_per_node", "nnodes")
NUMBER = r"(?<![A-Za-z\d.])\d[\d,]*(?:\.\d+)?(?:e-\d+)?(?![A-Za-z\d])"  # not the 2 of Qwen2
# Where the results stand in benchmarks/README.md: section, table, column, rows.
THROUGHPUT = ("useful tokens/s", "this trainer", "TRL", "padded to longest")
SOURCES = [("Throughput", 0, *THROUGHPUT), ("Throughput", 2, *THROUGHPUT)]
SOURCES += [("Memory", 0, "peak", "this trainer", "usual")]
SOURCES += [("Precision", 0, "progress", "bf16, default", "bf16, plain AdamW")]


def blocks(text: str, language: str = r"\w+") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of each table, its head first."""
    found = re.findall(r"^(\|.*\n)\|[-|: ]+\|\n((?:\|.*(?:\n|$))+)", text, flags=re.M)
    rows = [(head + body).splitlines() for head, body in found]
    return [[[x.strip() for x in row.strip("|").split("|")] for row in table] for table in rows]


def commands(text: str) -> list[str]:
    """Return the commands of bash blocks and of `code`, one for each `&&` between them."""
    found = re.findall(r"`((?:python|torchrun|pip|wandb|vllm|modelscope) [^`]+)`", prose(text))
    for body in (x for x in blocks(text, "bash") if "#SBATCH" not in x):
        found += [body] if body.startswith('python -c "\n') else body.splitlines()
    return [part for line in found for part in line.split(" && ")]


def test_both_readmes_have_the_same_and_are_short():
    """Blocks, commands, numbers, links; of tables, what is code and all numbers, in their order."""
    link, cell = r"\]\((?!README)([^)]+)\)", f"`[^`]+`|{NUMBER}"
    found = []
    for text in READMES:
        cells, numbers = re.findall(cell, str(tables(text))), re.findall(NUMBER, prose(text))
        counts = map(sorted, (blocks(text), commands(text), numbers))
        found.append([*counts, set(re.findall(link, text)), cells])
    for english, chinese in zip(*found):
        assert english == chinese and len(english) > 7
    assert all(len(text.splitlines()) <= 120 for text in READMES)


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere_and_flags_are_known(name):
    folder = ROOT if (ROOT / name).exists() else ROOT / "docs"
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", TEXTS[name]):
        assert (folder / target).exists(), target
        assert not anchor or f"\n## {anchor.capitalize()}\n" in (folder / target).read_text("utf-8")
    assert not re.search(rf"{HOSTS}|issue #?\d|\.\./shared|/work/|TODO", TEXTS[name])
    text = re.sub("`modelscope [^`]*`", "", prose(TEXTS[name]))
    classes = (sft_qwen2.ScriptArguments, transformers.TrainingArguments)
    known = {field.name for x in classes for field in dataclasses.fields(x)} | {*OTHER_FLAGS}
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)) <= known


# ---- Commands -----------------------------------------------------------------------------------
def check_command(command: str) -> None:
    """Fail unless the command's own parser takes it and the files that it names are there."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        words = ["python", launch.training_script, *launch.training_script_args]
    if words[1:2] == ["sft_qwen2.py"]:
        words = [word for word in words[2:] if word != "--help"]
        args, _ = sft_qwen2.parse_arguments(words, sft_qwen2.ScriptArguments, DEFAULTS)
        for path in (args.model_name_or_path, *args.data_path):
            assert path.startswith(("Qwen/", "/shared/")) or Path(path).exists(), path
    elif words[1:2] == ["token_stats.py"]:
        token_stats.parse_arguments(words[2:])
    elif words[:2] == ["python", "-c"]:
        compile(words[2], "README", "exec")
    elif not {*words[:3]} & {*OTHERS.split()}:  # these were tried by hand: docs/serving.md
        assert Path(words[3 if words[0] == "pip" else 1]).is_file(), command


@pytest.mark.parametrize("command", sorted({x for text in TEXTS.values() for x in commands(text)}))
def test_a_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(command)


def test_slurm_starts_every_process_with_its_rank(tmp_path):
    """The job script, with a srun that starts two tasks and a python that only says how."""
    (script,) = [body for body in blocks(TEXTS["machines.md"], "bash") if "#SBATCH" in body]
    tasks = 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@"; done'
    python = "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $@"
    for name, body in {"scontrol": "echo first", "srun": tasks, "python": python}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    out = subprocess.check_output(["bash", "-c", script], env=env, text=True)
    ranks, flags = zip(*(line.split(" sft_qwen2.py ") for line in out.splitlines()))
    assert ranks == ("0 0 2 8 first", "1 1 2 8 first")
    check_command(f"python sft_qwen2.py {flags[1]}")


# ---- Outputs ------------------------------------------------------------------------------------
def assert_shown(command: str, output: str) -> None:
    """Fail unless the lines shown below a command are in its output, in their order."""
    found = re.findall(r"^```bash\n(.*?)^```\n```text\n(.*?)^```$", ENGLISH, flags=re.M | re.S)
    (shown,) = [text.splitlines() for line, text in found if command in line]
    lines = iter(output.splitlines())
    for line in shown:
        assert line == "..." or line in lines, f"{line} is not in\n{output}"


@pytest.mark.slow
def test_lengths_and_plan_are_shown_as_they_are(qwen2_tokenizer, tmp_path, run_main, capsys):
    import memory

    for part in (qwen2_tokenizer, memory.make_config("7B")):
        part.save_pretrained(tmp_path)
    model = ["--model_name_or_path", str(tmp_path), "--data_path", str(ROOT / "data")]
    assert token_stats.main(model) == 0
    assert_shown("token_stats.py", capsys.readouterr().out)
    (command,) = [text for text in commands(ENGLISH) if "--dry_run" in text]
    assert_shown(command, run_main(*shlex.split(command)[4:], *model)[1])


@pytest.mark.slow
def test_the_first_run_and_its_answer_are_shown_as_they_are(tmp_path):
    """Both commands; training may differ in the last digits from machine to machine.

    Of 40 held-out questions none has its exact answer before, and four of five have it after.
    """
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = {"env": env, "text": True, "shell": True}
    train, chat = (blocks(ENGLISH, "bash")[i] for i in (0, -1))
    train = f"{train.split(' && ')[-1].strip()} --output_dir {tmp_path}/outputs/tiny"
    out = subprocess.check_output(train, cwd=ROOT, **options)
    figures = r"(?m)^(?:exact|\{'eval_loss).*"
    shown, found = ([re.findall(NUMBER, x) for x in re.findall(figures, y)] for y in (ENGLISH, out))
    for line, other in zip(shown, found, strict=True):
        assert [*map(float, line)] == pytest.approx([*map(float, other)], rel=0.1)
    right, asked, before = map(int, found[-1])
    assert (asked, before) == (40, 0) and right >= 32
    lines = iter(re.findall(figures, ENGLISH))
    assert_shown("data/tiny.json", re.sub(figures, lambda _: next(lines), out))
    answer = subprocess.check_output(chat, cwd=tmp_path, **options)
    assert answer.endswith("'content': 'The capital of Portugal is Lisbon.'}\n")


def test_the_picture_shows_what_is_trained_and_the_losses_of_the_first_run():
    import make_pictures

    picture = (ROOT / "docs" / "picture.svg").read_text("utf-8")
    assert "\n".join(make_pictures.draw_conversation()) in picture
    losses = re.findall(r"eval_loss ([\d.]+)<", picture)
    assert losses == re.findall(r"'eval_loss': '([\d.]+)'", blocks(ENGLISH, "text")[0])


@pytest.mark.parametrize("module, name", [("boxes", "README.md"), ("make_tables", "choosing.md")])
def test_a_generated_table_is_the_one_that_its_command_prints(module, name, capsys):
    __import__(module).main()
    assert capsys.readouterr().out in TEXTS[name]


def test_options_defaults_and_messages_are_the_scripts():
    defaults = vars(sft_qwen2.ScriptArguments()) | DEFAULTS
    for option, value, _ in tables(ENGLISH)[OPTIONS][1:]:
        assert value == f"`{defaults[option.strip('`-')]}`", option
    rows = tables(TEXTS["why.md"].split("## The defaults")[1])[0][1:]
    shown = [text for row in rows for text in re.findall("`(.*?)`", row[0])]
    assert sorted(shown) == sorted(f"{k} {v}" for k, v in DEFAULTS.items())
    sources = [ROOT / "sft_qwen2.py", *ROOT.glob("sft/*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    said = [node.value for node in nodes if isinstance(node, ast.Constant)]
    for message, *_ in tables(TEXTS["messages.md"])[0][1:]:
        assert any(message.strip("`") in str(text) for text in said), message
    assert all(path.name in TEXTS["CONTRIBUTING.md"] for path in sources if path.stem[0] != "_")


def test_results_are_those_of_the_benchmarks():
    text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    shown = tables(ENGLISH)[RESULTS][1:]
    for (_, *cells), (section, number, column, *names) in zip(shown, SOURCES, strict=True):
        head, *rows = tables(text.split(f"\n## {section}")[1])[number]
        found = [row for name in names for row in rows if " ".join(row).startswith(name + " ")]
        values = [row[head.index(column)].strip("*") for row in found]
        assert re.findall(NUMBER, " ".join(cells)) == [x.split()[0] for x in values], section


def test_figures_of_the_text():
    weights = load_file(ROOT / "data" / "tiny-qwen2" / "model.safetensors").values()
    assert f" {sum(weight.numel() for weight in weights):,} " in ENGLISH
    weight = torch.tensor(0.02, dtype=torch.bfloat16)
    assert f"steps of {float(torch.nextafter(weight, weight + 1) - weight):.5f}" in TEXTS["why.md"]
    names = re.findall(r"`(\w+)`", ENGLISH.split("## Read it")[1].split("The machinery")[0])
    found = re.findall(r"(?m)^ *(?:def|class) (\w+)", (ROOT / "sft_qwen2.py").read_text("utf-8"))
    assert names == [name for name in found if name in names] != []
