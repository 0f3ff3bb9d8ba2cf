"""Tokens per second, MFU and peak memory are what they are called."""

from types import SimpleNamespace

import pytest
import torch

from sft import throughput
from sft.throughput import GIB, Throughput, find_peak_tflops


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock whose time the test sets."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    return clock


def test_tokens_per_second_are_those_of_the_steps_since_the_last_metrics(clock):
    counter = Throughput(num_gpus=0)
    counter.start()
    clock.now += 1
    counter.add(num_tokens=300, flops=0)
    counter.start()
    clock.now += 1
    counter.add(num_tokens=500, flops=0)
    assert counter.metrics() == {"tokens_per_s": 400}
    clock.now += 1000  # an evaluation
    counter.start()
    clock.now += 2
    counter.add(num_tokens=300, flops=0)
    assert counter.metrics() == {"tokens_per_s": 150}


def test_mfu_is_counted_for_all_gpus_and_memory_for_the_fullest(clock, monkeypatch):
    used = [3 * GIB, 5 * GIB]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", used.__getitem__)
    counter = Throughput(num_gpus=8)
    counter.start()
    clock.now += 10
    counter.add(num_tokens=1000, flops=8 * 312e12)
    assert counter.metrics() == {"tokens_per_s": 100, "mfu": 0.1, "peak_gib": 5.0}


def test_without_a_cited_peak_there_is_no_mfu(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: GIB)
    counter = Throughput(num_gpus=1)
    counter.start()
    clock.now += 1
    counter.add(num_tokens=10, flops=1e12)
    assert counter.metrics() == {"tokens_per_s": 10, "peak_gib": 1.0}


@pytest.mark.parametrize(
    ("gpu_name", "tflops"),
    [
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla V100S-PCIE-32GB", 130),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA H20", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_data_sheet(gpu_name, tflops):
    assert find_peak_tflops(gpu_name) == tflops
