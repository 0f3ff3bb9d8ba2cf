"""Turns over the parts of a model: on the CPU they give the losses and gradients of one device.

Here all parts are on one device. What several devices do is in test_simulated_devices.py.
"""

import dataclasses
import json

import pytest
import small_qwen2
import torch
from small_qwen2 import count_targets, make_micro_batches, run_in_windows, take_gradients

from benchmarks import pipeline as benchmark
from sft.pipeline import Pipeline, cut_windows, make_parts, make_turns

NUM_MICRO_BATCHES = 5
MICRO_BATCHES = make_micro_batches(NUM_MICRO_BATCHES)
DIVISOR = count_targets(MICRO_BATCHES)


class OneDevice:
    """A model, and the losses and gradients of its own forward and backward passes."""

    def __init__(self, *, recomputed: bool, **options):
        self.model = small_qwen2.make_model(**options)
        if recomputed:
            small_qwen2.recompute_layers(self.model)
        self.losses = small_qwen2.run_one_by_one(self.model, MICRO_BATCHES, DIVISOR)
        self.gradients = take_gradients(self.model)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["kept", "recomputed"])
def recomputed(request):
    return request.param


@pytest.fixture(scope="module")
def one_device(dtype, recomputed):
    return OneDevice(dtype=dtype, recomputed=recomputed)


@pytest.fixture(scope="module")
def one_device_tied(recomputed):
    return OneDevice(tied=True, recomputed=recomputed)


# ---- Turns give one device's numbers ------------------------------------------------------------
@pytest.mark.parametrize("max_layers_per_part", [1, 2])
@pytest.mark.parametrize("window", [1, 2, NUM_MICRO_BATCHES])
def test_losses_and_gradients_are_those_of_one_device(one_device, max_layers_per_part, window):
    """To the bit, for any parts and any number of micro-batches in flight."""
    pipeline = Pipeline(one_device.model, max_layers_per_part=max_layers_per_part)
    losses = run_in_windows(pipeline, MICRO_BATCHES, DIVISOR, window)
    assert losses == one_device.losses
    gradients = take_gradients(one_device.model)
    for name, expected in one_device.gradients.items():
        assert torch.equal(gradients[name], expected), name


@pytest.mark.parametrize("max_layers_per_part", [1, 2])
@pytest.mark.parametrize("window", [1, 2, NUM_MICRO_BATCHES])
def test_a_tied_model_has_the_gradients_of_one_device(one_device_tied, max_layers_per_part, window):
    """The embedding's two gradients add up in another order, so their sum is rounded otherwise."""
    pipeline = Pipeline(one_device_tied.model, max_layers_per_part=max_layers_per_part)
    losses = run_in_windows(pipeline, MICRO_BATCHES, DIVISOR, window)
    assert losses == one_device_tied.losses
    gradients = take_gradients(one_device_tied.model)
    for name, expected in one_device_tied.gradients.items():
        error = (gradients[name] - expected).norm() / expected.norm()
        assert error < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [1, NUM_MICRO_BATCHES])
def test_half_precision_products_and_a_scaled_loss_change_no_bit(dtype, window):
    """Autocast is around the forward pass of each part, also when a layer is computed again."""
    model = small_qwen2.make_model()
    small_qwen2.recompute_layers(model)
    scaler = torch.amp.GradScaler("cpu")
    expected_losses = []
    for micro_batch in MICRO_BATCHES:
        with torch.autocast("cpu", dtype, cache_enabled=False):
            loss = model(**micro_batch, num_items_in_batch=DIVISOR)["loss"]
        expected_losses.append(loss.item())
        scaler.scale(loss).backward()
    expected = take_gradients(model)
    pipeline = Pipeline(model, autocast_dtype=dtype, max_layers_per_part=2)
    placed = [pipeline.place(micro_batch) for micro_batch in MICRO_BATCHES]
    losses = []
    for first in range(0, len(placed), window):
        losses += pipeline.run(placed[first : first + window], DIVISOR, True, scaler)
    assert [loss.item() for loss in losses] == expected_losses
    found = take_gradients(model)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("tied", [False, True])
def test_evaluation_gives_the_losses_of_one_device(tied):
    model = small_qwen2.make_model(tied=tied).eval()
    with torch.no_grad():
        expected = [model(**batch, num_items_in_batch=1)["loss"] for batch in MICRO_BATCHES]
    pipeline = Pipeline(model, max_layers_per_part=1)
    placed = [pipeline.place(micro_batch) for micro_batch in MICRO_BATCHES]
    found = pipeline.run(placed, 1, backward=False)
    assert found == expected


def test_evaluation_makes_no_gradient():
    model = small_qwen2.make_model()
    pipeline = Pipeline(model, max_layers_per_part=1)
    placed = [pipeline.place(micro_batch) for micro_batch in MICRO_BATCHES]
    losses = pipeline.run(placed, 1, backward=False)
    assert not any(loss.requires_grad for loss in losses)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_added_to_those_that_are_there():
    model = small_qwen2.make_model()
    pipeline = Pipeline(model)
    run_in_windows(pipeline, MICRO_BATCHES[:1], DIVISOR, 1)
    once = model.lm_head.weight.grad.clone()
    run_in_windows(pipeline, MICRO_BATCHES[:1], DIVISOR, 1)
    assert torch.equal(model.lm_head.weight.grad, 2 * once)


def test_a_micro_batch_is_as_it_was_after_it_was_placed():
    model = small_qwen2.make_model()
    micro_batch = dict(MICRO_BATCHES[0])
    Pipeline(model).place(micro_batch)
    assert micro_batch.keys() == MICRO_BATCHES[0].keys()


# ---- Parts and turns ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("max_layers_per_part", "layers_of_parts"), [(1, [1, 1, 1]), (2, [2, 1]), (8, [3])]
)
def test_parts_hold_all_layers_in_order(max_layers_per_part, layers_of_parts):
    decoder = small_qwen2.make_model().model
    parts = make_parts(decoder, max_layers_per_part)
    assert [len(part.layers) for part in parts] == layers_of_parts
    layers = [layer for part in parts for layer in part.layers]
    assert layers == list(decoder.layers)


DEVICES_OF_PARTS = [
    [0],
    [0, 1, 2, 3],
    [0, 0, 1, 1],
    [0, 0, 0, 1, 2, 2],
    [0, 3, 2, 1, 0],  # back from a tied head
]


@pytest.mark.parametrize("devices", DEVICES_OF_PARTS, ids=str)
@pytest.mark.parametrize("num_micro_batches", [1, 3, 8])
def test_each_micro_batch_meets_each_part_once_and_in_order(devices, num_micro_batches):
    met = {micro_batch: [] for micro_batch in range(num_micro_batches)}
    for turn in make_turns(devices, num_micro_batches):
        for part, micro_batch in turn:
            met[micro_batch].append(part)
    for parts in met.values():
        assert parts == list(range(len(devices)))


@pytest.mark.parametrize("devices", DEVICES_OF_PARTS, ids=str)
def test_each_part_meets_the_micro_batches_in_order(devices):
    met = {part: [] for part in range(len(devices))}
    for turn in make_turns(devices, 5):
        for part, micro_batch in turn:
            met[part].append(micro_batch)
    for micro_batches in met.values():
        assert micro_batches == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("devices", DEVICES_OF_PARTS, ids=str)
def test_a_turn_takes_a_micro_batch_to_one_device(devices):
    """So no copy is needed within a turn."""
    for turn in make_turns(devices, 5):
        place = {}
        for part, micro_batch in turn:
            assert place.setdefault(micro_batch, devices[part]) == devices[part]


def test_there_are_as_few_turns_as_can_be():
    """The first micro-batch takes a turn for each device, and each later one takes one more."""
    assert len(make_turns([0, 0, 1, 1, 2, 2], num_micro_batches=8)) == 8 + 3 - 1


def test_each_device_is_told_a_part_before_any_is_told_a_second():
    full_turn = make_turns([0, 0, 1, 1], num_micro_batches=2)[1]
    assert full_turn == [(0, 1), (2, 0), (1, 1), (3, 0)]


# ---- Windows ------------------------------------------------------------------------------------
def sizes_of_windows(lengths: list[int], max_tokens: int) -> list[list[int]]:
    micro_batches = [{"seq_lens": [length]} for length in lengths]
    windows = cut_windows(micro_batches, max_tokens)
    return [[sum(batch["seq_lens"]) for batch in window] for window in windows]


def test_a_window_has_at_most_so_many_tokens():
    assert sizes_of_windows([4, 4, 4, 4, 4], 10) == [[4, 4], [4, 4], [4]]


def test_a_window_may_be_full():
    assert sizes_of_windows([5, 5, 5], 10) == [[5, 5], [5]]


def test_a_micro_batch_over_the_limit_is_alone():
    assert sizes_of_windows([3, 12, 3, 3], 10) == [[3], [12], [3, 3]]


def test_all_fit_into_one_window():
    assert sizes_of_windows([4, 4, 4], 100) == [[4, 4, 4]]


# ---- The benchmark ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recorded_rows() -> list[dict]:
    return json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))["rows"]


def test_the_recorded_simulation_is_that_of_the_code(recorded_rows):
    row = benchmark.simulate_case(num_gpus=4, length=1000, tokens=4096)
    assert dataclasses.asdict(row) in recorded_rows


def test_the_plan_knows_how_long_devices_work(recorded_rows):
    """Its estimate leaves out copies and launches, so it is a little higher."""
    for row in recorded_rows:
        assert 0 <= row["busy_by_the_plan"] - row["busy"] < 3, row
