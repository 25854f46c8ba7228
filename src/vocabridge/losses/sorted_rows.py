"""Distance between two rows of probabilities over different vocabularies, compared rank by rank.

Legend: n rows, K_s / K_t entries of a student / teacher row.

With P_(k), Q_(k) the k-th largest entries of the two rows, the shorter row padded with zeros, the distance is
sum_k abs(P_(k) - Q_(k)): the optimal-transport cost between the two sets of values (ULD, arXiv 2402.12030, eq. 5).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
        top, order, theirs = _ranked(student, teacher, ranks)
        difference = top - theirs
        loss = difference.abs().sum(-1) + _rest(student, top) + _rest(teacher, theirs)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.ones_like(student).scatter_(-1, order, difference.sign_()))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (signs,) = ctx.saved_tensors
        return signs * upstream.unsqueeze(-1), None


def _ranked(student: Tensor, teacher: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` largest entries of the student's rows, where they are, and the teacher's, all in the same order."""
    if student.device.type != "cpu":
        return *student.topk(count, dim=-1), teacher.topk(count, dim=-1).values
    # NumPy's sorts take a third of the time of torch's, but a single core.
    parts = [np.array_split(side.numpy(), torch.get_num_threads()) for side in (student, teacher)]
    with ThreadPoolExecutor(len(parts[0])) as pool:
        ranked = pool.map(partial(_ranked_rows, count=count), *parts)
        top, order, theirs = (torch.from_numpy(np.concatenate(part)) for part in zip(*ranked, strict=True))
    return top, order, theirs


def _ranked_rows(student: np.ndarray, teacher: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:func:`_ranked` in ascending order."""
    if student.dtype != np.float32:
        order = np.argsort(student, axis=-1)[..., student.shape[-1] - count :]
        return np.take_along_axis(student, order, axis=-1), order, _ascending(teacher, count)
    # The bits of floats that are not negative are in the floats' order. Sorted as one number with the place behind,
    # they take a third less time than an argsort.
    keys = student.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(student.shape[-1], dtype=np.uint64)
    keys = _ascending(keys, count)
    places = keys & np.uint64(2**32 - 1)
    values = (keys >> np.uint64(32)).astype(np.uint32).view(np.float32)
    return values, places.view(np.int64), _ascending(teacher, count)


def _ascending(array: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` largest entries of every row."""
    rest = array.shape[-1] - count
    if count and rest:
        array = np.partition(array, rest, axis=-1)
    return np.sort(array[..., rest:], axis=-1)


def _rest(values: Tensor, largest: Tensor) -> Tensor:
    """Sum of the entries of every row that are not among its ``largest``."""
    if values.shape[-1] == largest.shape[-1]:
        return values.new_zeros(values.shape[:-1])
    return (values.sum(-1) - largest.sum(-1)).clamp_(min=0)
