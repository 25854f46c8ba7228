"""Mean and spread against values worked out by hand."""

from __future__ import annotations

import pytest

from vocabridge.evaluation.statistics import mean_std


def test_deviation_divides_by_n_minus_1() -> None:
    found = mean_std([2.0, 4.0, 9.0])  # deviations -3, -1, 4: squares add up to 26
    assert found.mean == 5.0
    assert found.std == pytest.approx((26 / 2) ** 0.5)


def test_one_value_has_no_deviation() -> None:
    assert mean_std([7.0]).std is None


def test_equal_values_deviate_by_zero() -> None:
    assert mean_std([0.1, 0.1, 0.1]).std == 0.0
