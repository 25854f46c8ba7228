"""Which logits columns of the two sides stand for the same token.

Axis letters: n rows, V_s / V_t vocabularies, k column pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vocabridge.alignment import shared_vocabulary, token_bytes
from vocabridge.objectives.base import ObjectiveSetup


@dataclass(frozen=True, slots=True, eq=False)
class ColumnPairs:
    """Ids that stand for the same token, pair by pair; each at most once on its side."""

    student: Tensor
    """``[k]`` int64"""
    teacher: Tensor
    """``[k]`` int64"""


def common_columns(size: int, student_end: int, teacher_end: int) -> ColumnPairs:
    """The first ``size`` ids of a common tokenizer with themselves, but the two end tokens with each other.

    The id that the student ends with may have another role on the teacher's side and the other way round; those two
    are paired as well. An end token at or beyond ``size``, which the other side lacks, is brought in for its partner.
    """
    student, teacher = torch.arange(size), torch.arange(size)
    if student_end < size:
        teacher[student_end] = teacher_end
        if teacher_end < size:
            teacher[teacher_end] = student_end
    else:
        student[teacher_end] = student_end
    return ColumnPairs(student, teacher)


def shared_columns(setup: ObjectiveSetup) -> ColumnPairs:
    """The ids of all tokens whose bytes both vocabularies have, by ascending student id, then the two end tokens."""
    assert setup.teacher_tokenizer is not None
    shared = shared_vocabulary(setup.student_tokenizer, setup.teacher_tokenizer)
    ends = setup.end_token_ids
    is_text = (shared.student_ids != ends[0]) & (shared.teacher_ids != ends[1])  # some models end with a text token
    student, teacher = (
        torch.cat([torch.from_numpy(ids[is_text]), torch.tensor([end])])
        for ids, end in zip((shared.student_ids, shared.teacher_ids), ends, strict=True)
    )
    return ColumnPairs(student, teacher)


def byte_keys(setup: ObjectiveSetup) -> tuple[Tensor, Tensor]:
    """A number for the bytes of each id, ``[V_s]`` and ``[V_t]``: equal where the bytes are; -1 for control tokens."""
    assert setup.teacher_tokenizer is not None
    return tokenizer_byte_keys(setup.student_tokenizer, setup.teacher_tokenizer)


def tokenizer_byte_keys(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """:func:`byte_keys` of two tokenizers."""
    known: dict[bytes, int] = {}
    student, teacher = (
        torch.tensor([-1 if piece is None else known.setdefault(piece, len(known)) for piece in token_bytes(tokenizer)])
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    )
    return student, teacher


def take_columns(logits: Tensor, columns: Tensor) -> Tensor:
    """``[n, k]``: the given columns ``[k]`` of ``logits [n, V]``."""
    return logits.gather(1, columns.to(logits.device).expand(len(logits), -1))  # the fastest backward of all ways
