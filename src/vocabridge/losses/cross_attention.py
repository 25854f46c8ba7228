"""Cross-model attention over packed rows: student tokens (queries) attend to teacher tokens (keys) of their example.

Axis letters: B examples, N / M packed student / teacher positions, R_s / R_t positions of the longest example,
F features. Packed tensors are ordered by example, then position; ``rows`` names the example of each position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vocabridge.losses.chunk_rows import ChunkRows, segment_mean


@dataclass(frozen=True, slots=True)
class Padding:
    """Where each packed position stands in the padded [B, R] layout."""

    rows: Tensor
    """[N] example index."""
    columns: Tensor
    """[N] position inside the example."""
    mask: Tensor
    """[B, R] bool, True where a position exists."""

    @classmethod
    def of(cls, rows: Tensor, num_examples: int) -> Padding:
        """Layout of packed positions ``rows [N]`` (sorted) for ``num_examples`` examples."""
        counts = torch.bincount(rows, minlength=num_examples)
        starts = counts.cumsum(0) - counts
        columns = torch.arange(rows.shape[0], device=rows.device) - starts[rows]
        longest = int(counts.max()) if rows.numel() else 0
        mask = torch.arange(longest, device=rows.device)[None, :] < counts[:, None]
        return cls(rows, columns, mask)

    def pad(self, packed: Tensor) -> Tensor:
        """``[N, F] -> [B, R, F]`` with zeros where there is no position."""
        padded = packed.new_zeros(*self.mask.shape, packed.shape[-1])
        return padded.index_put((self.rows, self.columns), packed)

    def pack(self, padded: Tensor) -> Tensor:
        """``[B, R, ...] -> [N, ...]``."""
        return padded[self.rows, self.columns]

    def relative_positions(self, dtype: torch.dtype) -> Tensor:
        """``[B, R]``: position k = 1..n of an example with n positions is at k/n."""
        indices = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device, dtype=dtype)
        return indices / self.mask.sum(1, keepdim=True).clamp(min=1)


def attention_weights(scores: Tensor, key_mask: Tensor) -> Tensor:
    """Softmax of ``scores [B, R_q, R_k]`` over existing keys (``key_mask [B, R_k]`` or ``[B, R_q, R_k]``), in fp32.

    A query without any key gets all-zero weights rather than the uniform attention that an additive mask gives.
    """
    allowed = key_mask if key_mask.dim() == 3 else key_mask[:, None, :]
    return _masked(scores, allowed).softmax(-1).masked_fill(~allowed, 0.0)


def _masked(scores: Tensor, allowed: Tensor) -> Tensor:
    promoted = scores if scores.dtype == torch.float64 else scores.float()
    return promoted.masked_fill(~allowed, torch.finfo(promoted.dtype).min)


@dataclass(frozen=True, slots=True, eq=False)
class CrossAttention:
    """Both directions of an attention between the two sides of a micro-batch, from one set of scores."""

    scores: Tensor
    """``[B, R_s, R_t]``"""
    allowed: Tensor
    """``[B, R_s, R_t]`` bool: pairs of existing positions that may see each other."""
    student_weights: Tensor
    """``[B, R_s, R_t]`` of each student position over the teacher's; rows sum to 1, or to 0 where none is allowed."""
    teacher_weights: Tensor
    """``[B, R_t, R_s]``"""
    student: Padding
    teacher: Padding

    @classmethod
    def of(cls, scores: Tensor, allowed: Tensor | None, *, student: Padding, teacher: Padding) -> CrossAttention:
        """Softmax of ``scores [B, R_s, R_t]`` both ways, over existing (and ``allowed``) positions only."""
        exists = student.mask[:, :, None] & teacher.mask[:, None, :]
        allowed = exists if allowed is None else exists & allowed
        to_student = attention_weights(scores, allowed)
        to_teacher = attention_weights(scores.transpose(1, 2), allowed.transpose(1, 2))
        return cls(scores, allowed, to_student, to_teacher, student, teacher)

    @property
    def student_covered(self) -> Tensor:
        """``[N]`` bool: may see a teacher position."""
        return self.student.pack(self.allowed.any(2))

    @property
    def teacher_covered(self) -> Tensor:
        """``[M]`` bool."""
        return self.teacher.pack(self.allowed.any(1))

    def to_student(self, values: Tensor) -> Tensor:
        """``[M, F]`` of teacher positions to ``[N, F]`` of student positions."""
        return self.student.pack(self.student_weights.to(values.dtype) @ self.teacher.pad(values))

    def to_teacher(self, values: Tensor) -> Tensor:
        """``[N, F] -> [M, F]``."""
        return self.teacher.pack(self.teacher_weights.to(values.dtype) @ self.student.pad(values))

    def student_scores(self, positions: Tensor) -> Tensor:
        """Scores ``[n, R_t]`` of packed student ``positions [n]``, the lowest finite number where not allowed."""
        at = self.student.rows[positions], self.student.columns[positions]
        return _masked(self.scores[at], self.allowed[at])


@dataclass(frozen=True, slots=True, eq=False)
class ChunkMeans:
    """Uniform attention inside the chunk: every position gets the mean over the other side's positions of its chunk."""

    chunks: ChunkRows

    @property
    def student_covered(self) -> Tensor:
        """``[N]`` bool: lies in a chunk."""
        return self.chunks.student.chunks >= 0

    @property
    def teacher_covered(self) -> Tensor:
        """``[M]`` bool."""
        return self.chunks.teacher.chunks >= 0

    def to_student(self, values: Tensor) -> Tensor:
        """``[M, F]`` of teacher positions to ``[N, F]`` of student positions; 0 where not covered."""
        return self._mean(values, self.chunks.teacher.chunks, self.chunks.student.chunks)

    def to_teacher(self, values: Tensor) -> Tensor:
        """``[N, F] -> [M, F]``."""
        return self._mean(values, self.chunks.student.chunks, self.chunks.teacher.chunks)

    def _mean(self, values: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        means = segment_mean(values, sources, self.chunks.num_chunks)
        return torch.cat([means, means.new_zeros(1, means.shape[1])])[targets]  # -1 reads the last row


def same_chunk(student_chunk_ids: Tensor, teacher_chunk_ids: Tensor) -> Tensor:
    """``[B, R_s], [B, R_t] -> [B, R_s, R_t]`` bool: both positions lie in one chunk; -1 is none."""
    return (student_chunk_ids[:, :, None] == teacher_chunk_ids[:, None, :]) & (student_chunk_ids >= 0)[:, :, None]


def position_distance(student: Padding, teacher: Padding, *, dtype: torch.dtype) -> Tensor:
    """``|j/m - i/n|`` of student position i = 1..n and teacher position j = 1..m of an example, ``[B, R_s, R_t]``."""
    student_at, teacher_at = student.relative_positions(dtype), teacher.relative_positions(dtype)
    return (teacher_at[:, None, :] - student_at[:, :, None]).abs()


def scalar_std(packed: Tensor, rows: Tensor | None, num_examples: int) -> Tensor:
    """One standard deviation (n-1) over all elements of ``packed [N, F]``; with ``rows`` one per example, ``[N, 1]``.

    Per example it does not depend on which examples share the micro-batch, so gradient accumulation and data
    parallelism stay exact; over the whole batch (``rows=None``) it is the published form.
    """
    values = packed if packed.dtype == torch.float64 else packed.float()
    if rows is None:
        return values.std()
    width = values.shape[-1]
    elements = (torch.bincount(rows, minlength=num_examples) * width).clamp(min=2).to(values.dtype)
    mean = values.new_zeros(num_examples).index_add(0, rows, values.sum(-1)) / elements
    squared = (values - mean[rows][:, None]).square().sum(-1)
    variance = values.new_zeros(num_examples).index_add(0, rows, squared) / (elements - 1)
    return variance.sqrt()[rows][:, None]
