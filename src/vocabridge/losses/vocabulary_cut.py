"""The teacher's likeliest tokens of every row, and another distribution's logits at just these tokens.

Legend: N rows, V vocabulary, H hidden size, k kept tokens of a row, S their set.

For two distributions q and p over V with Q = q(S) and P = p(S), q_S the distribution q given S, q_R given the rest,

    KL(q || p) = KL((Q, 1 - Q) || (P, 1 - P)) + Q KL(q_S || p_S) + (1 - Q) KL(q_R || p_R)

A divergence over kept logits is that of q_S and p_S. Ignored are thus the first and the last summand, and the factor Q.
The gradient of KL(q_S || p_S) by p's tempered logits differs from that of KL(q || p) by at most 2 (1 - Q) + 2 (1 - P),
summed over V. Q is known, and reported as ``mass``; P would take the product that is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from vocabridge.losses.chunked_head import HeadInput, head_rows


@dataclass(frozen=True, slots=True, eq=False)
class TopTokens:
    """Constants of N rows."""

    ids: Tensor
    """``[N, k]`` the likeliest first."""
    logits: Tensor
    """``[N, k]`` float32 (float64 stays)."""
    mass: Tensor
    """``[N]`` probability of the k tokens together, at the temperature."""

    def places(self, ids: Tensor) -> Tensor:
        """``[N]`` where among its row's kept tokens each of ``ids [N]`` stands, or -1."""
        found = self.ids == ids.unsqueeze(-1)
        return torch.where(found.any(-1), found.int().argmax(-1), -1)


@torch.no_grad()
def top_tokens(head: HeadInput, num_tokens: int, *, temperature: float) -> TopTokens:
    """The ``num_tokens`` (at most V) likeliest tokens of every row, in one pass over the head."""
    ids: list[Tensor] = []

    def keep(logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> Tensor:
        kept = logits[0].topk(num_tokens, dim=-1)
        # Without a gradient each row passes here exactly once, in order, so integers may be put aside on the way.
        ids.append(kept.indices)
        mass = (kept.values / temperature).logsumexp(-1) - (logits[0] / temperature).logsumexp(-1)
        return torch.cat([kept.values, mass.exp().unsqueeze(-1)], dim=-1)

    found = head_rows(keep, [head])
    return TopTokens(torch.cat(ids), found[:, :-1], found[:, -1])


def logits_at(head: HeadInput, ids: Tensor) -> Tensor:
    """Logits ``[N, k]`` of each row's ``ids [N, k]``, float32 (float64 stays); only ``head.hidden`` gets a gradient.

    Costs k products of length H a row, in the head's dtype; neither ``[N, k, H]`` nor ``[N, V]`` exists.
    """
    weight = head.weight.detach()
    logits = _ProductsAt.apply(head.hidden.to(weight.dtype), weight, ids)
    logits = logits.to(torch.promote_types(weight.dtype, torch.float32))
    if head.bias is not None:
        logits = logits + head.bias.detach()[ids]
    logits = logits * head.logit_scale
    return logits if head.soft_cap is None else torch.tanh(logits / head.soft_cap) * head.soft_cap


class _ProductsAt(torch.autograd.Function):
    """``hidden [N, H], weight [V, H], ids [N, k] -> [N, k]``, the product of each row with its rows of the weight.

    ``embedding_bag`` is the transposed map, from factors ``[N, k]`` to weighted sums ``[N, H]``. So it gives the
    gradient by ``hidden``, and its own gradient by the factors gives the products: on CPU 5 to 10 times as fast as
    gathering ``[n, k, H]`` for a batched product, which writes and reads each row of the weight once more.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(weight, ids)
        with torch.enable_grad():
            factors = torch.zeros(ids.shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
            sums = embedding_bag(ids, weight, per_sample_weights=factors, mode="sum")
        (products,) = torch.autograd.grad(sums, factors, hidden.detach())
        return products

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        weight, ids = ctx.saved_tensors
        return embedding_bag(ids, weight, per_sample_weights=upstream.to(weight.dtype), mode="sum"), None, None
