"""Measures and groups against loops over bytes and tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from random_example import random_example
from scipy.spatial.distance import cdist
from scipy.stats import entropy

from vocabridge.analysis.attention import ExampleAttention, SideTokens
from vocabridge.analysis.measures import CHUNK_TYPES, MEASURES, chunk_distances, group_order, measure, position_groups


def bytes_of(example: ExampleAttention, chunk: int) -> set[int]:
    found = set()
    for side in (example.student, example.teacher):
        for (start, end), other in zip(side.spans.tolist(), side.chunk_ids.tolist(), strict=True):
            found |= set(range(start, end)) if other == chunk else set()
    return found


def slow_distances(example: ExampleAttention, chunk: int) -> list[int]:
    """Steps between the nearest bytes; a token without bytes stands on the byte that would follow it."""
    own = bytes_of(example, chunk)
    steps = []
    for (start, end), other in zip(example.teacher.spans.tolist(), example.teacher.chunk_ids, strict=True):
        theirs = set(range(start, end)) or {start}
        steps.append(0 if other == chunk else min(abs(a - b) for a in own for b in theirs))
    return steps


def slow_measures(row: list[float], distances: list[int]) -> list[float]:
    mass = distance = entropy = 0.0
    for weight, steps in zip(row, distances, strict=True):
        mass += weight if steps == 0 else 0.0
        distance += weight * steps
        entropy -= weight * math.log(weight) if weight else 0.0
    top = distances[row.index(max(row))]
    return [mass, float(top == 0), distance, top, entropy]


@pytest.mark.parametrize("seed", range(6))
def test_measures_are_those_of_loops_over_bytes(seed: int) -> None:
    example = random_example(seed)
    weights, chunks = example.weights["after"], example.student.chunk_ids
    positions = position_groups(example).positions
    assert len(positions) == (chunks >= 0).sum() > 3
    measured = measure(weights, example, positions)
    assert measured.shape == (len(positions), len(MEASURES))
    distances = chunk_distances(example)
    for row, position in enumerate(positions[chunks[positions] < chunks[-1]]):  # the end token has no bytes
        slow = slow_distances(example, chunks[position])
        assert distances[chunks[position]].tolist() == slow
        assert measured[row].tolist() == pytest.approx(slow_measures(weights[position].tolist(), slow))


@pytest.mark.parametrize("seed", range(3))
def test_measures_are_those_of_scipy_and_of_matrices(seed: int) -> None:
    example = random_example(seed, num_segments=20)
    weights, chunks = example.weights["before"], example.student.chunk_ids
    positions = position_groups(example).positions
    measured = measure(weights, example, positions)
    one_hot = [side.chunk_ids[:, None] == np.arange(chunks.max() + 1) for side in (example.student, example.teacher)]
    inside = (one_hot[0].astype(float) @ one_hot[1].T)[positions]
    np.testing.assert_allclose(measured[:, 0], np.einsum("ij,ij->i", weights[positions], inside))
    order = np.argsort(-weights[positions], axis=1)
    np.testing.assert_array_equal(measured[:, 1], np.take_along_axis(inside, order, axis=1)[:, 0])
    np.testing.assert_allclose(measured[:, 4], entropy(weights[positions], axis=1))
    row = int(np.nonzero(chunks[positions] == 2)[0][0])
    own = np.array(sorted(bytes_of(example, 2)))[:, None]
    steps = np.array(
        [
            0.0 if chunk == 2 else cdist(own, np.arange(start, max(end, start + 1))[:, None]).min()
            for (start, end), chunk in zip(example.teacher.spans, example.teacher.chunk_ids, strict=True)
        ]
    )
    assert measured[row, 2] == pytest.approx(weights[positions[row]] @ steps)
    assert measured[row, 3] == steps[order[row, 0]]


def test_the_end_token_is_a_neighbour_of_the_last_byte() -> None:
    spans = np.array([[0, 3], [3, 5], [5, 5]])
    side = SideTokens(np.array([1, 2, 3]), np.array([2, 3, 4]), spans, np.array([0, 1, 2]))
    example = ExampleAttention(side, side, {})
    assert chunk_distances(example).tolist() == [[0, 1, 3], [1, 0, 1], [3, 1, 0]]


def test_equal_highest_weights_share_the_top() -> None:
    spans = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])
    side = SideTokens(np.arange(4), np.arange(4), spans, np.arange(4))
    values = measure(np.full((4, 4), 0.25), ExampleAttention(side, side, {}), np.arange(4))
    assert values[:, 1].tolist() == [0.25] * 4
    assert values[:, 3].tolist() == [1.5, 1.0, 1.0, 1.5]
    assert values[:, 4] == pytest.approx(math.log(4))


def test_a_position_that_attends_to_nothing_has_no_measures() -> None:
    example = random_example(1)
    weights = example.weights["eta"].copy()
    positions = position_groups(example).positions
    weights[positions[2]] = 0
    values = measure(weights, example, positions)
    assert np.isnan(values[2]).all()
    assert np.isfinite(np.delete(values, 2, axis=0)).all()


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_those_of_counting(seed: int) -> None:
    example = random_example(seed, num_segments=14)
    groups = position_groups(example)
    student, teacher = example.student.chunk_ids.tolist(), example.teacher.chunk_ids.tolist()
    bigrams = list(zip(example.teacher.input_ids.tolist(), example.teacher.labels.tolist(), strict=True))
    for row, position in enumerate(groups.positions):
        chunk = student[position]
        many = student.count(chunk) > 1, teacher.count(chunk) > 1
        expected = {(False, False): "1:1", (False, True): "1:n", (True, False): "n:1", (True, True): "n:m"}[many]
        assert groups.labels["chunk type"][row] == expected
        inside = [key for key, other in zip(bigrams, teacher, strict=True) if other == chunk]
        outside = [key for key, other in zip(bigrams, teacher, strict=True) if other != chunk]
        for name, part in (("teacher bigram", slice(None)), ("teacher label", slice(1, None))):
            twin = {key[part] for key in inside} & {key[part] for key in outside}
            assert groups.labels[name][row] == ("repeated" if twin else "unique")
        low, _, high = groups.labels["position"][row].rstrip("+").partition("-")
        assert int(low) <= position + 1 <= int(high or 10**9)
        assert len(student) >= int(groups.labels["length"][row].split("-")[0])
    assert {*groups.labels} == {*group_order()}
    for name, labels in groups.labels.items():
        assert set(labels) <= set(group_order()[name])


def test_every_kind_occurs_in_the_random_examples() -> None:
    labels = [position_groups(random_example(seed, num_segments=14)).labels for seed in range(6)]
    assert {kind for each in labels for kind in each["chunk type"]} == set(CHUNK_TYPES)
    for name in ("teacher bigram", "teacher label"):
        assert {kind for each in labels for kind in each[name]} == {"unique", "repeated"}
