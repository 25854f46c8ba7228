"""ROUGE-L and exact match as in the protocol of MiniLLM (arXiv:2306.08543) and DSKD (arXiv:2406.17328).

ROUGE-L is the F1 of the longest common subsequence of stemmed words, best over the references of an example; a file's
score is the mean over its examples times 100, rounded to four digits. The words of ``rouge-score`` are runs of ``a-z``
and ``0-9``: text in another script has no words, hence scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_SCORE_DIGITS = 4


@dataclass(frozen=True, slots=True)
class ExampleScores:
    """Scores of one prediction.

    Attributes:
        rouge_l: F1 in [0, 1], best over the references.
        exact_match: whether the prediction equals a reference, outer white space aside.
    """

    rouge_l: float
    exact_match: bool


@cache
def _rouge_scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 in [0, 1] of the prediction against its best reference.

    >>> round(rouge_l("the cat sat", ["a dog ran", "the cats sat down"]), 4)
    0.8571
    """
    assert references, "an example has at least one reference"
    scorer = _rouge_scorer()
    return max(scorer.score(target=reference, prediction=prediction)["rougeL"].fmeasure for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    r"""Whether the prediction equals any reference once outer white space is gone; case and inner space count.

    >>> exact_match(" Paris\n", ["London", "Paris"]), exact_match("paris", ["Paris"])
    (True, False)
    """
    assert references, "an example has at least one reference"
    return prediction.strip() in {reference.strip() for reference in references}


def score_example(prediction: str, references: Sequence[str]) -> ExampleScores:
    """Both scores of one prediction."""
    return ExampleScores(rouge_l=rouge_l(prediction, references), exact_match=exact_match(prediction, references))


def percentage(scores: Sequence[float]) -> float:
    """A file's score: the mean of per-example scores times 100, rounded to four digits.

    >>> percentage([1.0, 0.0, 1.0])
    66.6667
    """
    assert scores, "a file with no example has no score"
    return round(100.0 * sum(scores) / len(scores), _SCORE_DIGITS)
