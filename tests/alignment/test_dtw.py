"""Dynamic time warping against the textbook's table and against all paths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vocabridge.alignment.dtw import warping_path
from warping_oracle import edit_distance, table_path

GOLDEN = Path(__file__).parent.parent / "golden" / "case_mined_A.json"


def cheapest(costs: np.ndarray) -> float:
    """Over all paths."""

    def onward(i: int, j: int) -> float:
        if (i, j) == (costs.shape[0] - 1, costs.shape[1] - 1):
            return costs[i, j]
        steps = ((i + 1, j + 1), (i + 1, j), (i, j + 1))
        return costs[i, j] + min(onward(a, b) for a, b in steps if a < costs.shape[0] and b < costs.shape[1])

    return onward(0, 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (7, 1), (5, 5), (9, 4), (4, 11), (30, 37)])
def test_path_of_integer_costs_is_the_textbook_path(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(sum(shape))
    for _ in range(30):
        costs = random.integers(0, 4, shape)  # many ties
        assert [tuple(pair) for pair in warping_path(costs).tolist()] == table_path(costs.tolist())


def test_path_of_real_costs_is_the_cheapest() -> None:
    random = np.random.default_rng(0)
    for _ in range(30):
        costs = random.random((5, 4))
        path = warping_path(costs)
        assert costs[path[:, 0], path[:, 1]].sum() == pytest.approx(cheapest(costs))


def test_equal_sequences_pair_one_to_one() -> None:
    words = ["a", "a", "b", "a", "a", "a"]
    costs = np.array([[float(left != right) for right in words] for left in words])
    assert warping_path(costs).tolist() == [[i, i] for i in range(6)]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_an_empty_sequence_has_no_pairs(shape: tuple[int, int]) -> None:
    assert warping_path(np.zeros(shape)).shape == (0, 2)


def test_unsigned_costs_do_not_wrap() -> None:
    costs = np.full((4, 4), 200, dtype=np.uint8)
    assert warping_path(costs).tolist() == [[i, i] for i in range(4)]


def test_published_paths() -> None:
    cases = json.loads(GOLDEN.read_text())["dtw"]
    assert len(cases) == 3
    for case in cases:
        teacher, student = (
            [token.replace("Ġ", "") for token in case[side]] for side in ("teacher_tokens", "student_tokens")
        )
        costs = np.array([[edit_distance(mine, theirs) for theirs in student] for mine in teacher])
        path = warping_path(costs)
        assert path.tolist() == case["path_teacher_student"]
        assert costs[path[:, 0], path[:, 1]].sum() == case["cost"]
