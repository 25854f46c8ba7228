"""Universal logit distillation (ULD): probabilities compared rank by rank, whatever they stand for.

Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", TMLR 2025,
arXiv 2402.12030, eq. 5. With p_i, q_j the student's and the teacher's distributions at paired rows, both sorted in
descending order and the shorter one padded with zeros:

    uld = sum over pairs (i, j) of sum_k abs(p_i(k) - q_j(k))
    L = (1 - kd_weight) CE + kd_weight uld

It needs the teacher's rows and no vocabulary map. It cannot tell one token from another: any permutation of the
student's vocabulary has the same loss.

What we do differently, and why:
- ``alignment: chunks`` (default) pairs the first rows of every byte-exact chunk, where both models have read the same
  text; ``index`` is the published pairing of the k-th rows, which drifts apart at the first word that the two
  tokenizers cut differently.
- A sum over pairs divided by the student tokens of the whole step, not a mean over each micro-batch: gradients do not
  depend on accumulation. The published weights are CE + 1.5 uld, with a mean over the pairs.
- Nothing is written into the models' logits, and a row without a response is simply empty (published code: in-place
  softmax and rotation, IndexError).
- Kept, because it belongs to the formula: where all of the student's values lie above the teacher's values of the same
  rank (a large teacher vocabulary and two flat distributions), their differences sum to a constant and the gradient is
  exactly zero. An untrained student therefore learns nothing from it; the cross-entropy gets it going.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from vocabridge.losses.paired_rows import paired_rows_loss
from vocabridge.losses.sorted_rows import sorted_l1, tempered
from vocabridge.objectives._row_pairs import row_pairs
from vocabridge.objectives.base import (
    ForwardPair,
    LossTerm,
    Objective,
    Ratio,
    coverage_ratio,
    head_input,
    require_teacher,
)
from vocabridge.objectives.config import KdConfig
from vocabridge.pairs import PairBatch


class Config(KdConfig):
    """Settings of universal logit distillation."""

    paper: ClassVar[str] = "Universal Logit Distillation, TMLR 2025, arXiv 2402.12030"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "chunks")
    use_when: ClassVar[str] = "as the baseline that needs no map between the vocabularies"

    alignment: Literal["chunks", "index"] = "chunks"
    """Rows that are paired: the first ones of every byte-exact chunk, or the k-th ones of both sides (published)."""
    temperature: float = Field(1.0, gt=0)
    """Divides both sides' logits."""


class UniversalLogitDistillation(Objective):
    """Sorted-probability L1 between paired rows, beside cross-entropy."""

    config: Config

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``uld``: cross-entropy in nats and the L1 distance, at most 2 a pair."""
        student, teacher = pair.student, require_teacher(pair)
        pairs = row_pairs(self.config.alignment, student, teacher, batch)
        loss = paired_rows_loss(
            head_input(student),
            student.labels,
            head_input(teacher),
            student_index=pairs.student,
            teacher_index=pairs.teacher,
            row_losses=self._rows,
            weights=[1.0],
            kd_weight=self.config.kd_weight,
        )
        count, num_pairs = student.labels.shape[0], pairs.student.shape[0]
        metrics = {
            **loss.reference,
            "uld_distance": Ratio(loss.sums[0], num_pairs),
            "coverage": coverage_ratio("uld", num_pairs, count),
        }
        return {"uld": LossTerm(loss.total, count, metrics=metrics)}

    def _rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        student, teacher = (tempered(side, self.config.temperature).softmax(-1) for side in logits)
        return [sorted_l1(student, teacher)], []
