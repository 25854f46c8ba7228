"""Variants against their baselines, paired over the training seeds that both have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vocabridge.study.plan import StudyPlan
from vocabridge.study.statistics import Interval, PermutationTest, bootstrap_interval, holm, sign_flip_test


@dataclass(frozen=True, slots=True)
class Tested:
    """A mean difference and how sure it is.

    Attributes:
        num: seeds or examples that the test is over.
        interval: bootstrap of the mean difference.
        test: sign flips.
        p_holm: the p-value with all variants that were compared in the same quantity taken together.
    """

    num: int
    interval: Interval | None
    test: PermutationTest
    p_holm: float


def pairs_with_baseline(plan: StudyPlan, variants: Mapping[str, Mapping[int, Any]]) -> list[tuple[str, str]]:
    """Every variant and its baseline, where they share a training seed.

    Args:
        plan: names the baselines.
        variants: what is known of a variant, by training seed.
    """
    pairs = [(variant, plan.baseline_of(variant)) for variant in variants]
    return [
        (variant, baseline)
        for variant, baseline in pairs
        if variant != baseline and variants[variant].keys() & variants.get(baseline, {}).keys()
    ]


def seed_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """The first less the second, by the seeds that both have, in ascending order."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def tested(groups: Sequence[Any]) -> Tested | None:
    """Test paired differences, not yet corrected for others; None where there are none."""
    test = sign_flip_test(groups)
    if test is None:
        return None
    return Tested(sum(map(len, groups)), bootstrap_interval(groups), test, p_holm=test.p_value)


def corrected(tests: Sequence[Tested]) -> list[Tested]:
    """The same tests with p-values that hold for all of them together (Holm)."""
    p_values = holm([each.test.p_value for each in tests])
    return [replace(each, p_holm=p_holm) for each, p_holm in zip(tests, p_values, strict=True)]


def tested_fields(prefix: str, tested: Tested | None) -> dict[str, Any]:
    """Columns of ``study.json``, the same whether there was a test or not."""
    test = None if tested is None else tested.test
    fields = {
        "num": tested and tested.num,
        **interval_fields(None if tested is None else tested.interval),
        "p_value": test and test.p_value,
        "p_holm": tested and tested.p_holm,
        "smallest_p": test and test.smallest_p,
        "exact": test and test.exact,
    }
    return {f"{prefix}_{name}": value for name, value in fields.items()}


def interval_fields(interval: Interval | None) -> dict[str, Any]:
    """Columns of ``study.json``; None where there is no interval."""
    return {"low": interval and interval.low, "high": interval and interval.high}
