"""A study on the screen: its plan, its means, its comparisons."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from vocabridge.study.estimate import estimate, total_seconds
from vocabridge.study.plan import PlannedRun, StudyPlan
from vocabridge.study.results import ALPHA, DIFFERENCE_TO_SEE, Comparison, StudyResult, Summary, Tested
from vocabridge.study.scores import Metric, Scope
from vocabridge.study.status import RunStatus

if TYPE_CHECKING:
    from vocabridge.plan.forecast import Forecast  # imports torch

_TITLES: dict[Metric, str] = {"rouge_l": "ROUGE-L", "exact_match": "exact match", "bits_per_byte": "bits/byte"}


def plan_table(
    plan: StudyPlan,
    statuses: Mapping[PlannedRun, RunStatus],
    *,
    jobs: int,
    forecasts: Mapping[str, Forecast] = MappingProxyType({}),
) -> Table:
    """One line a variant: how its runs stand and what is still to come, by forecasts where no run is done."""
    parts = estimate(plan, statuses, forecasts)
    table = Table(title=f"{escape(str(plan.folder))}: {len(plan.runs)} runs", title_justify="left")
    table.add_column("variant", overflow="fold")
    for heading in ("objective", "runs"):
        table.add_column(heading)
    for heading in ("a run", "left"):
        table.add_column(heading, justify="right", no_wrap=True)
    objectives = {run.variant: run.recipe.objective.name for run in plan.runs}
    for part in parts:
        name = f"{escape(part.variant)} (baseline)" if part.variant == plan.baseline else escape(part.variant)
        states = ", ".join(f"{count} {state}" for state, count in Counter(part.states.values()).items())
        costs = _cost(part.seconds_per_run, part.bytes_per_run), _cost(part.seconds_left, part.bytes_left)
        table.add_row(name, escape(objectives[part.variant]), states, *costs)
    left = [part.bytes_left for part in parts]
    known = [value for value in left if value is not None]
    total = gigabytes(sum(known) if len(known) == len(left) else None)
    with_jobs = f" with {jobs} processes" if jobs > 1 else ""
    free = gigabytes(_free_bytes(plan.folder))
    seconds = total_seconds(parts, jobs)
    left_over = "unknown until a run is done" if seconds is None else f"{duration(seconds)}{with_jobs}, {total}"
    table.caption = f"left: {left_over}; {free} free"
    if forecasts:
        cache = max(guess.cache_bytes for guess in forecasts.values())
        with_cache = f"; the teacher's cache: {gigabytes(cache)}" if cache else ""
        table.caption += f"{with_cache}. A guess from the models' sizes until a run is done"
    return table


def _cost(seconds: float | None, num_bytes: float | None) -> str:
    """Time and disk: ``10 min, 5 MB``."""
    parts = dict.fromkeys((duration(seconds), gigabytes(num_bytes)))
    return ", ".join(parts)


def unfinished_lines(statuses: Mapping[PlannedRun, RunStatus]) -> list[str]:
    """A line for every run that failed or has something to say."""
    return [
        f"{run.title}: {status.state}: {status.message}"
        for run, status in statuses.items()
        if status.message and status.state != "done"
    ]


def result_tables(result: StudyResult) -> list[Table]:
    """Means of every metric, then the comparisons, a table for each metric and baseline.

    Nothing without a finished run. An average over a single file is that file's row again and left out.
    """
    if not result.summaries:
        return []
    tables = [_means_table(result, metric, title) for metric, title in _TITLES.items()]
    groups: dict[tuple[Metric, str], list[Comparison]] = {}
    for comparison in result.comparisons:
        if not _repeats_a_file(comparison.scope):
            groups.setdefault((comparison.metric, comparison.baseline), []).append(comparison)
    if not groups:
        return tables
    tables += [_comparison_table(group) for group in groups.values()]
    tables[-1].caption = _comparisons_caption(result.comparisons)
    return tables


def _means_table(result: StudyResult, metric: Metric, title: str) -> Table:
    rows = [summary for summary in result.summaries if summary.metric == metric]
    scopes = list(dict.fromkeys(summary.scope for summary in rows if not _repeats_a_file(summary.scope)))
    table = Table(title=f"{title}: mean and standard deviation over training seeds", title_justify="left")
    table.add_column("variant", overflow="fold")
    table.add_column("seeds", justify="right")
    for scope in scopes:
        table.add_column(_scope_title(scope), justify="right")
    digits = 4 if metric == "bits_per_byte" else 2
    for variant in dict.fromkeys(summary.variant for summary in rows):
        own = {summary.scope: summary for summary in rows if summary.variant == variant}
        num = max(len(summary.seeds) for summary in own.values())
        table.add_row(escape(variant), str(num), *(_mean_cell(own.get(scope), digits) for scope in scopes))
    return table


def _comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Comparisons of one metric with one baseline, a section for each file or average."""
    metric, baseline = comparisons[0].metric, comparisons[0].baseline
    table = Table(
        title=f"\n{_TITLES[metric]} against {escape(baseline)}",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,  # 80 columns have no room for more
    )
    table.add_column("variant", overflow="fold")
    table.add_column("difference", no_wrap=True)
    headings = ["p,\nseeds", "p,\nexamples", "effect\ng_z", "seeds"]
    if metric == "rouge_l":
        headings.append(f"seeds\nfor\n{DIFFERENCE_TO_SEE}")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for scope in dict.fromkeys(comparison.scope for comparison in comparisons):
        table.add_section()
        table.add_row(_scope_title(scope), style="italic")
        for comparison in comparisons:
            if comparison.scope == scope:
                table.add_row(*_comparison_cells(comparison)[: len(table.columns)])  # the last only of ROUGE-L
    return table


def _comparison_cells(comparison: Comparison) -> list[str]:
    digits = 4 if comparison.metric == "bits_per_byte" else 2
    interval = comparison.over_seeds.interval
    spread = "" if interval is None else f" [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
    return [
        escape(comparison.variant),
        f"{comparison.difference:+.{digits}f}{escape(spread)}",
        _p_cell(comparison.over_seeds),
        _p_cell(comparison.over_examples),
        "-" if comparison.effect is None else f"{comparison.effect.hedges_gz:+.2f}",
        str(len(comparison.seeds)),
        "-" if comparison.seeds_needed is None else str(comparison.seeds_needed),
    ]


def _comparisons_caption(comparisons: Sequence[Comparison]) -> str:
    caption = (
        "95 % bootstrap intervals over seeds; p-values Holm-corrected over all comparisons of a metric on the same "
        f"data, * below {ALPHA}; seeds for {DIFFERENCE_TO_SEE}: to see that difference with probability 0.8 after the "
        "correction"
    )
    smallest = min(comparison.smallest_p_holm for comparison in comparisons)
    if smallest > ALPHA:
        caption += f"; so few seeds for so many comparisons cannot give a p over seeds below {smallest:.3g}"
    return caption


def _repeats_a_file(scope: Scope) -> bool:
    return scope.is_average and len(scope.files) == 1


def _mean_cell(summary: Summary | None, digits: int) -> str:
    if summary is None:
        return "-"
    return f"{summary.mean:.{digits}f}" + ("" if summary.std is None else f" ± {summary.std:.{digits}f}")


def _p_cell(tested: Tested | None) -> str:
    return "-" if tested is None else f"{tested.p_holm:.4f}" + ("*" if tested.p_holm < ALPHA else "")


def _scope_title(scope: Scope) -> str:
    return escape(scope.name) if scope.is_average else f"{escape(scope.name)} ({scope.domain})"


def duration(seconds: float | None) -> str:
    """Time as people say it.

    >>> duration(None), duration(42), duration(600), duration(30_000)
    ('unknown', '42 s', '10 min', '8.3 h')
    """
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def gigabytes(num_bytes: float | None) -> str:
    """Size in decimal units.

    >>> gigabytes(None), gigabytes(5e6), gigabytes(2.5e9)
    ('unknown', '5 MB', '2.5 GB')
    """
    if num_bytes is None:
        return "unknown"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"


def _free_bytes(folder: Path) -> int:
    """Of the disk that the folder lies on, or will."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def summary_line(statuses: Sequence[RunStatus]) -> str:
    """How many runs stand where: ``38 done, 2 failed``."""
    return ", ".join(f"{count} {state}" for state, count in Counter(status.state for status in statuses).items())
