"""The student's log-probabilities of some classes, and of all others together, without a copy of all its logits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdpipe.errors import ConfigError

_BLOCK_NUMBERS = 2**22
"""How many logits are widened, exponentiated and summed at a time: 16 MiB in float32."""


def bucket_log_probs(logits: Tensor, ids: Tensor, used: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at T of the classes `ids [B, ..., K]` where `used`, then of all others together.

    Logits `[B, ..., C]` -> `[B, ..., K + 1]` in float32 (float64 where the logits are); an unused place is -inf, and so
    is the last where no class is left. Used ids are unique. Of the size of the logits, only their gradient is made.
    """
    # An unused place may hold any id; here it holds a used one, so that it takes no class out of the rest.
    first_used = used.to(torch.uint8).argmax(dim=-1, keepdim=True)
    ids = torch.where(used, ids, ids.gather(-1, first_used))
    head, rest = _HeadAndRest.apply(logits, ids, temperature, True)  # type: ignore[no-untyped-call]
    buckets = torch.cat([head.masked_fill(~used, -torch.inf), rest.unsqueeze(-1)], dim=-1)
    return torch.log_softmax(buckets, dim=-1)


def log_probs_at(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities at T = 1 of the classes `ids [B, ..., K]`, which may repeat: `[B, ..., K]`, as above."""
    head, everything = _HeadAndRest.apply(logits, ids, 1.0, False)  # type: ignore[no-untyped-call]
    log_probs: Tensor = head - everything.unsqueeze(-1)
    return log_probs


class _HeadAndRest(torch.autograd.Function):
    """`z / T` at ids `[B, ..., K]`, and the logsumexp of `z / T` over the rest `[B, ...]`: all other classes, or all.

    Both less the rest's largest `z / T`, so that large logits keep their digits. The rest is never `log(1 - Q)`: it is
    finite however small or large Q is. Backward computes the exponentials anew, and has no derivative of its own.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float, without_ids: bool) -> tuple[Tensor, Tensor]:
        wide, ids = torch.promote_types(logits.dtype, torch.float32), ids.contiguous()
        rest = torch.empty(logits.shape[:-1], dtype=wide, device=logits.device)
        head, top = logits.gather(-1, ids).to(wide), torch.empty_like(rest)
        for z, those, of_head, into, above in _blocks(logits, ids, head, rest, top):
            block = z.to(wide, copy=True)
            if without_ids:
                block.scatter_(-1, those, -torch.inf)
            largest = block.amax(dim=-1, keepdim=True)
            largest = torch.where(torch.isneginf(largest), of_head.amax(dim=-1, keepdim=True), largest)
            largest = torch.where(torch.isneginf(largest), 0.0, largest)
            mass = block.sub_(largest).div_(temperature).exp_().sum(dim=-1)
            into.copy_(mass.log_())
            above.copy_(largest.squeeze(-1))
        ctx.temperature, ctx.without_ids = temperature, without_ids
        ctx.save_for_backward(logits, ids, rest, top)
        return (head - top.unsqueeze(-1)) / temperature, rest

    @staticmethod
    def backward(ctx: Any, of_head: Tensor, of_rest: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise ConfigError(
                "a loss on topk or sampled targets has no second derivative, which create_graph=True asks for; leave "
                "it out, or cache with encoding: dense"
            )
        logits, ids, rest, top = ctx.saved_tensors
        nothing = torch.isneginf(rest)
        of_head, of_rest = (
            each.contiguous() / ctx.temperature for each in (of_head, of_rest.masked_fill(nothing, 0.0))
        )
        rest = rest.masked_fill(nothing, 0.0)
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for z, those, g_head, g_rest, log_mass, above, into in _blocks(
            logits, ids, of_head, of_rest, rest, top, gradient
        ):
            block = into.copy_(z) if into.dtype == rest.dtype else z.to(rest.dtype)
            if ctx.without_ids:
                block.scatter_(-1, those, -torch.inf)
            block.sub_(above.unsqueeze(-1))
            share = torch.add(-log_mass.unsqueeze(-1), block, alpha=1 / ctx.temperature, out=block).exp_()
            share.mul_(g_rest.unsqueeze(-1)).scatter_add_(-1, those, g_head)
            if share is not into:
                into.copy_(share)
        return gradient, None, None, None


def _blocks(logits: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few rows of all of them at a time; the logits are the first, `[B, ..., C]`."""
    leading = logits.dim() - 1
    everything = (logits, *beside)
    if all(each.is_contiguous() for each in everything):
        everything = tuple(each.view(-1, *each.shape[leading:]) for each in everything)
    shape = everything[0].shape
    rows, step = shape[-2], max(1, _BLOCK_NUMBERS // shape[-1])
    for place in itertools.product(*map(range, shape[:-2])):
        for start in range(0, rows, step):
            part: tuple[int | slice, ...] = (*place, slice(start, start + step))
            yield tuple(each[part] for each in everything)
