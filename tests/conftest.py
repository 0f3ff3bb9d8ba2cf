"""Fixtures: tokenizers, models and ways to run the script. CPU only, nothing from the network."""

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import runs  # of tests/harness

CACHE = tempfile.mkdtemp(prefix="sft-qwen2-tests-")
os.environ.update(runs.CPU_ONLY)
os.environ["HF_DATASETS_CACHE"] = CACHE

import transformers  # noqa: E402

ROOT = runs.ROOT
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_unconfigure(config):
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def qwen2_tokenizer():
    """Qwen2's own vocabulary, pattern, normalizer and chat template, without the hub."""
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    package = Path(importlib.util.find_spec("dashscope").origin).parent
    vocabulary = package / "resources" / "qwen.tiktoken"
    control_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    converter = TikTokenConverter(
        str(vocabulary), QWEN2_PATTERN, extra_special_tokens=control_tokens
    )
    backend = converter.converted()
    backend.normalizer = normalizers.NFC()
    tokenizer = transformers.Qwen2Tokenizer(
        tokenizer_object=backend,
        additional_special_tokens=control_tokens[1:],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
    )
    assert tokenizer.convert_tokens_to_ids(control_tokens) == [151643, 151644, 151645]
    tokenizer.chat_template = QWEN2_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """The repository's stand-in: its own vocabulary, tied embedding and head."""
    return runs.TINY


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(runs.TINY)


@pytest.fixture(scope="session", params=["qwen2_tokenizer", "tiny_tokenizer"])
def tokenizer(request):
    """Both tokenizers, with the chat templates of their makers."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def untied_model_dir(tmp_path_factory) -> Path:
    """A still smaller Qwen2 with random weights, whose head is not its embedding."""
    return runs.make_model(tmp_path_factory.mktemp("untied-qwen2"), tied=False)


@pytest.fixture(scope="session")
def write_rows(tmp_path_factory):
    """A function: rows (or the bytes of a file) to the path of a file that holds them."""

    def write(rows, name: str = "train.jsonl") -> Path:
        path = tmp_path_factory.mktemp("data") / name
        if isinstance(rows, bytes):
            path.write_bytes(rows)
            return path
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
        return path

    return write


@pytest.fixture(scope="session")
def run_main():
    import sft_qwen2  # noqa: F401  # takes seconds that are no test's

    return runs.run_main


@pytest.fixture(scope="session")
def train():
    return runs.train
