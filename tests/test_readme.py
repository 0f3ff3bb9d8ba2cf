"""READMEs and docs: commands that work, the options' defaults, links, figures, both languages."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

import sft_qwen2
import token_stats
from sft.command_line import parse

ENGLISH = (ROOT / "README.md").read_text("utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text("utf-8")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"]
COMMAND = re.compile(r"(?:python|torchrun [^`\n]*?) ?(sft_qwen2|token_stats)\.py([^`'\n]*)")
REGISTRIES = re.compile(
    r"pypi\.|pythonhosted|anaconda\.|npmjs|(?:mirrors|pypi)\.[a-z]+|download\.(?!pytorch\.org)"
)


def find_commands(text: str) -> list[tuple[str, list[str]]]:
    """Return the script and the arguments of each command of a page."""
    commands = []
    for script, arguments in COMMAND.findall(text.split("## [0.1.0]")[0]):
        words = shlex.split(arguments, comments=True)
        commands.append((script, words))
    return commands


def find_rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of each row of the first table below a heading."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    rows = []
    for line in lines[1:]:
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def read_option_defaults() -> dict[str, str]:
    defaults = {}
    for name, value in vars(sft_qwen2.SFTArguments()).items():
        text = str(value)
        if isinstance(value, list):
            text = " ".join(value)
        defaults[f"`--{name}`"] = f"`{text}`"
    return defaults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for script, words in find_commands(page.read_text("utf-8")):
        if "--help" in words:
            continue
        if script == "token_stats":
            parse(words, token_stats.StatsArguments, only=token_stats.FLAGS)
        else:
            parse(words, sft_qwen2.SFTArguments)


def test_the_readme_has_the_commands_of_the_first_hour():
    assert len(find_commands(ENGLISH)) > 15


def test_both_readmes_have_the_same_commands():
    assert find_commands(ENGLISH) == find_commands(CHINESE)


TRANSLATIONS = {"README.md": "README.zh-CN.md"}
for name in ("choosing", "machines", "recipes", "serving"):  # the rows of data.md are translated
    TRANSLATIONS[f"docs/{name}.md"] = f"docs/zh/{name}.md"


@pytest.mark.parametrize(("english", "chinese"), TRANSLATIONS.items())
def test_both_languages_have_the_same_blocks(english, chinese):
    """Commands of other programs, which no test runs, can then go wrong in both alone."""
    blocks = re.compile(r"^```\w+\n.*?^```$", flags=re.MULTILINE | re.DOTALL)
    found = blocks.findall((ROOT / english).read_text("utf-8"))
    assert found
    assert found == blocks.findall((ROOT / chinese).read_text("utf-8"))


@pytest.mark.parametrize("number", ["2,207", "1,064", "457", "789", "199", "58.55", "119.68"])
def test_both_readmes_have_the_results_of_the_benchmarks(number):
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    for text in (ENGLISH, CHINESE, benchmarks):
        assert number in text


@pytest.mark.parametrize(
    "text, heading", [(ENGLISH, "Options that people set"), (CHINESE, "常用的参数")]
)
def test_the_options_have_the_defaults_of_the_script(text, heading):
    rows = find_rows(text, heading)
    assert len(rows) == 13
    defaults = read_option_defaults()
    for name, default, _ in rows:
        assert default == defaults[name], name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_sections(page):
    for target, section in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text("utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        if section:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text("utf-8"))
            anchors = [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]
            assert section in anchors, section


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_host_of_packages_but_pytorchs(page):
    assert REGISTRIES.findall(page.read_text("utf-8")) == []


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "benchmarks/README.md"])
def test_the_progress_of_bf16_is_what_was_measured(name):
    results = json.loads((ROOT / "benchmarks/results/precision.json").read_text("utf-8"))
    progress = {row["name"]: row.get("progress") for row in results["progress"]}
    text = (ROOT / name).read_text("utf-8")
    assert f"{100 * progress['bf16, default']:.1f} %" in text
    assert f"{100 * progress['bf16, plain AdamW']:.1f} %" in text


def test_why_states_the_progress_of_plain_bf16():
    results = json.loads((ROOT / "benchmarks/results/precision.json").read_text("utf-8"))
    progress = {row["name"]: row.get("progress") for row in results["progress"]}
    text = (ROOT / "docs/why.md").read_text("utf-8")
    assert f"{100 * progress['bf16, plain AdamW']:.1f} %" in text


def test_the_slurm_script_trains_128_examples_a_step():
    text = (ROOT / "docs/machines.md").read_text("utf-8")
    nodes = int(re.search(r"#SBATCH --nodes (\d+)", text)[1])
    processes_per_node = int(re.search(r"#SBATCH --ntasks-per-node (\d+)", text)[1])
    words = re.search(r"exec python sft_qwen2\.py ([^']+)'", text)[1]
    args = parse(shlex.split(words), sft_qwen2.SFTArguments)
    examples = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert examples * nodes * processes_per_node == 128


def test_the_map_names_every_file_of_the_machinery():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    files = {f"sft/{path.name}" for path in (ROOT / "sft").glob("*.py")} - {"sft/__init__.py"}
    assert set(re.findall(r"`(sft/\w+\.py)`", text)) == files


def test_the_names_of_the_reading_order_are_in_the_script():
    source = (ROOT / "sft_qwen2.py").read_text("utf-8")
    defined = re.findall(r"(?m)^ *(?:def|class) (\w+)", source)
    section = ENGLISH.split("\n## Read the code\n")[1]
    names = [name for name in re.findall(r"`(\w+)`", section) if name != "sft"]
    assert len(names) == 8
    assert names == sorted(names, key=defined.index)


def list_messages(page: str = "docs/messages.md") -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    return re.findall(r"(?m)^\| `([^`]+)` \|", text)


def test_both_languages_list_the_same_messages():
    assert list_messages() == list_messages("docs/zh/messages.md")


@pytest.mark.parametrize("message", list_messages())
def test_a_message_of_the_list_is_one_that_the_code_says(message):
    files = [ROOT / "sft_qwen2.py", *(ROOT / "sft").glob("*.py")]
    sources = [path.read_text("utf-8") for path in files]
    assert any(message in re.sub(r'"\s*\n\s*f?"', "", source) for source in sources)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, page",
    [("benchmarks/boxes.py", "README.md"), ("docs/make_tables.py", "docs/choosing.md")],
)
def test_a_table_has_the_rows_that_its_command_prints(script, page):
    command = [sys.executable, str(ROOT / script)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    text = Path(ROOT, page).read_text("utf-8")
    head, _, *_ = output.splitlines()
    table = text.split(head)[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 2
    for line in table:
        assert line in output
