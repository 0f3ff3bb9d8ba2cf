"""The exported model folder: what is in it, and what is said where it cannot be written."""

import errno
import json
import os

import pytest
import runs
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from sft import export, model_files
from sft.errors import UserError


def load_model(folder, **options):
    return transformers.Qwen2ForCausalLM.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return runs.make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def model(base_dir):
    return load_model(base_dir)


@pytest.fixture
def tokenizer(tiny_model_dir):
    return model_files.load_tokenizer(str(tiny_model_dir))


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(folder, model, tokenizer, dtype=torch.bfloat16):
    export.write_model(folder, model, tokenizer, model.state_dict(), dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_rounded_and_named_as_the_base_names_them(tokenizer, tmp_path, tied):
    """A tied head is not written a second time."""
    base_dir = runs.make_model(tmp_path / "base", tied=tied)
    write(tmp_path / "model", load_model(base_dir), tokenizer)
    expected = load_file(base_dir / "model.safetensors")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert exported.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(exported[name], weight.bfloat16())


def test_large_weights_are_in_several_files(model, tokenizer, tmp_path, monkeypatch):
    split = export.huggingface_hub.split_torch_state_dict_into_shards

    def split_small(weights):
        return split(weights, max_shard_size=400_000)

    monkeypatch.setattr(export.huggingface_hub, "split_torch_state_dict_into_shards", split_small)
    write(tmp_path, model, tokenizer)
    paths = list(tmp_path.glob("model-*.safetensors"))
    assert len(paths) > 1
    again = load_model(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.bfloat16())
    num_bytes = 0
    for path in paths:
        num_bytes += sum(weight.nbytes for weight in load_file(path).values())
    index = read(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == num_bytes


def test_a_model_folder_loads_as_any_other(model, tokenizer, tmp_path):
    write(tmp_path, model, tokenizer, torch.float32)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(again) is transformers.Qwen2ForCausalLM
    assert not any(report.values())
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert set(words.all_special_tokens) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    assert words.chat_template == tokenizer.chat_template


def test_a_base_model_now_stops_at_the_end_of_an_answer(model, tokenizer, tmp_path):
    """Where it stopped before it still stops."""
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    write(tmp_path, model, tokenizer)
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = read(tmp_path / "generation_config.json")["eos_token_id"]
    assert ends == [im_end, tokenizer.eos_token_id]
    assert read(tmp_path / "config.json")["eos_token_id"] == im_end
    assert read(tmp_path / "tokenizer_config.json")["eos_token"] == "<|im_end|>"
    assert tokenizer.eos_token == "<|endoftext|>"  # what trains is left as it was


ENDS = [(None, [2]), (2, [2]), (0, [2, 0]), ([0, 2], [2, 0]), ([7, 8], [2, 7, 8])]


@pytest.mark.parametrize(("before", "after"), ENDS)
def test_every_end_of_generation_is_kept(tmp_path, before, after):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": before}))
    export.rewrite_generation_config(path, 2)
    assert read(path)["eos_token_id"] == after


def test_transformers_4_finds_all_names(model, tokenizer, tmp_path):
    model.config.use_cache = False  # as Trainer leaves it
    write(tmp_path, model, tokenizer)
    config = read(tmp_path / "config.json")
    assert config["torch_dtype"] == "bfloat16"
    assert config["dtype"] == "bfloat16"
    assert config["rope_theta"] == 1e6
    assert config["use_cache"] is True
    words = read(tmp_path / "tokenizer_config.json")
    assert words["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert "extra_special_tokens" not in words


def test_scaled_positions_have_their_old_name_too(model, tokenizer, tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    model.config.rope_parameters = {**rope, "rope_theta": 1e6}
    write(tmp_path, model, tokenizer)
    assert read(tmp_path / "config.json")["rope_scaling"]["rope_type"] == "yarn"


def test_code_that_is_not_copied_is_not_named(model, tokenizer, tmp_path):
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": [None, "tokenization_x.T"]}
    write(tmp_path, model, tokenizer)
    assert "auto_map" not in read(tmp_path / "config.json")
    assert "auto_map" not in read(tmp_path / "tokenizer_config.json")


def test_every_file_has_the_rights_that_were_asked_for(model, tokenizer, tmp_path):
    old = os.umask(0o027)
    write(tmp_path / "model", model, tokenizer)
    os.umask(old)
    for path in (tmp_path / "model").iterdir():
        assert path.stat().st_mode & 0o777 == 0o640


def test_config_comes_last(model, tokenizer, tmp_path, monkeypatch):
    """Whatever finds a config.json finds all the rest of the model, also after a kill."""
    write(tmp_path / "aside", model, tokenizer)
    moved = []
    replace = os.replace

    def watch(source, target):
        moved.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    export.move_model(tmp_path / "aside", tmp_path)
    assert moved[-1] == "config.json"
    assert "model.safetensors" in moved
    assert load_model(tmp_path).config.vocab_size == model.config.vocab_size


# ---- The rehearsal ------------------------------------------------------------------------------
def test_the_rehearsal_leaves_nothing(model, tokenizer, tmp_path):
    before = dict(vars(model.config))
    export.rehearse_export(tmp_path, model, tokenizer, torch.bfloat16)
    assert list(tmp_path.iterdir()) == []
    assert vars(model.config) == before


def spoil_template(tokenizer, monkeypatch):
    tokenizer.chat_template += "\udcff"  # the bytes of a terminal in GBK


def spoil_safetensors(tokenizer, monkeypatch):
    def raise_it(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", raise_it)


def spoil_disk(error_number):
    def spoil(tokenizer, monkeypatch):
        def raise_it(*args, **kwargs):
            raise OSError(error_number, os.strerror(error_number))

        monkeypatch.setattr(export, "write_json", raise_it)

    return spoil


SPOILED = {
    "not UTF-8": (spoil_template, False),
    "safetensors, full": (spoil_safetensors, True),
    "full": (spoil_disk(errno.ENOSPC), True),
    "quota": (spoil_disk(errno.EDQUOT), True),
    "too large": (spoil_disk(errno.EFBIG), False),
    "not allowed": (spoil_disk(errno.EACCES), False),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_be_written_is_known_before_training(
    model, tokenizer, tmp_path, monkeypatch, name
):
    """Room is asked for only where room is missing."""
    spoil, is_room_missing = SPOILED[name]
    spoil(tokenizer, monkeypatch)
    with pytest.raises(UserError) as error:
        export.rehearse_export(tmp_path, model, tokenizer, torch.bfloat16)
    assert str(error.value).startswith(f"{tmp_path}: the model cannot be written: ")
    assert ("make room" in str(error.value)) == is_room_missing
    assert list(tmp_path.iterdir()) == []


def test_a_number_format_that_safetensors_lacks(model, tokenizer, tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        export.rehearse_export(tmp_path, model, tokenizer, torch.quint8)
