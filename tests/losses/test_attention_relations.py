import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vocabridge.losses.attention_relations import Relation, relation_divergence

COUNTS = torch.tensor([5, 0, 3, 1])
NUM_HEADS = 3
STUDENT_WIDTH, TEACHER_WIDTH = 6, 12


def _relation(width, *, seed):
    left, right = torch.randn(2, 4, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Relation(left.clone().requires_grad_(), right.clone().requires_grad_())


def _softmax(scores):
    top = max(float(score.detach()) for score in scores)
    powers = [(score - top).exp() for score in scores]
    return [power / sum(powers) for power in powers]


def _by_hand(student, teacher):
    total = torch.zeros((), dtype=torch.float64)
    for example, count in enumerate(COUNTS.tolist()):
        for head in range(NUM_HEADS):
            for i in range(count):
                rows = []
                for side in (student, teacher):
                    size = side.left.shape[-1] // NUM_HEADS
                    features = range(head * size, (head + 1) * size)
                    rows.append(
                        _softmax(
                            [
                                sum(side.left[example, i, f] * side.right[example, j, f] for f in features)
                                / math.sqrt(size)
                                for j in range(i + 1)
                            ]
                        )
                    )
                mine, theirs = rows
                total = total + sum(p * (p.log() - q.log()) for p, q in zip(theirs, mine, strict=True)) / NUM_HEADS
    return total


@pytest.mark.parametrize("chunk_bytes", [1, 6 * 8 * 25 * 5, 2**28])
def test_value_and_gradients(chunk_bytes):
    student, teacher = _relation(STUDENT_WIDTH, seed=0), _relation(TEACHER_WIDTH, seed=1)
    inputs = [student.left, student.right]
    expected = _by_hand(student, teacher)
    expected_gradients = torch.autograd.grad(expected, inputs)
    constant = Relation(teacher.left.detach(), teacher.right.detach())
    found = relation_divergence(student, constant, COUNTS, num_heads=NUM_HEADS, chunk_bytes=chunk_bytes)
    gradients = torch.autograd.grad(found * 2.5, inputs)
    assert float(expected) > 0.1
    torch.testing.assert_close(found, expected)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert reference.abs().max() > 0.01
        torch.testing.assert_close(gradient, 2.5 * reference)


def test_padding_is_never_read():
    student, teacher = _relation(STUDENT_WIDTH, seed=0), _relation(TEACHER_WIDTH, seed=1)
    expected = relation_divergence(student, teacher, COUNTS, num_heads=NUM_HEADS)
    changed = []
    for side in (student, teacher):
        states = [side.left.detach().clone(), side.right.detach().clone()]
        for example, count in enumerate(COUNTS.tolist()):
            for each in states:
                each[example, count:] = 1e3
        changed.append(Relation(*states))
    torch.testing.assert_close(relation_divergence(*changed, COUNTS, num_heads=NUM_HEADS), expected.detach())


def test_agreement_gives_zero_and_no_gradient():
    student = _relation(STUDENT_WIDTH, seed=0)
    teacher = Relation(student.left.detach().clone(), student.right.detach().clone())
    loss = relation_divergence(student, teacher, COUNTS, num_heads=NUM_HEADS)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert float(student.left.grad.abs().max()) < 1e-12
    assert float(student.right.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("shape", [(2, 0, STUDENT_WIDTH), (0, 0, STUDENT_WIDTH)])
def test_no_chunks_give_zero_with_a_gradient_path(shape):
    states = torch.zeros(shape, requires_grad=True)
    teacher = Relation(torch.zeros(shape), torch.zeros(shape))
    counts = torch.zeros(shape[0], dtype=torch.long)
    loss = relation_divergence(Relation(states, states), teacher, counts, num_heads=NUM_HEADS)
    assert float(loss.detach()) == 0.0
    if shape[0]:
        loss.backward()
        assert states.grad is not None


def test_autocast_does_not_lower_the_precision_of_the_scores():
    sides = [_relation(width, seed=seed) for seed, width in enumerate((STUDENT_WIDTH, TEACHER_WIDTH))]
    exact = relation_divergence(*sides, COUNTS, num_heads=NUM_HEADS).detach()
    single = [Relation(side.left.detach().float(), side.right.detach().float()) for side in sides]
    with torch.autocast("cpu", torch.bfloat16):
        found = relation_divergence(*single, COUNTS, num_heads=NUM_HEADS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


class _LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_memory_is_bounded():
    num_examples, num_chunks, width = 3, 40, 12
    states = torch.randn(num_examples, num_chunks, width, requires_grad=True)
    relation, counts = Relation(states, states), torch.full((num_examples,), num_chunks)
    with _LargestTensor() as seen:
        relation_divergence(relation, relation, counts, num_heads=12, chunk_bytes=1).backward()
    assert num_chunks**2 <= seen.num_elements < 2 * num_chunks**2
