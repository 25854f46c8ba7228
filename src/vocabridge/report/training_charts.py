"""Curves of losses, of stability and of distances, a table of runs and one of distances before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from vocabridge.report.collect import Report, Run
from vocabridge.report.curves import band, thinned
from vocabridge.report.figures import LineStyle, VariantCurves, curve_figure
from vocabridge.report.metric_names import MetricName, metric_name
from vocabridge.report.results_tables import p_cell, variant_title
from vocabridge.report.study_record import MeasurementComparisonRecord
from vocabridge.report.view import MISSING, Cell, Chart, Table, number, words

_LOG_SCALE_FROM = 20  # so that at least one power of ten lies between the ends
_FIRST = ("loss", "cross_entropy", "eval_loss", "student_accuracy")


@dataclass(frozen=True, slots=True)
class Training:
    """Charts by section, and what went wrong in which run."""

    losses: tuple[Chart, ...]
    others: tuple[Chart, ...]
    stability: tuple[Chart, ...]
    distances: tuple[Chart, ...]
    runs: Table
    failures: tuple[str, ...]
    before_after: Table | None


def training(report: Report, styles: dict[str, LineStyle]) -> Training:
    """Everything that comes from the runs' logs."""
    names = sorted({name for run in report.runs for name in run.log}, key=_order)
    charts: dict[str, list[Chart]] = {"loss": [], "stability": [], "distance": [], "other": []}
    for name in names:
        metric = metric_name(name)
        if metric.place != "nowhere" and (chart := _chart(report, metric, styles)) is not None:
            charts[metric.place].append(chart)
    return Training(
        losses=tuple(charts["loss"]),
        others=tuple(charts["other"]),
        stability=tuple(charts["stability"]),
        distances=tuple(charts["distance"]),
        runs=_runs_table(report.runs),
        failures=tuple(line for run in report.runs for line in _failures(run)),
        before_after=_before_after(report),
    )


def _order(name: str) -> tuple[int, str]:
    return (_FIRST.index(name), name) if name in _FIRST else (len(_FIRST), name)


def _chart(report: Report, metric: MetricName, styles: dict[str, LineStyle]) -> Chart | None:
    logged = [run.log[metric.name] for run in report.runs if metric.name in run.log]
    last_step = max(step for points in logged for step in points)
    parts = []
    for variant in report.variants:
        seeds = {
            run.record.seed: curve
            for run in report.runs_of(variant)
            if (curve := thinned(run.log.get(metric.name, {}), last_step=last_step)).steps
        }
        if seeds:
            parts.append(VariantCurves(variant, seeds, band(list(seeds.values())) if len(seeds) > 1 else None))
    if not parts:
        return None
    drawn = [value for part in parts for curve in part.seeds.values() for value in curve.values]
    figure = curve_figure(parts, styles, unit=metric.unit, log_scale=metric.log_scale and _spans_decades(drawn))
    return Chart(f"curve-{metric.name}", metric.title, metric.name, figure)


def _spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > _LOG_SCALE_FROM


# --- runs ------------------------------------------------------------------------------------------------------------


def _runs_table(runs: Sequence[Run]) -> Table:
    headings = ("variant", "seed", "state", "steps", "last loss", "last discriminator accuracy", "message")
    rows = []
    for run in runs:
        accuracies = [_last(run, "discriminator_query_accuracy"), _last(run, "discriminator_key_accuracy")]
        known = [value for value in accuracies if value is not None]
        steps = run.record.steps if run.record.steps is not None else _last_step(run)
        rows.append(
            (
                words(run.record.variant),
                number(run.record.seed, "{}"),
                words(run.record.state, emphasis=run.record.state == "failed"),
                number(steps, "{}"),
                number(_last(run, "loss"), "{:.4g}"),
                number(fmean(known) if known else None, "{:.2f}"),
                words(run.record.message),
            )
        )
    return Table("Every run", headings, tuple(rows))


def _failures(run: Run) -> list[str]:
    lines = []
    if run.record.state == "failed":
        lines.append(f"{run.title} failed: {run.record.message or 'see study.log in its folder'}")
    broken = sorted(
        (step, name)
        for name, points in run.log.items()
        # A classifier without held-out tokens has no accuracy, which is no divergence.
        if not name.endswith("two_sample_accuracy")
        for step, value in points.items()
        if not math.isfinite(value)
    )
    if broken:
        step, name = broken[0]
        lines.append(f"{run.title} diverged: {name} is not finite from step {step} on.")
    return lines


def _last(run: Run, name: str) -> float | None:
    points = run.log.get(name)
    return points[max(points)] if points else None


def _last_step(run: Run) -> int | None:
    return max((step for points in run.log.values() for step in points), default=None)


# --- distances -------------------------------------------------------------------------------------------------------


def _before_after(report: Report) -> Table | None:
    """First and last measurement of every distance, mean and deviation over seeds, and what the baseline ends with."""
    rows = []
    compared = report.study.measurement_comparisons if report.study else ()
    against = {(each.variant, each.name): each for each in compared}
    names = sorted(name for name in {name for run in report.runs for name in run.log} if name.startswith("probe/"))
    for variant in report.variants:
        shown = variant_title(report.study, variant) if report.study else variant
        for name in names:
            series = [points for run in report.runs_of(variant) if (points := _finite(run, name))]
            if any(len(points) > 1 for points in series):
                moments = [[points[pick(points)] for points in series] for pick in (min, _middle, max)]
                cells = (_mean_cell(values) for values in moments)
                title = words(metric_name(name).title)
                comparison = _compared_cells(against.get((variant, name)))
                rows.append((words(shown), title, number(len(series), "{}"), *cells, *comparison))
    headings = ("variant", "measure", "seeds", "before training", "halfway", "after training", "difference", "p, seeds")
    caption = (
        "Queries and keys on a fixed probe set: mean \u00b1 standard deviation over seeds; difference after training"
    )
    return Table(caption, headings, tuple(rows)) if rows else None


def _compared_cells(comparison: MeasurementComparisonRecord | None) -> tuple[Cell, Cell]:
    if comparison is None:
        return MISSING, MISSING
    return number(comparison.difference, "{:+.2g}"), p_cell(comparison.seeds_p_holm)


def _finite(run: Run, name: str) -> dict[int, float]:
    return {step: value for step, value in run.log.get(name, {}).items() if math.isfinite(value)}


def _middle(steps: dict[int, float]) -> int:
    """The measured step nearest to half of the training."""
    half = (min(steps) + max(steps)) / 2
    return min(steps, key=lambda step: (abs(step - half), step))


def _mean_cell(values: list[float]) -> Cell:
    if not values:
        return MISSING
    deviation = f" \u00b1 {stdev(values):.2g}" if len(values) > 1 else ""
    return Cell(f"{fmean(values):.3g}{deviation}", fmean(values))
