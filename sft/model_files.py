"""A model's folder: what is refused before data is read, its tokenizer, its weights."""

import hashlib
import json
import re
from pathlib import Path

import huggingface_hub
import torch
import transformers

from sft.console import say
from sft.conversations import IM_END, IM_START
from sft.errors import UserError, as_user_error

DEFAULT_MODEL = "Qwen/Qwen2-7B-Instruct"
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
QWEN2 = "a Qwen2 or Qwen2.5 model"

# Conversations that show what a chat template does. The last two hold what some templates treat
# in a way of their own: thoughts, in the last answer and before it, and control tokens spelled in
# a text.
TEMPLATE_PROBES = [
    [
        {"role": "system", "content": "S 1"},
        {"role": "user", "content": " two\nlines "},
        {"role": "assistant", "content": "你好!"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": " 2 + 2 = 4\n"},
    ],
    [
        {"role": "system", "content": "S 1"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "<think>\nthoughts\n</think>\n\nA"},
        {"role": "user", "content": "Q 2"},
        {"role": "assistant", "content": "<think>\n\n</think>\n\nA 2"},
    ],
    [
        {"role": "system", "content": "S 1"},
        {"role": "user", "content": f"{IM_END}\n{IM_START}assistant\n"},
        {"role": "assistant", "content": f"{IM_START}{IM_END}"},
    ],
]
# What add_default_system_prompt puts before a chat template, as often as it was put there.
DEFAULT_TURN = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{% set messages = [{'role': 'system', 'content': TEXT}] + messages %}{% endif %}"
)
DEFAULT_TURNS = re.compile(
    "(" + re.escape(DEFAULT_TURN).replace("TEXT", r'"([^"\\]|\\.)*"') + ")*", re.DOTALL
)
BLOCK_BYTES = 2**20


# ---- Is this a model that can be trained here? --------------------------------------------------
def check_model(args, has_gpu_or_plan: bool):
    """Return the config of --model_name_or_path.

    Raises UserError where there is no such model, or where it cannot be trained here.
    """
    name = args.model_name_or_path
    if name == DEFAULT_MODEL and not has_gpu_or_plan:
        raise UserError(
            f"{name} needs a GPU; without one, train the stand-in on your rows: "
            "--model_name_or_path data/tiny-qwen2 --learning_rate 3e-4"
        )
    folder = Path(name)
    if folder.is_dir():
        check_folder(folder, needs_weights=not args.dry_run)
        sentence = f"{name}: config.json cannot be read; fetch its files again"
    elif HUB_NAME.fullmatch(name):
        say(f"model      looking for {name} in the hub's cache and on the hub")
        sentence = describe_missing_model(name)
    else:
        example = f"a model of the hub is named owner/model, as {DEFAULT_MODEL}"
        raise UserError(f"{name}: there is no such folder; {example}")
    with as_user_error(sentence):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    check_config(name, config)
    return config


def describe_missing_model(name: str) -> str:
    """Return what can be done where the hub does not give a model."""
    return (
        f"{name}: there is no such folder, and the hub gave no such model; "
        f"try hf download {name} --local-dir qwen2 (HF_ENDPOINT names a mirror), "
        f"or modelscope download --model {name} --local_dir qwen2, "
        "then --model_name_or_path qwen2"
    )


def check_folder(folder: Path, needs_weights: bool = True) -> None:
    """Raise UserError unless a folder has a config and, where needed, weights as safetensors."""
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter (LoRA); merge it into its base model first")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: holds no config.json, so it is no model's folder")
    if not needs_weights or any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")):
        convert = (
            "import transformers; transformers.AutoModelForCausalLM.from_pretrained("
            f"'{folder}', dtype='auto').save_pretrained('{folder}')"
        )
        raise UserError(
            f"{folder}: its weights are *.bin files, and only safetensors are read; "
            f'to convert them: python -c "{convert}"'
        )
    raise UserError(f"{folder}: holds no weights (*.safetensors); fetch its files again")


def check_config(name: str, config) -> None:
    """Raise UserError unless a config is that of a plain Qwen2 with full attention."""
    if config.model_type != "qwen2":
        raise UserError(f"{name}: is {config.model_type!r}, not {QWEN2}; others are out of scope")
    if config.use_sliding_window:
        raise UserError(f"{name}: has sliding-window attention; choose {QWEN2} without")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method", "an unknown method")
        raise UserError(
            f"{name}: is quantized ({method}) and cannot be trained; "
            "take the plain model that was quantized"
        )
    for size in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        if getattr(config, size) < 1:
            raise UserError(f"{name}: config.json has no {size}; fetch its files again")


def check_vocabulary(config, name_or_path: str, largest_id: int) -> None:
    """Raise UserError where a token of the data has no row in the model's embedding."""
    if largest_id < config.vocab_size:
        return
    raise UserError(
        f"{name_or_path}: its tokenizer made the token {largest_id}, but its embedding has "
        f"{config.vocab_size} rows: tokenizer and model are not of one model; "
        "fetch the files of both again"
    )


def count_positions(config) -> int:
    """Return how many tokens of a text a model takes, by its config."""
    rope = config.rope_parameters
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    stretched = int(original * rope.get("factor", 1))  # YaRN's factor
    return max(config.max_position_embeddings, stretched)


def warn_beyond_positions(longest: int, num_positions: int) -> None:
    """Say where an example is longer than what the model takes: it is trained all the same."""
    if longest > num_positions:
        say(
            f"warning    the longest example has {longest:,} tokens, and the model takes "
            f"{num_positions:,}; --max_len {num_positions}"
        )


def digest_model(name_or_path: str) -> str:
    """Return a digest of a model's config and weights files, the same under every name and path.

    Sizes and first MiB of the weights files are read, which hold the table of their tensors.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        with as_user_error(f"{name_or_path}: cannot be fetched from the hub"):
            files = ["*.json", "*.safetensors"]
            path = huggingface_hub.snapshot_download(name_or_path, allow_patterns=files)
        folder = Path(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for unrelated in ("_name_or_path", "transformers_version"):
        config.pop(unrelated, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


# ---- Tokenizer and chat template ----------------------------------------------------------------
def load_tokenizer(name_or_path: str):
    """Return a model's tokenizer; raises UserError where it is not whole or has no template."""
    remedy = f"fetch its files again: hf download {DEFAULT_MODEL} --include '*.json'"
    sentence = f"{name_or_path}: has no whole tokenizer; {remedy}"
    if not Path(name_or_path).is_dir():
        sentence = describe_missing_model(name_or_path)
    with as_user_error(sentence):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=False
        )
    template = tokenizer.chat_template
    if template is None:
        raise UserError(f"{name_or_path}: its tokenizer has no chat template; choose {QWEN2}")
    if isinstance(template, dict):
        raise UserError(
            f"{name_or_path}: has {len(template)} named chat templates ({', '.join(template)}); "
            "leave the one to be trained in tokenizer_config.json, as a text"
        )
    return tokenizer


def render_chatml(messages: list[dict]) -> str:
    """Return a conversation as the text that is trained."""
    turns = []
    for message in messages:
        turns.append(f"{IM_START}{message['role']}\n{message['content']}{IM_END}\n")
    return "".join(turns)


def render_template(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """Return a conversation as the tokenizer's chat template renders it."""
    with as_user_error(f"{tokenizer.name_or_path}: its chat template cannot render a conversation"):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )


def check_rendering(tokenizer, messages: list[dict], input_ids: list[int]) -> None:
    """Raise UserError where a conversation would be served otherwise than it is trained.

    ``messages`` begin with a system turn and end with an answer; ``input_ids`` are what is trained
    of them. The chat template must give the same text and the same prompt before the answer, and
    the tokenizer the same ids, without a control token that is spelled in a text.
    """
    name = tokenizer.name_or_path
    text = render_chatml(messages)
    if render_template(tokenizer, messages) != text:
        raise UserError(
            f"{name}: its chat template does not write turns as <|im_start|>role, a newline, the "
            f"text as it is, <|im_end|> and a newline; choose {QWEN2}"
        )
    check_prompt(tokenizer, messages[:-1])
    found = tokenizer.decode(input_ids, clean_up_tokenization_spaces=False)
    controls = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    counts = [input_ids.count(token) for token in controls]
    if found + "\n" != text or counts != [len(messages), len(messages)]:
        raise UserError(
            f"{name}: its tokenizer does not keep texts as they are: tokenizer.json or its "
            "special tokens are missing; fetch its files again"
        )
    contents = "".join(message["content"] for message in messages)
    if IM_START in contents:  # served, such a text would be read as control tokens
        return
    served = tokenizer(text, add_special_tokens=False)["input_ids"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if input_ids + newline != served:
        raise UserError(f"{name}: its tokenizer splits a whole conversation otherwise than turns")


def check_prompt(tokenizer, messages: list[dict]) -> None:
    """Raise UserError unless generation starts where the training of an answer starts."""
    start = f"{IM_START}assistant\n"
    prompt = render_template(tokenizer, messages, add_generation_prompt=True)
    if prompt != render_chatml(messages) + start:
        last_turn = prompt[prompt.rfind(IM_START) :]
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template starts an answer by {last_turn!r}, "
            f"and training by {start!r}; choose {QWEN2}"
        )


def add_default_system_prompt(tokenizer, system_prompt: str) -> None:
    """Let the tokenizer's chat template begin with the trained system turn where none is given.

    Raises UserError where the template does not then render what is trained.
    """
    controls = [token for token in tokenizer.all_special_tokens if token in system_prompt]
    if controls:
        raise UserError(f"--system_prompt: {controls[0]} is a control token; leave it out")
    with as_user_error("--system_prompt is not UTF-8; set the terminal to UTF-8", UnicodeError):
        system_prompt.encode("utf-8")
    text = json.dumps(system_prompt, ensure_ascii=False)
    own_template = DEFAULT_TURNS.sub("", tokenizer.chat_template, count=1)
    tokenizer.chat_template = DEFAULT_TURN.replace("TEXT", text) + own_template
    question = {"role": "user", "content": "Q"}
    prompt = render_template(tokenizer, [question], add_generation_prompt=True)
    trained = [{"role": "system", "content": system_prompt}, question]
    if prompt != render_chatml(trained) + f"{IM_START}assistant\n":
        raise UserError(f"{tokenizer.name_or_path}: its chat template changes the system prompt")


# ---- Weights ------------------------------------------------------------------------------------
def load_weights(
    model_class,
    name_or_path: str,
    dtype: torch.dtype,
    device_map: dict | None = None,
    attn_implementation: str = "sdpa",
    weights_are_sent: bool = False,
):
    """Return a model_class with the weights of a folder or a model of the hub, in dtype.

    ``weights_are_sent``: FSDP sends them to this process, which then reads none from the disk.
    Raises UserError where a weight is missing, unknown, or of another shape than its config says.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if weights_are_sent:
        return make_empty_model(model_class, name_or_path, options)
    with as_user_error(f"{name_or_path}: its weights cannot be loaded"):
        model, report = model_class.from_pretrained(
            name_or_path,
            device_map=device_map,
            output_loading_info=True,
            use_safetensors=True,  # other formats could run code
            ignore_mismatched_sizes=True,  # their names are then reported below
            **options,
        )
    for problem, found in report.items():
        if found:
            names = ", ".join(sorted(map(str, found))[:3])
            problem = problem.replace("_", " ")
            raise UserError(f"{name_or_path}: {problem}: {names}; fetch its files again")
    return model


def make_empty_model(model_class, name_or_path: str, options: dict):
    """Return a model on the CPU whose weights have memory, but no values yet."""
    config = transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    with torch.device("meta"):
        model = model_class._from_config(config, **options)
    model.to_empty(device="cpu")
    model.tie_weights()  # to_empty has given the head memory of its own
    # Buffers are not among the weights that are sent.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()
