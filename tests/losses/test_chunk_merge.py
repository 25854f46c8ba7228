import math

import pytest
import torch

from vocabridge.losses.chunk_merge import generalised_kl, log_prefix, mass_jsd, prefix_positions
from vocabridge.losses.chunk_rows import Ranges
from vocabridge.losses.divergences import generalised_jsd


def logs(rows, size, seed, *, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, size, generator=generator, dtype=torch.float64) * 2 - 2 + shift
    return values.requires_grad_()


def jsd_by_loops(p, q, beta):
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = beta * b + (1 - beta) * a
        total += beta * b * math.log(b / m) + (1 - beta) * a * math.log(a / m)
    return total


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_mass_jsd_by_loops_and_its_gradient(beta):
    student, teacher = logs(6, 23, 1), logs(6, 23, 2, shift=0.7)
    expected = [jsd_by_loops(p, q, beta) for p, q in zip(student.exp().tolist(), teacher.exp().tolist(), strict=True)]
    got = mass_jsd(student, teacher, beta=beta)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    assert min(expected) > 0
    assert torch.autograd.gradcheck(lambda values: mass_jsd(values, teacher.detach(), beta=beta), student)
    got.sum().backward()
    assert teacher.grad is None
    assert float(student.grad.abs().max()) > 0


@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_mass_jsd_of_rows_that_sum_to_one_is_the_generalised_jsd(beta):
    student, teacher = logs(4, 11, 1), logs(4, 11, 2)
    torch.testing.assert_close(
        mass_jsd(student.log_softmax(-1), teacher.log_softmax(-1), beta=beta),
        generalised_jsd(student, teacher, beta=beta),
    )


def test_masses_below_one_never_make_it_negative():
    """A plain KL of two sub-vectors can be: that is why nothing has to be renormalised here."""
    p, q = torch.tensor([[0.9, 0.05]]).log(), torch.tensor([[0.2, 0.1]]).log()
    assert float((q.exp() * (q - p)).sum()) < 0
    assert float(mass_jsd(p, q, beta=0.5)) > 0
    assert float(generalised_kl(p, q)) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_masses_are_an_exact_zero_with_an_exactly_zero_gradient(dtype):
    student = logs(5, 31, 1).detach().to(dtype).requires_grad_()
    for divergence in (lambda p, q: mass_jsd(p, q, beta=0.3), generalised_kl):
        student.grad = None
        value = divergence(student, student.detach())
        assert value.tolist() == [0.0] * 5
        value.sum().backward()
        assert float(student.grad.abs().max()) == 0.0


def test_certain_and_impossible_entries_stay_finite():
    student = torch.tensor([[0.0, -math.inf, -200.0, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[-math.inf, 0.0, -1.0, -math.inf]])
    value = mass_jsd(student, teacher, beta=0.5)
    tail = 0.5 * math.exp(-1.0) * math.log(2)
    assert float(value.detach()) == pytest.approx(math.log(2) + tail, rel=1e-6)
    value.backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("seed", [1, 2])
def test_generalised_kl_by_loops_and_its_gradient(seed):
    student, teacher = logs(5, 9, seed), logs(5, 9, seed + 7, shift=-1.0)
    expected = [
        sum(b * math.log(b / a) - b + a for a, b in zip(p, q, strict=True))
        for p, q in zip(student.exp().tolist(), teacher.exp().tolist(), strict=True)
    ]
    torch.testing.assert_close(generalised_kl(student, teacher), torch.tensor(expected, dtype=torch.float64))
    assert torch.autograd.gradcheck(generalised_kl, (student, teacher))


def test_prefixes_are_the_products_of_all_but_the_last_token():
    # Positions 0..7; 0 and 5 are in no chunk, chunks are [1, 2, 3], [4], [6, 7].
    ranges = Ranges(
        starts=torch.tensor([1, 4, 6]),
        lengths=torch.tensor([3, 1, 2]),
        chunks=torch.tensor([-1, 0, 0, 0, 1, -1, 2, 2]),
    )
    positions = prefix_positions(ranges)
    assert positions.tolist() == [1, 2, 6]
    log_probs = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64).log().requires_grad_()
    prefix = log_prefix(log_probs, positions, ranges)
    torch.testing.assert_close(prefix.exp(), torch.tensor([0.125, 1.0, 0.125], dtype=torch.float64))
    (prefix * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert log_probs.grad.tolist() == [1.0, 1.0, 4.0]


def test_no_chunks_have_no_prefixes():
    nothing = torch.zeros(0, dtype=torch.long)
    ranges = Ranges(starts=nothing, lengths=nothing, chunks=torch.tensor([-1, -1]))
    positions = prefix_positions(ranges)
    assert positions.numel() == 0
    assert log_prefix(torch.zeros(0), positions, ranges).shape == (0,)
