"""The budgets that keep the project readable: lines, longest function, and who imports whom."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT, STATS = ROOT / "sft_qwen2.py", ROOT / "token_stats.py"
MACHINERY = sorted((ROOT / "sft").glob("*.py"))
BUDGETS = {
    "sft_qwen2.py": 650,
    "token_stats.py": 200,
    "sft/arguments.py": 220,
    "sft/rows.py": 280,
    "sft/memory_plan.py": 420,
    "sft/run_folder.py": 300,
}
FIRST_FIVE, TOTAL, LONGEST_FUNCTION, TESTS = 1800, 2690, 50, 4200
# Each may import those after it.
ORDER = ["arguments", "callbacks", "shards", "run_folder", "memory_plan", "model_folder", "answers"]
ORDER += ["numerics", "encoded_rows", "rows"]


def num_lines(*paths: Path) -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def imported(path: Path) -> set[str]:
    """Return the names of the project's modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("sft.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "sft":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.removeprefix("sft."))
    return names & {*ORDER, "sft_qwen2", "token_stats"}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_file_is_short(name):
    assert num_lines(ROOT / name) <= BUDGETS[name]


def test_script_and_machinery_together_are_short():
    assert num_lines(*(ROOT / name for name in BUDGETS if name != "token_stats.py")) <= FIRST_FIVE
    assert num_lines(SCRIPT, *MACHINERY) <= TOTAL


def test_the_tests_are_short():
    assert num_lines(*(ROOT / "tests").glob("*.py")) <= TESTS


@pytest.mark.parametrize("path", [SCRIPT, STATS, *MACHINERY], ids=lambda path: path.name)
def test_no_function_is_long(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", MACHINERY, ids=lambda path: path.name)
def test_imports_go_one_way(path):
    """From the script to the machinery, and there downwards; only token_stats asks the script."""
    if path.name != "__init__.py":
        assert imported(path) <= set(ORDER[ORDER.index(path.stem) + 1 :])


def test_the_script_imports_no_script():
    assert not imported(SCRIPT) & {"token_stats"}
