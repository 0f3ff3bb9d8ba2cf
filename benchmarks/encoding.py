"""Compare token_stats.py's reading with two tokenizer.encode calls a row; measure its memory.

    python benchmarks/encoding.py --data train.jsonl --model qwen2-7b [--memory]

The runs are interleaved, each with an empty cache. Prints a Markdown table, its machine and
versions. Imports and the tokenizer's loading are not timed. --memory: 10,000 and 1,000,000 rows.
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

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "<|im_start|>system\n{system_prompt}<|im_end|>\n<|im_start|>user\n{user_prompt}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
ROUNDS, SIZES = 5, (10_000, 1_000_000)


def cpu_s() -> float:
    """Return the CPU seconds of this process and of those that it started and that ended."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def peak_mib() -> float:
    """Return the most memory that this process, or one that it started, has had."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage.ru_maxrss for usage in both) / 1024


def worker(mode: str, data: Path, model: str) -> dict[str, float]:
    """Return rows, wall and CPU seconds and peak MiB of one way to count, in this process."""
    sys.path.insert(0, str(ROOT))
    import sft_qwen2
    from sft.callbacks import quiet_libraries
    from sft.encoded_rows import encode_files

    quiet_libraries()
    system_prompt = sft_qwen2.ScriptArguments.system_prompt
    tokenizer = sft_qwen2.load_tokenizer(model, system_prompt)
    before = peak_mib()
    wall, cpu, lengths = time.perf_counter(), cpu_s(), []
    if mode == "loop":
        with open(data, encoding="utf-8") as file:
            for row in [json.loads(line) for line in file.readlines()]:
                texts = {"system_prompt": system_prompt, "user_prompt": row["query"]}
                prompt = tokenizer.encode(TEMPLATE.format(**texts))
                lengths.append(len(prompt + tokenizer.encode(row["answer"])) + 1)  # <|im_end|>
    else:
        how = (tokenizer, system_prompt, sft_qwen2.encode_batch, sft_qwen2.__file__)
        num_proc = int(mode) if mode.isdigit() else None
        for _ in range(2 if mode == "cached" else 1):
            wall, cpu = time.perf_counter(), cpu_s()
            lengths = encode_files([data], *how, num_proc)["num_tokens"]
    wall, cpu, peak = time.perf_counter() - wall, cpu_s() - cpu, peak_mib()
    tokens = int(sum(lengths))
    return dict(rows=len(lengths), tokens=tokens, wall=wall, cpu=cpu, before=before, peak=peak)


def whole_run(data: Path, model: str) -> dict[str, float]:
    """Return the peak MiB of token_stats.main, before it (imports, tokenizer) and in all."""
    sys.path.insert(0, str(ROOT))
    import sft_qwen2
    import token_stats

    sft_qwen2.load_tokenizer(model, "")
    before = peak_mib()
    start = time.perf_counter()
    sys.stdout, stdout = sys.stderr, sys.stdout
    code = token_stats.main(["--data_path", str(data), "--model_name_or_path", model])
    sys.stdout = stdout
    assert code == 0
    peak = peak_mib()
    return dict(wall=time.perf_counter() - start, before=before, peak=peak)


def fork(mode: str, data: Path, model: str) -> dict[str, float]:
    """Return worker's result of a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        argv = ["--worker", mode, "--data", str(data), "--model", model]
        command = [sys.executable, __file__, *argv]
        options = {"env": environment, "check": True, "text": True, "stdout": subprocess.PIPE}
        out = subprocess.run(command, stderr=subprocess.DEVNULL, **options).stdout
    return json.loads(out.splitlines()[-1])


def print_memory(model: str) -> None:
    print("\n| generated rows | s | MiB after imports | peak MiB |\n|---|---|---|---|")
    for rows in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "train.jsonl"
            with open(data, "w") as file:
                for i in range(rows):
                    file.write(f'{{"query": "What is {i} + {i}?", "answer": "It is {2 * i}."}}\n')
            for mode in ("1", "2") if rows == max(SIZES) else ():
                r = fork(mode, data, model)
                print(f"encoded in {mode} processes: {r['wall']:.0f} s, {r['cpu']:.0f} CPU s")
            r = fork("main", data, model)
        print(f"| {rows:,} | {r['wall']:.0f} | {r['before']:.0f} | {r['peak']:.0f} |", flush=True)


def print_speed(data: Path, model: str) -> None:
    modes = {"loop": "two `tokenizer.encode` a row", "all": "`encode_files`"}
    modes |= {"1": "`encode_files`, 1 process", "cached": "`encode_files`, second time"}
    results = {mode: [] for mode in modes}
    for _ in range(ROUNDS):
        for mode, result in results.items():
            result.append(fork(mode, data, model))
    assert len({r["tokens"] for result in results.values() for r in result}) == 1
    print("| way | rows/s, median | ratio, median (all) | CPU s |\n|---|---|---|---|")
    for mode, result in results.items():
        speed = statistics.median(r["rows"] / r["wall"] for r in result)
        ratios = [a["wall"] / b["wall"] for a, b in zip(results["loop"], result)]
        every = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
        cpu = statistics.median(r["cpu"] for r in result)
        print(
            f"| {modes[mode]} | {speed:,.0f} | {statistics.median(ratios):.2f} ({every}) ", end=""
        )
        print(f"| {cpu:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with query and answer")
    parser.add_argument("--model", required=True, help="folder with a Qwen2 tokenizer")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "main":
        print(json.dumps(whole_run(args.data, args.model)))
    elif args.worker:
        print(json.dumps(worker(args.worker, args.data, args.model)))
    else:
        names = ("tokenizers", "transformers", "datasets", "pyarrow")
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        print(
            f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ",
            end="",
        )
        print(f"Python {platform.python_version()}, {versions}\n")
        print_memory(args.model) if args.memory else print_speed(args.data, args.model)


if __name__ == "__main__":
    main()
