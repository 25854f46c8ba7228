"""Mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MeanStd:
    """Mean and sample standard deviation (n - 1) of one score over seeds; ``std`` is None with a single value."""

    mean: float
    std: float | None


def mean_std(values: Sequence[float]) -> MeanStd:
    """Mean and sample standard deviation of at least one value.

    >>> mean_std([1.0, 3.0])
    MeanStd(mean=2.0, std=1.4142135623730951)
    """
    assert values, "no value to average"
    return MeanStd(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
