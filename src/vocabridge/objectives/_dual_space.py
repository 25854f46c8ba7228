"""What the dual-space methods share: a loss in the student's output space and one in the teacher's.

DSKD, Zhang et al. 2024, arXiv 2406.17328. How positions of the two sides are paired or mixed is each method's own; here
begins where every student position i has a projected teacher state (or none) and every teacher position j a projected
student state (or none). W, W' heads, z, z' own logits, y labels, D a divergence, sg stop-gradient:

    student space: z_ts = (projected teacher) sg(W)^T     CE(z_ts, y) + [argmax z_ts = y] D(z, sg(z_ts))
    teacher space: z_st = (projected student) W'^T        KL(softmax z' || softmax z_st)

With ``teacher_top_k`` the two logits of the teacher's space hold the teacher's k likeliest tokens of each row only.

Axis letters: N / M packed student / teacher positions, n rows of a chunk of either, d, D hidden sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vocabridge.losses.chunked_head import ChunkedLoss, HeadInput, chunked_head_loss
from vocabridge.losses.cross_attention import scalar_std
from vocabridge.losses.divergences import forward_kl
from vocabridge.losses.vocabulary_cut import TopTokens, logits_at, top_tokens
from vocabridge.models.forward import SideForward
from vocabridge.objectives._divergence import row_divergence
from vocabridge.objectives.base import LossTerm, Objective, ObjectiveSetup, Ratio, head_input
from vocabridge.objectives.config import DualSpaceConfig, TwoSpaceConfig

RowLists = tuple[list[Tensor], list[Tensor]]
"""Losses ``[n]`` each and metrics ``[n]`` each."""


@dataclass(frozen=True, slots=True, eq=False)
class DualSpaceLosses:
    """The losses of both spaces with their settings bound; where a position is not covered, its terms are exactly 0."""

    divergence: Callable[[Tensor, Tensor], Tensor]
    """Row loss between the student's own and the projected teacher's logits."""
    temperature: float
    """Of the divergence in the teacher's space."""
    kd_weight: float
    """Share of all terms but cross-entropy on the student's own logits, which has the rest."""
    teacher_top_k: int | None
    """Tokens of each row that the teacher's space compares; None: all."""

    @classmethod
    def of(cls, config: TwoSpaceConfig) -> DualSpaceLosses:
        """Bound to an objective's settings."""
        return cls(row_divergence(config), config.temperature, config.kd_weight, config.teacher_top_k)

    def student_rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> RowLists:
        """Of (own, projected) logits: both cross-entropies, and the divergence where projected is right."""
        (own, projected), (labels, covered) = logits, rows
        right = (projected.detach().argmax(-1) == labels) & covered
        losses = [
            cross_entropy(own, labels, reduction="none"),
            cross_entropy(projected, labels, reduction="none") * covered,
            self.divergence(own, projected.detach()) * right,
        ]
        return losses, [(own.detach().argmax(-1) == labels).float(), right.float()]

    def teacher_rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> RowLists:
        """Of (projected, own) logits, (labels, covered) rows: forward KL."""
        (projected, own), (labels, covered) = logits, rows
        loss = forward_kl(projected, own, temperature=self.temperature) * covered
        return [loss], [((projected.detach().argmax(-1) == labels) & covered).float()]

    def student_space(self, student: SideForward, projected: Tensor, covered: Tensor) -> LossTerm:
        """Term of the student's space, cross-entropy on its own logits included.

        Args:
            student: N positions.
            projected: ``[N, d]`` teacher states in the student's space; any finite values where not covered.
            covered: ``[N]`` bool, positions that have a projected teacher state.
        """
        share = self.kd_weight
        result = chunked_head_loss(
            self.student_rows,
            [
                head_input(student),
                head_input(student, projected.to(student.hidden_states.dtype), train_head=False),
            ],
            [student.labels, covered],
            weights=[1 - share, share, share],
        )
        count = student.labels.shape[0]
        names = ["cross_entropy", "t2s_cross_entropy", "t2s_divergence"]
        metrics = {name: Ratio(value, count) for name, value in zip(names, result.sums, strict=True)}
        metrics["student_accuracy"] = Ratio(result.metrics[0], count)
        metrics["t2s_accuracy"] = Ratio(result.metrics[1], covered.sum())
        return LossTerm(result.total, count, metrics=metrics)

    def teacher_space(
        self, teacher: SideForward, projected: Tensor, covered: Tensor, *, num_student_tokens: int
    ) -> LossTerm:
        """Term of the teacher's space.

        Args:
            teacher: M positions.
            projected: ``[M, D]`` student states in the teacher's space; any finite values where not covered.
            covered: ``[M]`` bool, positions that have a projected student state.
            num_student_tokens: N. The term is summed over teacher positions but divided by student positions, as
                published: the weight between the two spaces then follows the lengths of the two tokenizations.
        """
        states = head_input(teacher, projected.to(teacher.hidden_states.dtype), train_head=False)
        kept = self.kept_tokens(head_input(teacher))
        rows = [teacher.labels, covered]
        if kept is None:
            result = chunked_head_loss(self.teacher_rows, [states, head_input(teacher)], rows, weights=[self.kd_weight])
        else:
            result = self._over_kept(states, kept, rows)
        count = covered.sum()
        metrics = {
            "s2t_divergence": Ratio(result.sums[0], num_student_tokens),
            "s2t_accuracy": Ratio(result.metrics[0], count),
        }
        if kept is not None:
            metrics["teacher_top_mass"] = Ratio((kept.mass * covered).sum(), count)
        return LossTerm(result.total, num_student_tokens, metrics=metrics)

    def kept_tokens(self, teacher: HeadInput) -> TopTokens | None:
        """What is compared of each row of the teacher, or None where that is its whole vocabulary."""
        if self.teacher_top_k is None or self.teacher_top_k >= len(teacher.weight):
            return None
        return top_tokens(teacher, self.teacher_top_k, temperature=self.temperature)

    def _over_kept(self, states: HeadInput, kept: TopTokens, rows: list[Tensor]) -> ChunkedLoss:
        """The rows' losses with the kept tokens for a vocabulary; their logits are few enough to exist at once."""
        labels, covered = rows
        losses, metrics = self.teacher_rows((logits_at(states, kept.ids), kept.logits), (kept.places(labels), covered))
        (total,), (right,) = losses, metrics
        sums = total.sum()
        return ChunkedLoss(self.kd_weight * sums, sums.detach()[None], right.sum()[None])


class Mixing(Protocol):
    """How states of one side reach the positions of the other: an attention, or means over chunks."""

    @property
    def student_covered(self) -> Tensor:
        """``[N]`` bool: positions that something of the teacher reaches."""

    @property
    def teacher_covered(self) -> Tensor:
        """``[M]`` bool."""

    def to_student(self, values: Tensor) -> Tensor:
        """``[M, F] -> [N, F]``."""

    def to_teacher(self, values: Tensor) -> Tensor:
        """``[N, F] -> [M, F]``."""


class DualSpace(Objective):
    """Base of the methods with two learned affine maps between the models' last hidden states."""

    def __init__(self, config: TwoSpaceConfig, setup: ObjectiveSetup):
        super().__init__(config, setup)
        assert setup.teacher_hidden_size is not None
        self.teacher_to_student = nn.Linear(setup.teacher_hidden_size, setup.student_hidden_size)
        self.student_to_teacher = nn.Linear(setup.student_hidden_size, setup.teacher_hidden_size)
        self.losses = DualSpaceLosses.of(config)

    def terms(
        self, student: SideForward, teacher: SideForward, mixing: Mixing, *, values: Tensor
    ) -> dict[str, LossTerm]:
        """Terms ``student_space`` and ``teacher_space`` of the teacher's ``values [M, D]`` and the student's states."""
        values = self.teacher_to_student(values.to(self.teacher_to_student.weight.dtype))
        hidden = self.student_to_teacher(student.hidden_states.to(self.student_to_teacher.weight.dtype))
        return {
            "student_space": self.losses.student_space(student, mixing.to_student(values), mixing.student_covered),
            "teacher_space": self.losses.teacher_space(
                teacher,
                mixing.to_teacher(hidden),
                mixing.teacher_covered,
                num_student_tokens=student.labels.shape[0],
            ),
        }


def scaled(values: Tensor, rows: Tensor, num_examples: int, *, config: DualSpaceConfig) -> Tensor:
    """``values [N, F]`` divided by the scalar standard deviation of their example (``rows [N]``) or of the batch."""
    std = scalar_std(values, rows if config.statistics == "example" else None, num_examples)
    return values / std.clamp(min=1e-6).to(values.dtype)


def teacher_values(teacher: SideForward, num_examples: int, *, config: DualSpaceConfig) -> Tensor:
    """Constant ``[M, D]``: last hidden states, plus the embedding of the label, each scaled to standard deviation 1."""
    values = scaled(teacher.hidden_states, teacher.rows, num_examples, config=config)
    if config.value == "hidden_and_label":
        labels = embed(teacher.embedding, teacher.labels).to(values.dtype)
        values = values + scaled(labels, teacher.rows, num_examples, config=config)
    return values


@torch.no_grad()
def embed(embedding: nn.Module, ids: Tensor) -> Tensor:
    """Input embeddings as the model sees them (scaled where the model scales them), as constants."""
    weight = next(embedding.parameters())
    vectors = embedding(ids.to(weight.device))
    return vectors if vectors.dtype == torch.float64 else vectors.float()
