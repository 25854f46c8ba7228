"""Byte-exact chunks as ranges of packed positions, on both sides of a micro-batch.

Axis letters: B examples, N / M packed student / teacher positions (ordered by example, then position), R_s / R_t
positions of the longest example, C chunks of the whole micro-batch (ordered by example, then text).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """Where one side's packed positions of each chunk lie; those of one chunk follow each other."""

    starts: Tensor
    """``[C]`` first packed position."""
    lengths: Tensor
    """``[C]`` number of positions, at least 1."""
    chunks: Tensor
    """``[N]`` chunk of each packed position, -1 in none."""

    @property
    def ends(self) -> Tensor:
        """``[C]`` packed position after the last one."""
        return self.starts + self.lengths

    @property
    def last(self) -> Tensor:
        """``[C]`` last packed position."""
        return self.starts + self.lengths - 1


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRows:
    """The chunks of a micro-batch."""

    student: Ranges
    teacher: Ranges
    rows: Tensor
    """``[C]`` example of each chunk."""

    @property
    def num_chunks(self) -> int:
        """C."""
        return self.rows.shape[0]

    @property
    def one_to_one(self) -> Tensor:
        """``[C]`` bool: one token on either side."""
        return (self.student.lengths == 1) & (self.teacher.lengths == 1)

    @property
    def covered(self) -> int:
        """Student positions that lie in a chunk."""
        return int((self.student.chunks >= 0).sum())


def chunk_rows(
    student_rows: Tensor, student_chunk_ids: Tensor, teacher_rows: Tensor, teacher_chunk_ids: Tensor
) -> ChunkRows:
    """Number the chunks of a micro-batch and find their positions.

    Args:
        student_rows: ``[N]`` example of each packed student position.
        student_chunk_ids: ``[B, R_s]`` chunk of each position within its example, -1 in none and on padding; every
            chunk has positions on both sides.
        teacher_rows: ``[M]``.
        teacher_chunk_ids: ``[B, R_t]``.
    """
    num_examples = student_chunk_ids.shape[0]
    per_example = student_chunk_ids.amax(1) + 1 if student_chunk_ids.shape[1] else student_rows.new_zeros(num_examples)
    offsets = per_example.cumsum(0) - per_example
    num_chunks = int(per_example.sum())
    sides = [
        _ranges(rows, ids, offsets, num_chunks)
        for rows, ids in ((student_rows, student_chunk_ids), (teacher_rows, teacher_chunk_ids))
    ]
    rows = torch.arange(num_examples, device=student_rows.device).repeat_interleave(per_example, output_size=num_chunks)
    return ChunkRows(sides[0], sides[1], rows)


def _ranges(rows: Tensor, chunk_ids: Tensor, offsets: Tensor, num_chunks: int) -> Ranges:
    counts = torch.bincount(rows, minlength=chunk_ids.shape[0])
    columns = torch.arange(rows.shape[0], device=rows.device) - (counts.cumsum(0) - counts)[rows]
    ids = chunk_ids[rows, columns]
    chunks = torch.where(ids >= 0, ids + offsets[rows], -1)
    inside = (chunks >= 0).nonzero().squeeze(1)
    lengths = torch.bincount(chunks[inside], minlength=num_chunks)
    # Packed positions in chunks are ordered by chunk, so each chunk begins where those before it end.
    starts = inside[(lengths.cumsum(0) - lengths)] if num_chunks else lengths
    return Ranges(starts, lengths, chunks)


def segment_sum(values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Sums ``[num_segments, ...]`` of ``values [N, ...]`` by ``segments [N]``; those of segment -1 are left out."""
    # One more segment takes what is left out: no data-dependent shape.
    index = torch.where(segments >= 0, segments, num_segments)
    sums = values.new_zeros(num_segments + 1, *values.shape[1:]).index_add(0, index, values)
    return sums[:num_segments]


def segment_mean(values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Means ``[num_segments, ...]`` of ``values [N, ...]`` by ``segments [N]``; 0 for a segment without values."""
    counts = segment_sum(torch.ones_like(segments, dtype=values.dtype), segments, num_segments).clamp(min=1)
    return segment_sum(values, segments, num_segments) / counts.view(-1, *[1] * (values.dim() - 1))
