"""The probe's means and intervals against drawing the examples one by one."""

from __future__ import annotations

import io

import numpy as np
import pytest
from random_example import random_example
from rich.console import Console
from scipy import stats

from vocabridge.analysis.measures import MEASURES, measure, position_groups
from vocabridge.analysis.probe import ALL, Bootstrap, ProbeReport, ProbeSource, probe
from vocabridge.analysis.tables import render_probe
from vocabridge.errors import UserError

SOURCE = ProbeSource("runs/a", "dskd_cma", "data.jsonl")
EXAMPLES = [random_example(seed, attends=0.8) for seed in range(7)]


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    return probe(EXAMPLES, SOURCE, bootstrap=Bootstrap(resamples=300, seed=3))


def values_of(attention, grouping, group):
    """Measures of the positions of a group, one array per example."""
    found = []
    for example in EXAMPLES:
        groups = position_groups(example)
        rows = measure(example.weights[attention], example, groups.positions)
        if grouping != ALL:
            rows = rows[groups.labels[grouping] == group]
        found.append(rows[~np.isnan(rows[:, 0])])
    return found


@pytest.mark.parametrize(
    ("attention", "grouping", "group"),
    [("after", ALL, ALL), ("before", "chunk type", "n:m"), ("eta", "teacher bigram", "repeated")],
)
def test_means_and_intervals(report: ProbeReport, attention: str, grouping: str, group: str) -> None:
    result = report.result(attention, grouping, group)
    values = values_of(attention, grouping, group)
    everything = np.concatenate(values)
    assert result.positions == len(everything) > 5
    draws = Bootstrap(resamples=300, seed=3).draws(len(EXAMPLES))
    assert (draws.sum(1) == len(EXAMPLES)).all()
    means = []
    for draw in draws:
        drawn = np.concatenate([values[index] for index in np.repeat(np.arange(len(EXAMPLES)), draw.astype(int))])
        means.append(drawn.mean(0))
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    for column, name in enumerate(MEASURES):
        estimate = result.measures[name]
        assert estimate.mean == pytest.approx(everything[:, column].mean())
        assert (estimate.low, estimate.high) == (pytest.approx(low[column]), pytest.approx(high[column]))
        assert estimate.low <= estimate.mean <= estimate.high


def test_change_is_the_paired_difference(report: ProbeReport) -> None:
    (change,) = (each for each in report.changes if each.grouping == ALL)
    before, after = (values_of(name, ALL, ALL) for name in ("before", "after"))
    differences = []
    for draw in Bootstrap(resamples=300, seed=3).draws(len(EXAMPLES)):
        chosen = np.repeat(np.arange(len(EXAMPLES)), draw.astype(int))
        means = [np.concatenate([part[index] for index in chosen]).mean(0) for part in (before, after)]
        differences.append(means[1] - means[0])
    low, high = np.percentile(differences, [2.5, 97.5], axis=0)
    estimate = change.measures["mass_in_chunk"]
    assert estimate.mean == pytest.approx(np.concatenate(after)[:, 0].mean() - np.concatenate(before)[:, 0].mean())
    assert (estimate.low, estimate.high) == (pytest.approx(low[0]), pytest.approx(high[0]))


@pytest.mark.parametrize(("attention", "grouping"), [("after", "teacher label"), ("uniform", "teacher bigram")])
def test_effect_of_repetition_is_the_difference_on_the_same_draws(
    report: ProbeReport, attention: str, grouping: str
) -> None:
    (effect,) = (each for each in report.repetition if (each.attention, each.grouping) == (attention, grouping))
    unique, repeated = (values_of(attention, grouping, group) for group in ("unique", "repeated"))
    differences = []
    for draw in Bootstrap(resamples=300, seed=3).draws(len(EXAMPLES)):
        chosen = np.repeat(np.arange(len(EXAMPLES)), draw.astype(int))
        drawn = [np.concatenate([part[index] for index in chosen]) for part in (unique, repeated)]
        if all(map(len, drawn)):
            differences.append(drawn[1].mean(0) - drawn[0].mean(0))
    low, high = np.percentile(differences, [2.5, 97.5], axis=0)
    for column, name in enumerate(MEASURES):
        estimate = effect.measures[name]
        expected = np.concatenate(repeated)[:, column].mean() - np.concatenate(unique)[:, column].mean()
        assert estimate.mean == pytest.approx(expected)
        assert (estimate.low, estimate.high) == (pytest.approx(low[column]), pytest.approx(high[column]))
    assert {(each.attention, each.grouping) for each in report.repetition} == {
        (name, kind) for name in EXAMPLES[0].weights for kind in ("teacher bigram", "teacher label")
    }


def test_intervals_are_those_of_scipy() -> None:
    many = [random_example(seed, attends=0.8) for seed in range(40)]
    values = [measure(each.weights["after"], each, position_groups(each).positions)[:, 0] for each in many]
    sums, counts = (
        np.array([np.nansum(each) for each in values]),
        np.array([np.isfinite(each).sum() for each in values]),
    )
    expected = stats.bootstrap(
        (sums, counts),
        lambda total, count, axis=-1: total.sum(axis) / count.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=1,
    ).confidence_interval
    found = probe(many, SOURCE, bootstrap=Bootstrap(resamples=4000)).result("after").measures["mass_in_chunk"]
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.06 * width)
    assert found.high == pytest.approx(expected.high, abs=0.06 * width)


def test_groups_divide_all_positions(report: ProbeReport) -> None:
    for attention in ("uniform", "after", "eta"):
        for grouping in {each.grouping for each in report.results} - {ALL}:
            parts = [each for each in report.results if (each.attention, each.grouping) == (attention, grouping)]
            whole = report.result(attention)
            assert sum(each.positions for each in parts) == whole.positions
            weighted = sum(each.positions * each.measures["entropy"].mean for each in parts)
            assert weighted == pytest.approx(whole.positions * whole.measures["entropy"].mean)
    in_chunk = sum((example.student.chunk_ids >= 0).sum() for example in EXAMPLES)
    assert report.positions_in_chunk == in_chunk
    assert report.supervised_positions == sum(len(example.student.labels) for example in EXAMPLES) > in_chunk
    assert report.result("after").coverage == report.result("after").positions / in_chunk < 1


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Examples are alike in law, so intervals over 12 of them should cover the mean over very many."""
    many = [random_example(seed) for seed in range(1000, 1300)]
    truth = probe(many, SOURCE, bootstrap=Bootstrap(resamples=2)).result("after").measures["mass_in_chunk"].mean
    hits = 0
    for trial in range(25):
        few = many[12 * trial : 12 * trial + 12]
        estimate = probe(few, SOURCE, bootstrap=Bootstrap(resamples=200, seed=trial)).result("after").measures
        hits += estimate["mass_in_chunk"].low <= truth <= estimate["mass_in_chunk"].high
    assert 19 <= hits <= 25


def test_one_example_has_no_interval() -> None:
    estimate = probe(EXAMPLES[:1], SOURCE).result("after").measures["entropy"]
    assert estimate.mean > 0
    assert estimate.low is estimate.high is None


def test_no_chunk_is_an_error() -> None:
    example = random_example(0)
    for side in (example.student, example.teacher):
        side.chunk_ids[:] = -1
    with pytest.raises(UserError, match="nothing to measure"):
        probe([example], SOURCE)


def test_json_reads_back_and_table_shows_it(report: ProbeReport) -> None:
    assert ProbeReport.model_validate_json(report.to_json()) == report
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_probe(report))
    text = console.export_text()
    estimate = report.result("after").measures["mass_in_chunk"]
    assert f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]" in text
    for words in (
        "runs/a",
        "ETA bound",
        "chunk type n:m",
        "teacher bigram repeated",
        "after - before",
        "label: repeated - unique",
    ):
        assert words in text
    with pytest.raises(KeyError):
        report.result("after", "position", "129+")
