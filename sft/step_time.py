"""How much a run computes, and how long that should take: estimates, nothing is measured."""

import math
from dataclasses import dataclass

import numpy as np

from sft.memory_model import FP32_BYTES, Job, Share, count_parameters, make_share

UTILIZATION = 0.4  # share of a GPU's peak that is taken to be reached
PCIE_BYTES_PER_S = 20e9  # PCIe 4.0 x16, one direction
NVLINK_BYTES_PER_S = 200e9
DISK_BYTES_PER_S = 1e9
RECOMPUTED = 4 / 3  # one more forward pass beside one forward and a backward pass of two


# ---- How much -----------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run trains on."""

    lengths: np.ndarray  # tokens of each example [number of examples]
    num_trained_tokens: int  # of all examples together
    examples_per_step: int
    num_steps: int

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def mean_length(self) -> float:
        return self.num_tokens / len(self.lengths)

    @property
    def trained_share(self) -> float:
        return self.num_trained_tokens / self.num_tokens

    @property
    def tokens_of_a_step(self) -> float:
        """Return the tokens of a typical step."""
        return self.mean_length * min(self.examples_per_step, len(self.lengths))

    @property
    def tokens_of_the_largest_step(self) -> int:
        """Return the tokens of the largest step of an epoch in some order."""
        return int(self.reduce_steps(np.add).max())

    @property
    def longest_of_a_typical_step(self) -> int:
        """Return the tokens of a typical step's longest example: the median of an epoch's."""
        return int(np.median(self.reduce_steps(np.maximum)))

    def reduce_steps(self, ufunc: np.ufunc) -> np.ndarray:
        """Return a figure of the lengths of each step of an epoch in some order."""
        order = np.random.default_rng(0).permutation(self.lengths)
        starts = range(0, len(order), self.examples_per_step)
        return ufunc.reduceat(order, starts, dtype=np.int64)


def measure_workload(training_args, lengths: np.ndarray, num_trained_tokens: int) -> Workload:
    """Return the Workload of examples of these lengths."""
    return Workload(
        lengths=lengths,
        num_trained_tokens=num_trained_tokens,
        examples_per_step=count_examples_per_step(training_args),
        num_steps=count_steps(len(lengths), training_args),
    )


def count_examples_per_step(training_args) -> int:
    """Return the examples of one optimizer step, of all processes together."""
    per_process = (
        training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    )
    return per_process * training_args.world_size


def count_steps(num_examples: int, training_args) -> int:
    """Return the optimizer steps of the run, as Trainer counts them."""
    if training_args.max_steps > 0:
        return training_args.max_steps
    steps_per_epoch = math.ceil(num_examples / count_examples_per_step(training_args))
    return math.ceil(steps_per_epoch * training_args.num_train_epochs)


def training_flops(config, lengths: np.ndarray, num_trained_tokens: int) -> float:
    """Return the FLOPs of one forward and backward pass over examples of these lengths.

    Only what is computed counts. A matrix takes 6 for each parameter and token (arXiv:2001.08361,
    section 2.1). The embedding is a lookup. The head meets trained tokens only. Attention takes 12
    for each layer, value of the hidden size, and pair of an example's tokens (arXiv:2204.02311,
    appendix B), and half of that where it is causal (arXiv:2307.08691, section 4.1). Recomputing
    is not counted.
    """
    counts = count_parameters(config)
    lengths = np.asarray(lengths, dtype=np.float64)
    layers = 6 * config.num_hidden_layers * counts.layer_matrices * lengths.sum()
    head = 6 * counts.table * num_trained_tokens
    pairs = (lengths**2).sum() / 2
    attention = 12 * config.num_hidden_layers * config.hidden_size * pairs
    return float(layers + head + attention)


def step_flops(config, workload: Workload) -> float:
    """Return the FLOPs of a typical step."""
    of_all = training_flops(config, workload.lengths, workload.num_trained_tokens)
    return of_all * workload.tokens_of_a_step / workload.num_tokens


# ---- How long, in one process -------------------------------------------------------------------
def device_time(config, share: Share, trained_share: float) -> float:
    """Return the time that a device works on a micro-batch, in times of one layer.

    The embedding takes none. The head is a product like those of a layer, at trained tokens.
    """
    counts = count_parameters(config)
    time = share.num_layers
    if share.has_head:
        time += trained_share * counts.table / counts.layer_matrices
    return time


def list_device_times(
    config, modules_by_device: list[list[str]], trained_share: float
) -> list[float]:
    """Return the device_time of each device that holds something."""
    times = []
    for modules in modules_by_device:
        if modules:
            times.append(device_time(config, make_share(config, modules), trained_share))
    return times


def busy_share(device_times: list[float], num_micro_batches: int, num_windows: int) -> float:
    """Return the share of their time that the devices of a pipeline work in a step, at best.

    The slowest device works on one micro-batch after the other. In each window, the first one
    reaches it and the last one leaves it while it has nothing to do.
    """
    work = sum(device_times)
    slowest = max(device_times)
    time = num_micro_batches * slowest + num_windows * (work - slowest)
    return num_micro_batches * work / (len(device_times) * time)


def count_windows(tokens_of_a_step: float, window_tokens: int) -> int:
    """Return the windows of a pipeline in a step of so many tokens."""
    return math.ceil(tokens_of_a_step / window_tokens)


def min_pipeline_tokens(config, num_devices: int, flops_per_s: float) -> int:
    """Return the tokens of a micro-batch below which a pipeline waits for the host.

    The host launches 155 kernels for each layer of a micro-batch, forward, again and backward, in
    about 15 microseconds each. It must do so for all devices while each device computes its own.
    """
    launching_s = num_devices * 155 * 15e-6
    flops_per_token = 8 * count_parameters(config).layer_matrices
    return math.ceil(launching_s * flops_per_s / flops_per_token)


def state_transfer_s(job: Job, num_devices: int) -> float:
    """Return the seconds of a step in which the optimizer's state comes and goes."""
    return transfer_s(job, num_devices, job.precision.state_bytes)


def gradient_transfer_s(job: Job, num_devices: int) -> float:
    """Return the seconds of a micro-batch in which earlier gradients come and their sum goes."""
    return transfer_s(job, num_devices, job.precision.weights.itemsize)


def transfer_s(job: Job, num_devices: int, bytes_per_parameter: float) -> float:
    """Return the seconds in which so many bytes of each parameter come from the host and go back.

    Each device has its own link to the host.
    """
    parameters = count_parameters(job.config).model
    num_bytes = 2 * bytes_per_parameter * parameters
    return num_bytes / num_devices / PCIE_BYTES_PER_S


def host_transfer_s(job: Job, num_devices: int, num_micro_batches: int) -> float:
    """Return the seconds of a step in which values come from host memory or go there."""
    seconds = 0.0
    if "state" in job.in_host_memory:
        seconds += state_transfer_s(job, num_devices)
    if "gradients" in job.in_host_memory:
        # The first micro-batch only sends, and the update only fetches.
        seconds += num_micro_batches * gradient_transfer_s(job, num_devices)
    return seconds


# ---- How long, in shards ------------------------------------------------------------------------
def sharded_step_s(
    job: Job,
    workload: Workload,
    *,
    tokens_per_forward: int,
    recompute: bool,
    flops_per_s: float,
    link_bytes_per_s: float,
) -> float:
    """Return the seconds of a typical step of FSDP2, whose messages and products overlap.

    Each layer is gathered in the forward and in the backward pass, and its gradients are sent in
    fp32. What takes longer, messages or products, sets the pace.
    """
    counts = count_parameters(job.config)
    # A process has its own share of whatever it gathers or sends.
    s_per_byte = (job.num_shards - 1) / job.num_shards / link_bytes_per_s
    gather_s = job.precision.compute.itemsize * s_per_byte  # of a parameter
    send_s = FP32_BYTES * s_per_byte  # of a parameter's gradient
    tokens_at_once = job.num_shards * tokens_per_forward
    num_passes = math.ceil(workload.tokens_of_a_step / tokens_at_once)
    tokens = workload.tokens_of_a_step / (job.num_shards * num_passes)

    attention_flops = 2 * job.config.hidden_size * workload.mean_length
    forward_flops = tokens * (2 * counts.layer_matrices + attention_flops)
    forward_s = forward_flops / flops_per_s
    backward_s = 2 * forward_s
    if recompute:
        backward_s += forward_s
    layer_s = max(forward_s, counts.layer * gather_s)
    layer_s += max(backward_s, counts.layer * (gather_s + send_s))

    trained_tokens = tokens * workload.trained_share
    head_flops = 8 * trained_tokens * counts.table  # forward, again and backward
    head_s = head_flops / flops_per_s
    head_s = max(head_s, counts.table * (2 * gather_s + send_s))
    embedding_s = counts.table * (gather_s + send_s)
    num_layers = job.config.num_hidden_layers
    return num_passes * (num_layers * layer_s + head_s + embedding_s)
