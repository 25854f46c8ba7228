"""Probabilities at the few columns that hold most of an example's mass, without logits of all tokens.

Legend: B examples, N packed positions, R positions of the longest example, H hidden size, V vocabulary, k columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vocabridge.losses.chunked_head import HeadInput, head_rows
from vocabridge.losses.cross_attention import Padding

STD_FLOOR = 1e-4
"""Added to a row's standard deviation before dividing by it, as MultiLevelOT's code does."""


def normalizers(logits: Tensor, *, standardize: bool) -> Tensor:
    """``[n, 2]`` factor on the logits of every row, and the log of the sum of exp(factor * logits).

    The factor is 1, or 1 / (standard deviation of the row + 1e-4); centring would change no probability.
    """
    if not standardize:
        return torch.stack([logits.new_ones(logits.shape[0]), logits.logsumexp(-1)], dim=1)
    # Three times as fast on CPU as torch.std.
    deviations = torch.linalg.vector_norm(logits - logits.mean(-1, keepdim=True), dim=-1)
    factor = 1 / (deviations / math.sqrt(logits.shape[1] - 1) + STD_FLOOR)
    return torch.stack([factor, (logits * factor[:, None]).logsumexp(-1)], dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class ExampleMass:
    """Constants of one side of a micro-batch."""

    columns: Tensor
    """``[B, k]`` the columns with the largest probability summed over an example's positions, largest first."""
    normalizers: Tensor
    """``[N, 2]``, see :func:`normalizers`."""


@torch.no_grad()
def example_mass(
    head: HeadInput, rows: Tensor, *, num_examples: int, num_columns: int, standardize: bool
) -> ExampleMass:
    """Find each example's heaviest columns in one pass over the head.

    Args:
        head: all N positions.
        rows: ``[N]`` example of each position.
        num_examples: B.
        num_columns: k, at most V.
        standardize: see :func:`normalizers`.
    """
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    mass = torch.zeros(num_examples, head.weight.shape[0], dtype=dtype, device=head.weight.device)

    def add_mass(logits: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> Tensor:
        found = normalizers(logits[0], standardize=standardize)
        # Without a gradient each row passes here exactly once, so it may be counted on the way.
        mass.index_add_(0, given[0], (logits[0] * found[:, :1] - found[:, 1:]).exp_())
        return found

    found = head_rows(add_mass, [head], [rows])
    return ExampleMass(mass.topk(num_columns, dim=-1).indices, found)


def column_log_probs(head: HeadInput, normalizers: Tensor, columns: Tensor, padding: Padding) -> Tensor:
    """Log-probability ``[N, k]`` of each example's columns at its positions, differentiable in all but the columns.

    Args:
        head: all N positions.
        normalizers: ``[N, 2]`` of the same positions.
        columns: ``[B, k]``.
        padding: layout of the positions.
    """
    weight = head.weight[columns]  # [B, k, H]
    product = torch.bmm(padding.pad(head.hidden).to(weight.dtype), weight.transpose(1, 2))  # [B, R, k]
    logits = padding.pack(product if head.bias is None else product + head.bias[columns][:, None])
    logits = logits.to(normalizers.dtype) * head.logit_scale
    if head.soft_cap is not None:
        logits = torch.tanh(logits / head.soft_cap) * head.soft_cap
    return logits * normalizers[:, :1] - normalizers[:, 1:]
