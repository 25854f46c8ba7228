"""Label tokens of both sides paired by dynamic time warping over their spelling, for objectives that align so.

Axis letters: N / M packed student / teacher positions, K pairs on all paths of a micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from transformers import PreTrainedTokenizerBase

from vocabridge.alignment.dtw import warping_path
from vocabridge.alignment.nearest_tokens import token_texts
from vocabridge.models.forward import SideForward
from vocabridge.objectives.base import ObjectiveSetup


@dataclass(frozen=True, slots=True, eq=False)
class LabelPaths:
    """The paths of all examples, one after another; both columns ascend."""

    student: np.ndarray
    """int64 ``[K]`` packed student positions; each position of an example with labels on both sides occurs."""
    teacher: np.ndarray
    """int64 ``[K]``"""


class LabelSpellings:
    """What the distance between two label tokens is taken over: their text without spaces.

    Control tokens have an empty text, so the two end tokens, whatever their spelling, are at distance 0.
    """

    def __init__(self, setup: ObjectiveSetup) -> None:
        assert setup.teacher_tokenizer is not None
        self._student = _spellings(setup.student_tokenizer)
        self._teacher = _spellings(setup.teacher_tokenizer)

    def paths(
        self,
        student: SideForward,
        teacher: SideForward,
        *,
        student_weights: np.ndarray | None = None,
        teacher_weights: np.ndarray | None = None,
    ) -> LabelPaths:
        """Pair the labels of every example by the cheapest path; runs on the CPU.

        Args:
            student: N positions.
            teacher: M positions.
            student_weights: integers ``[N]`` that multiply the cost of a pair.
            teacher_weights: integers ``[M]``, the same.
        """
        labels = [side.labels.cpu().numpy() for side in (student, teacher)]
        weights = [
            np.ones(len(given), dtype=np.int64) if side is None else side
            for side, given in zip((student_weights, teacher_weights), labels, strict=True)
        ]
        found = [np.empty((0, 2), dtype=np.int64)]
        for mine, theirs in _examples(student, teacher):
            distances = cdist(
                [self._teacher[label] for label in labels[1][theirs]],
                [self._student[label] for label in labels[0][mine]],
                scorer=Levenshtein.distance,
                dtype=np.int64,
            ).reshape(theirs.stop - theirs.start, mine.stop - mine.start)
            path = warping_path(distances * weights[1][theirs, None] * weights[0][mine])
            found.append(path[:, ::-1] + (mine.start, theirs.start))
        pairs = np.concatenate(found)
        return LabelPaths(pairs[:, 0], pairs[:, 1])


def _examples(student: SideForward, teacher: SideForward) -> Iterator[tuple[slice, slice]]:
    """The packed positions of each example on both sides."""
    rows = [side.rows.cpu().numpy() for side in (student, teacher)]
    num_examples = max((int(side[-1]) + 1 for side in rows if len(side)), default=0)
    starts = [np.searchsorted(side, np.arange(num_examples + 1)).tolist() for side in rows]
    for mine, theirs in zip(*(itertools.pairwise(side) for side in starts), strict=True):
        yield slice(*mine), slice(*theirs)


def _spellings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [(text or "").replace(" ", "") for text in token_texts(tokenizer)]
