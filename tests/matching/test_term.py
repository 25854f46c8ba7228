import math

import pytest
import torch
from torch import nn

from vocabridge.losses.distances import mmd_squared
from vocabridge.losses.transport import sinkhorn_divergence
from vocabridge.matching.config import GanConfig, TransportConfig
from vocabridge.matching.term import MatchingTerm

FEATURES = 6
STATISTICS = ("sinkhorn", "energy", "mmd", "coral")
WITHIN_EXAMPLES = ("conditional_transport", *STATISTICS)
TRAINED = ("gan", "conditional_transport")
QUERIES, KEYS = (9, 5, 7), (6, 8, 4)
"""Positions of each example."""


def build(kind, *, weight=1.0, features=FEATURES):
    torch.manual_seed(0)
    transport = {
        "conditional_transport": {"hidden_size": 32, "output_size": 16},
        "sinkhorn": {"regularization": 0.3, "iterations": 40},
    }
    return MatchingTerm(
        kind,
        features,
        weight=weight,
        warmup_steps=0,
        gan=GanConfig(hidden_size=32, dropout=0.0) if kind == "gan" else GanConfig(),
        transport=TransportConfig(**transport.get(kind, {})),
    )


def sample(query_counts=QUERIES, key_counts=KEYS, *, dtype=torch.float64, shift=1.0, seed=0, features=FEATURES):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(sum(query_counts), features, generator=generator, dtype=torch.float64) + shift
    keys = torch.randn(sum(key_counts), features, generator=generator, dtype=torch.float64)
    return queries.to(dtype), keys.to(dtype)


def run(term, queries, keys, query_counts=QUERIES, key_counts=KEYS):
    def rows(counts):
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))

    return term(queries, keys, query_rows=rows(query_counts), key_rows=rows(key_counts), num_examples=len(query_counts))


def weighted(terms):
    return sum(term.weight * term.sum for term in terms.values())


# --- values and gradients ---------------------------------------------------------------------------------------------


def mean_of(function, x, y):
    return sum(function(u, v) for u in x for v in y) / (len(x) * len(y))


def length(u, v):
    squared = ((u - v) ** 2).sum()
    return squared.sqrt() if float(squared.detach()) > 0 else squared


def loop_energy(x, y):
    return 2 * mean_of(length, x, y) - mean_of(length, x, x) - mean_of(length, y, y)


def loop_mmd(x, y):
    points = [row.detach() for row in (*x, *y)]
    lengths = sorted(float(length(u, v)) for i, u in enumerate(points) for v in points[:i])
    median = lengths[(len(lengths) - 1) // 2]

    def kernel(u, v):
        squared = ((u - v) ** 2).sum()
        return sum(torch.exp(-squared / (2 * (factor * median) ** 2)) for factor in (0.25, 0.5, 1, 2, 4)) / 5

    return mean_of(kernel, x, x) + mean_of(kernel, y, y) - 2 * mean_of(kernel, x, y)


def loop_coral(x, y):
    def moments(rows):
        mean = sum(rows) / len(rows)
        return mean, sum(torch.outer(row - mean, row - mean) for row in rows) / (len(rows) - 1)

    (x_mean, x_covariance), (y_mean, y_covariance) = moments(x), moments(y)
    return ((x_mean - y_mean) ** 2).sum() + ((x_covariance - y_covariance) ** 2).sum()


def loop_sinkhorn(x, y):
    """Unrolled matrix scaling of the primal problem; at convergence autograd through it is the envelope gradient."""
    x, y = torch.stack(list(x)), torch.stack(list(y))
    eps = 0.3 * float(mean_of(lambda u, v: ((u - v) ** 2).sum(), x.detach(), y))

    def optimum(u, v):
        cost = ((u[:, None] - v[None]) ** 2).sum(-1)
        kernel, left, right = torch.exp(-cost / eps), torch.ones(len(u)).double(), torch.ones(len(v)).double()
        for _ in range(300):
            left = 1 / len(u) / (kernel @ right)
            right = 1 / len(v) / (kernel.T @ left)
        plan = left[:, None] * kernel * right
        return (plan * cost).sum() + eps * torch.special.xlogy(plan, plan * plan.numel()).sum()

    return optimum(x, y) - optimum(x, x) / 2 - optimum(y, y) / 2


LOOPS = {"energy": loop_energy, "mmd": loop_mmd, "coral": loop_coral, "sinkhorn": loop_sinkhorn}


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_and_their_gradients_match_loops_over_each_example(kind):
    queries, keys = sample()
    queries.requires_grad_()
    term = run(build(kind, weight=0.3), queries, keys)[kind]
    expected = 0.0
    for x, y in zip(queries.split(QUERIES), keys.split(KEYS), strict=True):
        unit = math.sqrt(float((y**2).sum() / len(y)))
        expected = expected + len(x) * LOOPS[kind](list(x / unit), list(y / unit))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if kind == "sinkhorn" else {}  # 40 iterations against convergence
    torch.testing.assert_close(term.sum, expected, **tolerance)
    assert term.count == sum(QUERIES)
    assert term.weight == 0.3
    gradient, slope = (torch.autograd.grad(value, queries)[0] for value in (term.sum, expected))
    torch.testing.assert_close(gradient, slope, **tolerance)
    assert float(slope.abs().min(-1).values.max()) > 1e-3


def test_sinkhorn_hands_its_settings_on():
    queries, keys = sample()
    term = MatchingTerm(
        "sinkhorn",
        FEATURES,
        weight=1.0,
        warmup_steps=0,
        gan=GanConfig(),
        transport=TransportConfig(regularization=0.4, iterations=2),
    )
    loss = run(term, queries[:9], keys[:6], (9,), (6,))["sinkhorn"]
    unit = math.sqrt(float((keys[:6] ** 2).sum() / 6))
    masks = {"x_mask": torch.ones(1, 9, dtype=torch.bool), "y_mask": torch.ones(1, 6, dtype=torch.bool)}
    result = sinkhorn_divergence(
        queries[None, :9] / unit, keys[None, :6] / unit, **masks, regularization=0.4, iterations=2
    )
    torch.testing.assert_close(loss.sum, 9 * result.divergence[0])
    error = loss.metrics["sinkhorn_marginal_error"]
    torch.testing.assert_close(error.sum / error.count, result.marginal_error[0])


# --- what no kind may depend on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*WITHIN_EXAMPLES, "gan"])
def test_split_batches_add_up_with_every_gradient(kind):
    term = build(kind).double()
    queries, keys = sample()
    queries.requires_grad_()
    whole = run(term, queries, keys)
    parts = [
        run(term, q, k, (len(q),), (len(k),)) for q, k in zip(queries.split(QUERIES), keys.split(KEYS), strict=True)
    ]
    inputs = [queries, *term.parameters()]
    for name, loss in whole.items():
        torch.testing.assert_close(loss.sum, sum(part[name].sum for part in parts))
        assert loss.count == sum(part[name].count for part in parts)
        for metric, ratio in loss.metrics.items():
            assert float(ratio.sum) == pytest.approx(sum(float(part[name].metrics[metric].sum) for part in parts))
            assert int(ratio.count) == sum(int(part[name].metrics[metric].count) for part in parts)
    together = torch.autograd.grad(weighted(whole), inputs)
    apart = torch.autograd.grad(sum(weighted(part) for part in parts), inputs)
    for gradient, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(gradient, expected)
        assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("kind", WITHIN_EXAMPLES)
def test_the_scale_of_the_embeddings_does_not_matter(kind):
    term = build(kind).double()
    queries, keys = sample()
    torch.testing.assert_close(
        weighted(run(term, 50 * queries, 50 * keys)), weighted(run(term, queries, keys)), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("kind", WITHIN_EXAMPLES)
def test_an_example_short_of_two_positions_adds_an_exact_zero(kind):
    term = build(kind)
    queries, keys = sample((*QUERIES, 1, 3, 0), (*KEYS, 5, 1, 2), dtype=torch.float32)
    queries.requires_grad_()
    terms = run(term, queries, keys, (*QUERIES, 1, 3, 0), (*KEYS, 5, 1, 2))
    plain = run(term, queries[: sum(QUERIES)], keys[: sum(KEYS)])
    for name, loss in terms.items():
        assert torch.equal(loss.sum, plain[name].sum)
        assert loss.count == plain[name].count + (4 if loss.unit == "student_tokens" else 8)
    weighted(terms).backward()
    assert (queries.grad[sum(QUERIES) :] == 0).all()
    assert (queries.grad[: sum(QUERIES)] != 0).any(-1).all()


@pytest.mark.parametrize("kind", ["gan", *WITHIN_EXAMPLES])
@pytest.mark.parametrize("counts", [((1,), (1,)), ((3,), (0,)), ((0,), (4,)), ((), ())])
def test_names_and_trained_parameters_are_the_same_for_every_micro_batch(kind, counts):
    def names(terms):
        return {name: set(term.metrics) for name, term in terms.items()}

    term = build(kind)
    queries, keys = sample(*counts, dtype=torch.float32)
    terms = run(term, queries.requires_grad_(), keys, *counts)
    assert names(terms) == names(run(term, *sample(dtype=torch.float32)))
    weighted(terms).backward()
    assert all(parameter.grad is not None for parameter in term.parameters())


def test_queries_without_keys_count_alike_however_the_batch_is_split():
    term = build("gan")
    queries, keys = sample((3, 2), (0, 4), dtype=torch.float32)
    together = weighted(run(term, queries, keys, (3, 2), (0, 4)))
    apart = weighted(run(term, queries[:3], keys[:0], (3,), (0,))) + weighted(run(term, queries[3:], keys, (2,), (4,)))
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("kind", WITHIN_EXAMPLES)
@pytest.mark.parametrize("counts", [((1, 1), (1, 1)), ((3, 0), (0, 4)), ((0, 0), (0, 0)), ((), ())])
def test_without_any_example_to_match_the_term_is_zero_with_a_gradient_path(kind, counts):
    term = build(kind)
    queries, keys = sample(*counts, dtype=torch.float32)
    queries.requires_grad_()
    terms = run(term, queries, keys, *counts)
    assert terms
    total = weighted(terms)
    assert float(total.detach()) == 0
    total.backward()
    assert (queries.grad == 0).all()
    assert all((parameter.grad == 0).all() for parameter in term.parameters())
    for loss in terms.values():
        assert all(float(ratio.sum) == 0 and float(ratio.count) == 0 for ratio in loss.metrics.values())


@pytest.mark.parametrize("kind", WITHIN_EXAMPLES)
def test_low_precision_inputs_and_autocast(kind):
    term = build(kind)
    queries, keys = sample(dtype=torch.bfloat16)
    queries.requires_grad_()
    truth = float(weighted(run(term, queries.float(), keys.float())).detach())
    plain = weighted(run(term, queries, keys))
    assert plain.dtype == torch.float32
    assert float(plain.detach()) == pytest.approx(truth, rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = weighted(run(term, queries, keys))
    assert cast.dtype == torch.float32
    # The layers of critic and navigator may run in bfloat16, the distances may not.
    assert float(cast.detach()) == pytest.approx(truth, rel=3e-2 if kind in TRAINED else 1e-5)
    cast.backward()
    assert torch.isfinite(queries.grad).all()
    assert float(queries.grad.abs().max()) > 0


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WITHIN_EXAMPLES)
def test_training_a_projector_brings_shifted_queries_to_the_keys(kind):
    counts = (32, 24), (28, 28)
    inputs, keys = sample(*counts, shift=2.0, dtype=torch.float32)
    projector = nn.Linear(FEATURES, FEATURES)
    with torch.no_grad():
        projector.weight.copy_(torch.eye(FEATURES))
        projector.bias.zero_()
    term = build(kind)
    groups = [{"params": projector.parameters(), "lr": 1e-2}]
    if kind in TRAINED:
        groups.append({"params": term.parameters(), "lr": 5e-3})
    optimizer = torch.optim.Adam(groups, betas=(0.0, 0.9))
    before = float(mmd_squared(projector(inputs), keys).detach())
    for _ in range(80):
        optimizer.zero_grad()
        terms = run(term, projector(inputs), keys, *counts)
        sum(loss.weight * loss.sum / loss.count for loss in terms.values()).backward()
        optimizer.step()
    assert before > 0.2
    assert float(mmd_squared(projector(inputs), keys).detach()) < 0.25 * before


# --- bookkeeping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*WITHIN_EXAMPLES, "gan"])
def test_every_kind_says_nothing_of_the_student_and_logs_diagnostics(kind):
    terms = run(build(kind).double(), *sample())
    assert all(loss.is_auxiliary for loss in terms.values())
    metrics = [name for loss in terms.values() for name in loss.metrics]
    assert len(metrics) == len(set(metrics)) >= 2
    assert all(math.isfinite(float(r.sum)) for loss in terms.values() for r in loss.metrics.values())
    assert ("matching_spread_ratio" in metrics) == (kind != "gan")


@pytest.mark.parametrize("kind", TRAINED)
def test_directions_are_means_over_their_own_positions(kind):
    student, teacher = run(build(kind).double(), *sample()).values()
    assert (student.unit, student.count) == ("student_tokens", sum(QUERIES))
    assert (teacher.unit, teacher.count) == ("teacher_tokens", sum(KEYS))
    assert student.weight == teacher.weight == 1  # it scales what reaches the queries instead


@pytest.mark.parametrize("kind", [*WITHIN_EXAMPLES, "gan", "none"])
def test_parameters_are_those_that_learn(kind):
    """In the published code they are in no optimizer, and some take no part at all."""
    term = build(kind).double()
    parameters = dict(term.named_parameters())
    assert bool(parameters) == (kind in TRAINED)
    if not parameters:
        return
    queries, keys = sample()
    weighted(run(term, queries.requires_grad_(), keys)).backward()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    torch.optim.SGD(term.parameters(), lr=1.0).step()
    assert all(not torch.equal(before[name], parameter.detach()) for name, parameter in parameters.items())


def test_without_matching_there_is_no_term():
    assert run(build("none"), *sample()) == {}


def test_warmup_raises_the_weight_linearly():
    term = MatchingTerm("mmd", FEATURES, weight=0.5, warmup_steps=4, gan=GanConfig())
    weights = []
    for step in (0, 1, 2, 4, 9):
        term.set_step(step)
        weights.append(term.weight)
    assert weights == [0.0, 0.125, 0.25, 0.5, 0.5]


def test_warmup_reaches_the_queries_of_a_learned_kind():
    queries, keys = sample()
    queries.requires_grad_()
    term = MatchingTerm(
        "conditional_transport",
        FEATURES,
        weight=0.5,
        warmup_steps=4,
        gan=GanConfig(),
        transport=TransportConfig(hidden_size=4, output_size=2),
    ).double()
    gradients = []
    for step in (0, 1, 4):
        term.set_step(step)
        gradients.append(torch.autograd.grad(weighted(run(term, queries, keys)), queries)[0])
    assert (gradients[0] == 0).all()
    torch.testing.assert_close(gradients[2], 4 * gradients[1])


def test_accuracies_count_right_answers():
    queries, keys = sample(dtype=torch.float32)
    term = build("gan")
    terms = run(term, queries, keys)
    for name, metric, right in [
        ("gan_queries", "discriminator_query_accuracy", term.gan.discriminator(queries) > 0),
        ("gan_keys", "discriminator_key_accuracy", term.gan.discriminator(keys) <= 0),
    ]:
        assert int(terms[name].metrics[metric].sum) == int(right.sum())
