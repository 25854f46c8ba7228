"""How the attention of one example lies to its byte-exact chunks, position by position.

Axis letters: R_s / R_t supervised positions of the student and the teacher, P student positions that are in a chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vocabridge.analysis.attention import ExampleAttention, SideTokens

MEASURES = ("mass_in_chunk", "top1_in_chunk", "distance_bytes", "top1_distance_bytes", "entropy")
"""Of each student position that is in a chunk:

- ``mass_in_chunk``: attention inside the chunk, in [0, 1];
- ``top1_in_chunk``: 1 where the highest weight is inside, the share of them where several are equally high;
- ``distance_bytes``: mean distance from the chunk under the attention: 0 inside, 1 for the bytes next to it;
- ``top1_distance_bytes``: the same of the highest weight;
- ``entropy``: of the attention, in nats.
"""

CHUNK_TYPES = ("1:1", "1:n", "n:1", "n:m")
"""Student tokens : teacher tokens."""

REPETITION = ("unique", "repeated")
REPETITION_GROUPINGS = ("teacher bigram", "teacher label")

_BIN_ENDS = (8, 32, 128)


@dataclass(frozen=True, slots=True, eq=False)
class PositionGroups:
    """What kind of position each of the P student positions is, by grouping and then as one label each."""

    positions: np.ndarray
    """``[P]`` index among the student's supervised positions."""
    labels: dict[str, np.ndarray]
    """``[P]`` strings each: ``chunk type``, ``teacher bigram``, ``teacher label``, ``position``, ``length``."""


def position_groups(example: ExampleAttention) -> PositionGroups:
    """Group the student positions of an example that are in a chunk.

    ``teacher bigram`` (token read, token predicted: all that a key depends on) and ``teacher label`` are ``repeated``
    where one of the chunk's teacher positions has a twin outside the chunk, which attention by content cannot tell from
    it; else ``unique``. ``position`` is the position's number in the response and ``length`` the number of them, in
    student tokens. The end token counts as a 1:1 chunk.
    """
    (positions,) = np.nonzero(example.student.chunk_ids >= 0)
    chunks = example.student.chunk_ids[positions]
    teacher = example.teacher
    bigrams = list(zip(teacher.input_ids.tolist(), teacher.labels.tolist(), strict=True))
    length = len(example.student.labels)
    labels = {
        "chunk type": chunk_types(example)[chunks],
        "teacher bigram": _repeated(bigrams, teacher.chunk_ids)[chunks],
        "teacher label": _repeated(teacher.labels.tolist(), teacher.chunk_ids)[chunks],
        "position": np.array([token_bin(int(position) + 1) for position in positions], dtype=str),
        "length": np.full(len(positions), token_bin(length)),
    }
    return PositionGroups(positions, labels)


def group_order() -> dict[str, tuple[str, ...]]:
    """The groups of every grouping, in the order of tables."""
    edges = (1, *(end + 1 for end in _BIN_ENDS))
    bins = tuple(map(token_bin, edges))
    return {
        "chunk type": CHUNK_TYPES,
        **dict.fromkeys(REPETITION_GROUPINGS, REPETITION),
        "position": bins,
        "length": bins,
    }


def token_bin(count: int) -> str:
    """The bin of a number of tokens, at least 1.

    >>> [token_bin(count) for count in (1, 8, 9, 128, 129)]
    ['1-8', '1-8', '9-32', '33-128', '129+']
    """
    starts = (1, *(end + 1 for end in _BIN_ENDS))
    index = int(np.searchsorted(_BIN_ENDS, count))
    return f"{starts[index]}-{_BIN_ENDS[index]}" if index < len(_BIN_ENDS) else f"{starts[index]}+"


def chunk_types(example: ExampleAttention) -> np.ndarray:
    """One of :data:`CHUNK_TYPES` for each chunk of an example."""
    sizes = [_chunk_sizes(side) for side in (example.student, example.teacher)]
    is_many = [size > 1 for size in sizes]
    return np.array(CHUNK_TYPES)[is_many[0] * 2 + is_many[1]]


def _chunk_sizes(side: SideTokens) -> np.ndarray:
    return np.bincount(side.chunk_ids[side.chunk_ids >= 0])


def _repeated(keys: Sequence[object], chunk_ids: np.ndarray) -> np.ndarray:
    """``unique`` or ``repeated`` for each chunk: whether one of its keys occurs outside it as well."""
    everywhere = Counter(keys)
    per_chunk = Counter(zip(chunk_ids.tolist(), keys, strict=True))
    found = np.zeros(int(chunk_ids.max(initial=-1)) + 1, dtype=bool)
    for (chunk, key), count in per_chunk.items():
        if chunk >= 0 and everywhere[key] > count:
            found[chunk] = True
    return np.where(found, "repeated", "unique")


def measure(weights: np.ndarray, example: ExampleAttention, positions: np.ndarray) -> np.ndarray:
    """:data:`MEASURES` of student positions that are in a chunk.

    Args:
        weights: ``[R_s, R_t]`` an attention of the example.
        example: its tokens.
        positions: ``[P]``.

    Returns:
        ``[P, len(MEASURES)]`` float64; NaN in the rows that attend to nothing.
    """
    rows = weights[positions]  # [P, R_t]
    distances = chunk_distances(example)[example.student.chunk_ids[positions]]
    is_inside = distances == 0
    is_top = rows == rows.max(1, keepdims=True)
    top = is_top / is_top.sum(1, keepdims=True)
    logs = np.log(rows, where=rows > 0, out=np.zeros_like(rows))
    values = np.stack(
        [
            (rows * is_inside).sum(1),
            (top * is_inside).sum(1),
            (rows * distances).sum(1),
            (top * distances).sum(1),
            -(rows * logs).sum(1),
        ],
        axis=1,
    )
    values[rows.sum(1) == 0] = np.nan
    return values


def chunk_distances(example: ExampleAttention) -> np.ndarray:
    """Bytes from each chunk to each teacher token, ``[number of chunks, R_t]`` float64.

    0 inside the chunk; outside it, the steps from the chunk's nearest byte to the token's: 1 for a neighbour. A token
    without bytes stands between two bytes.
    """
    starts, ends = _chunk_bounds(example)
    spans, chunk_ids = example.teacher.spans, example.teacher.chunk_ids
    gaps = np.maximum(spans[None, :, 0] - ends[:, None], starts[:, None] - spans[None, :, 1])
    is_inside = chunk_ids[None, :] == np.arange(len(starts))[:, None]
    return np.where(is_inside, 0.0, np.maximum(gaps, 0) + 1.0)


def _chunk_bounds(example: ExampleAttention) -> tuple[np.ndarray, np.ndarray]:
    """First byte and byte after the last one of each chunk."""
    chunks = np.concatenate([example.student.chunk_ids, example.teacher.chunk_ids])
    spans = np.concatenate([example.student.spans, example.teacher.spans])[chunks >= 0]
    chunks = chunks[chunks >= 0]
    starts = np.full(int(chunks.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    ends = np.full_like(starts, -1)
    np.minimum.at(starts, chunks, spans[:, 0])
    np.maximum.at(ends, chunks, spans[:, 1])
    return starts, ends
