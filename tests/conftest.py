"""Fixtures: tokenizers, models and ways to run the script. CPU only, nothing from the network."""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE = tempfile.mkdtemp(prefix="sft-qwen2-tests-")
os.environ |= {  # before torch, transformers and datasets are imported
    "CUDA_VISIBLE_DEVICES": "",
    "HF_DATASETS_CACHE": CACHE,
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # models this small gain nothing, and a busy machine loses much
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import sft_qwen2  # noqa: E402

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
def tiny_model_dir() -> Path:
    """The repository's stand-in: its own vocabulary, tied embedding and head."""
    return ROOT / "data" / "tiny-qwen2"


@pytest.fixture(scope="session")
def qwen2_tokenizer_dir(tmp_path_factory) -> Path:
    """Qwen2's own vocabulary, pattern, normalizer and chat template, without the hub."""
    import importlib.util

    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    package = Path(importlib.util.find_spec("dashscope").origin).parent
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = TikTokenConverter(
        vocab_file=str(package / "resources" / "qwen.tiktoken"),
        pattern=QWEN2_PATTERN,
        extra_special_tokens=special,
    ).converted()
    backend.normalizer = normalizers.NFC()
    tokenizer = transformers.Qwen2Tokenizer(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=special[1:],
    )
    assert tokenizer.convert_tokens_to_ids(special) == [151643, 151644, 151645]
    tokenizer.chat_template = QWEN2_TEMPLATE
    folder = tmp_path_factory.mktemp("qwen2-tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen2_tokenizer(qwen2_tokenizer_dir):
    return transformers.AutoTokenizer.from_pretrained(qwen2_tokenizer_dir)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir):
    return transformers.AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session", params=["qwen2_tokenizer", "tiny_tokenizer"])
def tokenizer(request):
    """Both tokenizers, as they are before load_tokenizer touches their templates."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def untied_model_dir(tiny_tokenizer, tiny_model_dir, tmp_path_factory) -> Path:
    """A still smaller Qwen2 with random weights, whose head is not its embedding."""
    folder = tmp_path_factory.mktemp("untied-qwen2")
    config = transformers.AutoConfig.from_pretrained(tiny_model_dir)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = config.to_dict() | small | heads
    del config["layer_types"]
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).float()
    model.generation_config = transformers.GenerationConfig.from_pretrained(tiny_model_dir)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


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
    """A function: arguments to (exit code, stdout, stderr) of main(), in this process."""

    def run(*argv):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = sft_qwen2.main([str(arg) for arg in argv])
            except SystemExit as stop:
                code = stop.code
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="session")
def train(run_main):
    """A function: flags to a finished run of main() and what can be known of it.

    trainer, the rows of each step in their order, the losses that were logged, out, err.
    """

    def train(model_dir, data_path, output_dir, **flags) -> SimpleNamespace:
        flags = {"report_to": "none", "output_dir": output_dir, **flags}
        flags |= {"model_name_or_path": model_dir, "data_path": data_path}
        seen, build_trainer = SimpleNamespace(steps=[]), sft_qwen2.build_trainer

        def build_and_watch(*args, **kwargs):
            seen.trainer = trainer = build_trainer(*args, **kwargs)
            training_step = trainer.training_step

            def watched_step(model, rows, *args, **kwargs):
                seen.steps.append(rows)
                return training_step(model, rows, *args, **kwargs)

            trainer.training_step = watched_step
            return trainer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft_qwen2, "build_trainer", build_and_watch)
            argv = [text for name, value in flags.items() for text in (f"--{name}", value)]
            code, seen.out, seen.err = run_main(*argv)
        assert code == 0, seen.err
        seen.losses = [log["loss"] for log in seen.trainer.state.log_history if "loss" in log]
        return seen

    return train
