"""Examples with random chunks and attention, made without the package's own alignment."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from vocabridge.analysis.attention import ATTENTION_NAMES, ExampleAttention, SideTokens

CUTS = ((1, 1), (1, 3), (2, 1), (3, 2), (0, 1), (1, 0))
"""Student and teacher tokens of a segment; one with none on a side is no chunk."""


def random_example(seed: int, *, num_segments: int = 9, attends: float = 1.0) -> ExampleAttention:
    """Segments of 6 bytes, each cut into tokens of its own; the end tokens come last. Ids repeat often."""
    rng = np.random.default_rng(seed)
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    chunk = 0
    for segment in range(num_segments):
        counts = CUTS[rng.integers(len(CUTS))] if segment else CUTS[0]
        is_chunk = min(counts) > 0
        for side, count in zip(sides, counts, strict=True):
            edges = [6 * segment, *sorted(rng.choice(np.arange(1, 6), max(count - 1, 0), replace=False) + 6 * segment)]
            edges.append(6 * segment + 6)
            for start, end in list(pairwise(edges))[:count]:
                side.append([start, end, chunk if is_chunk else -1])
        chunk += is_chunk
    for side in sides:
        side.append([6 * num_segments, 6 * num_segments, chunk])
    student, teacher = (_tokens(np.array(side), rng) for side in sides)
    shape = (len(student.labels), len(teacher.labels))
    weights = {}
    for name in ATTENTION_NAMES:
        rows = rng.dirichlet(np.full(shape[1], 0.3), size=shape[0])
        weights[name] = rows * (rng.random(shape[0]) < attends)[:, None]
    return ExampleAttention(student, teacher, weights)


def _tokens(rows: np.ndarray, rng: np.random.Generator) -> SideTokens:
    labels = rng.integers(0, 5, len(rows))
    return SideTokens(np.concatenate([[9], labels[:-1]]), labels, rows[:, :2], rows[:, 2])
