"""Chunks: the finest common segmentation of one text by two tokenizations."""

from __future__ import annotations

import numpy as np


def chunk_ids(student_spans: np.ndarray, teacher_spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the minimal pairs of token ranges that cover the same bytes.

    A byte position is a cut of one side when no token of that side lies across it (between two tokens, and anywhere in
    bytes that no token covers). The text is cut at every common cut; a segment with bytes of both sides is a chunk.
    Tokens of a segment that the other side does not cover at all are in no chunk. Empty tokens (synthetic markers) go
    with the token that follows them; trailing ones are in no chunk, since only their role says what they pair with.

    Args:
        student_spans: int64 [n, 2], half-open byte spans, starts and ends non-decreasing; spans may overlap, leave gaps
            and be empty.
        teacher_spans: int64 [m, 2], the same bytes under the other tokenizer.

    Returns:
        Chunk index of each student token [n] and teacher token [m], int64, consecutive from 0 in text order, -1 for
        tokens in no chunk. Linear in tokens and bytes, without a sort.

    >>> student, teacher = chunk_ids(np.array([[0, 1], [1, 3], [3, 4]]), np.array([[0, 3], [3, 4]]))
    >>> student.tolist(), teacher.tolist()
    ([0, 0, 1], [0, 1])
    """
    sides = [np.asarray(spans, dtype=np.int64).reshape(-1, 2) for spans in (student_spans, teacher_spans)]
    filled = [side[side[:, 1] > side[:, 0]] for side in sides]
    size = max((int(side[-1, 1]) for side in filled if len(side)), default=0) + 1
    is_cut = ~(_crossed(filled[0], size) | _crossed(filled[1], size))
    segment_of = np.cumsum(is_cut)  # of each byte: how many cuts lie at or before it
    segments = [segment_of[side[:, 0]] for side in filled]
    counted = [np.bincount(segment, minlength=int(segment_of[-1]) + 1) > 0 for segment in segments]
    is_chunk = counted[0] & counted[1]
    numbers = np.where(is_chunk, np.cumsum(is_chunk) - 1, -1)
    student, teacher = (_number(side, numbers[segment]) for side, segment in zip(sides, segments, strict=True))
    return student, teacher


def _crossed(spans: np.ndarray, size: int) -> np.ndarray:
    """[size] bool: byte positions with a token that begins before and ends behind them."""
    begun = np.bincount(spans[:, 0] + 1, minlength=size)
    begun -= np.bincount(spans[:, 1], minlength=size)
    return np.cumsum(begun, out=begun) > 0


def _number(spans: np.ndarray, filled_numbers: np.ndarray) -> np.ndarray:
    """Spread the numbers of tokens with bytes over all tokens, empty ones taking the next token's."""
    is_filled = spans[:, 1] > spans[:, 0]
    following: np.ndarray = np.cumsum(is_filled) - is_filled  # index of this or the next token with bytes
    return np.append(filled_numbers, -1)[following].astype(np.int64)
