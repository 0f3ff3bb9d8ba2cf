"""A model's folder: what is refused before it is loaded, and weights that are not all there."""

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
