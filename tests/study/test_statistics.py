"""Against brute force, scipy, and values from textbooks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from vocabridge.study.statistics import (
    NUM_RESAMPLES,
    bootstrap_interval,
    effect_size,
    holm,
    power_of_paired_test,
    seeds_needed,
    sign_flip_test,
)

DIFFERENCES = [0.4, -0.1, 0.9, 0.3, 0.25, 0.0, 0.7]


def test_exact_test_counts_every_sign_flip() -> None:
    found = sign_flip_test([DIFFERENCES])
    seen = abs(math.fsum(DIFFERENCES))
    sums = [
        abs(math.fsum(sign * value for sign, value in zip(signs, DIFFERENCES, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(DIFFERENCES))
    ]
    expected = sum(value >= seen - 1e-12 for value in sums) / len(sums)
    assert found is not None
    assert found.exact
    assert 0 < expected < 1
    assert found.p_value == expected


def test_exact_test_agrees_with_scipy() -> None:
    found = sign_flip_test([DIFFERENCES])
    reference = stats.permutation_test(
        (np.array(DIFFERENCES),), np.mean, permutation_type="samples", n_resamples=10_000, vectorized=False
    )
    assert found is not None
    assert found.p_value == pytest.approx(reference.pvalue)


def test_groups_count_alike_whatever_their_size() -> None:
    groups = [[1.0, 0.2, 0.3], [0.1, -0.4]]
    found = sign_flip_test(groups)
    seen = abs(1.5 / 3 - 0.3 / 2)
    statistics = [
        abs((a * 1.0 + b * 0.2 + c * 0.3) / 3 / 2 + (d * 0.1 - e * 0.4) / 2 / 2) * 2
        for a, b, c, d, e in itertools.product([1, -1], repeat=5)
    ]
    assert found is not None
    assert found.p_value == sum(value >= seen - 1e-12 for value in statistics) / 32


@pytest.mark.parametrize(("num", "smallest"), [(1, 1.0), (3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_few_seeds_bound_the_p_value(num: int, smallest: float) -> None:
    found = sign_flip_test([np.linspace(10.0, 11.0, num)])  # all of one sign: as clear as it can be
    assert found is not None
    assert found.p_value == found.smallest_p == smallest


def test_no_difference_is_no_evidence() -> None:
    found = sign_flip_test([[0.0, 0.0, 0.0]])
    assert found is not None
    assert found.p_value == 1.0


def test_rounding_breaks_no_tie() -> None:
    """0.1 + 0.2 - 0.3 is not 0 in binary, and sums in another order differ in the last bit."""
    found = sign_flip_test([[0.1, 0.2, -0.3]])
    assert found is not None
    assert found.p_value == 1.0


def test_sampled_test_is_near_the_normal_p_value_and_reproducible() -> None:
    values = np.random.default_rng(3).normal(0.15, 1.0, size=200)
    found, again, other = (sign_flip_test([values], seed=seed) for seed in (1, 1, 3))
    assert found is not None
    assert not found.exact
    assert found == again != other
    z = values.sum() / math.sqrt((values**2).sum())
    expected = 2 * stats.norm.sf(abs(z))
    assert 0.005 < expected < 0.5
    assert found.p_value == pytest.approx(expected, abs=0.015)


def test_sampled_test_holds_its_level() -> None:
    """Under the null hypothesis p-values are uniform; 60 values each, symmetric but not normal."""
    generator = np.random.default_rng(0)
    p_values = [
        found.p_value
        for _ in range(60)
        if (found := sign_flip_test([generator.choice([-3.0, -1.0, 1.0, 3.0], size=60)], seed=4)) is not None
    ]
    assert len(p_values) == 60
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_interval_agrees_with_scipy() -> None:
    found = bootstrap_interval([DIFFERENCES], seed=5)
    reference = stats.bootstrap((DIFFERENCES,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    assert found is not None
    assert found.low == pytest.approx(reference.confidence_interval.low, abs=0.02)
    assert found.high == pytest.approx(reference.confidence_interval.high, abs=0.02)
    assert found == bootstrap_interval([DIFFERENCES], seed=5) != bootstrap_interval([DIFFERENCES], seed=6)


def test_interval_of_groups_resamples_within_each() -> None:
    """Two files of constant scores: nothing varies, though the files differ by 100."""
    found = bootstrap_interval([[0.0] * 5, [100.0] * 3])
    assert found is not None
    assert (found.low, found.high) == (50.0, 50.0)


def test_interval_of_many_values_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(7).normal(size=400)
    whole = bootstrap_interval([values], seed=2)
    monkeypatch.setattr("vocabridge.study.statistics._BLOCK", 400 * 999)
    assert bootstrap_interval([values], seed=2) == whole
    assert whole is not None
    half = 1.96 * values.std(ddof=1) / 20
    assert whole.high - whole.low == pytest.approx(2 * half, rel=0.05)


@pytest.mark.parametrize("groups", [[], [[1.0]], [[1.0, 2.0], [3.0]]])
def test_interval_needs_two_values(groups: list[list[float]]) -> None:
    assert bootstrap_interval(groups) is None


def test_effect_size() -> None:
    found = effect_size([1.0, 2.0, 4.0, 5.0])  # mean 3, squares of deviations add up to 10
    assert found is not None
    assert found.cohen_dz == pytest.approx(3 / math.sqrt(10 / 3))
    assert found.hedges_gz / found.cohen_dz == pytest.approx(1 - 3 / (4 * 3 - 1), abs=0.005)  # the usual approximation
    exact = math.gamma(1.5) / (math.sqrt(1.5) * math.gamma(1.0))
    assert found.hedges_gz / found.cohen_dz == pytest.approx(exact)


def test_hedges_correction_removes_the_bias() -> None:
    draws = np.random.default_rng(0).normal(1.0, 1.0, size=(20_000, 5))
    sizes = [effect_size(row) for row in draws[:4000]]
    biased = np.mean([size.cohen_dz for size in sizes if size])
    unbiased = np.mean([size.hedges_gz for size in sizes if size])
    assert biased > 1.15
    assert unbiased == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("differences", [[], [1.0, 2.0], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0]])
def test_no_effect_size_without_spread(differences: list[float]) -> None:
    assert effect_size(differences) is None


def test_holm_by_its_definition() -> None:
    """Step down by hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, then never less than the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.8]) == [1.0, 1.0]


def test_holm_rejects_what_the_step_down_test_rejects() -> None:
    generator = np.random.default_rng(1)
    for _ in range(50):
        p_values = (generator.random(6) ** 3).tolist()
        rejected = set()
        for rank, index in enumerate(np.argsort(p_values)):
            if p_values[index] > 0.05 / (6 - rank):
                break
            rejected.add(int(index))
        assert {index for index, value in enumerate(holm(p_values)) if value <= 0.05} == rejected


@pytest.mark.parametrize(("effect", "expected"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_needed_as_in_the_tables(effect: float, expected: int) -> None:
    """Sample sizes of a two-sided paired t-test, alpha 0.05, power 0.80 (Cohen's small, medium and large effect)."""
    assert seeds_needed(effect, 1.0) == expected
    assert seeds_needed(-effect * 3, 3.0) == expected


def test_power_agrees_with_scipy_and_with_simulation() -> None:
    found = power_of_paired_test(0.37, 0.4, num_pairs=6)
    critical = stats.t.ppf(0.975, 5)
    shift = 0.37 / 0.4 * math.sqrt(6)
    assert found == pytest.approx(stats.nct.sf(critical, 5, shift) + stats.nct.cdf(-critical, 5, shift), abs=1e-6)
    draws = np.random.default_rng(0).normal(0.37, 0.4, size=(20_000, 6))
    assert found == pytest.approx(np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05), abs=0.015)


def test_seeds_needed_at_the_edges() -> None:
    assert seeds_needed(0.37, 0.0) == seeds_needed(0.37, 1e-14) == 6
    assert seeds_needed(0.001, 1.0) is None
    found = seeds_needed(0.37, 0.5)
    assert found is not None
    assert (
        power_of_paired_test(0.37, 0.5, num_pairs=found) >= 0.8 > power_of_paired_test(0.37, 0.5, num_pairs=found - 1)
    )


@pytest.mark.parametrize("num_comparisons", [1, 2, 9, 40])
def test_seeds_needed_are_enough_for_the_test_that_decides(num_comparisons: int) -> None:
    """However clear the difference: with one seed less no sign-flip test of so many comparisons is significant."""
    num = seeds_needed(100.0, 1.0, alpha=0.05 / num_comparisons)
    assert num is not None
    p_holm = [
        holm([found.p_value] + [1.0] * (num_comparisons - 1))[0]
        for seeds in (num - 1, num)
        if (found := sign_flip_test([[1.0] * seeds])) is not None
    ]
    assert p_holm[0] >= 0.05 > p_holm[1]


def test_the_number_of_resamples_keeps_five_seeds_exact() -> None:
    assert 2**13 <= NUM_RESAMPLES < 2**14
