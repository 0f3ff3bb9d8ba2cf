"""Several GPUs of one process: no tensors of two devices meet, no device waits for the host.

There is no GPU here. tests/harness/simulated_devices makes devices that are none: their values are
the CPU's, and their time is counted. Models, autograd, hooks and optimizers are the real ones.
PyTorch can have only one such kind of device, so all of this runs in a process of its own.
"""

import gc
import json
import multiprocessing
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import runs
import simulated_devices
import small_qwen2
import torch
from safetensors.torch import load_file
from simulated_devices import script
from simulated_devices.attention import use_fused_kernels
from small_qwen2 import count_targets, make_micro_batches, run_in_windows, take_gradients

import sft_qwen2
from sft.host_memory import GradientsOnHost
from sft.memory_model import EMBEDDING, HEAD, Job, name_layer, step_memory
from sft.optimizer import AdamW8bit, AdamW8bitOnHost
from sft.pipeline import Pipeline
from sft.precision import choose_precision

NUM_DEVICES = 4


def start_devices() -> None:
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # of the optimizer; compiling takes a minute
    simulated_devices.start(NUM_DEVICES)


@pytest.fixture(scope="module")
def call():
    """A function that calls a function in the process with simulated devices."""
    missing_tool = simulated_devices.find_missing_tool()
    if missing_tool is not None:
        pytest.skip(f"building simulated devices needs {missing_tool}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=start_devices) as process:

        def call(function, *args, **options):
            return process.submit(function, *args, **options).result()

        yield call


# ---- The devices themselves ---------------------------------------------------------------------
def add_tensors(first_device: str, second_device: str, second_shape: tuple = (3,)) -> str:
    """Return the sum of two tensors of ones as text, or why there is none."""
    first = torch.ones(3, device=first_device)
    second = torch.ones(second_shape, device=second_device)
    try:
        return str((first + second).tolist())
    except RuntimeError as error:
        return str(error)


def pick_by_host_index() -> str:
    try:
        return str(torch.ones(3, device="simulated:0")[torch.tensor([0, 2])])
    except RuntimeError as error:
        return str(error)


def test_tensors_of_one_device_can_be_added(call):
    assert call(add_tensors, "simulated:1", "simulated:1") == "[2.0, 2.0, 2.0]"


def test_tensors_of_two_devices_cannot(call):
    assert "same device" in call(add_tensors, "simulated:1", "simulated:2")


def test_numbers_of_two_devices_cannot(call):
    assert "simulated:2" in call(add_tensors, "simulated:1", "simulated:2", ())


def test_a_number_of_the_host_can_be_added(call):
    assert call(add_tensors, "simulated:1", "cpu", ()) == "[2.0, 2.0, 2.0]"


def test_an_index_of_the_host_is_refused(call):
    assert "host" in call(pick_by_host_index)


def measure_kernels(kernels: list[str], queue_length: int = 1024) -> dict:
    """Return what is measured of one kernel on each device that is named, of a second each.

    "1>2" is a copy from device 1 to device 2, which takes a second, too.
    """
    simulated_devices.set_speed(launch_s=0, kernel_s=1, copy_s=1, queue_length=queue_length)
    tensors = [torch.ones(1, device=f"simulated:{device}") for device in range(NUM_DEVICES)]
    simulated_devices.reset()
    for kernel in kernels:
        source, _, target = kernel.partition(">")
        if target:
            tensors[int(source)].to(f"simulated:{target}", copy=True)
        else:
            tensors[int(source)].neg_()
    return simulated_devices.measure()


def test_kernels_of_one_device_run_one_after_the_other(call):
    assert call(measure_kernels, ["0", "0", "0"])["elapsed_s"] == pytest.approx(3)


def test_kernels_of_two_devices_run_at_the_same_time(call):
    measured = call(measure_kernels, ["0", "0", "1", "1"])
    assert measured["elapsed_s"] == pytest.approx(2)
    assert measured["busy_s"] == pytest.approx([2, 2, 0, 0])


def test_the_host_goes_on_while_devices_work(call):
    assert call(measure_kernels, ["0", "0", "0"])["host_s"] == pytest.approx(0)


def test_a_copy_makes_its_source_wait_for_its_target(call):
    """Three kernels on device 1, then the copy, then the kernel on device 0."""
    measured = call(measure_kernels, ["1", "1", "1", "0>1", "0"])
    assert measured["elapsed_s"] == pytest.approx(3 + 1 + 1)


def test_a_copy_makes_its_target_wait_for_its_source(call):
    measured = call(measure_kernels, ["0", "0", "0", "0>1", "1"])
    assert measured["elapsed_s"] == pytest.approx(3 + 1 + 1)


def test_the_host_waits_where_a_queue_is_full(call):
    measured = call(measure_kernels, ["0", "0", "0", "0"], queue_length=2)
    assert measured["host_s"] == pytest.approx(2)


def list_host_waits(name: str) -> list[str]:
    """Return why the host waited while something was asked of a device."""
    values = torch.ones(4, device="simulated:0")
    mask = torch.ones(4, dtype=torch.bool, device="simulated:0")
    index = torch.zeros(4, dtype=torch.int64, device="simulated:0")
    simulated_devices.reset()
    if name == "a number":
        values.sum().item()
    elif name == "a mask":
        values[mask]
    elif name == "an index":
        values[index]
    elif name == "a copy to the host":
        values.cpu()
    elif name == "a copy from the host":
        torch.ones(4).to("simulated:0")
    return simulated_devices.measure()["host_waits"]


@pytest.mark.parametrize("name", ["a number", "a mask", "a copy to the host"])
def test_the_host_waits_for_what_depends_on_values(call, name):
    assert len(call(list_host_waits, name)) > 0


def test_the_host_waits_for_a_copy_from_its_memory(call):
    assert call(list_host_waits, "a copy from the host") == ["copy from the host"]


def test_the_host_does_not_wait_for_an_index(call):
    assert call(list_host_waits, "an index") == []


def allocate_on_device_1() -> tuple[int, int]:
    """Return (peak, bytes still allocated) of device 1 after a tensor of 1 MiB came and went."""
    simulated_devices.reset()
    before = simulated_devices.measure()["allocated_bytes"][1]
    torch.empty(2**20, dtype=torch.uint8, device="simulated:1")
    measured = simulated_devices.measure()
    return measured["peak_bytes"][1] - before, measured["allocated_bytes"][1] - before


def test_memory_is_counted_for_each_device(call):
    assert call(allocate_on_device_1) == (2**20, 0)


# ---- Turns over several devices -----------------------------------------------------------------
class Case:
    """A model over four devices, and its pipeline.

    `precision`: "bf16", "fp16" (fp32 weights, fp16 products, a loss scaler) or "fp32".
    """

    def __init__(
        self,
        precision: str,
        layers_by_device: list[int],
        recomputed: bool = True,
        max_layers_per_part: int = 8,
        **options,
    ):
        dtype = torch.float32
        autocast_dtype = None
        self.scaler = None
        if precision == "bf16":
            dtype = torch.bfloat16
        if precision == "fp16":
            autocast_dtype = torch.float16
            self.scaler = torch.amp.GradScaler("simulated", init_scale=1024)
        num_layers = sum(layers_by_device)
        self.model = small_qwen2.make_model(dtype=dtype, num_layers=num_layers, **options)
        if recomputed:
            small_qwen2.recompute_layers(self.model)
        small_qwen2.spread_layers(self.model, layers_by_device, "simulated")
        self.pipeline = Pipeline(
            self.model, autocast_dtype=autocast_dtype, max_layers_per_part=max_layers_per_part
        )
        gc.collect()  # what an earlier case has left behind would go at any moment

    def place(self, micro_batches: list[dict]) -> list[dict]:
        return [self.pipeline.place(micro_batch) for micro_batch in micro_batches]

    def move(self, micro_batches: list[dict]) -> list[dict]:
        """Return micro-batches on the first device, for the model's own forward pass."""
        moved = []
        for micro_batch in micro_batches:
            on_first = dict(micro_batch)
            for name, value in micro_batch.items():
                if isinstance(value, torch.Tensor):
                    on_first[name] = value.to("simulated:0")
            moved.append(on_first)
        return moved

    def run(self, placed: list[dict], divisor: float) -> list[torch.Tensor]:
        return self.pipeline.run(placed, divisor, backward=True, scaler=self.scaler)


PRECISIONS = ["bf16", "fp16", "fp32"]


def measure_turns(
    precision: str,
    layers_by_device: list[int],
    num_micro_batches: int,
    backward: bool,
    queue_length: int = 10**6,
    **options,
) -> dict:
    """Return what is measured of turns, all micro-batches in flight, each kernel as long."""
    case = Case(precision, layers_by_device, **options)
    micro_batches = make_micro_batches(num_micro_batches)
    placed = case.place(micro_batches)
    simulated_devices.set_speed(
        launch_s=1e-6, kernel_s=1e-3, copy_s=1e-3, queue_length=queue_length
    )
    simulated_devices.reset()
    if backward:
        case.run(placed, count_targets(micro_batches))
    else:
        case.pipeline.run(placed, 1, backward=False)
    return simulated_devices.measure()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backward", [True, False], ids=["training", "evaluation"])
def test_the_host_waits_for_no_device_in_a_window(call, precision, tied, backward):
    measured = call(measure_turns, precision, [1, 1, 1, 1], 3, backward, tied=tied)
    assert measured["host_waits"] == []


def test_each_boundary_is_crossed_once_forward_and_once_back(call):
    """accelerate's hooks copy nothing. The first and last device have one neighbour."""
    measured = call(measure_turns, "fp32", [2, 1, 1, 1], 3, backward=True)
    assert measured["received_copies"] == [3, 6, 6, 3]


def test_evaluation_crosses_each_boundary_once(call):
    measured = call(measure_turns, "fp32", [2, 1, 1, 1], 3, backward=False)
    assert measured["received_copies"] == [0, 3, 3, 3]


@pytest.mark.parametrize(
    ("num_micro_batches", "tied", "layers_by_device"),
    [
        (8, False, [3, 3, 3, 2]),
        pytest.param(16, False, [3, 3, 3, 2], marks=pytest.mark.slow),
        (8, True, [2, 3, 3, 3]),
    ],
)
def test_devices_work_at_the_same_time(call, num_micro_batches, tied, layers_by_device):
    """At least 0.9 of k / (k + p - 1), which a pipeline of p even parts and k micro-batches has.

    The device of the head has a layer less, since the loss takes its time, too.
    """
    measured = call(
        measure_turns,
        "fp32",
        layers_by_device,
        num_micro_batches,
        backward=True,
        recomputed=False,
        tied=tied,
    )
    share = sum(measured["busy_s"]) / NUM_DEVICES / measured["elapsed_s"]
    best = num_micro_batches / (num_micro_batches + NUM_DEVICES - 1)
    assert share >= 0.9 * best


def test_a_full_queue_keeps_no_other_device_idle(call):
    """Two devices with two parts each, and room for the kernels of one part."""
    split = ["fp32", [2, 2, 0, 0], 4]
    options = {"backward": True, "max_layers_per_part": 1}
    endless = call(measure_turns, *split, **options)
    short = call(measure_turns, *split, **options, queue_length=200)
    assert short["host_s"] > 2 * endless["host_s"]
    assert short["elapsed_s"] < 1.05 * endless["elapsed_s"]


def compare_windows(precision: str, windows: list[int]) -> list[str]:
    """Return the names of parameters whose gradient is not that of the model's own forward."""
    case = Case(precision, [2, 1, 1, 1])
    micro_batches = make_micro_batches(3)
    divisor = count_targets(micro_batches)
    small_qwen2.run_one_by_one(case.model, case.move(micro_batches), divisor)
    expected = take_gradients(case.model)
    different = []
    for window in windows:
        run_in_windows(case.pipeline, micro_batches, divisor, window)
        for name, gradient in take_gradients(case.model).items():
            if not torch.equal(gradient, expected[name]):
                different.append(f"window {window}: {name}")
    return different


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_turns_give_the_gradients_of_layers_in_a_row(call, precision):
    """To the bit, for any number of micro-batches in flight."""
    assert call(compare_windows, precision, windows=[1, 2, 3]) == []


# ---- Memory -------------------------------------------------------------------------------------
NUM_TOKENS = 64  # of a micro-batch
HIDDEN_SIZE = 64


def measure_peaks(
    precision: str, layers_by_device: list[int], num_micro_batches: int, window: int, **options
) -> list[int]:
    """Return the bytes of each device that turns add to what is there before them."""
    case = Case(precision, layers_by_device, hidden_size=HIDDEN_SIZE, **options)
    placed = case.place(make_micro_batches(num_micro_batches, NUM_TOKENS))
    simulated_devices.reset()
    before = simulated_devices.measure()["allocated_bytes"]
    for first in range(0, len(placed), window):
        case.run(placed[first : first + window], 1)
    peaks = simulated_devices.measure()["peak_bytes"]
    return [peak - bytes for peak, bytes in zip(peaks, before)]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stream_bytes"), [("bf16", 2), ("fp16", 4)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_token_in_flight_takes_a_hidden_state_for_each_layer(call, precision, stream_bytes, tied):
    """Each layer keeps its input. The output of the last layer waits for the loss."""
    layers_by_device = [2, 1, 0, 2]
    kept_by_device = [2, 1, 0, 2 + 1]
    few = call(measure_peaks, precision, layers_by_device, 6, window=6, tied=tied)
    many = call(measure_peaks, precision, layers_by_device, 9, window=9, tied=tied)
    for device in range(NUM_DEVICES):
        growth = (many[device] - few[device]) / (3 * NUM_TOKENS)
        expected = kept_by_device[device] * HIDDEN_SIZE * stream_bytes
        assert growth == pytest.approx(expected, rel=0.05), device


def test_a_second_window_needs_no_more_memory(call):
    """There is no second copy of the gradients."""
    one_window = call(measure_peaks, "fp32", [1, 1, 1, 1], 2, window=2)
    two_windows = call(measure_peaks, "fp32", [1, 1, 1, 1], 4, window=2)
    bytes_of_a_layer = 9 * HIDDEN_SIZE**2 * 4  # its matrices; each device has a layer
    for device in range(NUM_DEVICES):
        assert two_windows[device] < one_window[device] + bytes_of_a_layer / 2


# ---- Memory beside the plan ----------------------------------------------------------------------
CAPABILITIES = {"bf16": (8, 0), "fp16": (7, 0)}
PLACES = {"device": (), "state": ("state",), "gradients": ("state", "gradients")}
WINDOW = 3  # micro-batches in flight
TOKENS = 384  # of a micro-batch
WIDTH = 128  # as narrow as state of 8 bits can be; the sizes are in the proportions of Qwen2


@dataclass
class DeviceMemory:
    """Bytes of a device, for each of its parameters."""

    at_rest: float  # between steps
    with_gradients: float  # between windows
    peak: float  # of a window that is not the first of its step
    planned: float  # the same by the formula, of the fullest moment but the update


def measure_memory(
    precision: str, layers_by_device: list[int], place: str, recomputed=True, tied=False
) -> list[DeviceMemory]:
    """Return the memory of each device, in turns if there are several."""
    gc.collect()
    before = simulated_devices.measure()["allocated_bytes"]  # of an earlier case
    sizes = {"hidden_size": WIDTH, "intermediate_size": 5 * WIDTH, "tied": tied}
    case = Case(precision, layers_by_device, recomputed, **sizes)
    micro_batches = make_long_micro_batches()
    job = Job(
        config=case.model.config,
        precision=choose_precision(CAPABILITIES[precision], False, "auto"),
        in_host_memory=PLACES[place],
    )
    optimizer = make_optimizer(case.model, PLACES[place])

    def run_window() -> None:
        if len(layers_by_device) > 1:
            case.run(case.place(micro_batches), 1)
        else:
            for micro_batch in micro_batches:
                small_qwen2.run_one_by_one(case.model, case.move([micro_batch]), 1)

    with use_fused_kernels():
        run_window()
        if "gradients" in PLACES[place]:
            optimizer.gradients_on_host.clip(1.0)
        optimizer.step()  # makes the state
        optimizer.zero_grad()
        at_rest = simulated_devices.measure()["allocated_bytes"]
        run_window()
        with_gradients = simulated_devices.measure()["allocated_bytes"]
        simulated_devices.reset()
        run_window()
    peaks = simulated_devices.measure()["peak_bytes"]
    found = []
    for device, modules in enumerate(list_modules_by_device(layers_by_device, tied)):
        window_tokens = None
        if len(layers_by_device) > 1:
            window_tokens = WINDOW * TOKENS
        planned = step_memory(
            job, modules, TOKENS, recompute=recomputed, window_tokens=window_tokens
        )
        del planned["update"]  # a GPU compiles it
        number = 0
        for parameter in case.model.parameters():
            if parameter.device.index == device:
                number += parameter.numel()
        found.append(
            DeviceMemory(
                at_rest=(at_rest[device] - before[device]) / number,
                with_gradients=(with_gradients[device] - before[device]) / number,
                peak=(peaks[device] - before[device]) / number,
                planned=max(planned.values()) / number,
            )
        )
    return found


def make_long_micro_batches() -> list[dict]:
    """Return micro-batches of one example, all tokens of which are trained."""
    random = np.random.default_rng(0)
    micro_batches = []
    for _ in range(WINDOW):
        example = small_qwen2.make_example(random, TOKENS)
        example["labels"] = example["input_ids"]
        micro_batches.append(sft_qwen2.flatten([example]))
    return micro_batches


def make_optimizer(model, in_host_memory: tuple[str, ...]) -> AdamW8bit:
    if not in_host_memory:
        return AdamW8bit(model.parameters(), seed=0)
    optimizer = AdamW8bitOnHost(model.parameters(), seed=0)
    if "gradients" in in_host_memory:
        optimizer.gradients_on_host = GradientsOnHost(model.parameters())
    optimizer.take_host_memory()
    return optimizer


def list_modules_by_device(layers_by_device: list[int], tied: bool) -> list[list[str]]:
    """Return the modules of each device, as small_qwen2.spread_layers places them."""
    modules_by_device = []
    first = 0
    for num_layers in layers_by_device:
        layers = range(first, first + num_layers)
        modules_by_device.append([name_layer(number) for number in layers])
        first += num_layers
    modules_by_device[0].insert(0, EMBEDDING)
    if not tied:
        modules_by_device[-1].append(HEAD)
    return modules_by_device


MEMORY_CASES = [
    ("bf16", [2, 1, 1, 1], "device", {}),
    ("bf16", [1, 1, 1, 2], "device", {"recomputed": False}),
    ("bf16", [1, 1, 1, 2], "device", {"tied": True}),
    ("fp16", [1, 1, 1, 1], "device", {}),
    ("bf16", [1, 1, 1, 1], "state", {}),
    ("bf16", [1, 1, 1, 1], "gradients", {}),
    ("bf16", [2], "state", {}),
    ("bf16", [2], "gradients", {}),
]


@pytest.fixture(scope="module", params=MEMORY_CASES, ids=str)
def memory_case(request, call):
    """A precision, where what is kept, and the DeviceMemory of each device."""
    precision, layers_by_device, place, options = request.param
    measured = call(measure_memory, precision, layers_by_device, place, **options)
    return precision, place, measured


@pytest.mark.slow
def test_the_peak_of_each_device_is_that_of_the_plan(memory_case):
    """Within 5 %. (On devices other than CUDA's, PyTorch's loss takes a little more.)"""
    _, _, measured = memory_case
    for memory in measured:
        assert memory.planned == pytest.approx(memory.peak, rel=0.05), memory


@pytest.mark.slow
def test_a_device_keeps_no_byte_of_what_is_in_host_memory(memory_case):
    """It has the weights, and state and gradients where they are not in host memory.

    Small tensors have state of 8 bytes a value. The limit has room for them.
    """
    precision, place, measured = memory_case
    weight = {"bf16": 2, "fp16": 4}[precision]
    at_rest = weight
    if place == "device":
        at_rest += 2.0625
    with_gradients = at_rest
    if place != "gradients":
        with_gradients += weight
    for memory in measured:
        assert memory.at_rest == pytest.approx(at_rest, rel=0.05)
        assert memory.with_gradients == pytest.approx(with_gradients, rel=0.05)


# ---- The script over four devices ---------------------------------------------------------------
NUM_ROWS = {"train": 16, "validation": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a few sums to train on."""
    folder = tmp_path_factory.mktemp("data")
    for split, num_rows in NUM_ROWS.items():
        lines = []
        for number in range(num_rows):
            row = {"query": f"What is {number} + {number}?", "answer": f"It is {2 * number}."}
            lines.append(json.dumps(row) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, tmp_path_factory) -> Path:
    """A folder with a model of four layers, whose matrices are wide enough for 8-bit state."""
    folder = tmp_path_factory.mktemp("model")
    return runs.make_model(folder, tied=request.param, num_hidden_layers=4, hidden_size=128)


def run_script(
    precision: str, folders: dict, stops: bool = False, window=None, in_host_memory=(), **flags
) -> dict:
    """Return what there is to know of a run of two steps over four devices.

    `stops`: it gets a signal after the first one. `window`: tokens in flight, instead of the
    plan's.
    """
    callbacks = []
    if stops:
        callbacks.append(script.StopAfterOneStep())
    words = runs.argv(
        **folders,
        **flags,
        report_to="none",
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        tokens_per_forward=100,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    run = script.run_script(
        *words,
        precision=precision,
        max_window_tokens=window,
        in_host_memory=in_host_memory,
        callbacks=callbacks,
    )
    return {
        "code": run.code,
        "errors": run.err,
        "parameters_by_device": count_parameters(run.trainer.model),
        "state_elsewhere": find_state_elsewhere(run.trainer.model, run.trainer.optimizer.optimizer),
    }


def count_parameters(model) -> dict[str, int]:
    """Return the number of parameters on each device."""
    return dict(Counter(str(parameter.device) for parameter in model.parameters()))


def find_state_elsewhere(model, optimizer) -> list[str]:
    """Return the names of optimizer state that is on another device than its parameter."""
    elsewhere = []
    for name, parameter in model.named_parameters():
        for key, state in optimizer.state[parameter].items():
            is_moment = isinstance(state, torch.Tensor) and key != "step"
            if is_moment and state.device != parameter.device:
                elsewhere.append(f"{name}: {key} on {state.device}")
    return elsewhere


@pytest.fixture(scope="module", params=["bf16", "fp16"])
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def complete_run(call, precision, model, data, tmp_path_factory) -> dict:
    """What there is to know of a run that nobody stops, and its output_dir."""
    output_dir = tmp_path_factory.mktemp("run") / "outputs"
    folders = {"model_name_or_path": model, "data_path": data, "output_dir": output_dir}
    return {"output_dir": output_dir, **call(run_script, precision, folders)}


@pytest.mark.slow
def test_a_run_over_four_devices(complete_run):
    """No operator meets two devices in training, clipping, update, evaluation, answers, saving."""
    assert complete_run["code"] == 0, complete_run["errors"]
    assert complete_run["state_elsewhere"] == []
    assert len(complete_run["parameters_by_device"]) == NUM_DEVICES
    losses = [log["eval_loss"] for log in runs.read_logs(complete_run["output_dir"], "eval_loss")]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("model", [False], ids=["untied"], indirect=True)
def test_a_run_is_resumed_with_another_window(call, complete_run, precision, model, data, tmp_path):
    """The weights are those of a run that was never stopped, to the bit."""
    expected = load_file(complete_run["output_dir"] / "model.safetensors")
    folders = {"model_name_or_path": model, "data_path": data, "output_dir": tmp_path / "resumed"}
    stopped = call(run_script, precision, folders, stops=True)
    assert stopped["code"] == 128 + signal.SIGTERM
    resumed = call(run_script, precision, folders, window=100, resume=True)
    assert resumed["code"] == 0, resumed["errors"]
    found = load_file(tmp_path / "resumed" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert torch.equal(found[name], weights), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"], indirect=True)
@pytest.mark.parametrize("model", [False], ids=["untied"], indirect=True)
@pytest.mark.parametrize("contents", [("state",), ("state", "gradients")], ids="+".join)
def test_a_run_with_host_memory_trains_the_same_weights(
    call, complete_run, precision, model, data, tmp_path, contents
):
    """No operator meets two devices where the optimizer's state and gradients lie on the host."""
    folders = {"model_name_or_path": model, "data_path": data, "output_dir": tmp_path / "host"}
    run = call(run_script, precision, folders, in_host_memory=contents)
    assert run["code"] == 0, run["errors"]
    assert len(run["state_elsewhere"]) > 0
    expected = load_file(complete_run["output_dir"] / "model.safetensors")
    found = load_file(tmp_path / "host" / "model.safetensors")
    for name, weights in expected.items():
        assert torch.equal(found[name], weights), name
