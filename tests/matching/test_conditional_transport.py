import math

import pytest
import torch

from vocabridge.matching.conditional_transport import ConditionalTransport
from vocabridge.matching.config import TransportConfig
from vocabridge.matching.examples import MatchedExamples

FEATURES = 5
QUERIES, KEYS = (4, 3), (6, 2)
"""Positions of each of the two examples."""


def build():
    torch.manual_seed(0)
    return ConditionalTransport(FEATURES, TransportConfig(hidden_size=7, output_size=3)).double()


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(sum(QUERIES), FEATURES, generator=generator, dtype=torch.float64) + 1
    return queries, torch.randn(sum(KEYS), FEATURES, generator=generator, dtype=torch.float64)


def rows(counts):
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def forward(transport, queries, keys, *, weight=1.0):
    examples = MatchedExamples.select(
        queries, keys, query_rows=rows(QUERIES), key_rows=rows(KEYS), num_examples=len(QUERIES)
    )
    return transport(examples, weight=weight)


def cost(transport, queries, keys, **settings):
    sums = forward(transport, queries, keys, **settings)
    return sums.query_cost + sums.key_cost


def loop_critic(critic, x):
    h = critic.highway.weight @ x + critic.highway.bias
    gate = 1 / (1 + torch.exp(-h))
    mixed = gate * h.clamp(min=0) + (1 - gate) * x
    hidden = critic.linear.weight @ mixed + critic.linear.bias
    return critic.output.weight @ torch.where(hidden > 0, hidden, 0.1 * hidden) + critic.output.bias


def loop_navigator(navigator, x):
    hidden = navigator.linear.weight @ x + navigator.linear.bias
    return navigator.output.weight @ torch.where(hidden > 0, hidden, 0.1 * hidden) + navigator.output.bias


def cosine(u, v):
    return (u @ v) / ((u @ u).sqrt() * (v @ v).sqrt())


def loop_costs(transport, queries, keys):
    """Both sums from the formula, one pair of positions at a time, with no gradient turned round."""
    sharpness = transport.navigator.log_sharpness.exp().squeeze()
    query_cost = key_cost = 0.0
    for own_queries, own_keys in zip(queries.split(QUERIES), keys.split(KEYS), strict=True):
        # Elements are measured in the root mean square of the example's keys.
        unit = math.sqrt(float((own_keys**2).mean()))
        points = [[row / unit for row in side] for side in (own_queries, own_keys)]
        seen = [[loop_critic(transport.critic, row) for row in side] for side in points]
        guides = [[loop_navigator(transport.navigator, row) for row in side] for side in points]
        costs = [[1 - cosine(q, k) for k in seen[1]] for q in seen[0]]
        weights = [[(sharpness * cosine(q, k)).exp() for k in guides[1]] for q in guides[0]]
        for i in range(len(own_queries)):
            query_cost += sum(w * c for w, c in zip(weights[i], costs[i], strict=True)) / sum(weights[i]) / 2
        for j in range(len(own_keys)):
            column = [(weights[i][j], costs[i][j]) for i in range(len(own_queries))]
            key_cost += sum(w * c for w, c in column) / sum(w for w, _ in column) / 2
    return query_cost, key_cost


def test_costs_and_every_gradient_match_loops():
    transport = build()
    queries, keys = inputs()
    queries.requires_grad_()
    sums = forward(transport, queries, keys, weight=0.3)
    expected = loop_costs(transport, queries, keys)
    torch.testing.assert_close(sums.query_cost, expected[0])
    torch.testing.assert_close(sums.key_cost, expected[1])
    names, parameters = zip(*transport.named_parameters(), strict=True)
    for upstream in ((1.0, 0.0), (0.2, 0.7)):
        total = upstream[0] * sums.query_cost + upstream[1] * sums.key_cost
        reference = upstream[0] * expected[0] + upstream[1] * expected[1]
        received = torch.autograd.grad(total, [queries, *parameters], retain_graph=True)
        slopes = torch.autograd.grad(reference, [queries, *parameters], retain_graph=True)
        for name, gradient, slope in zip(["queries", *names], received, slopes, strict=True):
            factor = {"queries": 0.3, "critic": -1.0, "navigator": 1.0}[name.split(".")[0]]
            torch.testing.assert_close(gradient, factor * slope, msg=lambda text, name=name: f"{name}: {text}")
            assert float(slope.abs().max()) > 1e-6


@pytest.mark.parametrize(("side", "sign"), [("critic", -1), ("navigator", 1), ("queries", 1)])
def test_only_the_critic_maximises(side, sign):
    """By finite differences; the published code turns the navigator's gradient round as well."""
    transport = build()
    queries, keys = inputs()
    queries.requires_grad_()
    cost(transport, queries, keys).backward()
    moved = {
        "critic": list(transport.critic.parameters()),
        "navigator": list(transport.navigator.parameters()),
        "queries": [queries],
    }[side]
    directions = [torch.randn_like(values) for values in moved]
    inner = sum(float((values.grad * direction).sum()) for values, direction in zip(moved, directions, strict=True))

    def shifted_cost(step):
        with torch.no_grad():
            for values, direction in zip(moved, directions, strict=True):
                values += step * direction
            value = float(cost(transport, queries, keys))
            for values, direction in zip(moved, directions, strict=True):
                values -= step * direction
        return value

    slope = (shifted_cost(1e-6) - shifted_cost(-1e-6)) / 2e-6
    assert abs(slope) > 1e-3
    assert inner == pytest.approx(sign * slope, rel=1e-5)


@pytest.mark.parametrize(("side", "rises"), [("critic", True), ("navigator", False)])
def test_one_optimizer_step_moves_the_cost_to_that_sides_advantage(side, rises):
    transport = build()
    queries, keys = inputs()
    optimizer = torch.optim.SGD(getattr(transport, side).parameters(), lr=1e-3)
    before = cost(transport, queries, keys)
    before.backward()
    optimizer.step()
    change = float(cost(transport, queries, keys).detach() - before.detach())
    assert (change > 1e-7) if rises else (change < -1e-7)


def test_the_weight_acts_on_the_queries_alone():
    def gradients(weight):
        transport = build()
        queries, keys = inputs()
        queries.requires_grad_()
        cost(transport, queries, keys, weight=weight).backward()
        return queries.grad, [parameter.grad for parameter in transport.parameters()]

    light, heavy, none = gradients(0.1), gradients(1.0), gradients(0.0)
    torch.testing.assert_close(heavy[0], 10 * light[0])
    assert (none[0] == 0).all()
    for own, other, third in zip(light[1], heavy[1], none[1], strict=True):
        assert torch.equal(own, other)
        assert torch.equal(own, third)


def test_keys_are_constants():
    transport = build()
    queries, keys = inputs()
    keys.requires_grad_()
    cost(transport, queries, keys).backward()
    assert keys.grad is None


def test_positions_are_points_not_coordinates():
    """Reordering the keys of an example changes nothing; where positions are coordinates it changes every distance."""
    transport = build()
    queries, keys = inputs()
    shuffled = torch.cat([part.flip(0) for part in keys.split(KEYS)])
    assert not torch.equal(keys, shuffled)
    torch.testing.assert_close(cost(transport, queries, shuffled), cost(transport, queries, keys))
    # ... while a key handed to the other example does.
    swapped = keys.clone()
    swapped[[0, -1]] = swapped[[-1, 0]]
    assert abs(float((cost(transport, queries, swapped) - cost(transport, queries, keys)).detach())) > 1e-4


def test_equal_features_cost_nothing_once_the_navigator_is_sharp():
    transport = build()
    with torch.no_grad():
        transport.navigator.log_sharpness.fill_(math.log(1e6))
    points, _ = inputs()
    examples = MatchedExamples.select(
        points, points, query_rows=rows(QUERIES), key_rows=rows(QUERIES), num_examples=len(QUERIES)
    )
    sums = transport(examples, weight=1.0)
    assert float(sums.query_cost.detach()) == pytest.approx(0, abs=1e-9)
    assert float(sums.query_entropy) == pytest.approx(0, abs=1e-9)
    assert float(sums.uniform_cost) > 0.01


def test_sums_for_the_log():
    transport = build()
    queries, keys = inputs()
    with torch.no_grad():
        transport.navigator.log_sharpness.fill_(-100)  # uniform plans
    sums = forward(transport, queries, keys)
    entropies = [n * math.log(m) for n, m in zip(QUERIES, KEYS, strict=True)]
    assert float(sums.query_entropy) == pytest.approx(sum(entropies))
    assert float(sums.key_entropy) == pytest.approx(sum(m * math.log(n) for n, m in zip(QUERIES, KEYS, strict=True)))
    assert float(sums.uniform_cost) == pytest.approx(float(sums.query_cost.detach()))
    for value in (sums.query_entropy, sums.key_entropy, sums.uniform_cost):
        assert not value.requires_grad
