"""Cross-entropy on every student position and a loss on every chunk that sees all its rows on both sides.

Legend: N / M packed student / teacher positions, C chunks of the micro-batch; in a block of whole chunks n / m
positions and c chunks; V_s / V_t vocabularies.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from vocabridge.losses.chunk_rows import ChunkRows, Ranges
from vocabridge.losses.chunked_head import (
    DEFAULT_CHUNK_BYTES,
    TENSORS_PER_INPUT,
    HeadInput,
    chunked_head_loss,
    constant_logits,
)
from vocabridge.losses.paired_rows import PairedLoss, head_at, reference_rows, with_unpaired

_BLOCK_BYTES = 2 * DEFAULT_CHUNK_BYTES
"""More than elsewhere, as what the losses make of the logits counts as well: the products would have too few rows."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkLogits:
    """All rows of c chunks on both sides."""

    student: Tensor
    """``[n, V_s]``, with gradient."""
    teacher: Tensor
    """``[m, V_t]``, constant."""
    student_chunks: Tensor
    """``[n]`` chunk of each row, 0 to c - 1, ascending."""
    teacher_chunks: Tensor
    """``[m]``"""
    num_chunks: int
    """c; may be 0."""


ChunkLosses = Callable[[ChunkLogits], tuple[list[Tensor], list[Tensor]]]
"""``block -> (losses [c] each, metrics [c] each)``; each chunk's from its own rows only."""


def paired_chunks_loss(
    student: HeadInput,
    labels: Tensor,
    teacher: HeadInput,
    *,
    chunks: ChunkRows,
    chunk_losses: ChunkLosses,
    weights: Sequence[float],
    kd_weight: float,
    chunk_bytes: int = _BLOCK_BYTES,
) -> PairedLoss:
    """Apply each head once, in blocks of whole chunks: to all student positions, and to the teacher's that lie in one.

    Args:
        student: all N positions.
        labels: ``[N]`` student ids.
        teacher: all M positions.
        chunks: of the micro-batch.
        chunk_losses: see :data:`ChunkLosses`.
        weights: factor of each chunk loss within the distillation part.
        kd_weight: share of the distillation part.
        chunk_bytes: rough bound on the logits-sized tensors of one block; a single chunk may exceed it.

    Returns:
        Sums over positions and chunks; without chunks the distillation part is an exact 0 with a gradient path.
    """
    inside = _inside(chunks.student)
    blocks = _Blocks(chunks, constant_logits(head_at(teacher, _inside(chunks.teacher))), chunk_losses)
    paired = chunked_head_loss(
        blocks.rows,
        [head_at(student, inside)],
        [labels[inside], torch.arange(len(inside))],
        weights=[1 - kd_weight, *(kd_weight * weight for weight in weights)],
        chunk_bytes=int(chunk_bytes * _student_share(student, teacher, blocks)),
        group_starts=blocks.student_starts[:-1],
    )
    is_paired = chunks.student.chunks >= 0
    return with_unpaired(paired, student, labels, is_paired=is_paired, kd_weight=kd_weight, chunk_bytes=chunk_bytes)


class _Blocks:
    """Turns the losses of whole chunks into losses of student rows: each chunk's stands at its first row."""

    def __init__(self, chunks: ChunkRows, teacher_logits: Callable[[slice], Tensor], chunk_losses: ChunkLosses) -> None:
        self._teacher_logits = teacher_logits
        self._chunk_losses = chunk_losses
        self.student_starts, self.teacher_starts = (
            list(accumulate(side.lengths.tolist(), initial=0)) for side in (chunks.student, chunks.teacher)
        )
        self._student_chunks, self._teacher_chunks = (
            torch.arange(chunks.num_chunks, device=side.lengths.device).repeat_interleave(
                side.lengths, output_size=size
            )
            for side, size in (
                (chunks.student, self.student_starts[-1]),
                (chunks.teacher, self.teacher_starts[-1]),
            )
        )

    def rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Of whole chunks: cross-entropy, then the chunk losses; whether the label is the most likely, then metrics."""
        (own,), (labels, positions) = logits, rows
        # The positions are on the CPU, so that reading one does not wait for the device.
        start = int(positions[0]) if len(positions) else 0
        first, last = (bisect_left(self.student_starts, position) for position in (start, start + len(positions)))
        students = slice(start, start + len(positions))
        teachers = slice(self.teacher_starts[first], self.teacher_starts[last])
        local = self._student_chunks[students] - first
        losses, metrics = self._chunk_losses(
            ChunkLogits(
                own, self._teacher_logits(teachers), local, self._teacher_chunks[teachers] - first, last - first
            )
        )
        is_first = torch.ones_like(local, dtype=torch.bool)
        is_first[1:] = local[1:] != local[:-1]
        reference, right = reference_rows(logits, (labels,))
        return (
            [*reference, *(_spread(loss, local, is_first) for loss in losses)],
            [*right, *(_spread(metric, local, is_first) for metric in metrics)],
        )


def _spread(values: Tensor, local: Tensor, is_first: Tensor) -> Tensor:
    """``[n]``: each chunk's value ``[c]`` at its first row, 0 at the others."""
    return torch.where(is_first, values[local], 0.0)


def _student_share(student: HeadInput, teacher: HeadInput, blocks: _Blocks) -> float:
    """Share of a block's logits that are the student's, on the average of the micro-batch."""
    own = TENSORS_PER_INPUT * len(student.weight) * blocks.student_starts[-1]
    theirs = TENSORS_PER_INPUT * len(teacher.weight) * blocks.teacher_starts[-1]
    return own / max(own + theirs, 1)


def _inside(ranges: Ranges) -> Tensor:
    return (ranges.chunks >= 0).nonzero().squeeze(1)
