"""The README says what the script does: its options and defaults, and files that exist."""

import dataclasses
import re
from pathlib import Path

import sft_qwen2

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_own_option_is_in_the_table_with_its_default():
    """A row of the table is `| --name | default | ... |`, for each field and for no other name."""
    rows = dict(re.findall(r"^\| `--(\w+)` \| (.*?) \|", README, flags=re.M))
    fields = {f.name: f.default for f in dataclasses.fields(sft_qwen2.ScriptArguments)}
    shown = {name: default.strip("`") for name, default in rows.items()}
    assert shown == {name: str(default) for name, default in fields.items()}


def test_the_defaults_of_training_arguments_are_listed():
    for name, value in sft_qwen2.TRAINING_DEFAULTS.items():
        assert f"`{name} {value}`" in README


def test_files_that_the_readme_names_are_there():
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
