import pytest
import torch
from torch.nn import functional as F

from vocabridge.losses import chunked_head, paired_rows
from vocabridge.losses.chunked_head import HeadInput
from vocabridge.losses.paired_rows import paired_rows_loss

N, M, H_S, H_T = 9, 7, 4, 5


def leaf(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def distance(logits, rows):
    """Squared distance of the largest probabilities, weighted by a given row."""
    top = [side.softmax(-1).max(-1).values for side in logits]
    return [(top[0] - top[1]).square() * rows[0], logits[0].logsumexp(-1)], [rows[0].detach()]


@pytest.mark.parametrize(("v_s", "v_t"), [(11, 17), (17, 11)])
@pytest.mark.parametrize("pairs", [([8, 0, 3], [1, 1, 6]), ([], [])])
@pytest.mark.parametrize("rows_per_chunk", [1, 100])
def test_value_and_gradients_by_loops(v_s, v_t, pairs, rows_per_chunk):
    hidden, weight, bias = leaf(N, H_S, seed=1), leaf(v_s, H_S, seed=2), leaf(v_s, seed=3)
    teacher_hidden, teacher_weight = leaf(M, H_T, seed=4), leaf(v_t, H_T, seed=5)
    factors = leaf(len(pairs[0]), seed=6)
    labels = torch.arange(N) % v_s
    student, teacher = HeadInput(hidden, weight, bias), HeadInput(teacher_hidden.detach(), teacher_weight)
    result = paired_rows_loss(
        student,
        labels,
        teacher,
        student_index=torch.tensor(pairs[0], dtype=torch.long),
        teacher_index=torch.tensor(pairs[1], dtype=torch.long),
        row_losses=distance,
        weights=[2.0, 0.5],
        kd_weight=0.3,
        rows=[factors],
        chunk_bytes=rows_per_chunk * chunked_head._bytes_per_row([student, teacher]),
    )
    logits = hidden @ weight.T + bias
    cross_entropy = sum(F.cross_entropy(row[None], label[None]) for row, label in zip(logits, labels, strict=True))
    first = second = torch.zeros((), dtype=torch.float64)
    for factor, i, j in zip(factors, *pairs, strict=True):
        mine, theirs = logits[i].softmax(0).max(), (teacher_weight @ teacher_hidden[j]).softmax(0).max().detach()
        first = first + (mine - theirs) ** 2 * factor
        second = second + logits[i].exp().sum().log()
    expected = 0.7 * cross_entropy + 0.3 * (2.0 * first + 0.5 * second)
    torch.testing.assert_close(result.total, expected)
    torch.testing.assert_close(result.reference["cross_entropy"].sum, cross_entropy.detach())
    assert result.reference["cross_entropy"].count == N
    torch.testing.assert_close(result.sums, torch.stack([first, second]).detach())
    assert float(result.reference["student_accuracy"].sum) == float((logits.argmax(-1) == labels).sum())
    leaves = [hidden, weight, bias, *([factors] if pairs[0] else [])]
    for got, want in zip(
        torch.autograd.grad(result.total, leaves, retain_graph=True), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert torch.autograd.grad(result.total, teacher_weight, allow_unused=True) == (None,)


def test_nothing_supervised_is_zero_with_a_gradient_path():
    hidden, weight = leaf(0, H_S, seed=1), leaf(11, H_S, seed=2)
    nothing = torch.zeros(0, dtype=torch.long)
    result = paired_rows_loss(
        HeadInput(hidden, weight),
        nothing,
        HeadInput(torch.zeros(0, H_T, dtype=torch.float64), torch.zeros(5, H_T, dtype=torch.float64)),
        student_index=nothing,
        teacher_index=nothing,
        row_losses=lambda logits, rows: ([logits[0].sum(-1)], []),
        weights=[1.0],
        kd_weight=0.5,
    )
    assert float(result.total.detach()) == 0.0
    result.total.backward()
    assert float(weight.grad.abs().max()) == 0.0


def test_cross_entropy_without_weight_costs_nothing_and_is_not_logged():
    hidden, weight = leaf(N, H_S, seed=1), leaf(11, H_S, seed=2)
    result = paired_rows_loss(
        HeadInput(hidden, weight),
        torch.arange(N),
        HeadInput(leaf(M, H_T, seed=4).detach(), leaf(13, H_T, seed=5).detach()),
        student_index=torch.tensor([2, 5]),
        teacher_index=torch.tensor([0, 1]),
        row_losses=lambda logits, rows: ([logits[0].logsumexp(-1)], []),
        weights=[1.0],
        kd_weight=1.0,
    )
    assert result.reference == {}
    torch.testing.assert_close(result.total, (hidden @ weight.T)[[2, 5]].logsumexp(-1).sum())
    (gradient,) = torch.autograd.grad(result.total, hidden)
    assert gradient.abs().sum(-1).nonzero().squeeze(1).tolist() == [2, 5]


def test_nothing_unpaired_makes_no_second_gradient_of_the_head(monkeypatch):
    """Zeros as large as the head, each step, where all positions pair as with a common tokenizer."""
    passes = []
    one = paired_rows.chunked_head_loss
    monkeypatch.setattr(
        paired_rows, "chunked_head_loss", lambda *args, **options: passes.append(1) or one(*args, **options)
    )
    student = HeadInput(leaf(N, H_S, seed=1), leaf(11, H_S, seed=2))
    teacher = HeadInput(leaf(N, H_T, seed=4).detach(), leaf(17, H_T, seed=5))
    for num_pairs, num_passes in ((N, 1), (N - 1, 2)):
        index = torch.arange(num_pairs)
        passes.clear()
        result = paired_rows_loss(
            student,
            torch.arange(N),
            teacher,
            student_index=index,
            teacher_index=index,
            row_losses=lambda logits, rows: ([logits[0].sum(-1) * 0], []),
            weights=[1.0],
            kd_weight=0.3,
        )
        assert len(passes) == num_passes
        reference = F.cross_entropy(student.hidden @ student.weight.T, torch.arange(N), reduction="sum")
        torch.testing.assert_close(result.total, 0.7 * reference)
