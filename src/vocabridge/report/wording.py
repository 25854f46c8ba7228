"""The summary: what was compared, and every comparison as a sentence that claims no more than the test allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vocabridge.report.collect import Report
from vocabridge.report.study_record import AVERAGES, ComparisonRecord, Metric, Power, StudyRecord
from vocabridge.report.view import listed

ALPHA = 0.05

METRIC_TITLES: Mapping[Metric, str] = {
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "bits_per_byte": "bits per byte",
}
_UNITS: Mapping[Metric, str] = {"rouge_l": " points", "exact_match": " percentage points", "bits_per_byte": ""}

Outcome = Literal["better", "worse", "open"]


@dataclass(frozen=True, slots=True)
class Sentence:
    """One comparison in words."""

    variant: str
    metric: Metric
    outcome: Outcome
    text: str


@dataclass(frozen=True, slots=True)
class Summary:
    """The first section: an introduction, the main metric's comparisons, those of the other metrics."""

    introduction: tuple[str, ...]
    main: tuple[Sentence, ...]
    other: tuple[Sentence, ...]


def digits(metric: Metric) -> int:
    """Decimals of a metric's values."""
    return 4 if metric == "bits_per_byte" else 2


def scope_title(scope: str, domain: str) -> str:
    """How a scope is called in headings.

    >>> scope_title("in-domain", "in"), scope_title("dolly", "in")
    ('in-domain average', 'dolly (in domain)')
    """
    if scope in AVERAGES:
        return f"{scope} average"
    return f"{scope} ({'in domain' if domain == 'in' else 'out of domain'})"


def summary(report: Report) -> Summary:
    """What the page begins with."""
    study = report.study
    if study is None:
        run = report.runs[0]
        steps = max((max(series, default=0) for series in run.log.values()), default=0)
        state = "finished" if run.record.state == "done" else "not finished"
        text = (
            f"One run with the objective {run.record.objective}, seed {run.record.seed}: {state}, {steps} steps logged."
        )
        return Summary((text, "A single run shows no spread over seeds; 'vocabridge study' compares variants."), (), ())
    sentences = [
        sentence(comparison, study.baseline_of(comparison.variant), study.power)
        for comparison in study.comparisons
        if comparison.scope in AVERAGES
    ]
    return Summary(
        introduction=_introduction(report, study),
        main=tuple(each for each in sentences if each.metric == "rouge_l"),
        other=tuple(each for each in sentences if each.metric != "rouge_l"),
    )


def _introduction(report: Report, study: StudyRecord) -> tuple[str, ...]:
    states = Counter(run.state for run in study.runs)
    done = states.pop("done", 0)
    unfinished = ", ".join(f"{count} {state}" for state, count in states.items())
    rest = f" ({unfinished})" if unfinished else ""
    lines = [
        f"This study compares {_compared(study)}, each trained with {_count(len(study.seeds), 'training seed')}.",
        f"{done} of {_count(len(study.runs), 'run')} {'is' if done == 1 else 'are'} done{rest}.",
    ]
    if scopes := _measured_on(study):
        lines.append(scopes)
    if done < len(study.runs):
        lines.append("Everything below is what is known so far.")
    return tuple(lines)


def _compared(study: StudyRecord) -> str:
    """Who with whom: ``sft and uld against the baseline cma, cma_ga_frozen against cma_ga``."""
    others = [variant for variant in study.variants if study.baseline_of(variant) == study.baseline != variant]
    first = [f"{listed(others)} against the baseline {study.baseline}" if others else study.baseline]
    return ", ".join([*first, *against_others(study)])


def against_others(study: StudyRecord) -> list[str]:
    """The variants that are compared with another one than the study's baseline: ``a and b against c``."""
    groups: dict[str, list[str]] = {}
    for variant in study.variants:
        if (baseline := study.baseline_of(variant)) != study.baseline:
            groups.setdefault(baseline, []).append(variant)
    return [f"{listed(variants)} against {baseline}" for baseline, variants in groups.items()]


def _measured_on(study: StudyRecord) -> str:
    files = {
        domain: list(
            dict.fromkeys(each.scope for each in study.scores if each.domain == domain and each.scope not in AVERAGES)
        )
        for domain in ("in", "out")
    }
    parts = [
        f"{listed(names)} ({words})"
        for names, words in ((files["in"], "in domain"), (files["out"], "out of domain"))
        if names
    ]
    sampling = max((each.num_sampling_seeds for each in study.scores), default=0)
    return f"Measured on {listed(parts)} with {_count(sampling, 'sampling seed')}." if parts else ""


def sentence(comparison: ComparisonRecord, baseline: str, power: Power) -> Sentence:
    """One comparison; better or worse only where the corrected test over training seeds says so."""
    metric, places = comparison.metric, digits(comparison.metric)
    where = "in domain" if comparison.domain == "in" else "out of domain"
    facts = [_count(len(comparison.seeds), "seed"), f"p {p_value(comparison.seeds_p_holm, sign=True)}"]
    if comparison.seeds_low is not None:
        facts.append(f"95\u00a0% interval {comparison.seeds_low:+.{places}f} to {comparison.seeds_high:+.{places}f}")
    stated = ", ".join(facts)
    title, size = METRIC_TITLES[metric], f"{abs(comparison.difference):.{places}f}{_UNITS[metric]}"
    if comparison.seeds_p_holm < ALPHA:
        more = comparison.difference > 0
        outcome: Outcome = "better" if more != (metric == "bits_per_byte") else "worse"
        text = (
            f"{comparison.variant} is {outcome} than {baseline} {where}: {title} is {size} "
            f"{'higher' if more else 'lower'} ({stated})."
        )
        return Sentence(comparison.variant, metric, outcome, text)
    text = (
        f"{comparison.variant} is not distinguishable from {baseline} {where}: {title} differs by "
        f"{comparison.difference:+.{places}f}{_UNITS[metric]} ({stated})."
    )
    return Sentence(comparison.variant, metric, "open", text + _what_would_tell(comparison, power))


def _what_would_tell(comparison: ComparisonRecord, power: Power) -> str:
    added = ""
    smallest = min(1.0, comparison.num_comparisons * comparison.seeds_smallest_p)  # Holm's first step
    if smallest > ALPHA:
        several = f" and {comparison.num_comparisons} comparisons" if comparison.num_comparisons > 1 else ""
        added += f" So few seeds{several} cannot give a p below {smallest:.3g}."
    if comparison.examples_p_holm is not None and comparison.examples_p_holm < ALPHA:
        sure = p_value(comparison.examples_p_holm, sign=True)
        added += (
            f" These trained models do differ on other prompts of this kind (p {sure} over examples), which says "
            "nothing about another training."
        )
    if comparison.seeds_needed is not None:
        shared = f" / {comparison.num_comparisons} comparisons" if comparison.num_comparisons > 1 else ""
        added += (
            f" A difference of {power.difference:g} would need {_count(comparison.seeds_needed, 'seed')} (to be seen "
            f"with probability {power.power:g} at {power.alpha:g}{shared}, with the spread of these seeds)."
        )
    return added


def p_value(value: float, *, sign: bool = False) -> str:
    """A p-value as papers have it; with ``sign`` to follow the letter p.

    >>> p_value(0.0312), p_value(0.00001), p_value(0.0312, sign=True)
    ('0.031', '< 0.001', '= 0.031')
    """
    if value < 0.001:
        return "< 0.001"
    return f"= {value:.3f}" if sign else f"{value:.3f}"


def plain(value: Any) -> str:
    """A value of a record in words.

    >>> plain(None), plain([1, 2]), plain(True)
    ('none', '1, 2', 'yes')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(plain(each) for each in value) or "none"
    return str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
