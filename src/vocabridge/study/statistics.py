"""Statistics of a comparison: intervals, permutation tests, effect size, correction for many variants, power.

Two questions are kept apart. *Over training seeds*: would the method win again when trained anew? The unit is the
difference between two runs with the same seed, sampling seeds averaged first. *Over examples*: are these trained
models different on new prompts? The unit is an example, training and sampling seeds averaged first; this sees much
smaller differences, and says nothing about another training run.

Everything random is seeded; numbers are reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Values = Sequence[float] | np.ndarray
"""Numbers of one group, float, ``[n]``."""

NUM_RESAMPLES = 10_000
_BLOCK = 1 << 22  # values of one block of resamples, 32 MiB as float64
_ROUNDING = 1e-9  # sums in another order differ by less than this share; a tie is a tie


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PermutationTest:
    """A two-sided sign-flip test that a mean is zero.

    Attributes:
        p_value: share of sign flips whose mean lies at least as far from zero.
        smallest_p: the least ``p_value`` that so many values can give; with 5 seeds 0.0625, which no difference however
            large makes significant at 0.05.
        exact: all flips were counted; otherwise a random sample of them.
    """

    p_value: float
    smallest_p: float
    exact: bool


@dataclass(frozen=True, slots=True)
class EffectSize:
    """Standardised mean of paired differences.

    Attributes:
        cohen_dz: mean over standard deviation (n - 1).
        hedges_gz: the same without its upward bias in small samples.
    """

    cohen_dz: float
    hedges_gz: float


def bootstrap_interval(groups: Sequence[Values], *, seed: int = 0, confidence: float = 0.95) -> Interval | None:
    """Percentile bootstrap interval of the mean of the groups' means.

    Every group is resampled on its own: examples of a file stay in their file. With few values (seeds) the interval is
    too narrow; it then shows the spread that was seen rather than 95 % coverage.

    Args:
        groups: values of each group; most often one group.
        seed: of the resampling.
        confidence: probability mass of the interval.

    Returns:
        None when a group has fewer than two values.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or min(map(len, arrays)) < 2:
        return None
    generator = np.random.default_rng(seed)
    means = np.zeros(NUM_RESAMPLES)
    for array in arrays:
        for block in _blocks(len(array)):
            picks = generator.integers(len(array), size=(block.stop - block.start, len(array)))
            means[block] += array[picks].mean(axis=1) / len(arrays)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def sign_flip_test(groups: Sequence[Values], *, seed: int = 0) -> PermutationTest | None:
    """Paired permutation test: under the null hypothesis the sign of every difference is a coin toss.

    The statistic is the mean of the groups' means. All ``2^n`` flips are counted when they are no more than
    ``NUM_RESAMPLES``; otherwise so many random ones, the flip that was seen among them.

    Args:
        groups: paired differences of each group; most often one group.
        seed: of the random flips.

    Returns:
        None without a difference.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or min(map(len, arrays)) == 0:
        return None
    terms = np.concatenate([array / (len(array) * len(arrays)) for array in arrays])  # their sum is the statistic
    exact = 2 ** len(terms) <= NUM_RESAMPLES
    threshold = abs(terms.sum()) - _ROUNDING * np.abs(terms).sum()
    if exact:
        flips = np.arange(2 ** len(terms))[:, None] >> np.arange(len(terms)) & 1
        p_value = float(np.mean(np.abs((1 - 2 * flips) @ terms) >= threshold))
        return PermutationTest(p_value, smallest_p=min(1.0, 2 / 2 ** len(terms)), exact=True)
    generator = np.random.default_rng(seed)
    as_far = 0
    for block in _blocks(len(terms)):
        flips = generator.integers(2, size=(block.stop - block.start, len(terms)), dtype=np.int8)
        as_far += int(np.sum(np.abs((1 - 2 * flips) @ terms) >= threshold))
    return PermutationTest((as_far + 1) / (NUM_RESAMPLES + 1), smallest_p=1 / (NUM_RESAMPLES + 1), exact=False)


def effect_size(differences: Values) -> EffectSize | None:
    """Cohen's d_z of paired differences, and its unbiased form (Hedges, with the exact gamma factor).

    Returns:
        None with fewer than three differences, or when all are equal.
    """
    array = np.asarray(differences, dtype=np.float64)
    if len(array) < 3 or (deviation := array.std(ddof=1)) <= _ROUNDING * np.abs(array).max():
        return None
    freedom = len(array) - 1
    correction = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    cohen_dz = float(array.mean() / deviation)
    return EffectSize(cohen_dz, cohen_dz * correction)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values that hold for all comparisons together, in the given order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def power_of_paired_test(difference: float, deviation: float, *, num_pairs: int, alpha: float = 0.05) -> float:
    """Probability that a two-sided paired t-test sees a true mean difference.

    Args:
        difference: the true mean.
        deviation: standard deviation of the paired differences, greater than 0.
        num_pairs: training seeds, at least 2.
        alpha: significance level.
    """
    from scipy.special import nctdtr, stdtrit

    freedom = num_pairs - 1
    critical = stdtrit(freedom, 1 - alpha / 2)
    shift = abs(difference) / deviation * math.sqrt(num_pairs)
    return float(1 - nctdtr(freedom, shift, critical) + nctdtr(freedom, shift, -critical))


def seeds_needed(
    difference: float, deviation: float, *, alpha: float = 0.05, power: float = 0.8, most: int = 10_000
) -> int | None:
    """Fewest training seeds with which a paired t-test sees ``difference`` with probability ``power``.

    Never fewer than those with which the exact sign-flip test, whose verdict it is, can fall below ``alpha`` at all.

    Args:
        difference: the true mean difference.
        deviation: standard deviation of the paired differences over training seeds; itself a guess when few were run.
        alpha: significance level, two-sided; of several comparisons each has its share.
        power: wanted probability.
        most: where to stop looking.

    Returns:
        None when not even ``most`` seeds are enough.
    """
    enough = 2
    while 2 / 2**enough >= alpha:
        enough += 1
    if deviation == 0:
        return enough
    too_few = enough - 1
    while power_of_paired_test(difference, deviation, num_pairs=enough, alpha=alpha) < power:
        if enough >= most:
            return None
        enough, too_few = min(2 * enough, most), enough
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if power_of_paired_test(difference, deviation, num_pairs=middle, alpha=alpha) < power:
            too_few = middle
        else:
            enough = middle
    return enough


def _blocks(width: int) -> list[slice]:
    """Parts of the resamples small enough to hold at once."""
    rows = max(1, _BLOCK // width)
    return [slice(start, min(start + rows, NUM_RESAMPLES)) for start in range(0, NUM_RESAMPLES, rows)]
