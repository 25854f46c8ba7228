"""MultiLevelOT: transport between tokens' heaviest probabilities, token by token and over whole sequences.

Cui et al. 2025, "Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge Distillation on Language
Models", AAAI 2025, arXiv 2412.14528. Each side's rows are softmax(z), or softmax(z / (std(z) + 1e-4)). On each side the
k = ``top_k`` columns with the largest mass over the example's positions are kept, heaviest first, so that column c of
the student meets column c of the teacher; p_i, q_j are the rows' probabilities there. Over pairs (i, j) of rows of an
example, and with S the debiased Sinkhorn divergence between all its rows under the cost |p_i - q_j|_1:

    holistic   = sum_(i, j) |p_i - q_j|_1
    sequential = sum_(i, j) sum_c q_jc log(q_jc / p_ic) - q_jc + p_ic
    sinkhorn   = (student positions) * S({p_i}, {q_j})
    L = (1 - kd_weight) CE + kd_weight [holistic + sequential_weight sequential + sinkhorn_weight sinkhorn]

What we do differently, and why:
- ``normalize: none`` (default). The published ``std`` acts as a temperature of several units on a large vocabulary: on
  the pair of the quick start the 50 heaviest columns keep 0.4 % of the teacher's mass, so there is next to nothing to
  transport (``teacher_top_mass`` in the log).
- Columns are ordered within each example (published: over the micro-batch, so that the loss of an example depends on
  its neighbours and on accumulation).
- ``alignment: chunks`` (default) pairs the first rows of every byte-exact chunk; ``index``, the published form, the
  k-th rows.
- ``sequential`` has the teacher as the target (in the published code the student is) and probabilities as they are
  (published: a softmax of probabilities, nearly uniform). It is the cross-entropy -sum q log p less its minimum; the
  last two summands make agreement that minimum although only k columns are summed.
- ``sinkhorn`` runs in the log domain on the probabilities themselves. Dropped: the published second softmax, which
  makes all rows nearly equal, and the factor 0.001. The entropic cost of a sequence to itself is taken off, for without
  that two models that agree would be pushed to blur their rows. The regularisation is a share of the mean cost.
- Sums over the pairs or student positions, divided by the student tokens of the whole step. The published weights are
  CE + 1.5 [...] with means.
- Nothing is written into the models' logits.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from vocabridge.losses.chunk_merge import generalised_kl
from vocabridge.losses.chunked_head import head_rows
from vocabridge.losses.cross_attention import Padding
from vocabridge.losses.top_columns import column_log_probs, example_mass, normalizers
from vocabridge.losses.transport import manhattan_distances, sinkhorn_divergence
from vocabridge.models.forward import SideForward
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
from vocabridge.objectives.config import Cost, KdConfig
from vocabridge.pairs import PairBatch


class Config(KdConfig):
    """Settings of MultiLevelOT; the paper's values except for the normalisation."""

    paper: ClassVar[str] = "MultiLevelOT, AAAI 2025, arXiv 2412.14528"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "chunks")
    cost: ClassVar[Cost] = "both heads twice"
    use_when: ClassVar[str] = "as a baseline that needs no map between the vocabularies and looks at whole sequences"

    alignment: Literal["chunks", "index"] = "chunks"
    """Rows that are paired: the first ones of every byte-exact chunk, or the k-th ones of both sides (published)."""
    normalize: Literal["none", "std"] = "none"
    """Leave each row of logits as it is, or divide it by its standard deviation (published), a flat distribution."""
    top_k: int = Field(50, ge=1)
    """Columns kept on either side."""
    sequential_weight: float = Field(0.1, ge=0)
    """Weight of the logarithmic cost, relative to the absolute one."""
    sinkhorn_weight: float = Field(0.1, ge=0)
    """Weight of the sequence-level term, relative to the token-level absolute one."""
    sinkhorn_regularization: float = Field(0.1, gt=0)
    """Of the transport, as a share of the example's mean cost."""
    sinkhorn_iterations: int = Field(20, ge=1)
    """Updates of the transport's potentials."""


class MultiLevelOt(Objective):
    """Token-level and sequence-level transport between the heaviest columns, beside cross-entropy."""

    config: Config

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``multilevel_ot``; distances of rows are at most 2, the rest is in nats."""
        student, teacher, config = pair.student, require_teacher(pair), self.config
        num_examples = batch["input_ids"].shape[0]
        own = head_rows(self._student_rows, [head_input(student)], [student.labels])  # [N, 4]
        student_logs, teacher_logs = self._column_logs(student, teacher, own[:, 2:], num_examples)
        pairs = row_pairs(config.alignment, student, teacher, batch)
        first, second = student_logs[pairs.student], teacher_logs[pairs.teacher]
        holistic = (first.exp() - second.exp()).abs().sum()
        sequential = generalised_kl(first, second).sum()
        sinkhorn = self._sinkhorn(
            student_logs.exp(),
            teacher_logs.exp(),
            Padding.of(student.rows, num_examples),
            Padding.of(teacher.rows, num_examples),
        )
        reference = own[:, 0].sum()
        transport = holistic + config.sequential_weight * sequential + config.sinkhorn_weight * sinkhorn
        total = (1 - config.kd_weight) * reference + config.kd_weight * transport
        count = student.labels.shape[0]
        metrics = {
            "cross_entropy": Ratio(reference.detach(), count),
            "student_accuracy": Ratio(own[:, 1].detach().sum(), count),
            "holistic_distance": Ratio(holistic.detach(), pairs.count),
            "sequential_divergence": Ratio(sequential.detach(), pairs.count),
            "sinkhorn_divergence": Ratio(sinkhorn.detach(), count),
            "teacher_top_mass": Ratio(second.exp().sum(), pairs.count),
            "coverage": coverage_ratio("multilevel_ot", pairs.count, count),
        }
        return {"multilevel_ot": LossTerm(total, count, metrics=metrics)}

    def _student_rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> Tensor:
        """``[n, 4]`` cross-entropy, whether the label comes first, and the row's normalizers."""
        (student,), (labels,) = logits, rows
        reference = cross_entropy(student, labels, reduction="none")
        right = (student.detach().argmax(-1) == labels).to(reference.dtype)
        own = normalizers(student, standardize=self.config.normalize == "std")
        return torch.cat([reference[:, None], right[:, None], own], dim=1)

    def _column_logs(
        self, student: SideForward, teacher: SideForward, student_normalizers: Tensor, num_examples: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[N, k]`` and ``[M, k]`` at the heaviest columns of each example; the latter constant."""
        num_columns = min(self.config.top_k, student.head.weight.shape[0], teacher.head.weight.shape[0])
        mass = [
            example_mass(
                head_input(side),
                side.rows,
                num_examples=num_examples,
                num_columns=num_columns,
                standardize=self.config.normalize == "std",
            )
            for side in (student, teacher)
        ]
        own = column_log_probs(
            head_input(student), student_normalizers, mass[0].columns, Padding.of(student.rows, num_examples)
        )
        theirs = column_log_probs(
            head_input(teacher), mass[1].normalizers, mass[1].columns, Padding.of(teacher.rows, num_examples)
        )
        return own, theirs.detach()

    def _sinkhorn(self, student: Tensor, teacher: Tensor, own: Padding, theirs: Padding) -> Tensor:
        """Scalar: divergence between the rows of each example that has both sides, times its student positions."""
        both = (own.mask.any(1) & theirs.mask.any(1)).nonzero().squeeze(1)
        if not both.shape[0]:
            return student.sum() * 0
        result = sinkhorn_divergence(
            own.pad(student)[both],
            theirs.pad(teacher)[both],
            x_mask=own.mask[both],
            y_mask=theirs.mask[both],
            regularization=self.config.sinkhorn_regularization,
            iterations=self.config.sinkhorn_iterations,
            distances=manhattan_distances,
        )
        return (result.divergence * own.mask[both].sum(1)).sum()
