"""Cross-entropy on every student position and a distillation loss on those that have a teacher row.

Legend: N supervised student positions, M teacher positions, n pairs, V_s / V_t vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vocabridge.losses.chunked_head import DEFAULT_CHUNK_BYTES, HeadInput, RowLosses, chunked_head_loss


@dataclass(frozen=True, slots=True, eq=False)
class PairedLoss:
    """Sums over a micro-batch."""

    total: Tensor
    """Scalar, differentiable: (1 - kd_weight) cross-entropy + kd_weight * weighted row losses."""
    cross_entropy: Tensor
    """Scalar, detached, over all N student positions, in nats."""
    right: Tensor
    """Scalar: student positions whose most likely token is the label."""
    sums: Tensor
    """``[K]``, detached: each row loss over the pairs, unweighted."""
    metrics: Tensor
    """``[K']``, detached: each metric over the pairs."""


def paired_rows_loss(
    student: HeadInput,
    labels: Tensor,
    teacher: HeadInput,
    *,
    student_index: Tensor,
    teacher_index: Tensor,
    row_losses: RowLosses,
    weights: Sequence[float],
    kd_weight: float,
    rows: Sequence[Tensor] = (),
    projected: Sequence[HeadInput] = (),
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> PairedLoss:
    """Apply each head once: to all student positions, and to the teacher positions that are paired.

    Args:
        student: all N positions.
        labels: ``[N]`` student ids.
        teacher: all M positions.
        student_index: ``[n]`` packed student position of each pair, each at most once.
        teacher_index: ``[n]`` packed teacher position of each pair; may repeat.
        row_losses: ``(logits ([n, V_s], [n, V_t], ...), rows [n, ...])``; the teacher's logits are constants.
        weights: factor of each row loss within the distillation part.
        kd_weight: share of the distillation part.
        rows: further tensors over the n pairs.
        projected: further hidden states of the n pairs with a head to read each; their logits follow the teacher's.
        chunk_bytes: see :func:`~vocabridge.losses.chunked_head.chunked_head_loss`.

    Returns:
        Sums; with zero pairs the distillation part is an exact 0 and gradients still have a path.
    """

    def cross_entropy_rows(logits: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        own = logits[0]
        return [cross_entropy(own, given[0], reduction="none")], [(own.detach().argmax(-1) == given[0]).float()]

    def both_rows(logits: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        reference, right = cross_entropy_rows(logits, given)
        losses, metrics = row_losses(logits, given[1:])
        return [*reference, *losses], [*right, *metrics]

    is_alone = torch.ones_like(labels, dtype=torch.bool).index_fill(0, student_index, False)
    alone = is_alone.nonzero().squeeze(1)
    rest = chunked_head_loss(
        cross_entropy_rows, [_at(student, alone)], [labels[alone]], weights=[1 - kd_weight], chunk_bytes=chunk_bytes
    )
    paired = chunked_head_loss(
        both_rows,
        [_at(student, student_index), replace(_at(teacher, teacher_index), train_head=False), *projected],
        [labels[student_index], *rows],
        weights=[1 - kd_weight, *(kd_weight * weight for weight in weights)],
        chunk_bytes=chunk_bytes,
    )
    return PairedLoss(
        total=rest.total + paired.total,
        cross_entropy=rest.sums[0] + paired.sums[0],
        right=rest.metrics[0] + paired.metrics[0],
        sums=paired.sums[1:],
        metrics=paired.metrics[1:],
    )


def _at(head: HeadInput, index: Tensor) -> HeadInput:
    return replace(head, hidden=head.hidden[index])
