"""The map between vocabularies against dictionaries and loops."""

import numpy as np
import pytest
import torch

from vocabridge.losses.vocabulary_projection import (
    Entries,
    Projection,
    common_tokens,
    project,
    projection_entries,
    spelling_entries,
)

NUM_STUDENT, NUM_TEACHER = 23, 31
PINNED = [(3, 7), (0, 30), (9, 9)]


def ragged(spellings):
    return np.cumsum([0, *map(len, spellings)]), np.array([i for s in spellings for i in s], dtype=np.int64)


def random_spellings(seed, count, vocabulary):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 8, count)
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths]


def pins(pairs):
    ids = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Entries(ids[:, 0], ids[:, 1], np.ones(len(ids)))


def piece_weights(spelling):
    raw = [0.9 * 0.1**i for i in range(min(len(spelling), 4))]
    return [(piece, weight / sum(raw)) for piece, weight in zip(spelling, raw, strict=False)]


def map_by_loops(spelled, spelling, pinned):
    """``{student: {teacher: weight}}`` of the published construction, in dictionaries."""
    rows = {student: {} for student in range(NUM_STUDENT)}
    for student, pieces in enumerate(spelled):
        for teacher, weight in piece_weights(pieces):
            rows[student][teacher] = rows[student].get(teacher, 0) + weight
    for teacher, pieces in enumerate(spelling):
        for student, weight in piece_weights(pieces):
            rows[student][teacher] = rows[student].get(teacher, 0) + weight
    for student, row in rows.items():
        best = sorted(row.items(), key=lambda item: (-item[1], item[0]))[:4]
        rows[student] = {teacher: weight / sum(w for _, w in best) for teacher, weight in best}
    return rows | {student: {teacher: 1.0} for student, teacher in pinned}


@pytest.fixture
def spellings():
    return random_spellings(0, NUM_STUDENT, NUM_TEACHER), random_spellings(1, NUM_TEACHER, NUM_STUDENT)


@pytest.fixture
def entries(spellings):
    spelled, spelling = (spelling_entries(*ragged(side)) for side in spellings)
    return projection_entries(spelled, spelling, pinned=pins(PINNED))


def dense(entries):
    matrix = np.zeros((NUM_STUDENT, NUM_TEACHER))
    np.add.at(matrix, (entries.rows, entries.columns), entries.weights)
    return matrix


def test_map_by_loops(entries, spellings):
    expected = np.zeros((NUM_STUDENT, NUM_TEACHER))
    for student, row in map_by_loops(*spellings, PINNED).items():
        for teacher, weight in row.items():
            expected[student, teacher] = weight
    np.testing.assert_allclose(dense(entries), expected, rtol=1e-12)
    sums = expected.sum(1)
    assert ((abs(sums - 1) < 1e-12) | (sums == 0)).all()
    assert (expected > 0).sum(1).max() == 4


def test_every_spelling_by_itself_gives_the_identity():
    alone = spelling_entries(*ragged([[i] for i in range(NUM_STUDENT)]))
    entries = projection_entries(alone, alone, pinned=pins([]))
    np.testing.assert_array_equal(dense(entries)[:, :NUM_STUDENT], np.eye(NUM_STUDENT))


def test_no_spelling_at_all_leaves_what_is_pinned():
    nothing = spelling_entries(*ragged([[] for _ in range(NUM_STUDENT)]))
    entries = projection_entries(nothing, nothing, pinned=pins(PINNED))
    assert sorted(zip(entries.rows.tolist(), entries.columns.tolist(), strict=True)) == sorted(PINNED)


@pytest.mark.parametrize("threshold", [0.6, 1.0])
def test_common_tokens_by_loops(entries, spellings, threshold):
    claims = sorted(
        (student not in dict(PINNED), -weight, student, teacher)
        for student, row in map_by_loops(*spellings, PINNED).items()
        for teacher, weight in row.items()
        if weight >= threshold
    )
    expected = {}
    for _, _, student, teacher in claims:
        if teacher not in expected.values():
            expected[student] = teacher
    assert len(expected) < len(claims) or threshold == 1.0
    found = common_tokens(entries, pinned=pins(PINNED), threshold=threshold)
    assert list(zip(found.rows.tolist(), found.columns.tolist(), strict=True)) == sorted(expected.items())
    assert set(PINNED) <= set(expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_project_and_its_gradient_are_the_dense_products(entries, dtype):
    projection = Projection.of(entries, NUM_STUDENT).to(torch.device("cpu"), dtype)
    matrix = torch.tensor(dense(entries)).float().to(dtype)[:, projection.teacher_ids]
    assert projection.teacher_ids.tolist() == sorted(set(entries.columns.tolist()))
    probs = torch.rand(5, NUM_STUDENT, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    projected = project(probs, projection)
    torch.testing.assert_close(projected, probs @ matrix)
    upstream = torch.rand(projected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.autograd.grad(projected, probs, upstream)[0], upstream @ matrix.T)
    assert projection.to(torch.device("cpu"), dtype) is projection


def test_project_runs_under_autocast(entries):
    projection = Projection.of(entries, NUM_STUDENT)
    probs = torch.rand(5, NUM_STUDENT, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(project(probs, projection).square().sum(), probs)
    with torch.autocast("cpu", torch.bfloat16):
        projected = project(probs, projection)
        assert projected.dtype == torch.float32
        (gradient,) = torch.autograd.grad(projected.square().sum(), probs)
    torch.testing.assert_close(gradient, expected)
