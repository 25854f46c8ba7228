import pytest
import torch

import chunk_cases as cases
from vocabridge.objectives.base import ForwardPair
from vocabridge.objectives.uld import Config, UniversalLogitDistillation

GRADIENT = {"rtol": 2e-4, "atol": 5e-6}


def build(pair, **settings):
    return UniversalLogitDistillation(Config(**settings), cases.make_setup(pair))


@pytest.fixture
def published(golden):
    case = golden("uld_F")
    for side in ("student", "teacher"):  # plays no role
        case.tensors[f"in.{side}_embed_weight"] = torch.zeros(2, 2)
    return case


@pytest.mark.parametrize(("kd_weight", "key"), [(0.5, "total"), (1.0, "kd")])
def test_values_and_gradients_are_the_published_ones(published, kd_weight, key):
    pair = published.pair()
    objective = build(pair.forward, alignment="index", kd_weight=kd_weight)
    term = objective(pair.forward, published.batch())["uld"]
    expected = published.scalars
    assert float(term.metrics["uld_distance"].sum) == pytest.approx(expected["uld_loss"], rel=2e-5)
    assert term.metrics["uld_distance"].count == 33
    if kd_weight < 1:
        assert float(term.metrics["cross_entropy"].sum) == pytest.approx(expected["nll_loss"], rel=2e-5)
    total = expected["total"] if key == "total" else expected["uld_loss"]
    assert float(term.sum.detach()) == pytest.approx(total, rel=2e-5)
    term.sum.backward()
    torch.testing.assert_close(pair.student_hidden.grad, published.tensors[f"grad.{key}.student_hidden"], **GRADIENT)


def distance_by_loops(student_logits, teacher_logits, temperature):
    """One pair of rows: sorted, zero-padded, absolute differences, one number at a time."""
    p = (student_logits / temperature).softmax(0).sort(descending=True).values
    q = (teacher_logits / temperature).softmax(0).sort(descending=True).values
    total = 0.0
    for k in range(max(len(p), len(q))):
        mine = p[k] if k < len(p) else 0.0
        theirs = q[k].detach() if k < len(q) else 0.0
        total = total + abs(mine - theirs)
    return total


def rows_by_loops(alignment):
    if alignment == "chunks":
        student, teacher = (cases.positions_by_chunk(c) for c in (cases.STUDENT_CHUNKS, cases.TEACHER_CHUNKS))
        return [(i[0], j[0]) for i, j in zip(student, teacher, strict=True)]
    pairs, starts = [], [0, 0]
    for own, theirs in zip(cases.STUDENT_CHUNKS, cases.TEACHER_CHUNKS, strict=True):
        pairs += [(starts[0] + k, starts[1] + k) for k in range(min(len(own), len(theirs)))]
        starts = [starts[0] + len(own), starts[1] + len(theirs)]
    return pairs


@pytest.mark.parametrize(("v_s", "v_t"), [(11, 17), (17, 11), (13, 13)])
@pytest.mark.parametrize("alignment", ["chunks", "index"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradients_by_loops(v_s, v_t, alignment, temperature):
    pair = cases.make_pair(v_s, v_t)
    objective = build(pair, alignment=alignment, temperature=temperature, kd_weight=0.3)
    term = objective(pair, cases.make_batch(cases.STUDENT_CHUNKS, cases.TEACHER_CHUNKS))["uld"]
    logits = [cases.plain_logits(side) for side in (pair.student, pair.teacher)]
    reference = -sum(row.log_softmax(0)[y] for row, y in zip(logits[0], pair.student.labels, strict=True))
    pairs = rows_by_loops(alignment)
    distances = sum(distance_by_loops(logits[0][i], logits[1][j], temperature) for i, j in pairs)
    expected = 0.7 * reference + 0.3 * distances
    torch.testing.assert_close(term.sum, expected)
    assert term.count == 15
    assert term.metrics["coverage"].sum == len(pairs)
    got = cases.gradients(term.sum * 1.7, pair.student)
    for mine, by_loops in zip(got, cases.gradients(expected * 1.7, pair.student), strict=True):
        assert float(by_loops.abs().max()) > 0
        torch.testing.assert_close(mine, by_loops)
    assert all(float(gradient.abs().max()) == 0 for gradient in cases.gradients(term.sum, pair.teacher))


def test_the_order_of_a_vocabulary_does_not_matter():
    student = cases.make_side(12, cases.STUDENT_CHUNKS, seed=1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    teacher = cases.make_side(12, cases.STUDENT_CHUNKS, seed=1)
    with torch.no_grad():
        for tensor in (teacher.head.weight, teacher.head.bias):
            tensor.copy_(tensor[order])
    pair = ForwardPair(student, teacher)
    batch = cases.make_batch(cases.STUDENT_CHUNKS, cases.STUDENT_CHUNKS)
    loss = build(pair, kd_weight=1.0)(pair, batch)["uld"].sum
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)


def test_the_same_model_gives_exactly_zero_and_a_zero_gradient():
    student, teacher = (cases.make_side(12, cases.STUDENT_CHUNKS, seed=1) for _ in range(2))
    pair = ForwardPair(student, teacher)
    for alignment in ("chunks", "index"):
        objective = build(pair, kd_weight=1.0, alignment=alignment)
        loss = objective(pair, cases.make_batch(cases.STUDENT_CHUNKS, cases.STUDENT_CHUNKS))["uld"].sum
        assert float(loss.detach()) == 0.0
        assert all(float(gradient.abs().max()) == 0.0 for gradient in cases.gradients(loss, student))


def test_flat_distributions_of_a_larger_teacher_vocabulary_give_a_loss_without_gradient():
    """A property of the formula, stated in the module's docstring: not something that we can mend."""
    pair = ForwardPair(
        cases.make_side(20, [[0, 1, 2]], seed=1, scale=0.1), cases.make_side(50, [[0, 1, 2]], seed=2, scale=0.1)
    )
    loss = build(pair, kd_weight=1.0)(pair, cases.make_batch([[0, 1, 2]], [[0, 1, 2]]))["uld"].sum
    assert float(loss.detach()) > 1.0
    assert all(float(gradient.abs().max()) < 1e-14 for gradient in cases.gradients(loss, pair.student))


def test_inputs_are_left_alone():
    pair = cases.make_pair(11, 17)
    before = [tensor.clone() for side in (pair.student, pair.teacher) for tensor in cases.trained(side)]
    build(pair)(pair, cases.make_batch(cases.STUDENT_CHUNKS, cases.TEACHER_CHUNKS))["uld"].sum.backward()
    after = [tensor for side in (pair.student, pair.teacher) for tensor in cases.trained(side)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("alignment", ["chunks", "index"])
def test_no_pair_is_an_exact_zero_with_a_path_and_a_warning(alignment, caplog):
    student = cases.make_side(11, [[-1, -1]], seed=1)
    pair = ForwardPair(student, cases.make_side(13, [[]], seed=2))
    loss = build(pair, kd_weight=1.0, alignment=alignment)(pair, cases.make_batch([[-1, -1]], [[]]))["uld"].sum
    assert float(loss.detach()) == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in cases.gradients(loss, student))
    assert "none of the 2 supervised student positions" in caplog.text
