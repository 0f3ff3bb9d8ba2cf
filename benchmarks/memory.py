"""GPU memory of training steps without a GPU: recorded tensor by tensor, planned, and allocated.

    python benchmarks/memory.py [--models Qwen2-7B Qwen2-1.5B Qwen2-0.5B]   # results/memory.json

Recorded means as tests/harness/recorded_steps.py says: the trainer's own model runs on tensors
without contents.

1. One micro-batch of 4 x 8,192 tokens, half of them answers, with gradients of an earlier one,
   beside the usual way: batched examples, all logits, bf16 AdamW.
2. The peak of such micro-batches beside the formula that the trainer plans with (memory_model.py).
3. Three optimizer steps of 128 short, long or mixed examples, cut into micro-batches as planned for
   a box. They are allocated one by one as PyTorch's caching allocator with expandable segments does
   it, with the update's state and temporaries, in the memory that is free there.

Exit code 1: the formula is off by more than 10 %, or a planned step runs out of memory. Set aside
in 3, as in the plan, are 0.5 GiB for workspaces of kernels, and 0.6 for NCCL. What streams of FSDP2
cannot share is not simulated. Streams of a pipeline are those of one device.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import shlex
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "tests" / "harness"), str(ROOT / "benchmarks")]

# ruff: noqa: E402
from allocator import ExpandableAllocator, OutOfMemory
from recorded_steps import (
    MicroBatchEvents,
    Recording,
    find_peak,
    make_config,
    play_window,
    record,
    record_device,
    record_share,
    record_usual,
)

import sft_qwen2
from sft.console import quiet_libraries
from sft.memory_model import (
    NCCL_BYTES,
    QWEN2_SIZES,
    WORKSPACE_BYTES,
    Job,
    list_modules,
    make_share,
    step_memory,
)
from sft.pipeline import cut_windows
from sft.plan import Plan, plan_run
from sft.precision import Precision, choose_precision
from sft.throughput import GIB

RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
MAX_LEN = 8192
BF16 = choose_precision((9, 0), fp32=False, optim="auto")
FP16 = choose_precision((7, 0), fp32=False, optim="auto")  # autocast over fp32 weights
FP32 = choose_precision(None, fp32=False, optim="auto")
BF16_FP32 = choose_precision((9, 0), fp32=True, optim="auto")  # --fp32
ON_HOST = ("state", "gradients")
BOXES = (
    ("1x80", 1),
    ("1x48", 1),
    ("1x24", 1),
    ("2x24", 1),
    ("4x24", 1),
    ("2x80", 2),
    ("8x80", 8),
    ("4x24", 4),
    ("4x32:fp16", 4),
)
EXAMPLE_TOKENS = {"short": (100, 900), "long": (4000, 8000), "mixed": (50, MAX_LEN)}
NUM_STEPS = 3
MAX_ERROR_PERCENT = 10


# ---- 1. Beside the usual way --------------------------------------------------------------------
def compare_with_usual(name: str) -> list[dict]:
    """Return the GiB of a later micro-batch of 4 x 8,192 tokens, this way and the usual way."""
    config = make_config(name)
    job = Job(config=config, precision=BF16)
    # Plain bf16 AdamW keeps two values of the weights' format for each parameter.
    usual_precision = replace(BF16, optim="adamw_torch", state_bytes=2 * BF16.weights.itemsize)
    usual_job = Job(config=config, precision=usual_precision)
    tokens = 4 * MAX_LEN
    ours = record(job, tokens, recompute=True, num_examples=4)
    usual = record_usual(usual_job, tokens, num_examples=4)
    found = []
    for way, each_job, recording in (("this trainer", job, ours), ("usual", usual_job, usual)):
        weights = sum(recording.weight_bytes)
        state = weights / BF16.weights.itemsize * each_job.precision.state_bytes
        peak = find_peak(each_job, recording)
        row = {
            "model": name,
            "way": way,
            "weights_gib": weights,
            "gradients_gib": weights,
            "optimizer_gib": state,
            "activations_gib": peak - 2 * weights - state,
            "peak_gib": peak,
        }
        for key, value in row.items():
            if key.endswith("_gib"):
                row[key] = round(value / GIB, 2)
        found.append(row)
    return found


def print_row(row: dict) -> None:
    print(*row.values(), sep="\t", flush=True)


# ---- 2. The formula -----------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Case:
    """A recorded micro-batch; in a pipeline, a window of `in_flight` of them on one device."""

    precision: Precision
    tokens: int
    recompute: bool
    processes: int = 1
    in_host_memory: tuple[str, ...] = ()
    in_flight: int = 0  # 0: no pipeline
    layers: tuple[int, int] = (0, 0)  # of a pipeline's device: first and last but one


def list_cases() -> list[Case]:
    cases = []
    for tokens in (2048, MAX_LEN, 4 * MAX_LEN):
        cases.append(Case(precision=BF16, tokens=tokens, recompute=True))
    for precision in (FP16, FP32):
        cases.append(Case(precision=precision, tokens=MAX_LEN, recompute=True))
    for tokens in (2048, MAX_LEN):
        for precision in (BF16, FP16, BF16_FP32, FP32):
            cases.append(Case(precision=precision, tokens=tokens, recompute=False))
    for tokens in (2048, MAX_LEN):
        for recompute in (True, False):
            for precision, processes in ((BF16, 2), (BF16, 8), (FP16, 4)):
                cases.append(
                    Case(
                        precision=precision,
                        tokens=tokens,
                        recompute=recompute,
                        processes=processes,
                    )
                )
    cases.append(Case(precision=BF16_FP32, tokens=MAX_LEN, recompute=True, processes=8))
    for recompute in (True, False):
        cases.append(
            Case(precision=BF16, tokens=MAX_LEN, recompute=recompute, in_host_memory=ON_HOST)
        )
    return cases


def list_pipeline_cases(num_layers: int) -> list[Case]:
    """Return the cases of four devices: the first, a middle one, and the last."""
    quarter = num_layers // 4
    cases = []
    for first in (0, quarter, num_layers - quarter):
        for precision, recompute in ((BF16, True), (BF16, False), (FP16, True)):
            cases.append(
                Case(
                    precision=precision,
                    tokens=4096,
                    recompute=recompute,
                    in_flight=8,
                    layers=(first, first + quarter),
                )
            )
    return cases


def compare(name: str, case: Case) -> dict:
    """Return the peak as recorded and by the formula; without the update, which is not recorded."""
    job = Job(
        config=make_config(name),
        precision=case.precision,
        num_shards=case.processes,
        in_host_memory=case.in_host_memory,
    )
    modules = list_modules(job.config)
    window_tokens = None
    if case.in_flight:
        first, end = case.layers
        modules = modules[1 + first : 1 + end]
        if first == 0:
            modules = [list_modules(job.config)[0], *modules]
        if end == job.config.num_hidden_layers:
            modules = [*modules, list_modules(job.config)[-1]]
        window_tokens = case.in_flight * case.tokens
        recording = record_device(job, modules, case.tokens, recompute=case.recompute)
    else:
        num_examples = max(1, case.tokens // MAX_LEN)
        recording = record(job, case.tokens, recompute=case.recompute, num_examples=num_examples)
    memory = step_memory(
        job, modules, case.tokens, recompute=case.recompute, window_tokens=window_tokens
    )
    del memory["update"]
    recorded = find_peak(job, recording, max(1, case.in_flight))
    formula = max(memory.values())
    return {
        "model": name,
        "tokens": case.tokens,
        "compute": str(case.precision.compute).removeprefix("torch."),
        "weights": str(case.precision.weights).removeprefix("torch."),
        "kept": "inputs" if case.recompute else "all",
        "processes": case.processes,
        "on_host": ", ".join(case.in_host_memory),
        "layers": f"{case.layers[0]} to {case.layers[1] - 1}" if case.in_flight else "all",
        "in_flight": max(1, case.in_flight),
        "traced_gib": round(recorded / GIB, 2),
        "formula_gib": round(formula / GIB, 2),
        "error_percent": round(100 * (formula / recorded - 1), 1),
    }


# ---- 3. Steps in the memory that is free --------------------------------------------------------
def make_plan(gpus: str, processes: int, lengths: np.ndarray, name: str = "Qwen2-7B") -> Plan:
    """Return the Plan for a box, 128 examples a step, half of their tokens trained."""
    arguments = SimpleNamespace(
        gpus=gpus,
        fp32=False,
        optim="auto",
        max_len=MAX_LEN,
        tokens_per_forward=None,
        gradient_checkpointing=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=max(1, 32 // processes),
        num_train_epochs=1,
        max_steps=-1,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=2,
        eval_strategy="no",
        output_dir="outputs",
        resume=False,
        world_size=processes,
    )
    config = make_config(name)
    return plan_run(config, arguments, arguments, lengths, num_trained_tokens=lengths.sum() // 2)


def draw_lengths(kind: str, num_examples: int = 128 * NUM_STEPS) -> np.ndarray:
    """Return lengths of examples, of which more are short than long."""
    least, most = EXAMPLE_TOKENS[kind]
    random = np.random.default_rng(0)
    drawn = least * (most / least) ** random.random(num_examples)
    return drawn.astype(np.int32)


class Scaled:
    """Two recordings of a device, from which those of any number of tokens follow."""

    def __init__(self, small: Recording, large: Recording):
        self.small = small
        self.large = large

    def events(self, tokens: int, *, is_first: bool) -> MicroBatchEvents:
        small, large = self.small.later, self.large.later
        if is_first:
            small, large = self.small.first, self.large.first
        return MicroBatchEvents(
            forward=self.scale(small.forward, large.forward, tokens),
            backward=self.scale(small.backward, large.backward, tokens),
        )

    def scale(self, small: list, large: list, tokens: int) -> list[tuple[int, float]]:
        few = self.small.tokens
        scaled = []
        for (number, few_bytes), (other_number, many_bytes) in zip(small, large, strict=True):
            assert number == other_number
            bytes_per_token = (many_bytes - few_bytes) / (self.large.tokens - few)
            scaled.append((number, round(few_bytes + bytes_per_token * (tokens - few))))
        return scaled


class SimulatedDevice:
    """A device with its weights, on which recorded micro-batches and updates run."""

    def __init__(self, job: Job, recordings: dict[bool, Scaled], memory: ExpandableAllocator):
        """`recordings`: {whether layers are recomputed: recordings}."""
        self.job = job
        self.recordings = recordings
        self.memory = memory
        self.weights = recordings[True].small.weight_bytes
        for number, size in enumerate(self.weights):
            memory.allocate(("weight", number), size)

    def run_window(self, tokens: list[int], *, recompute: bool, is_first: bool, window) -> None:
        """Run micro-batches of so many tokens; the first ones of a step leave gradients."""
        events = []
        for number, num_tokens in enumerate(tokens):
            scaled = self.recordings[recompute]
            events.append(scaled.events(num_tokens, is_first=is_first and number == 0))
        play_window(events, self.memory, window)

    def update(self) -> None:
        """Change one parameter after the other; then free the gradients."""
        precision = self.job.precision
        for number, weight_bytes in enumerate(self.weights):
            parameters = weight_bytes // precision.weights.itemsize
            temporary = {
                ("copy", 1): 4 * parameters,  # two fp32 copies
                ("copy", 2): 4 * parameters,
            }
            state = {("state", number): round(precision.state_bytes * parameters)}
            if "state" in self.job.in_host_memory:
                temporary.update(state)
            elif ("state", number) not in self.memory.blocks:
                self.memory.allocate(("state", number), state["state", number])
            if "gradients" in self.job.in_host_memory:
                temporary["gradient", number] = weight_bytes
            for key, size in temporary.items():
                self.memory.allocate(key, size)
            for key in temporary:
                self.memory.release(key)
        self.free_gradients()

    def free_gradients(self) -> None:
        """Free what micro-batches have left."""
        kinds = ("weight", "state")
        left = [key for key in self.memory.blocks if key[0] not in kinds]
        for key in left:
            self.memory.release(key)


def cut_step(plan: Plan, lengths: list[int]) -> list[list[int]]:
    """Return the tokens of a process's micro-batches in a step, in windows."""
    num_shards = plan.job.num_shards
    bins = sft_qwen2.bin_by_tokens(lengths, plan.tokens_per_forward, num_shards)
    micro_batches = []
    for bin in bins[::num_shards]:
        micro_batches.append({"seq_lens": [lengths[index] for index in bin] or [1]})
    windows = [[micro_batch] for micro_batch in micro_batches]
    if plan.window_tokens is not None:
        windows = cut_windows(micro_batches, plan.window_tokens)
    cut = []
    for window in windows:
        cut.append([sum(micro_batch["seq_lens"]) for micro_batch in window])
    return cut


def simulate(plan: Plan, device: int, recordings: dict, lengths: np.ndarray) -> dict:
    """Run three steps on a device; return how full it was, or where it was too full."""
    reserved = WORKSPACE_BYTES
    if plan.job.num_shards > 1:
        reserved += NCCL_BYTES
    memory = ExpandableAllocator(plan.devices.free_bytes[device] - reserved)
    result = {"fits": True, "micro_batches": 0}
    try:
        simulated = SimulatedDevice(plan.job, recordings, memory)
        for step in range(NUM_STEPS):
            windows = cut_step(plan, lengths[step * 128 : (step + 1) * 128].tolist())
            for number, tokens in enumerate(windows):
                recompute = sum(tokens) > plan.max_tokens_without_checkpointing
                simulated.run_window(
                    tokens, recompute=recompute, is_first=number == 0, window=(step, number)
                )
                result["micro_batches"] += len(tokens)
            simulated.update()
    except OutOfMemory as error:
        result["fits"] = False
        result["error"] = f"step {step}: {error}"
    result["most_reserved_gib"] = round(memory.most_reserved / GIB, 2)
    return result


class Recordings:
    """Recordings of devices, made once for all devices that are alike."""

    def __init__(self):
        self.made = {}

    def get(self, plan: Plan, device: int) -> dict[bool, Scaled]:
        modules = plan.modules_by_device[device]
        is_pipeline = plan.window_tokens is not None
        key = (
            plan.precision,
            plan.job.num_shards,
            plan.in_host_memory,
            make_share(plan.job.config, modules),
            is_pipeline,
        )
        if key not in self.made:
            found = {}
            for recompute, sizes in ((False, (2048, 4096)), (True, (8192, 16384))):
                pair = []
                for tokens in sizes:
                    pair.append(
                        record_share(
                            plan.job,
                            modules,
                            tokens,
                            recompute=recompute,
                            is_pipeline=is_pipeline,
                        )
                    )
                found[recompute] = Scaled(*pair)
            self.made[key] = found
        return self.made[key]


def simulate_kinds(gpus: str, processes: int) -> list[dict]:
    """Return what three steps of each kind of examples take on the devices of a box."""
    recordings = Recordings()
    return [simulate_box(gpus, processes, kind, recordings) for kind in EXAMPLE_TOKENS]


def simulate_box(gpus: str, processes: int, kind: str, recordings: Recordings) -> dict:
    """Return what three steps take on the devices of a box, or the one that they do not fit."""
    lengths = draw_lengths(kind)
    plan = make_plan(gpus, processes, lengths)
    row = {
        "box": gpus,
        "processes": processes,
        "examples": kind,
        "free_gib": round(plan.devices.free_bytes[0] / GIB, 1),
        "needed_gib": round(max(plan.needed_bytes) / GIB, 1),
        "planned_gib": round(max(plan.used_bytes) / GIB, 1),
        "tokens": plan.tokens_per_forward,
        "window": plan.window_tokens,
        "on_host": ", ".join(plan.in_host_memory),
        "refused": not plan.limits.fits,
    }
    if plan.limits.fits:
        devices = plan.working_devices
        if processes > 1:
            devices = [0]
        results = []
        for device in devices:
            results.append(simulate(plan, device, recordings.get(plan, device), lengths))
        fullest = max(results, key=fullness)
        row.update(fullest)
    return row


def fullness(result: dict) -> float:
    if not result["fits"]:
        return math.inf
    return result["most_reserved_gib"]


# ---- All of it -----------------------------------------------------------------------------------
def list_comparisons(names: list[str]) -> list[tuple[str, Case]]:
    """Return the model and the case of each row of the second part."""
    comparisons = []
    for name in names:
        cases = list_cases()
        if not QWEN2_SIZES[name].tie_word_embeddings:
            cases += list_pipeline_cases(QWEN2_SIZES[name].num_hidden_layers)
        for case in cases:
            comparisons.append((name, case))
    return comparisons


def start_process() -> None:
    warnings.filterwarnings("ignore")
    quiet_libraries()
    torch.set_num_threads(1)


def print_all(title: str, results) -> list[dict]:
    """Return the rows of all results, each of which is a list, and print them as they come."""
    print(title)
    rows = []
    for result in results:
        for row in result:
            print_row(row)
            rows.append(row)
    return rows


def compare_alone(name: str, case: Case) -> list[dict]:
    return [compare(name, case)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=QWEN2_SIZES, default=["Qwen2-7B"])
    names = parser.parse_args().models
    boxes = ()
    if "Qwen2-7B" in names:
        boxes = BOXES
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, initializer=start_process) as processes:
        # The slowest first; they are printed last.
        step_results = processes.map(simulate_kinds, *zip(*boxes))
        usual_results = processes.map(compare_with_usual, names)
        compared_results = processes.map(compare_alone, *zip(*list_comparisons(names)))
        usual = print_all("1. a later micro-batch of 4 x 8,192 tokens (GiB)", usual_results)
        compared = print_all("2. recorded, and by the formula", compared_results)
        steps = print_all("3. three steps in the memory that is free", step_results)
    found = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, CPU only; torch {torch.__version__}",
        "usual": usual,
        "formula": compared,
        "steps": steps,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    is_close = all(abs(row["error_percent"]) <= MAX_ERROR_PERCENT for row in compared)
    has_room = all(row["refused"] or row["fits"] for row in steps)
    return 0 if is_close and has_room else 1


if __name__ == "__main__":
    sys.exit(main())
