"""The three losses over pairs, against loops in float64; projectors in closed form, and when they are recomputed."""

from functools import partial

import pytest
import torch
from torch import nn

from vocabridge.errors import UserError
from vocabridge.losses.divergences import reverse_kl
from vocabridge.models.forward import SideForward
from vocabridge.models.heads import OutputHead
from vocabridge.objectives import _paired_space
from vocabridge.objectives._columns import ColumnPairs
from vocabridge.objectives._paired_space import PairedSpace
from vocabridge.objectives._row_pairs import RowPairs
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup
from vocabridge.objectives.config import PairedSpaceConfig

N, M, D_S, D_T = 7, 6, 5, 4
PAIRS = RowPairs(torch.tensor([0, 2, 3, 6]), torch.tensor([1, 2, 4, 5]))
LEARNED = {"projector_start": "random", "teacher_space_projector": "learned"}


def values(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Pair:
    """Two sides with biased and scaled heads; everything that may be trained is a leaf."""

    def __init__(self, v_s, v_t):
        self.hidden, self.weight, self.bias = (
            tensor.requires_grad_(True)
            for tensor in (values(N, D_S, seed=1), values(v_s, D_S, seed=2), values(v_s, seed=3))
        )
        self.teacher_hidden, self.teacher_weight = values(M, D_T, seed=4), values(v_t, D_T, seed=5)
        # The teacher predicts token 5, 6, 7, 8 at its paired positions, which are none of its labels there.
        self.teacher_weight[5:9] = 3 * nn.functional.normalize(self.teacher_hidden[PAIRS.teacher], dim=-1)
        self.teacher_weight.requires_grad_(True)
        self.labels, self.teacher_labels = torch.arange(N) % v_s, torch.arange(M) % v_t
        self.head = OutputHead(self.weight, self.bias, None, 0.5)
        self.teacher_head = OutputHead(self.teacher_weight, None, None, 2.0)

    @property
    def forward(self):
        sides = (
            SideForward(
                hidden_states=hidden,
                input_ids=labels,
                labels=labels,
                rows=torch.zeros_like(labels),
                head=head,
                embedding=nn.Embedding(1, 1),
            )
            for hidden, labels, head in (
                (self.hidden, self.labels, self.head),
                (self.teacher_hidden, self.teacher_labels, self.teacher_head),
            )
        )
        return ForwardPair(*sides)

    def objective(self, targets=None, **settings):
        setup = ObjectiveSetup(
            student_hidden_size=D_S,
            student_embedding=nn.Embedding(1, 1),
            student_tokenizer=None,
            student_head=self.head,
            teacher_hidden_size=D_T,
            teacher_head=self.teacher_head,
        )
        config = PairedSpaceConfig(**settings)
        torch.manual_seed(0)
        return PairedSpace(
            config,
            setup,
            name="test",
            targets=torch.full((len(self.teacher_weight),), -1) if targets is None else targets,
            teacher_divergence=partial(reverse_kl, temperature=config.temperature),
        ).double()

    def teacher_predictions(self):
        return [int((self.teacher_weight @ self.teacher_hidden[j]).argmax()) for j in PAIRS.teacher]


def kl(p, q):
    return (p * (p.log() - q.log())).sum()


def reference(pair, objective, targets, config):
    """Loss by loops over positions and pairs."""
    frozen, frozen_bias, teacher_weight = (t.detach() for t in (pair.weight, pair.bias, pair.teacher_weight))
    to_student, to_teacher = objective.teacher_to_student, objective.student_to_teacher
    kd_weight, temperature = config["kd_weight"], config["temperature"]
    total, taught, agreeing = 0.0, 0, 0
    for i in range(N):
        own = 0.5 * (pair.weight @ pair.hidden[i] + pair.bias)
        total = total - (1 - kd_weight) * own.log_softmax(-1)[pair.labels[i]]
    for i, j in zip(PAIRS.student.tolist(), PAIRS.teacher.tolist(), strict=True):
        theirs = 2.0 * (teacher_weight @ pair.teacher_hidden[j])
        predicted = int(theirs.argmax())
        if config["t2s_target"] == "label" or predicted == int(pair.teacher_labels[j]):
            target = int(pair.labels[i])
        else:
            target = int(targets[predicted])
        if target < 0:
            continue
        taught += 1
        own = 0.5 * (pair.weight @ pair.hidden[i] + pair.bias)
        in_student = 0.5 * (frozen @ (to_student.weight @ pair.teacher_hidden[j] + to_student.bias) + frozen_bias)
        in_teacher = 2.0 * (teacher_weight @ (to_teacher.weight @ pair.hidden[i] + to_teacher.bias))
        kept = theirs.argsort(descending=True)[: config["teacher_top_k"]]
        total = total - kd_weight * in_student.log_softmax(-1)[target]
        agrees = int(in_student.argmax()) == target
        agreeing += agrees
        if agrees or config["t2s_target"] == "label":
            constant = (in_student.detach() / temperature).softmax(-1)
            total = total + kd_weight * kl(constant, (own / temperature).softmax(-1))
        total = total + kd_weight * kl(
            (in_teacher[kept] / temperature).softmax(-1), (theirs[kept] / temperature).softmax(-1)
        )
    return total, taught, agreeing


@pytest.mark.parametrize(("v_s", "v_t"), [(9, 13), (13, 9)])
@pytest.mark.parametrize("t2s_target", ["label", "teacher_argmax"])
@pytest.mark.parametrize("teacher_top_k", [None, 2, 4])
def test_value_and_every_gradient_by_loops(v_s, v_t, t2s_target, teacher_top_k):
    pair = Pair(v_s, v_t)
    predicted = pair.teacher_predictions()
    assert predicted == [5, 6, 7, 8]
    pair.teacher_labels = torch.tensor([0, 1, 2, 3, 4, 8])
    config = {"t2s_target": t2s_target, "kd_weight": 0.3, "temperature": 1.5, "teacher_top_k": teacher_top_k}
    objective = pair.objective(**config, **LEARNED)
    projected = objective.teacher_to_student(pair.teacher_hidden[PAIRS.teacher]) @ pair.weight.T + pair.bias
    targets = torch.full((v_t,), -1)
    targets[predicted[0]] = projected[0].argmax()  # agrees
    targets[predicted[1]] = (projected[1].argmax() + 1) % v_s  # has a target and misses it; the third has none
    objective.targets.copy_(targets)
    (term,) = objective.paired_terms(pair.forward, PAIRS).values()
    expected, taught, agreeing = reference(pair, objective, targets, config)
    assert (taught, agreeing > 0) == ((3, True) if t2s_target == "teacher_argmax" else (4, agreeing > 0))
    torch.testing.assert_close(term.sum, expected)
    assert term.count == N
    assert term.metrics["coverage"].sum == taught
    assert (term.metrics["t2s_accuracy"].sum, term.metrics["t2s_accuracy"].count) == (agreeing, taught)
    leaves = [pair.hidden, pair.weight, pair.bias, *objective.parameters()]
    got, want = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (term.sum, expected))
    for mine, theirs in zip(got, want, strict=True):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.grad(term.sum, pair.teacher_weight, allow_unused=True) == (None,)


@pytest.mark.parametrize("t2s_target", ["label", "teacher_argmax"])
def test_teacher_top_k_of_the_whole_vocabulary_changes_nothing_and_a_smaller_one_is_measured(t2s_target):
    pair = Pair(9, 13)
    pair.teacher_labels = torch.tensor([0, 5, 2, 3, 7, 8])
    targets = torch.arange(13).clamp(max=8)
    leaves = [pair.hidden, pair.weight, pair.bias]
    found = {}
    for top_k in (None, 13, 100, 3):
        objective = pair.objective(targets, **LEARNED, t2s_target=t2s_target, teacher_top_k=top_k)
        (term,) = objective.paired_terms(pair.forward, PAIRS).values()
        found[top_k] = (term, torch.autograd.grad(term.sum, [*leaves, *objective.parameters()]))
    whole, gradients = found[None]
    for top_k in (13, 100):
        assert torch.equal(found[top_k][0].sum, whole.sum)
        assert all(torch.equal(*pairs) for pairs in zip(found[top_k][1], gradients, strict=True))
    cut = found[3][0].metrics
    same = {"cross_entropy", "student_accuracy", "t2s_cross_entropy", "t2s_divergence", "t2s_accuracy", "coverage"}
    assert (
        set(cut)
        == set(whole.metrics) | {"teacher_top_mass"}
        == same
        | {
            "s2t_divergence",
            "s2t_accuracy",
            "teacher_top_mass",
        }
    )
    for name in same:
        torch.testing.assert_close(
            torch.as_tensor(cut[name].sum), torch.as_tensor(whole.metrics[name].sum), msg=lambda m, n=name: f"{n}: {m}"
        )
    theirs = pair.teacher_head(pair.teacher_hidden[PAIRS.teacher]).detach() / 2.0  # the default temperature
    mass = sum(float(row.softmax(-1).sort(descending=True).values[:3].sum()) for row in theirs)
    assert float(cut["teacher_top_mass"].sum) == pytest.approx(mass)
    assert int(cut["teacher_top_mass"].count) == 4


def test_student_head_is_trained_through_its_own_logits_alone():
    """Where no projected row agrees, distillation alone gives the student's head no gradient."""
    pair = Pair(9, 13)
    predicted = pair.teacher_predictions()
    objective = pair.objective(**LEARNED, kd_weight=1.0)
    projected = objective.teacher_to_student(pair.teacher_hidden[PAIRS.teacher]) @ pair.weight.T + pair.bias
    for row, token in zip(projected, predicted, strict=True):
        objective.targets[token] = row.argmin()
    pair.labels[PAIRS.student] = projected.argmin(-1)
    (term,) = objective.paired_terms(pair.forward, PAIRS).values()
    term.sum.backward()
    assert float(pair.hidden.grad.abs().max()) > 0  # through the teacher's space
    assert float(objective.teacher_to_student.weight.grad.abs().max()) > 0
    assert float(pair.weight.grad.abs().max()) == 0.0


def test_zero_pairs_give_zero_with_a_gradient_path_and_a_warning(caplog):
    pair = Pair(9, 13)
    objective = pair.objective(**LEARNED, kd_weight=1.0)
    nobody = torch.zeros(0, dtype=torch.long)
    (term,) = objective.paired_terms(pair.forward, RowPairs(nobody, nobody)).values()
    assert float(term.sum.detach()) == 0.0
    term.sum.backward()
    assert all(float(p.grad.abs().max()) == 0.0 for p in (pair.hidden, pair.weight, *objective.parameters()))
    assert "none of the 7 supervised student positions" in caplog.text


@pytest.fixture
def shared(monkeypatch):
    """Nine shared tokens, in another order on the two sides."""
    columns = ColumnPairs(torch.arange(9), torch.arange(12, 3, -1))
    monkeypatch.setattr(_paired_space, "shared_columns", lambda setup: columns)
    return columns


def test_pseudo_inverse_start_gives_the_nearest_logits_with_biases_and_scales(shared):
    pair = Pair(11, 13)
    objective = pair.objective()
    with torch.no_grad():
        mine, bias = 0.5 * pair.weight[shared.student], 0.5 * pair.bias[shared.student]
        theirs = 2.0 * pair.teacher_weight[shared.teacher]
        for hidden in pair.teacher_hidden:
            expected = torch.linalg.lstsq(mine, (theirs @ hidden - bias)[:, None]).solution[:, 0]
            torch.testing.assert_close(objective.teacher_to_student(hidden), expected)
        for hidden in pair.hidden:
            expected = torch.linalg.lstsq(theirs, (mine @ hidden + bias)[:, None]).solution[:, 0]
            torch.testing.assert_close(objective.student_to_teacher(hidden), expected)


def test_recomputed_projector_follows_the_head_in_due_steps_only(shared):
    pair = Pair(11, 13)
    objective = pair.objective(recompute_every=3)
    assert not objective.student_to_teacher.weight.requires_grad
    assert [name for name, _ in objective.named_parameters()] == [
        "teacher_to_student.weight",
        "teacher_to_student.bias",
    ]
    assert "student_to_teacher.weight" in objective.state_dict()  # but saved all the same
    seen = []
    for step in range(7):
        with torch.no_grad():
            pair.weight += 0.01
        for _ in range(2):  # micro-batches
            objective.set_step(step)
            objective.paired_terms(pair.forward, PAIRS)
        seen.append(objective.student_to_teacher.weight.clone())
        if step and step % 3 == 0:
            fresh = pair.objective(recompute_every=3).student_to_teacher.weight
            torch.testing.assert_close(seen[-1], fresh)
    changes = [step for step in range(1, 7) if not torch.equal(seen[step], seen[step - 1])]
    assert changes == [3, 6]


def test_a_resumed_run_goes_on_with_the_projector_that_was_saved(shared):
    pair = Pair(11, 13)
    first = pair.objective(recompute_every=3)
    with torch.no_grad():
        pair.weight += 0.1
    first.set_step(3)
    first.paired_terms(pair.forward, PAIRS)
    saved = first.state_dict()
    with torch.no_grad():
        pair.weight += 0.1
    resumed = pair.objective(recompute_every=3)
    resumed.load_state_dict(saved)
    resumed.set_step(4)
    resumed.paired_terms(pair.forward, PAIRS)
    torch.testing.assert_close(resumed.student_to_teacher.weight, first.student_to_teacher.weight, rtol=0, atol=0)


def test_learned_projector_starts_in_closed_form_and_stays_trainable(shared):
    pair = Pair(11, 13)
    learned, recomputed = pair.objective(teacher_space_projector="learned"), pair.objective()
    torch.testing.assert_close(learned.student_to_teacher.weight, recomputed.student_to_teacher.weight)
    assert learned.student_to_teacher.weight.requires_grad
    before = learned.student_to_teacher.weight.clone()
    learned.set_step(10)
    learned.paired_terms(pair.forward, PAIRS)
    assert torch.equal(learned.student_to_teacher.weight, before)


def test_no_shared_token_is_refused_unless_nothing_is_computed_from_them(monkeypatch):
    end = torch.zeros(1, dtype=torch.long)
    monkeypatch.setattr(_paired_space, "shared_columns", lambda setup: ColumnPairs(end, end))
    with pytest.raises(UserError, match="share no token"):
        Pair(9, 13).objective()
    with pytest.raises(UserError, match="teacher_space_projector: learned"):
        Pair(9, 13).objective(projector_start="random")
    Pair(9, 13).objective(**LEARNED)


def test_interval_of_a_learned_projector_is_refused():
    with pytest.raises(ValueError, match="recompute_every has no effect"):
        PairedSpaceConfig(teacher_space_projector="learned", recompute_every=2)


def test_a_learned_projector_reads_back_from_settings_with_defaults_written_out():
    config = PairedSpaceConfig(teacher_space_projector="learned")
    assert PairedSpaceConfig(**config.model_dump()) == config
