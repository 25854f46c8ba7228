import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import chunk_cases as cases
from vocabridge.losses.chunk_merge import log_prefix, prefix_positions
from vocabridge.losses.chunk_rows import chunk_rows
from vocabridge.losses.divergences import generalised_jsd
from vocabridge.objectives import _columns
from vocabridge.objectives.base import ForwardPair
from vocabridge.objectives.gold import Config, Gold

ENDS = (10, 4)


def build(pair, monkeypatch, shared, *, ends=ENDS, **settings):
    """The objective for vocabularies that share the given pairs of ids."""
    ids = np.array(shared, dtype=np.int64).reshape(-1, 2)
    known = SimpleNamespace(student_ids=ids[:, 0].copy(), teacher_ids=ids[:, 1].copy())
    monkeypatch.setattr(_columns, "shared_vocabulary", lambda student, teacher: known)
    return Gold(Config(**settings), cases.make_setup(pair, ends=ends))


def rank_distance(p, q):
    length = max(len(p), len(q))
    first, second = (sorted([*row, *[torch.zeros(()).double()] * (length - len(row))], reverse=True) for row in (p, q))
    return sum((abs(a - b) for a, b in zip(first, second, strict=True)), torch.zeros(()).double())


def chunk_loss_by_loops(p, q, matched, *, beta, weight):
    """One pair of merged rows (lists of masses); ``matched`` is None where ids are not compared."""
    if matched is None:
        return weight[1] * rank_distance(p, q)
    divergence = 0.0
    for i, j in matched:
        m = beta * q[j] + (1 - beta) * p[i]
        divergence = divergence + beta * q[j] * (q[j] / m).log() + (1 - beta) * p[i] * (p[i] / m).log()
    mine = [mass for i, mass in enumerate(p) if i not in {i for i, _ in matched}]
    theirs = [mass for j, mass in enumerate(q) if j not in {j for _, j in matched}]
    return weight[0] * divergence + weight[1] * rank_distance(mine, theirs)


def merged_by_loops(rows, labels, positions):
    product = torch.ones(()).double()
    for k in positions[:-1]:
        product = product * rows[k][labels[k]]
    return [mass * product for mass in rows[positions[-1]]]


def loss_by_loops(pair, matched, *, hybrid, temperature, beta, weight):
    sides = (pair.student, pair.teacher)
    rows = [(cases.plain_logits(side) / temperature).softmax(-1) for side in sides]
    rows[1] = rows[1].detach()
    total = torch.zeros(()).double()
    chunks = [cases.positions_by_chunk(c) for c in (cases.STUDENT_CHUNKS, cases.TEACHER_CHUNKS)]
    identical = 0
    for own, theirs in zip(*chunks, strict=True):
        p, q = (merged_by_loops(rows[s], sides[s].labels, places) for s, places in enumerate((own, theirs)))
        last = (int(pair.student.labels[own[-1]]), int(pair.teacher.labels[theirs[-1]]))
        by_identity = hybrid and last in matched
        identical += by_identity
        total = total + chunk_loss_by_loops(p, q, matched if by_identity else None, beta=beta, weight=weight)
    return total, identical


@pytest.mark.parametrize(("v_s", "v_t"), [(11, 17), (17, 11)])
@pytest.mark.parametrize(
    ("hybrid", "settings"),
    [
        (True, {}),
        (True, {"jsd_beta": 0.2, "matched_weight": 0.8, "temperature": 2.0}),
        (False, {}),
        (False, {"temperature": 0.7}),
    ],
)
def test_value_and_gradients_by_loops(v_s, v_t, hybrid, settings, monkeypatch):
    pair = cases.make_pair(v_s, v_t)
    shared = [(0, 3), (1, 1), (2, 0), (6, 7)]
    # Three chunks of one token on either side get labels that match.
    pair.student.labels[[2, 5, 13]] = torch.tensor([1, 10, 6])
    pair.teacher.labels[[4, 8, 12]] = torch.tensor([1, 4, 7])
    objective = build(pair, monkeypatch, shared, hybrid=hybrid, kd_weight=0.4, **settings)
    term = objective(pair, cases.make_batch(cases.STUDENT_CHUNKS, cases.TEACHER_CHUNKS))["gold"]
    share = settings.get("matched_weight", 5 / v_t)
    distilled, identical = loss_by_loops(
        pair,
        {*shared, ENDS},
        hybrid=hybrid,
        temperature=settings.get("temperature", 1.0),
        beta=settings.get("jsd_beta", 0.5),
        weight=(share, 1 - share) if hybrid else (0.0, 1.0),
    )
    assert (identical > 0) == hybrid
    logits = cases.plain_logits(pair.student)
    reference = -sum(row.log_softmax(0)[y] for row, y in zip(logits, pair.student.labels, strict=True))
    expected = 0.6 * reference + 0.4 * distilled
    torch.testing.assert_close(term.sum, expected)
    assert term.metrics["coverage"].sum == 13
    assert ("compared_by_identity" in term.metrics) == hybrid
    got = cases.gradients(term.sum * 1.7, pair.student)
    for mine, by_loops in zip(got, cases.gradients(expected * 1.7, pair.student), strict=True):
        assert float(by_loops.abs().max()) > 0
        torch.testing.assert_close(mine, by_loops)
    assert all(float(gradient.abs().max()) == 0 for gradient in cases.gradients(term.sum, pair.teacher))


def test_merged_rows_obey_the_chain_rule(monkeypatch):
    """The merged row's value at the token that was realised is the probability of the whole chunk."""
    pair = cases.make_pair(11, 17)
    objective = build(pair, monkeypatch, [])
    batch = cases.make_batch(cases.STUDENT_CHUNKS, cases.TEACHER_CHUNKS)
    chunks = chunk_rows(pair.student.rows, batch["chunk_ids"], pair.teacher.rows, batch["teacher_chunk_ids"])
    for side, ranges, listed in (
        (pair.student, chunks.student, cases.STUDENT_CHUNKS),
        (pair.teacher, chunks.teacher, cases.TEACHER_CHUNKS),
    ):
        rows = cases.plain_logits(side).detach().softmax(-1)
        positions = prefix_positions(ranges)
        prefix = log_prefix(objective._label_numbers(side, positions)[:, 0], positions, ranges)
        merged = rows[ranges.last] * prefix.exp()[:, None]
        realised = merged.gather(1, side.labels[ranges.last][:, None]).squeeze(1)
        products = [math.prod(float(rows[k, side.labels[k]]) for k in c) for c in cases.positions_by_chunk(listed)]
        torch.testing.assert_close(realised, torch.tensor(products, dtype=torch.float64))
        assert any(len(c) > 1 for c in cases.positions_by_chunk(listed))


# The same text, certain on both sides: id 1 is a common word, the other pieces exist on one side only.
TEXT_CHUNKS = [[0, 1, 1, 2, 3]], [[0, 1, 2, 2, 2, 3]]
TEXT_LABELS = [1, 5, 6, 7, 2], [1, 8, 5, 6, 7, 3]
TEXT_SHARED = [(1, 1), (7, 8)]  # the student's last piece of chunk 2 is a word of the teacher's, in another chunk
TEXT_ENDS = (2, 3)


def certain_pair():
    student, teacher = (cases.certain_side(9, c, y) for c, y in zip(TEXT_CHUNKS, TEXT_LABELS, strict=True))
    return ForwardPair(student, teacher)


@pytest.mark.parametrize("hybrid", [True, False])
def test_two_models_certain_of_the_same_text_have_zero_loss_and_no_gradient(hybrid, monkeypatch):
    pair = certain_pair()
    objective = build(pair, monkeypatch, TEXT_SHARED, ends=TEXT_ENDS, hybrid=hybrid, kd_weight=1.0)
    term = objective(pair, cases.make_batch(*TEXT_CHUNKS))["gold"]
    assert float(term.sum.detach()) == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in cases.gradients(term.sum, pair.student))
    if hybrid:
        assert int(term.metrics["compared_by_identity"].sum) == 2


def test_the_published_form_does_not_see_that_they_agree():
    """Rows one token late, multiplied by what follows the first token; and identity in chunks of several tokens."""
    rows = [torch.nn.functional.one_hot(torch.tensor(labels), 9).double() for labels in TEXT_LABELS]
    chunks = [cases.positions_by_chunk(c) for c in TEXT_CHUNKS]
    observed = identity = 0.0
    for own, theirs in zip(*chunks, strict=True):
        late = []
        for side, places in enumerate((own, theirs)):
            following = [min(k + 1, len(rows[side]) - 1) for k in places]  # softmax(z[start + 1]) predicts token + 1
            row = rows[side][following[0]]
            for k, y in zip(following[1:], places[1:], strict=True):
                row = row * rows[side][k, TEXT_LABELS[side][y]].clamp(min=1e-8)
            late.append(row.tolist())
        observed += float(rank_distance(*([torch.tensor(x) for x in row] for row in late)))
        merged = [merged_by_loops(rows[s], TEXT_LABELS[s], places) for s, places in enumerate((own, theirs))]
        identity += sum(abs(float(merged[0][i]) - float(merged[1][j])) for i, j in [*TEXT_SHARED, TEXT_ENDS])
    assert observed > 0
    assert identity > 0


@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_equal_vocabularies_reduce_to_the_generalised_jsd(beta, monkeypatch):
    chunks = [[0, 1, 2], [0, 1]]
    pair = ForwardPair(cases.make_side(12, chunks, seed=1), cases.make_side(12, chunks, seed=2))
    pair.teacher.labels.copy_(pair.student.labels)
    shared = [(i, i) for i in range(12) if i != 3]
    objective = build(pair, monkeypatch, shared, ends=(3, 3), jsd_beta=beta, kd_weight=1.0)
    loss = objective(pair, cases.make_batch(chunks, chunks))["gold"].sum
    rows = [cases.plain_logits(side) for side in (pair.student, pair.teacher)]
    expected = generalised_jsd(*rows, beta=beta).sum()
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(cases.gradients(loss, pair.student), cases.gradients(expected, pair.student), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("hybrid", [True, False])
def test_the_same_model_gives_exactly_zero_and_a_zero_gradient(hybrid, monkeypatch):
    pair = ForwardPair(*(cases.make_side(12, cases.STUDENT_CHUNKS, seed=1) for _ in range(2)))
    objective = build(pair, monkeypatch, [(i, i) for i in range(9)], ends=(10, 10), hybrid=hybrid, kd_weight=1.0)
    loss = objective(pair, cases.make_batch(cases.STUDENT_CHUNKS, cases.STUDENT_CHUNKS))["gold"].sum
    assert float(loss.detach()) == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in cases.gradients(loss, pair.student))


def test_end_tokens_are_a_matched_pair_under_their_templates_ids(monkeypatch):
    pair = cases.make_pair(11, 17)
    objective = build(pair, monkeypatch, [(0, 3), (10, 5)], ends=ENDS)  # what else has an end token's bytes gives way
    assert objective.student_matched.tolist() == [0, 10]
    assert objective.teacher_matched.tolist() == [3, 4]
    assert objective.student_unmatched.tolist() == list(range(1, 10))
    assert objective.matched_weight == 2 / 17


def test_improbable_prefixes_keep_their_gradient(monkeypatch):
    """Published: a product of probabilities clamped at 1e-8."""
    chunks = [[0, 0]]
    student = cases.certain_side(9, chunks, [1, 2])
    student.labels[0] = 5
    with torch.no_grad():
        student.hidden_states[0] /= 25  # logits 40 and 0: probability of the label about 4e-18
    teacher = cases.certain_side(9, chunks, [5, 2])
    pair = ForwardPair(student, teacher)
    objective = build(pair, monkeypatch, [], ends=(3, 3), hybrid=False, kd_weight=1.0)
    loss = objective(pair, cases.make_batch(chunks, chunks))["gold"].sum
    gradient = cases.gradients(loss, student)[0][0]
    probability = float(cases.plain_logits(student).detach().softmax(-1)[0, 5])
    assert probability < 1e-16
    # d(loss) / d(logit of the label) = -probability (1 - probability), through a head of 1.
    assert float(gradient[5]) == pytest.approx(-probability, rel=1e-6)


def test_no_chunk_is_an_exact_zero_with_a_path_and_a_warning(monkeypatch, caplog):
    student = cases.make_side(11, [[-1, -1]], seed=1)
    pair = ForwardPair(student, cases.make_side(13, [[-1]], seed=2))
    loss = build(pair, monkeypatch, [(0, 0)], kd_weight=1.0)(pair, cases.make_batch([[-1, -1]], [[-1]]))["gold"].sum
    assert float(loss.detach()) == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in cases.gradients(loss, student))
    assert "none of the 2 supervised student positions" in caplog.text


@pytest.mark.parametrize("setting", [{"jsd_beta": 0.3}, {"matched_weight": 0.5}])
def test_settings_without_effect_are_refused(setting):
    with pytest.raises(ValidationError, match=f"{next(iter(setting))} has no effect with hybrid: false"):
        Config(hybrid=False, **setting)
