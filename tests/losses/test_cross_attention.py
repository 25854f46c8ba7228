import torch

from vocabridge.losses.cross_attention import Padding, attention_weights, scalar_std


def test_padding_round_trip_with_an_empty_example():
    rows = torch.tensor([0, 0, 2, 2, 2])
    padding = Padding.of(rows, 4)
    packed = torch.arange(10.0).reshape(5, 2)
    padded = padding.pad(packed)
    assert padded.shape == (4, 3, 2)
    assert padding.mask.tolist() == [[True, True, False], [False] * 3, [True] * 3, [False] * 3]
    assert float(padded[1].abs().sum() + padded[3].abs().sum()) == 0
    torch.testing.assert_close(padding.pack(padded), packed)


def test_attention_is_a_softmax_over_existing_keys_only():
    scores = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    weights = attention_weights(scores, mask)
    torch.testing.assert_close(weights[0, :, :2], scores[0, :, :2].softmax(-1))
    assert float(weights[0, :, 2:].abs().max()) == 0
    assert float(weights[1].abs().max()) == 0  # no key at all: no attention, not a uniform one


def test_attention_of_low_precision_scores_is_float32_and_has_finite_gradients():
    scores = torch.randn(1, 2, 3).bfloat16().requires_grad_(True)
    weights = attention_weights(scores, torch.tensor([[True, False, True]]))
    assert weights.dtype == torch.float32
    weights.square().sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert float(scores.grad.abs().max()) > 0


def test_scalar_std_against_torch():
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([0, 0, 1, 1, 1])
    torch.testing.assert_close(scalar_std(values, None, 2), values.std())
    per_example = scalar_std(values, rows, 2)
    torch.testing.assert_close(per_example[0, 0], values[:2].std())
    torch.testing.assert_close(per_example[4, 0], values[2:].std())
    assert per_example.shape == (5, 1)
