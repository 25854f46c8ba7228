"""Which likely tokens of two next-token distributions stand for each other, given both distributions.

The dynamic vocabulary map of CDM (Chen et al. 2025, arXiv 2502.11104). Axis letters: G pairs of distributions, k likely
tokens of each, P largest number of token pairs of one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist
from transformers import PreTrainedTokenizerBase

from vocabridge.alignment.nearest_tokens import token_texts
from vocabridge.alignment.vocabulary import shared_vocabulary

NO_ID = -1


@dataclass(frozen=True, slots=True, eq=False)
class TokenPairs:
    """Tokens that stand for each other; within a row no id of either side occurs twice."""

    student_ids: np.ndarray
    """int64 ``[G, P]``, -1 behind the last pair of a row."""
    teacher_ids: np.ndarray
    """int64 ``[G, P]``"""
    counts: np.ndarray
    """int64 ``[G]``: pairs of each row."""
    num_dynamic: int
    """Pairs of tokens with different bytes, in all rows."""


class DynamicMap:
    """Pairs tokens of identical bytes always, and others where both are likely and their spelling is near.

    Args:
        student_tokenizer: a fast tokenizer, or ByT5.
        teacher_tokenizer: the same.
        end_token_ids: the end tokens of student and teacher, which stand for each other.
        max_distance: bound, exclusive, on the edit distance of two tokens over the sum of their lengths in characters.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        *,
        end_token_ids: tuple[int, int],
        max_distance: float,
    ) -> None:
        self._texts = [token_texts(tokenizer) for tokenizer in (student_tokenizer, teacher_tokenizer)]
        self._lengths = [np.array([len(text or "") for text in texts], dtype=np.int64) for texts in self._texts]
        shared = shared_vocabulary(student_tokenizer, teacher_tokenizer)
        ids = np.stack((shared.student_ids, shared.teacher_ids), axis=1)
        ids = np.concatenate((ids[(ids != end_token_ids).all(axis=1)], [end_token_ids]))
        self._teacher_of, self._student_of = (np.full(len(texts), NO_ID, dtype=np.int64) for texts in self._texts)
        self._teacher_of[ids[:, 0]] = ids[:, 1]
        self._student_of[ids[:, 1]] = ids[:, 0]
        self._max_distance = max_distance

    def pairs(self, student_top: np.ndarray, teacher_top: np.ndarray) -> TokenPairs:
        """Pair the likely tokens of every row.

        A likely token of either side whose bytes the other vocabulary has is paired with that token, likely or not.
        Likely tokens without such a partner are paired among themselves, nearest spelling first, and among equally near
        ones the likeliest.

        Args:
            student_top: int64 ``[G, k]``, ids of the student's likeliest tokens, in descending order.
            teacher_top: int64 ``[G, k]``, the same of the teacher.
        """
        identical = self._identical(student_top, teacher_top)
        near = self._near(student_top, teacher_top)
        rows, student_ids, teacher_ids = np.concatenate((identical, near), axis=1)
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        counts = np.bincount(rows, minlength=len(student_top))
        slots = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
        tables = [np.full((len(counts), counts.max(initial=0)), NO_ID, dtype=np.int64) for _ in range(2)]
        for table, ids in zip(tables, (student_ids, teacher_ids), strict=True):
            table[rows, slots] = ids[order]
        return TokenPairs(tables[0], tables[1], counts, num_dynamic=near.shape[1])

    def _identical(self, student_top: np.ndarray, teacher_top: np.ndarray) -> np.ndarray:
        """int64 ``[3, n]``: row, student id and teacher id of each pair of tokens with the same bytes, once per row."""
        student_ids = np.concatenate((self._student_of[teacher_top], student_top), axis=1)
        teacher_ids = np.concatenate((teacher_top, self._teacher_of[student_top]), axis=1)
        rows, columns = np.nonzero((student_ids >= 0) & (teacher_ids >= 0))
        found = np.stack((rows, student_ids[rows, columns], teacher_ids[rows, columns]))
        # A student token has one partner, so it says which pair this is.
        _, once = np.unique(rows * len(self._texts[0]) + found[1], return_index=True)
        return found[:, once]

    def _near(self, student_top: np.ndarray, teacher_top: np.ndarray) -> np.ndarray:
        """int64 ``[3, n]``: row, student id and teacher id of tokens without a partner of the same bytes."""
        student, teacher = (
            _Likely.of(top, (partner[top] < 0) & (lengths[top] > 0))
            for top, partner, lengths in zip(
                (student_top, teacher_top), (self._teacher_of, self._student_of), self._lengths, strict=True
            )
        )
        mine, theirs = _products(student.rows, teacher.rows, num_rows=len(student_top))
        lengths = self._lengths[0][student.ids[mine]], self._lengths[1][teacher.ids[theirs]]
        possible = np.abs(lengths[0] - lengths[1]) / (lengths[0] + lengths[1]) < self._max_distance
        mine, theirs, total = mine[possible], theirs[possible], (lengths[0] + lengths[1])[possible]
        relative = self._distances(student.ids[mine], teacher.ids[theirs]) / total
        near = relative < self._max_distance
        mine, theirs, relative = mine[near], theirs[near], relative[near]
        order = np.lexsort((student.ranks[mine], teacher.ranks[theirs], relative))
        return _each_once(student, teacher, mine[order], theirs[order])

    def _distances(self, student_ids: np.ndarray, teacher_ids: np.ndarray) -> np.ndarray:
        """int64 ``[n]`` edit distances; a pair that recurs is compared once."""
        pairs, inverse = np.unique(student_ids * len(self._texts[1]) + teacher_ids, return_inverse=True)
        distances = cpdist(
            [self._texts[0][i] for i in pairs // len(self._texts[1])],
            [self._texts[1][i] for i in pairs % len(self._texts[1])],
            scorer=Levenshtein.distance,
            dtype=np.int64,
        )
        return distances[inverse]


@dataclass(frozen=True, slots=True, eq=False)
class _Likely:
    """Likely tokens of one side in all rows, by row."""

    rows: np.ndarray
    """int64 ``[n]``"""
    ids: np.ndarray
    """int64 ``[n]``"""
    ranks: np.ndarray
    """int64 ``[n]``: 0 for the likeliest of a row."""

    @classmethod
    def of(cls, top: np.ndarray, kept: np.ndarray) -> _Likely:
        rows, ranks = np.nonzero(kept)
        return cls(rows, top[rows, ranks], ranks)


def _products(left_rows: np.ndarray, right_rows: np.ndarray, *, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices ``[n]`` into both of all pairs of elements in the same row; rows ascend."""
    counts = np.bincount(right_rows, minlength=num_rows)
    starts = np.cumsum(counts) - counts
    repeats = counts[left_rows]
    left = np.repeat(np.arange(len(left_rows)), repeats)
    within = np.arange(len(left)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    return left, starts[left_rows[left]] + within


def _each_once(student: _Likely, teacher: _Likely, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """int64 ``[3, n]``: of candidate pairs in order of preference, those whose tokens are both still free."""
    free_mine, free_theirs = [True] * len(student.ids), [True] * len(teacher.ids)
    taken = []
    for i, j in zip(mine.tolist(), theirs.tolist(), strict=True):
        if free_mine[i] and free_theirs[j]:
            free_mine[i] = free_theirs[j] = False
            taken.append((i, j))
    left, right = np.array(taken, dtype=np.int64).reshape(-1, 2).T
    return np.stack((student.rows[left], student.ids[left], teacher.ids[right]))
