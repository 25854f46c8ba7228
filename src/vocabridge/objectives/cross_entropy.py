"""Cross-entropy on the reference response: supervised fine-tuning (SFT).

L = -sum_i log softmax(z_i)[y_i] over supervised student positions.

The baseline of every comparison, the first stage of the paper (fine-tuning the teacher on the task) and the second
half of sequence-level distillation. Needs no teacher. Unlike the published code it never replaces non-finite logits.
"""

from __future__ import annotations

from typing import ClassVar

from vocabridge.losses.chunked_head import chunked_head_loss
from vocabridge.losses.paired_rows import reference_rows
from vocabridge.objectives.base import ForwardPair, LossTerm, Objective, Ratio, head_input
from vocabridge.objectives.config import ObjectiveConfig
from vocabridge.pairs import PairBatch


class Config(ObjectiveConfig):
    """Cross-entropy has no settings of its own."""

    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    use_when: ClassVar[str] = "fine-tuning a teacher on the task, and as the baseline that distillation must beat"


class CrossEntropy(Objective):
    """Next-token cross-entropy of the student on the reference response."""

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``cross_entropy``, in nats per supervised student token."""
        student = pair.student
        count = student.labels.shape[0]
        result = chunked_head_loss(reference_rows, [head_input(student)], [student.labels], weights=[1.0])
        metrics = {"student_accuracy": Ratio(result.metrics[0], count), "coverage": Ratio(count, count)}
        return {"cross_entropy": LossTerm(result.total, count, metrics=metrics)}
