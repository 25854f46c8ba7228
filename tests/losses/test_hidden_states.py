import math

import pytest
import torch

from vocabridge.losses.chunk_rows import Ranges
from vocabridge.losses.hidden_states import cosine_distance, pool_chunks, relative_squared_distance

CHUNKS = torch.tensor([0, 0, -1, 1, 2, 2, 2])
RANGES = Ranges(starts=torch.tensor([0, 3, 4]), lengths=torch.tensor([2, 1, 3]), chunks=CHUNKS)


def _states(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_first_position_and_mean_of_each_chunk():
    states = _states(7, 5)
    first, mean = pool_chunks(states, RANGES, "first"), pool_chunks(states, RANGES, "mean")
    for chunk, positions in enumerate([[0, 1], [3], [4, 5, 6]]):
        for feature in range(5):
            assert float(first[chunk, feature]) == float(states[positions[0], feature])
            expected = sum(float(states[p, feature]) for p in positions) / len(positions)
            assert float(mean[chunk, feature]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_low_precision_is_promoted_and_heads_are_kept(pool):
    pooled = pool_chunks(_states(7, 2, 3).bfloat16(), RANGES, pool)
    assert pooled.dtype == torch.float32
    assert pooled.shape == (3, 2, 3)


def _by_hand(kind, a, b):
    a, b = a.tolist(), b.tolist()
    if kind is cosine_distance:
        return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / sum(y * y for y in b)


@pytest.mark.parametrize("kind", [cosine_distance, relative_squared_distance])
def test_values_and_gradients(kind):
    student, teacher = _states(4, 5).requires_grad_(), _states(4, 5, seed=1) * 100
    distances = kind(student, teacher)
    for row in range(4):
        assert float(distances[row].detach()) == pytest.approx(_by_hand(kind, student[row], teacher[row]), rel=1e-10)
    assert torch.autograd.gradcheck(lambda states: kind(states, teacher), student)


@pytest.mark.parametrize("kind", [cosine_distance, relative_squared_distance])
def test_agreement_gives_zero_and_no_gradient(kind):
    student = _states(4, 5).requires_grad_()
    loss = kind(student, student.detach().clone()).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert float(student.grad.abs().max()) < 1e-12


def test_teacher_of_zeros_stays_finite():
    zeros = torch.zeros(2, 3)
    assert torch.isfinite(cosine_distance(torch.ones(2, 3), zeros)).all()
    assert torch.equal(relative_squared_distance(zeros, zeros), torch.zeros(2))
