"""Which devices are found, which are refused, and in which number formats they train."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from sft import devices
from sft.devices import check_architectures, check_driver, check_machine, find_devices
from sft.errors import UserError
from sft.precision import choose_precision
from sft.throughput import GIB

AMPERE = (8, 0)
VOLTA = (7, 0)
CUDA_13_WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6_WHEEL = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


def make_args(gpus: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(gpus=gpus)


def make_training_args(kind: str, world_size: int = 1, use_cpu: bool = False) -> SimpleNamespace:
    device = torch.device(kind)
    return SimpleNamespace(device=device, world_size=world_size, use_cpu=use_cpu)


@pytest.fixture
def two_gpus(monkeypatch):
    """An H100 with 71 GiB free beside a V100 with 20."""
    capabilities = [(9, 0), VOLTA]
    names = ["NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-32GB"]
    free = [71 * GIB, 20 * GIB]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: names[gpu])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_12_6_WHEEL)


@pytest.fixture
def free_memory(monkeypatch):
    """A machine with 100 GiB free, and no control groups."""
    memory = SimpleNamespace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(devices, "list_limits", lambda: [])


# ---- What there is ------------------------------------------------------------------------------
def test_one_process_has_all_gpus_and_what_is_free_on_them(two_gpus, free_memory):
    found = find_devices(make_args(), make_training_args("cuda"))
    assert found.kind == "cuda"
    assert found.free_bytes == [71 * GIB, 20 * GIB]
    assert found.host_free_bytes == 100 * GIB
    assert found.is_one_process_on_several_gpus


def test_the_oldest_gpu_decides_the_number_formats(two_gpus, free_memory):
    found = find_devices(make_args(), make_training_args("cuda"))
    assert found.capability == VOLTA


def test_processes_plan_for_the_gpu_with_the_least(two_gpus, free_memory, monkeypatch):
    """They must cut a step in the same way."""
    others = {"names": "A", "free_bytes": 5 * GIB, "capability": AMPERE}

    def gather_object(own: list) -> list:
        if isinstance(own[0], str):
            return [*own, others["names"]]
        if isinstance(own[0], tuple):
            return [*own, others["capability"]]
        return [*own, others["free_bytes"]]

    monkeypatch.setattr("accelerate.utils.gather_object", gather_object)
    found = find_devices(make_args(), make_training_args("cuda:0", world_size=2))
    assert found.free_bytes == [5 * GIB, 5 * GIB]
    assert found.capability == AMPERE
    assert not found.is_one_process_on_several_gpus


def test_a_cpu_leaves_a_tenth_to_other_programs(free_memory):
    found = find_devices(make_args(), make_training_args("cpu"))
    assert found.kind == "cpu"
    assert found.capability is None
    assert found.free_bytes == [90 * GIB]


def test_processes_of_a_machine_share_its_memory(free_memory, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: own)
    found = find_devices(make_args(), make_training_args("cpu", world_size=2))
    assert found.free_bytes == [45 * GIB]


def test_a_mac_takes_the_cpu_and_says_so(free_memory, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.has_only_apple_gpu()
    found = find_devices(make_args(), make_training_args("cpu"))
    assert found.names == ["CPU: Apple GPUs are not used"]


# ---- Another machine ----------------------------------------------------------------------------
def test_gpus_of_another_machine_multiply_in_bf16():
    found = find_devices(make_args("2x80,1x32"), make_training_args("cpu"))
    assert found.capability == AMPERE
    assert [round(free / GIB, 1) for free in found.free_bytes] == [78.6, 78.6, 31.1]
    assert found.is_assumed
    assert found.host_free_bytes is None


def test_a_suffix_stands_for_gpus_without_bf16():
    found = find_devices(make_args("4x32:fp16"), make_training_args("cpu"))
    assert found.capability == VOLTA
    assert len(found.names) == 4


def test_processes_on_another_machine_plan_for_its_smallest_gpu():
    found = find_devices(make_args("2x80,1x40"), make_training_args("cpu", world_size=3))
    assert [round(free / GIB, 1) for free in found.free_bytes] == [39.0, 39.0, 39.0]


def test_another_machine_has_a_gpu_for_each_process():
    with pytest.raises(UserError, match="2x80,1x40 has 3 GPUs for 2 processes"):
        find_devices(make_args("2x80,1x40"), make_training_args("cpu", world_size=2))


# ---- Host memory --------------------------------------------------------------------------------
GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


@pytest.fixture
def make_group(tmp_path, monkeypatch):
    """A function that makes a control group with a limit, and this process a member."""
    memory = SimpleNamespace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(devices, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(devices, "CGROUP_MEMBERSHIP", tmp_path / "membership")

    def make(version: int, path: str, limit: str) -> None:
        names = GROUP_FILES[version]
        folder = tmp_path / path
        line = f"0::/{path}\n"
        if version == 1:
            folder = tmp_path / "memory" / path
            line = f"5:cpu,cpuacct:/\n4:memory:/{path}\n"
        folder.mkdir(parents=True)
        (folder / names[0]).write_text(limit)
        (folder / names[1]).write_text(str(30 * GIB))
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {10 * GIB}\n")
        (tmp_path / "membership").write_text(line)

    return make


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_no_more_than_its_limit(version, make_group):
    """50 GiB less 30 in use, of which 10 are files that the kernel can drop."""
    make_group(version, "job", limit=str(50 * GIB))
    assert devices.measure_host_memory() == 30 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_an_outer_group_counts_as_well(version, make_group, tmp_path):
    make_group(version, "slurm", limit=str(50 * GIB))
    membership = tmp_path / "membership"
    membership.write_text(membership.read_text().replace("/slurm", "/slurm/step_0"))
    assert devices.measure_host_memory() == 30 * GIB


def test_a_group_without_a_limit_has_all_of_the_machine(make_group):
    make_group(2, "job", limit="max")
    assert devices.measure_host_memory() == 100 * GIB


# ---- GPUs that cannot be used -------------------------------------------------------------------
@pytest.mark.parametrize(
    "capability, architectures",
    [
        ((8, 9), CUDA_13_WHEEL),  # sm_86 runs on 8.9
        ((9, 0), CUDA_13_WHEEL),
        ((12, 1), CUDA_13_WHEEL),
        ((13, 0), CUDA_13_WHEEL),  # newer than the build, which can compile
        (VOLTA, CUDA_12_6_WHEEL),
    ],
)
def test_gpus_with_kernels_pass(capability, architectures):
    check_architectures([AMPERE, capability], architectures)


def test_a_v100_is_told_the_build_that_it_needs():
    with pytest.raises(UserError, match=r"capability 7\.0, only for sm_75 .*CUDA 12\.6"):
        check_architectures([AMPERE, VOLTA], CUDA_13_WHEEL)


def test_a_gpu_newer_than_the_build_is_named():
    with pytest.raises(UserError, match=r"capability 10\.0, only for sm_50"):
        check_architectures([(10, 0)], CUDA_12_6_WHEEL)


def test_a_driver_that_is_too_old_is_named():
    with pytest.raises(UserError, match=r"CUDA 13\.0 .*driver 535\.104\.05: .*580.*--use_cpu"):
        check_driver("13.0", "535.104.05")


def test_no_driver_and_no_cuda_are_no_mistake():
    check_driver("13.0", None)
    check_driver(None, "535.104.05")


@pytest.fixture
def old_driver(tmp_path, monkeypatch):
    file = tmp_path / "version"
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build\n"
    file.write_text(line)
    monkeypatch.setattr(devices, "DRIVER_FILE", file)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def test_a_machine_whose_driver_is_too_old_is_refused(old_driver):
    with pytest.raises(UserError, match=r"driver 535\.104\.05"):
        check_machine(make_training_args("cpu"))


def test_a_driver_does_not_matter_to_the_cpu(old_driver):
    check_machine(make_training_args("cpu", use_cpu=True))


def test_a_driver_does_not_matter_where_gpus_are_hidden(old_driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    check_machine(make_training_args("cpu"))


def test_torchrun_with_one_process_for_two_gpus_is_refused(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="--nproc_per_node gpu"):
        check_machine(make_training_args("cuda"))


def test_python_with_two_gpus_is_welcome(two_gpus, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    check_machine(make_training_args("cuda"))


# ---- Number formats -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "capability, fp32, weights, compute, optim, num_bytes",
    [
        (AMPERE, False, "bfloat16", "bfloat16", "adamw_torch_8bit", 6.06),
        (AMPERE, True, "float32", "bfloat16", "adamw_torch_fused", 16),
        ((7, 5), False, "float32", "float16", "adamw_torch_8bit", 10.06),
        (VOLTA, True, "float32", "float16", "adamw_torch_fused", 16),
        (None, False, "float32", "float32", "adamw_torch_fused", 16),
    ],
)
def test_formats_by_compute_capability(capability, fp32, weights, compute, optim, num_bytes):
    precision = choose_precision(capability, fp32, "auto")
    assert precision.weights == getattr(torch, weights)
    assert precision.compute == getattr(torch, compute)
    assert precision.optim == optim
    assert round(precision.bytes_per_parameter, 2) == num_bytes


def test_an_optimizer_that_rounds_plainly_gets_fp32_weights():
    precision = choose_precision(AMPERE, False, "adamw_torch_fused")
    assert precision.weights == torch.float32
    assert precision.compute == torch.bfloat16
    assert "lose small updates" in precision.reason


def test_8_bit_state_over_fp32_weights_can_be_asked_for():
    precision = choose_precision(AMPERE, True, "adamw_torch_8bit")
    assert precision.weights == torch.float32
    assert round(precision.bytes_per_parameter, 2) == 10.06
