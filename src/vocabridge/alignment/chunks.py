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
    student = np.asarray(student_spans, dtype=np.int64).reshape(-1, 2)
    teacher = np.asarray(teacher_spans, dtype=np.int64).reshape(-1, 2)
    partitioned = _number_partitions(student, teacher)
    return _number_segments(student, teacher) if partitioned is None else partitioned


def _number_partitions(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The usual case in half of the steps: on both sides every token has bytes and starts where the last one ended.

    Returns:
        Of each token, how many common ends lie before it; None in any other case.
    """
    if not (len(student) and len(teacher) and student[0, 0] == teacher[0, 0] and student[-1, 1] == teacher[-1, 1]):
        return None
    num_bytes = int(student[-1, 1])
    student_ends, teacher_ends = _partition_ends(student, num_bytes), _partition_ends(teacher, num_bytes)
    if student_ends is None or teacher_ends is None:
        return None
    common_ends: np.ndarray = (student_ends & teacher_ends).astype(np.int64).cumsum()
    return common_ends[student[:, 0]], common_ends[teacher[:, 0]]


def _partition_ends(spans: np.ndarray, num_bytes: int) -> np.ndarray | None:
    """[num_bytes + 1] bool: where a token ends; None unless the tokens have bytes and leave none out."""
    starts, ends = spans[:, 0], spans[:, 1]
    if np.count_nonzero(starts[1:] != ends[:-1]):
        return None
    is_end = np.zeros(num_bytes + 1, dtype=bool)
    is_end[ends] = True
    # An empty token ends where the one before it does or, in front, where the text starts.
    has_empty = np.count_nonzero(is_end) < len(spans) or is_end[starts[0]]
    return None if has_empty else is_end


def _number_segments(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut the bytes where no token lies across, and number the segments with tokens of both sides."""
    both = np.concatenate((student, teacher))
    is_filled = both[:, 1] > both[:, 0]
    starts, ends = both[is_filled, 0], both[is_filled, 1]
    size = int(ends.max(initial=0)) + 1
    crossing = np.bincount(starts + 1, minlength=size)  # tokens that begin before a byte position and end behind it
    crossing -= np.bincount(ends, minlength=size)
    segment_of = np.cumsum(crossing.cumsum() == 0)  # of each byte: how many cuts lie at or before it
    segments = segment_of[starts]
    of_student = np.count_nonzero(is_filled[: len(student)])
    with_student, is_chunk = np.zeros((2, int(segment_of[-1]) + 1), dtype=bool)
    with_student[segments[:of_student]] = True
    is_chunk[segments[of_student:]] = True
    is_chunk &= with_student
    numbers = np.where(is_chunk, is_chunk.cumsum() - 1, -1)[segments]
    return (
        _spread(numbers[:of_student], is_filled[: len(student)]),
        _spread(numbers[of_student:], is_filled[len(student) :]),
    )


def _spread(numbers: np.ndarray, is_filled: np.ndarray) -> np.ndarray:
    """Spread the numbers of tokens with bytes over all tokens, empty ones taking the next token's."""
    if len(numbers) == len(is_filled):
        return numbers
    following: np.ndarray = is_filled.cumsum() - is_filled  # index of this or the next token with bytes
    return np.append(numbers, -1)[following]
