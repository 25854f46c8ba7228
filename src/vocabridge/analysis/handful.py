"""Which examples are drawn: the first ones, and those whose attention strays most after training."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from vocabridge.analysis.attention import AttentionName, ExampleAttention
from vocabridge.analysis.heatmap_json import Chosen
from vocabridge.analysis.measures import MEASURES, measure, position_groups

FIRST, STRAYING = 3, 3
STAGES: tuple[AttentionName, ...] = ("before", "after")

_MASS = MEASURES.index("mass_in_chunk")


@dataclass(frozen=True, slots=True, eq=False)
class DrawnExample:
    """An example, its place among those analysed (from 1), and why it is drawn."""

    number: int
    example: ExampleAttention
    chosen: Chosen
    mass_in_chunk: dict[AttentionName, float]
    """Mean over its positions in a chunk, before and after training; NaN without any."""


@dataclass(slots=True)
class Handful:
    """Passes examples on and keeps a few of them, so that not all of them lie in memory."""

    _first: list[DrawnExample] = field(default_factory=list)
    _straying: list[tuple[float, int, DrawnExample]] = field(default_factory=list)
    """A heap whose top strays least."""

    def watch(self, examples: Iterable[ExampleAttention]) -> Iterator[ExampleAttention]:
        """The same examples."""
        for number, example in enumerate(examples, start=1):
            self._see(number, example)
            yield example

    def drawn(self) -> list[DrawnExample]:
        """The first ones in order, then the others, from the least mass in chunk after training."""
        return [*self._first, *(item for _, _, item in sorted(self._straying, reverse=True))]

    def _see(self, number: int, example: ExampleAttention) -> None:
        mass = {stage: _mean_mass(example, stage) for stage in STAGES}
        if number <= FIRST:
            self._first.append(DrawnExample(number, example, "first", mass))
        elif not np.isnan(mass["after"]):
            item = DrawnExample(number, example, "least in chunk", mass)
            heapq.heappush(self._straying, (-mass["after"], -number, item))
            if len(self._straying) > STRAYING:
                heapq.heappop(self._straying)


def _mean_mass(example: ExampleAttention, stage: AttentionName) -> float:
    positions = position_groups(example).positions
    if not len(positions):
        return float("nan")
    return float(measure(example.weights[stage], example, positions)[:, _MASS].mean())
