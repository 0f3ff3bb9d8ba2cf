"""Count the tokens of training examples as sft_qwen2.py encodes them, to choose max_len beforehand.

    python token_stats.py --data_path my_data/
    python token_stats.py run.json                  # the data and the model of these arguments

The tokens of an example are prompt and answer together. Each answer and the <|im_end|> after it are
trained. Only the tokenizer is loaded. The encoded examples are cached for sft_qwen2.py.
Exit code 1 means that sft_qwen2.py would refuse the data.
"""

import contextlib
import json
import math
import shlex
import signal
import sys
from dataclasses import dataclass

from sft.startup import announce_start

if __name__ == "__main__":
    announce_start(sys.stderr)

import numpy as np
import transformers

from sft.command_line import list_options, option, parse, read_flags
from sft.console import outlive_console, quiet_libraries
from sft.data_files import find_data_files
from sft.errors import UserError
from sft.examples import (
    check_share,
    count_held_out,
    count_kept_tokens,
    describe_rejected,
    get_column,
)
from sft.model_files import count_positions, warn_beyond_positions
from sft.plan_report import MIN_STEPS, suggest_schedule
from sft_qwen2 import SFTArguments, bin_by_tokens, encode_files, prepare_tokenizer

PERCENTILES = {"min": 0, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
SHORTEST_MAX_LEN = 512  # tokens; each next candidate is twice as long
NUM_SAMPLED_STEPS = 25  # optimizer steps drawn at random, to see how many micro-batches they make
MAX_BARS = 16
BAR_COLUMNS = 56
# These options may be flags here. A file of arguments may have all.
FLAGS = [
    "model_name_or_path",
    "data_path",
    "system_prompt",
    "train_on",
    "skip_bad_rows",
    "validation_split",
    "json",
]


@dataclass(kw_only=True)
class StatsArguments(SFTArguments):
    """The options of sft_qwen2.py, and one more."""

    json: bool = option(False, "Print one JSON object, nothing else.", group="Output")


# ---- Counting -----------------------------------------------------------------------------------
def find_longest_input(name_or_path: str, tokenizer) -> int:
    """Return how many tokens the model takes at most."""
    limits = [tokenizer.model_max_length]  # 1e30 if the tokenizer's files do not say
    # A folder with the tokenizer's files alone is enough to count.
    with contextlib.suppress(OSError, ValueError):
        config = transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        limits.append(count_positions(config))
    return int(min(limits))


def summarize(num_tokens: np.ndarray) -> dict[str, float]:
    """Return the mean and the percentiles of token counts."""
    summary = {"mean": round(float(num_tokens.mean()), 1)}
    for name, percentile in PERCENTILES.items():
        summary[name] = int(np.percentile(num_tokens, percentile, method="higher"))
    return summary


def list_max_lens(longest: int, limit: int) -> list[int]:
    """Return 512, 1024, ... tokens up to the longest example, or up to what the model takes."""
    max_lens = [SHORTEST_MAX_LEN]
    while max_lens[-1] < min(longest, limit):
        max_lens.append(2 * max_lens[-1])
    max_lens[-1] = min(max_lens[-1], limit)
    return max_lens


def count_examples_per_step(args) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


def measure_max_len(encoded, max_len: int, args) -> dict[str, float]:
    """Return what a max_len costs where longer examples are truncated."""
    num_tokens = get_column(encoded, "num_tokens")
    answer_tokens = get_column(encoded, "num_answer_tokens")
    kept_tokens = count_kept_tokens(encoded, max_len, "truncate")
    lost_tokens = answer_tokens - kept_tokens
    is_over = num_tokens > max_len
    num_over = int(np.count_nonzero(is_over))
    num_lost = int(np.count_nonzero(is_over & (kept_tokens == 0)))
    lengths = np.minimum(num_tokens[kept_tokens > 0], max_len)
    num_trained = len(lengths) - count_held_out(len(lengths), args.validation_split)
    return {
        "max_len": max_len,
        "num_over": num_over,
        "num_cut": num_over - num_lost,  # a part of their answers is trained
        "num_lost": num_lost,  # no answer is left: they are not trained
        "lost_token_share": float(lost_tokens.sum() / answer_tokens.sum()),
        "steps_per_epoch": math.ceil(num_trained / count_examples_per_step(args)),
        "micro_batches_per_step": count_micro_batches(lengths, max_len, args),
    }


def count_micro_batches(lengths: np.ndarray, max_len: int, args) -> float:
    """Return the median number of micro-batches of a step, where memory allows their size."""
    tokens_per_forward = args.tokens_per_forward or args.per_device_train_batch_size * max_len
    examples_per_step = count_examples_per_step(args)
    generator = np.random.default_rng(0)
    counts = []
    for _ in range(NUM_SAMPLED_STEPS):
        drawn = generator.permutation(lengths)
        step = drawn[:examples_per_step].tolist()
        bins = bin_by_tokens(step, tokens_per_forward)
        counts.append(len(bins))
    return float(np.median(counts))


def explain_choice(candidates: list[dict], num_examples: int, longest: int) -> str:
    """Return why the last candidate is suggested: it cuts nothing, or the model takes no more."""
    last = candidates[-1]
    if last["num_over"] > 0:
        return f"the most this model takes; longest row: {longest:,}; {describe_loss(last)}"
    reason = f"the smallest that cuts no row (longest: {longest:,})"
    if len(candidates) > 1:
        shorter = candidates[-2]
        if shorter["num_over"] <= max(1, num_examples // 1000):
            reason += f"; at {shorter['max_len']:,}: {describe_loss(shorter)}"
    return reason


def describe_loss(candidate: dict) -> str:
    share = candidate["lost_token_share"]
    return f"{candidate['num_over']:,} rows cut, {share:.2%} of the answer tokens lost"


def make_command(argv: list[str], args, max_len: int, num_examples: int) -> str:
    """Return the command that trains on the same data, with enough steps to learn something."""
    words = ["python", "sft_qwen2.py"]
    flag_words = list(argv)
    if argv and not argv[0].startswith("-"):
        words.append(flag_words.pop(0))
    values = read_flags(flag_words, list_options(StatsArguments))
    values.pop("json", None)
    values["max_len"] = max_len
    steps_per_epoch = math.ceil(num_examples / count_examples_per_step(args))
    num_steps = steps_per_epoch * args.num_train_epochs
    if num_steps < MIN_STEPS and args.max_steps <= 0:
        schedule = suggest_schedule(num_examples, args.per_device_train_batch_size)
        values.update(schedule)
    for name, value in values.items():
        words.append(f"--{name}")
        if isinstance(value, list):
            words += value
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)


def make_histogram(num_tokens: np.ndarray) -> dict[str, list[int]]:
    """Return edges [n + 1] and counts [n] of at most MAX_BARS bars, 1, 2, 4, ... tokens wide."""
    shortest = int(num_tokens.min())
    longest = int(num_tokens.max())
    width = 1
    while longest // width - shortest // width >= MAX_BARS:
        width *= 2
    edges = np.arange(shortest // width, longest // width + 2) * width
    counts, _ = np.histogram(num_tokens, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def measure(args, argv: list[str]) -> dict:
    """Return all figures, ready for JSON; without "tokens" if all rows are refused.

    Raises UserError where files cannot be read.
    """
    tokenizer = prepare_tokenizer(args)
    limit = find_longest_input(args.model_name_or_path, tokenizer)
    stats = {"files": {}, "refused": []}
    encoded = {}
    for split, paths in find_data_files(args.data_path, args.validation_split).items():
        encoded[split] = encode_files(paths, tokenizer, args)
        stats["refused"] += describe_rejected(encoded[split], paths)
        num_tokens = get_column(encoded[split], "num_tokens")
        stats["files"][split] = {
            "path": ", ".join(map(str, paths)),
            "num_examples": int(np.count_nonzero(num_tokens)),
            "num_refused": int(np.count_nonzero(num_tokens == 0)),
            "longest": int(num_tokens.max()),
            "num_control_tokens": int(get_column(encoded[split], "num_control_tokens").sum()),
        }
    total = get_column(encoded["train"], "num_tokens")
    is_good = total > 0
    if not is_good.any():
        return stats
    total = total[is_good]
    answer = get_column(encoded["train"], "num_answer_tokens")[is_good]
    stats["tokens"] = {
        "total": summarize(total),
        "prompt": summarize(total - answer),
        "answer": summarize(answer),
    }
    longest = int(total.max())
    warn_beyond_positions(min(longest, args.max_len), limit)
    if args.validation_split > 0:
        check_share(len(total), args.validation_split)
    num_trained = len(total) - count_held_out(len(total), args.validation_split)
    candidates = []
    for max_len in list_max_lens(longest, limit):
        candidates.append(measure_max_len(encoded["train"], max_len, args))
    chosen = candidates[-1]["max_len"]
    stats["max_lens"] = candidates
    stats["suggestion"] = {
        "max_len": chosen,
        "reason": explain_choice(candidates, len(total), longest),
        "command": make_command(argv, args, chosen, num_trained),
    }
    stats["histogram"] = make_histogram(total)
    return stats


# ---- Printing -----------------------------------------------------------------------------------
def print_stats(stats: dict) -> None:
    """Print lengths, candidates of max_len, the suggestion, a histogram and the files."""
    total = stats["tokens"]["total"]
    print(f"最大长度 longest: {total['max']}")
    print(f"最小长度 shortest: {total['min']}")
    print(f"平均长度 mean: {total['mean']}")
    print("\ntokens  " + "".join(f"{name:>10}" for name in total))
    for part, summary in stats["tokens"].items():
        print(f"{part:8}" + "".join(f"{number:>10,}" for number in summary.values()))
    print("\nmax_len   rows over  answers cut  lost whole  tokens lost   steps  passes/step")
    for candidate in stats["max_lens"]:
        print(
            f"{candidate['max_len']:<8,}"
            f"{candidate['num_over']:>11,}"
            f"{candidate['num_cut']:>13,}"
            f"{candidate['num_lost']:>12,}"
            f"{candidate['lost_token_share']:>13.2%}"
            f"{candidate['steps_per_epoch']:>8,}"
            f"{candidate['micro_batches_per_step']:>13g}"
        )
    suggestion = stats["suggestion"]
    print(f"\nmax_len {suggestion['max_len']}: {suggestion['reason']}")
    print(f"\n    {suggestion['command']}\n")
    histogram = stats["histogram"]
    most = max(histogram["counts"])
    for edge, count in zip(histogram["edges"], histogram["counts"]):
        bar = "#" * math.ceil(BAR_COLUMNS * count / most)
        print(f"{edge:>9,} |{bar} {count:,}")
    for counts in stats["files"].values():
        print(
            f"{counts['path']}: {counts['num_examples']:,} rows, longest {counts['longest']:,}, "
            f"{counts['num_control_tokens']:,} control tokens in texts"
        )


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code, 1 after a mistake. A wrong argument exits with 2."""
    if argv is None:
        argv = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # announce_start has changed it
    outlive_console()
    quiet_libraries()
    args = parse(argv, StatsArguments, only=FLAGS)
    try:
        # What the trainer's functions and libraries print is no part of the figures.
        with contextlib.redirect_stdout(sys.stderr):
            stats = measure(args, argv)
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    is_trainable = "tokens" in stats
    if args.json:
        print(json.dumps(stats, indent=2, ensure_ascii=False))
    elif is_trainable:
        print_stats(stats)
    for line in stats["refused"]:
        print(line, file=sys.stderr)
    num_refused = sum(counts["num_refused"] for counts in stats["files"].values())
    if num_refused > 0 and not (args.skip_bad_rows and is_trainable):
        remedy = "fix them, or add --skip_bad_rows"
        print(f"error: {num_refused:,} rows would be refused; {remedy}", file=sys.stderr)
        return 1
    if num_refused > 0:
        print(f"{num_refused:,} rows are left out", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
