import pytest
import torch

import chunk_cases as cases
from vocabridge.objectives.base import ForwardPair
from vocabridge.objectives.multilevel_ot import Config, MultiLevelOt

CONVERGED = {"sinkhorn_regularization": 0.4, "sinkhorn_iterations": 200}


def build(pair, **settings):
    return MultiLevelOt(Config(**{**CONVERGED, **settings}), cases.make_setup(pair))


def top_rows(side, example, *, top_k, standardize):
    """``[n, k]`` probabilities of one example's rows at its heaviest columns, heaviest first."""
    rows = []
    for row in cases.plain_logits(side)[side.rows == example]:
        rows.append((row / (row.std() + 1e-4) if standardize else row).softmax(0))
    if not rows:
        return torch.zeros(0, top_k, dtype=torch.float64)
    probabilities = torch.stack(rows)
    order = sorted(range(probabilities.shape[1]), key=lambda column: -float(probabilities[:, column].detach().sum()))
    return torch.stack([probabilities[:, column] for column in order[:top_k]], dim=1)


def entropic_cost(x, y, eps):
    """Minimum of <P, C> + eps KL(P | a b^T) by plain Sinkhorn on the kernel, with autograd through every update."""
    cost = torch.stack([torch.stack([(u - v).abs().sum() for v in y]) for u in x])
    a, b = 1 / len(x), 1 / len(y)
    kernel = (-cost / eps).exp() * a * b
    u, v = torch.ones(len(x), dtype=torch.float64), torch.ones(len(y), dtype=torch.float64)
    for _ in range(300):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    plan = u[:, None] * kernel * v[None, :]
    return (plan * cost).sum() + eps * (plan * (plan / (a * b)).log()).sum()


def sinkhorn_by_loops(x, y, regularization):
    mean = sum(float((u - v).abs().sum().detach()) for u in x for v in y) / (len(x) * len(y))
    eps = regularization * mean
    return entropic_cost(x, y, eps) - (entropic_cost(x, x, eps) + entropic_cost(y, y, eps)) / 2


def pairs_by_loops(alignment, example):
    own, theirs = cases.STUDENT_CHUNKS[example], cases.TEACHER_CHUNKS[example]
    if alignment == "index":
        return [(k, k) for k in range(min(len(own), len(theirs)))]
    return [(own.index(chunk), theirs.index(chunk)) for chunk in sorted(set(own) - {-1})]


def loss_by_loops(pair, *, alignment, top_k, standardize, weights):
    logits = cases.plain_logits(pair.student)
    reference = -sum(row.log_softmax(0)[y] for row, y in zip(logits, pair.student.labels, strict=True))
    parts = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
    for example in range(len(cases.STUDENT_CHUNKS)):
        p = top_rows(pair.student, example, top_k=top_k, standardize=standardize)
        q = top_rows(pair.teacher, example, top_k=top_k, standardize=standardize).detach()
        for i, j in pairs_by_loops(alignment, example):
            for c in range(p.shape[1]):
                parts[0] = parts[0] + abs(p[i, c] - q[j, c])
                parts[1] = parts[1] + q[j, c] * (q[j, c] / p[i, c]).log() - q[j, c] + p[i, c]
        if len(p):
            parts[2] = parts[2] + len(p) * sinkhorn_by_loops(p, q, CONVERGED["sinkhorn_regularization"])
    return reference, parts, parts[0] + weights[0] * parts[1] + weights[1] * parts[2]


@pytest.mark.parametrize(("v_s", "v_t"), [(11, 17), (17, 11)])
@pytest.mark.parametrize(
    ("alignment", "normalize", "top_k"), [("chunks", "std", 5), ("index", "none", 5), ("chunks", "none", 50)]
)
def test_value_and_gradients_by_loops(v_s, v_t, alignment, normalize, top_k):
    pair = cases.make_pair(v_s, v_t)
    objective = build(
        pair,
        alignment=alignment,
        normalize=normalize,
        top_k=top_k,
        kd_weight=0.4,
        sequential_weight=0.3,
        sinkhorn_weight=0.6,
    )
    term = objective(pair, cases.make_batch(cases.STUDENT_CHUNKS, cases.TEACHER_CHUNKS))["multilevel_ot"]
    reference, parts, distilled = loss_by_loops(
        pair, alignment=alignment, top_k=min(top_k, 11), standardize=normalize == "std", weights=(0.3, 0.6)
    )
    for name, part in zip(("holistic_distance", "sequential_divergence", "sinkhorn_divergence"), parts, strict=True):
        assert float(part.detach()) > 0
        assert float(term.metrics[name].sum) == pytest.approx(float(part.detach()), rel=1e-7), name
    expected = 0.6 * reference + 0.4 * distilled
    torch.testing.assert_close(term.sum, expected)
    got = cases.gradients(term.sum * 1.7, pair.student)
    for mine, by_loops in zip(got, cases.gradients(expected * 1.7, pair.student), strict=True):
        assert float(by_loops.abs().max()) > 0
        torch.testing.assert_close(mine, by_loops, rtol=1e-6, atol=1e-8)
    assert all(float(gradient.abs().max()) == 0 for gradient in cases.gradients(term.sum, pair.teacher))


@pytest.mark.parametrize("normalize", ["std", "none"])
def test_models_that_agree_have_zero_loss_and_no_gradient(normalize):
    """Although only some columns are compared, and transport is blurred and stops early."""
    pair = ForwardPair(*(cases.make_side(12, cases.STUDENT_CHUNKS, seed=1) for _ in range(2)))
    settings = Config(normalize=normalize, top_k=4, kd_weight=1.0, sinkhorn_weight=1.0, sequential_weight=1.0)
    objective = MultiLevelOt(settings, cases.make_setup(pair))
    loss = objective(pair, cases.make_batch(cases.STUDENT_CHUNKS, cases.STUDENT_CHUNKS))["multilevel_ot"].sum
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert all(float(gradient.abs().max()) < 1e-7 for gradient in cases.gradients(loss, pair.student))


def test_the_teacher_is_the_target_of_the_logarithmic_cost():
    """Published: swapped. The gradient by the student's logits of -sum q log p is p - q, whatever log q is."""
    pair = cases.make_pair(11, 11)
    objective = build(pair, normalize="none", top_k=11, kd_weight=1.0, sequential_weight=1e6, sinkhorn_weight=0.0)
    loss = objective(pair, cases.make_batch(cases.STUDENT_CHUNKS, cases.TEACHER_CHUNKS))["multilevel_ot"].sum / 1e6
    rows = [cases.plain_logits(side) for side in (pair.student, pair.teacher)]
    expected = torch.zeros((), dtype=torch.float64)
    starts = [0, 0]
    for example, (own, theirs) in enumerate(zip(cases.STUDENT_CHUNKS, cases.TEACHER_CHUNKS, strict=True)):
        mass = [rows[s][side.rows == example].softmax(1).sum(0) for s, side in enumerate((pair.student, pair.teacher))]
        orders = [m.argsort(descending=True) for m in mass]
        for i, j in pairs_by_loops("chunks", example):
            p = rows[0][starts[0] + i].log_softmax(0)[orders[0]]
            expected = expected - (rows[1][starts[1] + j].softmax(0)[orders[1]].detach() * p).sum()
        starts = [starts[0] + len(own), starts[1] + len(theirs)]
    for mine, reference in zip(
        cases.gradients(loss, pair.student), cases.gradients(expected, pair.student), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-4)


def test_an_examples_loss_does_not_depend_on_its_neighbours():
    """Published: columns are ordered over the micro-batch."""
    pair = cases.make_pair(11, 17)
    whole = build(pair, top_k=3)(pair, cases.make_batch(cases.STUDENT_CHUNKS, cases.TEACHER_CHUNKS))["multilevel_ot"]
    alone = 0.0
    for example in range(len(cases.STUDENT_CHUNKS)):
        sides = []
        for side in (pair.student, pair.teacher):
            mask = side.rows == example
            sides.append(
                type(side)(
                    hidden_states=side.hidden_states[mask],
                    input_ids=side.input_ids[mask],
                    labels=side.labels[mask],
                    rows=side.rows[mask] * 0,
                    head=side.head,
                    embedding=side.embedding,
                )
            )
        batch = cases.make_batch([cases.STUDENT_CHUNKS[example]], [cases.TEACHER_CHUNKS[example]])
        alone += build(pair, top_k=3)(ForwardPair(*sides), batch)["multilevel_ot"].sum
    torch.testing.assert_close(whole.sum, alone)


@pytest.mark.parametrize(("student", "teacher"), [([[-1, -1]], [[]]), ([[-1, -1], [0]], [[], [0]])])
def test_an_example_without_a_teacher_adds_only_its_cross_entropy(student, teacher):
    pair = ForwardPair(cases.make_side(11, student, seed=1), cases.make_side(13, teacher, seed=2))
    loss = build(pair, kd_weight=1.0)(pair, cases.make_batch(student, teacher))["multilevel_ot"].sum
    hidden = cases.gradients(loss, pair.student)[0]
    assert float(hidden[:2].abs().max()) == 0.0
    assert (float(loss.detach()) > 0) == (len(student) > 1)
