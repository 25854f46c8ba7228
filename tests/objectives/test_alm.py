"""Approximate likelihood matching against loops over tokens."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from chunk_cases import STUDENT_CHUNKS, TEACHER_CHUNKS, make_batch, make_side
from vocabridge.errors import UserError
from vocabridge.models.forward import SideForward
from vocabridge.models.heads import OutputHead
from vocabridge.objectives.alm import Alm, Config, boundary_mask
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup


def make_objective(student, teacher, student_tokenizer, teacher_tokenizer, **settings):
    return Alm(
        Config(**settings),
        ObjectiveSetup(
            student_hidden_size=student.hidden_states.shape[1],
            student_embedding=nn.Identity(),
            student_tokenizer=student_tokenizer,
            student_head=student.head,
            teacher_tokenizer=teacher_tokenizer,
            teacher_head=teacher.head,
        ),
    )


def starts_a_word(tokenizer):
    """Ids that begin with white space or are control tokens, from the spellings in the vocabulary."""
    spellings = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    marks = ("\u0120", "\u010a", "\u0109", "\u2581", "\n", "\t", "<0x20>", "<0x0A>", "<0x09>")
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return [i for i, spelling in enumerate(spellings) if spelling.startswith(marks) or i in special]


def loss_by_loops(student, teacher, sets, *, kd_weight, temperature, append_outcome, merge_threshold):
    """Sum of the loss, by loops over examples, chunks and tokens, with autograd on each number."""
    logs = [side.head(side.hidden_states).log_softmax(-1) for side in (student, teacher)]
    logs[1] = logs[1].detach()
    total = -(1 - kd_weight) * sum(logs[0][i, label] for i, label in enumerate(student.labels))
    first = [0, 0]
    for own, other in zip(STUDENT_CHUNKS, TEACHER_CHUNKS, strict=True):
        piece = [0.0, 0.0]
        for chunk in range(max([-1, *own]) + 1):
            outcome = [0.0, 0.0]
            at_end = chunk == max(own)
            is_followed = own[-1] != chunk and other[-1] != chunk
            for side, ids in enumerate((own, other)):
                positions = [first[side] + i for i, c in enumerate(ids) if c == chunk]
                labels = (student, teacher)[side].labels
                piece[side] = piece[side] + sum(logs[side][i, labels[i]] for i in positions)
                if is_followed:
                    outcome[side] = logs[side][positions[-1] + 1, sets[side]].exp().sum().log()
            if at_end or merge_threshold is None or float(torch.as_tensor(outcome[1]).exp()) > merge_threshold:
                b, a = (
                    (total_log + appended * append_outcome) / temperature - 1e-6
                    for total_log, appended in zip(piece, outcome, strict=True)
                )
                p, q = a.exp(), b.exp()
                total = total - kd_weight * temperature * (p * q.log() + (1 - p) * (1 - q).log())
                piece = [0.0, 0.0]
        first = [first[0] + len(own), first[1] + len(other)]
    return total


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("append_outcome", "merge_threshold"), [(True, 0.55), (True, None), (False, 0.55), (False, None)]
)
def test_loss_and_every_gradient_by_loops(
    swap, append_outcome, merge_threshold, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer
):
    tokenizers = (tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)[:: -1 if swap else 1]
    student = make_side(len(tokenizers[0]), STUDENT_CHUNKS, seed=0)
    teacher = make_side(len(tokenizers[1]), TEACHER_CHUNKS, seed=1, width=7)
    settings = {
        "kd_weight": 0.3,
        "temperature": 4.0,
        "append_outcome": append_outcome,
        "merge_threshold": merge_threshold,
    }
    objective = make_objective(student, teacher, *tokenizers, **settings)
    terms = objective(ForwardPair(student, teacher), make_batch(STUDENT_CHUNKS, TEACHER_CHUNKS))
    leaves = [student.hidden_states, student.head.weight, student.head.bias]
    gradients = torch.autograd.grad(2 * terms["alm"].sum, leaves)
    expected = loss_by_loops(student, teacher, list(map(starts_a_word, tokenizers)), **settings)
    torch.testing.assert_close(terms["alm"].sum, expected, rtol=1e-10, atol=0)
    for gradient, by_loops in zip(gradients, torch.autograd.grad(2 * expected, leaves), strict=True):
        assert by_loops.abs().max() > 0.01
        torch.testing.assert_close(gradient, by_loops, rtol=1e-8, atol=1e-10)
    metrics = terms["alm"].metrics
    assert float(metrics["coverage"].sum) == 13
    num_pieces = int(metrics["chunk_difference"].count)
    assert num_pieces == 9 if merge_threshold is None else num_pieces < 9


def test_equal_models_get_no_gradient_and_the_least_loss(tiny_bpe_tokenizer):
    side = make_side(len(tiny_bpe_tokenizer), STUDENT_CHUNKS, seed=0)
    objective = make_objective(side, side, tiny_bpe_tokenizer, tiny_bpe_tokenizer, kd_weight=1.0, merge_threshold=0.55)
    terms = objective(ForwardPair(side, side), make_batch(STUDENT_CHUNKS, STUDENT_CHUNKS))
    (gradient,) = torch.autograd.grad(terms["alm"].sum, side.hidden_states)
    assert gradient.abs().max() < 1e-12
    assert float(terms["alm"].metrics["chunk_log_likelihood_gap"].sum) == 0.0
    reverse = make_objective(
        side, side, tiny_bpe_tokenizer, tiny_bpe_tokenizer, kd_weight=1.0, difference="binary_reverse_kl"
    )
    assert float(reverse(ForwardPair(side, side), make_batch(STUDENT_CHUNKS, STUDENT_CHUNKS))["alm"].sum.detach()) == 0


@pytest.mark.parametrize("difference", ["binary_cross_entropy", "binary_reverse_kl", "binary_kl_limit", "renyi", "k3"])
def test_a_certain_student_gets_finite_gradients(difference, tiny_bpe_tokenizer):
    teacher = make_side(len(tiny_bpe_tokenizer), STUDENT_CHUNKS, seed=1)
    student = make_side(len(tiny_bpe_tokenizer), STUDENT_CHUNKS, seed=0)
    directions = nn.functional.normalize(student.head.weight.detach().float())
    sure = SideForward(  # float32, log-probability 0 for its label
        hidden_states=(directions[student.labels] * 3e4).requires_grad_(),
        input_ids=student.input_ids,
        labels=student.labels,
        rows=student.rows,
        head=OutputHead(directions, None, None, 1.0),
        embedding=student.embedding,
    )
    objective = make_objective(sure, teacher, tiny_bpe_tokenizer, tiny_bpe_tokenizer, difference=difference)
    term = objective(ForwardPair(sure, teacher), make_batch(STUDENT_CHUNKS, STUDENT_CHUNKS))["alm"]
    assert float(term.metrics["cross_entropy"].sum) < 1e-6
    (gradient,) = torch.autograd.grad(term.sum, sure.hidden_states)
    assert torch.isfinite(term.sum)
    assert torch.isfinite(gradient).all()


def test_no_chunk_gives_zero_and_says_so(tiny_bpe_tokenizer, caplog):
    side = make_side(len(tiny_bpe_tokenizer), STUDENT_CHUNKS, seed=0)
    objective = make_objective(side, side, tiny_bpe_tokenizer, tiny_bpe_tokenizer, kd_weight=1.0)
    nothing = [[-1] * len(row) for row in STUDENT_CHUNKS]
    term = objective(ForwardPair(side, side), make_batch(nothing, nothing))["alm"]
    assert float(term.sum.detach()) == 0.0
    (gradient,) = torch.autograd.grad(term.sum, side.hidden_states)
    assert gradient.abs().max() == 0
    assert "none of the 15 supervised student positions" in caplog.text


@pytest.mark.parametrize("fixture", ["tiny_bpe_tokenizer", "tiny_sentencepiece_tokenizer"])
def test_boundaries_are_white_space_and_control_tokens(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    mask = boundary_mask(tokenizer, len(tokenizer), end_token_id=tokenizer.eos_token_id)
    assert mask.nonzero().squeeze(1).tolist() == starts_a_word(tokenizer)
    assert mask[tokenizer.eos_token_id]
    if tokenizer.unk_token_id is not None:
        assert not mask[tokenizer.unk_token_id]


def test_tokenizer_without_spaces_is_refused(minilm_tokenizer):
    with pytest.raises(UserError, match="append_outcome: false and merge_threshold: null"):
        boundary_mask(minilm_tokenizer, len(minilm_tokenizer), end_token_id=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"renyi_alpha": 0.3}, "has no effect"),
        ({"difference": "renyi", "renyi_alpha": 1.0}, "must not be 1"),
        ({"difference": "absolute_log", "temperature": 100.0}, "temperature has no effect"),
        ({"difference": "kl"}, "binary_reverse_kl"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Config(**settings)


def test_gradient_does_not_vanish_with_the_temperature(tiny_bpe_tokenizer):
    """The published difference falls as 1 / temperature; see the module's docstring."""
    student = make_side(len(tiny_bpe_tokenizer), STUDENT_CHUNKS, seed=0)
    teacher = make_side(len(tiny_bpe_tokenizer), STUDENT_CHUNKS, seed=1)
    norms = []
    for temperature in (5.0, 100.0, 1000.0):
        objective = make_objective(
            student, teacher, tiny_bpe_tokenizer, tiny_bpe_tokenizer, kd_weight=1.0, temperature=temperature
        )
        term = objective(ForwardPair(student, teacher), make_batch(STUDENT_CHUNKS, STUDENT_CHUNKS))["alm"]
        norms.append(float(torch.autograd.grad(term.sum, student.hidden_states)[0].norm()))
    assert 0.3 < norms[2] / norms[1] < 3
    assert 0.1 < norms[1] / norms[0] < 10
    assert math.isfinite(norms[0])
