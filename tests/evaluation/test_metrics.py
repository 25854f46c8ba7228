"""Scores against values worked out by hand."""

from __future__ import annotations

import pytest

from vocabridge.evaluation.metrics import exact_match, percentage, rouge_l, score_example


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # 4 words against 5, common subsequence "the cat on mat" is not in order; "the cat mat" is: LCS 3.
    # precision 3/4, recall 3/5, F1 = 2 * 0.75 * 0.6 / 1.35 = 2/3.
    assert rouge_l("the cat mat on", ["the cat sat on mat"]) == pytest.approx(2 * 0.75 * 0.6 / 1.35)


def test_rouge_l_ignores_case_punctuation_and_endings() -> None:
    assert rouge_l("He RUNS, quickly!", ["he running quickly"]) == 1.0  # the stemmer is on


def test_rouge_l_takes_the_best_reference_wherever_it_stands() -> None:
    references = ["nothing alike", "a b c d", "a b"]
    assert rouge_l("a b c", references) == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert rouge_l("a b c", references[::-1]) == pytest.approx(2 * 1 * 0.75 / 1.75)


def test_an_empty_prediction_scores_zero() -> None:
    assert rouge_l("", ["anything"]) == 0.0


def test_exact_match_strips_outer_white_space_only() -> None:
    assert exact_match("\n42 ", ["41", " 42"])
    assert not exact_match("4 2", ["42"])
    assert not exact_match("Paris", ["paris"])


def test_scores_of_an_example_are_both_scores() -> None:
    scores = score_example("yes", ["no", "yes"])
    assert (scores.rouge_l, scores.exact_match) == (1.0, True)


def test_a_file_score_is_a_percentage_with_four_digits() -> None:
    assert percentage([1 / 3, 1.0, 0.0]) == 44.4444
