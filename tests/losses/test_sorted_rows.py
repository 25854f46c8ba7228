import pytest
import torch

from vocabridge.losses.sorted_rows import sorted_l1


def by_loops(student, teacher):
    """One row, plain Python floats: zero-padded descending values."""
    length = max(len(student), len(teacher))
    first, second = (sorted([*values, *[0.0] * (length - len(values))], reverse=True) for values in (student, teacher))
    return sum(abs(a - b) for a, b in zip(first, second, strict=True))


def masses(rows, size, seed):
    values = torch.rand(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * torch.linspace(0.2, 1.5, rows, dtype=torch.float64)[:, None]).requires_grad_()


@pytest.mark.parametrize(("v_s", "v_t"), [(13, 29), (29, 13), (17, 17), (1, 5), (5, 1)])
def test_value_and_gradient_by_loops_and_differences(v_s, v_t):
    student, teacher = masses(7, v_s, 1), masses(7, v_t, 2)
    distance = sorted_l1(student, teacher)
    expected = [by_loops(p, q) for p, q in zip(student.tolist(), teacher.tolist(), strict=True)]
    torch.testing.assert_close(distance, torch.tensor(expected, dtype=torch.float64))
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64)
    (distance * upstream).sum().backward()
    assert teacher.grad is None
    assert float(student.grad.abs().max()) > 0
    for row in range(7):
        for column in range(v_s):
            moved = [list(student[row].tolist()) for _ in range(2)]
            moved[0][column] += 1e-6
            moved[1][column] -= 1e-6
            high, low = (by_loops(values, teacher[row].tolist()) for values in moved)
            slope = (high - low) / 2e-6 * float(upstream[row])
            assert float(student.grad[row, column]) == pytest.approx(slope, abs=1e-5)


def test_the_same_values_in_another_order_are_at_distance_zero_with_zero_gradient():
    student = masses(5, 19, 3)
    shuffled = student.detach()[:, torch.randperm(19, generator=torch.Generator().manual_seed(0))]
    distance = sorted_l1(student, torch.cat([shuffled, torch.zeros(5, 4, dtype=torch.float64)], dim=1))
    assert distance.tolist() == [0.0] * 5
    distance.sum().backward()
    assert float(student.grad.abs().max()) == 0.0


@pytest.mark.parametrize(("rows", "v_s", "v_t"), [(0, 4, 6), (3, 0, 6), (3, 6, 0), (3, 0, 0)])
def test_nothing_to_compare_leaves_the_other_sides_mass(rows, v_s, v_t):
    student, teacher = masses(rows, v_s, 1), masses(rows, v_t, 2)
    distance = sorted_l1(student, teacher)
    torch.testing.assert_close(distance, student.sum(-1) + teacher.sum(-1))
    distance.sum().backward()
    assert student.grad.shape == student.shape


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("v_s", "v_t"), [(130, 290), (290, 130), (170, 170)])
def test_float32_is_float64_of_the_same_numbers(v_s, v_t, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    single = [masses(7, size, seed).detach().pow(9).float() for size, seed in ((v_s, 1), (v_t, 2))]
    single[0][0, :3] = torch.tensor([0.0, 1e-42, 3e-38])
    double = [values.double() for values in single]
    single[0].requires_grad_()
    double[0].requires_grad_()
    distances = sorted_l1(*single), sorted_l1(*double)
    torch.testing.assert_close(distances[0].double(), distances[1], rtol=1e-5, atol=0.0)
    for distance in distances:
        distance.sum().backward()
    assert torch.equal(single[0].grad.double(), double[0].grad)
    assert set(single[0].grad.unique().tolist()) >= {-1.0, 1.0}


def test_inputs_are_left_as_they_are_and_float32_stays():
    student, teacher = masses(3, 8, 1).detach().float(), masses(3, 12, 2).detach().float()
    copies = student.clone(), teacher.clone()
    assert sorted_l1(student, teacher).dtype == torch.float32
    assert torch.equal(student, copies[0])
    assert torch.equal(teacher, copies[1])
