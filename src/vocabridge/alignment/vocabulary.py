"""Which ids of two vocabularies stand for the same bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from vocabridge.alignment.prepared import PreparedTokenizer, prepare


@dataclass(frozen=True, slots=True, eq=False)
class SharedVocabulary:
    """Pairs of ids with identical byte strings; each id occurs once at most.

    Attributes:
        student_ids: int64 [k], ascending.
        teacher_ids: int64 [k], the partner of each student id.
    """

    student_ids: np.ndarray
    teacher_ids: np.ndarray


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each id stands for in text.

    A space marker counts as a space, ``<0xNN>`` as its byte, a continuing piece of a word without its prefix.

    Args:
        tokenizer: a fast tokenizer, or ByT5.

    Returns:
        A list over all ids; None for control, unknown and unused ids.

    Raises:
        UserError: The tokenizer is not covered.
    """
    return prepare(tokenizer, check_size=True).table.text_bytes()


def shared_vocabulary(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> SharedVocabulary:
    """Pair the ids of two vocabularies that stand for the same bytes, control tokens left out.

    Where several ids of a side have the same bytes, an ordinary piece comes before a byte-fallback piece (``A`` before
    ``<0x41>``, which is hardly ever used), then the lowest id.

    Args:
        student_tokenizer: a fast tokenizer, or ByT5.
        teacher_tokenizer: the same.

    Returns:
        The pairs, by ascending student id.

    Raises:
        UserError: A tokenizer is not covered.
    """
    student = first_id_by_bytes(prepare(student_tokenizer, check_size=True))
    teacher = first_id_by_bytes(prepare(teacher_tokenizer, check_size=True))
    pairs = sorted((student_id, teacher[piece]) for piece, student_id in student.items() if piece in teacher)
    ids = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return SharedVocabulary(ids[:, 0].copy(), ids[:, 1].copy())


def first_id_by_bytes(prepared: PreparedTokenizer) -> dict[bytes, int]:
    """The preferred id of each byte string, by the rules of `shared_vocabulary`."""
    data = prepared.table.text_bytes()
    fallback = sorted(prepared.table.fallback_ids)
    ordinary = [token_id for token_id in range(len(data)) if token_id not in prepared.table.fallback_ids]
    # Later entries win, so the preferred ones come last.
    return {piece: i for i in (*reversed(fallback), *reversed(ordinary)) if (piece := data[i])}
