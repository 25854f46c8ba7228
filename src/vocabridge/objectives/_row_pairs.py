"""Which student row is compared with which teacher row by objectives that take the rows as they are.

Axis letters: B examples, N / M packed student / teacher positions, R_s / R_t positions of the longest example, n pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vocabridge.losses.chunk_rows import ChunkRows, chunk_rows
from vocabridge.losses.cross_attention import Padding
from vocabridge.models.forward import SideForward, SupervisedTokens
from vocabridge.pairs import PairBatch


@dataclass(frozen=True, slots=True, eq=False)
class RowPairs:
    """Packed positions that are compared, in ascending order; no position occurs twice."""

    student: Tensor
    """``[n]``"""
    teacher: Tensor
    """``[n]``"""

    @property
    def count(self) -> int:
        """How many."""
        return self.student.shape[0]


def row_pairs(
    alignment: Literal["chunks", "index"], student: SideForward, teacher: SideForward, batch: PairBatch
) -> RowPairs:
    """Pair the first row of every byte-exact chunk, or the k-th supervised rows of both sides.

    Of all rows of a chunk, the first is where both models have read exactly the same text; behind it one of them has
    read more than the other, so its distribution says something else.
    """
    if alignment == "index":
        return _by_index(student.rows, teacher.rows, batch["input_ids"].shape[0])
    chunks = chunk_rows(student.rows, batch["chunk_ids"], teacher.rows, batch["teacher_chunk_ids"])
    return RowPairs(chunks.student.starts, chunks.teacher.starts)


def _by_index(student_rows: Tensor, teacher_rows: Tensor, num_examples: int) -> RowPairs:
    student_counts = torch.bincount(student_rows, minlength=num_examples)
    teacher_counts = torch.bincount(teacher_rows, minlength=num_examples)
    student_starts, teacher_starts = (
        student_counts.cumsum(0) - student_counts,
        teacher_counts.cumsum(0) - teacher_counts,
    )
    columns = torch.arange(student_rows.shape[0], device=student_rows.device) - student_starts[student_rows]
    kept = (columns < teacher_counts[student_rows]).nonzero().squeeze(1)
    return RowPairs(kept, (teacher_starts[student_rows] + columns)[kept])


def same_token_pairs(
    student: SideForward | SupervisedTokens,
    teacher: SideForward | SupervisedTokens,
    batch: PairBatch,
    *,
    student_keys: Tensor,
    teacher_keys: Tensor,
) -> RowPairs:
    """Pair the positions where both models predict the same token after the same bytes.

    They are the k-th positions of chunks with equally many tokens on both sides whose labels are the same token. Every
    token that both sides cut alike is a chunk of its own; some longer chunks qualify too (a space marker without bytes
    and the word behind it). The first token of a response is left out where one side's template put a space into it.
    End tokens pair by role, whatever their keys.

    Args:
        student: ``student_keys`` has one key for each of its N positions.
        teacher: ``teacher_keys`` has one key for each of its M positions.
        batch: chunks and spans of all examples.
        student_keys: ``[N]`` what the label stands for, comparable between the sides; -1 equals nothing.
        teacher_keys: ``[M]``.
    """
    chunks = chunk_rows(student.rows, batch["chunk_ids"], teacher.rows, batch["teacher_chunk_ids"])
    equally_long = chunks.student.lengths == chunks.teacher.lengths
    chunk = chunks.student.chunks
    mine = (chunk >= 0).nonzero().squeeze(1)
    mine = mine[equally_long[chunk[mine]]]
    theirs = mine + (chunks.teacher.starts - chunks.student.starts)[chunk[mine]]
    is_same = (student_keys[mine] == teacher_keys[theirs]) & (student_keys[mine] >= 0)
    is_same |= _ends_response(student, batch, chunks)[mine]
    return RowPairs(mine[is_same], theirs[is_same])


def _ends_response(student: SideForward | SupervisedTokens, batch: PairBatch, chunks: ChunkRows) -> Tensor:
    """``[N]`` bool: positions that predict the end token, the only token without bytes that is alone in its chunk."""
    spans = Padding.of(student.rows, batch["spans"].shape[0]).pack(batch["spans"])  # [N, 2]
    chunk = chunks.student.chunks
    is_alone = torch.cat([chunks.one_to_one, chunks.one_to_one.new_zeros(1)])[chunk]  # -1 takes the appended False
    return is_alone & (spans[:, 0] == spans[:, 1])
