import pytest
import torch
from torch.nn import functional as F

from head_cases import CHUNKS, H_S, H_T, Case, N, NewTensors, chunk_bytes, leaf
from vocabridge.losses.chunked_head import HeadInput, head_logits, head_rows, token_log_probs


@pytest.mark.parametrize("rows_per_chunk", CHUNKS)
@pytest.mark.usefixtures("rows_per_block")
def test_head_rows(rows_per_chunk):
    """Per-row numbers joined over rows afterwards, which a sum of row losses cannot express."""
    case = Case()
    case.row_weights.requires_grad_()
    budget = chunk_bytes(case.inputs, rows_per_chunk)

    def numbers(logits, rows):
        picked = logits[0].log_softmax(-1).gather(-1, rows[0][:, None]).squeeze(-1)
        return torch.stack([picked * rows[1], logits[1].logsumexp(-1)], dim=-1)

    result = head_rows(numbers, case.inputs, case.rows, chunk_bytes=budget)
    sums, _ = case.naive()
    torch.testing.assert_close(result[:, 0].sum(), -sums[0])
    whole = numbers(
        [head_logits(i.hidden, i.weight, i.bias, soft_cap=i.soft_cap, logit_scale=i.logit_scale) for i in case.inputs],
        case.rows,
    )
    leaves = [*case.leaves, case.row_weights]
    expected = torch.autograd.grad(whole[:, 0].cumsum(0).square().sum(), leaves)
    for got, want in zip(torch.autograd.grad(result[:, 0].cumsum(0).square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad(), NewTensors() as probe:
        assert not head_rows(numbers, case.inputs, case.rows, chunk_bytes=budget).requires_grad
    assert max(probe.sizes) <= max(17 * min(rows_per_chunk, N), 17 * H_T, N * H_T)


def test_head_rows_of_a_bfloat16_head_sums_its_gradient_in_float32():
    """Many chunks, each far smaller than the sum: added in bfloat16 they would be lost."""
    hidden, weight = leaf(512, H_S, seed=1, dtype=torch.bfloat16), leaf(13, H_S, seed=2, dtype=torch.bfloat16)
    head = HeadInput(hidden, weight)
    sums = head_rows(lambda logits, _: logits[0].logsumexp(-1), [head], chunk_bytes=chunk_bytes([head], 1))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.autograd.grad(F.linear(*exact).logsumexp(-1).sum(), exact)
    for found, reference in zip(torch.autograd.grad(sums.sum(), [hidden, weight]), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert float((found.double() - reference).norm() / reference.norm()) < 0.01


def test_head_rows_refuses_trained_tensors_that_it_would_leave_out():
    case, scale = Case(), torch.ones(13, dtype=torch.float64, requires_grad=True)
    result = head_rows(lambda logits, _: (logits[0] * scale).sum(-1), case.inputs[:1])
    with pytest.raises(RuntimeError, match=r"\(13,\)"):
        result.sum().backward()


@pytest.mark.parametrize("rows_per_chunk", CHUNKS)
def test_token_log_probs(rows_per_chunk):
    case = Case()
    student = 4.0 * torch.tanh(0.7 * (case.hidden @ case.weight.T + case.bias) / 4.0).detach()
    expected = torch.stack(
        [(row.exp() / row.exp().sum())[y].log() for row, y in zip(student, case.labels, strict=True)]
    )
    head = case.inputs[0]
    probe = NewTensors()
    with probe:
        log_probs = token_log_probs(head, case.labels, chunk_bytes=chunk_bytes([head], rows_per_chunk))
    torch.testing.assert_close(log_probs, expected)
    assert not log_probs.requires_grad
    assert max(probe.sizes) <= max(13 * min(rows_per_chunk, N), N * H_S)


def test_token_log_probs_of_nothing():
    case = Case(num_rows=0)
    assert token_log_probs(case.inputs[0], case.labels).shape == (0,)
