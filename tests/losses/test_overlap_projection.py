import time

import pytest
import torch

from vocabridge.losses.overlap_projection import overlap_projection, pseudo_inverse_rows


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("n", "k"), [(23, 7), (7, 7), (5, 9), (1, 4)])
def test_pseudo_inverse_is_moore_penrose(n, k):
    matrix = rows(n, k)
    inverse = pseudo_inverse_rows(matrix, dtype=torch.float64).T
    torch.testing.assert_close(inverse, torch.linalg.pinv(matrix), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(matrix @ inverse @ matrix, matrix, rtol=1e-7, atol=1e-9)
    assert pseudo_inverse_rows(matrix.float()).dtype == torch.float32


def test_equal_and_unused_head_rows_are_no_obstacle():
    matrix = rows(40, 8)
    matrix[:, 3] = matrix[:, 2]  # two equal features: rank 7
    matrix[10:20] = 0  # tokens that were never trained
    inverse = pseudo_inverse_rows(matrix, dtype=torch.float64).T
    torch.testing.assert_close(inverse, torch.linalg.pinv(matrix, rtol=1e-6), rtol=1e-6, atol=1e-8)
    assert float(pseudo_inverse_rows(torch.zeros(6, 3)).abs().max()) == 0.0


def test_more_rows_than_are_taken_at_once(monkeypatch):
    matrix = rows(50, 6)
    whole = pseudo_inverse_rows(matrix, dtype=torch.float64)
    monkeypatch.setattr("vocabridge.losses.overlap_projection._ROWS_AT_ONCE", 7)
    torch.testing.assert_close(pseudo_inverse_rows(matrix, dtype=torch.float64), whole)


@pytest.mark.parametrize(("k", "m"), [(6, 9), (9, 6)])
def test_projected_state_has_the_nearest_logits(k, m):
    """Against least squares for one hidden state at a time, with biases and unequal logit scales."""
    n, own_scale, source_scale = 31, 0.5, 2.0
    own, source, own_bias, source_bias = rows(n, k), rows(n, m, seed=1), rows(n, seed=2), rows(n, seed=3)
    ratio = source_scale / own_scale
    found = overlap_projection(
        pseudo_inverse_rows(own, dtype=torch.float64), source, offsets=ratio * source_bias - own_bias, scale=ratio
    )
    for hidden in rows(4, m, seed=4):
        target = source_scale * (source @ hidden + source_bias)
        expected = torch.linalg.lstsq(own_scale * own, (target - own_scale * own_bias)[:, None]).solution[:, 0]
        torch.testing.assert_close(found.weight @ hidden + found.bias, expected)


def test_equal_heads_give_the_identity():
    head = rows(30, 8)
    found = overlap_projection(pseudo_inverse_rows(head, dtype=torch.float64), head)
    torch.testing.assert_close(found.weight, torch.eye(8, dtype=torch.float64))
    assert float(found.bias.abs().max()) == 0.0


def test_a_rotated_head_gives_the_rotation():
    """Logits agree where one model's hidden space is a rotation of the other's."""
    head, rotation = rows(30, 8), torch.linalg.qr(rows(8, 8, seed=1)).Q
    found = overlap_projection(pseudo_inverse_rows(head, dtype=torch.float64), head @ rotation)
    torch.testing.assert_close(found.weight, rotation)


def test_no_gradient_flows_into_a_head():
    head = rows(12, 4).requires_grad_(True)
    inverse = pseudo_inverse_rows(head)
    assert not inverse.requires_grad
    assert not overlap_projection(inverse, head).weight.requires_grad


def test_low_precision_heads_lose_no_more_than_their_own_rounding():
    head, source = rows(200, 16), rows(200, 12, seed=1)
    exact = overlap_projection(pseudo_inverse_rows(head, dtype=torch.float64), source).weight
    rough = overlap_projection(pseudo_inverse_rows(head.bfloat16()), source.bfloat16()).weight
    assert rough.dtype == torch.float32
    assert float((rough - exact).abs().max()) < 1e-2 * float(exact.abs().max())


def test_real_sizes_take_seconds():
    head, source = torch.randn(20000, 320), torch.randn(20000, 288)
    start = time.process_time()
    overlap_projection(pseudo_inverse_rows(head), source)
    assert time.process_time() - start < 20
