"""Minimum edit distance alignment (MinED): teacher rows read through a map between the vocabularies.

Wan et al. 2024, "Knowledge Fusion of Large Language Models" (FuseLLM), ICLR 2024, arXiv 2401.10491, section 3.3; as a
distillation loss in the code of DSKD (arXiv 2406.17328), the baseline of later papers.

Every teacher token goes to the student token of least edit distance, an identical one first; of the teacher tokens that
go to one student token v, a(v) is the nearest. With z and z' logits, y labels, T the temperature and (i, j) paired
positions:

    q_j(v) = softmax over the v that have an a(v) of (z'_j(a(v)) / T)
    mined = sum_(i, j) KL(q_j || softmax(z_i / T)) + sum over unpaired i of -log softmax(z_i / T)(y_i)
    L = (1 - kd_weight) sum_i CE(z_i, y_i) + kd_weight mined

Needs both tokenizers; the map is made in seconds to minutes and kept on disk.

What we do differently, and why:
- ``alignment: chunks`` (default) pairs the positions that are alone in their byte-exact chunk on both sides, so both
  rows predict the same text after the same text. ``dtw`` is the published pairing by dynamic time warping over edit
  distances, in which a student position counts if it has one partner.
- In both, the teacher's label must be mapped to the student's (published), else the mapped row would teach another
  token than the label: "In" for " In" where only the student's chat template puts a space before the answer.
- Paths run over labels, the tokens that the rows predict. The released code runs over the input tokens, one position
  earlier, and compares the rows that follow.
- End tokens pair by role, in the rows and in the map.
- Student tokens without a teacher token have probability 0 in q exactly; published: a logit of -1e5, times a one-hot
  row of 100 and -1e5 for unpaired positions, which is the cross-entropy above.
- Of several teacher tokens for one student token the nearest is read; published: whichever has the lowest id.
- Nothing is written into the student's logits. The released code in float32 builds the teacher's rows in their memory,
  so that the loss is 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from vocabridge.alignment import inverse_nearest_tokens, nearest_tokens
from vocabridge.losses.chunk_rows import chunk_rows
from vocabridge.losses.chunked_head import HeadInput, chunked_head_loss
from vocabridge.losses.divergences import forward_kl
from vocabridge.losses.paired_rows import reference_rows
from vocabridge.models.forward import SideForward
from vocabridge.objectives._columns import take_columns
from vocabridge.objectives._label_paths import LabelSpellings
from vocabridge.objectives._row_pairs import RowPairs
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
from vocabridge.objectives.config import KdConfig
from vocabridge.pairs import PairBatch


class Config(KdConfig):
    """Settings of minimum edit distance alignment."""

    paper: ClassVar[str] = "MinED of FuseLLM, ICLR 2024, arXiv 2401.10491"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "tokenizers", "chunks")
    use_when: ClassVar[str] = "as the published baseline that reads the teacher through a map between the vocabularies"

    alignment: Literal["chunks", "dtw"] = "chunks"
    """Rows that are paired: those alone in a byte-exact chunk, or by dynamic time warping (published)."""
    temperature: float = Field(2.0, gt=0)
    """Divides both sides' logits in the distillation part, for unpaired positions as well."""


class Mined(Objective):
    """The teacher's rows in the student's vocabulary where positions pair, the label elsewhere."""

    config: Config
    student_ids: Tensor
    sources: Tensor
    has_source: Tensor

    def __init__(self, config: Config, setup: ObjectiveSetup):
        super().__init__(config, setup)
        sources = torch.as_tensor(_teacher_ids(setup))
        # All follow from the tokenizers, so they are not saved.
        self.register_buffer("student_ids", torch.as_tensor(_student_ids(setup)), persistent=False)
        self.register_buffer("sources", sources.clamp(min=0), persistent=False)
        self.register_buffer("has_source", sources >= 0, persistent=False)
        if config.alignment == "dtw":
            self._spellings = LabelSpellings(setup)

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``mined``, cross-entropy included, in nats."""
        student, teacher = pair.student, require_teacher(pair)
        pairs = self._pairs(student, teacher, batch)
        share = self.config.kd_weight
        alone = (
            torch.ones_like(student.labels, dtype=torch.bool).index_fill(0, pairs.student, False).nonzero().squeeze(1)
        )
        unpaired = chunked_head_loss(
            self._unpaired_rows, [_at(student, alone)], [student.labels[alone]], weights=[1 - share, share]
        )
        paired = chunked_head_loss(
            self._paired_rows,
            [_at(student, pairs.student), _at(teacher, pairs.teacher, train_head=False)],
            [student.labels[pairs.student]],
            weights=[1 - share, share],
        )
        count = student.labels.shape[0]
        metrics = {
            "cross_entropy": Ratio(unpaired.sums[0] + paired.sums[0], count),
            "student_accuracy": Ratio(unpaired.metrics[0] + paired.metrics[0], count),
            "divergence": Ratio(paired.sums[1], pairs.count),
            "coverage": coverage_ratio("mined", pairs.count, count),
        }
        return {"mined": LossTerm(unpaired.total + paired.total, count, metrics=metrics)}

    def _pairs(self, student: SideForward, teacher: SideForward, batch: PairBatch) -> RowPairs:
        """Student positions with one partner, whose label is mapped to theirs."""
        if self.config.alignment == "dtw":
            paths = self._spellings.paths(student, teacher)
            mine, theirs = (torch.as_tensor(side).to(student.labels.device) for side in (paths.student, paths.teacher))
            kept = torch.bincount(mine, minlength=student.labels.shape[0])[mine] == 1
        else:
            chunks = chunk_rows(student.rows, batch["chunk_ids"], teacher.rows, batch["teacher_chunk_ids"])
            mine, theirs, kept = chunks.student.starts, chunks.teacher.starts, chunks.one_to_one
        kept = kept & (self.student_ids[teacher.labels[theirs]] == student.labels[mine])
        return RowPairs(mine[kept], theirs[kept])

    def _unpaired_rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        reference, right = reference_rows(logits, rows)
        return [*reference, cross_entropy(logits[0] / self.config.temperature, rows[0], reduction="none")], right

    def _paired_rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        own, theirs = logits
        reference, right = reference_rows(logits, rows)
        mapped = take_columns(theirs, self.sources).masked_fill(~self.has_source, -torch.inf)
        return [*reference, forward_kl(own, mapped, temperature=self.config.temperature)], right


def _at(side: SideForward, index: Tensor, *, train_head: bool = True) -> HeadInput:
    return head_input(side, side.hidden_states[index], train_head=train_head)


def _teacher_ids(setup: ObjectiveSetup) -> np.ndarray:
    """The teacher id that each student id is read from, -1 for none; end tokens from each other."""
    assert setup.teacher_tokenizer is not None
    ids = inverse_nearest_tokens(setup.student_tokenizer, setup.teacher_tokenizer)
    student_end, teacher_end = setup.end_token_ids
    ids[ids == teacher_end] = -1
    ids[student_end] = teacher_end
    return ids


def _student_ids(setup: ObjectiveSetup) -> np.ndarray:
    """The student id that each teacher id is mapped to, -1 for none; end tokens to each other."""
    assert setup.teacher_tokenizer is not None
    ids = nearest_tokens(setup.teacher_tokenizer, setup.student_tokenizer)
    student_end, teacher_end = setup.end_token_ids
    ids[teacher_end] = student_end
    return ids
