"""Attention with the memory of a fused kernel, for devices for which PyTorch has none.

Without one, PyTorch multiplies queries and keys itself, and keeps all weights of attention.
"""

import contextlib
from unittest import mock

import torch
import torch.nn.functional as F

import sft_qwen2

attend_on_cpu = F.scaled_dot_product_attention


class FusedAttention(torch.autograd.Function):
    """Causal attention that keeps its inputs and its output, as FlashAttention does."""

    @staticmethod
    def forward(ctx, query, key, value, scale):
        on_cpu = [tensor.cpu() for tensor in (query, key, value)]
        output = attend_on_cpu(*on_cpu, is_causal=True, scale=scale, enable_gqa=True)
        output = output.to(query.device)
        ctx.save_for_backward(query, key, value, output)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _ = ctx.saved_tensors
        on_cpu = [tensor.detach().cpu().requires_grad_() for tensor in (query, key, value)]
        with torch.enable_grad():
            output = attend_on_cpu(*on_cpu, is_causal=True, scale=ctx.scale, enable_gqa=True)
        gradients = torch.autograd.grad(output, on_cpu, gradient.cpu())
        return *[each.to(gradient.device) for each in gradients], None


def attend_varlen(query, key, value, seq_lens, cu_seq_lens, scale) -> torch.Tensor:
    """Return attention [1, T, H, D] over a single example, as sft_qwen2.varlen_attention does."""
    assert len(seq_lens) == 1, "memory is that of any number of examples"
    return FusedAttention.apply(query, key, value, scale).transpose(1, 2)


def attend(query, key, value, *, is_causal, scale, enable_gqa) -> torch.Tensor:
    return FusedAttention.apply(query, key, value, scale)


@contextlib.contextmanager
def use_fused_kernels():
    """Let bf16 take the path of an A100, and the other formats that of a V100."""
    with (
        mock.patch.object(sft_qwen2, "has_varlen_kernel", lambda q: q.dtype == torch.bfloat16),
        mock.patch.object(sft_qwen2, "varlen_attention", attend_varlen),
        mock.patch.object(F, "scaled_dot_product_attention", attend),
    ):
        yield
