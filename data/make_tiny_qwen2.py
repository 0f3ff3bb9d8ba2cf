"""Make data/tiny-qwen2, a stand-in for Qwen2-7B-Instruct that trains on any laptop.

    python data/make_tiny_qwen2.py

It is a Qwen2 in every respect but size: its own byte-level BPE vocabulary, learned from
data/train.jsonl with Qwen2's pre-tokenization pattern and control tokens, and random weights.
Whatever it says after training, it learned from data/train.jsonl.
"""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

DATA = Path(__file__).parent
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# How Qwen2 cuts text before BPE: contractions, words, digits, punctuation, line ends, spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def texts():
    for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for turn in row.get("messages", []):
            yield turn["content"]
        yield from (row[key] for key in ("system", "query", "answer") if key in row)


def make_tokenizer(vocab_size: int) -> Qwen2Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROL_TOKENS,
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        bos_token=None,
        additional_special_tokens=CONTROL_TOKENS[1:],
        model_max_length=32768,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main() -> None:
    tokenizer = make_tokenizer(vocab_size=2048)
    endoftext, _, im_end = tokenizer.convert_tokens_to_ids(CONTROL_TOKENS)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        initializer_range=0.08,  # 0.02 is for models a hundred times as wide
        bos_token_id=endoftext,
        eos_token_id=im_end,
        pad_token_id=endoftext,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=endoftext, pad_token_id=endoftext, eos_token_id=[im_end, endoftext]
    )
    model.save_pretrained(DATA / "tiny-qwen2")
    tokenizer.save_pretrained(DATA / "tiny-qwen2")
    print(f"{DATA / 'tiny-qwen2'}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
