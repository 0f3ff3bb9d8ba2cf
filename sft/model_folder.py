"""A model's folder: what is refused before and after it is loaded, and how one is written."""

import json
from pathlib import Path

import torch
import transformers

from sft.rows import UserError, as_user_error


def check_model(name_or_path: str, default: str, planned: bool):
    """Return the model's config; raises UserError where the model cannot be trained here.

    `planned`: whether there is a GPU, or only a plan is wanted.
    """
    if name_or_path == default and not planned:
        raise UserError(f"{default} needs a GPU; without one: python sft_qwen2.py data/tiny.json")
    remedy = f"try hf download {default} --local-dir qwen2, then --model_name_or_path qwen2"
    sentence = f"{name_or_path}: no such model, here or on the hub; {remedy}"
    with as_user_error((OSError, ValueError), sentence):
        config = transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if config.model_type != "qwen2" or config.use_sliding_window:
        wanted = "a Qwen2 or Qwen2.5 model with full attention (Qwen3 and others are out of scope)"
        raise UserError(f"{name_or_path}: is {config.model_type!r}, not {wanted}")
    return config


def load_weights(model_class, name_or_path: str, dtype: torch.dtype, device_map=None):
    """Return the checkpoint as a model_class with row_attention.

    Raises UserError where a weight is missing, unknown, or of another shape than its config says.
    """
    with as_user_error((OSError, RuntimeError, ValueError), f"{name_or_path}: cannot be loaded"):
        model, report = model_class.from_pretrained(
            name_or_path,
            dtype=dtype,
            device_map=device_map,
            attn_implementation="row_attention",
            output_loading_info=True,
            use_safetensors=True,  # other formats could run code
        )
    for problem, weights in report.items():
        if weights:
            names = ", ".join(sorted(map(str, weights))[:3])
            raise UserError(f"{name_or_path}: {problem.replace('_', ' ')}: {names}; copy it anew")
    return model


def write_model(folder: Path, model, tokenizer, weights: dict, dtype: torch.dtype, end_token: str):
    """Write model, weights rounded to dtype, and tokenizer; generation stops at end_token."""
    tokenizer.eos_token = end_token
    model.config.eos_token_id = end = tokenizer.eos_token_id
    others = model.generation_config.eos_token_id
    others = others if isinstance(others, list) else [others]
    model.generation_config.eos_token_id = [end, *(x for x in others if x not in (None, end))]
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    weights = {name: weight.to("cpu", dtype) for name, weight in weights.items()}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    add_old_names(folder, dtype)


def add_old_names(folder: Path, dtype: torch.dtype) -> None:
    """Add to a model folder's files the names under which transformers 4 looks for the same."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope, dtype = config["rope_parameters"], str(dtype).removeprefix("torch.")
    config |= {"rope_theta": rope["rope_theta"], "dtype": dtype, "torch_dtype": dtype}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [])  # is no list in 4
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
