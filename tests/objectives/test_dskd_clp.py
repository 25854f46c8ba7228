import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

import dual_space_cases as cases
from vocabridge.losses.chunk_rows import chunk_rows
from vocabridge.losses.cross_attention import ChunkMeans
from vocabridge.objectives.base import ForwardPair
from vocabridge.objectives.dskd_clp import Config, DskdClp


def build(case, **settings):
    torch.manual_seed(0)
    return DskdClp(Config(**settings), cases.setup(*case.sizes)).double()


def uniform(b, side, index, s_chunks, t_chunks):
    own, other = (s_chunks, t_chunks) if side == 0 else (t_chunks, s_chunks)
    partners = [k for k, chunk in enumerate(other) if chunk == own[index] >= 0]
    return {k: 1 / len(partners) for k in partners}


@pytest.mark.parametrize("divergence", cases.DIVERGENCES)
def test_values_and_gradients_are_the_published_ones(golden, divergence):
    case = golden("dskd_clp_F")
    sizes = (case.tensors["in.student_hidden"].shape[-1], case.tensors["in.teacher_hidden"].shape[-1])
    objective = DskdClp(Config(divergence=divergence, statistics="batch"), cases.setup(*sizes))
    cases.check_golden(objective, case, divergence)


def test_weights_are_the_published_ones(golden):
    case = golden("dskd_clp_F")
    batch, pair = cases.golden_chunk_batch(case), case.pair().forward
    mixing = ChunkMeans(
        chunk_rows(pair.student.rows, batch["chunk_ids"], pair.teacher.rows, batch["teacher_chunk_ids"])
    )
    for reached, length, name in ((mixing.to_student, 11, "t2s"), (mixing.to_teacher, 14, "s2t")):
        # Each position of an example carries its own unit vector, so what arrives are the weights.
        weights = reached(torch.eye(length).repeat(3, 1)).reshape(3, -1, length)
        torch.testing.assert_close(weights, case.tensors[f"out.{name}_weight"])


@pytest.mark.parametrize("vocabularies", [(5, 9), (9, 5)])
@pytest.mark.parametrize("top_k", [None, 2, 4])
def test_loss_and_gradients_against_loops(vocabularies, top_k):
    case = cases.DualCase(vocabularies=vocabularies, seed=1)
    objective = build(case, temperature=1.5, kd_weight=0.7, teacher_top_k=top_k)
    terms = objective(case.pair, case.batch())
    right = terms["student_space"].metrics["t2s_accuracy"]
    assert 0 < float(right.sum) < float(right.count) == 10
    loss = sum(term.sum for term in terms.values())
    expected = cases.reference_loss(case, objective, uniform, temperature=1.5, kd_weight=0.7, top_k=top_k)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0.0)
    ours, reference = (case.gradients(value, objective) for value in (3 * loss, 3 * expected))
    assert ours.keys() == reference.keys()
    for name, gradient in reference.items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-11)


def test_teacher_top_k_of_the_whole_vocabulary_changes_nothing_and_a_smaller_one_is_measured():
    case = cases.DualCase(seed=1)
    found = {}
    for top_k in (None, 9, 20, 3):
        objective = build(case, teacher_top_k=top_k)
        terms = objective(case.pair, case.batch())
        gradients = case.gradients(sum(term.sum for term in terms.values()), objective)
        found[top_k] = (terms, gradients)
    for top_k in (9, 20):
        for name, gradient in found[None][1].items():
            assert torch.equal(found[top_k][1][name], gradient), name
        assert torch.equal(found[top_k][0]["teacher_space"].sum, found[None][0]["teacher_space"].sum)
    whole, cut = (found[top_k][0]["teacher_space"].metrics for top_k in (None, 3))
    assert set(cut) == set(whole) | {"teacher_top_mass"}
    covered = [0, 1, 2, 4, 5, 6, 7, 8, 9]  # see CHUNKS
    theirs = case.sides[1].head(case.sides[1].hidden_states[covered]) / 2.0  # the default temperature
    mass = sum(float(row.softmax(-1).sort(descending=True).values[:3].sum()) for row in theirs)
    assert float(cut["teacher_top_mass"].sum) == pytest.approx(mass)
    assert int(cut["teacher_top_mass"].count) == len(covered)


def test_accuracy_among_kept_tokens_finds_the_label():
    case = cases.DualCase(seed=2)
    case.sides[1] = replace(case.sides[1], labels=case.sides[1].head(case.sides[1].hidden_states).argmax(-1))
    metrics = build(case, teacher_top_k=2)(case.pair, case.batch())["teacher_space"].metrics
    objective = build(case)
    chunks = chunk_rows(
        case.sides[0].rows, case.batch()["chunk_ids"], case.sides[1].rows, case.batch()["teacher_chunk_ids"]
    )
    mixed = ChunkMeans(chunks).to_teacher(objective.student_to_teacher(case.sides[0].hidden_states))
    expected = 0
    for row in [0, 1, 2, 4, 5, 6, 7, 8, 9]:
        own = case.sides[1].head(case.sides[1].hidden_states[row])
        first, second = own.argsort(descending=True)[:2].tolist()
        projected = case.sides[1].head(mixed[row])
        expected += bool(projected[first] > projected[second])
    assert 0 < expected < 9
    assert float(metrics["s2t_accuracy"].sum) == expected


def test_positions_without_a_counterpart_add_nothing_but_their_cross_entropy():
    """Published: zero logits and a constant ln V in the loss."""
    case = cases.DualCase()
    objective = build(case, kd_weight=1.0)
    terms = objective(case.pair, case.batch())
    before = {name: float(term.sum.detach()) for name, term in terms.items()}
    coverage = terms["student_space"].metrics["coverage"]
    assert (int(coverage.sum), int(coverage.count)) == (10, 16)
    gradient = case.gradients(terms["student_space"].sum + terms["teacher_space"].sum, objective)["hidden"]
    alone = [2, *range(11, 16)]  # without a chunk, see CHUNKS
    assert float(gradient[alone].abs().max()) == 0.0
    assert float(gradient.abs().max()) > 0
    with torch.no_grad():
        case.sides[0].hidden_states[alone] += 1.0
    after = {name: float(term.sum.detach()) for name, term in objective(case.pair, case.batch()).items()}
    assert after == before


def test_no_chunk_at_all_gives_an_exact_zero_and_a_warning(caplog):
    case = cases.DualCase([([-1] * 4, [-1] * 3)])
    objective = build(case, kd_weight=1.0)
    with caplog.at_level(logging.WARNING):
        terms = objective(case.pair, case.batch())
    assert "dskd_clp: none of the 4 supervised student positions" in caplog.text
    loss = sum(term.sum for term in terms.values())
    assert float(loss.detach()) == 0.0
    gradients = case.gradients(loss, objective)
    assert {"hidden", "teacher_to_student.weight", "student_to_teacher.weight"} <= gradients.keys()
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients.values())


def test_a_teacher_that_agrees_leaves_nothing_to_learn():
    """Equal tokens, states and heads, projectors at the identity: both divergences and their gradients are 0."""
    case = cases.DualCase(cases.ONE_TO_ONE, vocabularies=(7, 7), sizes=(6, 6))
    student, teacher = case.sides
    hidden = student.hidden_states.detach().clone()
    for b in range(2):
        hidden[student.rows == b] /= hidden[student.rows == b].std()
    case.sides[0] = replace(student, hidden_states=hidden.requires_grad_(True))
    case.sides[1] = replace(student, hidden_states=hidden.detach(), rows=teacher.rows)
    objective = build(case, kd_weight=1.0, value="hidden")
    with torch.no_grad():
        for module in (objective.teacher_to_student, objective.student_to_teacher):
            module.weight.copy_(torch.eye(6))
            module.bias.zero_()
        best = (student.head.weight @ hidden.T).argmax(0)
        student.labels.copy_(torch.where(torch.arange(10) < 5, best, student.labels))  # some right predictions
    terms = objective(case.pair, case.batch())
    metrics = terms["student_space"].metrics | terms["teacher_space"].metrics
    assert float(metrics["t2s_accuracy"].sum) >= 5
    assert abs(float(metrics["t2s_divergence"].sum)) < 1e-12
    assert abs(float(metrics["s2t_divergence"].sum)) < 1e-12
    gradient = case.gradients(sum(term.sum for term in terms.values()), objective)["hidden"]
    assert float(gradient.abs().max()) < 1e-12


def test_equal_tokens_reduce_to_the_projections_without_mixing():
    case = cases.DualCase(cases.ONE_TO_ONE)
    objective = build(case)
    loss = sum(term.sum for term in objective(case.pair, case.batch()).values())
    expected = cases.reference_loss(
        case, objective, lambda b, side, index, *_: {index: 1.0}, temperature=2.0, kd_weight=0.5
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0.0)


def test_value_hidden_keeps_the_label_out_of_the_projected_teacher():
    """With the published values the label's embedding can be copied to the prediction."""
    case = cases.DualCase()
    losses = {}
    for value in ("hidden", "hidden_and_label"):
        objective = build(case, value=value)
        for shift in (0, 1):
            student, teacher = case.sides
            embedding = nn.Embedding.from_pretrained(teacher.embedding.weight.roll(shift, 0))
            pair = ForwardPair(student, replace(teacher, embedding=embedding))
            losses[value, shift] = float(objective(pair, case.batch())["student_space"].sum.detach())
    assert losses["hidden", 0] == losses["hidden", 1]
    assert losses["hidden_and_label", 0] != losses["hidden_and_label", 1]
