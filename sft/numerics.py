"""Loss, attention over rows, and AdamW with 8-bit state, all exact.

Shapes: T tokens of a micro-batch, N trained tokens, H query heads, K key/value heads, D size of a
head or of the hidden state, V vocabulary.
"""

import os
import shutil
import sysconfig
from random import Random

import torch
import torch.distributed.tensor

from sft.rows import UserError

LOSS_CHUNK = 1024  # positions whose logits exist at once
BLOCK = 128  # values of 8-bit state that share a scale: it divides the width of every Qwen2
LEAST_8BIT = 4096  # values: in a smaller tensor there is nothing to save


def cross_entropy_sum(hidden, head, targets):
    """Return the sum of the cross entropies of hidden [N, D] @ head [V, D].T and targets [N], fp32.

    Its softmax is fp32 in any dtype; under autocast the matrix products are in autocast's.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # it would leave linear_cross_entropy in fp32
        dtype = torch.get_autocast_dtype(device)
        hidden, head = hidden.to(dtype), head.to(dtype)
    with torch.autocast(device, enabled=False):
        chunks = {"batch_chunk_size": LOSS_CHUNK, "chunking_method": None, "acc_policy": "compact"}
        options = torch.nn.LinearCrossEntropyOptions(**chunks, acc_dtype=torch.float32)
        # Of half precision, a sum would keep 8 or 11 bits; the errors of single losses cancel out.
        each = {"reduction": "sum" if hidden.dtype == torch.float32 else "none", "options": options}
        return torch.nn.functional.linear_cross_entropy(hidden, head, targets, **each).float().sum()


def varlen_attention(query, key, value, seq_lens, cu_seq_lens, scale):
    """Return causal attention [1, T, H, D] inside each row: FlashAttention, of half precision.

    query [1, H, T, D], key and value [1, K, T, D]; cu_seq_lens [rows + 1], int32: the boundaries.
    """
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scale, "window_size": (-1, 0), "enable_gqa": True}  # (-1, 0): causal
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    bounds = (cu_seq_lens, cu_seq_lens, max(seq_lens), max(seq_lens))
    return varlen_attn(q, k, v, *bounds, **options)[None]


def adamw_8bit_class():
    """Return a subclass of torchao.optim.AdamW8bit; `seed` is that of its random rounding."""
    from torch.distributed.tensor import DTensor
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    class ExactAdamW8bit(AdamW8bit):
        def __init__(self, params, *, seed: int, **options):
            super().__init__(params, block_size=BLOCK, **options)
            self.seed = seed

        def _new_buffer(self, p, signed):
            # Norms and biases: p's own bf16 would keep a second moment from falling.
            if p.dim() < 2 or p.numel() < LEAST_8BIT or p.shape[-1] % BLOCK:
                return torch.zeros_like(p, dtype=torch.float32)
            local = p.to_local() if isinstance(p, DTensor) else p
            # Without p's dtype, which a view would lose: bf16 shards could not be stepped.
            state = OptimState8bit.zeros(local.shape, signed, BLOCK, local.device)
            if local is p:
                return state
            whole = {"shape": p.shape, "stride": p.stride(), "run_check": False}
            return DTensor.from_local(state, p.device_mesh, p.placements, **whole)

        def load_state_dict(self, state_dict):
            """Load state in its own dtype, not in p's; step and learning rate stay on the host.

            accelerate would move them to one GPU, out of reach of the others.
            """
            super().load_state_dict({**state_dict, "state": {}})
            for group, saved in zip(self.param_groups, state_dict["param_groups"]):
                group["lr"] = group["lr"].cpu()
                for p, name in zip(group["params"], saved["params"]):
                    for key, value in state_dict["state"].get(name, {}).items():
                        self.state[p][key] = value.cpu() if key == "step" else value.to(p.device)

        def step(self, closure=None):
            """Step; how it rounds depends on nothing but the seed and the number of the step."""
            devices = {p.device for group in self.param_groups for p in group["params"]}
            done = next((int(state["step"]) for state in self.state.values()), 0)
            with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
                torch.manual_seed(Random(f"{self.seed} {done}").getrandbits(63))
                return super().step(closure)

    return ExactAdamW8bit


def total_norm(tensors: list[torch.Tensor]) -> float:
    """Return the norm of all values of these tensors, of whole ones where they are shards."""
    norm = torch.nn.utils.get_total_norm(tensors)
    is_sharded = isinstance(norm, torch.distributed.tensor.DTensor)
    return (norm.full_tensor() if is_sharded else norm).item()


def check_compiler(device_type: str) -> None:
    """Raise UserError where the 8-bit optimizer could not be compiled, at its first step."""
    variable, names = ("CC", ["gcc", "clang"]) if device_type == "cuda" else ("CXX", ["g++"])
    names = [os.environ[variable]] if variable in os.environ else names
    header = sysconfig.get_path("include", "posix_prefix") + "/Python.h"
    compiler = f"{' or '.join(names)} ({variable} names another)"
    missing = [] if any(map(shutil.which, names)) else [compiler]
    missing += [] if os.path.exists(header) else [f"{header} (of python3-dev)"]
    if missing:
        sentence = "the 8-bit optimizer is compiled at its first step; install what is missing: "
        raise UserError(sentence + " and ".join(missing))
