"""What finished runs logged at the start and at the end of training, and how the variants differ in it.

Two kinds of quantities: those on the probe set (``probe/...``: distances between queries and keys, attention in the
right chunk), which all runs of this version measure on the same rows (earlier ones chose them by seed), and the terms
of the loss (``loss/...``), which the last step's rows give.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vocabridge.evaluation.statistics import mean_std
from vocabridge.metrics_log import METRICS_FILE, parse_log
from vocabridge.study.paired import Tested, corrected, pairs_with_baseline, seed_differences, tested, tested_fields
from vocabridge.study.plan import PlannedRun, StudyPlan

PREFIXES = ("probe/", "loss/")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One logged quantity of one run.

    Attributes:
        variant, seed: the run.
        name: as the log has it.
        first, last: its finite values at the first and the last step that have one.
    """

    variant: str
    seed: int
    name: str
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class MeasurementComparison:
    """One variant against its baseline at the end of training, paired over the training seeds that both have.

    Attributes:
        variant, name, baseline: what is compared.
        seeds: training seeds that both have finished.
        difference: of the last values, variant minus baseline.
        std: of the differences over seeds (n - 1).
        over_seeds: the test; Holm's correction is over the variants that have this quantity.
    """

    variant: str
    name: str
    baseline: str
    seeds: tuple[int, ...]
    difference: float
    std: float | None
    over_seeds: Tested


def measurements(runs: Iterable[PlannedRun]) -> list[Measurement]:
    """Read the logs of finished runs; a log that is gone or broken gives what can still be read of it."""
    return [measurement for run in runs for measurement in _of_run(run)]


def compare_measurements(plan: StudyPlan, found: Sequence[Measurement]) -> list[MeasurementComparison]:
    """Compare every variant with its baseline in every quantity that both have."""
    by_name: dict[str, dict[str, dict[int, float]]] = {}
    for each in found:
        by_name.setdefault(each.name, {}).setdefault(each.variant, {})[each.seed] = each.last
    return [comparison for name in sorted(by_name) for comparison in _comparisons(plan, name, by_name[name])]


def measurement_record(measurement: Measurement) -> dict[str, Any]:
    """As ``study.json`` has it."""
    return {
        "variant": measurement.variant,
        "name": measurement.name,
        "seed": measurement.seed,
        "first": measurement.first,
        "last": measurement.last,
    }


def measurement_comparison_record(comparison: MeasurementComparison) -> dict[str, Any]:
    """As ``study.json`` has it."""
    return {
        "variant": comparison.variant,
        "name": comparison.name,
        "baseline": comparison.baseline,
        "seeds": list(comparison.seeds),
        "difference": comparison.difference,
        "std": comparison.std,
        **tested_fields("seeds", comparison.over_seeds),
    }


def _of_run(run: PlannedRun) -> Iterator[Measurement]:
    path = run.folder / METRICS_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for name, values in parse_log(text).values.items():
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        if name.startswith(PREFIXES) and finite:
            yield Measurement(run.variant, run.seed, name, finite[min(finite)], finite[max(finite)])


def _comparisons(
    plan: StudyPlan, name: str, variants: Mapping[str, Mapping[int, float]]
) -> Iterator[MeasurementComparison]:
    pairs = pairs_with_baseline(plan, variants)
    differences = [seed_differences(variants[variant], variants[baseline]) for variant, baseline in pairs]
    tests = corrected([test for of_pair in differences if (test := tested([list(of_pair.values())])) is not None])
    for (variant, baseline), of_pair, test in zip(pairs, differences, tests, strict=True):
        spread = mean_std(list(of_pair.values()))
        yield MeasurementComparison(variant, name, baseline, tuple(of_pair), spread.mean, spread.std, test)
