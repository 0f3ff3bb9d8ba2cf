"""Writes a model as an ordinary folder, for transformers 4 and 5 and what reads their files."""

import json
import os
from pathlib import Path

import huggingface_hub
import torch
from safetensors.torch import save_file

from sft.conversations import IM_END
from sft.errors import UserError, describe
from sft.whole_files import ASIDE, is_out_of_space, remove_aside


def write_model(folder: Path, model, tokenizer, weights: dict, dtype: torch.dtype) -> None:
    """Write a model folder: weights rounded to dtype, configs and tokenizer.

    ``model`` gives config and generation config, ``weights`` is the state dict. Generation stops
    at <|im_end|>. Neither model nor tokenizer is changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder, model, tokenizer, dtype)
    write_weights(folder, weights, dtype)


def write_weights(folder: Path, weights: dict, dtype: torch.dtype) -> None:
    """Write a state dict beside its config.json, as safetensors files of at most 5 GB.

    Only one file's tensors are copied to the host at a time.
    """
    weights = dict(weights)
    config = folder / "config.json"
    if read_json(config)["tie_word_embeddings"]:  # readers take the embedding for the head
        weights.pop("lm_head.weight", None)
    num_bytes = 0
    plan = huggingface_hub.split_torch_state_dict_into_shards(weights)
    for file_name, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            weight = weights[name].detach()
            tensors[name] = weight.to("cpu", dtype).contiguous()
            num_bytes += tensors[name].nbytes
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        # safetensors lets nobody else read its files.
        os.chmod(folder / file_name, config.stat().st_mode)
    if plan.is_sharded:
        index = {
            "metadata": {"total_size": num_bytes},
            "weight_map": plan.tensor_to_filename,
        }
        write_json(folder / "model.safetensors.index.json", index)


def write_settings(folder: Path, model, tokenizer, dtype: torch.dtype) -> None:
    """Write a model's configs and tokenizer, also under the names that transformers 4 reads."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(IM_END)
    rewrite_config(folder / "config.json", dtype, end)
    rewrite_generation_config(folder / "generation_config.json", end)
    rewrite_tokenizer_config(folder / "tokenizer_config.json")


def rewrite_config(path: Path, dtype: torch.dtype, end_token_id: int) -> None:
    config = read_json(path)
    config.pop("auto_map", None)  # the code that it names is not copied
    rope = config["rope_parameters"]
    dtype_name = str(dtype).removeprefix("torch.")
    config.update(
        architectures=["Qwen2ForCausalLM"],
        eos_token_id=end_token_id,
        use_cache=True,  # Trainer turns it off
        dtype=dtype_name,
        # transformers 4 has other names for the same.
        torch_dtype=dtype_name,
        rope_theta=rope["rope_theta"],
    )
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    write_json(path, config)


def rewrite_generation_config(path: Path, end_token_id: int) -> None:
    config = read_json(path)
    others = config.get("eos_token_id")
    if others is None:
        others = []
    if isinstance(others, int):
        others = [others]
    if end_token_id in others:
        others.remove(end_token_id)
    config["eos_token_id"] = [end_token_id, *others]
    write_json(path, config)


def rewrite_tokenizer_config(path: Path) -> None:
    config = read_json(path)
    config.pop("auto_map", None)
    config["eos_token"] = IM_END
    # In transformers 4 "extra_special_tokens" is a dict, and the list has another name.
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [])
    write_json(path, config)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def rehearse_export(output_dir: Path, model, tokenizer, dtype: torch.dtype) -> None:
    """Write a model folder with one small tensor, and remove it.

    Raises UserError where the real one could not be written after training.
    """
    aside = output_dir / ASIDE
    try:
        write_model(aside, model, tokenizer, {"rehearsal": torch.zeros(1)}, dtype)
    except Exception as error:  # each library has its own
        raise UserError(explain_failed_export(output_dir, error)) from error
    finally:
        remove_aside(output_dir)


def explain_failed_export(output_dir: Path, error: Exception) -> str:
    """Return in a sentence why the model cannot be written to output_dir, and what to do."""
    sentence = f"{output_dir}: the model cannot be written: {describe(error)}"
    if is_out_of_space(error):
        sentence += "; make room"
    return sentence


def move_model(aside: Path, output_dir: Path) -> None:
    """Move the files of a model folder into output_dir, config.json last.

    A folder that has a config.json then has all the rest.
    """
    names = [path.name for path in aside.iterdir()]
    names.remove("config.json")
    names.append("config.json")
    for name in names:
        os.replace(aside / name, output_dir / name)
