"""Curves are thinned without changing what they say; bands end where the first seed ends."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vocabridge.report.curves import MAX_POINTS, Curve, band, thinned


def test_short_curves_stay_and_lose_what_is_not_finite() -> None:
    curve = thinned({10: 1.0, 5: 2.0, 15: math.nan, 20: math.inf}, last_step=20)
    assert curve == Curve((5, 10), (2.0, 1.0))


def test_long_curves_are_averaged_over_equal_stretches() -> None:
    steps = np.arange(10, 10_010, 10)
    values = np.sin(steps / 700)
    curve = thinned(dict(zip(steps.tolist(), values.tolist(), strict=True)), last_step=10_000)
    assert len(curve.steps) <= MAX_POINTS
    assert list(curve.steps) == sorted(curve.steps)
    for step, value in zip(curve.steps, curve.values, strict=True):
        assert value == pytest.approx(np.sin(step / 700), abs=0.01)
    assert np.mean(curve.values) == pytest.approx(values.mean(), abs=0.02)
    assert curve.steps[0] >= 10
    assert curve.steps[-1] <= 10_000


def test_runs_that_log_alike_are_thinned_alike() -> None:
    one = thinned(dict.fromkeys(range(1, 1000), 1.0), last_step=999)
    other = thinned({step: step / 10 for step in range(1, 1000)}, last_step=999)
    assert one.steps == other.steps


def test_band_is_mean_and_extremes_as_far_as_all_have_come() -> None:
    found = band([Curve((0, 5, 10), (1.0, 2.0, 9.0)), Curve((0, 5), (3.0, 6.0))])
    assert found.steps == (0, 5)
    assert found.mean == (2.0, 4.0)
    assert found.low == (1.0, 2.0)
    assert found.high == (3.0, 6.0)
    assert band([]).steps == ()
