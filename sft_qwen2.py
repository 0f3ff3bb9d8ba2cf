"""Supervised fine-tuning (SFT) of Qwen2 on query/answer JSONL: one script, read from top to bottom.

    python sft_qwen2.py                                 # Qwen2-7B-Instruct on data/train.jsonl
    python sft_qwen2.py data/tiny.json                  # the stand-in model, on any laptop
    python sft_qwen2.py run.json --learning_rate 2e-5   # arguments from a file, flags on top
    torchrun --nproc_per_node gpu sft_qwen2.py          # all GPUs at once

A line of data is a conversation: {"query": "...", "answer": "..."}, optionally with "system", or
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}.
Only the tokens of each answer and the <|im_end|> after it are trained; all others give context.

One optimizer step is a set of rows. They are laid end to end, without padding, in micro-batches of
at most `tokens_per_forward` tokens. Attention stays inside each row, and the loss is summed over
the trained tokens of the step and divided by their number: how the set is cut into micro-batches
changes memory and speed, never the result.

Shapes: T tokens of a row or micro-batch, N trained tokens, H query heads, K key/value heads, D head
size, V vocabulary.
"""

import datetime
import io
import itertools
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tqdm.auto
import transformers
from torch.nn.functional import linear_cross_entropy, scaled_dot_product_attention
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import rotate_checkpoints

from sft.arguments import parse_arguments
from sft.encoded_rows import (
    IGNORE_INDEX,
    beyond_positions,
    encode_files,
    first_turns,
    fit_rows,
    mark_trained_tokens,
    print_data,
    write_rejected,
)
from sft.memory_plan import (
    COMPUTE_DTYPES,
    GIB,
    LOSS_CHUNK,
    PEAK_TFLOPS,
    Plan,
    choose_precision,
    find_devices,
    plan_disk,
    plan_memory,
    plan_steps,
    rows_per_step,
    training_flops,
)
from sft.rows import UserError, as_user_error, find_data_files, parse_row, printable, say
from sft.run_folder import draw_losses, open_run, start_wandb, train

IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # ChatML's control tokens, around every turn
SHOWN_IN_BAR = ("loss", "tokens_per_s", "mfu", "peak_gib")
SHOWN = (*SHOWN_IN_BAR, "grad_norm", "learning_rate", "trained_tokens_per_s")
NUM_SAMPLES, SAMPLE_TOKENS = 3, 48  # validation prompts answered before and after training


# ---- Arguments ----------------------------------------------------------------------------------
@dataclass
class ScriptArguments:
    """The arguments that transformers.TrainingArguments does not have."""

    model_name_or_path: str = HfArg(default="Qwen/Qwen2-7B-Instruct", help="Hub name or folder.")
    data_path: str = HfArg(default="data/", help="File, or folder with train.* and validation.*")
    system_prompt: str = HfArg(
        default="你是一个知识渊博的人,请根据问题做出全面且正确的回答。",
        help="System turn of rows that have none, and default of the exported chat template.",
    )
    max_len: int = HfArg(default=8192, help="Longest row in tokens, prompt and answer together.")
    overflow_strategy: Literal["truncate", "drop", "error"] = HfArg(
        default="truncate", help="A row over max_len loses its end, is left out, or stops the run."
    )
    tokens_per_forward: int | None = HfArg(
        default=None, help="Memory knob. At most per_device_train_batch_size x max_len by default."
    )
    skip_bad_rows: bool = HfArg(default=False, help="Write refused rows to rejected.jsonl, go on.")
    fp32: bool = HfArg(default=False, help="fp32 weights and AdamW state: 16 bytes per parameter.")
    device_map: str = HfArg(default="auto", help="auto: layers by memory; or transformers' own.")
    resume: bool = HfArg(default=False, help="Continue the run in output_dir where it stopped.")
    dry_run: bool = HfArg(default=False, help="Do everything but load the model and train.")
    gpus: str | None = HfArg(default=None, help="With --dry_run: plan for 4x80, or 2x80,1x40 GiB.")


TRAINING_DEFAULTS = {
    "output_dir": "./outputs",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 32,
    "num_train_epochs": 1.0,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a share of all steps
    "weight_decay": 0.003,
    "logging_steps": 1,
    "save_steps": 5,
    "save_total_limit": 2,  # a checkpoint of the 7B with its optimizer takes 46 GB or more
    "run_name": "qwen2-7B-sft",
    "report_to": "wandb",
    "gradient_checkpointing": True,
    "logging_nan_inf_filter": False,  # a NaN is to be seen, and stops the run
}


# ---- Encoding: which tokens are trained ---------------------------------------------------------
def encode_batch(conversations: list[list[dict]], tokenizer) -> list[dict]:
    """Return {"input_ids": [T], "labels": [T]} of each conversation. With ^ under what is trained:

    <|im_start|>system\\nS<|im_end|>\\n<|im_start|>user\\nQ<|im_end|>\\n<|im_start|>assistant\\nA<|im_end|>
                                                                                   ^^^^^^^^^^^
    An assistant turn of weight 0 is context. An answer is encoded apart from the "assistant\\n"
    before it, because generation starts exactly there. Control tokens spelled in a text are encoded
    as the plain characters they are: no row can open or close a turn.
    """
    turns = [turn for conversation in conversations for turn in conversation]
    ids = encode_texts(["\n", "assistant\n", *map(text_of_turn, turns)], tokenizer)
    start, end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])

    def encode_turns(turns):
        input_ids, labels = [], []

        def add(tokens, train=False):
            input_ids.extend(tokens)
            labels.extend(tokens if train else [IGNORE_INDEX] * len(tokens))

        for turn in turns:
            add([*ids["\n"], start] if input_ids else [start])
            if turn["role"] == "assistant":
                add(ids["assistant\n"])
            trained = turn["role"] == "assistant" and turn.get("weight") != 0
            add([*ids[text_of_turn(turn)], end], train=trained)
        return {"input_ids": input_ids, "labels": labels}

    return [encode_turns(conversation) for conversation in conversations]


def text_of_turn(turn: dict) -> str:
    return turn["content"] if turn["role"] == "assistant" else f"{turn['role']}\n{turn['content']}"


def encode_texts(texts: list[str], tokenizer) -> dict[str, list[int]]:
    """Return the ids of each text; each is encoded once, and no control token found in it."""
    texts, backend = list(dict.fromkeys(texts)), tokenizer.backend_tokenizer
    if not backend.encode_special_tokens:  # the backend's own switch: other calls may turn it off
        backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return {text: encoding.ids for text, encoding in zip(texts, encodings)}


def encode(messages: list[dict], tokenizer) -> dict[str, list[int]]:
    """Return {"input_ids": [T], "labels": [T]} of one conversation, as encode_batch does."""
    return encode_batch([messages], tokenizer)[0]


def load_tokenizer(name_or_path: str, system_prompt: str):
    """Return the tokenizer, with the trained system prompt as its chat template's default.

    Raises UserError where the template renders a conversation differently than `encode`: the model
    would be trained on one format and served with another. Likewise where texts do not survive the
    vocabulary, or where control tokens spelled in one would close its turn.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path)
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
    if found := [token for token in tokenizer.all_special_tokens if token in system_prompt]:
        raise UserError(f"--system_prompt: {found[0]} is a control token; leave it out")
    turn = "{'role': 'system', 'content': " + json.dumps(system_prompt, ensure_ascii=False) + "}"
    tokenizer.chat_template = (
        "{% if not messages or messages[0]['role'] != 'system' %}"
        "{% set messages = [" + turn + "] + messages %}{% endif %}" + tokenizer.chat_template
    )
    return tokenizer


# ---- Micro-batches: the rows of an optimizer step, without padding ------------------------------
def bin_rows(lengths: list[int], tokens_per_forward: int, multiple_of: int = 1) -> list[list[int]]:
    """Return row numbers in bins of at most tokens_per_forward tokens, by first-fit decreasing.

    A longer row has a bin of its own. There are a multiple of `multiple_of` bins, the number of
    processes, since all must run the same number of forward passes: the fullest are split for it.
    """
    bins, free = [], []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        at = next((b for b, room in enumerate(free) if lengths[row] <= room), len(bins))
        if at == len(bins):
            bins.append([])
            free.append(tokens_per_forward)
        bins[at].append(row)
        free[at] -= lengths[row]
    while len(bins) % multiple_of:
        fullest = max(bins, key=lambda rows: (len(rows) > 1, sum(lengths[row] for row in rows)))
        bins.append(fullest[1::2])  # empty where there are fewer rows than processes
        fullest[:] = fullest[::2]
    return bins


def flatten(rows: list[dict]) -> dict:
    """Return a micro-batch: the {"input_ids", "labels"} of rows laid end to end.

    input_ids, position_ids, shift_labels [1, T]: a row's positions begin at 0, and shift_labels[t]
    is the token that position t is to predict, or -100. cu_seq_lens [rows + 1]: the boundaries.
    Of no rows: one untrained token, for this process must run as many passes as the others.
    """
    rows = rows or [{"input_ids": [0], "labels": [IGNORE_INDEX]}]
    batch = transformers.DataCollatorWithFlattening()(rows)  # a row's first label becomes -100
    labels = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=IGNORE_INDEX)
    seq_lens = [len(row["input_ids"]) for row in rows]
    bounds = torch.tensor([0, *itertools.accumulate(seq_lens)], dtype=torch.int32)
    return {**batch, "shift_labels": labels[:, 1:], "cu_seq_lens": bounds, "seq_lens": seq_lens}


def truncate(row: dict, max_len: int) -> dict:
    return {name: row[name][:max_len] for name in ("input_ids", "labels")}


def collate(rows: list[dict], max_len: int, tokens_per_forward: int, rank: int = 0, world: int = 1):
    """Return (this process's micro-batches of a step's rows, trained tokens of the whole step).

    Every process reads all rows of the step and takes its share of the bins: each knows the divisor
    of the loss and the number of forward passes without communicating.
    """
    rows = [truncate(row, max_len) for row in rows]
    bins = bin_rows([len(row["input_ids"]) for row in rows], tokens_per_forward, world)
    trained_tokens = sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
    return [flatten([rows[i] for i in b]) for b in bins[rank::world]], trained_tokens


# ---- Model: attention inside each row, loss at trained positions --------------------------------
def row_attention(module, query, key, value, mask, seq_lens=None, cu_seq_lens=None, **kwargs):
    """Causal attention of queries [1, H, T, D] on keys and values [1, K, T, D], row by row.

    FlashAttention's kernel for rows of many lengths, where PyTorch has it for the GPU and dtype;
    elsewhere one call a row. Without seq_lens, as in generation, transformers' own sdpa. Returns
    ([1, T, H, D], None), as transformers.AttentionInterface asks.
    """
    if seq_lens is None:
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)
    options = {"scale": kwargs["scaling"], "enable_gqa": True}
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast left them fp32
    ampere = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    if ampere and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        bounds = (cu_seq_lens, cu_seq_lens, max(seq_lens), max(seq_lens))
        return varlen_attn(q, k, v, *bounds, window_size=(-1, 0), **options)[None], None
    if query.is_cuda and not ampere:  # their fused kernel wants a key and a value per query head
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    rows = zip(*(x.split(seq_lens, dim=2) for x in (query, key, value)))
    outputs = [scaled_dot_product_attention(*row, is_causal=True, **options) for row in rows]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


class AnswerLoss:
    """Mixin that load_model combines with transformers.Qwen2ForCausalLM: a micro-batch's loss."""

    def forward(self, input_ids=None, shift_labels=None, num_items_in_batch=1, **kwargs):
        """Return {"loss": cross entropy summed over the trained tokens / num_items_in_batch}.

        Only the N of T hidden states that have a target meet the head, in chunks: [N, V] logits
        never exist at once. Without shift_labels this is transformers' forward.
        """
        if shift_labels is None:
            return super().forward(input_ids, **kwargs)
        mask = {"full_attention": None}  # row_attention keeps rows apart without one
        output = self.model(input_ids, attention_mask=mask, use_cache=False, **kwargs)
        head = self.lm_head.weight
        shift_labels = shift_labels.to(head.device)
        trained = shift_labels != IGNORE_INDEX
        hidden, targets = output.last_hidden_state.to(head.device)[trained], shift_labels[trained]
        if torch.is_autocast_enabled(head.device.type):  # it would leave this product in fp32
            dtype = torch.get_autocast_dtype(head.device.type)
            hidden, head = hidden.to(dtype), head.to(dtype)
        chunks = {"batch_chunk_size": LOSS_CHUNK, "chunking_method": None, "acc_policy": "compact"}
        options = {"options": torch.nn.LinearCrossEntropyOptions(**chunks)}
        # In half precision a sum would be rounded to 8 bits; the single losses' errors cancel out.
        options["reduction"] = "sum" if hidden.dtype == torch.float32 else "none"
        losses = linear_cross_entropy(hidden, head, targets, **options)
        return {"loss": losses.float().sum() / num_items_in_batch}


def check_model(name_or_path: str, planned: bool):
    """Return the model's config; raises UserError where the model cannot be trained here.

    `planned`: whether there is a GPU, or only a plan is wanted.
    """
    default = ScriptArguments.model_name_or_path
    if name_or_path == default and not planned:
        raise UserError(f"{default} needs a GPU; without one: python sft_qwen2.py data/tiny.json")
    remedy = f"try hf download {default} --local-dir qwen2, then --model_name_or_path qwen2"
    sentence = f"{name_or_path}: no such model, here or on the hub; {remedy}"
    with as_user_error((OSError, ValueError), sentence):
        config = transformers.AutoConfig.from_pretrained(name_or_path)
    if config.model_type != "qwen2" or config.use_sliding_window:
        raise UserError(f"{name_or_path}: is not a Qwen2 or Qwen2.5 model with full attention")
    return config


def load_model(name_or_path: str, dtype: torch.dtype, device_map=None):
    """Return the checkpoint as a Qwen2ForCausalLM with AnswerLoss and row_attention."""
    transformers.AttentionInterface.register("row_attention", row_attention)
    masks = transformers.AttentionMaskInterface
    masks.register("row_attention", masks()["sdpa"])  # for generation
    bases = (AnswerLoss, transformers.Qwen2ForCausalLM)  # here: importing models takes seconds
    return type("Qwen2ForCausalLM", bases, {}).from_pretrained(
        name_or_path, dtype=dtype, device_map=device_map, attn_implementation="row_attention"
    )


# ---- Precision and placement --------------------------------------------------------------------


# ---- Trainer: one optimizer step over a set of rows ---------------------------------------------
class StepTrainer:
    """Mixin that build_trainer combines with transformers.Trainer: a batch is a whole step's rows.

    build_trainer also sets max_len, tokens_per_forward, plain_tokens, num_parameters,
    and since when (time.time()) which work [steps, tokens, trained tokens, FLOPs] was done.
    """

    bar = None
    stop_signal = 0  # the number of the one that came
    bad_norms = 0  # consecutive steps whose gradient norm was not finite

    def get_train_dataloader(self):
        """Return the loader of steps: lists of rows, shuffled by the seed and the epoch."""
        from accelerate.data_loader import prepare_data_loader

        options = {"batch_size": rows_per_step(self.args), "shuffle": True, "collate_fn": list}
        loader = torch.utils.data.DataLoader(self.train_dataset, **options)
        # "1 process": else accelerate deals out the rows itself, and repeats some to fill a step.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        options = {"use_seedable_sampler": True, "data_seed": seed}
        return prepare_data_loader(loader, num_processes=1, process_index=0, **options)

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, checkpoint, trial):
        """Begin the bar; return (epochs, steps of the next) done before.

        Of a finished run all epochs: Trainer would add a step if it ended within one.
        """
        done = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        if sys.stderr.isatty() and self.is_world_process_zero():
            self.bar = tqdm.auto.tqdm(total=max_steps, initial=self.state.global_step)
            transformers.utils.logging.disable_progress_bar()  # a save's would break this one
        return done if self.state.global_step < max_steps else (epochs, 0)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Return Trainer's schedule, one step ahead where it warms up.

        A warm-up begins with a rate of 0: the rows of that step would not be trained.
        """
        warm_up = self.args.get_warmup_steps(num_training_steps) > 0
        scheduler = super().create_scheduler(num_training_steps + warm_up, optimizer)
        if warm_up and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, to step the optimizer first
                scheduler.step()
        return scheduler

    def micro_batches(self, rows: list[dict]) -> tuple[list[dict], int]:
        share = (self.args.process_index, self.args.world_size)
        batches, trained_tokens = collate(rows, self.max_len, self.tokens_per_forward, *share)
        return [self._prepare_inputs(batch) for batch in batches], trained_tokens

    def training_step(self, model, rows, num_items_in_batch=None):
        """Run the step's micro-batches and return its loss; out of memory, again with less at once.

        The divisor of the loss is the trained tokens of all processes. Processes average gradients
        and losses, so each multiplies its part by their number.
        """
        model.train()
        while True:
            batches, trained_tokens = self.micro_batches(rows)
            loss_sum = torch.zeros((), device=self.args.device)
            try:
                for i, batch in enumerate(batches, 1):
                    self.choose_checkpointing(sum(batch["seq_lens"]))
                    self.accelerator.sync_gradients = i == len(batches)  # for DeepSpeed
                    with self.gradients_kept(model) if i < len(batches) else nullcontext():
                        divisor = trained_tokens / self.args.world_size
                        loss = model(**batch, num_items_in_batch=divisor)["loss"]
                        self.accelerator.backward(loss)
                    loss_sum += loss.detach().to(loss_sum.device)
                break
            except torch.OutOfMemoryError:
                self.lower_budget(batches)
            loss = None  # and with it the activations that it holds
            model.zero_grad()
            torch.cuda.empty_cache()
        step_loss = self.accelerator.reduce(loss_sum, "mean").item()  # the same in all processes
        # Exactly 0 is what wrong labels and overflown logits look like.
        if not math.isfinite(step_loss) or step_loss == 0:
            raise self.broken_step(f"its loss is {step_loss}", rows)
        self.control.should_training_stop |= self.agreed_signal() > 0
        self.rows = rows
        lengths = np.array([len(row["input_ids"][: self.max_len]) for row in rows])
        flops = training_flops(self.model.config, self.num_parameters, lengths)
        self.work += [1, lengths.sum(), trained_tokens, flops]
        return loss_sum

    def choose_checkpointing(self, tokens: int) -> None:
        """Recompute layers in the backward pass only where memory asks for it."""
        if self.args.gradient_checkpointing:
            for layer in self.model.model.layers:
                layer.gradient_checkpointing = tokens > self.plain_tokens

    def gradients_kept(self, model):
        """Return a context in which backward leaves gradients where they are, for later ones.

        With FSDP it exchanges them each time: kept, they would be whole, 4 bytes a parameter.
        """
        return nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model)

    def agreed_signal(self) -> int:
        """Return the signal that any process got, or 0: all must stop after the same step."""
        number = torch.tensor(self.stop_signal, device=self.args.device)
        return int(self.accelerator.gather(number).max())

    def lower_budget(self, batches: list[dict]) -> None:
        """Checkpoint all layers, or if so already, halve tokens_per_forward.

        Raises UserError where that cannot help or other processes would not do the same.
        """
        largest = max((batch["seq_lens"] for batch in batches), key=sum)
        tokens, half = sum(largest), sum(largest) // 2
        if self.args.world_size > 1:
            raise UserError(f"out of memory with {tokens} tokens; try --tokens_per_forward {half}")
        if self.plain_tokens and self.args.gradient_checkpointing:
            self.plain_tokens = 0
            say(f"memory     out with {tokens} tokens; now with gradient checkpointing for all")
        elif len(largest) == 1:
            raise UserError(f"out of memory with one row of {tokens} tokens; lower --max_len")
        else:
            self.tokens_per_forward = half
            say(f"memory     {tokens} tokens are too many for one forward pass; now {half}")
        self.log({"tokens_per_forward": self.tokens_per_forward})

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the norm as Trainer does, but stop before NaN gradients reach the weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.bad_norms = 0 if np.isfinite(float(norm)) else self.bad_norms + 1
        # fp16's loss scale begins too high on purpose: it skips such steps, and halves itself.
        if self.bad_norms > (20 if self.args.fp16 else 0):
            raise self.broken_step(f"its gradient norm is {float(norm)}", self.rows)
        return norm

    def broken_step(self, what: str, rows) -> UserError:
        lines = ", ".join(row["place"] for row in rows)
        return UserError(
            f"step {self.state.global_step + 1}: {what}. Training stopped before that reached the "
            f"weights; checkpoints are as they were, nothing is exported. Its rows: {lines}"
        )

    def _save_checkpoint(self, model, trial=None) -> None:
        """Save a checkpoint aside and rename it once it is on disk: it is whole, or not there."""
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        aside, error = output_dir / "unfinished", None
        self.args.output_dir = str(aside)
        try:
            super()._save_checkpoint(model, trial)  # every process writes a part
            os.sync()
        except Exception as caught:  # each library has its own for a full disk; training can go on
            error = caught
            say(f"{name} could not be saved; earlier ones are whole: {error}", sys.stderr)
        self.args.output_dir = str(output_dir)
        failed = torch.tensor(float(error is not None), device=self.args.device)
        failed = self.accelerator.reduce(failed) > 0  # in any process; all parts are written now
        if self.args.should_save:
            if not failed:
                os.replace(aside / name, output_dir / name)
                rotate_checkpoints(str(output_dir), self.args.save_total_limit)
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None):
        if state_dict and self.model.config.tie_word_embeddings:
            state_dict.pop("lm_head.weight")  # FSDP's second copy of the embedding
        super()._save(output_dir, state_dict)

    def evaluate(self, ignore_keys=None):
        """Log and return {"eval_loss"}: the mean over all answer tokens of the validation rows."""
        began, rows, loss_sum, token_sum = time.time(), iter(self.eval_dataset), 0.0, 0
        self.model.eval()
        while step := list(itertools.islice(rows, self.args.per_device_train_batch_size)):
            batches, trained_tokens = self.micro_batches(step)
            token_sum += trained_tokens
            with torch.no_grad(), self.accelerator.autocast():
                loss_sum += sum(self.model(**batch)["loss"].item() for batch in batches)
        loss_sum = self.accelerator.reduce(torch.tensor(loss_sum, device=self.args.device)).item()
        metrics = {"eval_loss": loss_sum / token_sum}
        self.log(metrics)
        say(f"eval_loss  {metrics['eval_loss']:.4f} at step {self.state.global_step}")
        self.since += time.time() - began  # no part of the steps' time
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict, start_time=None) -> None:
        """Report to wandb and others, to output_dir/metrics.jsonl and, of a step, on screen."""
        if "loss" in logs:
            logs |= self.measure_speed()
        try:
            super().log(logs, start_time)
        except Exception as error:  # wandb's, of whatever kind: a report must not cost the run
            say(f"wandb      lost step {self.state.global_step}: {error}")
        if not self.is_world_process_zero():
            return
        step, steps = self.state.global_step, self.state.max_steps
        try:
            with open(Path(self.args.output_dir) / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **logs}) + "\n")
        except OSError as error:  # a full disk; the next line may have room again
            say(f"step {step} is not in metrics.jsonl: {error}")
        values = {name: logs[name] for name in SHOWN if name in logs}
        shown = {k: f"{v:,}" if isinstance(v, int) else f"{v:.4g}" for k, v in values.items()}
        if "loss" in logs and self.bar is not None:
            self.bar.set_postfix({k: v for k, v in shown.items() if k in SHOWN_IN_BAR})
            self.bar.update(step - self.bar.n)
        elif "loss" in logs:  # a bar would fill a log file
            left = datetime.timedelta(seconds=round(logs["seconds_left"]))
            line = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{steps}  {line}  left {left}", flush=True)

    def measure_speed(self) -> dict[str, float]:
        """Return the throughput since the last log, and its share of the GPUs' peak."""
        steps, tokens, trained, flops = self.work / (time.time() - self.since)
        self.since, self.work = time.time(), np.zeros(4)
        left = (self.state.max_steps - self.state.global_step) / steps
        speed = {"tokens_per_s": round(tokens), "trained_tokens_per_s": round(trained)}
        if self.args.device.type == "cuda":
            name, gpus = torch.cuda.get_device_name(), range(torch.cuda.device_count())
            if peak := next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name), None):
                speed["mfu"] = flops / (peak * 1e12 * self.args.world_size)
            speed["peak_gib"] = max(map(torch.cuda.max_memory_allocated, gpus)) / GIB
        return {**speed, "seconds_left": round(left)}


def sharded_policy(compute: str):
    """Return FSDP's number formats. (accelerate's own would sum gradients in half precision.)"""
    dtype = COMPUTE_DTYPES[compute]
    return torch.distributed.fsdp.MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)


def build_trainer(model, tokenizer, script_args, training_args, rows: dict, precision, plan: Plan):
    """Return the transformers.Trainer with StepTrainer's steps, over the rows of each split."""
    import accelerate

    rounded = precision.weights == torch.bfloat16  # then nothing is left for autocast
    stochastic = rounded and precision.optim == "adamw_torch_8bit"
    own_step = rows_per_step(training_args) // training_args.world_size
    args = replace(
        training_args,
        per_device_train_batch_size=own_step,  # for Trainer, a step is one large batch
        gradient_accumulation_steps=1,
        bf16=precision.compute == "bf16" and not rounded,
        fp16=precision.compute == "fp16",
        optim=precision.optim,
        optim_args="bf16_stochastic_round=True" if stochastic else training_args.optim_args,
        eval_on_start="validation" in rows,
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs in one process: never nn.DataParallel
    datasets = {"train_dataset": rows["train"], "eval_dataset": rows.get("validation")}
    trainer_class = type("SFTTrainer", (StepTrainer, transformers.Trainer), {})
    trainer = trainer_class(model, args, data_collator=list, processing_class=tokenizer, **datasets)
    for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
        trainer.remove_callback(callback)  # StepTrainer.log shows the steps
    # A cache of half-precision weights would cost 2 bytes a parameter, and save little time.
    trainer.accelerator.autocast_handler = accelerate.utils.AutocastKwargs(cache_enabled=False)
    if trainer.is_fsdp_enabled:
        policy = sharded_policy(precision.compute)
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    trainer.max_len, trainer.num_parameters = script_args.max_len, model.num_parameters()
    trainer.tokens_per_forward, trainer.plain_tokens = plan[1:]
    trainer.since, trainer.work = time.time(), np.zeros(4)
    return trainer


def answer_samples(model, tokenizer, prompts: list[list[dict]]) -> list[str]:
    """Return the model's greedy answer to each prompt, itself a conversation that waits for one."""
    chat = transformers.pipeline("text-generation", model=model.eval(), tokenizer=tokenizer)
    length = {"max_new_tokens": SAMPLE_TOKENS, "max_length": None, "return_full_text": False}
    return [chat(prompt, do_sample=False, **length)[0]["generated_text"] for prompt in prompts]


# ---- The run ------------------------------------------------------------------------------------
def quiet_libraries() -> None:
    """Leave the console to what the user must know; what fails still raises."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Of kernels for other machines, and of each try to reach the hub.
    for name in ("torchao", "torch.utils._pytree", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        transformers.utils.logging.disable_progress_bar()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def prepare(args: ScriptArguments, training_args):
    """Return all that training needs, having read and checked all that can be wrong before it."""
    on_gpu = training_args.device.type == "cuda"
    config = check_model(args.model_name_or_path, on_gpu or args.dry_run)
    files, tables, rows, counts = find_data_files(args.data_path), {}, {}, {}
    with as_user_error(ValueError, "--system_prompt"):
        parse_row({"query": "q", "answer": "a"}, args.system_prompt)
    tokenizer = load_tokenizer(args.model_name_or_path, args.system_prompt)
    for split, paths in files.items():
        tables[split] = encode_files(paths, tokenizer, args.system_prompt, encode_batch, __file__)
        limits = (args.max_len, args.overflow_strategy, args.skip_bad_rows)
        rows[split], counts[split] = fit_rows(tables[split], *limits)
        print_data(split, counts[split])
    lengths = rows["train"]["num_tokens"].clip(max=args.max_len)
    shortest = truncate(rows["train"][int(lengths.argmin())], args.max_len)
    example = mark_trained_tokens(shortest, tokenizer, sys.stdout.isatty())
    print(f"example    {example}", flush=True)
    capacities, capability = find_devices(args.gpus, training_args)
    precision = choose_precision(capability, training_args.world_size, args.fp32)
    if training_args.optim != transformers.TrainingArguments.optim:  # the user's --optim
        size = 4 * precision.weights.itemsize  # of AdamW; others have less state than that
        precision = precision._replace(optim=training_args.optim.value, bytes_per_parameter=size)
    weights = str(precision.weights).removeprefix("torch.")
    formats = f"{precision.compute} over {weights} weights, {precision.optim}"
    print(f"precision  {formats} ({'assumed ' * bool(args.gpus)}{precision.reason})")
    if args.max_len > config.max_position_embeddings:
        print(f"warning    {beyond_positions(args.max_len, config.max_position_embeddings)}")
    plan = plan_memory(config, args, training_args, precision, capacities, int(lengths.max()))
    plan_steps(plan.tokens_per_forward, training_args, lengths, bin_rows)
    plan_disk(config, precision, args, training_args)
    if args.dry_run:
        return None
    checkpoint = open_run(args, training_args, precision, counts, rows["train"].sha256)
    if args.skip_bad_rows and training_args.should_save:
        with open(Path(training_args.output_dir) / "rejected.jsonl", "w", encoding="utf-8") as file:
            for table in tables.values():
                write_rejected(table, file)
    return rows, tokenizer, precision, plan, checkpoint


def run(args: ScriptArguments, training_args) -> int:
    """Read, encode, train, export; return the exit code. Raises UserError."""
    if not (prepared := prepare(args, training_args)):
        return 0
    rows, tokenizer, precision, plan, checkpoint = prepared
    if training_args.fsdp:  # for from_pretrained, which must know before there is a Trainer
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    model = load_model(args.model_name_or_path, precision.weights, plan.device_map)
    start_wandb(training_args)
    trainer = build_trainer(model, tokenizer, args, training_args, rows, precision, plan)
    samples = "validation" in rows and not training_args.fsdp  # sharded, a token takes a second
    if samples:
        prompts = first_turns(rows["validation"], NUM_SAMPLES, args.system_prompt)
        before = answer_samples(model, tokenizer, prompts)
    if stop_signal := train(trainer, checkpoint):
        return 128 + stop_signal
    model.config.use_cache = True  # Trainer turned it off; what is served needs it
    failure = f"{training_args.output_dir}: the model is not written; make room, then --resume"
    if training_args.fsdp:  # one ordinary model folder
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with as_user_error(Exception, failure):  # each library has its own for a full disk
        trainer.save_model()
    if "validation" in rows:
        trainer.evaluate()
    if samples:
        after = answer_samples(model, tokenizer, prompts)
        for prompt, old, new in zip(prompts, before, after):
            print(f"question   {printable(prompt[1]['content'])}")
            print(f"  before   {old!r}\n  after    {new!r}")
    if trainer.is_world_process_zero():
        draw_losses(Path(training_args.output_dir))
    output_dir = training_args.output_dir
    print(f"logs       {output_dir}/metrics.jsonl, {output_dir}/run.json")
    print(f"model      {output_dir}; to serve it: vllm serve {output_dir}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code, 1 after a UserError. A wrong argument exits with 2."""
    quiet_libraries()
    args, training_args = parse_arguments(
        sys.argv[1:] if argv is None else argv, ScriptArguments, TRAINING_DEFAULTS
    )
    if training_args.process_index > 0:  # the first prints for all; each its own error
        sys.stdout = io.StringIO()
    try:
        code = run(args, training_args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return code
    except (UserError, OSError) as error:  # a full disk, files without permission, a lost network
        rank = f" in process {training_args.process_index}" * (training_args.world_size > 1)
        print(f"error{rank}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training began: there is nothing to save
        print("stopped    before training began", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
