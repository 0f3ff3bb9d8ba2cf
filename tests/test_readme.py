"""The READMEs say what the scripts do: commands, outputs, options, figures, in both languages."""

import contextlib
import dataclasses
import importlib.metadata
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import memory_plan
import pytest
import torch
import transformers
import yaml
from conftest import ROOT
from memory_plan import GIB
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

import sft_qwen2
import token_stats

READMES = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md")}
ENGLISH, CHINESE = READMES.values()
MACHINES = (ROOT / "docs" / "machines.md").read_text("utf-8")
BOTH = pytest.mark.parametrize("readme", READMES.values(), ids=READMES)
ROWS_PER_STEP = 128


def blocks(text: str, *languages: str) -> list[str]:
    """Return the contents of the fenced blocks in these languages, or of all."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.M | re.S)
    return [body for language, body in found if not languages or language in languages]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def table(text: str, number: int) -> list[list[str]]:
    """Return the cells of each row of a table, below its head. `number`: counted from 0."""
    tables = re.findall(r"^\|[-|:]+\|\n((?:\|.*\n)+)", text, flags=re.M)
    rows = [row.strip().strip("|").split("|") for row in tables[number].splitlines()]
    return [[cell.strip() for cell in row] for row in rows]


BOXES, RESULTS, OPTIONS, MESSAGES = range(4)


def flags(text: str) -> set[str]:
    """Return the flags that the text names by themselves, with their values."""
    return set(re.findall("`(--[^`]+)`", prose(text)))


def commands(text: str) -> list[str]:
    """Return the commands of bash blocks and of `code`, one for each `&&` between them."""
    lines = [line for block in blocks(text, "bash") for line in [block] if "#SBATCH" not in block]
    spans = re.findall(r"`((?:python|torchrun|pip|wandb|vllm) [^`]+)`", prose(text))
    return [part.strip() for text in (*lines, *spans) for part in text.split(" && ")]


# ---- Both languages -----------------------------------------------------------------------------
@BOTH
def test_a_readme_is_short(readme):
    assert len(readme.splitlines()) <= 150


def test_both_show_the_same():
    """All blocks; commands within the text, too; options in the same order; the same messages."""
    assert blocks(ENGLISH) == blocks(CHINESE) and len(blocks(ENGLISH, "bash")) >= 6
    assert Counter(commands(ENGLISH)) == Counter(commands(CHINESE))
    assert flags(ENGLISH) == flags(CHINESE)
    for kind in (OPTIONS, BOXES):
        columns = slice(0, 2) if kind == OPTIONS else slice(1, 2)
        rows = zip(table(ENGLISH, kind), table(CHINESE, kind), strict=True)
        for english, chinese in rows:
            if "](" not in english[1]:
                assert english[columns] == chinese[columns]
    messages = [
        [re.findall("`.*?`", row[0]) for row in table(x, MESSAGES)] for x in (ENGLISH, CHINESE)
    ]
    assert messages[0] == messages[1]


def test_both_have_the_same_figures():
    """All numbers outside of blocks; the 2 of Qwen2 and the 7 of 7B are no numbers."""
    number = r"(?<![A-Za-z\d.])\d[\d,]*(?:\.\d+)?(?:e-\d+)?(?![A-Za-z\d])"
    english, chinese = (Counter(re.findall(number, prose(text))) for text in (ENGLISH, CHINESE))
    assert english == chinese and len(english) > 40


def test_both_have_the_same_headings_and_links():
    for pattern in (r"^#+ ", r"\]\((?!README)([^)]+)\)"):
        english, chinese = (re.findall(pattern, prose(x), flags=re.M) for x in (ENGLISH, CHINESE))
        assert english == chinese != []
    assert "](README.zh-CN.md)" in ENGLISH and "](README.md)" in CHINESE


@pytest.mark.parametrize("name", [*READMES, "docs/machines.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_linked_files_are_there(name):
    text = (ROOT / name).read_text("utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in target:
            assert (ROOT / name).parent.joinpath(target).exists(), target


# ---- Commands -----------------------------------------------------------------------------------
def check_command(words: list[str]) -> None:
    """Fail unless the command's own parser takes it and the files that it names are there."""
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        words = ["python", launch.training_script, *launch.training_script_args]
    if words[:2] == ["python", "sft_qwen2.py"]:
        arguments = [word for word in words[2:] if word != "--help"]
        args, _ = sft_qwen2.parse_arguments(arguments)
        for path in (args.model_name_or_path, args.data_path):
            assert path.startswith(("Qwen/", "/shared/")) or Path(path).exists(), path
    elif words[:2] == ["python", "token_stats.py"]:
        args = token_stats.parse_arguments(words[2:])
        assert Path(args.data_path).is_dir()
    elif words[:2] == ["python", "-c"]:
        compile(words[2], "README", "exec")
    elif words[:2] == ["pip", "install"]:
        assert words[2] == "-r" and Path(words[3]).is_file()
    else:  # nothing to parse: known by heart
        known = "python3 -m venv .venv;. .venv/bin/activate;ruff check .;ruff format --check .;"
        known += "python -m pytest;wandb login;vllm serve outputs"
        assert shlex.join(words) in known.split(";")


@pytest.mark.parametrize("command", dict.fromkeys(commands(ENGLISH + CHINESE + MACHINES)))
def test_a_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(shlex.split(command))


@pytest.mark.parametrize(
    "command",
    [
        "python sft_qwen2.py --no_such_flag 1",
        "python sft_qwen2.py data/none.json",
        "python sft_qwen2.py --data_path none/",
        "python token_stats.py --no_such_flag",
        "torchrun --no_such_flag sft_qwen2.py",
        "torchrun sft_qwen2.py --no_such_flag 1",
        "pip install -r none.txt",
        "no such command",
    ],
)
def test_a_wrong_command_would_be_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit)):
        check_command(shlex.split(command))


def test_flags_are_known(run_main):
    """Each flag that the text names is one of the trainer's, or of token_stats.py."""
    known = [*run_main("--help")[1].split(), "--plot", "--json"]
    names = [word for span in flags(ENGLISH + CHINESE) for word in span.split() if "--" in word]
    for name in names:
        assert name in known or f"{name}," in known, name


def test_ci_runs_the_first_commands():
    """The second line is that of .ci/run, which CI runs on the Pythons that are promised."""
    script = (ROOT / ".ci" / "run").read_text()
    install, *checks = blocks(ENGLISH, "bash")[1].strip().split(" && ")
    for check in checks:
        assert f"\n{check}\n" in script
    assert re.search(rf"\npip install .*{re.escape(install.split()[-1])}\n", script)
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text().splitlines()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["checks"]
    assert {"run": ".ci/run"} in job["steps"]
    lowest = job["strategy"]["matrix"]["python-version"][0]
    assert f"Python {lowest} or newer" in ENGLISH and f"Python {lowest} 或更高" in CHINESE
    for requirement in (ROOT / "requirements-dev.txt").read_text().split()[2:]:
        wanted = importlib.metadata.metadata(requirement.split("==")[0])["Requires-Python"]
        (least,) = re.findall(r">=\s*3\.(\d+)", wanted)
        assert int(least) <= int(lowest.split(".")[1]), requirement


def test_the_chat_command_chats(tmp_path):
    """As it stands there, in a folder in which the stand-in is the result."""
    (tmp_path / "outputs").mkdir()
    shutil.copytree(ROOT / "data" / "tiny-qwen2", tmp_path / "outputs" / "tiny")
    (command,) = [block for block in blocks(ENGLISH, "bash") if block.startswith("python -c")]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, shell=True, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'role': 'assistant', 'content': ")


def test_slurm_starts_every_process_with_its_rank(tmp_path):
    """The job script, with a srun that starts two tasks and a python that only says how."""
    (script,) = [block for block in blocks(MACHINES, "bash") if "#SBATCH" in block]
    stubs = {
        "scontrol": "printf 'first\\nsecond\\n'",
        "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@"; done',
        "python": "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $@",
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    options = {"env": environment, "capture_output": True, "text": True, "check": True}
    out = subprocess.run(["bash", "-c", script], **options).stdout
    ranks = [line.split(" sft_qwen2.py ")[0] for line in out.splitlines()]
    assert ranks == ["0 0 2 8 first", "1 1 2 8 first"]
    argv = out.splitlines()[1].split(" sft_qwen2.py ")[1].split()
    args, training_args = sft_qwen2.parse_arguments(argv)
    assert args.resume and step_rows(training_args, 16) == ROWS_PER_STEP


# ---- Outputs ------------------------------------------------------------------------------------
def make_config(size: str):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import memory

    return memory.make_config(size)


@pytest.fixture
def hub(qwen2_tokenizer_dir, tmp_path, monkeypatch):
    """The hub, as far as it is needed: config and tokenizer of Qwen2-7B-Instruct."""
    folder = tmp_path / "hub"
    names = {"Qwen/Qwen2-7B-Instruct": folder}
    shutil.copytree(qwen2_tokenizer_dir, folder)
    make_config("7B").save_pretrained(folder)
    for auto in (transformers.AutoConfig, transformers.AutoTokenizer):

        def load(name, *args, load=auto.from_pretrained, **options):
            return load(names.get(name, name), *args, **options)

        monkeypatch.setattr(auto, "from_pretrained", load)
    monkeypatch.chdir(ROOT)


def shown_after(command: str) -> list[str]:
    """Return the lines that are shown below a command, without those left out."""
    found = re.findall(r"^```bash\n(.*?)^```\n```text\n(.*?)^```$", ENGLISH, flags=re.M | re.S)
    (output,) = [text for line, text in found if command in line]
    return [line for line in output.splitlines() if line != "..."]


def assert_in_order(shown: list[str], output: str) -> None:
    lines = iter(re.sub(r", [\d.]+ GiB free", "", line) for line in output.splitlines())
    for line in shown:
        line = re.sub(r", [\d.]+ GiB free", "", line)
        assert line in lines, line


def test_lengths_are_shown_as_they_are(hub, capsys):
    assert token_stats.main(["--data_path", "data/"]) == 0
    assert_in_order(shown_after("token_stats.py --data_path"), capsys.readouterr().out)


def test_a_plan_is_shown_as_it_is(hub, run_main):
    (command,) = [text for text in commands(ENGLISH) if "--gpus 2x80" in text]
    code, out, _ = run_main(*shlex.split(command)[2:])
    assert code == 0
    assert_in_order(shown_after("--gpus 2x80"), out)


def test_the_first_run_is_shown_as_it_is(run_main, monkeypatch, tmp_path):
    """What comes before its first step, and the form of what comes then."""
    monkeypatch.chdir(ROOT)
    shown = shown_after("data/tiny.json")
    flags = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "output_dir": tmp_path}
    argv = [text for name, value in flags.items() for text in (f"--{name}", value)]
    code, out, err = run_main("data/tiny.json", *argv)
    assert code == 0, err
    names = [re.sub(r"[-\d.e,/]+", "", line) for line in out.splitlines()]
    for line in shown:
        if line.startswith(("train ", "eval_loss ", "question ")) and "step 290" not in line:
            assert line in out.splitlines()
        elif line.startswith("step "):
            assert re.sub(r"[-\d.e,/]+", "", line).split(" left")[0] in " ".join(names)
            rows = len((ROOT / "data" / "train.jsonl").read_bytes().splitlines())
            assert f"/{-(-rows // 8) * 10} " in line  # 10 epochs of steps of 8 rows
    assert "\n  after    " in out and sum(line.startswith("  after ") for line in shown) == 1


@BOTH
def test_what_the_text_quotes_is_said(readme, run_main, monkeypatch):
    monkeypatch.chdir(ROOT)
    (quoted,) = re.findall(r"`(error: [^`]*)`", readme)
    assert run_main("--data_path", "data/", "--max_len", "1024") == (1, "", quoted + "\n")


@BOTH
def test_the_picture_marks_what_is_trained(readme, tiny_tokenizer):
    (picture,) = [block for block in blocks(readme, "text") if "^^^" in block]
    lines, painted = picture.splitlines(), ""
    for line, below in zip(lines, [*lines[1:], ""]):
        if set(below.strip()) == {"^"}:
            on, off = below.index("^"), len(below)
            line = f"{line[:on]}⟦{line[on:off]}⟧{line[off:]}"
        painted += line * ("^" not in line)
    turns = re.findall(r"<\|im_start\|>(\w+)⏎(.*?)<\|im_end\|>", picture)
    row = sft_qwen2.encode(
        [{"role": role, "content": text} for role, text in turns], tiny_tokenizer
    )
    arrays = {name: torch.tensor(ids).numpy() for name, ids in row.items()}
    assert sft_qwen2.mark_trained_tokens(arrays, tiny_tokenizer, False) + "\n" == painted.replace(
        "⏎", "\n"
    )


# ---- Tables and figures -------------------------------------------------------------------------
@BOTH
def test_the_options_are_the_scripts(readme):
    """A row for each field, in their order, with the default."""
    fields = dataclasses.fields(sft_qwen2.ScriptArguments)
    shown = [row[:2] for row in table(readme, OPTIONS)]
    assert shown == [[f"`--{field.name}`", f"`{field.default}`"] for field in fields]


def test_help_has_the_options_of_the_table(run_main):
    code, out, _ = run_main("--help")
    text, at = "".join(out.split()), 0
    for option, default, _ in table(ENGLISH, OPTIONS):
        at = text.index(option.strip("`"), at)
        assert f"(default:{''.join(default.strip('`').split())})" in text[at : at + 400]
    assert code == 0


@BOTH
def test_other_defaults_are_listed(readme):
    (line,) = [line for line in readme.splitlines() if "`output_dir ./outputs`" in line]
    expected = [f"{name} {value}" for name, value in sft_qwen2.TRAINING_DEFAULTS.items()]
    assert re.findall("`(.*?)`", line) == expected


@BOTH
def test_messages_are_the_scripts(readme):
    """Each can be found in the source, up to what is put in; ten of them, at least."""
    source = (ROOT / "sft_qwen2.py").read_text("utf-8")
    messages = [text for row in table(readme, MESSAGES) for text in re.findall("`(.*?)`", row[0])]
    assert len(messages) >= 10
    for message in messages:
        assert message.removesuffix("nan") in source, message


@BOTH
def test_the_way_through_the_script_is_there(readme):
    (line,) = [line for line in readme.splitlines() if "`encode_batch`" in line]
    source = (ROOT / "sft_qwen2.py").read_text("utf-8")
    for name in re.findall("`(.*?)`", line):
        assert re.search(rf"^ *(def|class) {name}\b", source, flags=re.M), name


def step_rows(training_args, world: int) -> int:
    sizes = (training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps)
    return sizes[0] * sizes[1] * world


def planned(gpus: str | None, command: str, world: int) -> list[str]:
    """Return the GiB of the fullest GPU: what the command needs, and what it uses.

    It must fit on GPUs of a GiB less, too: what is free of 80 GB is 79 GiB.
    """
    words = shlex.split(command.strip("`").partition(".py")[2])
    args, training_args = sft_qwen2.parse_arguments(words)
    assert step_rows(training_args, world) == ROWS_PER_STEP or world == 1
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "device")
    names += ("gradient_checkpointing",)
    process = SimpleNamespace(**{name: getattr(training_args, name) for name in names})
    process.world_size = world
    capacities, capability = [16 * GIB], None
    if gpus:
        capacities, capability = sft_qwen2.find_devices(gpus, process)
    precision = sft_qwen2.choose_precision(capability, world, args.fp32)
    config = make_config(re.search(r"Qwen2-([\d.]+B)", args.model_name_or_path).group(1))
    terms = (config, args, process, precision)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sft_qwen2.plan_memory(*terms, capacities, args.max_len)
    used = max(map(float, re.findall(r"device \d+: ([\d.]+) of", out.getvalue())))
    with contextlib.redirect_stdout(io.StringIO()):
        less = [room - GIB for room in capacities]
        plan = sft_qwen2.plan_memory(*terms, less, args.max_len)
    tokens = max(plan.tokens_per_forward, args.max_len)
    needed = memory_plan.place(config, tokens, precision, capacities, world)[1]
    return [f"{max(needed) / GIB:.1f}", f"{used:.1f}"]


@BOTH
def test_planned_memory_is_what_is_computed(readme):
    boxes = table(readme, BOXES)
    assert len(boxes) == 7
    for box, command, *shown in boxes:
        number, gib = (re.findall(r"(\d+) x (\d+) GB", box) or [(1, 0)])[0]
        gpus = f"{number}x{gib}" if gib else None
        world = re.findall(r"--nproc_per_node (\d+)", command)
        world = int(world[0]) if world else 1
        if "docs/machines.md" in command:
            (command,) = [text for text in commands(MACHINES) if "--nnodes" in text]
            machines, each = map(int, re.findall(r"--n(?:nodes|proc_per_node) (\d+)", command))
            assert (machines, each) == (int(re.match(r"\d+", box)[0]), int(number))
            world, gpus = machines * each, f"{machines * each}x{gib}"
        assert shown == planned(gpus, command, world), box


@BOTH
def test_results_are_those_of_the_benchmarks(readme):
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    figures = [
        re.findall(r"\d[\d,]*(?:\.\d+)?", " ".join(row[1:])) for row in table(readme, RESULTS)
    ]
    assert [len(found) for found in figures] == [3, 3, 2, 2]
    for figure in itertools.chain(*figures):
        assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d.,])", benchmarks), figure


@BOTH
def test_the_stand_in_has_that_many_parameters(readme):
    tensors = load_file(ROOT / "data" / "tiny-qwen2" / "model.safetensors")
    assert f" {sum(tensor.numel() for tensor in tensors.values()):,} " in readme


@BOTH
def test_a_bf16_number_has_no_nearer_neighbour(readme):
    weight = torch.tensor([0.02], dtype=torch.bfloat16)
    distance = (torch.nextafter(weight, torch.ones_like(weight)) - weight).item()
    assert f" {distance:.5f}" in readme and distance / 2 > 1e-5
    assert torch.equal(weight - torch.full_like(weight, 1e-5), weight)
