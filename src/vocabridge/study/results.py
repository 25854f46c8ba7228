"""A study's results from whatever is finished: means over seeds, comparisons with the baseline, seeds needed.

``study.json`` is tidy: lists of flat records, one number's circumstances a record, so that a data frame reads each
list as it is. ``version`` rises when a field changes its meaning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vocabridge.durable import write_in_one_piece
from vocabridge.errors import UserError
from vocabridge.evaluation.statistics import mean_std
from vocabridge.study.measurements import (
    Measurement,
    MeasurementComparison,
    compare_measurements,
    measurement_comparison_record,
    measurement_record,
    measurements,
)
from vocabridge.study.paired import (
    Tested,
    corrected,
    interval_fields,
    pairs_with_baseline,
    seed_differences,
    tested,
    tested_fields,
)
from vocabridge.study.plan import PlannedRun, StudyPlan
from vocabridge.study.scores import METRICS, Metric, PairedExamples, Scope, Score, run_scores
from vocabridge.study.statistics import EffectSize, Interval, bootstrap_interval, effect_size, seeds_needed
from vocabridge.study.status import RunStatus, current_status

VERSION = 2
RESULTS_FILE = "study.json"
ALPHA = 0.05
"""Level of all comparisons of one metric and scope together (Holm)."""
DIFFERENCE_TO_SEE = 0.37
"""ROUGE-L points: the difference for which the needed number of seeds is worked out."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One variant over its finished training seeds.

    Attributes:
        variant, metric, scope: what was measured.
        mean, std: over training seeds, each the mean of its sampling seeds; ``std`` (n - 1) is None with one.
        interval: bootstrap over training seeds.
        seeds: the training seeds.
        sampling_std: mean over training seeds of the deviation between sampling seeds.
    """

    variant: str
    metric: Metric
    scope: Scope
    mean: float
    std: float | None
    interval: Interval | None
    seeds: tuple[int, ...]
    sampling_std: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One variant against its baseline, paired over the training seeds that both have.

    Attributes:
        variant, metric, scope: what is compared.
        baseline: variant that it is compared with.
        seeds: training seeds that both have finished.
        difference: variant minus baseline; for bits per byte less is better.
        std: of the differences over seeds (n - 1).
        over_seeds: would it hold for another training?
        over_examples: would these models differ on other prompts? None without scores of every example.
        effect: standardised difference over seeds.
        num_comparisons: those that Holm's correction is over, of the same metric and scope, this one among them.
        seeds_needed: training seeds to see a difference of 0.37 ROUGE-L at this ``std`` and the level of Holm's first
            step, ``ALPHA / num_comparisons``; None for other metrics, with fewer than two seeds, or when 10,000 would
            not do.
    """

    variant: str
    metric: Metric
    scope: Scope
    baseline: str
    seeds: tuple[int, ...]
    difference: float
    std: float | None
    over_seeds: Tested
    over_examples: Tested | None
    effect: EffectSize | None
    num_comparisons: int
    seeds_needed: int | None

    @property
    def smallest_p_holm(self) -> float:
        """The least ``p_holm`` over seeds that so many seeds and comparisons can give: Holm's first step."""
        return min(1.0, self.num_comparisons * self.over_seeds.test.smallest_p)


@dataclass(frozen=True, slots=True)
class StudyResult:
    """Everything known at one moment."""

    plan: StudyPlan
    statuses: dict[PlannedRun, RunStatus]
    scores: tuple[Score, ...]
    summaries: tuple[Summary, ...]
    comparisons: tuple[Comparison, ...]
    measurements: tuple[Measurement, ...]
    measurement_comparisons: tuple[MeasurementComparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as study.json has them."""
        return {
            "version": VERSION,
            "study": str(self.plan.source),
            "baseline": self.plan.baseline,
            "baselines": dict(self.plan.baselines),
            "variants": list(self.plan.variants),
            "seeds": list(self.plan.seeds),
            "power": {"difference": DIFFERENCE_TO_SEE, "metric": "rouge_l", "alpha": ALPHA, "power": 0.8},
            "runs": [_run_record(run, status) for run, status in self.statuses.items()],
            "scores": [_score_record(score) for score in self.scores],
            "summaries": [_summary_record(summary) for summary in self.summaries],
            "comparisons": [_comparison_record(comparison) for comparison in self.comparisons],
            "measurements": [measurement_record(measurement) for measurement in self.measurements],
            "measurement_comparisons": [
                measurement_comparison_record(comparison) for comparison in self.measurement_comparisons
            ],
        }


def study_results(plan: StudyPlan) -> StudyResult:
    """Collect and compare what is finished; a run with damaged results counts as failed."""
    statuses = {run: current_status(run) for run in plan.runs}
    scores: list[Score] = []
    for run, status in statuses.items():
        if status.state == "done":
            try:
                scores += run_scores(run)
            except UserError as error:
                statuses[run] = status.model_copy(update={"state": "failed", "message": str(error)})
    finished = [run for run, status in statuses.items() if status.state == "done"]
    order = {variant: position for position, variant in enumerate(plan.variants)}
    scores.sort(key=lambda score: (order[score.variant], score.seed))
    measured = sorted(measurements(finished), key=lambda each: (order[each.variant], each.name, each.seed))
    return StudyResult(
        plan=plan,
        statuses=statuses,
        scores=tuple(scores),
        summaries=tuple(_summaries(scores)),
        comparisons=tuple(_comparisons(plan, scores, PairedExamples(finished))),
        measurements=tuple(measured),
        measurement_comparisons=tuple(compare_measurements(plan, measured)),
    )


def write_results(result: StudyResult) -> Path:
    """Write ``study.json`` into the study's folder and give its path."""
    path = result.plan.folder / RESULTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_in_one_piece(path, text + "\n")
    return path


# --- means -----------------------------------------------------------------------------------------------------------


def _summaries(scores: Sequence[Score]) -> Iterable[Summary]:
    groups: dict[tuple[str, Metric, Scope], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.variant, score.metric, score.scope), []).append(score)
    for (variant, metric, scope), group in groups.items():
        values = [score.value for score in group]
        over_seeds = mean_std(values)
        sampling = [score.sampling_std for score in group if score.sampling_std is not None]
        yield Summary(
            variant=variant,
            metric=metric,
            scope=scope,
            mean=over_seeds.mean,
            std=over_seeds.std,
            interval=bootstrap_interval([values]),
            seeds=tuple(score.seed for score in group),
            sampling_std=mean_std(sampling).mean if sampling else None,
        )


# --- comparisons -----------------------------------------------------------------------------------------------------


def _comparisons(plan: StudyPlan, scores: Sequence[Score], examples: PairedExamples) -> Iterable[Comparison]:
    by_cell: dict[tuple[Metric, Scope], dict[str, dict[int, float]]] = {}
    for score in scores:
        variants = by_cell.setdefault((score.metric, score.scope), {})
        variants.setdefault(score.variant, {})[score.seed] = score.value
    for metric in METRICS:
        for (cell_metric, scope), variants in by_cell.items():
            if cell_metric == metric:
                pairs = pairs_with_baseline(plan, variants)
                found = [
                    _comparison(pair, metric, scope, variants[pair[0]], variants[pair[1]], examples, len(pairs))
                    for pair in pairs
                ]
                yield from _with_holm(found)


def _comparison(
    pair: tuple[str, str],
    metric: Metric,
    scope: Scope,
    ours: dict[int, float],
    theirs: dict[int, float],
    examples: PairedExamples,
    num_comparisons: int,
) -> Comparison:
    variant, baseline = pair
    by_seed = seed_differences(ours, theirs)
    seeds, differences = tuple(by_seed), list(by_seed.values())
    over_seeds = tested([differences])
    assert over_seeds is not None, "there is at least one seed"
    groups = examples.differences(variant, baseline, seeds=seeds, files=scope.files, metric=metric)
    spread = mean_std(differences)
    needed = None
    if metric == "rouge_l" and spread.std:
        needed = seeds_needed(DIFFERENCE_TO_SEE, spread.std, alpha=ALPHA / num_comparisons)
    return Comparison(
        variant=variant,
        metric=metric,
        scope=scope,
        baseline=baseline,
        seeds=seeds,
        difference=spread.mean,
        std=spread.std,
        over_seeds=over_seeds,
        over_examples=tested(groups) if groups else None,
        effect=effect_size(differences),
        num_comparisons=num_comparisons,
        seeds_needed=needed,
    )


def _with_holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one metric and scope with p-values corrected over the variants."""
    seeds = corrected([comparison.over_seeds for comparison in comparisons])
    examples = iter(corrected([each.over_examples for each in comparisons if each.over_examples is not None]))
    return [
        replace(comparison, over_seeds=test, over_examples=comparison.over_examples and next(examples))
        for comparison, test in zip(comparisons, seeds, strict=True)
    ]


# --- records ---------------------------------------------------------------------------------------------------------


def _run_record(run: PlannedRun, status: RunStatus) -> dict[str, Any]:
    facts = {
        "variant": run.variant,
        "seed": run.seed,
        "folder": str(run.folder),
        "objective": run.recipe.objective.name,
    }
    return facts | status.model_dump(include={"state", "message", "seconds", "sessions", "steps"})


def _score_record(score: Score) -> dict[str, Any]:
    return _cell(score) | {
        "seed": score.seed,
        "value": score.value,
        "sampling_std": score.sampling_std,
        "num_sampling_seeds": score.num_sampling_seeds,
    }


def _summary_record(summary: Summary) -> dict[str, Any]:
    spread = {"mean": summary.mean, "std": summary.std, "sampling_std": summary.sampling_std}
    return _cell(summary) | spread | interval_fields(summary.interval) | {"seeds": list(summary.seeds)}


def _comparison_record(comparison: Comparison) -> dict[str, Any]:
    return {
        **_cell(comparison),
        "baseline": comparison.baseline,
        "seeds": list(comparison.seeds),
        "difference": comparison.difference,
        "std": comparison.std,
        "cohen_dz": comparison.effect and comparison.effect.cohen_dz,
        "hedges_gz": comparison.effect and comparison.effect.hedges_gz,
        "num_comparisons": comparison.num_comparisons,
        "seeds_needed": comparison.seeds_needed,
        **tested_fields("seeds", comparison.over_seeds),
        **tested_fields("examples", comparison.over_examples),
    }


def _cell(record: Score | Summary | Comparison) -> dict[str, Any]:
    scope = record.scope
    return {"variant": record.variant, "metric": record.metric, "scope": scope.name, "domain": scope.domain}
