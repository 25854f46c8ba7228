"""Relations among the chunks of an example: attention-like distributions, and how far two models' are apart.

Axis letters: B examples, R chunks of the longest example, F features of one model, A relation heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_BYTES = 2**28
_TENSORS = 6
"""``[R, R]`` tensors alive at once per head: scores, log-probabilities and gradients of both models."""


@dataclass(frozen=True, slots=True, eq=False)
class Relation:
    """Two vectors per chunk whose products say how chunks relate, such as queries and keys."""

    left: Tensor
    """``[B, R, F]``, any values on padding."""
    right: Tensor
    """``[B, R, F]``"""


def relation_divergence(
    student: Relation, teacher: Relation, counts: Tensor, *, num_heads: int, chunk_bytes: int = _CHUNK_BYTES
) -> Tensor:
    """Sum over examples and chunks i of KL(teacher || student) of softmax_(j <= i)(left_i . right_j / sqrt(F / A)).

    Each head works on its own F / A features; the KL is averaged over heads. The widths F of the two models may differ.

    Args:
        student: gets a gradient.
        teacher: constants.
        counts: ``[B]`` number of chunks of each example; those behind are padding.
        num_heads: A, a divisor of both widths.
        chunk_bytes: bound on the ``[R, R]`` tensors alive at once; they are computed again in the backward pass.

    Returns:
        Scalar in nats, in the dtype of the inputs.
    """
    sides = [_split_heads(states, num_heads) for states in (student.left, student.right, teacher.left, teacher.right)]
    lengths = counts.repeat_interleave(num_heads)
    num_chunks = sides[0].shape[1]
    step = max(1, chunk_bytes // (_TENSORS * sides[0].element_size() * max(1, num_chunks) ** 2))
    total = sides[0].new_zeros(())
    for start in range(0, len(lengths), step):
        parts = [side[start : start + step] for side in (*sides, lengths)]
        total = total + checkpoint(_divergence, *parts, use_reentrant=False, preserve_rng_state=False)
    return total / num_heads


def _split_heads(states: Tensor, num_heads: int) -> Tensor:
    """``[B, R, F] -> [B A, R, F / A]``."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2).flatten(0, 1)


def _divergence(
    student_left: Tensor, student_right: Tensor, teacher_left: Tensor, teacher_right: Tensor, lengths: Tensor
) -> Tensor:
    with torch.autocast(student_left.device.type, enabled=False):
        student = _log_relations(student_left, student_right)
        teacher = _log_relations(teacher_left, teacher_right)
        rows = (teacher.exp() * (teacher - student)).sum(-1)
    exists = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    return rows.masked_fill(~exists, 0.0).sum()


def _log_relations(left: Tensor, right: Tensor) -> Tensor:
    """``[n, R, R]`` log-probabilities; a chunk relates to itself and those before it, hence never to padding."""
    scores = left @ right.transpose(1, 2) * left.shape[-1] ** -0.5
    later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, torch.finfo(scores.dtype).min).log_softmax(-1)
