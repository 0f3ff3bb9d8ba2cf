"""A small Qwen2 with random weights, and micro-batches of random tokens for it."""

import accelerate
import numpy as np
import torch
import transformers

import sft_qwen2
from sft_qwen2 import IGNORE_INDEX

VOCAB_SIZE = 256


def make_model(
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 3,
    hidden_size: int = 32,
    num_heads: int = 4,
    intermediate_size: int | None = None,
) -> sft_qwen2.Qwen2ForCausalLM:
    """Return a model in training mode on the CPU, with the same weights each time."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    model = sft_qwen2.Qwen2ForCausalLM._from_config(
        config, dtype=dtype, attn_implementation="packed_attention"
    )
    return model.train()


def recompute_layers(model) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def spread_layers(model, layers_by_device: list[int], device_type: str) -> None:
    """Put so many layers in a row on each device, with accelerate's hooks between the devices.

    The embedding is on the first device, norm and head are on the last, or tied on the first.
    """
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0}
    number = 0
    for device, num_layers in enumerate(layers_by_device):
        for _ in range(num_layers):
            device_map[f"model.layers.{number}"] = device
            number += 1
    head_device = len(layers_by_device) - 1
    if model.config.tie_word_embeddings:
        head_device = 0
    device_map["model.norm"] = head_device
    device_map["lm_head"] = head_device
    accelerate.dispatch_model(
        model,
        {name: f"{device_type}:{device}" for name, device in device_map.items()},
        main_device=f"{device_type}:0",
        skip_keys=model._skip_keys_device_placement,
    )


def make_micro_batches(number: int, num_tokens: int = 24) -> list[dict]:
    """Return micro-batches of two examples each, whose second half is trained."""
    random = np.random.default_rng(0)
    micro_batches = []
    for _ in range(number):
        first = num_tokens // 3
        examples = [make_example(random, first), make_example(random, num_tokens - first)]
        micro_batches.append(sft_qwen2.flatten(examples))
    return micro_batches


def make_example(random: np.random.Generator, num_tokens: int) -> dict:
    input_ids = random.integers(0, VOCAB_SIZE, num_tokens)
    labels = input_ids.copy()
    labels[: num_tokens // 2] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}


def count_targets(micro_batches: list[dict]) -> int:
    return sum(len(micro_batch["targets"]) for micro_batch in micro_batches)


def take_gradients(model) -> dict[str, torch.Tensor]:
    """Return the gradients by the names of their parameters, on the CPU; the model loses them."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients[name] = parameter.grad.cpu()
        parameter.grad = None
    return gradients


def run_one_by_one(model, micro_batches: list[dict], divisor: float) -> list[torch.Tensor]:
    """Run each micro-batch forward and back by the model's own forward; return the losses."""
    losses = []
    for micro_batch in micro_batches:
        loss = model(**micro_batch, num_items_in_batch=divisor)["loss"]
        loss.backward()
        losses.append(loss.detach())
    return losses


def run_in_windows(pipeline, micro_batches, divisor, window: int) -> list[torch.Tensor]:
    """Run micro-batches forward and back, `window` of them at once; return the losses."""
    placed = [pipeline.place(micro_batch) for micro_batch in micro_batches]
    losses = []
    for first in range(0, len(placed), window):
        losses += pipeline.run(placed[first : first + window], divisor, backward=True)
    return losses
