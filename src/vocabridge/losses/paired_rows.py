"""Cross-entropy on every student position and a distillation loss on those that have a teacher row.

Legend: N supervised student positions, M teacher positions, n pairs, V_s / V_t vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vocabridge.losses.chunked_head import DEFAULT_CHUNK_BYTES, ChunkedLoss, HeadInput, RowLosses, chunked_head_loss
from vocabridge.losses.terms import Ratio


@dataclass(frozen=True, slots=True, eq=False)
class PairedLoss:
    """Sums over a micro-batch."""

    total: Tensor
    """Scalar, differentiable: (1 - kd_weight) cross-entropy + kd_weight * weighted row losses."""
    reference: Mapping[str, Ratio]
    """For the log: ``cross_entropy`` in nats and ``student_accuracy`` over all N student positions.

    Empty where cross-entropy has no weight (a term of a composition): positions outside then cost nothing.
    """
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
    unpaired: Tensor | None = None,
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
        unpaired: ``[N - n, 2]`` loss and metric of :func:`reference_rows` at the other student positions, in order,
            where the caller has them; else the head is applied to these positions here.
        chunk_bytes: see :func:`~vocabridge.losses.chunked_head.chunked_head_loss`.

    Returns:
        Sums; with zero pairs the distillation part is an exact 0 and gradients still have a path.
    """

    def both_rows(logits: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        reference, right = reference_rows(logits, given)
        losses, metrics = row_losses(logits, given[1:])
        return [*reference, *losses], [*right, *metrics]

    is_paired = torch.zeros_like(labels, dtype=torch.bool).index_fill(0, student_index, True)
    paired = chunked_head_loss(
        both_rows,
        [head_at(student, student_index), replace(head_at(teacher, teacher_index), train_head=False), *projected],
        [labels[student_index], *rows],
        weights=[1 - kd_weight, *(kd_weight * weight for weight in weights)],
        chunk_bytes=chunk_bytes,
    )
    return with_unpaired(
        paired,
        student,
        labels,
        is_paired=is_paired,
        kd_weight=kd_weight,
        unpaired_rows=unpaired,
        chunk_bytes=chunk_bytes,
    )


def with_unpaired(
    paired: ChunkedLoss,
    student: HeadInput,
    labels: Tensor,
    *,
    is_paired: Tensor,
    kd_weight: float,
    unpaired_rows: Tensor | None = None,
    chunk_bytes: int,
) -> PairedLoss:
    """Join the loss of paired positions with the cross-entropy of the other ones.

    Args:
        paired: its first loss and metric are those of :func:`reference_rows`.
        student: all N positions.
        labels: ``[N]`` student ids.
        is_paired: ``[N]`` bool, the positions in ``paired``.
        kd_weight: share of the distillation part.
        unpaired_rows: ``[N - n, 2]`` loss and metric of :func:`reference_rows` at the other positions, if known.
        chunk_bytes: see :func:`~vocabridge.losses.chunked_head.chunked_head_loss`.
    """
    if kd_weight == 1:
        return PairedLoss(paired.total, {}, paired.sums[1:], paired.metrics[1:])
    total, cross_entropy_sum, right = paired.total, paired.sums[0], paired.metrics[0]
    unpaired = (~is_paired).nonzero().squeeze(1)
    if len(unpaired):  # else a second gradient of the whole head, all zeros: 0.5 GiB for 152k tokens of width 896
        if unpaired_rows is None:
            rest = chunked_head_loss(
                reference_rows,
                [head_at(student, unpaired)],
                [labels[unpaired]],
                weights=[1 - kd_weight],
                chunk_bytes=chunk_bytes,
            )
        else:
            sums = unpaired_rows.sum(0)
            rest = ChunkedLoss((1 - kd_weight) * sums[0], sums[:1].detach(), sums[1:].detach())
        total, cross_entropy_sum, right = total + rest.total, cross_entropy_sum + rest.sums[0], right + rest.metrics[0]
    count = labels.shape[0]
    reference = {"cross_entropy": Ratio(cross_entropy_sum, count), "student_accuracy": Ratio(right, count)}
    return PairedLoss(total, reference, paired.sums[1:], paired.metrics[1:])


def reference_rows(logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Cross-entropy of the first logits ``[n, V_s]`` on the first rows, labels ``[n]``; metric: it is the top."""
    student, labels = logits[0], rows[0]
    return [cross_entropy(student, labels, reduction="none")], [(student.detach().argmax(-1) == labels).float()]


def head_at(head: HeadInput, index: Tensor) -> HeadInput:
    """The head with the hidden states of some positions."""
    return replace(head, hidden=head.hidden[index])
