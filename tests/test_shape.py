"""What keeps the project readable: short functions, and imports that go one way."""

import ast
from pathlib import Path

import pytest
from runs import ROOT

SCRIPT = ROOT / "sft_qwen2.py"
STATS = ROOT / "token_stats.py"
MODULES = sorted(path for path in (ROOT / "sft").glob("*.py") if path.name != "__init__.py")
MAX_FUNCTION_LINES = 50
MAX_COLUMNS = 100


def imported_modules(path: Path) -> set[str]:
    """Return the names of the project's modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.add(alias.name.removeprefix("sft."))
        elif isinstance(node, ast.ImportFrom) and node.module == "sft":
            for alias in node.names:
                names.add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.removeprefix("sft."))
    own = {path.stem for path in MODULES}
    return names & {*own, "sft_qwen2", "token_stats"}


@pytest.mark.parametrize("path", [SCRIPT, STATS, *MODULES], ids=lambda path: path.name)
def test_no_function_is_long(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            num_lines = node.end_lineno - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", [SCRIPT, STATS, *MODULES], ids=lambda path: path.name)
def test_no_line_is_wide(path):
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        assert len(line) <= MAX_COLUMNS, f"{path.name}:{number}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_imports_a_script(path):
    assert not imported_modules(path) & {"sft_qwen2", "token_stats"}


def test_the_script_does_not_import_its_companion():
    assert "token_stats" not in imported_modules(SCRIPT)


def test_imports_go_one_way():
    """No module imports itself through others."""
    imports = {path.stem: imported_modules(path) for path in MODULES}
    while imports:
        leaves = [name for name, needed in imports.items() if not needed & imports.keys()]
        assert leaves, f"these import each other: {sorted(imports)}"
        for name in leaves:
            del imports[name]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_every_module_is_used(path):
    users = [SCRIPT, STATS, *MODULES]
    assert any(path.stem in imported_modules(user) for user in users if user != path)
