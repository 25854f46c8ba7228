"""The probe: measures of attention averaged over positions, by kind of position, with intervals over examples.

``probe.json`` is :class:`ProbeReport`; ``results`` has an entry per attention, grouping and group that has positions.
An interval is the bootstrap's: examples are drawn with replacement, positions go with their example.

Axis letters: E examples, D bootstrap draws, G groups (of all attentions), M measures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from vocabridge.analysis.attention import ATTENTION_NAMES, AttentionName, ExampleAttention
from vocabridge.analysis.measures import (
    MEASURES,
    REPETITION,
    REPETITION_GROUPINGS,
    group_order,
    measure,
    position_groups,
)
from vocabridge.errors import UserError

ALL = "all"
"""Grouping of all positions, and its only group."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Model):
    """A mean over positions and its bootstrap interval over examples, None where fewer than two examples have any."""

    mean: float
    low: float | None
    high: float | None


class GroupResult(_Model):
    """One attention on one group of positions."""

    attention: AttentionName
    grouping: str
    group: str
    positions: int
    """Student positions measured: those that are in a chunk and attend to something."""
    coverage: float
    """They as a share of the group's positions that are in a chunk."""
    measures: dict[str, Estimate]
    """By name; see :data:`vocabridge.analysis.measures.MEASURES`."""


class GroupChange(_Model):
    """After training less before, on the same positions and bootstrap draws."""

    grouping: str
    group: str
    measures: dict[str, Estimate]


class RepetitionEffect(_Model):
    """Positions with a repeated token less those with a unique one, under one attention, on the same draws."""

    attention: AttentionName
    grouping: str
    """``teacher bigram`` or ``teacher label``: what is repeated."""
    measures: dict[str, Estimate]


class ProbeReport(_Model):
    """What ``vocabridge analyze`` prints and writes as ``probe.json``."""

    run: str
    objective: str
    data: str
    examples: int
    supervised_positions: int
    """Student positions that predict a token of the response or its end."""
    positions_in_chunk: int
    """Those of them that share a chunk with teacher positions; all measures are over these."""
    confidence: float
    """Level of the intervals."""
    resamples: int
    seed: int
    """Of the bootstrap."""
    results: list[GroupResult]
    changes: list[GroupChange]
    repetition: list[RepetitionEffect]
    """Absent where there are no positions of both kinds."""

    def to_json(self) -> str:
        """The report as indented JSON."""
        return self.model_dump_json(indent=2)

    def result(self, attention: AttentionName, grouping: str = ALL, group: str = ALL) -> GroupResult:
        """One of the results.

        Raises:
            KeyError: no position is in that group.
        """
        for each in self.results:
            if (each.attention, each.grouping, each.group) == (attention, grouping, group):
                return each
        raise KeyError((attention, grouping, group))


@dataclass(frozen=True, slots=True)
class ProbeSource:
    """What is probed, in words."""

    run: str
    objective: str
    data: str


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are made: examples are drawn with replacement, and the percentiles of the means taken."""

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def draws(self, num_examples: int) -> np.ndarray:
        """``[D, E]`` float64: how often each example is drawn."""
        generator = np.random.default_rng(self.seed)
        counts = generator.multinomial(num_examples, np.full(num_examples, 1 / num_examples), size=self.resamples)
        return counts.astype(np.float64)


def probe(
    examples: Iterable[ExampleAttention], source: ProbeSource, *, bootstrap: Bootstrap | None = None
) -> ProbeReport:
    """Measure the attentions of examples against their chunks.

    Args:
        examples: at least one with a position that is in a chunk.
        source: what the report says it is about.
        bootstrap: default 1000 draws, 95 %.

    Raises:
        UserError: no position is in a chunk.
    """
    bootstrap = bootstrap or Bootstrap()
    tallies = [_tally(example) for example in examples]
    totals = _Totals.of(tallies, bootstrap)
    results = [totals.result(attention, *key) for attention in ATTENTION_NAMES for key in _group_keys()]
    num_positions = sum(len(each.labels[ALL]) for each in tallies)
    if not num_positions:
        raise UserError(
            "none of the responses has a token of the student that shares a chunk with the teacher's tokens, so there "
            "is nothing to measure; see 'vocabridge inspect-pair'."
        )
    return ProbeReport(
        run=source.run,
        objective=source.objective,
        data=source.data,
        examples=len(tallies),
        supervised_positions=sum(each.supervised for each in tallies),
        positions_in_chunk=num_positions,
        confidence=bootstrap.confidence,
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
        results=[result for result in results if result is not None],
        changes=[change for key in _group_keys() if (change := totals.change(*key)) is not None],
        repetition=[
            effect
            for attention in ATTENTION_NAMES
            for grouping in REPETITION_GROUPINGS
            if (effect := totals.repetition(attention, grouping)) is not None
        ],
    )


# --- sums ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Tally:
    """One example: groups and measures of its P positions in a chunk."""

    supervised: int
    labels: dict[str, np.ndarray]
    """``[P]`` each."""
    values: dict[AttentionName, np.ndarray]
    """``[P, M]``"""


def _tally(example: ExampleAttention) -> _Tally:
    groups = position_groups(example)
    values = {name: measure(weights, example, groups.positions) for name, weights in example.weights.items()}
    everywhere = np.full(len(groups.positions), ALL)
    return _Tally(len(example.student.labels), {ALL: everywhere} | groups.labels, values)


def _group_keys() -> list[tuple[str, str]]:
    """Grouping and group."""
    ordered = group_order()
    return [(ALL, ALL)] + [(grouping, group) for grouping, groups in ordered.items() for group in groups]


_Key = tuple[AttentionName, str, str]


@dataclass(frozen=True, slots=True, eq=False)
class _Totals:
    """Sums per example and attention and group, and the bootstrap draws."""

    sums: dict[_Key, np.ndarray]
    """``[E, M]``"""
    counts: dict[_Key, np.ndarray]
    """``[E]`` positions that attend to something."""
    positions: dict[_Key, int]
    """Of the group, whether they attend to anything or not."""
    draws: np.ndarray
    """``[D, E]``"""
    tail: float
    """Percentage below the interval."""

    @classmethod
    def of(cls, tallies: list[_Tally], bootstrap: Bootstrap) -> _Totals:
        sums, counts, positions = {}, {}, {}
        for attention in ATTENTION_NAMES:
            for grouping, group in _group_keys():
                masks = [each.labels[grouping] == group for each in tallies]
                chosen = [each.values[attention][mask] for each, mask in zip(tallies, masks, strict=True)]
                key = (attention, grouping, group)
                sums[key] = np.array([np.nansum(values, axis=0) for values in chosen])
                counts[key] = np.array([np.isfinite(values[:, 0]).sum() for values in chosen])
                positions[key] = sum(int(mask.sum()) for mask in masks)
        tail = 50 * (1 - bootstrap.confidence)
        return cls(sums, counts, positions, bootstrap.draws(len(tallies)), tail)

    def result(self, attention: AttentionName, grouping: str, group: str) -> GroupResult | None:
        key = (attention, grouping, group)
        count = int(self.counts[key].sum())
        if not count:
            return None
        return GroupResult(
            attention=attention,
            grouping=grouping,
            group=group,
            positions=count,
            coverage=count / self.positions[key],
            measures=self._estimates(self._mean(key), self._drawn_means(key), self._num_examples(key)),
        )

    def change(self, grouping: str, group: str) -> GroupChange | None:
        measures = self._difference(("after", grouping, group), ("before", grouping, group))
        return None if measures is None else GroupChange(grouping=grouping, group=group, measures=measures)

    def repetition(self, attention: AttentionName, grouping: str) -> RepetitionEffect | None:
        unique, repeated = ((attention, grouping, group) for group in REPETITION)
        measures = self._difference(repeated, unique)
        if measures is None:
            return None
        return RepetitionEffect(attention=attention, grouping=grouping, measures=measures)

    def _difference(self, key: _Key, other: _Key) -> dict[str, Estimate] | None:
        """``key`` less ``other``, each example drawn with both kinds of its positions."""
        if not (self.counts[key].sum() and self.counts[other].sum()):
            return None
        drawn = self._drawn_means(key) - self._drawn_means(other)
        num_examples = min(self._num_examples(key), self._num_examples(other))
        return self._estimates(self._mean(key) - self._mean(other), drawn, num_examples)

    def _num_examples(self, key: _Key) -> int:
        return int((self.counts[key] > 0).sum())

    def _mean(self, key: _Key) -> np.ndarray:
        return self.sums[key].sum(0) / self.counts[key].sum()  # [M]

    def _drawn_means(self, key: _Key) -> np.ndarray:
        """``[D, M]``, NaN where a draw has no position of the group."""
        counts = self.draws @ self.counts[key].astype(np.float64)
        return self.draws @ self.sums[key] / np.where(counts > 0, counts, np.nan)[:, None]

    def _estimates(self, means: np.ndarray, drawn: np.ndarray, num_examples: int) -> dict[str, Estimate]:
        if num_examples < 2:
            return {name: Estimate(mean=mean, low=None, high=None) for name, mean in zip(MEASURES, means, strict=True)}
        lows, highs = np.nanpercentile(drawn, [self.tail, 100 - self.tail], axis=0)
        estimates = zip(MEASURES, means, lows, highs, strict=True)
        return {name: Estimate(mean=mean, low=low, high=high) for name, mean, low, high in estimates}
