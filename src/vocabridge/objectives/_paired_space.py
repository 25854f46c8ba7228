"""What DSKD on one tokenizer and DSKD with exact token alignment share: the three losses of both spaces, over pairs.

A pair is a student position i and a teacher position j that predict the same token. With last hidden states h, h',
heads W, W', own logits z, z', labels y, projectors P, a divergence D and sg the stop-gradient:

    student space: z_ts = P_ts(h'_j) sg(W)^T     CE(z_ts, t) + D(z_i, sg(z_ts))
    teacher space: z_st = P_st(h_i) W'^T         D'(z_st, z'_j)

over pairs that have a target t: the label y_i (DSKD), or the student's id of argmax z'_j where there is one (DSKDv2;
then D counts only where argmax z_ts = t). W is trained through z alone. P_st is learned, or recomputed from W. With
``teacher_top_k`` D' compares the teacher's k likeliest tokens of each row only.

Axis letters: N / M packed student / teacher positions, n pairs, V_s / V_t vocabularies, d / D hidden sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vocabridge.errors import UserError
from vocabridge.losses.chunked_head import HeadInput
from vocabridge.losses.overlap_projection import AffineMap, overlap_projection, pseudo_inverse_rows
from vocabridge.losses.paired_rows import PairedLoss, head_at, paired_rows_loss
from vocabridge.losses.vocabulary_cut import TopTokens, logits_at
from vocabridge.models.heads import OutputHead
from vocabridge.objectives._columns import shared_columns
from vocabridge.objectives._dual_space import DualSpace
from vocabridge.objectives._row_pairs import RowPairs
from vocabridge.objectives.base import (
    ForwardPair,
    LossTerm,
    ObjectiveSetup,
    Ratio,
    coverage_ratio,
    head_input,
    require_teacher,
)
from vocabridge.objectives.config import PairedSpaceConfig

NO_ID = -1
"""In a map of ids: the other vocabulary has no such token."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadRows:
    """The rows of one model's head that belong to the shared tokens, as constants."""

    weight: Tensor
    """``[n, H]``"""
    bias: Tensor | None
    """``[n]``"""
    logit_scale: float

    @classmethod
    def of(cls, head: OutputHead, ids: Tensor) -> HeadRows:
        """The rows ``ids [n]``."""
        ids = ids.to(head.weight.device)
        return cls(head.weight.detach()[ids], None if head.bias is None else head.bias.detach()[ids], head.logit_scale)


class OverlapProjector:
    """Closed-form maps into the space of one frozen head, whose pseudo-inverse is computed once.

    Keeps that inverse, ``[n, H]`` in float32: 118 MB for 46,000 shared tokens and a width of 640. It is no buffer: data
    parallelism would send buffers to every process at every step.
    """

    def __init__(self, target: HeadRows):
        exact = target.weight.dtype == torch.float64
        self._inverse_rows = pseudo_inverse_rows(target.weight, dtype=torch.float64 if exact else torch.float32)
        self._bias = target.bias
        self._logit_scale = target.logit_scale

    def __call__(self, source: HeadRows) -> AffineMap:
        """The map from the source's hidden states that brings the target's logits nearest the source's."""
        self._inverse_rows = self._inverse_rows.to(source.weight.device)
        scale = source.logit_scale / self._logit_scale
        offsets = _difference(source.bias, self._bias, scale, self._inverse_rows)
        return overlap_projection(self._inverse_rows, source.weight, offsets=offsets, scale=scale)


def _difference(source: Tensor | None, target: Tensor | None, scale: float, like: Tensor) -> Tensor | None:
    """``scale * source - target``, where None stands for zeros."""
    if source is None and target is None:
        return None
    difference = like.new_zeros(len(like))
    if source is not None:
        difference += scale * source.to(like)
    return difference if target is None else difference - target.to(like)


class PairedSpace(DualSpace):
    """Base of the methods; a subclass finds the pairs.

    Args:
        config: the settings.
        setup: both models' parts.
        name: of the objective, for messages.
        targets: ``[V_t]`` student id of each teacher id, or -1.
        teacher_divergence: row loss in the teacher's space, of (projected student, teacher) logits.

    Raises:
        UserError: the vocabularies share no token, and a projector is to be computed from shared tokens.
    """

    config: PairedSpaceConfig
    targets: Tensor

    def __init__(
        self,
        config: PairedSpaceConfig,
        setup: ObjectiveSetup,
        *,
        name: str,
        targets: Tensor,
        teacher_divergence: Callable[[Tensor, Tensor], Tensor],
    ):
        super().__init__(config, setup)
        self.name = name
        self.teacher_divergence = teacher_divergence
        self.register_buffer("targets", targets, persistent=False)
        self._to_teacher: OverlapProjector | None = None
        self._student_ids: Tensor | None = None
        self._step = self._recomputed_at = 0
        is_recomputed = config.teacher_space_projector == "recomputed"
        if is_recomputed:
            _make_constant(self.student_to_teacher)
        if is_recomputed or config.projector_start == "pseudo_inverse":
            self._project_in_closed_form(setup)

    def _project_in_closed_form(self, setup: ObjectiveSetup) -> None:
        assert setup.teacher_head is not None
        shared = shared_columns(setup)
        if len(shared.student) < 2:  # the end tokens pair always
            raise UserError(
                f"objective {self.name}: the two vocabularies share no token to compute a projector from; use "
                "projector_start: random and teacher_space_projector: learned."
            )
        student = HeadRows.of(setup.student_head, shared.student)
        teacher = HeadRows.of(setup.teacher_head, shared.teacher)
        if self.config.projector_start == "pseudo_inverse":
            _assign(self.teacher_to_student, OverlapProjector(student)(teacher))
        to_teacher = OverlapProjector(teacher)
        _assign(self.student_to_teacher, to_teacher(student))
        if self.config.teacher_space_projector == "recomputed":
            self._to_teacher, self._student_ids = to_teacher, shared.student

    def set_step(self, step: int) -> None:
        """Lets the recomputed projector follow the student's head from its next due step on."""
        self._step = step

    def _follow_student_head(self, head: OutputHead) -> None:
        """Recompute once in a due step; between due steps a resumed run goes on with what was saved."""
        is_due = self._step % self.config.recompute_every == 0 and self._step != self._recomputed_at
        if self._to_teacher is None or self._student_ids is None or not is_due:
            return
        _assign(self.student_to_teacher, self._to_teacher(HeadRows.of(head, self._student_ids)))
        self._recomputed_at = self._step

    def paired_terms(self, pair: ForwardPair, pairs: RowPairs) -> dict[str, LossTerm]:
        """One term ``dual_space``, in nats: cross-entropy on all N positions, the three losses over the pairs."""
        student, teacher = pair.student, require_teacher(pair)
        self._follow_student_head(student.head)
        in_student_space = head_input(
            student, _project(self.teacher_to_student, teacher.hidden_states[pairs.teacher]), train_head=False
        )
        in_teacher_space = head_input(
            teacher, _project(self.student_to_teacher, student.hidden_states[pairs.student]), train_head=False
        )
        labels, teacher_labels = student.labels[pairs.student], teacher.labels[pairs.teacher]
        loss = partial(
            paired_rows_loss,
            head_input(student),
            student.labels,
            student_index=pairs.student,
            weights=[1.0, 1.0, 1.0],
            kd_weight=self.config.kd_weight,
        )
        kept = self.losses.kept_tokens(head_at(head_input(teacher), pairs.teacher))
        if kept is None:
            result = loss(
                head_input(teacher),
                teacher_index=pairs.teacher,
                row_losses=self._rows,
                rows=[labels, teacher_labels],
                projected=[in_student_space, in_teacher_space],
            )
        else:  # what counts of the teacher's own logits is kept, so its projected states take their place
            result = loss(
                in_student_space,
                teacher_index=torch.arange(len(labels), device=labels.device),
                row_losses=self._kept_rows,
                rows=self._over_kept(kept, in_teacher_space, labels=labels, teacher_labels=teacher_labels),
            )
        return {
            "dual_space": LossTerm(result.total, len(student.labels), metrics=self._metrics(result, student.labels))
        }

    def _rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        own, teacher, in_student_space, in_teacher_space = logits
        labels, teacher_labels = rows
        return self._both_spaces(
            own,
            in_student_space,
            targets=self._targets(teacher.argmax(-1), labels, teacher_labels),
            divergence=self.teacher_divergence(in_teacher_space, teacher),
            right=in_teacher_space.detach().argmax(-1) == teacher_labels,
        )

    def _over_kept(
        self, kept: TopTokens, in_teacher_space: HeadInput, *, labels: Tensor, teacher_labels: Tensor
    ) -> list[Tensor]:
        """Targets, divergences in the teacher's space, hits there and the teacher's kept mass, ``[n]`` each."""
        logits = logits_at(in_teacher_space, kept.ids)
        targets = self._targets(kept.ids[:, 0], labels, teacher_labels)
        right = logits.detach().argmax(-1) == kept.places(teacher_labels)
        return [targets, self.teacher_divergence(logits, kept.logits), right, kept.mass]

    def _kept_rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        own, in_student_space = logits
        targets, divergence, right, mass = rows
        losses, metrics = self._both_spaces(own, in_student_space, targets=targets, divergence=divergence, right=right)
        return losses, [*metrics, mass * (targets != NO_ID)]

    def _both_spaces(
        self, own: Tensor, in_student_space: Tensor, *, targets: Tensor, divergence: Tensor, right: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        has_target = targets != NO_ID
        agrees = in_student_space.detach().argmax(-1) == targets
        counts = has_target if self.config.t2s_target == "label" else agrees
        losses = [
            cross_entropy(in_student_space, targets, reduction="none", ignore_index=NO_ID),
            self.losses.divergence(own, in_student_space.detach()) * counts,
            divergence * has_target,
        ]
        return losses, [has_target.float(), agrees.float(), (right & has_target).float()]

    def _targets(self, predicted: Tensor, labels: Tensor, teacher_labels: Tensor) -> Tensor:
        if self.config.t2s_target == "label":
            return labels
        # The two labels of a pair are the same token, also where no map knows it: the end tokens.
        return torch.where(predicted == teacher_labels, labels, self.targets[predicted])

    def _metrics(self, result: PairedLoss, labels: Tensor) -> dict[str, Ratio]:
        count = len(labels)
        taught, agreeing, right, *mass = result.metrics
        names = ["t2s_cross_entropy", "t2s_divergence", "s2t_divergence"]
        metrics = {
            **result.reference,
            **{name: Ratio(value, count) for name, value in zip(names, result.sums, strict=True)},
            "t2s_accuracy": Ratio(agreeing, taught),
            "s2t_accuracy": Ratio(right, taught),
            "coverage": coverage_ratio(self.name, taught, count),
        }
        if mass:
            metrics["teacher_top_mass"] = Ratio(mass[0], taught)
        return metrics


def _make_constant(projector: nn.Linear) -> None:
    """Turn parameters into buffers of the same names: saved with the others, seen by no optimizer or sharding."""
    for name, parameter in list(projector.named_parameters()):
        delattr(projector, name)
        projector.register_buffer(name, parameter.detach())


@torch.no_grad()
def _assign(projector: nn.Linear, affine: AffineMap) -> None:
    projector.weight.copy_(affine.weight)
    projector.bias.copy_(affine.bias)


def _project(projector: nn.Linear, hidden: Tensor) -> Tensor:
    """Never in bfloat16 by autocast: a pseudo-inverse has large entries that cancel."""
    with torch.autocast(hidden.device.type, enabled=False):
        return projector(hidden.to(projector.weight.dtype))
