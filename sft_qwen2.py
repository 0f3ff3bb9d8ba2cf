"""Supervised fine-tuning (SFT) of Qwen2 on questions and answers: one script, read top to bottom.

    python sft_qwen2.py                                 # Qwen2-7B-Instruct on data/train.jsonl
    python sft_qwen2.py configs/tiny.json               # the stand-in model, on any laptop
    python sft_qwen2.py run.json --learning_rate 2e-5   # arguments from a file, flags on top
    torchrun --nproc_per_node gpu sft_qwen2.py          # one process for each GPU, in shards

A line of data is a conversation: {"query": "...", "answer": "..."}, optionally with "system", or
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}.

What is trained. The tokens of each answer and the <|im_end|> after it. All other tokens are
context: their label is -100. Answers with a "weight" of 0 (it is 0 or 1) are context, too; with
--train_on last, all answers but the last. An example that is cut to max_len has no <|im_end|> at
its end.

How a step is computed. An optimizer step takes a set of examples: per_device_train_batch_size x
gradient_accumulation_steps x number of processes (the last step of an epoch: what is left). The set
is cut into micro-batches of at most `tokens_per_forward` tokens. The examples of a micro-batch lie
end to end, without padding, and attention stays inside each example. The loss is summed over the
trained tokens and divided by the number of trained tokens of the whole step, over all micro-batches
and processes. So the cut changes memory and speed, and the result no more than the rounding of sums
does.

Where the model lies. On one device; in one process on several GPUs, which work on different
micro-batches at once (sft/pipeline.py); or in shards, one in each process of torchrun (FSDP2). What
a GPU cannot hold of the optimizer and the gradients lies in host memory (sft/host_memory.py).

In which number formats (sft/precision.py).
    GPUs since Ampere    weights and products in bf16; with --fp32, or an --optim other than 8-bit
                         AdamW, weights in fp32 and products in bf16 by autocast
    older GPUs (V100)    weights in fp32, products in fp16 by autocast
    CPU                  all in fp32

What happens when ...
    memory runs out      in a forward or backward pass, one process does the step again with less
                         at once: micro-batches in flight, tokens, kept layers; several processes
                         stop, and name the remedy
    a loss or a gradient is not finite
                         the run stops before the weights change, and names the step's examples
                         (in fp16 up to 20 steps in a row with infinite gradients are skipped)
    Ctrl-C, SIGTERM      while it trains, the run saves a checkpoint after the step and stops;
                         an evaluation is left, and --resume begins with it
                         (sft/checkpoints.py)
    the disk is full     the checkpoint is lost, earlier ones are whole, training goes on
                         (sft/checkpoints.py); an export that fails is tried again for an hour if
                         no checkpoint has the trained weights
    --resume             the run goes on from its last checkpoint, if all that decides what is
                         learnt is the same (`make_fingerprint`). On the same machine, with the
                         same cut, it goes on bit for bit

Validation examples are evaluated before the first step and after the last one, and in between as
--eval_strategy says.

Shapes: T tokens of an example or micro-batch, E examples, N trained tokens, H query heads, K
key/value heads, D head size, C hidden size, V vocabulary.
"""

import dataclasses
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sft.startup import announce_start, set_environment

set_environment()  # PyTorch reads these settings when it is imported.
if __name__ == "__main__":
    announce_start()

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import tqdm
import transformers
from accelerate.utils import AutocastKwargs
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.attention.varlen import varlen_attn

from sft.checkpoints import CheckpointTrainer, export_checkpoint
from sft.command_line import check_schedule, drop_foreign_environment, option, parse
from sft.console import outlive_console, quiet_libraries, say
from sft.conversations import IM_END, IM_START
from sft.data_files import find_data_files, read_records
from sft.devices import check_machine
from sft.encoding_cache import EncodingCache
from sft.errors import UserError
from sft.examples import (
    ENCODED_FEATURES,
    IGNORE_INDEX,
    Examples,
    make_token_columns,
    mark_trained_tokens,
    parse_records,
    print_counts,
    select_examples,
    split_examples,
    warn_of_shared_rows,
    write_rejected,
)
from sft.export import rehearse_export
from sft.host_memory import HostMemoryTrainer
from sft.memory_model import LOSS_CHUNK_TOKENS
from sft.model_files import (
    TEMPLATE_PROBES,
    add_default_system_prompt,
    check_model,
    check_rendering,
    check_vocabulary,
    count_positions,
    digest_model,
    load_tokenizer,
    load_weights,
    warn_beyond_positions,
)
from sft.optimizer import check_optimizer, optimizer_class_and_options
from sft.pipeline import Pipeline, cut_windows
from sft.plan import Plan, check_plan, plan_run
from sft.plan_report import print_plan
from sft.precision import name_format
from sft.reporting import set_up_reporting, wandb_run
from sft.run_record import (
    add_to_record,
    check_output_dir,
    describe_progress,
    open_run,
    read_record,
)
from sft.sample_answers import answer_questions, choose_questions, print_answers
from sft.signals import StopOnSignal, explain_failures
from sft.step_time import count_examples_per_step, count_steps, training_flops
from sft.throughput import Throughput


# ---- Options ------------------------------------------------------------------------------------
@dataclass(kw_only=True)
class SFTArguments:
    """All options: the name that transformers uses, the default, and what --help says.

    A number of steps below 1 is a share of all steps. `group` begins a section of --help.
    """

    model_name_or_path: str = option(
        "Qwen/Qwen2-7B-Instruct",
        "Hub name or folder of a Qwen2 or Qwen2.5 model.",
        group="Model and data",
        is_path=True,
    )
    data_path: list[str] = option(
        ["data/"],
        "Data files, or folders with train.* and validation.* files.",
        is_path=True,
    )
    system_prompt: str = option(
        "你是一个知识渊博的人,请根据问题做出全面且正确的回答。",
        "System turn where a record has none; default of the export, too.",
    )
    max_len: int = option(
        8192, "Longest example in tokens, prompt and answer together.", at_least=1
    )
    overflow_strategy: str = option(
        "truncate",
        "A longer example loses its end, is left out, or stops the run.",
        choices=("truncate", "drop", "error"),
    )
    train_on: str = option(
        "all", "Train all answers of a conversation, or the last.", choices=("all", "last")
    )
    skip_bad_rows: bool = option(False, "Leave refused records out, and list them in a file.")

    num_train_epochs: float = option(
        1.0, "Passes over all examples.", group="Length of training", above=0
    )
    max_steps: int = option(-1, "Number of optimizer steps; -1: epochs decide.", at_least=1)
    per_device_train_batch_size: int = option(
        4, "Times the next number, times processes: a step's examples.", at_least=1
    )
    gradient_accumulation_steps: int = option(32, "Multiplies the examples of a step.", at_least=1)
    seed: int = option(42, "Decides all that is random.", at_least=0, at_most=2**32 - 1)
    data_seed: int | None = option(
        None, "Decides the order of examples; else seed does.", at_least=0, at_most=2**32 - 1
    )

    learning_rate: float = option(1e-5, "Highest learning rate.", group="Optimizer", at_least=0)
    lr_scheduler_type: str = option(
        "cosine",
        "How the learning rate changes after its warm-up.",
        choices=(
            "linear",
            "cosine",
            "constant",
            "constant_with_warmup",
            "cosine_with_restarts",
            "polynomial",
            "cosine_with_min_lr",
            "inverse_sqrt",
            "warmup_stable_decay",
        ),
    )
    lr_scheduler_kwargs: dict = option({}, "Numbers of that schedule, as a JSON object.")
    warmup_steps: float = option(
        0.03, "Steps of a rising learning rate; below 1: a share of all.", at_least=0
    )
    weight_decay: float = option(0.003, "How strongly weights are pulled to 0.", at_least=0)
    max_grad_norm: float = option(1.0, "Longer gradients are shortened; 0: never.", at_least=0)
    optim: str = option(
        "auto",
        "auto: 8-bit AdamW on a GPU, AdamW on the CPU and with fp32.",
        choices=("auto", "adamw_torch_8bit", "adamw_torch_fused", "adamw_torch", "adafactor"),
    )
    adam_beta1: float = option(0.9, "AdamW's mean of gradients.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's mean of squared gradients.", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "Added to AdamW's divisor.", above=0)

    fp32: bool = option(
        False, "fp32 weights and AdamW: 16 bytes a parameter.", group="Memory and devices"
    )
    gradient_checkpointing: bool = option(
        True, "Recompute layers where memory is short; false: never."
    )
    tokens_per_forward: int | None = option(
        None, "Most tokens at once; else what fits. Changes only rounding.", at_least=1
    )
    use_cpu: bool = option(False, "Leave GPUs alone.")
    ddp_timeout: int = option(
        1800, "Seconds after which processes give up on each other.", at_least=1
    )

    validation_split: float = option(
        0.0,
        "Share of the examples to evaluate on, without a validation file.",
        group="Evaluation",
        at_least=0,
        below=1,
    )
    eval_strategy: str = option(
        "no",
        "Evaluate during training, too: every eval_steps, or each epoch.",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: float | None = option(
        None, "Steps between evaluations; else logging_steps. Below 1: a share.", above=0
    )
    load_best_model_at_end: bool = option(False, "Export the weights of the lowest eval_loss.")
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a new best.", at_least=1
    )

    output_dir: str = option(
        "./outputs",
        "Where checkpoints, logs and the trained model go.",
        group="Checkpoints and logs",
        is_path=True,
    )
    save_strategy: str = option(
        "steps",
        "Save a checkpoint every save_steps, or each epoch.",
        choices=("no", "steps", "epoch"),
    )
    save_steps: float = option(5, "Steps between checkpoints; below 1: a share of all.", above=0)
    save_total_limit: int = option(2, "How many checkpoints are kept; 0: all.", at_least=0)
    logging_steps: float = option(1, "Steps between log lines; below 1: a share of all.", above=0)
    report_to: list[str] = option(
        ["wandb"],
        "wandb, none, or others if installed: wandb,tensorboard.",
        is_comma_separated=True,
    )
    run_name: str = option("qwen2-7B-sft", "Name of the run in these reports.")

    resume: bool = option(False, "Go on with the run in output_dir.", group="Instead of a new run")
    export: str | None = option(
        None, "Write this checkpoint as a model folder; train nothing.", is_path=True
    )
    dry_run: bool = option(False, "Read the data and plan; train and write nothing.")
    gpus: str | None = option(
        None, "With dry_run: plan for 4x80 GB, 2x80,1x40 or 4x32:fp16 (V100)."
    )


def make_training_arguments(args: SFTArguments) -> transformers.TrainingArguments:
    """Return Trainer's arguments: options of the same name, and what is the same in every run.

    Several processes share the model by FSDP2 on GPUs. On the CPU each has a whole one. Number
    formats and the optimizer are the plan's.
    """
    settings = {}
    trainer_names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    for name, value in vars(args).items():
        if name in trainer_names:
            settings[name] = value
    if "activation_checkpointing" in trainer_names:  # its new name, from transformers 5.23 on
        # args.gradient_checkpointing remains readable.
        settings.pop("gradient_checkpointing", None)
        settings["activation_checkpointing"] = args.gradient_checkpointing
    settings["optim"] = "adamw_torch"  # adapt_training_arguments sets that of the plan
    settings["logging_nan_inf_filter"] = False  # a loss that is NaN must be seen
    settings["disable_tqdm"] = True  # each step has a line
    settings["metric_for_best_model"] = "eval_loss"
    settings["greater_is_better"] = False
    # Early stopping counts on after a resume.
    settings["restore_callback_states_from_checkpoint"] = args.early_stopping_patience is not None
    if torch.backends.mps.is_available():  # Apple's GPUs are not tested.
        settings["use_cpu"] = True
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes > 1:
        settings.update(settings_of_processes(args))
    return transformers.TrainingArguments(**settings)


def settings_of_processes(args: SFTArguments) -> dict:
    """Return the settings by which several processes train together; on the CPU, let them meet."""
    if torch.cuda.is_available() and not args.use_cpu:
        # FSDP2. Each process saves its shard. One process of a machine reads the weights for all.
        config = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}
        return {"fsdp": True, "fsdp_config": config}
    # On the CPU TrainingArguments would start the group and ignore ddp_timeout.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=args.ddp_timeout))
    # Each forward pass uses all parameters. DDP would search for others at each step.
    return {"use_cpu": True, "ddp_backend": "gloo", "ddp_find_unused_parameters": False}


# ---- Encoding: which tokens are trained ---------------------------------------------------------
def encode(messages: list[dict], tokenizer) -> dict[str, list[int]]:
    """Return {"input_ids": [T], "labels": [T]} of one conversation, as encode_batch does."""
    return encode_batch([messages], tokenizer)[0]


def encode_batch(conversations: list[list[dict]], tokenizer) -> list[dict[str, list[int]]]:
    r"""Return {"input_ids": [T], "labels": [T]} of each conversation. ^ marks what is trained:

    <|im_start|>system\nS<|im_end|>\n
    <|im_start|>user\nQ<|im_end|>\n
    <|im_start|>assistant\nA<|im_end|>
                           ^^^^^^^^^^^
    Every assistant message is trained, unless its "weight" is 0.
    """
    texts = ["\n", "assistant\n"]
    for messages in conversations:
        for message in messages:
            texts.append(text_of_message(message))
    token_ids = encode_texts(texts, tokenizer)
    im_start, im_end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])

    examples = []
    for messages in conversations:
        input_ids = []
        labels = []
        for message in messages:
            is_answer = message["role"] == "assistant"
            opening = [im_start]
            if input_ids:
                opening = token_ids["\n"] + opening
            if is_answer:
                opening = opening + token_ids["assistant\n"]
            content = [*token_ids[text_of_message(message)], im_end]
            input_ids += opening + content
            labels += [IGNORE_INDEX] * len(opening)
            if is_answer and message.get("weight") != 0:
                labels += content
            else:
                labels += [IGNORE_INDEX] * len(content)
        examples.append({"input_ids": input_ids, "labels": labels})
    return examples


def text_of_message(message: dict) -> str:
    """Return the text of a message that is tokenized as one piece.

    An answer is tokenized apart from the "assistant\\n" before it, because generation starts there.
    """
    if message["role"] == "assistant":
        return message["content"]
    return f"{message['role']}\n{message['content']}"


def encode_texts(texts: list[str], tokenizer) -> dict[str, list[int]]:
    """Return the token ids of each text.

    A control token that is spelled in a text is encoded as the plain characters it consists of.
    Otherwise a row of data could open or close a turn.
    """
    unique_texts = list(dict.fromkeys(texts))
    backend = tokenizer.backend_tokenizer
    # Other calls of the tokenizer change these settings of its backend.
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch_fast(unique_texts, add_special_tokens=False)
    return {text: encoding.ids for text, encoding in zip(unique_texts, encodings)}


# ---- Data: from files to examples ---------------------------------------------------------------
def prepare_tokenizer(args: SFTArguments):
    """Return the tokenizer, whose chat template has the trained system prompt as its default.

    Raises UserError where the template renders a conversation otherwise than `encode` does: the
    model would be trained on one format and served with another.
    """
    tokenizer = load_tokenizer(args.model_name_or_path)
    for messages in TEMPLATE_PROBES:
        check_rendering(tokenizer, messages, encode(messages, tokenizer)["input_ids"])
    add_default_system_prompt(tokenizer, args.system_prompt)
    return tokenizer


def encode_records(batch: dict, tokenizer, system_prompt: str, train_on: str) -> dict[str, list]:
    """Return the columns of encoded records: input_ids, labels, and why a record is refused."""
    # With train_on="last" the other answers get a weight of 0.
    conversations, columns = parse_records(batch, system_prompt, train_on)
    encodings = encode_batch(conversations, tokenizer)
    columns.update(make_token_columns(conversations, encodings, tokenizer.backend_tokenizer))
    return columns


def encode_files(paths: list[Path], tokenizer, args: SFTArguments) -> datasets.Dataset:
    """Return the encoded records of all files. They are encoded once, and then kept on disk."""
    settings = {"system_prompt": args.system_prompt, "train_on": args.train_on}
    # The source of encode_files, and all that it calls, is part of the cache's key.
    cache = EncodingCache(paths, tokenizer.backend_tokenizer, settings, encode_files)
    with cache.lock():
        if not cache.is_complete:
            records = read_records(paths, cache.folder)
            # map() writes the file that cache.load() reads.
            records.map(
                encode_records,
                batched=True,
                fn_kwargs={"tokenizer": tokenizer, **settings},
                remove_columns=["text"],
                features=ENCODED_FEATURES,
                num_proc=cache.num_proc,
                cache_file_name=cache.file_name,
                desc="encoding",
            )
            cache.complete()
    return cache.load()


def load_examples(args: SFTArguments, tokenizer) -> dict[str, Examples]:
    """Return the examples to train on, and those to evaluate on. Print what became of all rows.

    The examples are cut to max_len here, once. Raises UserError for rows that are refused, unless
    skip_bad_rows leaves them out.
    """
    examples = {}
    for split, paths in find_data_files(args.data_path, args.validation_split).items():
        encoded = encode_files(paths, tokenizer, args)
        examples[split] = select_examples(
            encoded, paths, args.max_len, args.overflow_strategy, args.skip_bad_rows
        )
    if args.validation_split > 0:
        train, validation = split_examples(examples["train"], args.validation_split, args.seed)
        examples = {"train": train, "validation": validation}
    if args.eval_strategy != "no" and "validation" not in examples:
        raise UserError(
            "--eval_strategy needs validation rows: a file named validation.jsonl beside "
            "train.jsonl, or --validation_split 0.02"
        )
    for split, chosen in examples.items():
        print_counts(split, chosen.counts)
    if "validation" in examples:
        warn_of_shared_rows(examples["train"], examples["validation"])
    shortest = examples["train"][int(examples["train"].lengths.argmin())]
    print(f"example    {mark_trained_tokens(shortest, tokenizer, sys.stdout.isatty())}", flush=True)
    return examples


# ---- Micro-batches: the examples of an optimizer step, without padding --------------------------
class StepSampler(torch.utils.data.Sampler):
    """The example numbers of each optimizer step, in an order of the seed and the epoch."""

    def __init__(self, num_examples: int, examples_per_step: int, seed: int):
        self.num_examples = num_examples
        self.examples_per_step = examples_per_step
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.num_examples / self.examples_per_step)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_examples, generator=generator)
        for step in order.split(self.examples_per_step):
            yield step.tolist()


def seed_of_order(args) -> int:
    """Return the seed of the order of examples."""
    if args.data_seed is None:
        return args.seed
    return args.data_seed


def bin_by_tokens(
    lengths: list[int], tokens_per_forward: int, num_processes: int = 1
) -> list[list[int]]:
    """Return the indices of `lengths` in bins of at most tokens_per_forward tokens.

    First-fit decreasing: each example, the longest first, goes into the first bin with room. An
    example that is longer than tokens_per_forward has a bin of its own. The number of bins is a
    multiple of num_processes, because all processes must run the same number of forward passes.
    """
    bins = []
    free_tokens = []
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for index in longest_first:
        chosen = None
        for number, free in enumerate(free_tokens):
            if lengths[index] <= free:
                chosen = number
                break
        if chosen is None:
            chosen = len(bins)
            bins.append([])
            free_tokens.append(tokens_per_forward)
        bins[chosen].append(index)
        free_tokens[chosen] -= lengths[index]
    while len(bins) % num_processes != 0:
        bins.append(take_half_of_fullest(bins, lengths))
    return bins


def take_half_of_fullest(bins: list[list[int]], lengths: list[int]) -> list[int]:
    """Remove every second example from the fullest bin that has several; return them, or []."""
    fullest = []
    most_tokens = 0
    for indices in bins:
        num_tokens = sum(lengths[index] for index in indices)
        if len(indices) > 1 and num_tokens > most_tokens:
            fullest = indices
            most_tokens = num_tokens
    half = fullest[1::2]
    del fullest[1::2]
    return half


def flatten(examples: list[dict]) -> dict:
    """Return a micro-batch: the examples, which are NumPy arrays, laid end to end.

    input_ids, position_ids [1, T]: positions begin at 0 in each example.
    trained_positions, targets [N]: at position trained_positions[i] the model predicts targets[i].
    seq_lens: the number of tokens of each example, as a list. cu_seq_lens [E + 1]: their bounds.

    The trained positions are an index made on the host: a mask on the GPU would have to be counted
    there, and the host would wait for that.
    """
    input_ids = []
    position_ids = []
    trained_positions = []
    targets = []
    bounds = [0]
    for example in examples:
        num_tokens = len(example["input_ids"])
        # The hidden state of a position predicts the next token.
        next_labels = example["labels"][1:]
        trained = np.flatnonzero(next_labels != IGNORE_INDEX)
        input_ids.append(example["input_ids"])
        position_ids.append(np.arange(num_tokens))
        trained_positions.append(bounds[-1] + trained)
        targets.append(next_labels[trained])
        bounds.append(bounds[-1] + num_tokens)
    return {
        "input_ids": torch.from_numpy(np.concatenate(input_ids).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate(position_ids))[None],
        "trained_positions": torch.from_numpy(np.concatenate(trained_positions)),
        "targets": torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        "seq_lens": np.diff(bounds).tolist(),
        "cu_seq_lens": torch.tensor(bounds, dtype=torch.int32),
    }


# An empty bin is a forward pass, too: over one token that is not trained.
NO_EXAMPLE = {"input_ids": np.array([0]), "labels": np.array([IGNORE_INDEX])}


def collate(
    examples: list[dict], tokens_per_forward: int, rank: int = 0, num_processes: int = 1
) -> tuple[list[dict], int]:
    """Return (micro-batches of this process, number of trained tokens of the whole step).

    Every process reads all examples of the step and takes its share of the bins. So each process
    knows the divisor of the loss and the number of forward passes without communication.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    bins = bin_by_tokens(lengths, tokens_per_forward, num_processes)
    micro_batches = []
    for indices in bins[rank::num_processes]:
        chosen = [examples[index] for index in indices]
        micro_batches.append(flatten(chosen or [NO_EXAMPLE]))
    return micro_batches, count_trained_tokens(examples)


def count_trained_tokens(examples: list[dict]) -> int:
    """Return the number of tokens that have a label and a token before them."""
    num_tokens = 0
    for example in examples:
        num_tokens += int((example["labels"][1:] != IGNORE_INDEX).sum())
    return num_tokens


# ---- Attention: inside each example -------------------------------------------------------------
def packed_attention(
    module, query, key, value, attention_mask, seq_lens=None, cu_seq_lens=None, **kwargs
):
    """Return causal attention [1, T, H, D] inside each example, and None for the weights.

    query [1, H, T, D]; key, value [1, K, T, D]. This is a function of
    transformers.AttentionInterface. Without seq_lens, as in generation, transformers' sdpa runs.
    """
    if seq_lens is None:
        sdpa = transformers.AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    # Under autocast the rotary embeddings leave query and key in fp32.
    query = query.to(value.dtype)
    key = key.to(value.dtype)
    if has_varlen_kernel(query):
        output = varlen_attention(query, key, value, seq_lens, cu_seq_lens, kwargs["scaling"])
        return output, None
    if query.is_cuda:
        # PyTorch's other fused kernels want one key and value head for each query head.
        num_repeats = query.shape[1] // key.shape[1]
        key = repeat_heads(key, num_repeats)
        value = repeat_heads(value, num_repeats)
    outputs = []
    for q, k, v in zip(query.split(seq_lens, 2), key.split(seq_lens, 2), value.split(seq_lens, 2)):
        output = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=kwargs["scaling"],
            enable_gqa=True,  # on the CPU, where heads are not repeated
        )
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def has_varlen_kernel(query: torch.Tensor) -> bool:
    """Return whether PyTorch's FlashAttention runs for this tensor: on Ampere (8.0) and newer."""
    if query.dtype not in (torch.bfloat16, torch.float16) or not query.is_cuda:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def varlen_attention(query, key, value, seq_lens, cu_seq_lens, scale):
    """Return causal attention [1, T, H, D] inside each example, by FlashAttention in PyTorch."""
    longest = max(seq_lens)
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens,
        cu_seq_lens,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # all tokens before, none after: causal
        enable_gqa=True,
    )
    return output[None]


def repeat_heads(heads: torch.Tensor, num_repeats: int) -> torch.Tensor:
    """Return heads [1, K, T, D] as [1, K * num_repeats, T, D], copies of a head side by side."""
    return heads.repeat_interleave(num_repeats, dim=1)


transformers.AttentionInterface.register("packed_attention", packed_attention)
# Generation makes its masks as for sdpa.
transformers.AttentionMaskInterface.register(
    "packed_attention", transformers.AttentionMaskInterface()["sdpa"]
)


# ---- Loss: at trained positions only ------------------------------------------------------------
class Qwen2ForCausalLM(transformers.Qwen2ForCausalLM):
    """Qwen2 whose forward pass returns the loss of a micro-batch.

    The class has transformers' name, so that an export names the class that readers know.
    """

    def forward(
        self,
        input_ids=None,
        trained_positions=None,
        targets=None,
        num_items_in_batch=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Return {"loss": summed cross entropy of the targets [N] / num_items_in_batch}.

        Without targets this is transformers' forward pass. Generation looks for logits_to_keep in
        the signature.
        """
        if targets is None:
            return super().forward(input_ids, logits_to_keep=logits_to_keep, **kwargs)
        # packed_attention keeps examples apart without a mask. Only a dict stops the model from
        # making one.
        no_mask = {"full_attention": None}
        output = self.model(input_ids, attention_mask=no_mask, use_cache=False, **kwargs)
        loss_sum = self.answer_loss(output.last_hidden_state, trained_positions, targets)
        return {"loss": loss_sum / num_items_in_batch}

    def answer_loss(self, hidden_states, trained_positions, targets) -> torch.Tensor:
        """Return the summed cross entropy of hidden_states [1, T, C] at the trained positions.

        Only the N hidden states that have a target meet the head. It may be on another GPU.
        """
        # In shards only layers are gathered by themselves. The head is whole during this forward.
        head = self.lm_head.weight
        hidden = hidden_states.to(head.device)[0, trained_positions.to(head.device)]
        return cross_entropy_sum(hidden, head, targets.to(head.device))


def cross_entropy_sum(hidden, head, targets) -> torch.Tensor:
    """Return the summed cross entropy of logits hidden [N, C] @ head [V, C].T and targets [N].

    Logits exist for LOSS_CHUNK_TOKENS positions at once, never as [N, V]. The sum is fp32.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden = hidden.to(dtype)
        head = head.to(dtype)
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=LOSS_CHUNK_TOKENS,
        chunking_method=None,  # cut by this size alone
        acc_policy="compact",  # no fp32 copy of the head's gradient
        acc_dtype=torch.float32,  # of the softmax; in fp16 of its sum alone
    )
    # A sum in half precision would keep 8 or 11 bits. Single losses are rounded, and then summed
    # in fp32, where their errors cancel out. The backward pass rounds the divisor, alike for all
    # tokens of a step.
    reduction = "none"
    if hidden.dtype == torch.float32:
        reduction = "sum"
    with torch.autocast(device_type, enabled=False):  # it would choose fp32
        losses = F.linear_cross_entropy(hidden, head, targets, reduction=reduction, options=options)
        return losses.float().sum()


# ---- Trainer: one optimizer step over a set of examples -----------------------------------------
MAX_CONSECUTIVE_SKIPS = 20  # fp16: the loss scale begins too high and halves at each skipped step


def make_step(examples: list[dict]) -> dict:
    """Return what Trainer takes for a batch: all examples of an optimizer step.

    An example is {"input_ids", "labels": NumPy arrays [T], "source": its file and line}.
    """
    return {"examples": examples}


class SFTTrainer(CheckpointTrainer, HostMemoryTrainer):
    """A Trainer for which a batch is all examples of an optimizer step, in all processes.

    CheckpointTrainer saves, resumes and exports. HostMemoryTrainer keeps the optimizer's state, or
    gradients, too, in host memory where the plan says so.
    """

    def __init__(self, *, plan: Plan, examples_per_step: int, **kwargs):
        super().__init__(data_collator=make_step, in_host_memory=plan.in_host_memory, **kwargs)
        self.examples_per_step = examples_per_step
        self.tokens_per_forward = plan.tokens_per_forward
        self.max_tokens_without_checkpointing = plan.max_tokens_without_checkpointing
        # A window is all micro-batches that several GPUs of one process work on at once.
        self.window_tokens = plan.window_tokens
        self.pipeline = None
        if plan.window_tokens is not None:
            autocast_dtype = None
            if plan.precision.needs_autocast:
                autocast_dtype = plan.precision.compute
            self.pipeline = Pipeline(self.model, autocast_dtype)
        self.num_consecutive_skips = 0
        num_gpus = 0
        if plan.devices.kind == "cuda":
            num_gpus = len(plan.devices.names)
        self.throughput = Throughput(num_gpus)
        self.current_examples = []  # of this step, for error messages
        self.stop = StopOnSignal()
        self.add_callback(self.stop)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Return the loader of steps. All processes get the same examples."""
        seed = seed_of_order(self.args)
        sampler = StepSampler(len(self.train_dataset), self.examples_per_step, seed)
        loader = torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator
        )
        loader.set_epoch = sampler.set_epoch  # Trainer tells the loader which epoch begins.
        return loader

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Return Trainer's optimizer. GradScaler decides whether a step is skipped."""
        optimizer = super().create_optimizer(model)
        # Fused AdamW would skip a step by itself, unseen by accelerate, and the learning rate would
        # go on.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Return the schedule of the learning rate, without the first step of a warm-up.

        A warm-up begins with a rate of 0: nothing would be learnt from the first step's examples.
        So the schedule has one step more, and the first one is left out. The first step of a
        warm-up of n steps has 1 / n of the peak.
        """
        num_warmup_steps = self.args.get_warmup_steps(num_training_steps)
        if num_warmup_steps == 0:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        schedule = transformers.get_scheduler(
            self.args.lr_scheduler_type,
            optimizer,
            num_warmup_steps,
            num_training_steps + 1,
            self.args.lr_scheduler_kwargs,
        )
        factors = [without_first_step(factor) for factor in schedule.lr_lambdas]
        # The schedule before has left the peak in the optimizer, as initial_lr.
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """Run a step's micro-batches forward and backward. Return this process's part of the loss.

        Raises UserError where the loss is not finite, before the weights change.
        """
        self.count_skipped_step()
        model.train()
        self.throughput.start()
        self.current_examples = inputs["examples"]
        local_loss = self.run_until_it_fits(self.forward_backward, self.current_examples)
        # Each process has multiplied its part by the number of processes.
        step_loss = self.accelerator.reduce(local_loss, "mean").item()
        # No model begins with a loss of exactly 0: labels or logits would be wrong.
        is_wrong = step_loss == 0 and self.state.global_step == 0
        if not math.isfinite(step_loss) or is_wrong:
            raise self.broken_step(self.state.global_step + 1, f"the loss is {step_loss}")
        self.count_work(self.current_examples)
        return local_loss

    def count_work(self, examples: list[dict]) -> None:
        """Count the tokens and FLOPs of a step."""
        lengths = np.array([len(example["input_ids"]) for example in examples])
        flops = training_flops(self.model.config, lengths, count_trained_tokens(examples))
        self.throughput.add(int(lengths.sum()), flops)

    def forward_backward(self, micro_batches: list[dict], num_trained_tokens: int) -> torch.Tensor:
        """Return the loss of this process's micro-batches, and add up their gradients.

        The loss of a micro-batch is its sum over trained tokens, divided by the trained tokens of
        the whole step in all processes. DDP and FSDP average gradients over processes, so each
        process multiplies by their number.
        """
        divisor = num_trained_tokens / self.args.world_size
        self.begin_gradients()  # drops those of a failed try in host memory
        local_loss = torch.zeros((), device=self.args.device)
        if self.pipeline is not None:
            for loss in self.run_windows(micro_batches, divisor, backward=True):
                local_loss += loss.to(local_loss.device)
            return local_loss
        for number, micro_batch in enumerate(micro_batches, 1):
            self.choose_checkpointing(sum(micro_batch["seq_lens"]))
            # DDP exchanges gradients once a step. FSDP exchanges them after each micro-batch: if it
            # waited, each process would hold whole gradients.
            context = nullcontext()
            if number < len(micro_batches) and not self.is_fsdp_enabled:
                context = self.accelerator.no_sync(self.model_wrapped)
            with context:
                with self.accelerator.autocast():
                    output = self.model_wrapped(**micro_batch, num_items_in_batch=divisor)
                self.accelerator.backward(output["loss"])
            local_loss += output["loss"].detach()
        return local_loss

    def run_windows(self, micro_batches: list[dict], divisor: float, backward: bool) -> list:
        """Return the losses of micro-batches that several GPUs work on at once.

        Inputs of one window are on the GPUs at a time: the rotary tables (cos, sin) of a whole step
        could take half a GiB.
        """
        losses = []
        for window in cut_windows(micro_batches, self.window_tokens):
            self.choose_checkpointing(sum(sum(batch["seq_lens"]) for batch in window))
            placed = [self.pipeline.place(batch) for batch in window]
            losses += self.pipeline.run(placed, divisor, backward, self.accelerator.scaler)
        return losses

    def choose_checkpointing(self, num_tokens: int) -> None:
        """Recompute layers in the backward pass only where memory asks for it.

        num_tokens: of the micro-batch, or of all micro-batches in flight.
        """
        if self.args.gradient_checkpointing:
            # Trainer has prepared the layers for it. Each layer reads this switch.
            for layer in self.model.model.layers:
                layer.gradient_checkpointing = num_tokens > self.max_tokens_without_checkpointing

    def run_until_it_fits(self, work, examples: list[dict]):
        """Return work(micro-batches, trained tokens) of the examples.

        Where memory runs out, the work is done again, with half as many tokens at once.
        """
        while True:
            micro_batches, num_trained_tokens = collate(
                examples,
                self.tokens_per_forward,
                self.args.process_index,
                self.args.world_size,
            )
            largest = max(sum(micro_batch["seq_lens"]) for micro_batch in micro_batches)
            try:
                if self.pipeline is None:
                    micro_batches = [self._prepare_inputs(batch) for batch in micro_batches]
                return work(micro_batches, num_trained_tokens)
            except torch.OutOfMemoryError:
                pass
            # The traceback holds the activations. It is gone only after the except block.
            self.model_wrapped.zero_grad()
            torch.cuda.empty_cache()
            self.lower_memory_limits(largest, max(len(x["input_ids"]) for x in examples))

    def lower_memory_limits(self, num_tokens: int, longest: int) -> None:
        """Put fewer micro-batches in flight, or halve tokens_per_forward, or recompute all layers.

        num_tokens: of the largest micro-batch. longest: tokens of the longest example. The change
        holds until this process ends. Raises UserError where it cannot help, and always where there
        are other processes, which would not do the same.
        """
        what = f"out of memory at {num_tokens:,} tokens per micro-batch"
        # tokens_per_forward cannot cut an example.
        can_cut = num_tokens > longest
        if self.args.world_size > 1 and can_cut:
            raise UserError(f"{what}; use --resume --tokens_per_forward {num_tokens // 2}")
        if self.pipeline is not None and self.window_tokens > num_tokens:
            self.window_tokens = max(num_tokens, self.window_tokens // 2)
            remedy = f"{self.window_tokens:,} tokens in flight"
        elif can_cut:
            self.tokens_per_forward = num_tokens // 2
            remedy = f"--tokens_per_forward {self.tokens_per_forward}"
        elif self.can_recompute_more():
            self.max_tokens_without_checkpointing = 0
            remedy = "all layers recomputed"
        elif not self.args.gradient_checkpointing:
            raise UserError(f"{what}; use --resume --gradient_checkpointing true")
        else:
            raise UserError(
                f"{what}, and the longest example has {longest:,}; "
                "begin anew with a lower --max_len and another --output_dir"
            )
        say(f"memory     {what}; retrying with {remedy}")

    def can_recompute_more(self) -> bool:
        """Return whether this is a training step of one process that keeps layers so far."""
        if self.args.world_size > 1 or not self.args.gradient_checkpointing:
            return False
        if not self.model.training:  # Without gradients no layer is kept.
            return False
        return self.max_tokens_without_checkpointing > 0

    def count_skipped_step(self) -> None:
        """Count steps that fp16's GradScaler skipped in a row. Raise UserError for too many.

        Called when the next step begins: only then it is known that the one before was skipped.
        """
        if not self.accelerator.optimizer_step_was_skipped:
            self.num_consecutive_skips = 0
            return
        self.num_consecutive_skips += 1
        if self.num_consecutive_skips > MAX_CONSECUTIVE_SKIPS:
            what = f"{self.num_consecutive_skips} steps in a row had infinite gradients in fp16"
            raise self.broken_step(self.state.global_step, what)

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the gradients' norm. Stop before a norm that is not finite reaches the weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # In fp16 GradScaler skips such a step.
        if self.accelerator.scaler is None and not math.isfinite(grad_norm):
            what = f"the gradient norm is {float(grad_norm)}"
            raise self.broken_step(self.state.global_step + 1, what)
        return grad_norm

    def broken_step(self, step: int, what: str) -> UserError:
        """Return the error of a step that cannot be trained. It names the step's examples."""
        sources = ", ".join(example["source"] for example in self.current_examples)
        return UserError(
            f"step {step}: {what}. Training stopped before the weights "
            "changed. Checkpoints are as they were, and no model is exported. Start again with a "
            f"lower --learning_rate, or correct the examples of this step: {sources}"
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict:
        """Log and return {"eval_loss"}: the mean over all trained tokens of the examples.

        After a signal nothing is logged, {} is returned, and training ends.
        """
        examples = self.eval_dataset
        if eval_dataset is not None:
            examples = eval_dataset
        self.model.eval()
        loss_sum = torch.zeros((), device=self.args.device, dtype=torch.float64)
        num_trained_tokens = 0
        starts = range(0, len(examples), self.examples_per_step)
        is_quiet = not sys.stderr.isatty() or not self.is_world_process_zero()
        for start in tqdm.tqdm(starts, "evaluation", leave=False, disable=is_quiet):
            if self.stop.is_requested(self.args):
                return self.leave_evaluation()
            end = min(start + self.examples_per_step, len(examples))
            chosen = [examples[index] for index in range(start, end)]
            part_sum, part_tokens = self.run_until_it_fits(self.sum_losses, chosen)
            loss_sum += part_sum
            num_trained_tokens += part_tokens
        loss_sum = self.accelerator.reduce(loss_sum, "sum").item()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / num_trained_tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def leave_evaluation(self) -> dict:
        """End the run without this evaluation. CheckpointTrainer makes it when it resumes."""
        if self.state.global_step == 0:  # There is nothing to save.
            raise KeyboardInterrupt(self.stop.signal_number)
        self.control.should_save = True
        self.control.should_training_stop = True
        return {}  # _determine_best_metric passes over it.

    def is_evaluated(self) -> bool:
        """Return whether the last eval_loss in the log is that of the weights as they are."""
        last_step = None
        for log in self.state.log_history:
            if "eval_loss" in log:
                last_step = log["step"]
        step = self.state.global_step
        if self.args.load_best_model_at_end and self.state.best_global_step is not None:
            step = self.state.best_global_step  # Its weights are loaded at the end.
        return last_step == step

    def sum_losses(self, micro_batches: list[dict], num_trained_tokens: int):
        """Return (summed loss of this process, num_trained_tokens of all), without gradients."""
        loss_sum = torch.zeros((), device=self.args.device, dtype=torch.float64)
        if self.pipeline is not None:
            for loss in self.run_windows(micro_batches, divisor=1, backward=False):
                loss_sum += loss.to(loss_sum.device)
            return loss_sum, num_trained_tokens
        with torch.no_grad(), self.accelerator.autocast():
            for micro_batch in micro_batches:
                loss_sum += self.model(**micro_batch, num_items_in_batch=1)["loss"]
        return loss_sum, num_trained_tokens

    def log(self, logs: dict, start_time=None) -> None:
        """Log as Trainer does. A step's line has the throughput, too."""
        if "loss" in logs:
            logs.update(self.throughput.metrics())
            if self.args.fp16:  # The schedule takes no step where the optimizer takes none.
                logs["skipped_steps"] = self.state.global_step - self.lr_scheduler.last_epoch
        super().log(logs, start_time)


def without_first_step(lr_factor):
    """Return the schedule lr_factor(step) from its second step on."""
    return lambda step: lr_factor(step + 1)


# ---- The run ------------------------------------------------------------------------------------
# These options decide what is learnt, beside the examples, the model and the number formats.
OPTIONS_OF_A_RUN = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "seed",
    "system_prompt",  # It is the export's default, too.
    "num_train_epochs",
    "max_steps",
    "eval_strategy",
    "early_stopping_patience",
    "load_best_model_at_end",
)


def make_fingerprint(args: SFTArguments, training_args, plan: Plan, examples: dict) -> dict:
    """Return all that decides what is learnt. --resume goes on only where all of it is the same.

    The examples count as their tokens and labels, in the order of the first epoch.
    """
    train_examples = examples["train"]
    examples_per_step = count_examples_per_step(training_args)
    sampler = StepSampler(len(train_examples), examples_per_step, seed_of_order(args))
    first_epoch = [index for step in sampler for index in step]
    fingerprint = {
        "model": digest_model(args.model_name_or_path),
        "train_examples": train_examples.digest(first_epoch),
        "examples_per_step": examples_per_step,
        "num_steps": count_steps(len(train_examples), training_args),
        "optim": plan.precision.optim,
        "weights": str(plan.precision.weights),
        "compute": str(plan.precision.compute),
    }
    if "validation" in examples:
        fingerprint["validation_examples"] = examples["validation"].digest()
    for name in OPTIONS_OF_A_RUN:
        fingerprint[name] = getattr(args, name)
    fingerprint["data_seed"] = seed_of_order(args)
    # With --eval_strategy steps it is by default logging_steps.
    fingerprint["eval_steps"] = training_args.eval_steps
    return fingerprint


def describe_run(examples: dict[str, Examples], export_dtype: torch.dtype) -> dict:
    """Return what run.json says of the run, beside its arguments and fingerprint."""
    counts = {}
    for split, chosen in examples.items():
        counts[split] = dataclasses.asdict(chosen.counts)
    return {"counts": counts, "export_dtype": name_format(export_dtype)}


@contextmanager
def recorded_wandb_run(args: SFTArguments, training_args) -> Iterator[None]:
    """Keep a wandb run for the context. A resumed run goes on with the one that run.json names."""
    earlier_id = None
    if args.resume:
        earlier_id = read_record(Path(args.output_dir)).get("wandb_run_id")
    with wandb_run(training_args, earlier_id) as run_id:
        if run_id is not None:
            add_to_record(Path(args.output_dir), wandb_run_id=run_id)
        yield


def make_plan(config, args: SFTArguments, training_args, examples: Examples) -> Plan:
    """Return the plan for these examples and devices, and print it.

    Raises UserError where the model does not fit, or a step would have no learning rate.
    """
    num_trained_tokens = int(examples.num_answer_tokens.sum())
    plan = plan_run(config, args, training_args, examples.lengths, num_trained_tokens)
    # A step as the sampler might draw it, to say how many forward passes it takes.
    drawn = np.random.default_rng(0).permutation(examples.lengths)
    typical_step = drawn[: count_examples_per_step(training_args)].tolist()
    num_processes = training_args.world_size
    bins = bin_by_tokens(typical_step, plan.tokens_per_forward, num_processes)
    print_plan(plan, num_forward_passes=len(bins) // num_processes)
    check_plan(plan)
    check_schedule(training_args, count_steps(len(examples), training_args))
    return plan


def adapt_training_arguments(training_args, plan: Plan, evaluates_first: bool):
    """Return Trainer's arguments for batches that are whole steps, in the plan's number formats."""
    precision = plan.precision
    num_examples = count_examples_per_step(training_args)
    adapted = dataclasses.replace(
        training_args,
        per_device_train_batch_size=num_examples // training_args.world_size,
        gradient_accumulation_steps=1,
        bf16=precision.needs_autocast and precision.compute == torch.bfloat16,
        fp16=precision.needs_autocast and precision.compute == torch.float16,
        optim=precision.optim,
        eval_on_start=evaluates_first,
    )
    # With several GPUs in one process Trainer would wrap the model in nn.DataParallel.
    adapted._n_gpu = min(adapted.n_gpu, 1)
    if adapted.fsdp:
        # accelerate would sum gradients in half precision. Where autocast keeps hidden states in
        # fp32, accelerate would cast them, too. Qwen2's hidden states overflow in fp16.
        adapted.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=precision.compute,
            reduce_dtype=torch.float32,
            cast_forward_inputs=not precision.needs_autocast,
        )
    return adapted


def make_trainer(
    args: SFTArguments, training_args, plan: Plan, tokenizer, examples: dict, is_new: bool
) -> SFTTrainer:
    """Return the trainer with its model. Raise UserError where the model cannot be loaded."""
    precision = plan.precision
    check_optimizer(precision.optim, training_args.device.type)
    model = load_weights(
        Qwen2ForCausalLM,
        args.model_name_or_path,
        dtype=precision.weights,
        device_map=plan.device_map,
        attn_implementation="packed_attention",
        # FSDP sends the weights from the first process of a machine to the others.
        weights_are_sent=bool(training_args.fsdp) and training_args.local_process_index > 0,
    )
    callbacks = []
    if args.early_stopping_patience is not None:
        callbacks.append(transformers.EarlyStoppingCallback(args.early_stopping_patience))
    trainer = SFTTrainer(
        plan=plan,
        examples_per_step=count_examples_per_step(training_args),
        model=model,
        args=adapt_training_arguments(
            training_args, plan, evaluates_first=is_new and "validation" in examples
        ),
        processing_class=tokenizer,
        train_dataset=examples["train"],
        eval_dataset=examples.get("validation"),
        optimizer_cls_and_kwargs=optimizer_class_and_options(
            args, precision, training_args.process_index, plan.in_host_memory
        ),
        callbacks=callbacks,
    )
    if trainer.is_fsdp_enabled and precision.needs_autocast:
        # FSDP gathers the embedding in half precision. Hidden states must be fp32 from here on, as
        # in one process.
        model.model.embed_tokens.register_forward_hook(as_fp32)
    # A cache of the casts of weights would take 2 bytes a parameter, and save little time.
    trainer.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    return trainer


def as_fp32(module, inputs, output: torch.Tensor) -> torch.Tensor:
    """Return a module's output in fp32. This is a forward hook."""
    return output.float()


def train_and_export(trainer: SFTTrainer, tokenizer, checkpoint: str | None, export_dtype) -> int:
    """Train, write the model, evaluate; answer held-out questions before and after.

    Return the exit code.
    """
    if trainer.args.should_save:  # What could not be exported is better known now than at the end.
        rehearse_export(trainer.output_dir, trainer.model, tokenizer, export_dtype)
    run_lines = set_up_reporting(trainer)
    end_id = tokenizer.convert_tokens_to_ids(IM_END)
    questions = choose_questions(trainer.eval_dataset, end_id, trainer.is_fsdp_enabled)
    answers_before = answer_questions(trainer.model, questions, end_id, trainer.tokens_per_forward)

    with trainer.stop:
        trainer.train(resume_from_checkpoint=checkpoint)
        is_stopped = trainer.stop.is_requested(trainer.args)
    if is_stopped:
        progress = describe_progress(trainer.output_dir)
        say(f"stopped    after step {trainer.state.global_step}; {progress}")
        return 128 + trainer.stop.signal_number  # is_requested has told it to all processes.

    trainer.export(export_dtype)  # before all else that could fail
    if trainer.eval_dataset is not None and not trainer.is_evaluated():
        trainer.evaluate()
    answers_after = answer_questions(trainer.model, questions, end_id, trainer.tokens_per_forward)
    print_answers(tokenizer, questions, answers_before, answers_after)
    run_lines.print_summary(trainer.args, trainer.state, name_format(export_dtype))
    return 0


def run(args: SFTArguments) -> int:
    """Read, encode, plan, train, export. Return the exit code; raise UserError."""
    if args.export is not None:
        say(f"model      {export_checkpoint(Path(args.export))}")
        return 0
    training_args = make_training_arguments(args)
    if args.gpus is None:  # Otherwise the plan is for another machine.
        check_machine(training_args)
    check_output_dir(args)
    has_gpu = training_args.device.type == "cuda"
    config = check_model(args, has_gpu_or_plan=has_gpu or args.dry_run)
    tokenizer = prepare_tokenizer(args)

    examples = load_examples(args, tokenizer)
    largest_id = max(chosen.largest_token_id() for chosen in examples.values())
    check_vocabulary(config, args.model_name_or_path, largest_id)
    warn_beyond_positions(int(examples["train"].lengths.max()), count_positions(config))
    plan = make_plan(config, args, training_args, examples["train"])
    if args.dry_run:
        return 0

    # The export has the format in which the model came.
    export_dtype = config.dtype or plan.precision.weights
    fingerprint = make_fingerprint(args, training_args, plan, examples)
    about = describe_run(examples, export_dtype)
    # With --resume, open_run compares the fingerprint and gives the last checkpoint, else None.
    with (
        open_run(args, training_args, fingerprint, about) as checkpoint,
        recorded_wandb_run(args, training_args),
    ):
        if args.skip_bad_rows and training_args.should_save:
            write_rejected(examples, args.output_dir)
        is_new = checkpoint is None
        trainer = make_trainer(args, training_args, plan, tokenizer, examples, is_new)
        with explain_failures():
            return train_and_export(trainer, tokenizer, checkpoint, export_dtype)


def main(argv: list[str] | None = None) -> int:
    """Run the script. Return 0, 1 after an error of the user, the disk or the network, or 128 plus
    the number of a signal.

    A wrong argument ends the process with exit code 2.
    """
    # announce_start let Ctrl-C end the imports. From here on it is a KeyboardInterrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    outlive_console()
    quiet_libraries()
    drop_foreign_environment()
    if argv is None:
        argv = sys.argv[1:]
    args = parse(argv, SFTArguments)
    rank = int(os.environ.get("RANK", "0"))
    work = run
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's report shows what is raised.
        work = record(run)
    try:
        with first_process_prints(rank):
            exit_code = work(args)
    except (UserError, OSError) as error:
        where = ""
        if "RANK" in os.environ:
            where = f" in process {rank}"
        print(f"error{where}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"stopped    {describe_progress(Path(args.output_dir))}", file=sys.stderr)
        signal_number = signal.SIGINT
        if interrupt.args:
            signal_number = interrupt.args[0]
        return 128 + signal_number
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return exit_code


def first_process_prints(rank: int):
    """Return a context in which the other processes print nothing but errors."""
    if rank == 0:
        return nullcontext()
    return redirect_stdout(open(os.devnull, "w"))


if __name__ == "__main__":
    sys.exit(main())
