"""The device law: one process over several GPUs, whose tensors never meet on two of them.

There is no GPU here. FakeTensorMode runs the real model, dispatch hooks, Trainer and optimizer over
tensors without contents on the devices cpu:1 to cpu:4, the "GPUs"; the host is cpu. As on a real
box, only tensors without dimensions may come from the host.
"""

import contextlib
import inspect
import textwrap
from pathlib import Path
from unittest import mock

import accelerate
import forks
import numpy as np
import pytest
import runs
import torch
import transformers
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sft_qwen2
from sft import memory_plan
from sft.callbacks import StopOnSignal

TOKENS = 200  # of a micro-batch, at most
CAPABILITY = {"bf16": (9, 0), "fp16": (7, 0), "fp32": (9, 0)}


def strict_common_device():
    """Return FakeTensor's check of devices, for which the host is "cpu" and cpu:1 is a GPU."""
    source = textwrap.dedent(inspect.getsource(FakeTensor._find_common_device))
    source = source.replace("@staticmethod\n", "")
    loose = "is_device_cpu(t.device) and t.dim() == 0"
    assert source.count(loose) == 1, "PyTorch's check reads differently now"
    source = source.replace(loose, "t.device == torch.device('cpu') and t.dim() == 0")
    names = dict(vars(fake_tensor))
    exec("from __future__ import annotations\n" + source, names)
    return staticmethod(names["_find_common_device"])


class KnownNumbers(TorchDispatchMode):
    """How many tokens are trained, which a mask without contents cannot say: half of them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten._index_put_impl_.default):
            masks = args[1]
            if len(masks) == 1 and masks[0].dtype == torch.bool:
                some = torch.empty(TOKENS // 2, dtype=torch.int64, device=masks[0].device)
                args = (args[0], [some] * masks[0].dim(), *args[2:])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def four_fake_gpus(compute: str):
    """Let tensors be fake, devices cpu:1 to cpu:4 be GPUs, and the first be Trainer's."""
    first = torch.device("cpu", 1)
    make_tensor = torch.tensor

    def tensor_on(data, *args, device=None, **kwargs):  # a fake constant would stay on the host
        made = make_tensor(data, *args, **kwargs)
        made.constant = None
        return made if device is None else made.to(device)

    def number(value):
        return lambda tensor: value

    def autocast(*args, **kwargs):  # accelerate leaves fp16 out on a CPU
        return torch.autocast("cpu", torch.float16, cache_enabled=False)

    patches = [
        mock.patch.object(FakeTensor, "_find_common_device", strict_common_device()),
        mock.patch.object(torch, "tensor", tensor_on),
        mock.patch.object(torch.Tensor, "item", lambda t: 1.0 if t.is_floating_point() else 0),
        mock.patch.object(torch.Tensor, "__float__", number(1.0)),
        mock.patch.object(torch.Tensor, "__int__", number(0)),
        mock.patch.object(torch.Tensor, "__bool__", number(False)),
        mock.patch.object(torch.Tensor, "__deepcopy__", lambda t, memo: t.detach().clone()),
        mock.patch.object(torch.Tensor, "data_ptr", lambda t: id(t)),
        mock.patch.object(transformers.TrainingArguments, "device", first),
        mock.patch.object(
            accelerate.state.AcceleratorState, "device", property(lambda _: first), create=True
        ),
    ]
    if compute == "fp16":
        at = "accelerate.accelerator.get_mixed_precision_context_manager"
        patches.append(mock.patch(at, autocast))
        # Whether a gradient was infinite, its number, 1, would answer: none was.
        step = mock.patch.object(
            torch.amp.GradScaler, "_maybe_opt_step", lambda scaler, optimizer, *_: optimizer.step()
        )
        patches.append(step)
    torch.compiler.set_stance("force_eager")
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(KnownNumbers())
        yield
    torch.compiler.set_stance("default")


def dispatch(model, device_map: dict) -> None:
    """Put each part of the model on its fake GPU, with accelerate's hooks between them."""
    for name, module in model.named_modules():
        homes = [gpu for part, gpu in device_map.items() if f"{name}.".startswith(f"{part}.")]
        for tensors in (module._parameters, module._buffers) if homes else ():
            for key, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=homes[0])
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    tensors[key] = torch.nn.Parameter(moved) if is_weight else moved
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    skip = model._skip_keys_device_placement
    accelerate.dispatch_model(model, device_map, skip_keys=skip)


def make_rows(num_rows: int) -> list[dict]:
    rng, rows = np.random.default_rng(0), []
    for length in rng.integers(20, 90, num_rows):
        ids = rng.integers(0, 4096, length)
        labels = np.where(np.arange(length) < length // 2, -100, ids)
        rows.append({"input_ids": ids, "labels": labels, "line": 1, "num_tokens": length})
    return rows


def make_device_map(num_layers: int, first_gpu: int) -> dict[str, str]:
    """Return a map of consecutive layers to cpu:first_gpu .. cpu:4, head last."""
    gpus = np.linspace(first_gpu, 4.99, num_layers).astype(int).tolist()
    device_map = {"model.rotary_emb": first_gpu, "model.embed_tokens": first_gpu}
    device_map |= {f"model.layers.{i}": gpu for i, gpu in enumerate(gpus)}
    device_map |= {"model.norm": 4, "lm_head": 4}
    return {name: f"cpu:{gpu}" for name, gpu in device_map.items()}


def states_elsewhere(model, optimizer) -> list[str]:
    """Return the names of parameters whose optimizer state is on another device."""
    return [
        f"{name}: {key} on {state.device}"
        for name, parameter in model.named_parameters()
        for key, state in optimizer.state[parameter].items()
        if key != "step" and isinstance(state, torch.Tensor) and state.device != parameter.device
    ]


CASES = [
    ("bf16", False, True, 2),  # the first GPU is empty, though Trainer's own
    ("bf16", True, False, 1),
    ("fp16", False, False, 1),
    ("fp32", True, True, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_tensor_meets_one_of_another_gpu(case, tmp_path):
    """Each in a process of its own: PyTorch on cpu:1 corrupts memory that others would use."""
    ended = forks.run(tmp_path / "log", (check, *case, tmp_path / "outputs"))
    assert ended.codes == [0], ended.texts[0]


def check(compute: str, tied: bool, recompute: bool, first_gpu: int, output_dir: Path) -> None:
    """Train two steps, load the optimizer's state, step again, and evaluate."""
    flags = {"report_to": "none", "use_cpu": True, "output_dir": output_dir, "max_steps": 2}
    argv = runs.argv(**flags, save_strategy="no", learning_rate=1e-3)
    args, training_args = sft_qwen2.parse_arguments(
        argv, sft_qwen2.ScriptArguments, sft_qwen2.TRAINING_DEFAULTS
    )
    precision = memory_plan.choose_precision(CAPABILITY[compute], compute == "fp32")
    config = transformers.Qwen2Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4096,
        tie_word_embeddings=tied,
    )
    device_map = make_device_map(4, first_gpu)
    if tied:
        device_map["lm_head"] = device_map["model.embed_tokens"]
    limit = 0 if recompute else 10**6
    plan = mock.Mock(tokens_per_forward=TOKENS, max_tokens_without_checkpointing=limit)
    rows = {"train": make_rows(6), "validation": make_rows(1)}
    with four_fake_gpus(compute):
        model = sft_qwen2.model_class()._from_config(
            config, dtype=precision.weights, attn_implementation="row_attention"
        )
        dispatch(model, device_map)
        trainer = sft_qwen2.build_trainer(
            model, None, args, training_args, rows, precision, plan, StopOnSignal()
        )
        if compute == "fp16":
            trainer.accelerator.native_amp = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
        trainer.train()
        assert trainer.state.global_step == 2
        optimizer = trainer.optimizer.optimizer
        assert len(optimizer.state) == len(list(model.parameters()))
        assert not states_elsewhere(model, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        assert not states_elsewhere(model, optimizer)
        optimizer.step()
        assert trainer.evaluate()["eval_loss"] > 0
