"""Sentences claim what the corrected test over training seeds allows, and no more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import report_cases
from vocabridge.report.collect import collect
from vocabridge.report.study_record import ComparisonRecord, Power
from vocabridge.report.wording import sentence, summary

POWER = Power(difference=0.37)


def comparison(**changes: Any) -> ComparisonRecord:
    facts = {
        "variant": "ga",
        "metric": "rouge_l",
        "scope": "in-domain",
        "domain": "in",
        "seeds": (0, 1, 2, 3, 4, 5),
        "difference": 0.84,
        "std": 0.2,
        "hedges_gz": 3.1,
        "seeds_needed": 5,
        "seeds_low": 0.5,
        "seeds_high": 1.2,
        "seeds_p_holm": 0.031,
        "seeds_smallest_p": 0.031,
        "examples_num": 200,
        "examples_p_holm": 0.0004,
    }
    return ComparisonRecord.model_validate(facts | changes)


@pytest.mark.parametrize(
    ("metric", "difference", "outcome"),
    [
        ("rouge_l", 0.8, "better"),
        ("rouge_l", -0.8, "worse"),
        ("exact_match", 0.8, "better"),
        ("bits_per_byte", -0.01, "better"),
        ("bits_per_byte", 0.01, "worse"),
    ],
)
def test_direction_follows_the_metric(metric: str, difference: float, outcome: str) -> None:
    found = sentence(comparison(metric=metric, difference=difference), "cma", POWER)
    assert found.outcome == outcome
    assert f"ga is {outcome} than cma in domain" in found.text
    assert ("higher" in found.text) == (difference > 0)


def test_a_clear_difference_is_told_with_its_numbers() -> None:
    found = sentence(comparison(), "cma", POWER)
    assert found.text == (
        "ga is better than cma in domain: ROUGE-L is 0.84 points higher (6 seeds, p = 0.031, 95\u00a0% interval +0.50 "
        "to +1.20)."
    )


def test_no_verdict_without_significance_over_seeds() -> None:
    found = sentence(comparison(seeds_p_holm=0.25, seeds=(0, 1, 2), seeds_smallest_p=0.25), "cma", POWER)
    assert found.outcome == "open"
    assert found.text.startswith(
        "ga is not distinguishable from cma in domain: ROUGE-L differs by +0.84 points (3 seeds"
    )
    assert "cannot give a p below 0.25" in found.text
    assert "p < 0.001 over examples" in found.text
    assert "says nothing about another training" in found.text
    assert "A difference of 0.37 would need 5 seeds (to be seen with probability 0.8 at 0.05, with" in found.text


def test_what_so_few_seeds_can_give_is_told_after_correction() -> None:
    six = comparison(seeds_p_holm=0.25, seeds_smallest_p=0.03125)
    assert "cannot give" not in sentence(six, "cma", POWER).text
    nine = six.model_copy(update={"num_comparisons": 9})
    assert "So few seeds and 9 comparisons cannot give a p below 0.281." in sentence(nine, "cma", POWER).text
    three = nine.model_copy(update={"seeds_smallest_p": 0.25})
    assert "cannot give a p below 1." in sentence(three, "cma", POWER).text


def test_the_seeds_needed_are_told_with_their_level() -> None:
    text = sentence(comparison(seeds_p_holm=0.25, seeds_needed=41, num_comparisons=9), "cma", POWER).text
    assert "would need 41 seeds (to be seen with probability 0.8 at 0.05 / 9 comparisons, with the spread" in text


def test_exactly_the_level_is_no_verdict() -> None:
    assert sentence(comparison(seeds_p_holm=0.05), "cma", POWER).outcome == "open"


def test_one_seed_has_no_interval() -> None:
    lone = comparison(seeds=(0,), seeds_low=None, seeds_high=None, std=None, hedges_gz=None, seeds_needed=None)
    text = sentence(lone.model_copy(update={"seeds_p_holm": 1.0}), "cma", POWER).text
    assert "(1 seed, p = 1.000)" in text


def test_summary_of_a_study(tmp_path: Path) -> None:
    found = summary(collect(report_cases.finished_study(tmp_path)))
    text = " ".join(found.introduction)
    assert "compares cma_ga and sft against the baseline cma, each trained with 3 training seeds" in text
    assert "9 of 9 runs are done." in text
    assert "test (in domain) and other (out of domain) with 2 sampling seeds" in text
    assert [(each.variant, each.metric) for each in found.main] == [("cma_ga", "rouge_l"), ("sft", "rouge_l")] * 2
    assert len(found.other) == 8


def test_every_comparison_names_its_own_baseline(tmp_path: Path) -> None:
    path = report_cases.finished_study(tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + "baselines: {sft: cma_ga}\n", encoding="utf-8")
    report = collect(path)
    found = summary(report)
    assert "compares cma_ga against the baseline cma, sft against cma_ga, each trained" in " ".join(found.introduction)
    said = {(each.variant, re.split(r" (?:than|from) ", each.text)[1].split()[0]) for each in found.main + found.other}
    assert said == {("cma_ga", "cma"), ("sft", "cma_ga")}


def test_summary_of_an_unfinished_study(tmp_path: Path) -> None:
    found = summary(collect(report_cases.partial_study(tmp_path)))
    assert "1 of 9 runs is done (1 failed, 7 pending)." in found.introduction
    assert found.main == ()
