import pytest
import torch

from vocabridge.losses.chunked_head import HeadInput
from vocabridge.losses.cross_attention import Padding
from vocabridge.losses.top_columns import column_log_probs, example_mass, normalizers

ROWS = torch.tensor([0, 0, 0, 2, 2])  # example 1 has no position


def leaf(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def make_head(**settings):
    return HeadInput(leaf(5, 4, seed=1), leaf(13, 4, seed=2), leaf(13, seed=3), **settings)


def rows_by_definition(head, standardize):
    logits = (head.hidden @ head.weight.T + head.bias) * head.logit_scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    if standardize:
        means = logits.mean(1, keepdim=True)
        logits = logits / (((logits - means) ** 2).sum(1, keepdim=True) / 12).sqrt().add(1e-4)
    return logits


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("settings", [{}, {"soft_cap": 2.0, "logit_scale": 0.7}])
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 100])
def test_columns_and_their_log_probabilities_are_those_of_the_whole_rows(
    standardize, settings, rows_per_chunk, monkeypatch
):
    monkeypatch.setattr("vocabridge.losses.chunked_head._bytes_per_row", lambda inputs: 2**30 // rows_per_chunk)
    head = make_head(**settings)
    found = example_mass(head, ROWS, num_examples=3, num_columns=6, standardize=standardize)
    logits = rows_by_definition(head, standardize)
    probabilities = logits.softmax(1).detach()
    for example in (0, 2):
        mass = probabilities[example == ROWS].sum(0)
        expected = sorted(range(13), key=lambda column: -float(mass[column]))[:6]
        assert found.columns[example].tolist() == expected
    own = normalizers(rows_by_definition(head, False), standardize=standardize)
    torch.testing.assert_close(own.detach(), found.normalizers)
    got = column_log_probs(head, own, found.columns, Padding.of(ROWS, 3))
    expected = logits.log_softmax(1).gather(1, found.columns[ROWS])
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(5, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    trained = [head.hidden, head.weight, head.bias]
    for mine, reference in zip(
        torch.autograd.grad((got * upstream).sum(), trained),
        torch.autograd.grad((expected * upstream).sum(), trained),
        strict=True,
    ):
        assert float(reference.abs().max()) > 0
        torch.testing.assert_close(mine, reference)


def test_no_positions_at_all():
    head = HeadInput(torch.zeros(0, 4), torch.randn(7, 4))
    rows = torch.zeros(0, dtype=torch.int64)
    found = example_mass(head, rows, num_examples=2, num_columns=3, standardize=True)
    assert found.normalizers.shape == (0, 2)
    assert column_log_probs(head, found.normalizers, found.columns, Padding.of(rows, 2)).shape == (0, 3)
