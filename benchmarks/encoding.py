"""Compare how rows are encoded here with two tokenizer.encode calls a row, in time and memory.

    python benchmarks/encoding.py --data gsm8k/train.jsonl --model Qwen/Qwen2-7B-Instruct
    python benchmarks/encoding.py --data gsm8k/train.jsonl --model Qwen/Qwen2-7B-Instruct --memory

The first command times the rows of the file, and 52,000 rows made of them. Each run is a process of
its own with an empty cache, and the ways take turns. Imports and the loading of the tokenizer are
not timed. The second command measures the peak memory for 10,000 and for 1,000,000 short rows.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
SYSTEM_PROMPT = "You are a helpful assistant."
PROMPT = (
    "<|im_start|>system\n{system_prompt}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
NUM_MANY_ROWS = 52_000
NUM_ROUNDS = 5
WAYS = {
    "loop": "two `tokenizer.encode` calls a row",
    "first": "`encode_files`, the first time",
    "cached": "`encode_files`, from its cache",
}


# ---- One run, in a process of its own -----------------------------------------------------------
def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those that it started and that ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def peak_mib() -> float:
    """Return the most memory that this process, or one that it started, has had."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(own, others) / 1024


def encode_in_a_loop(path: Path, tokenizer) -> list[int]:
    """Return the number of tokens of each row."""
    num_tokens = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            prompt = PROMPT.format(system_prompt=SYSTEM_PROMPT, question=row["query"])
            prompt_ids = tokenizer.encode(prompt)
            answer_ids = tokenizer.encode(row["answer"])
            num_tokens.append(len(prompt_ids) + len(answer_ids) + 1)  # <|im_end|>
    return num_tokens


def run_once(way: str, path: Path, model: str) -> dict[str, float]:
    """Return what encoding the rows in this process took."""
    sys.path.insert(0, str(ROOT))
    import sft_qwen2
    from sft.console import quiet_libraries
    from sft.model_files import load_tokenizer

    quiet_libraries()
    tokenizer = load_tokenizer(model)
    args = SimpleNamespace(system_prompt=SYSTEM_PROMPT, train_on="all")
    if way == "cached":
        sft_qwen2.encode_files([path], tokenizer, args)
    before_mib = peak_mib()
    start = time.perf_counter()
    cpu_start = cpu_seconds()
    if way == "loop":
        num_tokens = encode_in_a_loop(path, tokenizer)
    else:
        num_tokens = sft_qwen2.encode_files([path], tokenizer, args)["num_tokens"]
    return {
        "wall_s": time.perf_counter() - start,
        "cpu_s": cpu_seconds() - cpu_start,
        "num_rows": len(num_tokens),
        "num_tokens": sum(num_tokens),
        "before_mib": before_mib,
        "peak_mib": peak_mib(),
    }


def start_run(way: str, path: Path, model: str) -> dict[str, float]:
    """Return the result of run_once in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--way", way, "--data", str(path), "--model", model]
        environment = {**os.environ, "HF_DATASETS_CACHE": cache}
        output = subprocess.run(
            command, env=environment, check=True, text=True, stdout=subprocess.PIPE
        ).stdout
    return json.loads(output.splitlines()[-1])


# ---- The tables ---------------------------------------------------------------------------------
def print_speed(path: Path, model: str) -> None:
    results = {way: [] for way in WAYS}
    for _ in range(NUM_ROUNDS):
        for way in WAYS:
            results[way].append(start_run(way, path, model))
    num_rows = results["loop"][0]["num_rows"]
    for runs in results.values():
        for run in runs:
            assert run["num_tokens"] == results["loop"][0]["num_tokens"]
    print(f"\n| {num_rows:,} rows | s, median | loop / this: median (all) | CPU s, median |")
    print("|---|---|---|---|")
    for way, runs in results.items():
        ratios = []
        for loop, run in zip(results["loop"], runs):
            ratios.append(loop["wall_s"] / run["wall_s"])
        every = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
        wall_s = statistics.median(run["wall_s"] for run in runs)
        cpu_s = statistics.median(run["cpu_s"] for run in runs)
        ratio = statistics.median(ratios)
        print(f"| {WAYS[way]} | {wall_s:.2f} | {ratio:.2f} ({every}) | {cpu_s:.2f} |", flush=True)


def print_memory(folder: Path, model: str) -> None:
    print("\n| generated rows | s | MiB before | peak MiB |\n|---|---|---|---|")
    for num_rows in (10_000, 1_000_000):
        path = folder / f"{num_rows}.jsonl"
        with open(path, "w") as file:
            for i in range(num_rows):
                row = {"query": f"What is {i} + {i}?", "answer": f"It is {2 * i}."}
                file.write(json.dumps(row) + "\n")
        run = start_run("first", path, model)
        memory = f"{run['before_mib']:,.0f} | {run['peak_mib']:,.0f}"
        print(f"| {num_rows:,} | {run['wall_s']:.1f} | {memory} |", flush=True)


def write_many_rows(path: Path, many: Path) -> None:
    """Write NUM_MANY_ROWS rows that are the rows of `path` over and over, each with a number."""
    lines = path.read_bytes().splitlines()
    rows = [json.loads(line) for line in lines]
    with open(many, "w", encoding="utf-8") as file:
        for i in range(NUM_MANY_ROWS):
            row = rows[i % len(rows)]
            numbered = {"query": f"{i}. {row['query']}", "answer": row["answer"]}
            file.write(json.dumps(numbered, ensure_ascii=False) + "\n")


def print_machine() -> None:
    names = ("datasets", "tokenizers", "transformers", "pyarrow")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ", end="")
    print(f"Python {platform.python_version()}, {versions}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines of query and answer")
    parser.add_argument("--model", required=True, help="a Qwen2 tokenizer: folder or name")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory instead")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run_once(args.way, args.data, args.model)))
        return
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            print_memory(Path(folder), args.model)
            return
        print_speed(args.data, args.model)
        many = Path(folder, "many.jsonl")
        write_many_rows(args.data, many)
        print_speed(many, args.model)


if __name__ == "__main__":
    main()
