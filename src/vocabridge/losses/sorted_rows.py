"""Distance between two rows of probabilities over different vocabularies, compared rank by rank.

Legend: n rows, K_s / K_t entries of a student / teacher row.

With P_(k), Q_(k) the k-th largest entries of the two rows, the shorter row padded with zeros, the distance is
sum_k abs(P_(k) - Q_(k)): the optimal-transport cost between the two sets of values (ULD, arXiv 2402.12030, eq. 5).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """``logits / temperature``, without a copy at temperature 1."""
    return logits if temperature == 1.0 else logits / temperature


def sorted_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Rank-by-rank L1 distance of every row; the gradient reaches the student only.

    The derivative by a student's entry is the sign of its difference to the teacher's entry of the same rank, 0 where
    both are equal. Entries beyond the length of the shorter row meet zeros, so only their sum counts and they are not
    sorted.

    Args:
        student: ``[n, K_s]``, not negative; rows need not sum to 1.
        teacher: ``[n, K_t]``, not negative.

    Returns:
        ``[n]`` in the student's dtype.
    """
    distance: Tensor = _SortedL1.apply(student, teacher.detach())
    return distance


class _SortedL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ranks = min(student.shape[-1], teacher.shape[-1])
        top, order = _ranked(student, ranks)
        difference = top - _largest(teacher, ranks)
        loss = difference.abs().sum(-1) + _rest(student, top) + _rest(teacher, top - difference)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.ones_like(student).scatter_(-1, order, difference.sign_()))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (signs,) = ctx.saved_tensors
        return signs * upstream.unsqueeze(-1), None


def _ranked(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest entries of every row, descending, and where they are."""
    if values.device.type != "cpu":
        return values.topk(count, dim=-1) if count < values.shape[-1] else values.sort(dim=-1, descending=True)
    # NumPy's sort takes a third of the time of torch's.
    array = values.numpy()
    if 0 < count < array.shape[-1]:
        kept = np.argpartition(array, -count, axis=-1)[..., array.shape[-1] - count :]
        ascending = np.take_along_axis(kept, np.argsort(np.take_along_axis(array, kept, axis=-1), axis=-1), axis=-1)
    else:
        ascending = np.argsort(array, axis=-1)[..., array.shape[-1] - count :]
    order = torch.from_numpy(ascending).flip(-1)
    return values.gather(-1, order), order


def _largest(values: Tensor, count: int) -> Tensor:
    """The ``count`` largest entries of every row, descending."""
    if values.device.type != "cpu":
        return values.topk(count, dim=-1).values
    # Without the indices that torch also sorts: 3 ms instead of 12 for 49k of 262k entries on one core.
    array = values.numpy()
    if 0 < count < array.shape[-1]:
        array = np.partition(array, -count, axis=-1)
    return torch.from_numpy(np.sort(array[..., array.shape[-1] - count :], axis=-1)).flip(-1)


def _rest(values: Tensor, largest: Tensor) -> Tensor:
    """Sum of the entries of every row that are not among its ``largest``."""
    if values.shape[-1] == largest.shape[-1]:
        return values.new_zeros(values.shape[:-1])
    return (values.sum(-1) - largest.sum(-1)).clamp_(min=0)
