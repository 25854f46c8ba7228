import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from vocabridge.losses.transport import conditional_costs, sinkhorn_divergence

SIZES = [(7, 5), (3, 6), (2, 2)]
"""Rows of x and y in each example."""


def samples(seed=0, width=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype),
            (torch.randn(m, width, generator=generator, dtype=torch.float64) + 0.7).to(dtype),
        )
        for n, m in SIZES
    ]


def padded(parts, *, filler=0.0, extra=0):
    longest = max(len(part) for part in parts) + extra
    rows = torch.full((len(parts), longest, parts[0].shape[1]), filler, dtype=parts[0].dtype)
    mask = torch.zeros(len(parts), longest, dtype=torch.bool)
    for index, part in enumerate(parts):
        rows[index, : len(part)] = part
        mask[index, : len(part)] = True
    return rows, mask


def sinkhorn(pairs, *, regularization=0.5, iterations=500, **padding):
    x, x_mask = padded([x for x, _ in pairs], **padding)
    y, y_mask = padded([y for _, y in pairs], **padding)
    return sinkhorn_divergence(x, y, x_mask=x_mask, y_mask=y_mask, regularization=regularization, iterations=iterations)


def squared(x, y):
    return np.array([[math.dist(u, v) ** 2 for v in y] for u in x])


def primal(cost, eps):
    """Optimal ``<P, C> + eps KL(P | a b^T)`` by matrix scaling, the textbook iteration with no logarithm."""
    n, m = cost.shape
    kernel = np.exp(-cost / eps)
    u, v = np.ones(n), np.ones(m)
    for _ in range(5000):
        u = (1 / n) / (kernel @ v)
        v = (1 / m) / (kernel.T @ u)
    plan = u[:, None] * kernel * v[None, :]
    assert np.abs(plan.sum(1) - 1 / n).max() < 1e-8
    return (plan * cost).sum() + eps * (plan * np.log(plan * n * m)).sum()


def reference_divergence(x, y, regularization, eps=None):
    x, y = x.tolist(), y.tolist()
    eps = regularization * squared(x, y).mean() if eps is None else eps
    return primal(squared(x, y), eps) - primal(squared(x, x), eps) / 2 - primal(squared(y, y), eps) / 2


def test_sinkhorn_is_the_debiased_optimum_of_the_primal_problem():
    pairs = samples()
    result = sinkhorn(pairs)
    expected = [reference_divergence(x, y, 0.5) for x, y in pairs]
    np.testing.assert_allclose(result.divergence.numpy(), expected, rtol=1e-7, atol=1e-12)
    assert min(expected) > 0.05
    assert float(result.marginal_error.max()) < 1e-9


def test_sinkhorn_gradients_are_those_of_the_converged_value_with_eps_held():
    x, y = samples()[0]
    eps, step = 0.5 * squared(x.tolist(), y.tolist()).mean(), 1e-5
    x, y = x.requires_grad_(), y.requires_grad_()
    sinkhorn([(x, y)]).divergence.sum().backward()
    for rows, gradient in ((x, x.grad), (y, y.grad)):
        for index in [(0, 0), (1, 2), (4, 1)]:
            values = []
            for sign in (1, -1):
                moved = rows.detach().clone()
                moved[index] += sign * step
                pair = (moved, y.detach()) if rows is x else (x.detach(), moved)
                values.append(reference_divergence(*pair, 0.5, eps))
            assert float(gradient[index]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_sinkhorn_with_little_regularisation_is_optimal_assignment():
    """A small eps leaves the unregularised transport, since the self terms vanish with it."""
    x, y = samples()[0][0], samples(seed=3)[0][0]
    cost = squared(x.tolist(), y.tolist())
    expected = cost[linear_sum_assignment(cost)].mean()
    value = sinkhorn([(x, y)], regularization=1e-3, iterations=5000).divergence
    assert float(value) == pytest.approx(expected, rel=1e-2)


def test_fewer_iterations_understate_the_transport_and_say_so():
    """The dual value is a lower bound of OT(x, y); the self terms converge within a few iterations."""
    pairs = [(x, y * 2) for x, y in samples()[:2]]
    early, converged = [sinkhorn(pairs, regularization=0.1, iterations=count) for count in (10, 5000)]
    assert (early.divergence < converged.divergence).all()
    assert (early.divergence > 0.9 * converged.divergence).all()
    assert (early.marginal_error > converged.marginal_error + 1e-6).all()


def test_marginal_error_counts_the_weight_in_the_wrong_place():
    """All of x nearest to one of two y, and no iteration that could tell: half of the weight lies wrong."""
    x = torch.zeros(1, 4, 1, dtype=torch.float64)
    y = torch.tensor([[[1.0], [100.0]]], dtype=torch.float64)
    masks = {"x_mask": torch.ones(1, 4, dtype=torch.bool), "y_mask": torch.ones(1, 2, dtype=torch.bool)}
    result = sinkhorn_divergence(x, y, **masks, regularization=1e-3, iterations=0)
    assert float(result.marginal_error) == pytest.approx(0.5)
    assert float(sinkhorn_divergence(x, y, **masks, regularization=1e-3, iterations=1).marginal_error) < 1e-9


@pytest.mark.parametrize("iterations", [20, 100])
def test_sinkhorn_of_equal_samples_is_zero_with_zero_gradient(iterations):
    x = samples()[0][0].requires_grad_()
    value = sinkhorn([(x, x.detach().flip(0))], iterations=iterations).divergence
    value.sum().backward()
    assert float(value.detach().abs()) < 1e-6
    assert float(x.grad.abs().max()) < 1e-6


def test_padding_does_not_matter_nor_what_lies_in_it():
    pairs = samples()
    plain, filled = sinkhorn(pairs), sinkhorn(pairs, filler=9.0, extra=3)
    torch.testing.assert_close(plain.divergence, filled.divergence, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain.marginal_error, filled.marginal_error, rtol=0, atol=1e-12)
    alone = torch.cat([sinkhorn([pair]).divergence for pair in pairs])
    torch.testing.assert_close(plain.divergence, alone, rtol=1e-12, atol=1e-12)


def test_padding_gets_no_gradient():
    x, x_mask = padded([x for x, _ in samples()], filler=9.0)
    y, y_mask = padded([y for _, y in samples()])
    x.requires_grad_()
    sinkhorn_divergence(
        x, y, x_mask=x_mask, y_mask=y_mask, regularization=0.1, iterations=10
    ).divergence.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[~x_mask] == 0).all()
    assert (x.grad[x_mask] != 0).all()


def test_points_that_all_coincide_are_at_zero_distance():
    x = torch.ones(3, 2, requires_grad=True)
    value = sinkhorn([(x, torch.ones(4, 2))]).divergence
    value.sum().backward()
    assert float(value.detach()) == 0
    assert (x.grad == 0).all()


def test_low_precision_and_autocast_are_computed_in_float32():
    pairs = samples(dtype=torch.bfloat16)
    plain = sinkhorn(pairs, iterations=20).divergence
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn(pairs, iterations=20).divergence, plain)
    truth = sinkhorn([(x.double(), y.double()) for x, y in pairs], iterations=20).divergence
    torch.testing.assert_close(plain.double(), truth, rtol=1e-4, atol=1e-5)


def test_float32_keeps_its_digits_far_from_the_origin():
    pairs = samples(dtype=torch.float32)
    moved = [(x + 1000, y + 1000) for x, y in pairs]
    torch.testing.assert_close(sinkhorn(moved).divergence, sinkhorn(pairs).divergence, rtol=1e-2, atol=1e-3)


def test_conditional_costs_match_loops_with_gradients():
    torch.manual_seed(0)
    cost = torch.rand(3, 7, 6, dtype=torch.float64, requires_grad=True)
    affinity = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    _, x_mask = padded([x for x, _ in samples()])
    _, y_mask = padded([y for _, y in samples()])
    result = conditional_costs(cost, affinity, x_mask=x_mask, y_mask=y_mask)
    upstream_x, upstream_y = torch.rand(3, 7, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    gradients = torch.autograd.grad(
        (result.x_costs * upstream_x).sum() + (result.y_costs * upstream_y).sum(), [cost, affinity]
    )
    total = torch.zeros((), dtype=torch.float64)
    for example, (n, m) in enumerate(SIZES):
        for i in range(n):
            weights = [affinity[example, i, j].exp() for j in range(m)]
            plan = [weight / sum(weights) for weight in weights]
            value = sum(share * cost[example, i, j] for j, share in enumerate(plan))
            assert float(result.x_costs[example, i].detach()) == pytest.approx(float(value.detach()), rel=1e-12)
            entropy = -sum(float(share.detach()) * math.log(float(share.detach())) for share in plan)
            assert float(result.x_entropies[example, i]) == pytest.approx(entropy, rel=1e-12)
            total = total + upstream_x[example, i] * value
        for j in range(m):
            weights = [affinity[example, i, j].exp() for i in range(n)]
            plan = [weight / sum(weights) for weight in weights]
            value = sum(share * cost[example, i, j] for i, share in enumerate(plan))
            assert float(result.y_costs[example, j].detach()) == pytest.approx(float(value.detach()), rel=1e-12)
            total = total + upstream_y[example, j] * value
    for gradient, expected in zip(gradients, torch.autograd.grad(total, [cost, affinity]), strict=True):
        torch.testing.assert_close(gradient, expected)
        assert float(expected.abs().max()) > 0
    assert (result.x_costs[~x_mask] == 0).all()
    assert (result.y_costs[~y_mask] == 0).all()
    assert (result.y_entropies[~y_mask] == 0).all()
