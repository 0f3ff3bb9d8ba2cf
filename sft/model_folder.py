"""A model's folder: what is refused before and after it is loaded, and how one is written."""

import json
from pathlib import Path

import torch
import transformers

from sft.rows import IM_END, IM_START, UserError, as_user_error


def check_model(name_or_path: str, default: str, planned: bool):
    """Return the model's config; raises UserError where the model cannot be trained here.

    `planned`: whether there is a GPU, or only a plan is wanted.
    """
    if name_or_path == default and not planned:
        raise UserError(f"{default} needs a GPU; without one: python sft_qwen2.py data/tiny.json")
    wanted = name_or_path if name_or_path.count("/") == 1 else default
    remedy = f"try hf download {wanted} --local-dir qwen2, then --model_name_or_path qwen2"
    sentence = f"{name_or_path}: no such model, here or on the hub; {remedy}"
    with as_user_error(sentence):
        config = transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if config.model_type != "qwen2" or config.use_sliding_window:
        wanted = "a Qwen2 or Qwen2.5 model with full attention (Qwen3 and others are out of scope)"
        raise UserError(f"{name_or_path}: is {config.model_type!r}, not {wanted}")
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        if getattr(config, name) < 1:
            raise UserError(f"{name_or_path}: config.json has no {name}; fetch its files again")
    return config


def load_tokenizer(encode, name_or_path: str, system_prompt: str):
    """Return the tokenizer, with the trained system prompt as its chat template's default.

    Raises UserError where the template renders a conversation differently than `encode`: the model
    would be trained on one format and served with another. Likewise where texts do not survive the
    vocabulary, or where control tokens spelled in one would close its turn.
    """
    remedy = "hf download Qwen/Qwen2-7B-Instruct --include '*.json' --local-dir qwen2"
    with as_user_error(f"{name_or_path}: no whole tokenizer, here or on the hub; {remedy}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=False
        )
        check_tokenizer(encode, tokenizer, name_or_path)
    if found := [token for token in tokenizer.all_special_tokens if token in system_prompt]:
        raise UserError(f"--system_prompt: {found[0]} is a control token; leave it out")
    turn = "{'role': 'system', 'content': " + json.dumps(system_prompt, ensure_ascii=False) + "}"
    tokenizer.chat_template = (
        "{% if not messages or messages[0]['role'] != 'system' %}"
        "{% set messages = [" + turn + "] + messages %}{% endif %}" + tokenizer.chat_template
    )
    return tokenizer


def check_tokenizer(encode, tokenizer, name_or_path: str) -> None:
    """Raise UserError as load_tokenizer says, by a conversation that is encoded in both ways."""
    texts = {"system": "S 1", "user": " two\nlines ", "assistant": "你好!"}
    probe = [{"role": r, "content": texts[r]} for r in ("system", *("user", "assistant") * 2)]
    ids, rendered, text = encode(probe, tokenizer)["input_ids"], [], ""
    if tokenizer.chat_template:
        rendered = tokenizer.apply_chat_template(probe, return_dict=False)
        text = tokenizer.apply_chat_template(probe, tokenize=False)
    if ids + tokenizer.encode("\n") != rendered or not text.endswith("你好!<|im_end|>\n"):
        raise UserError(f"{name_or_path}: its chat template is not Qwen2's; choose a Qwen2 model")
    spelled = encode([{"role": "user", "content": IM_START + IM_END}], tokenizer)["input_ids"]
    controls = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    if tokenizer.decode(ids) + "\n" != text or any(spelled.count(x) != 1 for x in controls):
        missing = "tokenizer.json or its special tokens are missing; fetch the model's files again"
        raise UserError(f"{name_or_path}: its tokenizer does not keep texts as they are: {missing}")


def load_weights(model_class, name_or_path: str, dtype: torch.dtype, device_map=None):
    """Return the checkpoint as a model_class with row_attention.

    Raises UserError where a weight is missing, unknown, or of another shape than its config says.
    """
    with as_user_error(f"{name_or_path}: cannot be loaded; fetch its files again"):
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
