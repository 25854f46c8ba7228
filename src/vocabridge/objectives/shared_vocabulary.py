"""Distillation over the tokens that both vocabularies have, where both tokenizers cut the text alike (SimpleCTKD).

SimpleCTKD of the KDFlow framework (released code, 2025-2026). The same strict one-to-one form on the student's own
samples is the best of six cross-tokenizer methods in arXiv 2610.08448, section on reliability against coverage: it
covers 86 to 97 % of positions, the shared vocabulary holds 99.7 % of the teacher's mass, and adding losses on the
remaining spans makes every result worse.

O is the set of shared tokens (equal bytes, and the two end tokens by role), (i, j) a student and a teacher position
that predict the same token after the same bytes, z and z' logits, y labels, T the temperature, D a divergence:

    L = (1 - kd_weight) sum_i CE(z_i, y_i) + kd_weight sum_(i, j) D(softmax(z'_j[O] / T), softmax(z_i[O] / T))

``rest: ignore`` (published) renormalises both sides on O, so the student learns nothing of the mass that the teacher
gives to other tokens. ``rest: bucket`` adds one column on both sides that holds the whole mass outside O.

Needs both tokenizers. Costs the student's head on all positions and the teacher's on the paired ones, which with
``ignore`` has only the rows of O (46,146 of Gemma 3's 262,144 for a SmolLM2 student): its logits are ``[n, |O|]``, from
one copy ``[|O|, D]`` of those rows a step.

What we do differently, and why:
- Every example is aligned by itself. The released code walks over the flattened micro-batch, where the first mismatch
  loses all that follows, so little more than the first example is aligned.
- Tokens are compared by bytes, not by strings with normalised markers, which read a byte-fallback or a byte-level
  character as another token.
- ``jsd_beta`` is the teacher's share in the mixture, as in GKD; in the released code it is the student's.
- Sums are divided by the student's tokens of the whole step, so that gradient accumulation is exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vocabridge.errors import UserError
from vocabridge.losses.chunked_head import HeadInput
from vocabridge.losses.paired_rows import paired_rows_loss
from vocabridge.models.forward import SideForward
from vocabridge.objectives._columns import byte_keys, shared_columns, take_columns
from vocabridge.objectives._divergence import row_divergence
from vocabridge.objectives._row_pairs import same_token_pairs
from vocabridge.objectives.base import (
    ForwardPair,
    LossTerm,
    Objective,
    ObjectiveSetup,
    Ratio,
    coverage_ratio,
    head_input,
    require_teacher,
)
from vocabridge.objectives.config import Cost, DivergenceConfig
from vocabridge.pairs import PairBatch


class Config(DivergenceConfig):
    """Settings of distillation over the shared vocabulary; the defaults are the published ones."""

    paper: ClassVar[str] = "SimpleCTKD (KDFlow); strict one-to-one form: arXiv 2610.08448"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "tokenizers", "chunks")
    cost: ClassVar[Cost] = "both heads"
    use_when: ClassVar[str] = (
        "the tokenizers differ but cut most of the text alike; nothing to train beside the student"
    )

    temperature: float = Field(1.0, gt=0)
    """Of the divergence; cross-entropy runs at 1."""
    rest: Literal["ignore", "bucket"] = "ignore"
    """Mass outside the shared vocabulary: renormalised away on both sides, or compared as one further token."""


class SharedVocabularyKd(Objective):
    """Divergence over shared tokens at positions that both tokenizers have."""

    config: Config
    student_columns: Tensor
    teacher_columns: Tensor
    student_keys: Tensor
    teacher_keys: Tensor

    def __init__(self, config: Config, setup: ObjectiveSetup):
        super().__init__(config, setup)
        columns = shared_columns(setup)
        if len(columns.student) == 1:
            raise UserError(
                "objective shared_vocabulary: the two vocabularies share no token but the end token; use an objective "
                "that needs no common tokens, such as dskd_cma."
            )
        assert setup.teacher_head is not None
        sizes = (len(setup.student_head.weight), len(setup.teacher_head.weight))
        if config.rest == "bucket" and len(columns.student) in sizes:
            side = "student" if len(columns.student) == sizes[0] else "teacher"
            # Its bucket has probability 0, so that a divergence from the other side's is infinite.
            raise UserError(
                f"objective shared_vocabulary: every token of the {side} is shared, so there is no rest to compare; "
                "use rest: ignore."
            )
        # All follow from the tokenizers, so they are not saved.
        self.register_buffer("student_columns", columns.student, persistent=False)
        self.register_buffer("teacher_columns", columns.teacher, persistent=False)
        student_keys, teacher_keys = byte_keys(setup)
        self.register_buffer("student_keys", student_keys, persistent=False)
        self.register_buffer("teacher_keys", teacher_keys, persistent=False)
        self._divergence = row_divergence(config)

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``shared_vocabulary``, cross-entropy included, in nats (total variation has no unit)."""
        student, teacher = pair.student, require_teacher(pair)
        pairs = same_token_pairs(
            student,
            teacher,
            batch,
            student_keys=self.student_keys[student.labels],
            teacher_keys=self.teacher_keys[teacher.labels],
        )
        result = paired_rows_loss(
            head_input(student),
            student.labels,
            self._teacher_head(teacher),
            student_index=pairs.student,
            teacher_index=pairs.teacher,
            row_losses=self._rows,
            weights=[1.0],
            kd_weight=self.config.kd_weight,
        )
        num_tokens = student.labels.shape[0]
        metrics = {
            **result.reference,
            "divergence": Ratio(result.sums[0], num_tokens),
            "top1_agreement": Ratio(result.metrics[0], pairs.count),
            "coverage": coverage_ratio("shared_vocabulary", pairs.count, num_tokens),
        }
        if self.config.rest == "bucket":
            masses = zip(("student_shared_mass", "teacher_shared_mass"), result.metrics[1:], strict=True)
            metrics |= {name: Ratio(mass, pairs.count) for name, mass in masses}
        return {"shared_vocabulary": LossTerm(result.total, num_tokens, metrics=metrics)}

    def _teacher_head(self, teacher: SideForward) -> HeadInput:
        head = head_input(teacher)
        if self.config.rest == "bucket":
            return head
        bias = None if head.bias is None else head.bias[self.teacher_columns]
        return replace(head, weight=head.weight[self.teacher_columns], bias=bias)

    def _rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        own, theirs = logits
        shared = take_columns(own, self.student_columns)
        if self.config.rest == "ignore":  # the teacher's logits are those of the shared tokens already
            return [self._divergence(shared, theirs)], [_agreement(shared, theirs)]
        theirs_shared = take_columns(theirs, self.teacher_columns)
        masses = [
            side.detach().logsumexp(-1).sub(whole.detach().logsumexp(-1)).exp()
            for side, whole in ((shared, own), (theirs_shared, theirs))
        ]
        loss = self._divergence(
            torch.cat([shared, self._bucket(own, self.student_columns)], -1),
            torch.cat([theirs_shared, self._bucket(theirs, self.teacher_columns)], -1),
        )
        return [loss], [_agreement(shared, theirs_shared), *masses]

    def _bucket(self, logits: Tensor, columns: Tensor) -> Tensor:
        """``[n, 1]``: the logit whose share, once divided by the temperature, is that of all columns but ``columns``.

        Summed over those columns themselves: one minus the shared mass would have no digits where that is near 1.
        """
        outside = logits.index_fill(-1, columns, -torch.inf) / self.config.temperature
        return outside.logsumexp(-1, keepdim=True) * self.config.temperature


def _agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return (student_logits.detach().argmax(-1) == teacher_logits.argmax(-1)).float()
