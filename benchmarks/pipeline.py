"""Simulate a step of the 7B over 2, 4 and 8 GPUs of one process. No GPU is measured here.

    python benchmarks/pipeline.py

The order of work is the one of sft/pipeline.py. The host tells each GPU a layer's kernels in a
row, which takes the host its time. A GPU begins a layer when it has done all it was told before. A
copy makes both of its GPUs wait. Where a launch queue is full, the host waits. What is taken for
granted of GPUs and host is in the constants below.

Beside turns stand the same layers without them ("in a row"), and FSDP2 by torchrun, by the formula
that the plan uses. A share is useful work over what the GPUs could do: 40 % of an A100's peak is
the most there is. Layers are recomputed, which is no useful work, so the best share is 75 %.
"""

import argparse
import json
import platform
import shlex
import sys
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sft.memory_model import QWEN2_SIZES, Job, count_parameters, make_share  # noqa: E402
from sft.pipeline import MAX_LAYERS_PER_PART, make_turns  # noqa: E402
from sft.placement import place_by_time  # noqa: E402
from sft.precision import choose_precision  # noqa: E402
from sft.step_time import (  # noqa: E402
    NVLINK_BYTES_PER_S,
    PCIE_BYTES_PER_S,
    UTILIZATION,
    Workload,
    busy_share,
    list_device_times,
    sharded_step_s,
)

RESULTS = ROOT / "benchmarks" / "results" / "pipeline.json"
MODEL = QWEN2_SIZES["Qwen2-7B"]
FLOPS_PER_S = UTILIZATION * 312e12  # of an A100
TRAINED_SHARE = 0.6  # of all tokens
EXAMPLES_PER_STEP = 128
# Kernels of a layer forward, and back; the second with those that are computed again.
KERNELS_FORWARD = 45
KERNELS_BACK = 45 + 65
KERNELS_OF_LOSS = 50
LAUNCH_S = 10e-6  # of the host, for a kernel
MIN_KERNEL_S = 3e-6
COPY_S = 10e-6  # until the first byte of a copy arrives
QUEUE_LENGTH = 1024  # kernels that a GPU can be told before the host waits

NUMS_GPUS = (2, 4, 8)
WINDOW_TOKENS = 65536  # in flight, where memory is short
LENGTHS = (300, 1000, 4000)  # tokens of an example
MICRO_BATCHES = (1024, 2048, 4096, 8192, 16384)  # tokens


# ---- Host and GPUs ------------------------------------------------------------------------------
@dataclass
class Span:
    """What a GPU did from one time to another."""

    gpu: int
    start: float
    end: float
    direction: str  # "forward", "back" or "loss"
    micro_batch: int


@dataclass
class Gpu:
    free_at: float = 0.0  # when it has done all it was told
    busy_s: float = 0.0
    told: deque = field(default_factory=deque)  # (end, number of kernels), the first to end first


class Machine:
    """A host and its GPUs, each with a clock."""

    def __init__(self, num_gpus: int, link_bytes_per_s: float = PCIE_BYTES_PER_S):
        self.host_time = 0.0
        self.gpus = [Gpu() for _ in range(num_gpus)]
        self.link_bytes_per_s = link_bytes_per_s

    def launch(self, number: int, num_kernels: int, seconds: float) -> float:
        """Tell a GPU kernels that take it so many seconds together; return when they begin."""
        gpu = self.gpus[number]
        self.wait_for_room(gpu, num_kernels)
        start = max(gpu.free_at, self.host_time + LAUNCH_S)
        self.host_time += num_kernels * LAUNCH_S
        seconds = max(seconds, num_kernels * MIN_KERNEL_S)
        # The last kernel cannot end before it was told.
        gpu.free_at = max(start + seconds, self.host_time + seconds / num_kernels)
        gpu.busy_s += seconds
        gpu.told.append((gpu.free_at, num_kernels))
        return start

    def wait_for_room(self, gpu: Gpu, num_kernels: int) -> None:
        """Let the host wait until the GPU's queue has room for so many kernels."""
        while gpu.told and gpu.told[0][0] <= self.host_time:
            gpu.told.popleft()
        waiting = sum(kernels for _, kernels in gpu.told)
        while gpu.told and waiting + num_kernels > QUEUE_LENGTH:
            end, kernels = gpu.told.popleft()
            self.host_time = max(self.host_time, end)
            waiting -= kernels

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        """Copy between GPUs: both wait until the other has done all it was told before."""
        if source == target:
            return
        sender = self.gpus[source]
        receiver = self.gpus[target]
        self.host_time += LAUNCH_S
        start = max(sender.free_at, receiver.free_at, self.host_time)
        end = start + COPY_S + num_bytes / self.link_bytes_per_s
        sender.free_at = end
        receiver.free_at = end

    def elapsed_s(self) -> float:
        return max(self.host_time, *(gpu.free_at for gpu in self.gpus))

    def busy_share(self) -> float:
        busy_s = sum(gpu.busy_s for gpu in self.gpus)
        return busy_s / len(self.gpus) / self.elapsed_s()


# ---- A step of the 7B ---------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Part:
    """Layers of a GPU that it is told together."""

    gpu: int
    num_layers: int


class Step:
    """An optimizer step in one process.

    `layers_by_gpu`: numbers of layers; the head is on the last GPU. `length`: tokens of an example.
    """

    def __init__(self, machine: Machine, layers_by_gpu: list[int], num_tokens: int, length: int):
        self.machine = machine
        self.num_tokens = num_tokens
        self.parts = cut_into_parts(layers_by_gpu)
        self.head_gpu = len(layers_by_gpu) - 1
        self.spans = []
        counts = count_parameters(MODEL)
        attention = 2 * MODEL.hidden_size * length
        self.layer_s = num_tokens * (2 * counts.layer_matrices + attention) / FLOPS_PER_S
        # Its logits are computed, again for their gradient, and go back to both operands.
        self.loss_s = 4 * num_tokens * TRAINED_SHARE * 2 * counts.table / FLOPS_PER_S

    def forward(self, part: Part, micro_batch: int) -> None:
        start = None
        for _ in range(part.num_layers):
            began = self.machine.launch(part.gpu, KERNELS_FORWARD, self.layer_s)
            start = start or began
        self.record(part.gpu, start, "forward", micro_batch)

    def back(self, part: Part, micro_batch: int) -> None:
        start = None
        for _ in range(part.num_layers):
            began = self.machine.launch(part.gpu, KERNELS_BACK, 3 * self.layer_s)
            start = start or began
        self.record(part.gpu, start, "back", micro_batch)

    def loss(self, micro_batch: int) -> None:
        start = self.machine.launch(self.head_gpu, KERNELS_OF_LOSS, self.loss_s)
        self.record(self.head_gpu, start, "loss", micro_batch)

    def record(self, gpu: int, start: float, direction: str, micro_batch: int) -> None:
        end = self.machine.gpus[gpu].free_at
        self.spans.append(Span(gpu, start, end, direction, micro_batch))

    def copy(self, source: int, target: int) -> None:
        num_bytes = self.num_tokens * MODEL.hidden_size * 2  # hidden states in bf16
        self.machine.copy(source, target, num_bytes)

    def run_in_turns(self, micro_batches: range) -> None:
        """Run micro-batches of these numbers as sft/pipeline.py does, all of them in flight."""
        gpus = [part.gpu for part in self.parts]
        for turn in make_turns(gpus, len(micro_batches)):
            self.copy_to_next(gpus, turn)
            for number, index in turn:
                self.forward(self.parts[number], micro_batches[index])
        gpus = [self.head_gpu, *reversed(gpus)]
        for turn in make_turns(gpus, len(micro_batches)):
            self.copy_to_next(gpus, turn)
            for number, index in turn:
                if number == 0:
                    self.loss(micro_batches[index])
                else:
                    self.back(self.parts[-number], micro_batches[index])

    def copy_to_next(self, gpus: list[int], turn: list[tuple[int, int]]) -> None:
        """Copy what the turn before has made to the GPUs that go on from it."""
        for number, _ in turn:
            if number > 0:
                self.copy(gpus[number - 1], gpus[number])

    def run_in_a_row(self, micro_batches: range) -> None:
        """Run each micro-batch forward and back before the next one, as device_map alone does."""
        for number in micro_batches:
            self.run_in_turns(range(number, number + 1))
            for gpu in self.machine.gpus:
                gpu.free_at = self.machine.elapsed_s()


def cut_into_parts(layers_by_gpu: list[int]) -> list[Part]:
    """Return parts of at most MAX_LAYERS_PER_PART layers of one GPU."""
    parts = []
    for gpu, num_layers in enumerate(layers_by_gpu):
        while num_layers > 0:
            part = Part(gpu=gpu, num_layers=min(num_layers, MAX_LAYERS_PER_PART))
            parts.append(part)
            num_layers -= part.num_layers
    return parts


def even_split(num_gpus: int) -> list[int]:
    """Return the numbers of layers of each GPU, as the plan splits them where memory suffices."""
    return [make_share(MODEL, modules).num_layers for modules in even_modules(num_gpus)]


def even_modules(num_gpus: int) -> list[list[str]]:
    job = make_job(num_processes=1)
    unlimited = [float("inf")] * num_gpus
    return place_by_time(job, unlimited, 1024, TRAINED_SHARE, recompute=True)


def make_job(num_processes: int) -> Job:
    precision = choose_precision((8, 0), fp32=False, optim="auto")
    return Job(config=MODEL, precision=precision, num_shards=num_processes)


def useful_share(seconds: float, num_gpus: int, num_tokens: int, length: int) -> float:
    """Return the useful work of a step over what the GPUs could have done in these seconds."""
    counts = count_parameters(MODEL)
    layers = MODEL.num_hidden_layers * (6 * counts.layer_matrices + 6 * MODEL.hidden_size * length)
    head = 6 * TRAINED_SHARE * counts.table
    return num_tokens * (layers + head) / FLOPS_PER_S / num_gpus / seconds


# ---- The table ----------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Row:
    """Shares of useful work, in percent, but for those that are called busy."""

    num_gpus: int
    length: int  # tokens of an example
    tokens: int  # of a micro-batch, of one GPU where there are shards
    num_micro_batches: int
    layers: str
    in_a_row: float
    turns: float
    turns_over_nvlink: float
    windows_of_64k_tokens: float
    shards_over_pcie: float
    shards_over_nvlink: float
    busy: float  # the time that GPUs work, by turns
    busy_by_the_plan: float


def simulate_case(num_gpus: int, length: int, tokens: int) -> Row:
    """Return the shares of a step of EXAMPLES_PER_STEP examples of one length."""
    step_tokens = EXAMPLES_PER_STEP * length
    num_micro_batches = max(1, round(step_tokens / tokens))
    done_tokens = num_micro_batches * tokens
    layers = even_split(num_gpus)

    def percent(machine: Machine) -> float:
        return to_percent(useful_share(machine.elapsed_s(), num_gpus, done_tokens, length))

    in_a_row = Machine(num_gpus)
    Step(in_a_row, layers, tokens, length).run_in_a_row(range(num_micro_batches))
    turns = Machine(num_gpus)
    Step(turns, layers, tokens, length).run_in_turns(range(num_micro_batches))
    over_nvlink = Machine(num_gpus, NVLINK_BYTES_PER_S)
    Step(over_nvlink, layers, tokens, length).run_in_turns(range(num_micro_batches))
    windows = Machine(num_gpus)
    step = Step(windows, layers, tokens, length)
    window = max(1, WINDOW_TOKENS // tokens)
    for first in range(0, num_micro_batches, window):
        step.run_in_turns(range(first, min(first + window, num_micro_batches)))
    times = list_device_times(MODEL, even_modules(num_gpus), TRAINED_SHARE)
    return Row(
        num_gpus=num_gpus,
        length=length,
        tokens=tokens,
        num_micro_batches=num_micro_batches,
        layers=" ".join(map(str, layers)),
        in_a_row=percent(in_a_row),
        turns=percent(turns),
        turns_over_nvlink=percent(over_nvlink),
        windows_of_64k_tokens=percent(windows),
        shards_over_pcie=share_of_shards(num_gpus, length, tokens, PCIE_BYTES_PER_S),
        shards_over_nvlink=share_of_shards(num_gpus, length, tokens, NVLINK_BYTES_PER_S),
        busy=to_percent(turns.busy_share()),
        busy_by_the_plan=to_percent(busy_share(times, num_micro_batches, 1)),
    )


def share_of_shards(num_gpus: int, length: int, tokens: int, link_bytes_per_s: float) -> float:
    """Return the share of FSDP2, where each GPU has micro-batches of so many tokens."""
    lengths = np.full(EXAMPLES_PER_STEP, length)
    workload = Workload(
        lengths=lengths,
        num_trained_tokens=round(TRAINED_SHARE * lengths.sum()),
        examples_per_step=EXAMPLES_PER_STEP,
        num_steps=1,
    )
    seconds = sharded_step_s(
        make_job(num_processes=num_gpus),
        workload,
        tokens_per_forward=tokens,
        recompute=True,
        flops_per_s=FLOPS_PER_S,
        link_bytes_per_s=link_bytes_per_s,
    )
    return to_percent(useful_share(seconds, num_gpus, int(lengths.sum()), length))


def to_percent(share: float) -> float:
    return round(100 * share, 1)


def simulate_all() -> list[Row]:
    rows = []
    for num_gpus in NUMS_GPUS:
        for length in LENGTHS:
            for tokens in MICRO_BATCHES:
                if tokens >= length:
                    rows.append(simulate_case(num_gpus, length, tokens))
    return rows


@dataclass(frozen=True)
class Column:
    """A way to run a step, with the micro-batch that is best for it."""

    title: str
    share: str  # name of a field of Row
    max_tokens: int = MICRO_BATCHES[-1]  # of a micro-batch


COLUMNS = (
    Column("in a row", "in_a_row"),
    Column("turns", "turns"),
    Column("turns, NVLink", "turns_over_nvlink"),
    Column("turns, windows of 64k tokens", "windows_of_64k_tokens"),
    Column("FSDP2, PCIe, at most 4k tokens", "shards_over_pcie", 4096),
    Column("FSDP2, PCIe", "shards_over_pcie"),
    Column("FSDP2, NVLink", "shards_over_nvlink"),
)


def print_best(rows: list[Row]) -> None:
    """Print a table in Markdown: each way with the micro-batch that is best for it."""
    titles = [column.title for column in COLUMNS]
    print(f"| GPUs | tokens of an example | {' | '.join(titles)} |")
    print("|--:|--:|" + "--:|" * len(titles))
    for num_gpus in NUMS_GPUS:
        for length in LENGTHS:
            of_case = [row for row in rows if (row.num_gpus, row.length) == (num_gpus, length)]
            cells = [str(num_gpus), f"{length:,}"]
            for column in COLUMNS:
                cells.append(describe_best(of_case, column))
            print(f"| {' | '.join(cells)} |")


def describe_best(rows: list[Row], column: Column) -> str:
    """Return the best share of a way, and its tokens of a micro-batch, as "64 (1k)"."""
    best = None
    for row in rows:
        if row.tokens > column.max_tokens:
            continue
        if best is None or getattr(row, column.share) > getattr(best, column.share):
            best = row
    return f"{getattr(best, column.share):.0f} ({best.tokens // 1024}k)"


def print_estimates(rows: list[Row]) -> None:
    """Print how far the plan's estimate of the time that GPUs work is from the simulation."""
    errors = [row.busy_by_the_plan - row.busy for row in rows]
    print(f"GPUs work: the plan says {min(errors):.1f} to {max(errors):.1f} points more")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    rows = simulate_all()
    print("Simulated: useful work in % of what the GPUs could do, and its tokens a micro-batch")
    print_best(rows)
    print_estimates(rows)
    found = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, CPU only; torch {torch.__version__}",
        "simulated": "no GPU was measured",
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
