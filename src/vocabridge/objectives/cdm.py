"""Contextual dynamic mapping (CDM): likely tokens paired row by row, over labels warped by entropy and edit distance.

Chen et al. 2025, "Enhancing Cross-Tokenizer Knowledge Distillation with Contextual Dynamical Mapping", Findings of ACL
2025, arXiv 2502.11104.

Labels of both sides pair by dynamic time warping with the costs

    cost(i, j) = edits(label_i, label'_j) w_i w'_j,   w = floor(3 sigmoid(4 u - 2) + 3)

where u is the entropy of the row that predicts the label, scaled to 0 .. 1 within its sequence: uncertain positions
must fit best. Student positions with the same partners form a group g; its rows are averaged on each side. Of the
``top_k`` likeliest tokens of both averaged rows, those that the other vocabulary has, byte for byte, are paired with
that token, and the rest with each other where edits / (sum of both lengths) < ``max_distance``. With C_g all pairs of
both directions, z and z' averaged logits, T the temperature:

    cdm = sum_g KL(softmax_(C_g) (z'_g / T) || softmax_(C_g) (z_g / T))
    L = (1 - kd_weight) sum_i CE(z_i, y_i) + kd_weight cdm

Needs both tokenizers and, to choose the pairs, a second and a third pass of both heads without gradients; the loss
itself reads only the columns that are paired somewhere in the batch.

What we do differently, and why:
- Both directions make one set of pairs, in which each token of either side occurs once. The released code lays the two
  blocks of 100 columns side by side, the second with teacher and student swapped, under one softmax.
- What is not paired is left out of both softmaxes; published: a logit of -1e4 on one side.
- Id 0 is a token as any other; published: "unmapped".
- The temperature acts on both sides alike, so that agreement is the minimum, 0; published: the student's logits are
  divided by it and the teacher's log-probabilities multiplied by its square.
- Rows are averaged as hidden states, which is the average of the logits where the head does not bend them.
- Only identical bytes are a fixed pair; published: prefixes too.
- Paths run over labels, with the two end tokens at distance 0. ``alignment: chunks`` groups by byte-exact chunks
  instead, without entropies and at less cost.
- The sum over groups is divided by the student tokens of the whole step: gradient accumulation is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vocabridge.alignment.dynamic_map import DynamicMap, TokenPairs
from vocabridge.losses.chunk_rows import chunk_rows, segment_mean
from vocabridge.losses.chunked_head import ChunkedLoss, HeadInput, chunked_head_loss, head_rows
from vocabridge.losses.divergences import forward_kl
from vocabridge.losses.paired_rows import reference_rows
from vocabridge.models.forward import SideForward
from vocabridge.objectives._label_paths import LabelPaths, LabelSpellings
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
from vocabridge.objectives.config import Cost, KdConfig
from vocabridge.pairs import PairBatch


class Config(KdConfig):
    """Settings of contextual dynamic mapping; the defaults are the published ones."""

    paper: ClassVar[str] = "CDM, Findings of ACL 2025, arXiv 2502.11104"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "tokenizers", "chunks")
    cost: ClassVar[Cost] = "both heads twice"
    use_when: ClassVar[str] = "likely tokens of the teacher are often missing from the student's vocabulary"

    kd_weight: float = Field(0.1, ge=0, le=1)
    """Share of the distillation term; the rest goes to cross-entropy on the reference."""
    temperature: float = Field(0.8, gt=0)
    """Divides both sides' logits in the distillation term."""
    top_k: int = Field(100, ge=1)
    """How many of the likeliest tokens of each side are paired."""
    max_distance: float = Field(0.3, ge=0, le=1)
    """Bound, exclusive, on edits over the sum of both lengths for tokens that are not identical; 0 allows none."""
    alignment: Literal["dtw", "chunks"] = "dtw"
    """Which rows are averaged and compared: those paired by dynamic time warping (published), or byte-exact chunks."""


@dataclass(frozen=True, slots=True, eq=False)
class RowGroups:
    """Student positions that are compared with the same teacher positions, together."""

    student: Tensor
    """``[N]`` group of each student position, -1 in none."""
    teacher_positions: Tensor
    """``[n]`` a position may be in several groups."""
    teacher: Tensor
    """``[n]`` group of each of ``teacher_positions``."""
    count: int
    """G."""


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The pairs of the rows that are compared, as columns of heads that hold only the paired tokens."""

    groups: Tensor
    """``[n]`` groups with two pairs or more; fewer leave nothing to compare."""
    student: Tensor
    """``[n, P]`` column of the student's small head, -1 behind the last pair."""
    teacher: Tensor
    """``[n, P]``"""
    student_ids: Tensor
    """``[c]`` the tokens of the student's small head."""
    teacher_ids: Tensor
    """``[c']``"""


class Cdm(Objective):
    """Divergence between averaged rows over the tokens that stand for each other there."""

    config: Config

    def __init__(self, config: Config, setup: ObjectiveSetup):
        super().__init__(config, setup)
        assert setup.teacher_tokenizer is not None
        self._map = DynamicMap(
            setup.student_tokenizer,
            setup.teacher_tokenizer,
            end_token_ids=setup.end_token_ids,
            max_distance=config.max_distance,
        )
        self._spellings = LabelSpellings(setup)

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``cdm``, cross-entropy included, in nats."""
        student, teacher = pair.student, require_teacher(pair)
        groups = self._groups(student, teacher, batch)
        mine = head_input(student, segment_mean(student.hidden_states, groups.student, groups.count))
        theirs = head_input(
            teacher, segment_mean(teacher.hidden_states[groups.teacher_positions], groups.teacher, groups.count)
        )
        pairs = self._map.pairs(self._likeliest(mine), self._likeliest(theirs))
        columns = _columns(pairs, device=student.labels.device)
        reference = chunked_head_loss(
            reference_rows, [head_input(student)], [student.labels], weights=[1 - self.config.kd_weight]
        )
        distillation = chunked_head_loss(
            self._rows,
            [_narrow(mine, columns.groups, columns.student_ids), _narrow(theirs, columns.groups, columns.teacher_ids)],
            [columns.student, columns.teacher],
            weights=[self.config.kd_weight],
        )
        metrics = _metrics(reference, distillation, groups=groups, columns=columns, pairs=pairs)
        return {"cdm": LossTerm(reference.total + distillation.total, student.labels.shape[0], metrics=metrics)}

    def _groups(self, student: SideForward, teacher: SideForward, batch: PairBatch) -> RowGroups:
        if self.config.alignment == "dtw":
            num_examples = batch["input_ids"].shape[0]
            weights = [entropy_weights(_entropies(side), side.rows, num_examples) for side in (student, teacher)]
            paths = self._spellings.paths(
                student,
                teacher,
                student_weights=weights[0].cpu().numpy(),
                teacher_weights=weights[1].cpu().numpy(),
            )
            return path_groups(paths, num_positions=student.labels.shape[0], device=student.labels.device)
        chunks = chunk_rows(student.rows, batch["chunk_ids"], teacher.rows, batch["teacher_chunk_ids"])
        positions = (chunks.teacher.chunks >= 0).nonzero().squeeze(1)
        return RowGroups(chunks.student.chunks, positions, chunks.teacher.chunks[positions], chunks.num_chunks)

    @torch.no_grad()
    def _likeliest(self, head: HeadInput) -> np.ndarray:
        """int64 ``[G, k]``, in descending order."""
        k = min(self.config.top_k, len(head.weight))
        return head_rows(lambda logits, _: logits[0].topk(k).indices, [head]).cpu().numpy()

    def _rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        own, theirs = (
            side.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -torch.inf)
            for side, columns in zip(logits, rows, strict=True)
        )
        return [forward_kl(own, theirs, temperature=self.config.temperature)], []


def entropy_weights(entropies: Tensor, rows: Tensor, num_examples: int) -> Tensor:
    """Integer weights ``[N]``, 3 to 5, of positions with these entropies, scaled within each example (``rows [N]``)."""
    low, high = (
        entropies.new_zeros(num_examples).scatter_reduce(0, rows, entropies, reduce, include_self=False)[rows]
        for reduce in ("amin", "amax")
    )
    scaled = (entropies - low) / (high - low).clamp(min=torch.finfo(entropies.dtype).tiny)
    return (3 * torch.sigmoid(4 * scaled - 2) + 3).long()


def path_groups(paths: LabelPaths, *, num_positions: int, device: torch.device) -> RowGroups:
    """Groups of the ``num_positions`` student positions that have the same partners on the path."""
    positions, starts, counts = np.unique(paths.student, return_index=True, return_counts=True)
    first, last = paths.teacher[starts], paths.teacher[starts + counts - 1]
    is_new = np.ones(len(positions), dtype=bool)
    is_new[1:] = (first[1:] != first[:-1]) | (last[1:] != last[:-1])
    student_groups = np.full(num_positions, -1)
    student_groups[positions] = np.cumsum(is_new) - 1
    first, lengths = first[is_new], (last - first + 1)[is_new]
    teacher_groups = np.repeat(np.arange(len(first)), lengths)
    teacher_positions = np.arange(len(teacher_groups)) + np.repeat(first - (np.cumsum(lengths) - lengths), lengths)
    sides = [torch.as_tensor(ids, device=device) for ids in (student_groups, teacher_positions, teacher_groups)]
    return RowGroups(sides[0], sides[1], sides[2], count=len(first))


def _columns(pairs: TokenPairs, *, device: torch.device) -> _Columns:
    groups = np.flatnonzero(pairs.counts >= 2)
    tables, ids = [], []
    for side in (pairs.student_ids[groups], pairs.teacher_ids[groups]):
        known, columns = np.unique(side, return_inverse=True)
        num_absent = int((known < 0).sum())  # the padding, which comes first
        tables.append(torch.as_tensor(columns.reshape(side.shape) - num_absent, device=device))
        # A head of no tokens at all has no logits to cut into chunks.
        ids.append(torch.as_tensor(known[num_absent:] if len(groups) else [0], device=device))
    return _Columns(torch.as_tensor(groups, device=device), tables[0], tables[1], ids[0], ids[1])


def _narrow(head: HeadInput, groups: Tensor, ids: Tensor) -> HeadInput:
    """Rows ``groups`` of the hidden states, and of the head those tokens that are needed."""
    bias = None if head.bias is None else head.bias[ids]
    return replace(head, hidden=head.hidden[groups], weight=head.weight[ids], bias=bias)


@torch.no_grad()
def _entropies(side: SideForward) -> Tensor:
    """``[N]`` in nats."""

    def row_function(logits: tuple[Tensor, ...], _: tuple[Tensor, ...]) -> Tensor:
        log_probs = logits[0].log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    return head_rows(row_function, [head_input(side)])


def _metrics(
    reference: ChunkedLoss, distillation: ChunkedLoss, *, groups: RowGroups, columns: _Columns, pairs: TokenPairs
) -> dict[str, Ratio]:
    count = groups.student.shape[0]
    covered = torch.isin(groups.student, columns.groups).sum()
    return {
        "cross_entropy": Ratio(reference.sums[0], count),
        "student_accuracy": Ratio(reference.metrics[0], count),
        "divergence": Ratio(distillation.sums[0], groups.count),
        "token_pairs": Ratio(float(pairs.counts.sum()), groups.count),
        "dynamic_pairs": Ratio(float(pairs.num_dynamic), groups.count),
        "coverage": coverage_ratio("cdm", covered, count),
    }
