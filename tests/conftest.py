"""Fixtures: tokenizers, models and ways to run the script. CPU only, nothing from the network."""

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import runs

CACHE = tempfile.mkdtemp(prefix="sft-qwen2-tests-")
os.environ |= runs.CPU_ONLY | {"HF_DATASETS_CACHE": CACHE, "WANDB_MODE": "disabled"}

import torch_2_11  # noqa: E402, F401
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
    vocabulary = str(package / "resources" / "qwen.tiktoken")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    converter = TikTokenConverter(vocabulary, QWEN2_PATTERN, extra_special_tokens=special)
    backend = converter.converted()
    backend.normalizer = normalizers.NFC()
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    tokenizer = transformers.Qwen2Tokenizer(
        tokenizer_object=backend, additional_special_tokens=special[1:], **tokens
    )
    assert tokenizer.convert_tokens_to_ids(special) == [151643, 151644, 151645]
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
    """Both tokenizers, as they are before load_tokenizer touches their templates."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def untied_model_dir(tmp_path_factory) -> Path:
    """A still smaller Qwen2 with random weights, whose head is not its embedding."""
    return runs.make_model(tmp_path_factory.mktemp("untied-qwen2"), tied=False)


@pytest.fixture(scope="session")
def write_rows(tmp_path_factory):
    """A function: rows (or the bytes of a file) to the path of a file that holds them."""

    def write(rows, name="train.jsonl") -> Path:
        path = tmp_path_factory.mktemp("data") / name
        if not isinstance(rows, bytes):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            rows = "".join(lines).encode()
        path.write_bytes(rows)
        return path

    return write


@pytest.fixture(scope="session")
def run_main():
    import sft_qwen2  # noqa: F401  # takes seconds that are no test's

    return runs.run_main


@pytest.fixture(scope="session")
def train():
    return runs.train
