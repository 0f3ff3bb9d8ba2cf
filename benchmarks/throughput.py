"""Training throughput on the CPU: this trainer beside the usual ways, on the same examples.

    pip install trl==1.16.0
    python benchmarks/throughput.py --data FILE.jsonl [--steps 4] [--rows_per_step 64] [--rounds 3]
    python benchmarks/throughput.py --synthetic [--steps 1] [--rows_per_step 2] [--rounds 1]

Every contender loads the same small Qwen2 (random weights of a fixed seed, fp32) and takes the same
examples in the same order, `rows_per_step` to an optimizer step, with AdamW and gradient
checkpointing switched on, without logging and saving. This trainer leaves checkpointing out where
its plan says that memory suffices. "Layer passes" shows what ran: 2.00 where each layer's forward
pass is repeated for the backward pass. One step warms up, and `steps` are timed. Rounds take the
contenders in turn, and the table shows medians. Encoding is not timed. Without TRL its contenders
are left out.

Each run is a fresh process. Its peak memory is the most that the process ever held resident (the
kernel's VmHWM). About 0.5 GiB of it are Python and the imported libraries.

The loss of the first step must be the same to 1e-3, and so must the number of trained tokens. A
contender that does other work is marked VOID, and the exit code is 1.
"""

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "harness")]

# ruff: noqa: E402
import datasets
import numpy as np
import runs
import torch
import transformers

import sft_qwen2
from sft.command_line import parse
from sft.console import quiet_libraries
from sft.examples import IGNORE_INDEX, select_examples
from sft.model_files import load_tokenizer
from sft.plan import Plan, check_plan, plan_run
from sft.throughput import GIB

MAX_LEN = 8192
SEED = 0
TOLERANCE = 1e-3
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 9,
    "intermediate_size": 960,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all contenders are given."""

    folder: str  # with the weights; also for what a trainer insists on writing
    tokenizer: transformers.PreTrainedTokenizerBase
    examples: list[dict]
    longest: int  # tokens to pad to: of the longest example of the data
    options: dict  # Trainer's arguments of all

    @property
    def examples_per_step(self) -> int:
        return (
            self.options["per_device_train_batch_size"]
            * self.options["gradient_accumulation_steps"]
        )


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """What was done from the start of training to the end of a step."""

    loss: float  # sum of the steps' losses
    clock_s: float
    trained_tokens: int
    computed_tokens: int  # tokens that entered the model, padding included
    layer_tokens: int  # tokens that entered the first layer's MLP, in whichever pass


@dataclass(frozen=True, kw_only=True)
class Result:
    """The first step's loss, and what the timed steps took."""

    first_step_loss: float
    duration_s: float
    trained_tokens: int
    computed_tokens: int
    layer_passes: float
    peak_bytes: int


class Clock(transformers.TrainerCallback):
    """Times steps from boundary to boundary, and counts what enters the model and its layers."""

    def __init__(self, trainer):
        self.is_on_gpu = trainer.args.device.type == "cuda"
        self.boundaries = []
        self.loss = 0.0
        self.trained_tokens = 0
        self.computed_tokens = 0
        self.layer_tokens = 0
        self.training_step = trainer.training_step
        trainer.training_step = self.watch_step
        trainer.model.register_forward_pre_hook(self.count, with_kwargs=True)
        # Checkpointing repeats what is inside a layer. A hook on the layer itself sees it once.
        trainer.model.model.layers[0].mlp.register_forward_pre_hook(self.count_layer)
        trainer.remove_callback(transformers.ProgressCallback)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(self)

    def watch_step(self, *args, **kwargs):
        loss = self.training_step(*args, **kwargs)
        self.loss = self.loss + loss  # already divided by the step's trained tokens
        return loss

    def count(self, model, args, kwargs) -> None:
        self.computed_tokens += kwargs["input_ids"].numel()
        if "targets" in kwargs:
            self.trained_tokens += kwargs["targets"].numel()
            return
        labels = kwargs["labels"][:, 1:]
        if "shift_labels" in kwargs:
            labels = kwargs["shift_labels"]
        # A GPU is not waited for.
        self.trained_tokens = self.trained_tokens + (labels != IGNORE_INDEX).sum()

    def count_layer(self, mlp, args) -> None:
        self.layer_tokens += args[0].shape[:2].numel()

    def on_step_end(self, *args, **kwargs) -> None:
        if self.is_on_gpu:
            torch.cuda.synchronize()
        boundary = Boundary(
            loss=float(self.loss),
            clock_s=time.perf_counter(),
            trained_tokens=int(self.trained_tokens),
            computed_tokens=self.computed_tokens,
            layer_tokens=self.layer_tokens,
        )
        self.boundaries.append(boundary)

    def result(self) -> Result:
        """Return the figures of the steps after the first."""
        first = self.boundaries[0]
        last = self.boundaries[-1]
        computed_tokens = last.computed_tokens - first.computed_tokens
        return Result(
            first_step_loss=first.loss,
            duration_s=last.clock_s - first.clock_s,
            trained_tokens=last.trained_tokens - first.trained_tokens,
            computed_tokens=computed_tokens,
            layer_passes=(last.layer_tokens - first.layer_tokens) / computed_tokens,
            peak_bytes=measure_peak_resident(),
        )


def measure_peak_resident() -> int:
    """Return the most bytes that this process ever held in memory (Linux).

    getrusage's ru_maxrss is no use: a process inherits it from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def time_steps(trainer) -> Result:
    clock = Clock(trainer)
    trainer.train()
    return clock.result()


# ---- The contenders -----------------------------------------------------------------------------
def list_in_order(examples: list[dict], examples_per_step: int) -> list[dict]:
    """Return the examples as lists, in the order in which this trainer takes them."""
    ordered = []
    for step in sft_qwen2.StepSampler(len(examples), examples_per_step, SEED):
        for index in step:
            example = examples[index]
            ordered.append(
                {
                    "input_ids": example["input_ids"].tolist(),
                    "labels": example["labels"].tolist(),
                }
            )
    return ordered


def list_lengths(examples: list[dict]) -> np.ndarray:
    return np.array([len(example["input_ids"]) for example in examples])


def options_of_others(options: dict) -> dict:
    """Return the options for Trainers that do not come from this script."""
    return {
        **options,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def load_plain_model(folder: str):
    return transformers.Qwen2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )


def run_plain(task: Task, padding: str) -> Result:
    """Run transformers.Trainer as it is, with padded batches."""
    collator = transformers.DataCollatorForSeq2Seq(
        task.tokenizer, padding=padding, max_length=task.longest
    )
    trainer = transformers.Trainer(
        load_plain_model(task.folder),
        transformers.TrainingArguments(**options_of_others(task.options)),
        train_dataset=list_in_order(task.examples, task.examples_per_step),
        data_collator=collator,
    )
    return time_steps(trainer)


def make_trl_trainer(model, tokenizer, examples: list[dict], options: dict):
    """Return trl.SFTTrainer for encoded examples in their order, its loss on completions only."""
    import trl

    columns = {"input_ids": [], "completion_mask": []}
    for example in examples:
        mask = [int(label != IGNORE_INDEX) for label in example["labels"]]
        columns["input_ids"].append(example["input_ids"])
        columns["completion_mask"].append(mask)
    options = {**options, "max_length": None, "completion_only_loss": True, "packing": False}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**options),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    labels = [example["labels"] for example in examples]
    assert trainer.train_dataset["labels"][:] == labels, "TRL would train other tokens"
    return trainer


def run_trl(task: Task, padding_free: bool) -> Result:
    """Run TRL. Its packing is no contender, because it puts other examples into a step."""
    options = {**options_of_others(task.options), "bf16": False, "padding_free": padding_free}
    examples = list_in_order(task.examples, task.examples_per_step)
    model = load_plain_model(task.folder)
    return time_steps(make_trl_trainer(model, task.tokenizer, examples, options))


def make_own_trainer(
    config, tokenizer, examples: list[dict], flags: dict
) -> tuple[sft_qwen2.SFTTrainer, Plan]:
    """Return the script's trainer for a command line, and its plan."""
    args = parse(runs.argv(**flags), sft_qwen2.SFTArguments)
    training_args = sft_qwen2.make_training_arguments(args)
    num_trained_tokens = sft_qwen2.count_trained_tokens(examples)
    lengths = list_lengths(examples)
    plan = plan_run(config, args, training_args, lengths, num_trained_tokens)
    check_plan(plan)
    split = {"train": examples}
    return sft_qwen2.make_trainer(args, training_args, plan, tokenizer, split, False), plan


def run_own(task: Task) -> Result:
    """Run this trainer with its defaults."""
    config = transformers.Qwen2Config.from_pretrained(task.folder)
    flags = {**task.options, "model_name_or_path": task.folder}
    trainer, _ = make_own_trainer(config, task.tokenizer, task.examples, flags)
    return time_steps(trainer)


CONTENDERS = {
    "padded to longest": lambda task: run_plain(task, "max_length"),
    "dynamic padding": lambda task: run_plain(task, "longest"),
    "TRL": lambda task: run_trl(task, False),
    "TRL, padding-free": lambda task: run_trl(task, True),
    "this trainer": run_own,
}


def list_contenders() -> list[str]:
    """Return the names of those whose packages are installed."""
    if importlib.util.find_spec("trl"):
        return list(CONTENDERS)
    return [name for name in CONTENDERS if not name.startswith("TRL")]


def run_contender(name: str, task: Task) -> Result:
    be_quiet()
    return CONTENDERS[name](task)


def run_in_own_process(name: str, task: Task) -> Result:
    """Run a contender where none ran before: its peak memory is its own."""
    fresh = multiprocessing.get_context("spawn")  # a fork would begin with this process's memory
    with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as pool:
        return pool.submit(run_contender, name, task).result()


# ---- Examples, model, machine -------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class RandomExamples:
    """Examples of random tokens: their lengths rise from shortest to longest, few are long."""

    number: int
    shortest: int  # tokens
    longest: int
    skew: float  # 1: as many long examples as short ones
    trained_share: float  # of an example's tokens, at its end

    def make(self, vocab_size: int) -> list[dict]:
        random = np.random.default_rng(SEED)
        examples = []
        for share in np.linspace(0, 1, self.number) ** self.skew:
            length = round(self.shortest + share * (self.longest - self.shortest))
            input_ids = random.integers(0, vocab_size, length).astype(np.int32)
            labels = input_ids.astype(np.int64)
            labels[: round(length * (1 - self.trained_share))] = IGNORE_INDEX
            source = f"random:{len(examples) + 1}"
            examples.append({"input_ids": input_ids, "labels": labels, "source": source})
        return examples


LONG = RandomExamples(number=256, shortest=4113, longest=8001, skew=3.32, trained_share=1 / 2)


def draw(examples, number: int) -> list[dict]:
    """Return so many examples, drawn at random. Few examples are taken more than once."""
    order = np.random.default_rng(SEED).permutation(len(examples))
    return [examples[int(index)] for index in np.resize(order, number)]


def save_model(tokenizer, folder: str, sizes: dict) -> transformers.Qwen2Config:
    """Save a Qwen2 with random weights, head and embedding apart, and the tokenizer."""
    config = transformers.Qwen2Config(
        **sizes,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(SEED)
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"model      Qwen2, {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")
    return config


def read_examples(path: Path, tokenizer):
    """Return the examples of a data file, as the trainer selects them."""
    args = SimpleNamespace(system_prompt="You are a helpful assistant.", train_on="all")
    encoded = sft_qwen2.encode_files([path], tokenizer, args)
    return select_examples(encoded, [path], MAX_LEN, "truncate", False)


def make_task(args, folder: str, tokenizer) -> Task:
    longest = MAX_LEN
    examples_at_once = 2
    if args.data:
        examples = read_examples(args.data, tokenizer)
        longest = int(examples.lengths.max())
        examples_at_once = 4
    else:
        examples = LONG.make(len(tokenizer))
    chosen = draw(examples, (args.steps + 1) * args.rows_per_step)
    lengths = list_lengths(chosen)
    print(
        f"examples   {len(chosen):,} of {len(examples):,}: {lengths.min():,} to "
        f"{lengths.max():,} tokens, mean {lengths.mean():,.0f}"
    )
    options = {
        "output_dir": folder,
        "max_steps": args.steps + 1,
        "seed": SEED,
        "use_cpu": True,
        "per_device_train_batch_size": examples_at_once,
        "gradient_accumulation_steps": args.rows_per_step // examples_at_once,
        "gradient_checkpointing": True,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-5,
        "logging_steps": args.steps + 2,
        "save_strategy": "no",
        "report_to": "none",
    }
    return Task(
        folder=folder, tokenizer=tokenizer, examples=chosen, longest=longest, options=options
    )


def measure_matmul_flops() -> float:
    """Return FLOPs per second of fp32 matrix products: the median of several, of three sizes."""
    rates = []
    for size in (1024, 1536, 2048) * 5:
        a = torch.rand(size, size)
        b = torch.rand(size, size)
        start = time.perf_counter()
        a @ b
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return statistics.median(rates[3:])  # the first of each size warm up


def count_matrix_flops(config, examples: list[dict], layer_passes: float) -> float:
    """Return the FLOPs of all matrix products that training without padding takes.

    A product of [m, k] and [k, n] is 2mkn FLOPs. Forward, a layer takes 2 for each weight of its
    matrices and each token. Attention takes 2 x hidden for each pair of a query and a key it sees
    (scores), and as many again (values). T tokens have T (T + 1) / 2 such pairs. Backward takes
    twice as much. What checkpointing repeats is counted: a layer's forward pass without the MLP's
    last product, whose result no gradient needs. The head takes 2 x hidden x vocabulary for each
    trained token, and twice that backward. Other operations are not counted.
    """
    hidden = config.hidden_size
    intermediate = config.intermediate_size
    key_values = hidden // config.num_attention_heads * config.num_key_value_heads
    weights = hidden * (2 * hidden + 2 * key_values + 3 * intermediate)
    lengths = list_lengths(examples).astype(float)
    pairs = (lengths * (lengths + 1) / 2).sum()
    layer = 2 * weights * lengths.sum() + 4 * hidden * pairs
    repeated = layer - 2 * hidden * intermediate * lengths.sum()
    layers = config.num_hidden_layers * (3 * layer + (layer_passes - 1) * repeated)
    num_trained_tokens = sft_qwen2.count_trained_tokens(examples)
    return layers + 3 * 2 * hidden * config.vocab_size * num_trained_tokens


# ---- The run ------------------------------------------------------------------------------------
COLUMNS = (
    "contender",
    "s/step",
    "useful tokens/s",
    "trained tokens/s",
    "padding",
    "x padded to longest",
    "x TRL",
    "peak GiB",
    "layer passes",
    "first-step loss",
)


def is_same_work(result: Result, trained_tokens: int, loss: float) -> bool:
    is_close = abs(result.first_step_loss / loss - 1) <= TOLERANCE
    return is_close and result.trained_tokens == trained_tokens


def times_faster(seconds: dict[str, float], other: str, name: str) -> str:
    if other not in seconds:
        return ""
    return f"{seconds[other] / seconds[name]:.2f}"


def print_table(examples: list[dict], steps: int, results: dict[str, list[Result]]) -> bool:
    """Print a line for each contender over the timed examples. Return whether all did the same."""
    num_tokens = int(list_lengths(examples).sum())
    num_trained_tokens = sft_qwen2.count_trained_tokens(examples)
    seconds = {}
    for name, found in results.items():
        seconds[name] = statistics.median(result.duration_s for result in found)
    loss = statistics.median(found[0].first_step_loss for found in results.values())
    print("\n| " + " | ".join(COLUMNS) + " |\n|---" + "|--:" * (len(COLUMNS) - 1) + "|")
    all_are_same = True
    for name, found in results.items():
        title = name
        if not all(is_same_work(result, num_trained_tokens, loss) for result in found):
            title = f"VOID {name}"
            all_are_same = False
        cells = (
            title,
            f"{seconds[name] / steps:.2f}",
            f"{num_tokens / seconds[name]:,.0f}",
            f"{num_trained_tokens / seconds[name]:,.0f}",
            f"{1 - num_tokens / found[0].computed_tokens:.0%}",
            times_faster(seconds, "padded to longest", name),
            times_faster(seconds, "TRL", name),
            f"{statistics.median(result.peak_bytes for result in found) / GIB:.2f}",
            f"{found[0].layer_passes:.2f}",
            f"{found[0].first_step_loss:.5f}",
        )
        print("| " + " | ".join(cells) + " |")
    return all_are_same


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="rows as the trainer reads them")
    source.add_argument("--synthetic", action="store_true", help="random tokens, 5,017 a row")
    parser.add_argument("--steps", type=int, help="timed steps; 4, or 1 of synthetic rows")
    parser.add_argument("--rows_per_step", type=int, help="64, or 2 synthetic rows")
    parser.add_argument("--rounds", type=int, help="3, or 1 of synthetic rows")
    parser.add_argument("--tokenizer", default=str(runs.TINY))
    args = parser.parse_args()
    # Long rows take minutes a step.
    defaults = {"steps": 4, "rows_per_step": 64, "rounds": 3}
    if args.synthetic:
        defaults = {"steps": 1, "rows_per_step": 2, "rounds": 1}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.steps, args.rounds, args.rows_per_step) < 1:
        parser.error("--steps, --rounds and --rows_per_step begin at 1")
    if (args.data and args.rows_per_step % 4) or args.rows_per_step % 2:
        parser.error("--rows_per_step is a multiple of 4, of 2 with --synthetic")
    return args


def be_quiet() -> None:
    warnings.filterwarnings("ignore")
    quiet_libraries()
    datasets.disable_progress_bars()


def main() -> int:
    args = parse_arguments()
    be_quiet()
    names = list_contenders()
    versions = []
    for package in ("torch", "transformers", "trl", "accelerate"):
        if importlib.util.find_spec(package):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    print(f"command    python {shlex.join(sys.argv)}")
    print(f"machine    {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, fp32")
    print(f"versions   {', '.join(versions)}")
    tokenizer = load_tokenizer(args.tokenizer)
    results = {name: [] for name in names}
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        config = save_model(tokenizer, folder, SIZES)
        task = make_task(args, folder, tokenizer)
        for _ in range(args.rounds):
            for name in names:
                rates.append(measure_matmul_flops())
                result = run_in_own_process(name, task)
                results[name].append(result)
                print(f"ran        {name}: {result.duration_s:.1f} s", flush=True)
    timed = []
    order = list(sft_qwen2.StepSampler(len(task.examples), task.examples_per_step, SEED))
    for step in order[1:]:
        timed += [task.examples[index] for index in step]
    own = results["this trainer"]
    flops = count_matrix_flops(config, timed, own[0].layer_passes)
    rate = statistics.median(rates)
    share = flops / statistics.median(result.duration_s for result in own) / rate
    print(f"matrices   {rate / 1e9:.0f} GFLOP/s in fp32 products; this trainer's are {share:.0%}")
    return 0 if print_table(timed, args.steps, results) else 1


if __name__ == "__main__":
    sys.exit(main())
