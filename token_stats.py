"""Count the tokens of training rows as sft_qwen2.py encodes them, to choose max_len beforehand.

    python token_stats.py --data_path my_data/
    python token_stats.py run.json                      # the data and model of these arguments

A row's tokens are prompt + answer: answers and the <|im_end|> after each are trained. The encoded
rows are cached for sft_qwen2.py. Only the tokenizer is loaded. Exit code 1: rows would be refused.
"""

import argparse
import contextlib
import itertools
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import transformers

import sft_qwen2
from sft import callbacks
from sft.encoded_rows import beyond_positions, encode_files
from sft.rows import UserError, as_user_error, find_data_files

SAMPLED_STEPS = 25  # optimizer steps drawn at random, to see how many micro-batches they make
LEVELS = {"min": 0, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}  # percentiles
BARS, BAR_WIDTH = 16, 56  # of the histogram: at most so many, so many columns long


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments; those of the trainer only if given. Exit code 2 if wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    trainer, unset = parser.add_argument_group("as in sft_qwen2.py"), argparse.SUPPRESS
    trainer.add_argument("--model_name_or_path", default=unset, help="hub name or folder")
    trainer.add_argument("--data_path", nargs="+", default=unset, help="files, or folder of them")
    trainer.add_argument("--system_prompt", default=unset, help="for rows that have none")
    trainer.add_argument("--skip_bad_rows", action="store_true", default=unset, help="exit with 0")
    parser.add_argument("arguments", nargs="?", help="JSON file of sft_qwen2.py's arguments")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    return parser.parse_args(argv)


def load_tokenizer(name: str, system_prompt: str):
    """Return the tokenizer and the longest row in tokens that the model takes; or UserError."""
    tokenizer = sft_qwen2.load_tokenizer(name, system_prompt)
    limits = [tokenizer.model_max_length]  # 1e30 if its files do not say
    with contextlib.suppress(OSError, ValueError):  # the tokenizer's files alone will do
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        limits.append(config.max_position_embeddings)
    return tokenizer, int(min(limits))


def count_losses(rows, max_lens: list[int]) -> tuple[list[int], np.ndarray]:
    """Return the answer tokens behind each max_len, and each long row's first trained position."""
    lost, first = np.zeros(len(max_lens), np.int64), np.zeros(len(rows), np.int32)
    for i in np.flatnonzero(rows["num_tokens"] > max_lens[0]):
        trained = np.flatnonzero(rows[i]["labels"] >= 0)
        first[i] = trained[0]
        lost += len(trained) - np.searchsorted(trained, max_lens)
    return lost.tolist(), first


def compare_max_lens(rows, batch: int, rows_per_step: int, limit: int) -> list[dict]:
    """Return what each candidate max_len costs if longer rows are truncated; tokens as shares."""
    num_tokens, answer_tokens = rows["num_tokens"], int(rows["num_answer_tokens"].sum())
    max_lens, results = [512], []  # the first candidate; each next one is twice as long
    while max_lens[-1] < min(num_tokens.max(), limit):
        max_lens.append(2 * max_lens[-1])
    max_lens[-1] = min(max_lens[-1], limit)
    lost, first = count_losses(rows, max_lens)
    for max_len, lost_tokens in zip(max_lens, lost):
        over, no_answer = int((num_tokens > max_len).sum()), int((first >= max_len).sum())
        trained = num_tokens[(num_tokens > 0) & (first < max_len)].clip(max=max_len)
        rng, size = np.random.default_rng(0), min(rows_per_step, len(trained))
        steps = [rng.choice(trained, size, replace=False).tolist() for _ in range(SAMPLED_STEPS)]
        result = {"max_len": max_len, "rows_over": over, "answers_cut": over - no_answer}
        result |= {"answers_lost": no_answer, "answer_tokens_lost": lost_tokens / answer_tokens}
        result["steps_per_epoch"] = -(-len(trained) // rows_per_step)
        passes = float(
            np.median([len(sft_qwen2.bin_rows(step, batch * max_len)) for step in steps])
        )
        results.append(result | {"micro_batches_per_step": float(np.median(passes))})
    return results


def suggest(results: list[dict], rows: int, longest: int) -> tuple[int, str]:
    """Return the smallest max_len that cuts nothing, or the model's limit, and why it is that."""
    text = "{rows_over:,} rows cut, {answer_tokens_lost:.2%} of the answer tokens lost"
    chosen, reason = results[-1], f"the smallest that cuts no row (longest: {longest:,})"
    if chosen["rows_over"]:
        reason = f"the most this model takes; longest row: {longest:,}; {text.format(**chosen)}"
    elif len(results) > 1 and results[-2]["rows_over"] <= max(1, rows // 1000):
        reason += f"; at {results[-2]['max_len']:,}: {text.format(**results[-2])}"
    return chosen["max_len"], reason


def read_all(chosen: dict) -> tuple:
    """Return the longest row that the model takes, the rows of train, and figures of each split."""
    files, stats = find_data_files(chosen["data_path"]), {"files": {}, "refused_rows": []}
    tokenizer, limit = load_tokenizer(chosen["model_name_or_path"], chosen["system_prompt"])
    how = (chosen["system_prompt"], sft_qwen2.encode_batch, sft_qwen2.__file__)
    for split, paths in reversed(files.items()):  # train last: what follows is about it
        rows = encode_files(paths, tokenizer, *how)
        bad = rows.select(rows["num_tokens"] == 0)
        reasons = [f"{row['place']}: {row['error']}" for row in itertools.islice(bad, 20)]
        stats["refused_rows"][:0] = reasons
        counts = {"rows": len(rows) - len(bad), "refused": len(bad)}
        counts["longest"] = int(rows["num_tokens"].max())
        counts["control_tokens"] = int(rows["num_control_tokens"].sum())
        stats["files"][split] = {"path": ", ".join(map(str, paths)), **counts}
    return limit, rows, stats


def measure(args: argparse.Namespace) -> dict:
    """Return all figures, ready for JSON; without "tokens" if no row is good; raises UserError."""
    flags, values = {k: v for k, v in vars(args).items() if k not in ("arguments", "json")}, {}
    if args.arguments:
        with as_user_error(f"{args.arguments}: cannot be read"):
            values = dict(json.loads(Path(args.arguments).read_text(encoding="utf-8")))
    chosen = vars(sft_qwen2.ScriptArguments()) | sft_qwen2.TRAINING_DEFAULTS | values | flags
    limit, rows, stats = read_all(chosen)
    stats["skip_bad_rows"] = chosen["skip_bad_rows"] in (True, "true")
    if "max_len" in values and int(chosen["max_len"]) > limit:
        stats["warning"] = beyond_positions(int(chosen["max_len"]), limit)
    total, answer = rows["num_tokens"], rows["num_answer_tokens"]
    if not (longest := int(total.max())):
        return stats
    stats["tokens"] = {}
    for name, tokens in {"total": total, "prompt": total - answer, "answer": answer}.items():
        found = np.percentile(tokens[total > 0], list(LEVELS.values()), method="higher").tolist()
        stats["tokens"][name] = {"mean": round(float(tokens[total > 0].mean()), 1)}
        stats["tokens"][name] |= zip(LEVELS, found)
    batch = int(chosen["per_device_train_batch_size"])
    rows_per_step = batch * int(chosen["gradient_accumulation_steps"])
    results = compare_max_lens(rows, batch, rows_per_step, limit)
    max_len, reason = suggest(results, int((total > 0).sum()), longest)
    words = [args.arguments] if args.arguments else []
    for name, value in flags.items():
        words += [f"--{name}", *([] if value is True else np.atleast_1d(value).tolist())]
    command = shlex.join(["python", "sft_qwen2.py", *words, "--max_len", str(max_len)])
    stats["suggestion"] = {"max_len": max_len, "reason": reason, "command": command}
    low, sizes = int(total[total > 0].min()), (n * 10**k for k in range(9) for n in (1, 2, 5))
    size = next(size for size in sizes if longest - low < size * (BARS - 1))
    edges = np.arange(low // size * size, longest + size + 1, size)
    histogram = dict(edges=edges.tolist(), rows=np.histogram(total[total > 0], edges)[0].tolist())
    return stats | {"max_lens": results, "histogram": histogram}


def print_stats(stats: dict) -> None:
    total, (edges, counts) = stats["tokens"]["total"], stats["histogram"].values()
    print(
        "最大长度 longest: {max}\n最小长度 shortest: {min}\n平均长度 mean: {mean}\n".format(**total)
    )
    print("tokens  " + "".join(f"{name:>10}" for name in total))
    for part, found in stats["tokens"].items():
        print(f"{part:8}" + "".join(f"{tokens:>10,}" for tokens in found.values()))
    print("\nmax_len   rows over  answers cut  lost whole  tokens lost   steps  passes/step")
    for result in stats["max_lens"]:
        print("{:<8,}{:>11,}{:>13,}{:>12,}{:>13.2%}{:>8,}{:>13g}".format(*result.values()))
    print("\nmax_len {max_len}: {reason}\n\n    {command}\n".format(**stats["suggestion"]))
    for edge, rows in zip(edges, counts):
        full, eighths = divmod(-(-rows * BAR_WIDTH * 8 // max(counts)), 8)
        print(f"{edge:>9,} ┤{'█' * full}{' ▏▎▍▌▋▊▉'[eighths].strip()} {rows:,}")
    text = "{path}: {rows} rows, longest {longest}, {control_tokens} control tokens in texts"
    print(*(text.format(**about) for about in stats["files"].values()), sep="\n")


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code, 1 after a mistake. A wrong argument exits with 2."""
    args = parse_arguments(argv)
    callbacks.quiet_libraries()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be for JSON alone
            stats = measure(args)
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    notes = [*stats["refused_rows"][:20], *([stats["warning"]] if "warning" in stats else [])]
    refused = sum(about["refused"] for about in stats["files"].values())
    failed = refused > 0 and not (stats["skip_bad_rows"] and "tokens" in stats)
    what = "would be refused; mend them or --skip_bad_rows" if failed else "are left out"
    if refused:
        notes.append(f"{'error: ' * failed}{refused:,} rows {what}")
    with callbacks.lasting_console():  # the reader may have seen enough, as head has
        if args.json:
            print(json.dumps(stats, indent=2, ensure_ascii=False))
        elif "tokens" in stats:
            print_stats(stats)
    print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
