"""Scores of all variants with their tests against their baselines; of a single run, its own evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vocabridge.report.collect import Report, Run
from vocabridge.report.figures import Difference, difference_figure
from vocabridge.report.study_record import AVERAGES, ComparisonRecord, Metric, StudyRecord, SummaryRecord
from vocabridge.report.view import MISSING, Cell, Chart, Table, number, with_interval, words
from vocabridge.report.wording import ALPHA, METRIC_TITLES, against_others, digits, p_value, scope_title

_UNITS: Mapping[Metric, str] = {
    "rouge_l": "ROUGE-L points",
    "exact_match": "percentage points",
    "bits_per_byte": "bits per byte",
}


@dataclass(frozen=True, slots=True)
class Results:
    """Differences as charts, averages as tables, and the same by file."""

    charts: tuple[Chart, ...]
    averages: tuple[Table, ...]
    files: tuple[Table, ...]


def results(report: Report) -> Results:
    """The results section; empty without a finished evaluation."""
    if report.study is None:
        found = [table for run in report.runs if (table := _evaluation_table(run)) is not None]
        return Results((), tuple(found), ())
    study = report.study
    scopes = dict.fromkeys((each.metric, each.scope, each.domain) for each in study.summaries)
    averages: list[Table] = []
    files: list[Table] = []
    for metric in METRIC_TITLES:
        for cell_metric, scope, domain in scopes:
            if cell_metric == metric:
                table = _table(study, metric, scope=scope, domain=domain)
                (averages if scope in AVERAGES else files).append(table)
    return Results(tuple(_difference_charts(study)), tuple(averages), tuple(files))


def _table(study: StudyRecord, metric: Metric, *, scope: str, domain: str) -> Table:
    summaries = {each.variant: each for each in study.summaries if (each.metric, each.scope) == (metric, scope)}
    comparisons = {each.variant: each for each in study.comparisons if (each.metric, each.scope) == (metric, scope)}
    headings = ["variant", "seeds", "mean \u00b1 sd", "95 % interval", "difference [95 %]"]
    headings += ["p, seeds", "p, examples", "effect (paired g_z)"]
    with_power = metric == "rouge_l"
    if with_power:
        headings.append(f"seeds to see {study.power.difference:g}")
    rows = []
    for variant in study.variants:
        if variant in summaries:
            row = [words(variant_title(study, variant)), *_summary_cells(summaries[variant])]
            row += _comparison_cells(comparisons.get(variant), metric, with_power=with_power)
            rows.append(tuple(row))
    caption = f"{METRIC_TITLES[metric][0].upper()}{METRIC_TITLES[metric][1:]}, {scope_title(scope, domain)}"
    unit = {"rouge_l": " (0 to 100)", "exact_match": " (%)", "bits_per_byte": " (less is better)"}[metric]
    return Table(caption + unit, tuple(headings), tuple(rows))


def variant_title(study: StudyRecord, variant: str) -> str:
    """The variant, and what it is compared with where that is not the study's baseline."""
    if (baseline := study.baseline_of(variant)) != study.baseline:
        return f"{variant} (against {baseline})"
    return f"{variant} (baseline)" if variant == study.baseline else variant


def _summary_cells(summary: SummaryRecord) -> list[Cell]:
    places = digits(summary.metric)
    deviation = "" if summary.std is None else f" \u00b1 {summary.std:.{places}f}"
    if summary.low is None or summary.high is None:
        interval = MISSING
    else:
        interval = Cell(f"{summary.low:.{places}f} to {summary.high:.{places}f}", summary.low)
    return [
        number(len(summary.seeds), "{}"),
        Cell(f"{summary.mean:.{places}f}{deviation}", summary.mean),
        interval,
    ]


def _comparison_cells(comparison: ComparisonRecord | None, metric: Metric, *, with_power: bool) -> list[Cell]:
    if comparison is None:
        return [MISSING] * (5 if with_power else 4)
    low, high = comparison.seeds_low, comparison.seeds_high
    cells = [
        with_interval(comparison.difference, low, high, pattern=f"{{:+.{digits(metric)}f}}"),
        p_cell(comparison.seeds_p_holm),
        p_cell(comparison.examples_p_holm),
        number(comparison.hedges_gz, "{:+.2f}"),
    ]
    return [*cells, number(comparison.seeds_needed, "{}")] if with_power else cells


def p_cell(value: float | None) -> Cell:
    """A corrected p-value, marked where it is significant; a dash where there was no test."""
    if value is None:
        return MISSING
    return Cell(p_value(value) + (" *" if value < ALPHA else ""), value, emphasis=value < ALPHA)


def _difference_charts(study: StudyRecord) -> list[Chart]:
    charts = []
    for metric, title in METRIC_TITLES.items():
        parts = [
            Difference(
                each.variant,
                each.domain,
                mean=each.difference,
                low=each.seeds_low,
                high=each.seeds_high,
                by_seed=_by_seed(study, each),
            )
            for each in study.comparisons
            if each.metric == metric and each.scope in AVERAGES
        ]
        if parts:
            variants = [variant for variant in study.variants if variant in {part.variant for part in parts}]
            figure = difference_figure(parts, variants, unit=_UNITS[metric])
            heading = f"{title[0].upper()}{title[1:]} against {study.baseline}"
            if others := against_others(study):
                heading += f" ({', '.join(others)})"
            caption = "Filled: in domain; open: out of domain. Bar: 95 % interval over seeds; small ticks: seeds."
            charts.append(Chart(f"difference-{metric}", heading, caption, figure))
    return charts


def _by_seed(study: StudyRecord, comparison: ComparisonRecord) -> dict[int, float]:
    values: dict[str, dict[int, float]] = {}
    for score in study.scores:
        if (score.metric, score.scope) == (comparison.metric, comparison.scope):
            values.setdefault(score.variant, {})[score.seed] = score.value
    ours, theirs = values.get(comparison.variant, {}), values.get(study.baseline_of(comparison.variant), {})
    return {seed: ours[seed] - theirs[seed] for seed in comparison.seeds if seed in ours and seed in theirs}


def _evaluation_table(run: Run) -> Table | None:
    files = (run.evaluation or {}).get("files")
    if not isinstance(files, list):
        return None
    headings = ("data", "domain", "rows", "ROUGE-L \u00b1 sd", "exact match \u00b1 sd, %", "bits per byte")
    try:
        return Table("Scores over sampling seeds", headings, tuple(_file_row(file) for file in files))
    except (LookupError, TypeError, ValueError):
        return None


def _file_row(file: Mapping[str, Any]) -> tuple[Cell, ...]:
    return (
        words(str(file["name"])),
        words("in" if file["in_domain"] else "out"),
        number(file.get("num_examples"), "{}"),
        _mean_std(file["rouge_l"]),
        _mean_std(file["exact_match"]),
        number(float(file["bits_per_byte"]), "{:.4f}"),
    )


def _mean_std(score: Mapping[str, float | None]) -> Cell:
    mean, deviation = score["mean"], score["std"]
    assert mean is not None, "a score has a mean"
    return Cell(f"{mean:.2f}" + ("" if deviation is None else f" \u00b1 {deviation:.2f}"), mean)
