"""Curves over training: thinned, and over seeds the mean with the lowest and the highest seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

MAX_POINTS = 100
"""Most points of a curve; a longer one is averaged over so many stretches of equal length."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's values by ascending step."""

    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Band:
    """Several seeds at the steps that all of them have reached."""

    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def thinned(points: Mapping[int, float], *, last_step: int) -> Curve:
    """A curve of at most :data:`MAX_POINTS` points; values that are not finite are left out.

    Runs that share ``last_step`` and log at the same steps are cut into the same stretches, so their curves can be
    compared point by point.

    Args:
        points: step -> value.
        last_step: the last step of all curves in one chart.
    """
    finite = sorted((step, value) for step, value in points.items() if math.isfinite(value))
    if len(finite) <= MAX_POINTS:
        return Curve(tuple(step for step, _ in finite), tuple(value for _, value in finite))
    stretches: dict[int, list[tuple[int, float]]] = {}
    for step, value in finite:
        stretches.setdefault(min(step * MAX_POINTS // max(last_step, 1), MAX_POINTS - 1), []).append((step, value))
    parts = stretches.values()
    return Curve(
        tuple(fmean(step for step, _ in part) for part in parts),
        tuple(fmean(value for _, value in part) for part in parts),
    )


def band(curves: Sequence[Curve]) -> Band:
    """Mean, lowest and highest curve at the steps that are in all of them."""
    values = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*(set(by_step) for by_step in values))) if values else []
    columns = [[by_step[step] for by_step in values] for step in shared]
    return Band(
        steps=tuple(shared),
        mean=tuple(fmean(column) for column in columns),
        low=tuple(min(column) for column in columns),
        high=tuple(max(column) for column in columns),
    )
