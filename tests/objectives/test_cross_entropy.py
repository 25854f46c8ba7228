"""Supervised fine-tuning against the published sums and plain loops."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vocabridge.models.forward import SideForward
from vocabridge.models.heads import OutputHead
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup
from vocabridge.objectives.cross_entropy import Config, CrossEntropy

GOLDEN = Path(__file__).parents[1] / "golden" / "case_cross_entropy"


def build():
    nothing = nn.Embedding(2, 2)
    return CrossEntropy(Config(), ObjectiveSetup(2, nothing, None, None))


def side(hidden, weight, labels):
    zeros = torch.zeros_like(labels)
    return SideForward(hidden, zeros, labels, zeros, OutputHead(weight, None, None, 1.0), nn.Embedding(2, 2))


def test_sum_is_the_published_one():
    """The stored logits are read by an identity head, so hidden states and logits are the same numbers."""
    tensors = load_file(GOLDEN.with_suffix(".safetensors"))
    scalars = json.loads(GOLDEN.with_suffix(".json").read_text())["scalars"]
    supervised = tensors["in.labels"] != -100
    logits = tensors["in.logits"][supervised].requires_grad_()
    own = side(logits, torch.eye(logits.shape[-1]), tensors["in.labels"][supervised])
    term = build()(ForwardPair(own, None), {})["cross_entropy"]
    assert term.count == int(supervised.sum())
    assert float(term.sum.detach()) == pytest.approx(scalars["ce_sum"], rel=2e-5)


def test_value_and_gradients_by_loops():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(7, 3, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 6, 3, 3, 1])
    term = build()(ForwardPair(side(hidden, weight, labels), None), {})["cross_entropy"]
    expected = right = 0
    for state, label in zip(hidden, labels, strict=True):
        logits = [(state * row).sum() for row in weight]
        expected = expected + torch.stack([logit.exp() for logit in logits]).sum().log() - logits[label]
        right += int(max(range(7), key=lambda v, logits=logits: float(logits[v].detach())) == int(label))
    torch.testing.assert_close(term.sum, expected)
    assert float(term.metrics["student_accuracy"].sum) == right
    for ours, reference in zip(
        torch.autograd.grad(term.sum, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(ours, reference)


def test_infinite_logits_are_not_hidden():
    hidden = torch.tensor([[torch.inf, 1.0]])
    term = build()(ForwardPair(side(hidden, torch.eye(2), torch.tensor([1])), None), {})["cross_entropy"]
    assert not torch.isfinite(term.sum)
