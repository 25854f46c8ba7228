"""GOLD: chunks merged into single rows by the chain rule, compared by identity where ids match and by rank elsewhere.

Hugging Face 2025, "General Online Logit Distillation", the extended universal logit distillation of TRL's GOLD trainer
(ULD: arXiv 2402.12030). A chunk is a minimal run of tokens on each side with the same bytes; its student tokens
y_1 .. y_m are predicted by rows P_1 .. P_m. The merged row

    p(v) = P_m(v) * P_1(y_1) * ... * P_(m-1)(y_(m-1))

is the probability of the chunk's text with v as its last token; q is the teacher's. With C the ids that stand for the
same bytes in both vocabularies, end tokens included, m = beta q + (1 - beta) p and w = ``matched_weight``:

    matched = sum_(v in C) beta q log(q / m) + (1 - beta) p log(p / m)
    ranks   = sum_k abs(p_(k) - q_(k)) over the ids that are not compared by identity, each side sorted
    L = (1 - kd_weight) CE + kd_weight * sum over chunks of [w matched + (1 - w) ranks]

``hybrid: false`` leaves ``ranks`` over the whole rows, with weight 1.

What we do differently, and why:
- The product stands behind the row that predicts the chunk's last token, so p(y_m) is the probability of the chunk. The
  published default reads rows one token late and multiplies by what comes after the first token; two models that are
  certain of the same text get a loss above 0 from it.
- Identity counts only where both chunks end in a matched pair of tokens, as every word does that both sides cut alike.
  Elsewhere the last tokens are different strings, so that identity would punish full agreement (published); those rows
  are compared by rank as a whole.
- Rows are not renormalised, as published: what a chunk's prefix and the unmatched ids hold is part of the comparison.
  ``matched`` cannot turn negative by that: x log x is convex, so every summand is at least 0, and 0 only at p = q.
- Prefixes are sums of log-probabilities with a gradient of their own; published: a product of probabilities clamped
  at 1e-8, which loses the gradient of the rarest tokens.
- A sum over chunks divided by the student tokens of the whole step: gradients do not depend on accumulation (published:
  mean over chunks and rows of a micro-batch, eight times larger at eight accumulation steps). End tokens pair by role
  and count; published: the last token of either side is dropped.
- ``kd_weight`` is 1 in the published default.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

from vocabridge.losses.chunk_merge import log_prefix, mass_jsd, prefix_positions
from vocabridge.losses.chunk_rows import ChunkRows, chunk_rows
from vocabridge.losses.chunked_head import head_rows
from vocabridge.losses.paired_rows import paired_rows_loss, reference_rows
from vocabridge.losses.sorted_rows import sorted_l1, tempered
from vocabridge.models.forward import SideForward
from vocabridge.objectives._columns import shared_columns, take_columns
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

NO_ID = -1


class Config(KdConfig):
    """Settings of GOLD."""

    paper: ClassVar[str] = "General Online Logit Distillation, Hugging Face 2025 (ULD: arXiv 2402.12030)"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "tokenizers", "chunks")
    use_when: ClassVar[str] = "most tokens have a partner in the other vocabulary, and the rest should count as well"

    temperature: float = Field(1.0, gt=0)
    """Divides both sides' logits, in the prefixes as well."""
    hybrid: bool = True
    """Compare matched ids by identity; false compares whole merged rows by rank."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """The teacher's share in the mixture of the matched part."""
    matched_weight: float | None = Field(None, ge=0, le=1)
    """Weight of the matched part, the rest going to ranks; by default the matched share of the teacher's vocabulary."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        # By value, not by what was written: a resolved recipe writes every default out and must read back.
        ignored = self.model_dump(include={"jsd_beta", "matched_weight"}, exclude_defaults=True)
        if ignored and not self.hybrid:
            raise ValueError(f"{next(iter(ignored))} has no effect with hybrid: false; leave it out")
        return self


class Gold(Objective):
    """Merged rows of every chunk, beside cross-entropy."""

    config: Config
    partners: Tensor
    student_matched: Tensor
    student_unmatched: Tensor
    teacher_matched: Tensor
    teacher_unmatched: Tensor

    def __init__(self, config: Config, setup: ObjectiveSetup):
        super().__init__(config, setup)
        assert setup.teacher_head is not None
        sizes = (setup.student_head.weight.shape[0], setup.teacher_head.weight.shape[0])
        matched = shared_columns(setup)
        share = matched.teacher.shape[0] / sizes[1]
        self.matched_weight = share if config.matched_weight is None else config.matched_weight
        partners = torch.full((sizes[0],), NO_ID)
        partners[matched.student] = matched.teacher
        self.register_buffer("partners", partners, persistent=False)
        for side, size, ids in zip(("student", "teacher"), sizes, (matched.student, matched.teacher), strict=True):
            rest = torch.ones(size, dtype=torch.bool).index_fill(0, ids, False).nonzero().squeeze(1)
            self.register_buffer(f"{side}_matched", ids, persistent=False)
            self.register_buffer(f"{side}_unmatched", rest, persistent=False)

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``gold``: cross-entropy and the matched part in nats, ranks as a distance of at most 2."""
        student, teacher = pair.student, require_teacher(pair)
        chunks = chunk_rows(student.rows, batch["chunk_ids"], teacher.rows, batch["teacher_chunk_ids"])
        by_identity = self._by_identity(chunks, student.labels, teacher.labels)
        inner = torch.ones_like(student.labels, dtype=torch.bool).index_fill(0, chunks.student.last, False)
        positions, teacher_positions = inner.nonzero().squeeze(1), prefix_positions(chunks.teacher)
        numbers = self._label_numbers(student, positions)
        teacher_numbers = self._label_numbers(teacher, teacher_positions).detach()
        loss = paired_rows_loss(
            head_input(student),
            student.labels,
            head_input(teacher),
            student_index=chunks.student.last,
            teacher_index=chunks.teacher.last,
            row_losses=self._rows,
            weights=[self.matched_weight, 1 - self.matched_weight] if self.config.hybrid else [1.0],
            kd_weight=self.config.kd_weight,
            rows=[
                log_prefix(numbers[:, 0], positions, chunks.student),
                log_prefix(teacher_numbers[:, 0], teacher_positions, chunks.teacher),
                by_identity,
            ],
            unpaired=numbers[:, 1:],
        )
        count, num_chunks = student.labels.shape[0], chunks.num_chunks
        metrics = {
            **loss.reference,
            "rank_distance": Ratio(loss.sums[-1], num_chunks),
            "coverage": coverage_ratio("gold", chunks.covered, count),
        }
        if self.config.hybrid:
            metrics["matched_divergence"] = Ratio(loss.sums[0], by_identity.sum())
            metrics["compared_by_identity"] = Ratio(by_identity.sum(), num_chunks)
        return {"gold": LossTerm(loss.total, count, metrics=metrics)}

    def _by_identity(self, chunks: ChunkRows, student_labels: Tensor, teacher_labels: Tensor) -> Tensor:
        """``[C]`` bool: the last tokens of both sides are a matched pair; as they end together, they begin together."""
        if not self.config.hybrid:
            return torch.zeros_like(chunks.one_to_one)
        partners = self.partners[student_labels[chunks.student.last]]
        return partners == teacher_labels[chunks.teacher.last]

    def _label_numbers(self, side: SideForward, positions: Tensor) -> Tensor:
        """``[k, 3]`` at some positions: tempered log-probability of the label, cross-entropy, whether it is the top."""

        def row_function(logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> Tensor:
            (reference,), (right,) = reference_rows(logits, rows)
            scores = tempered(logits[0], self.config.temperature)
            own = reference if scores is logits[0] else cross_entropy(scores, rows[0], reduction="none")
            return torch.stack([-own, reference, right], dim=1)

        inputs = [head_input(side, side.hidden_states[positions])]
        return head_rows(row_function, inputs, [side.labels[positions]])

    def _rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        student, teacher = (
            tempered(side, self.config.temperature).log_softmax(-1) + prefix[:, None]
            for side, prefix in zip(logits, rows[:2], strict=True)
        )
        same, merged = rows[2].nonzero().squeeze(1), (~rows[2]).nonzero().squeeze(1)
        ranks = student.new_zeros(student.shape[0])
        ranks = ranks.index_add(0, merged, sorted_l1(student[merged].exp(), teacher[merged].exp()))
        if not self.config.hybrid:
            return [ranks], []
        student, teacher = student[same], teacher[same]
        matched = mass_jsd(
            take_columns(student, self.student_matched),
            take_columns(teacher, self.teacher_matched),
            beta=self.config.jsd_beta,
        )
        unmatched = sorted_l1(
            take_columns(student, self.student_unmatched).exp(), take_columns(teacher, self.teacher_unmatched).exp()
        )
        return [torch.zeros_like(ranks).index_add(0, same, matched), ranks.index_add(0, same, unmatched)], []
