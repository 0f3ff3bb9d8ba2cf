"""Supervised fine-tuning (SFT) of Qwen2 on query/answer JSONL: one script, read from top to bottom.

    python sft_qwen2.py                                 # Qwen2-7B-Instruct on data/train.jsonl
    python sft_qwen2.py data/tiny.json                  # the stand-in model, on any laptop
    python sft_qwen2.py run.json --learning_rate 2e-5   # arguments from a file, flags on top
    torchrun --nproc_per_node gpu sft_qwen2.py          # all GPUs at once

A line of data is a conversation: {"query": "...", "answer": "..."}, optionally with "system", or
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}.
Only the tokens of each answer and the <|im_end|> after it are trained; all others give context.

One optimizer step is a set of rows: per_device_train_batch_size x gradient_accumulation_steps x
processes. They are laid end to end, without padding, in micro-batches of at most
`tokens_per_forward` tokens. Attention stays inside each row, and the loss is summed over the
trained tokens of the step and divided by their number: how the set is cut into micro-batches
changes memory and speed, never the result.

Shapes: T tokens of a row or micro-batch, N trained tokens, H query heads, K key/value heads, D head
size, V vocabulary.
"""

import io
import itertools
import math
import os
import signal
import sys
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

# Gaps between blocks of memory would cost more than the margins of the plan. Torch reads it once.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import tqdm.auto
import transformers
from torch.nn.functional import scaled_dot_product_attention
from torch.optim.lr_scheduler import LambdaLR
from transformers.hf_argparser import HfArg

from sft import answers, callbacks, encoded_rows, memory_plan, model_folder, numerics, run_folder
from sft.arguments import parse_arguments, with_optim
from sft.encoded_rows import IGNORE_INDEX, encode_files, fit_rows
from sft.memory_plan import GIB, Plan, rows_per_step
from sft.rows import IM_END, IM_START, UserError, find_data_files, say

MAX_SKIPPED = 20  # consecutive steps, by fp16's loss scaler, which halves itself each time


# ---- Arguments ----------------------------------------------------------------------------------
@dataclass
class ScriptArguments:
    """The arguments that transformers.TrainingArguments does not have."""

    model_name_or_path: str = HfArg(default="Qwen/Qwen2-7B-Instruct", help="Hub name or folder.")
    data_path: list[str] = field(
        default_factory=lambda: ["data/"],
        metadata={"help": "Files, or folders with train* and validation*."},
    )
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
    early_stopping_patience: int | None = HfArg(
        default=None, help="Stop after so many evaluations that were no better than the best."
    )
    resume: bool = HfArg(default=False, help="Continue the run in output_dir where it stopped.")
    dry_run: bool = HfArg(default=False, help="Read, encode and plan; load and write nothing.")
    gpus: str | None = HfArg(default=None, help="With --dry_run: plan for 4x80, or 2x80,1x40 GiB.")
    chosen_optim: str | None = field(default=None, init=False)  # --optim, where it was given


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
    r"""Return {"input_ids": [T], "labels": [T]} of each conversation. ^ marks what is trained:

    <|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>
                                                                                           ^^^^^^^^^^^
    An assistant turn of weight 0 is context. An answer is encoded apart from the "assistant\n"
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


# With the trained system prompt as the chat template's default: what is trained is what is served.
load_tokenizer = partial(model_folder.load_tokenizer, encode)


# ---- Micro-batches: the rows of an optimizer step, without padding ------------------------------
class StepSampler(torch.utils.data.Sampler):
    """The row numbers of each optimizer step of an epoch, in an order of the seed and the epoch."""

    def __init__(self, num_rows: int, rows_per_step: int, seed: int):
        self.num_rows, self.rows_per_step, self.seed, self.epoch = num_rows, rows_per_step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.rows_per_step)

    def __iter__(self):
        order = torch.Generator().manual_seed(self.seed + self.epoch)
        for step in torch.randperm(self.num_rows, generator=order).split(self.rows_per_step):
            yield step.tolist()


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
    is the token that position t is to predict, or -100. seq_lens: each row's tokens, as a list;
    cu_seq_lens [rows + 1]: the boundaries between them.
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
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast left them fp32
    ampere = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    if ampere and query.dtype in (torch.bfloat16, torch.float16):
        return numerics.varlen_attention(
            query, key, value, seq_lens, cu_seq_lens, kwargs["scaling"]
        ), None
    if query.is_cuda and not ampere:  # whose fused kernel wants a key and value per query head
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    options = {"is_causal": True, "scale": kwargs["scaling"], "enable_gqa": True}
    rows = zip(*(x.split(seq_lens, dim=2) for x in (query, key, value)))
    outputs = [scaled_dot_product_attention(*row, **options) for row in rows]
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
        hidden = output.last_hidden_state.to(head.device)[trained]  # [N, hidden size]
        loss_sum = numerics.cross_entropy_sum(hidden, head, shift_labels[trained])
        return {"loss": loss_sum / num_items_in_batch}


def model_class():
    """Return Qwen2ForCausalLM with AnswerLoss, having registered row_attention.

    Under the same name, so that exports, device maps and FSDP see the ordinary model. In a
    function, because importing models takes seconds, which --help need not wait for.
    """
    transformers.AttentionInterface.register("row_attention", row_attention)
    masks = transformers.AttentionMaskInterface
    masks.register("row_attention", masks()["sdpa"])  # for generation
    return type("Qwen2ForCausalLM", (AnswerLoss, transformers.Qwen2ForCausalLM), {})


def load_model(name_or_path: str, dtype: torch.dtype, device_map=None):
    return model_folder.load_weights(model_class(), name_or_path, dtype, device_map)


# ---- Trainer: one optimizer step over a set of rows ---------------------------------------------
class StepTrainer:
    """Mixin that build_trainer combines with transformers.Trainer: a batch is a whole step's rows.

    `plan` says how many tokens a micro-batch may have, and up to how many nothing is recomputed.
    """

    def __init__(self, model, args, plan: Plan, max_len: int, rows_per_step: int, **kwargs):
        super().__init__(model, args, data_collator=list, **kwargs)
        self.max_len, self.rows_per_step = max_len, rows_per_step
        self.tokens_per_forward = plan.tokens_per_forward
        self.max_tokens_without_checkpointing = plan.max_tokens_without_checkpointing
        self.skipped_steps = 0  # consecutive ones, by fp16's loss scaler
        self.step_rows, self.running = [], []  # of now: the step's rows, a micro-batch's lengths
        self.since, self.num_tokens, self.flops = time.time(), 0, 0  # of the steps not yet logged

    def get_train_dataloader(self):
        """Return the loader of steps: lists of rows, the same in all processes."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = StepSampler(len(self.train_dataset), self.rows_per_step, seed)
        options = {"batch_sampler": sampler, "collate_fn": list}
        loader = torch.utils.data.DataLoader(self.train_dataset, **options)
        loader.set_epoch = sampler.set_epoch  # Trainer calls it
        return loader

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        # Of a step that fp16's scaler skips, this hook does not hear: training_step counts those.
        optimizer.register_step_pre_hook(lambda *_: self.check_gradients())
        # Fused AdamW would skip a step on its own, and the schedule go on.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Return Trainer's schedule; where it warms up, one step ahead.

        A warm-up begins with a rate of 0, and the rows of that step would not be trained. The last
        step, at the schedule's end, would have 0 again: it has the rate of half a step before.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.get_warmup_steps(num_training_steps) > 0 and isinstance(scheduler, LambdaLR):
            last = num_training_steps - 0.5
            ahead = [lambda step, f=f: f(min(step + 1, last)) for f in scheduler.lr_lambdas]
            scheduler = self.lr_scheduler = LambdaLR(scheduler.optimizer, ahead)
        return scheduler

    def training_step(self, model, rows, num_items_in_batch=None):
        """Run a step's micro-batches forward and backward, and return its loss."""
        model.train()
        if self.num_tokens == 0:  # what came since the last log is no part of the steps' time
            self.since = time.time()
        # fp16's loss scale begins too high on purpose: it skips such steps, and halves itself.
        skipped = self.accelerator.optimizer_step_was_skipped
        self.skipped_steps = self.skipped_steps + 1 if skipped else 0
        self.step_rows = rows
        local_loss = self.run_smaller_until_it_fits(self.forward_backward, rows)
        step_loss = self.accelerator.reduce(local_loss, "mean").item()  # the same in all processes
        # Exactly 0 is what wrong labels and overflown logits look like.
        if not math.isfinite(step_loss) or step_loss == 0:
            raise self.broken_step(f"its loss is {step_loss}")
        if self.skipped_steps > MAX_SKIPPED:
            raise self.broken_step(f"{self.skipped_steps} steps had infinite gradients in fp16")
        lengths = np.array([len(row["input_ids"][: self.max_len]) for row in rows])
        self.num_tokens += lengths.sum()
        num_parameters = self.model.num_parameters()
        self.flops += memory_plan.training_flops(self.model.config, num_parameters, lengths)
        return local_loss

    def forward_backward(self, batches: list[dict], trained_tokens: int) -> torch.Tensor:
        """Return the loss of this process's micro-batches, having added up its gradients.

        The divisor is the trained tokens of all processes. Processes average gradients and losses,
        so each multiplies its part by their number.
        """
        local_loss = torch.zeros((), device=self.args.device)
        divisor = trained_tokens / self.args.world_size
        for i, batch in enumerate(batches, 1):
            self.running = batch["seq_lens"]
            self.choose_checkpointing(sum(batch["seq_lens"]))
            # At the last one; with FSDP at each, or every process would hold whole gradients.
            exchange = self.is_fsdp_enabled or i == len(batches)
            with nullcontext() if exchange else self.accelerator.no_sync(self.model_wrapped):
                loss = self.model_wrapped(**batch, num_items_in_batch=divisor)["loss"]
                self.accelerator.backward(loss)
            local_loss += loss.detach()
        return local_loss

    def choose_checkpointing(self, tokens: int) -> None:
        """Recompute layers in the backward pass only where memory asks for it."""
        if self.args.gradient_checkpointing:
            for layer in self.model.model.layers:
                layer.gradient_checkpointing = tokens > self.max_tokens_without_checkpointing

    def run_smaller_until_it_fits(self, work, rows: list[dict]):
        """Return work(micro-batches of these rows, trained tokens); if need be, less at once."""
        while True:
            share = (self.args.process_index, self.args.world_size)
            batches, trained_tokens = collate(rows, self.max_len, self.tokens_per_forward, *share)
            try:
                batches = [self._prepare_inputs(batch) for batch in batches]
                return work(batches, trained_tokens)
            except torch.OutOfMemoryError:
                self.lower_limits(self.running)
            # Outside of "except", whose traceback holds the activations of the failed pass. The
            # gradients of passes that worked go, too: the whole step is run again.
            self.model_wrapped.zero_grad()
            torch.cuda.empty_cache()

    def lower_limits(self, seq_lens: list[int]) -> None:
        """Recompute more, or if it was already, halve tokens_per_forward, for the rest of the run.

        `seq_lens`: of the micro-batch that failed. Raises UserError where that cannot help, and for
        several processes: the others would not do the same.
        """
        tokens = sum(seq_lens)
        if self.args.world_size > 1:
            half = tokens // 2
            raise UserError(f"out of memory with {tokens} tokens; try --tokens_per_forward {half}")
        recomputes = self.args.gradient_checkpointing and self.model.training
        if recomputes and tokens <= self.max_tokens_without_checkpointing:
            self.max_tokens_without_checkpointing = int(0.85 * tokens)
            now = f"gradient checkpointing from {self.max_tokens_without_checkpointing + 1} on"
        elif len(seq_lens) == 1:
            raise UserError(f"out of memory with one row of {tokens} tokens; lower --max_len")
        else:
            self.tokens_per_forward = tokens // 2
            now = f"--tokens_per_forward {self.tokens_per_forward}"
        say(f"memory     out of it with {tokens} tokens in a micro-batch; now {now}")

    def check_gradients(self) -> None:
        """Stop before gradients that are not finite reach the weights."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = numerics.total_norm(grads)
        if not math.isfinite(norm):
            raise self.broken_step(f"its gradient norm is {norm}")

    def broken_step(self, what: str) -> UserError:
        rows = ", ".join(row["place"] for row in self.step_rows)
        return UserError(
            f"step {self.state.global_step + 1}: {what}. Training stopped before that reached the "
            "weights; checkpoints are as they were, nothing is exported. Begin anew with a lower "
            f"--learning_rate, or mend its rows: {rows}"
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Log and return {"eval_loss"}: the mean over the trained tokens of the validation rows."""
        self.model.eval()
        loss_sum, token_sum = 0.0, 0
        numbers, size = range(len(self.eval_dataset)), self.rows_per_step
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        for first in tqdm.auto.tqdm(numbers[::size], "evaluation", leave=False, disable=quiet):
            rows = [self.eval_dataset[i] for i in numbers[first : first + size]]
            part_sum, tokens = self.run_smaller_until_it_fits(self.forward_loss, rows)
            loss_sum, token_sum = loss_sum + part_sum, token_sum + tokens
        loss_sum = self.accelerator.reduce(torch.tensor(loss_sum, device=self.args.device)).item()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / token_sum}
        self.log(metrics)
        state = (self.args, self.state, self.control)
        self.control = self.callback_handler.on_evaluate(*state, metrics)
        return metrics

    def is_evaluated(self) -> bool:
        """Return whether the last eval_loss in the log is that of the weights as they are."""
        last = max((log["step"] for log in self.state.log_history if "eval_loss" in log), default=0)
        return last == self.state.global_step and not self.args.load_best_model_at_end

    def forward_loss(self, batches: list[dict], trained_tokens: int) -> tuple[float, int]:
        """Return (loss summed over this process's trained tokens, those of all processes)."""
        loss_sum = 0.0
        with torch.no_grad(), self.accelerator.autocast():
            for batch in batches:
                self.running = batch["seq_lens"]
                loss_sum += self.model(**batch)["loss"].item()
        return loss_sum, trained_tokens

    def log(self, logs: dict, start_time=None) -> None:
        """Log as Trainer does; of steps, also the throughput and its share of the GPUs' peak."""
        if "loss" in logs:
            seconds = time.time() - self.since
            logs["tokens_per_s"] = round(self.num_tokens / seconds)
            if self.args.device.type == "cuda":
                if peak := memory_plan.peak_tflops(torch.cuda.get_device_name()):
                    logs["mfu"] = self.flops / seconds / (peak * 1e12 * self.args.world_size)
                gpus = range(torch.cuda.device_count())
                logs["peak_gib"] = max(map(torch.cuda.max_memory_allocated, gpus)) / GIB
            self.num_tokens, self.flops = 0, 0
            if self.args.fp16:  # those that the loss scaler skipped, and the schedule with it
                logs["skipped_steps"] = self.state.global_step - self.lr_scheduler.last_epoch
        super().log(logs, start_time)


def trainer_arguments(script_args, training_args, precision, rows: dict):
    """Return the TrainingArguments for Trainer, for which a step is one large batch."""
    bf16_weights = precision.weights == torch.bfloat16  # then nothing is left for autocast
    args = replace(
        training_args,
        per_device_train_batch_size=rows_per_step(training_args) // training_args.world_size,
        gradient_accumulation_steps=1,
        bf16=precision.compute_dtype == torch.bfloat16 and not bf16_weights,
        fp16=precision.compute_dtype == torch.float16,
        optim=precision.optim,
        eval_on_start="validation" in rows and not script_args.resume,
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs in one process: never nn.DataParallel
    if args.fsdp:  # accelerate's own policy would sum gradients in half precision
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = MixedPrecisionPolicy(precision.compute_dtype, reduce_dtype=torch.float32)
        args.fsdp_plugin_args["mixed_precision_policy"] = policy
    return args


def build_trainer(model, tokenizer, script_args, training_args, rows, precision, plan, stop):
    """Return the transformers.Trainer with StepTrainer's steps, over the rows of each split."""
    from accelerate.utils import AutocastKwargs

    from sft.shards import ShardedCheckpoints  # here, as accelerate: they take a second

    args = trainer_arguments(script_args, training_args, precision, rows)
    optimizer = None  # Trainer's own of this name
    if precision.optim == "adamw_torch_8bit":
        options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
        options |= {"eps": args.adam_epsilon, "bf16_stochastic_round": True}  # if weights are bf16
        options["seed"] = args.seed + args.process_index  # of the rounding
        optimizer = (numerics.adamw_8bit_class(), options)
    hooks = [callbacks.MetricsLog(), stop]
    if script_args.early_stopping_patience:
        hooks.append(transformers.EarlyStoppingCallback(script_args.early_stopping_patience))
    bases = (StepTrainer, run_folder.WholeCheckpoints, ShardedCheckpoints, transformers.Trainer)
    trainer = type("SFTTrainer", bases, {})(  # here: importing Trainer takes seconds
        model,
        args,
        plan,
        script_args.max_len,
        rows_per_step(training_args),
        processing_class=tokenizer,
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),
        optimizer_cls_and_kwargs=optimizer,
        callbacks=hooks,
    )
    # A cache of half-precision weights would cost 2 bytes a parameter, and save little time.
    trainer.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    return trainer


# ---- The run ------------------------------------------------------------------------------------
def read_data(args, training_args, tokenizer) -> tuple[dict, dict, dict]:
    """Return all rows of each split, those to train on, and their counts; print the counts."""
    tables, rows, counts, files = {}, {}, {}, find_data_files(args.data_path)
    if training_args.eval_strategy != "no" and "validation" not in files:
        raise UserError("--eval_strategy needs validation rows: a file named validation*")
    for split, paths in files.items():
        tables[split] = encode_files(paths, tokenizer, args.system_prompt, encode_batch, __file__)
        limits = (args.max_len, args.overflow_strategy, args.skip_bad_rows)
        rows[split], counts[split] = fit_rows(tables[split], *limits)
        encoded_rows.print_data(split, counts[split])
    shortest = truncate(rows["train"][int(rows["train"]["num_tokens"].argmin())], args.max_len)
    example = encoded_rows.mark_trained_tokens(shortest, tokenizer, sys.stdout.isatty())
    print(f"example    {example}", flush=True)
    return tables, rows, counts


def make_plan(config, args, training_args, rows) -> tuple:
    """Return (Precision, Plan) for these devices and rows; print what will be done and why."""
    lengths = rows["num_tokens"].clip(max=args.max_len)
    if args.max_len > (positions := config.max_position_embeddings):
        print(f"max_len    {encoded_rows.beyond_positions(args.max_len, positions)}")
    capacities, capability = memory_plan.find_devices(args.gpus, training_args)
    precision = with_optim(memory_plan.choose_precision(capability, args.fp32), args.chosen_optim)
    # Processes on the CPU have all weights each.
    shards = 1 if precision.compute_dtype == torch.float32 else training_args.world_size
    job, longest = memory_plan.Job(config, precision, capacities, shards), int(lengths.max())
    plan = memory_plan.plan_memory(job, args, training_args, longest)
    memory_plan.print_plan(plan, job, args, training_args, lengths, bin_rows)
    memory_plan.check_plan(plan, job, args, training_args, longest)
    return precision, plan


def run(args: ScriptArguments, training_args) -> int:
    """Read, encode, plan, train, export; return the exit code. Raises UserError."""
    if not args.gpus:
        memory_plan.check_machine(training_args)
    default, on_gpu = ScriptArguments.model_name_or_path, training_args.device.type == "cuda"
    config = model_folder.check_model(args.model_name_or_path, default, on_gpu or args.dry_run)
    tokenizer = load_tokenizer(args.model_name_or_path, args.system_prompt)
    tables, rows, counts = read_data(args, training_args, tokenizer)
    precision, plan = make_plan(config, args, training_args, rows["train"])
    if args.dry_run:
        return 0
    if precision.optim == "adamw_torch_8bit":
        numerics.check_compiler(training_args.device.type)
        print("compile    the optimizer at its first step, which takes a minute the first time")
    terms = run_folder.resume_terms(args, training_args, precision, rows)
    folder = run_folder.open_run(args, training_args, terms, counts)
    with folder as checkpoint, callbacks.wandb_run(training_args):
        if args.skip_bad_rows and training_args.should_save:
            encoded_rows.write_rejected(tables.values(), training_args.output_dir)
        model = load_model(args.model_name_or_path, precision.weights, plan.device_map)
        stop = callbacks.StopOnSignal()
        trainer = build_trainer(model, tokenizer, args, training_args, rows, precision, plan, stop)
        base_dtype = config.dtype or precision.weights  # the export has that of the base's files
        return train_and_export(trainer, tokenizer, stop, checkpoint, base_dtype)


def train_and_export(trainer, tokenizer, stop, checkpoint: str | None, dtype: torch.dtype) -> int:
    """Train, evaluate, write the model; return the exit code."""
    output_dir, questions = trainer.args.output_dir, []
    if trainer.eval_dataset is not None and not trainer.is_fsdp_enabled:  # takes 1 s a token
        questions = answers.held_out_questions(trainer.eval_dataset)
    before = answers.answer(trainer.model, tokenizer, questions)
    if stop_signal := callbacks.train(trainer, stop, checkpoint):
        return 128 + stop_signal
    trainer.model.config.use_cache = True  # Trainer turned it off; what is served needs it
    trainer.export(dtype, IM_END)
    if trainer.eval_dataset is not None and not trainer.is_evaluated():
        trainer.evaluate()
    after = answers.answer(trainer.model, tokenizer, questions)
    answers.print_answers(tokenizer, questions, before, after)
    print(f"logs       {output_dir}/metrics.jsonl, {output_dir}/run.json")
    print(f"model      {output_dir} ({dtype}, as the base); to serve it: vllm serve {output_dir}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code, 1 after a UserError. A wrong argument exits with 2."""
    callbacks.quiet_libraries()
    argv = sys.argv[1:] if argv is None else argv
    args, training_args = parse_arguments(argv, ScriptArguments, TRAINING_DEFAULTS)
    rank = training_args.process_index
    silence = redirect_stdout(io.StringIO()) if rank > 0 else nullcontext()
    try:
        with callbacks.lasting_console(), silence:  # the first prints for all; each its own error
            code = run(args, training_args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return code
    except (UserError, OSError) as error:  # a full disk, files without permission, a lost network
        where = f" in process {rank}" * (training_args.world_size > 1)
        print(f"error{where}: {error}", file=sys.stderr)
        callbacks.tell_torchrun(f"error{where}: {error}")
        return 1
    except KeyboardInterrupt:
        print(f"stopped    {run_folder.saved_so_far(training_args.output_dir)}", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
