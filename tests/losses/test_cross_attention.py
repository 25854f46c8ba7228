import torch

from vocabridge.losses.cross_attention import CrossAttention, Padding, attention_weights, position_distance, scalar_std


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


def test_position_distance_counts_from_one_within_each_example():
    student, teacher = Padding.of(torch.tensor([0, 0, 1]), 2), Padding.of(torch.tensor([0, 0, 0, 0, 1, 1]), 2)
    distance = position_distance(student, teacher, dtype=torch.float64)
    expected = torch.tensor([[0.25, 0.0, 0.25, 0.5], [0.75, 0.5, 0.25, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(distance[0], expected)
    torch.testing.assert_close(distance[1, 0, :2], torch.tensor([0.5, 0.0], dtype=torch.float64))


def test_cross_attention_covers_what_has_an_allowed_partner():
    student, teacher = Padding.of(torch.tensor([0, 0, 1]), 2), Padding.of(torch.tensor([0, 1, 1]), 2)
    scores = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0))
    allowed = torch.tensor([[[False, True], [True, True]], [[False, True], [True, True]]])  # padding is not yet cut
    attention = CrossAttention.of(scores, allowed, student=student, teacher=teacher)
    assert attention.student_covered.tolist() == [False, True, True]
    assert attention.teacher_covered.tolist() == [True, False, True]
    values = torch.tensor([[1.0], [2.0], [5.0]])
    torch.testing.assert_close(attention.to_student(values), torch.tensor([[0.0], [1.0], [5.0]]))
    torch.testing.assert_close(attention.to_teacher(values), torch.tensor([[2.0], [0.0], [5.0]]))
    everywhere = CrossAttention.of(scores, None, student=student, teacher=teacher)
    assert everywhere.allowed.sum(dim=(1, 2)).tolist() == [2, 2]
    assert bool(everywhere.student_covered.all())
