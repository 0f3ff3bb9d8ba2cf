"""What the trainer calls and PyTorch 2.11 lacks, for machines to measure on that have no newer one.

    import torch_2_11  # before sft_qwen2

The trainer itself wants the version in requirements.txt, where this module changes nothing.
"""

from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy

CHUNK = 1024  # positions whose logits exist at once


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the cross entropies of rows [N, D] @ head [V, D].T and targets [N], in fp32."""

    @staticmethod
    def logits(rows, head):  # in fp32, not rounded to the dtype of the factors
        if rows.is_cuda and rows.dtype != torch.float32:
            return torch.mm(rows, head.T, out_dtype=torch.float32)
        return rows.float() @ head.float().T

    @staticmethod
    def forward(ctx, hidden, head, targets):
        ctx.save_for_backward(hidden, head, targets)
        loss = torch.zeros((), device=hidden.device)
        for rows, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK)):
            loss += cross_entropy(ChunkedCrossEntropy.logits(rows, head), wanted, reduction="sum")
        return loss

    @staticmethod
    def backward(ctx, grad):
        hidden, head, targets = ctx.saved_tensors
        hidden_grad, head_grad = torch.empty_like(hidden), torch.zeros_like(head)
        chunks = (x.split(CHUNK) for x in (hidden, targets, hidden_grad))
        for rows, wanted, rows_grad in zip(*chunks):
            logits = ChunkedCrossEntropy.logits(rows, head)
            logits.sub_(logits.logsumexp(-1, keepdim=True)).exp_()  # now a softmax, in place
            logits[torch.arange(len(rows), device=rows.device), wanted] -= 1
            logits_grad = logits.mul_(grad).to(head.dtype)  # fp16: with the loss scale in it
            torch.mm(logits_grad, head, out=rows_grad)
            head_grad.addmm_(logits_grad.T, rows)
        return hidden_grad, head_grad, None


def summed_cross_entropy(hidden, head, targets, *, reduction, options):
    """Return the sum of what linear_cross_entropy returns; the caller adds that up."""
    return ChunkedCrossEntropy.apply(hidden, head, targets)


def repeat_keys(varlen_attn):
    """Return varlen_attn with enable_gqa: a key and value [T, K, D] for each query head."""

    def attention(query, key, value, *bounds, enable_gqa, **options):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return varlen_attn(query, key, value, *bounds, **options)

    return attention


def install() -> None:
    from torch.nn.attention import varlen

    torch.nn.functional.linear_cross_entropy = summed_cross_entropy
    torch.nn.LinearCrossEntropyOptions = SimpleNamespace
    varlen.varlen_attn = repeat_keys(varlen.varlen_attn)


if not hasattr(torch.nn.functional, "linear_cross_entropy"):
    install()
