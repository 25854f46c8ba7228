"""Edit distance and dynamic time warping as the textbook has them, cell by cell."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from vocabridge.alignment import token_bytes

Costs = Sequence[Sequence[float]]


@functools.cache
def edit_distance(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for i, char in enumerate(left, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(right, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (char != other))
    return row[-1]


def table_path(costs: Costs) -> list[tuple[int, int]]:
    """Back from the end by the first cheapest of: before both, before in the first sequence, before in the second."""
    table: dict[tuple[int, int], float] = {(-1, -1): 0.0}
    for i, j in itertools.product(range(len(costs)), range(len(costs[0]))):
        table[i, j] = costs[i][j] + min(table.get(cell, math.inf) for cell in _before(i, j))
    cell, path = (len(costs) - 1, len(costs[0]) - 1), []
    while cell != (-1, -1):
        path.append(cell)
        cell = min(_before(*cell), key=lambda other: table.get(other, math.inf))
    return path[::-1]


def _before(i: int, j: int) -> tuple[tuple[int, int], ...]:
    return (i - 1, j - 1), (i - 1, j), (i, j - 1)


def texts(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Of every id; a byte outside of characters is a character of its own."""
    return [data and data.decode("utf-8", "surrogateescape") for data in token_bytes(tokenizer)]
