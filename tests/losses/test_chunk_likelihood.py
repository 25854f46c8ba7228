"""Chunk likelihoods against loops and formulas in plain Python."""

import math

import pytest
import torch

from vocabridge.losses.chunk_likelihood import (
    chunk_difference,
    chunk_log_probs,
    label_and_boundary_log_probs,
    log1mexp,
)
from vocabridge.losses.chunk_rows import chunk_rows

NAMES = [
    "binary_cross_entropy",
    "binary_reverse_kl",
    "binary_kl_limit",
    "absolute_log",
    "absolute_probability",
    "renyi",
    "k2",
    "k3",
]
TEMPERATURE, ALPHA = 3.0, 0.7


def by_formula(name, teacher, student):
    """The published formulas (times the temperature) of two log-likelihoods, as numbers."""
    epsilon = 1e-6
    if name == "absolute_log":
        return abs(teacher - student)
    if name == "binary_kl_limit":
        t, s = teacher - epsilon, student - epsilon
        return (t - s) + t * math.log(-s) - t * math.log(-t)
    p, q = math.exp(teacher / TEMPERATURE - epsilon), math.exp(student / TEMPERATURE - epsilon)
    ratio = (teacher - student) / TEMPERATURE
    value = {
        "binary_cross_entropy": lambda: -(p * math.log(q) + (1 - p) * math.log(1 - q)),
        "binary_reverse_kl": lambda: q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
        "absolute_probability": lambda: abs(p - q),
        "renyi": lambda: (
            math.log(p**ALPHA * q ** (1 - ALPHA) + (1 - p) ** ALPHA * (1 - q) ** (1 - ALPHA)) / (ALPHA - 1)
        ),
        "k2": lambda: ratio**2 / 2,
        "k3": lambda: math.exp(ratio) - 1 - ratio,
    }[name]()
    return TEMPERATURE * value


def difference(name):
    return chunk_difference(name, temperature=TEMPERATURE, renyi_alpha=ALPHA)


def leaf(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


PAIRS = [(-0.03, -2.0), (-5.0, -0.2), (-1.5, -1.4), (-9.0, -12.0), (-30.0, -3.0)]


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_by_formula(name):
    teacher, student = torch.tensor([t for t, _ in PAIRS], dtype=torch.float64), leaf([s for _, s in PAIRS])
    loss = difference(name)(teacher, student)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    step = 1e-6
    for i, (t, s) in enumerate(PAIRS):
        assert float(loss[i].detach()) == pytest.approx(by_formula(name, t, s), rel=1e-9)
        slope = (by_formula(name, t, s + step) - by_formula(name, t, s - step)) / (2 * step)
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_where_both_agree_with_zero_gradient(name, dtype):
    values = [0.0, -1e-7, -1e-3, -0.4, -0.7, -2.0, -50.0, -900.0]
    student = leaf(values, dtype)
    loss = difference(name)(student.detach(), student)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.abs().max() < (3e-6 if dtype == torch.float32 else 1e-12)
    for i, value in enumerate(values):
        # Probabilities near 1 have lost their digits in plain Python, not so in the code: hence the absolute tolerance.
        p = math.exp(value / TEMPERATURE - 1e-6)
        entropy = -TEMPERATURE * (p * math.log(p or 1) + (1 - p) * math.log1p(-p))
        least = entropy if name == "binary_cross_entropy" else 0.0
        assert float(loss[i].detach()) == pytest.approx(least, rel=1e-4, abs=2e-6)
    other = loss.detach() + 0  # any disagreement costs more
    for shift in (-0.5, -3.0):
        assert (difference(name)(student.detach(), student.detach() + shift) >= other - 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
def test_finite_at_certainty_and_at_impossibility(name):
    extremes = [0.0, -1e-8, -1e-3, -60.0, -300.0]
    pairs = [(t, s) for t in extremes for s in extremes]
    teacher = torch.tensor([t for t, _ in pairs])
    student = leaf([s for _, s in pairs], torch.float32)
    loss = difference(name)(teacher, student)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_pushes_a_student_away_from_the_teacher(name):
    """However far it is below the teacher, its likelihood is to grow, or (a saturated difference) nothing is said."""
    student = leaf([-2.0, -20.0, -200.0, -700.0], torch.float32)
    (gradient,) = torch.autograd.grad(difference(name)(torch.full((4,), -1.0), student).sum(), student)
    assert (gradient <= 0).all()
    assert gradient[0] < 0


def test_high_temperature_tends_to_the_limit():
    teacher, student = torch.tensor([-2.0, -0.5]).double(), torch.tensor([-0.7, -3.0]).double()
    hot = chunk_difference("binary_cross_entropy", temperature=1e3, renyi_alpha=ALPHA)
    limit = chunk_difference("binary_kl_limit", temperature=1.0, renyi_alpha=ALPHA)
    # The offset of 1e-6 is 1e-3 nats at this temperature.
    torch.testing.assert_close(
        hot(teacher, student) - hot(teacher, teacher), limit(teacher, student), rtol=5e-3, atol=0
    )


def test_log1mexp_keeps_its_digits_and_its_derivative():
    x = leaf([-1e-12, -1e-4, -0.6931, -0.6932, -3.0, -50.0, -800.0])
    result = log1mexp(x)
    expected = [math.log(-math.expm1(v)) if v > -30 else -math.exp(v) for v in x.tolist()]
    torch.testing.assert_close(result.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    slopes = [-1 / math.expm1(-v) for v in x.tolist()[:6]] + [0.0]
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-9, atol=1e-300)


def test_label_and_boundary_by_hand():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0], [5.0, 5.0, -2.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([True, False, False, True])
    result = label_and_boundary_log_probs(logits, torch.tensor([2, 0]), mask)
    for row, label in enumerate((2, 0)):
        weights = [math.exp(z) for z in logits[row].tolist()]
        assert float(result[row, 0]) == pytest.approx(math.log(weights[label] / sum(weights)))
        assert float(result[row, 1]) == pytest.approx(math.log((weights[0] + weights[3]) / sum(weights)))
    assert label_and_boundary_log_probs(logits, torch.tensor([2, 0]), None)[:, 1].tolist() == [0.0, 0.0]


CHUNKS = [  # student, teacher chunk ids of each example
    ([0, 0, 1, 2, 3, 3], [0, 1, 1, 1, 2, 3]),
    ([-1, 0, 1, -1, 2], [0, 0, 1, 2, -1]),
    ([], [-1]),
    ([0, 1, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
]


def pad(rows):
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def packed_rows(rows):
    return torch.tensor([i for i, row in enumerate(rows) for _ in row])


def by_loops(student, teacher, *, append_outcome, merge_threshold):
    """Pairs (student, teacher) of piece log-likelihoods, from lists of (label, boundary) per example."""
    result = []
    for (student_ids, teacher_ids), own, other in zip(CHUNKS, student, teacher, strict=True):
        num_chunks = max([-1, *student_ids]) + 1
        piece, outcome = [0.0, 0.0], (0.0, 0.0)
        for chunk in range(num_chunks):
            last = [max(i for i, c in enumerate(ids) if c == chunk) for ids in (student_ids, teacher_ids)]
            for side, (ids, numbers) in enumerate(((student_ids, own), (teacher_ids, other))):
                piece[side] += sum(numbers[i][0] for i, c in enumerate(ids) if c == chunk)
            followed = last[0] + 1 < len(student_ids) and last[1] + 1 < len(teacher_ids)
            outcome = (own[last[0] + 1][1], other[last[1] + 1][1]) if followed else (0.0, 0.0)
            is_end = merge_threshold is None or chunk == num_chunks - 1 or math.exp(outcome[1]) > merge_threshold
            if is_end:
                result.append(tuple(p + o * append_outcome for p, o in zip(piece, outcome, strict=True)))
                piece = [0.0, 0.0]
    return result


@pytest.mark.parametrize("append_outcome", [True, False])
@pytest.mark.parametrize("merge_threshold", [None, 0.3, 0.0])
def test_chunk_log_probs_by_loops(append_outcome, merge_threshold):
    generator = torch.Generator().manual_seed(0)
    sides = [[row[side] for row in CHUNKS] for side in (0, 1)]
    numbers = [-4 * torch.rand(sum(map(len, rows)), 2, generator=generator).double().square() for rows in sides]
    result = chunk_log_probs(
        chunk_rows(packed_rows(sides[0]), pad(sides[0]), packed_rows(sides[1]), pad(sides[1])),
        *numbers,
        student_rows=packed_rows(sides[0]),
        teacher_rows=packed_rows(sides[1]),
        append_outcome=append_outcome,
        merge_threshold=merge_threshold,
    )
    lists = [
        [[next(values) for _ in row] for row in rows]
        for rows, values in ((sides[0], iter(numbers[0].tolist())), (sides[1], iter(numbers[1].tolist())))
    ]
    expected = by_loops(*lists, append_outcome=append_outcome, merge_threshold=merge_threshold)
    assert list(zip(result.student.tolist(), result.teacher.tolist(), strict=True)) == [
        pytest.approx(pair) for pair in expected
    ]
    num_chunks = sum(max([-1, *ids]) + 1 for ids in sides[0])
    assert (len(expected) < num_chunks) == (merge_threshold == 0.3)
