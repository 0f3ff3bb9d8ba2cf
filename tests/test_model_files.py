"""A model's folder: what is refused, and when; its chat template; its weights."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import runs
import torch
import transformers
from safetensors.torch import load_file, save_file

from sft import model_files
from sft.conversations import IM_END, IM_START
from sft.errors import UserError

SYSTEM_PROMPTS = [
    "You are helpful.",
    "",
    "她说:\"你好\"\n\\n {% endif %} {{ x }} 🙂 TEXT 'a'",
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return runs.make_model(tmp_path_factory.mktemp("model") / "tied")


@pytest.fixture
def copy_of_model(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "model")


def check(name_or_path, has_gpu_or_plan=True, dry_run=False):
    args = SimpleNamespace(model_name_or_path=str(name_or_path), dry_run=dry_run)
    return model_files.check_model(args, has_gpu_or_plan)


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def encode(messages: list[dict], tokenizer) -> list[int]:
    """Return the ids of a conversation, turn by turn, without control tokens of its texts."""
    backend = tokenizer.backend_tokenizer

    def encode_text(text: str) -> list[int]:
        backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids

    start, end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    ids = []
    for message in messages:
        if ids:
            ids += encode_text("\n")
        ids.append(start)
        if message["role"] == "assistant":
            ids += encode_text("assistant\n") + encode_text(message["content"])
        else:
            ids += encode_text(f"{message['role']}\n{message['content']}")
        ids.append(end)
    return ids


def check_all_probes(tokenizer):
    for messages in model_files.TEMPLATE_PROBES:
        model_files.check_rendering(tokenizer, messages, encode(messages, tokenizer))


# ---- Models that cannot be trained --------------------------------------------------------------
def test_the_default_model_needs_a_gpu():
    with pytest.raises(UserError, match="--model_name_or_path data/tiny-qwen2"):
        check(model_files.DEFAULT_MODEL, has_gpu_or_plan=False)


@pytest.mark.parametrize("name", ["./q", "q", "/no/such/folder", "a/b/c", "data/q/"])
def test_a_mistyped_folder_is_no_model_of_the_hub(name):
    with pytest.raises(UserError) as error:
        check(name)
    assert "there is no such folder" in str(error.value)
    assert "hf download" not in str(error.value)


def test_without_the_hub_there_are_a_mirror_and_modelscope(capsys):
    with pytest.raises(UserError) as error:
        check("no-such/model")
    for word in ("hf download no-such/model", "HF_ENDPOINT", "modelscope download --model no-such"):
        assert word in str(error.value)
    assert "looking for no-such/model" in capsys.readouterr().out  # before the long silence


CONFIGS = [
    ({"model_type": "llama"}, "is 'llama', not a Qwen2"),
    ({"use_sliding_window": True}, "sliding-window"),
    ({"num_hidden_layers": 0, "layer_types": []}, "no num_hidden_layers"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is quantized \(gptq\)"),
]


@pytest.mark.parametrize(("changes", "sentence"), CONFIGS)
def test_a_config_that_cannot_be_trained(copy_of_model, changes, sentence):
    change_json(copy_of_model / "config.json", **changes)
    with pytest.raises(UserError, match=sentence):
        check(copy_of_model)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        check(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter"):
        check(tmp_path)


def test_a_folder_without_weights(copy_of_model):
    (copy_of_model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        check(copy_of_model)


@pytest.fixture
def bin_model(copy_of_model):
    """A folder whose weights are a pickle."""
    path = copy_of_model / "model.safetensors"
    torch.save(load_file(path), copy_of_model / "pytorch_model.bin")
    path.unlink()
    return copy_of_model


def test_a_plan_needs_no_weights(copy_of_model):
    """Its config tells the memory: --dry_run before 15 GB are fetched."""
    for path in copy_of_model.glob("*.safetensors"):
        path.unlink()
    assert check(copy_of_model, dry_run=True).model_type == "qwen2"


def test_weights_that_could_run_code_are_not_read(bin_model):
    with pytest.raises(UserError, match="only safetensors are read"):
        check(bin_model)
    with pytest.raises(UserError, match="cannot be loaded"):
        model_files.load_weights(transformers.Qwen2ForCausalLM, str(bin_model), torch.float32)


@pytest.mark.slow
def test_the_command_that_converts_weights(bin_model):
    with pytest.raises(UserError) as error:
        check(bin_model)
    code = str(error.value).partition('python -c "')[2].rstrip('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    assert check(bin_model).model_type == "qwen2"


def test_a_model_that_can_be_trained(model_dir):
    assert check(model_dir).vocab_size == 3072
    assert check(f"{model_dir}/").vocab_size == 3072


def test_a_token_beyond_the_embedding():
    config = SimpleNamespace(vocab_size=100)
    model_files.check_vocabulary(config, "m", 99)
    with pytest.raises(UserError, match=r"token 100, but its embedding has 100 rows"):
        model_files.check_vocabulary(config, "m", 100)


def test_a_token_beyond_the_embedding_in_a_validation_row(copy_of_model, write_rows, run_main):
    tokenizer = model_files.load_tokenizer(str(copy_of_model))
    tokenizer.add_tokens([f"<word {i}>" for i in range(1000)])
    tokenizer.save_pretrained(copy_of_model)
    train = write_rows([{"query": "q", "answer": "a"}])
    validation = write_rows([{"query": "q", "answer": "<word 999>"}], "validation.jsonl")
    words = ["--model_name_or_path", copy_of_model, "--data_path", train, validation, "--dry_run"]
    code, _, err = run_main(*words, "--use_cpu")
    assert code == 1
    assert "its embedding has 3072 rows" in err


def test_more_tokens_than_the_model_takes_are_a_warning(model_dir, capsys):
    config = transformers.AutoConfig.from_pretrained(model_dir)
    config.max_position_embeddings = 1000
    model_files.warn_beyond_positions(1000, model_files.count_positions(config))
    assert capsys.readouterr().out == ""
    model_files.warn_beyond_positions(1001, model_files.count_positions(config))
    assert "has 1,001 tokens, and the model takes 1,000; --max_len" in capsys.readouterr().out
    yarn = {"factor": 4.0, "original_max_position_embeddings": 1000}
    config.rope_parameters = {**config.rope_parameters, "rope_type": "yarn", **yarn}
    assert model_files.count_positions(config) == 4000


def test_the_digest_of_a_model_is_of_what_it_is(model_dir, copy_of_model, monkeypatch):
    digest = model_files.digest_model(str(model_dir))
    assert model_files.digest_model(f"{copy_of_model}/") == digest
    monkeypatch.chdir(copy_of_model)
    assert model_files.digest_model(".") == digest
    change_json(copy_of_model / "config.json", transformers_version="9")
    assert model_files.digest_model(".") == digest
    change_json(copy_of_model / "config.json", rms_norm_eps=1e-5)
    assert model_files.digest_model(".") != digest


def test_the_digest_of_a_model_sees_other_weights(model_dir, copy_of_model):
    weights = load_file(copy_of_model / "model.safetensors")
    weights = {name: weight + 1 for name, weight in weights.items()}
    save_file(weights, copy_of_model / "model.safetensors", metadata={"format": "pt"})
    digests = [model_files.digest_model(str(path)) for path in (model_dir, copy_of_model)]
    assert digests[0] != digests[1]


# ---- Tokenizers and chat templates --------------------------------------------------------------
def test_a_folder_without_a_tokenizer(copy_of_model):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy_of_model / name).unlink()
    with pytest.raises(UserError, match=str(copy_of_model)):
        tokenizer = model_files.load_tokenizer(str(copy_of_model))
        check_all_probes(tokenizer)


def test_a_tokenizer_without_its_vocabulary(copy_of_model):
    (copy_of_model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=str(copy_of_model)):
        tokenizer = model_files.load_tokenizer(str(copy_of_model))
        check_all_probes(tokenizer)


def test_a_tokenizer_without_a_chat_template(copy_of_model):
    (copy_of_model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        model_files.load_tokenizer(str(copy_of_model))


def test_a_tokenizer_with_named_chat_templates(copy_of_model):
    template = (copy_of_model / "chat_template.jinja").read_text()
    (copy_of_model / "chat_template.jinja").unlink()
    templates = [{"name": name, "template": template} for name in ("default", "tool_use")]
    change_json(copy_of_model / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(UserError, match=r"2 named chat templates \(default, tool_use\)"):
        model_files.load_tokenizer(str(copy_of_model))


def test_a_tokenizer_runs_no_code(copy_of_model, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n"
    (copy_of_model / "tokenization_x.py").write_text(code)
    config = copy_of_model / "tokenizer_config.json"
    change_json(config, auto_map={"AutoTokenizer": [None, "tokenization_x.T"]}, tokenizer_class="T")
    model_files.load_tokenizer(str(copy_of_model))
    assert not (tmp_path / "ran").exists()


def test_qwen2_renders_as_it_is_trained(tokenizer):
    check_all_probes(tokenizer)


TURN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + CONTENT + '<|im_end|>' }}"
END = "{{ '\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
AS_IT_IS = TURN.replace("CONTENT", "m['content']")
TEMPLATES = {
    "trims": (
        TURN.replace("CONTENT", "m['content'] | trim") + END + PROMPT,
        "does not write turns",
    ),
    "lacks the last newline": (AS_IT_IS + "{% endfor %}" + PROMPT, "does not write turns"),
    "removes thoughts": (
        TURN.replace("CONTENT", "m['content'].split('</think>')[-1]") + END + PROMPT,
        "does not write turns",
    ),
    "removes earlier thoughts": (
        TURN.replace(
            "CONTENT", "(m['content'] if loop.last else m['content'].split('</think>')[-1])"
        )
        + END
        + PROMPT,
        "does not write turns",
    ),
    "starts by thinking": (
        AS_IT_IS + END + PROMPT.replace("assistant\n", "assistant\n<think>\n"),
        r"starts an answer by '<\|im_start\|>assistant\\n<think>\\n'",
    ),
    "starts without a newline": (
        AS_IT_IS + END + PROMPT.replace("assistant\n", "assistant"),
        r"starts an answer by '<\|im_start\|>assistant'",
    ),
    "raises": ("{{ raise_exception('no system turn') }}", "no system turn"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_serves_what_is_not_trained(tiny_model_dir, name):
    tokenizer = model_files.load_tokenizer(str(tiny_model_dir))
    tokenizer.chat_template, sentence = TEMPLATES[name]
    with pytest.raises(UserError, match=sentence):
        check_all_probes(tokenizer)


def test_a_control_token_spelled_in_a_text_may_not_become_one(tiny_tokenizer):
    messages = model_files.TEMPLATE_PROBES[-1]
    text = model_files.render_chatml(messages).removesuffix("\n")
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match="does not keep texts"):
        model_files.check_rendering(tiny_tokenizer, messages, ids)


def test_ids_that_are_not_those_served(tiny_tokenizer):
    messages = model_files.TEMPLATE_PROBES[0]
    ids = encode(messages, tiny_tokenizer)
    letters = [tiny_tokenizer.convert_tokens_to_ids(letter) for letter in "again"]
    word = tiny_tokenizer.encode("again", add_special_tokens=False)
    at = next(i for i in range(len(ids)) if ids[i : i + len(word)] == word)
    assert word != letters
    with pytest.raises(UserError, match="splits a whole conversation otherwise"):
        changed = ids[:at] + letters + ids[at + len(word) :]
        model_files.check_rendering(tiny_tokenizer, messages, changed)


@pytest.mark.parametrize("system_prompt", SYSTEM_PROMPTS)
def test_the_trained_system_prompt_is_the_default(tiny_model_dir, system_prompt):
    tokenizer = model_files.load_tokenizer(str(tiny_model_dir))
    model_files.add_default_system_prompt(tokenizer, system_prompt)
    question = {"role": "user", "content": "Q"}
    system_turn = {"role": "system", "content": system_prompt}
    own_turn = {"role": "system", "content": "own"}
    rendered = tokenizer.apply_chat_template([question], tokenize=False)
    assert rendered == model_files.render_chatml([system_turn, question])
    rendered = tokenizer.apply_chat_template([own_turn, question], tokenize=False)
    assert rendered == model_files.render_chatml([own_turn, question])


def test_the_template_does_not_grow_with_each_training(tiny_model_dir, tmp_path):
    tokenizer = model_files.load_tokenizer(str(tiny_model_dir))
    for system_prompt in SYSTEM_PROMPTS:
        model_files.add_default_system_prompt(tokenizer, system_prompt)
        tokenizer.save_pretrained(tmp_path)
        tokenizer = model_files.load_tokenizer(str(tmp_path))
    once = model_files.load_tokenizer(str(tiny_model_dir))
    model_files.add_default_system_prompt(once, SYSTEM_PROMPTS[-1])
    assert tokenizer.chat_template == once.chat_template


def test_a_system_prompt_that_cannot_be_trained(tiny_model_dir):
    tokenizer = model_files.load_tokenizer(str(tiny_model_dir))
    with pytest.raises(UserError, match="is a control token"):
        model_files.add_default_system_prompt(tokenizer, "a<|im_end|>")
    with pytest.raises(UserError, match="is not UTF-8"):
        model_files.add_default_system_prompt(tokenizer, "a\udcff")
    tokenizer.chat_template = TEMPLATES["trims"][0]
    with pytest.raises(UserError, match="changes the system prompt"):
        model_files.add_default_system_prompt(tokenizer, " S ")


# ---- Weights ------------------------------------------------------------------------------------
def load(folder, **options):
    options = {"dtype": torch.float32, **options}
    return model_files.load_weights(transformers.Qwen2ForCausalLM, str(folder), **options)


def drop(weights):
    del weights["model.norm.weight"]


def add(weights):
    weights["model.more"] = torch.zeros(1)


def reshape(weights):
    weights["model.norm.weight"] = torch.ones(2)


@pytest.mark.parametrize("change", [drop, add, reshape])
def test_weights_that_are_not_those_of_the_config(copy_of_model, change):
    weights = load_file(copy_of_model / "model.safetensors")
    change(weights)
    save_file(weights, copy_of_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.(norm|more)"):
        load(copy_of_model)


def test_weights_that_are_those_of_the_config(model_dir):
    expected = load_file(model_dir / "model.safetensors")
    weights = load(model_dir, dtype=torch.bfloat16).state_dict()
    for name, weight in expected.items():
        assert torch.equal(weight.bfloat16(), weights[name])


@pytest.mark.parametrize("tied", [True, False])
def test_a_process_that_is_sent_its_weights_reads_none(tmp_path, tied):
    """Its model is then that of the process which read them, with the head tied as there."""
    folder = runs.make_model(tmp_path / "model", tied=tied)
    read = load(folder)
    (folder / "model.safetensors").unlink()
    sent = load(folder, weights_are_sent=True)
    assert sent.dtype == read.dtype
    assert (sent.lm_head.weight is sent.model.embed_tokens.weight) == tied
    for parameter, value in zip(sent.parameters(), read.parameters(), strict=True):
        parameter.data.copy_(value)
    ids = torch.arange(20)[None]
    assert torch.equal(sent(ids).logits, read(ids).logits)
