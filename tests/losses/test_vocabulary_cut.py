"""Kept tokens against whole rows in float64, and what a divergence over them ignores."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from random_sides import divergence_by_formula
from vocabridge.losses.chunked_head import HeadInput
from vocabridge.losses.divergences import divergence
from vocabridge.losses.vocabulary_cut import logits_at, top_tokens

N, V, H = 5, 13, 4
HEADS = [{}, {"bias": True}, {"bias": True, "soft_cap": 2.0, "logit_scale": 0.7}]
DIVERGENCES = [
    "forward",
    "reverse",
    "jensen_shannon",
    "generalised_jsd",
    "skewed_forward",
    "skewed_reverse",
    "adaptive",
    "total_variation",
]


def values(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_head(seed=0, *, bias=False, **settings):
    """Always the same weight and bias; the hidden states differ by seed."""
    return HeadInput(
        values(N, H, seed=seed).requires_grad_(),
        values(V, H, seed=100).requires_grad_(),
        values(V, seed=101).requires_grad_() if bias else None,
        **settings,
    )


def whole_rows(head):
    logits = head.hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


@pytest.mark.parametrize("settings", HEADS)
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 100])
def test_kept_tokens_are_the_likeliest_of_every_row(settings, rows_per_chunk, monkeypatch):
    monkeypatch.setattr("vocabridge.losses.chunked_head._bytes_per_row", lambda inputs: 2**30 // rows_per_chunk)
    head = make_head(**settings)
    kept = top_tokens(head, 4, temperature=1.5)
    assert not kept.logits.requires_grad
    assert not kept.mass.requires_grad
    for row, logits in enumerate(whole_rows(head).tolist()):
        order = sorted(range(V), key=lambda token: -logits[token])
        assert kept.ids[row].tolist() == order[:4]
        assert kept.logits[row].tolist() == pytest.approx([logits[token] for token in order[:4]])
        weights = [math.exp(logit / 1.5) for logit in logits]
        assert float(kept.mass[row]) == pytest.approx(sum(weights[token] for token in order[:4]) / sum(weights))
    places = kept.places(torch.tensor([int(kept.ids[0, 3]), int(kept.ids[1, 0]), 99, 99, int(kept.ids[4, 1])]))
    assert places.tolist() == [3, 0, -1, -1, 1]


@pytest.mark.parametrize("settings", HEADS)
def test_logits_at_some_tokens_are_those_of_the_whole_row_and_teach_the_hidden_states_alone(settings):
    head = make_head(**settings)
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(row))[:6] for row in range(N)])
    got, expected = logits_at(head, ids), whole_rows(head).gather(1, ids)
    torch.testing.assert_close(got, expected)
    upstream = values(N, 6, seed=7)
    ours, reference = (torch.autograd.grad((each * upstream).sum(), head.hidden)[0] for each in (got, expected))
    torch.testing.assert_close(ours, reference)
    others = [tensor for tensor in (head.weight, head.bias) if tensor is not None]
    again = logits_at(head, ids)
    assert torch.autograd.grad(again.sum(), others, allow_unused=True) == (None,) * len(others)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_over_kept_tokens_is_that_of_both_conditional_distributions(name):
    teacher, student = make_head(1), make_head(2)
    kept = top_tokens(teacher, 5, temperature=1.5)
    loss = divergence(name, temperature=1.5, jsd_beta=0.3)(logits_at(student, kept.ids), kept.logits)
    q, p = ((whole_rows(head) / 1.5).softmax(-1) for head in (teacher, student))
    rows = []
    for row in range(N):
        inside = q[row].argsort(descending=True)[:5]
        conditional = (side[row, inside] / side[row, inside].sum() for side in (q.detach(), p))
        rows.append(divergence_by_formula(name, *conditional, beta=0.3, skew=0.1))
    expected = torch.stack(rows)
    torch.testing.assert_close(loss, expected)
    upstream = values(N, seed=9)
    ours, reference = (torch.autograd.grad((each * upstream).sum(), student.hidden)[0] for each in (loss, expected))
    assert float(reference.abs().max()) > 0
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_one_kept_token_leaves_nothing_to_compare(name):
    teacher, student = make_head(1), make_head(2)
    kept = top_tokens(teacher, 1, temperature=2.0)
    loss = divergence(name, temperature=2.0)(logits_at(student, kept.ids), kept.logits)
    assert loss.tolist() == [0.0] * N
    (gradient,) = torch.autograd.grad(loss.sum(), student.hidden)
    assert not gradient.any()


@pytest.mark.parametrize("num_tokens", [2, 5, 12])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_ignored_is_the_mass_outside_and_how_it_is_spread(num_tokens, temperature):
    """KL over all tokens = KL of (inside, outside) + Q * KL over kept tokens + (1 - Q) * KL over the rest."""
    teacher, student = make_head(1), make_head(2)
    kept = top_tokens(teacher, num_tokens, temperature=temperature)
    over_kept = divergence("forward", temperature=temperature)(logits_at(student, kept.ids), kept.logits).detach()
    for row in range(N):
        q, p = ((whole_rows(head)[row] / temperature).softmax(-1).tolist() for head in (teacher, student))
        rest = [token for token in range(V) if token not in kept.ids[row].tolist()]
        outside_q, outside_p = sum(q[token] for token in rest), sum(p[token] for token in rest)
        inside = (1 - outside_q) * math.log((1 - outside_q) / (1 - outside_p))
        of_masses = inside + outside_q * math.log(outside_q / outside_p)
        of_rest = sum(q[t] / outside_q * math.log(q[t] / outside_q / (p[t] / outside_p)) for t in rest)
        whole = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
        mass = float(kept.mass[row])
        assert mass == pytest.approx(1 - outside_q)
        assert whole == pytest.approx(of_masses + mass * float(over_kept[row]) + (1 - mass) * of_rest)


@pytest.mark.parametrize("num_tokens", [2, 5, 12])
def test_gradient_differs_by_at_most_twice_both_outside_masses(num_tokens):
    tightest = 0.0
    for seed in range(20):
        teacher, student = make_head(2 * seed), make_head(2 * seed + 1)
        kept = top_tokens(teacher, num_tokens, temperature=1.0)
        logits = whole_rows(student).detach().requires_grad_()
        whole = divergence("forward")(logits, whole_rows(teacher).detach())
        cut = divergence("forward")(logits.gather(1, kept.ids), kept.logits)
        differences = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (whole, cut)]
        distance = (differences[0] - differences[1]).abs().sum(-1)
        outside = 1 - logits.detach().softmax(-1).gather(1, kept.ids).sum(-1)
        bound = 2 * (1 - kept.mass) + 2 * outside
        assert bool((distance <= bound + 1e-12).all())
        tightest = max(tightest, float((distance / bound).max()))
    assert tightest > 0.5  # the bound says something


def test_bfloat16_rows_accumulate_in_float32():
    wide = HeadInput(values(N, 512, seed=1), values(V, 512, seed=2))
    head = HeadInput(wide.hidden.bfloat16().requires_grad_(), wide.weight.bfloat16())
    exact = HeadInput(head.hidden.detach().double().requires_grad_(), head.weight.double())
    ids = torch.arange(V).expand(N, V)
    got, expected = logits_at(head, ids), logits_at(exact, ids)
    assert got.dtype == torch.float32
    # One rounding to bfloat16 (8 bits) at the end; 512 of them on the way would be off by ten times as much.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-9)
    gradient, reference = (
        torch.autograd.grad(each[:, :9].sum(), side.hidden)[0] for each, side in ((got, head), (expected, exact))
    )
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), reference, rtol=2**-8, atol=1e-9)


def test_autocast_does_not_round_a_float32_head():
    double = make_head(bias=True)
    head = HeadInput(double.hidden.detach().float().requires_grad_(), double.weight.detach().float())
    ids = torch.arange(6).expand(N, 6)
    plain = logits_at(head, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = logits_at(head, ids)
    assert torch.equal(plain, cast)


def test_no_rows():
    head = HeadInput(torch.zeros(0, H, requires_grad=True), torch.randn(V, H))
    kept = top_tokens(head, 3, temperature=1.0)
    assert (kept.ids.shape, kept.logits.shape, kept.mass.shape) == ((0, 3), (0, 3), (0,))
    logits = logits_at(head, kept.ids)
    (gradient,) = torch.autograd.grad(logits.sum(), head.hidden)
    assert gradient.shape == (0, H)


def test_rows_of_the_head_are_never_gathered():
    head = HeadInput(torch.randn(6, 32, requires_grad=True), torch.randn(50, 32))
    ids = torch.randint(50, (6, 20))
    with LargestTensor() as seen:
        logits_at(head, ids).sum().backward()
    assert 0 < seen.numel <= 6 * 32


class LargestTensor(TorchDispatchMode):
    """Records the largest floating point tensor that any operation returns and that is no view of the head."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and "detach" not in str(func):
                self.numel = max(self.numel, value.numel())
        return result
