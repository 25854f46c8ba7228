"""Cross-entropy on the reference, for objectives whose distillation part reads no logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vocabridge.losses.chunked_head import chunked_head_loss
from vocabridge.losses.paired_rows import reference_rows
from vocabridge.models.forward import SideForward
from vocabridge.objectives.base import Ratio, head_input


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceLoss:
    """Sums over a micro-batch."""

    total: Tensor
    """Scalar, differentiable, weighted."""
    metrics: Mapping[str, Ratio]


def reference_loss(student: SideForward, weight: float) -> ReferenceLoss:
    """``weight`` times the cross-entropy of all supervised student positions; the head is applied once.

    With weight 0 (a term of a composition) the head is not applied, and there is nothing to log.
    """
    if weight == 0:
        return ReferenceLoss(student.hidden_states.sum() * 0.0, {})

    count = student.labels.shape[0]
    result = chunked_head_loss(reference_rows, [head_input(student)], [student.labels], weights=[weight])
    metrics = {"cross_entropy": Ratio(result.sums[0], count), "student_accuracy": Ratio(result.metrics[0], count)}
    return ReferenceLoss(result.total, metrics)
