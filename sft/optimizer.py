"""AdamW with 8-bit state: torchao's, with what would lose accuracy, fail or slow a run mended.

Two moments take 2 bytes per parameter, and bf16 weights are rounded at random, so that updates
smaller than a bf16 step still count on average. Each mend says what is wrong upstream, where, and
when the mend can go. The versions read are torchao 0.18, torch 2.13 and accelerate 1.15.
"""

import os
import shutil
import sysconfig

import numpy as np
import torch
import torchao.optim
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_8bit import OptimState8bit

from sft.errors import UserError
from sft.host_memory import StateOnHost

BLOCK_SIZE = 128  # values of 8-bit state that share a scale; divides the width of every Qwen2
MIN_8BIT_VALUES = 4096  # a smaller tensor saves too little memory to be worth 8 bits


class AdamW8bit(torchao.optim.AdamW8bit):
    """AdamW (arXiv:1711.05101) whose moments take 8 bits per value (arXiv:2110.02861).

    `seed` is the seed of the random rounding of bf16 weights.
    """

    def __init__(self, params, *, seed: int, **options):
        super().__init__(params, block_size=BLOCK_SIZE, **options)
        self.seed = seed
        # torchao calls torch.compile for each parameter at each step: 0.2 s of host time for 7B.
        # This can go when https://github.com/pytorch/ao/issues/2500 is mended in a release.
        self.compiled_update = torch.compile(single_param_adam, fullgraph=True, dynamic=False)

    def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
        """Return zeros of p's shape for a moment: 8-bit for wide matrices, fp32 for the rest.

        torchao keeps what it does not quantize in p's own dtype: the second moment of a bf16 norm
        then stops falling, as 0.1 % of a value is less than half a bf16 step. torchao also decides
        by the size of the local shard, so that the format depends on the number of GPUs, and its
        blocks cross rows. This method can go when _new_buffer of torchao/optim/adam.py has fp32
        for small tensors, and https://github.com/pytorch/ao/issues/4912 is in a release.
        """
        has_whole_blocks = p.dim() >= 2 and p.shape[-1] % BLOCK_SIZE == 0
        if not has_whole_blocks or p.numel() < MIN_8BIT_VALUES:
            return torch.zeros_like(p, dtype=torch.float32)
        is_sharded = isinstance(p, DTensor)
        local = p.to_local() if is_sharded else p
        # torchao would pass p's dtype here, as the dtype that the state shows. A view of the state
        # loses that dtype, and bf16 shards fail at their first step ("aten.view.dtype"). The
        # argument can be passed again when https://github.com/pytorch/ao/pull/4216 is in a release.
        state = OptimState8bit.zeros(local.shape, signed, BLOCK_SIZE, local.device)
        if not is_sharded:
            return state
        return DTensor.from_local(
            state, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state dict and empty its "state", so that no value is held twice for long.

        torch casts loaded state to the dtype of its parameter: fp32 moments of bf16 weights would
        lose bits at each resume (https://github.com/pytorch/ao/issues/3314). accelerate moves the
        learning rate, a tensor here, to the first GPU, where compiled steps of parameters on other
        GPUs cannot read it (AcceleratedOptimizer.__init__ in accelerate/optimizer.py). This method
        can go when torch keeps the dtype of loaded state and accelerate leaves 0-dim tensors.
        """
        state = self.state  # the saved values may go where these are
        super().load_state_dict({**state_dict, "state": {}})
        self.state = state
        saved_state = state_dict["state"]
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"]):
            group["lr"] = group["lr"].cpu()
            for p, key in zip(group["params"], saved_group["params"]):
                if key in saved_state:
                    self.load_parameter_state(p, saved_state.pop(key))

    def load_parameter_state(self, p: torch.Tensor, saved: dict) -> None:
        """Take over the saved state of one parameter: "step", "exp_avg" and "exp_avg_sq"."""
        state = self.state[p]
        state["step"] = saved["step"].cpu()
        state["exp_avg"] = saved["exp_avg"].to(p.device)
        state["exp_avg_sq"] = saved["exp_avg_sq"].to(p.device)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update each parameter that has a gradient.

        torchao draws the bits of its random rounding from the global generators
        (_fp32_to_bf16_sr in torchao/optim/quant_utils.py), so that a step would depend on whatever
        else drew from them, and a resume would round otherwise. Here the bits depend on the seed
        and the number of the step alone. The mend can go when torchao takes a generator.
        """
        assert closure is None, "a closure would draw from the generators of the rounding"
        gpus = {p.device for p in self.list_parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(gpus), torch._dynamo.utils.disable_cache_limit():
            torch.manual_seed(self.rounding_seed())
            for group in self.param_groups:
                for p in group["params"]:
                    self.step_parameter(p, group)

    def list_parameters(self) -> list[torch.Tensor]:
        parameters = []
        for group in self.param_groups:
            parameters += group["params"]
        return parameters

    def rounding_seed(self) -> int:
        """Return a seed made of this optimizer's seed and the number of steps done."""
        num_steps = 0
        if self.state:
            any_state = next(iter(self.state.values()))
            num_steps = int(any_state["step"])
        # torch's CPU generator reads 32 bits of a seed: the two numbers have to be mixed.
        mixed = np.random.SeedSequence([self.seed, num_steps])
        return int(mixed.generate_state(1, np.uint64)[0])

    def step_parameter(self, p: torch.Tensor, group: dict) -> None:
        """Update one parameter of a group, and its state, by torchao's formula."""
        if p.grad is None:
            return
        state = self.state[p]
        if not state:
            state.update(self.new_state(p))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        self.compiled_update(
            p.detach(),
            p.grad,
            state["step"],
            state["exp_avg"],
            state["exp_avg_sq"],
            None,  # the maximum that amsgrad keeps
            group["lr"],
            beta1,
            beta2,
            group["weight_decay"],
            group["eps"],
            True,  # AdamW: weight decay apart from the gradient
            self.bf16_stochastic_round and p.dtype == torch.bfloat16,
        )

    def new_state(self, p: torch.Tensor) -> dict:
        """Return the state of a parameter before its first step."""
        return {
            "step": torch.tensor(0.0),
            "exp_avg": self._new_buffer(p, signed=True),
            "exp_avg_sq": self._new_buffer(p, signed=False),
        }


class AdamW8bitOnHost(StateOnHost, AdamW8bit):
    """AdamW8bit with its state in host memory between steps, for the same updates to the bit."""


def optimizer_class_and_options(
    args, precision, rank: int, in_host_memory: tuple[str, ...] = ()
) -> tuple[type, dict] | None:
    """Return what Trainer takes as `optimizer_cls_and_kwargs`; None lets Trainer make its own.

    `args` has the learning rate, AdamW's betas, eps and weight decay, and the seed. `rank` is the
    number of this process: each process rounds its shards by other random bits. `in_host_memory`
    is (), ("state",) or ("state", "gradients").
    """
    if precision.optim != "adamw_torch_8bit":
        assert not in_host_memory, f"{precision.optim} has no state in host memory"
        return None
    optimizer_class = AdamW8bit
    if in_host_memory:
        optimizer_class = AdamW8bitOnHost
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "bf16_stochastic_round": True,
        "seed": args.seed + rank,
    }
    return optimizer_class, options


def total_norm(tensors: list[torch.Tensor]) -> float:
    """Return the 2-norm of all values of these tensors: all plain, or all shards of whole ones.

    The processes of a sharded model have to call this together, and all get the same norm.
    """
    norm = get_total_norm(tensors)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.item()


def check_optimizer(optim: str, device_kind: str) -> None:
    """Raise UserError where this optimizer could not make its first step on "cuda" or "cpu"."""
    if optim == "adamw_torch_8bit":
        check_compiler(device_kind)


def check_compiler(device_kind: str) -> None:
    """Raise UserError where torch.compile lacks a compiler or Python's header for this device."""
    variable = "CXX"
    compilers = ["g++"]
    if device_kind == "cuda":
        variable = "CC"  # Triton builds its launchers in C
        compilers = ["gcc", "clang"]
    if variable in os.environ:
        compilers = [os.environ[variable]]
    missing = []
    if not any(shutil.which(compiler) for compiler in compilers):
        missing.append(f"{' or '.join(compilers)} ({variable} names another)")
    header = sysconfig.get_path("include", "posix_prefix") + "/Python.h"
    if not os.path.exists(header):
        missing.append(f"{header} (in the package python3-dev)")
    if missing:
        raise UserError(
            "the 8-bit optimizer is compiled at its first step; install what is missing: "
            + " and ".join(missing)
        )
