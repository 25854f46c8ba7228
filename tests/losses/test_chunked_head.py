from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from head_cases import CHUNKS, H_S, H_T, Case, N, NewTensors, chunk_bytes, leaf
from vocabridge.losses.chunked_head import HeadInput, chunked_head_loss, head_logits, token_log_probs
from vocabridge.losses.divergences import forward_kl
from vocabridge.losses.head_pass import Gradients

GOLDEN = Path(__file__).parents[1] / "golden"
MODES = ("one_pass", "checkpoint")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows_per_chunk", CHUNKS)
@pytest.mark.parametrize(("v_s", "v_t"), [(13, 17), (17, 13)])
@pytest.mark.usefixtures("rows_per_block")
def test_equals_whole_logits(mode, rows_per_chunk, v_s, v_t):
    case = Case(v_s, v_t)
    sums, metrics = case.naive()
    expected = torch.autograd.grad(3.0 * (0.5 * sums[0] + 2.0 * sums[1]), case.leaves)
    out = chunked_head_loss(
        case.row_losses,
        case.inputs,
        case.rows,
        weights=[0.5, 2.0],
        mode=mode,
        chunk_bytes=chunk_bytes(case.inputs, rows_per_chunk, mode),
    )
    torch.testing.assert_close(out.sums, sums.detach())
    torch.testing.assert_close(out.metrics, metrics)
    torch.testing.assert_close(out.total, 0.5 * sums[0] + 2.0 * sums[1])
    gradients = torch.autograd.grad(3.0 * out.total, case.leaves)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert reference.abs().max() > 1e-2
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("rows_per_chunk", CHUNKS)
def test_no_block_is_larger_than_allowed_and_no_row_is_lost(rows_per_chunk, rows_per_block):
    case, seen = Case(), []

    def row_losses(logits, rows):
        seen.append(len(logits[0]))
        return [logits[0].sum(-1)], []

    budget = chunk_bytes(case.inputs, rows_per_chunk)
    chunked_head_loss(row_losses, case.inputs, case.rows, weights=[1.0], chunk_bytes=budget)
    assert sum(seen) == N
    assert max(seen) <= min(rows_per_chunk, rows_per_block)
    if rows_per_block >= N:
        assert len(seen) == -(-N // rows_per_chunk)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    case = Case(num_rows=4)

    def total(hidden, weight, bias):
        inputs = [HeadInput(hidden, weight, bias, soft_cap=4.0, logit_scale=0.7), case.inputs[1]]
        budget = chunk_bytes(inputs, 3, mode)
        return chunked_head_loss(
            case.row_losses, inputs, case.rows, weights=[1.0, 1.0], mode=mode, chunk_bytes=budget
        ).total

    assert torch.autograd.gradcheck(total, case.leaves)


@pytest.mark.parametrize("mode", MODES)
def test_zero_rows_are_exactly_zero_with_a_gradient_path(mode):
    case = Case(num_rows=0)
    out = chunked_head_loss(case.row_losses, case.inputs, case.rows, weights=[1.0, 1.0], mode=mode)
    out.total.backward()
    assert out.total.item() == 0
    assert out.sums.tolist() == [0, 0]
    assert out.metrics.tolist() == [0, 0]
    assert case.weight.grad.shape == case.weight.shape
    assert case.weight.grad.count_nonzero() == 0
    assert case.hidden.grad.shape == (0, H_S)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_head_gets_no_gradient_and_no_buffer(mode):
    case = Case(50, 40)
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    trained_shapes, frozen_shapes = NewTensors(), NewTensors()
    budget = chunk_bytes(case.inputs, 4, mode)
    with frozen_shapes:
        out = chunked_head_loss(
            case.row_losses, case.inputs, case.rows, weights=[1.0, 1.0], mode=mode, chunk_bytes=budget
        )
        out.total.backward()
    assert case.hidden.grad.count_nonzero() > 0
    assert case.weight.grad is None
    assert (50, H_S) not in frozen_shapes.shapes
    case = Case(50, 40)
    with trained_shapes:
        chunked_head_loss(
            case.row_losses, case.inputs, case.rows, weights=[1.0, 1.0], mode=mode, chunk_bytes=budget
        ).total.backward()
    assert (50, H_S) in trained_shapes.shapes  # the probe can see such a buffer


@pytest.mark.parametrize("mode", MODES)
def test_train_head_false_detaches_the_head_only(mode):
    case = Case(train_head=False)
    sums, _ = case.naive()
    (expected,) = torch.autograd.grad(sums.sum(), case.hidden)
    chunked_head_loss(case.row_losses, case.inputs, case.rows, weights=[1.0, 1.0], mode=mode).total.backward()
    torch.testing.assert_close(case.hidden.grad, expected)
    assert case.weight.grad is None
    assert case.bias.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_head_alone_is_trained_on_frozen_hidden_states(mode):
    case = Case()
    case.hidden.requires_grad_(False)
    sums, _ = case.naive()
    expected = torch.autograd.grad(sums.sum(), [case.weight, case.bias])
    chunked_head_loss(case.row_losses, case.inputs, case.rows, weights=[1.0, 1.0], mode=mode).total.backward()
    torch.testing.assert_close(case.weight.grad, expected[0])
    torch.testing.assert_close(case.bias.grad, expected[1])


@pytest.mark.parametrize("mode", MODES)
def test_no_grad_gives_the_same_numbers_without_a_graph(mode):
    case = Case()
    sums, metrics = case.naive()
    with torch.no_grad():
        out = chunked_head_loss(case.row_losses, case.inputs, case.rows, weights=[1.0, 1.0], mode=mode)
    assert not out.total.requires_grad
    torch.testing.assert_close(out.sums, sums.detach())
    torch.testing.assert_close(out.metrics, metrics)


def shared_head_losses(logits, rows):
    own, projected, detached, teacher = logits
    return [
        forward_kl(own, projected.detach()),
        F.cross_entropy(projected, rows[0], reduction="none"),
        F.cross_entropy(detached, rows[0], reduction="none"),
        teacher.square().sum(-1) * own.mean(-1),
    ], []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("rows_per_block")
def test_one_head_shared_by_several_inputs(mode):
    own, weight = leaf(N, H_S, seed=1), leaf(13, H_S, seed=2)
    projected = leaf(N, H_S, seed=7)
    teacher_hidden, teacher_weight = leaf(N, H_T, seed=4).detach(), leaf(17, H_T, seed=5).detach()
    labels = torch.arange(N) % 13
    # The same hidden states twice, once with a trained and once with a detached head; everything hangs on `weight`.
    inputs = [
        HeadInput(own, weight),
        HeadInput(projected, weight),
        HeadInput(projected, weight, train_head=False),
        HeadInput(teacher_hidden, teacher_weight),
    ]
    whole = (
        own @ weight.T,
        projected @ weight.T,
        projected @ weight.detach().T,
        teacher_hidden @ teacher_weight.T,
    )
    expected_total = sum(loss.sum() for loss in shared_head_losses(whole, [labels])[0])
    expected = torch.autograd.grad(expected_total, [own, projected, weight])
    out = chunked_head_loss(
        shared_head_losses, inputs, [labels], weights=[1.0] * 4, mode=mode, chunk_bytes=chunk_bytes(inputs, 5, mode)
    )
    torch.testing.assert_close(out.total, expected_total)
    gradients = torch.autograd.grad(out.total, [own, projected, weight])
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_a_shared_head_has_one_gradient_buffer():
    weight = leaf(13, H_S, seed=2)
    inputs = [HeadInput(leaf(N, H_S, seed=1), weight), HeadInput(leaf(N, H_S, seed=7), weight)]
    gradients = Gradients(inputs, [])
    assert [tuple(tensor.shape) for tensor in gradients.tensors] == [(N, H_S), (N, H_S), (13, H_S)]


def test_tied_embedding_adds_both_gradients():
    embedding = leaf(13, H_S, seed=2)
    ids = torch.arange(N) % 13
    labels = (ids + 1) % 13

    def losses(logits, rows):
        return [F.cross_entropy(logits[0], rows[0], reduction="none")], []

    hidden = torch.tanh(embedding[ids])
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ embedding.T, labels, reduction="sum"), embedding)
    hidden = torch.tanh(embedding[ids])
    out = chunked_head_loss(losses, [HeadInput(hidden, embedding)], [labels], weights=[1.0], chunk_bytes=1)
    out.total.backward()
    torch.testing.assert_close(embedding.grad, expected)


@pytest.mark.parametrize("mode", MODES)
def test_second_backward_through_a_retained_graph(mode):
    case = Case()
    out = chunked_head_loss(case.row_losses, case.inputs, case.rows, weights=[1.0, 1.0], mode=mode)
    (3.0 * out.total).backward(retain_graph=True)
    first = [tensor.grad.clone() for tensor in case.leaves]
    out.total.backward()
    for tensor, gradient in zip(case.leaves, first, strict=True):
        torch.testing.assert_close(tensor.grad, gradient * 4 / 3)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_multiplies_in_its_dtype_and_loses_in_float32(mode):
    case, seen = Case(dtype=torch.float32), []
    inside = Case.row_losses

    def row_losses(logits, rows):
        seen.append((logits[0].dtype, (rows[1] @ rows[1]).dtype))
        return inside(logits, rows)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = chunked_head_loss(row_losses, case.inputs, case.rows, weights=[1.0, 1.0], mode=mode)
    out.total.backward()
    assert set(seen) == {(torch.float32, torch.float32)}
    plain = Case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = F.linear(plain.hidden, plain.weight, plain.bias)
        teacher = F.linear(plain.teacher_hidden, plain.teacher_weight).float()
    assert product.dtype == torch.bfloat16
    losses, _ = inside((4.0 * torch.tanh(0.7 * product.float() / 4.0), teacher), plain.rows)
    sums = torch.stack([loss.sum() for loss in losses])
    sums.sum().backward()
    torch.testing.assert_close(out.sums, sums.detach())
    exact = Case()
    exact.naive()[0].sum().backward()
    for tensor, naive, reference in zip(case.leaves, plain.leaves, exact.leaves, strict=True):
        assert tensor.grad.dtype == torch.float32
        error = (tensor.grad.double() - reference.grad).norm()
        assert 0 < error <= 1.3 * (naive.grad.double() - reference.grad).norm()


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_is_as_good_as_whole_logits(mode):
    """Relative gradient error against float64 at most 1.3 times that of whole bf16 logits."""
    num_rows, vocab, width = 160, 300, 64
    exact = leaf(num_rows, width, seed=1), leaf(vocab, width, seed=2, scale=0.2)
    with torch.no_grad():  # the same numbers in both precisions
        for tensor in exact:
            tensor.copy_(tensor.bfloat16())
    teacher = leaf(num_rows, vocab, seed=3).detach()
    truth = torch.autograd.grad(forward_kl(F.linear(*exact), teacher).sum(), exact)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    naive = torch.autograd.grad(forward_kl(F.linear(*low).float(), teacher.float()).sum(), low)
    inputs = [HeadInput(*low)]
    out = chunked_head_loss(
        lambda logits, rows: ([forward_kl(logits[0], rows[0])], []),
        inputs,
        [teacher.float()],
        weights=[1.0],
        mode=mode,
        chunk_bytes=chunk_bytes(inputs, 32, mode),
    )
    assert out.total.dtype == torch.float32
    gradients = torch.autograd.grad(out.total, low)
    allowed = 1.3 if mode == "one_pass" else 1.5  # checkpointing adds chunks of the head's gradient in bf16
    for gradient, plain, reference in zip(gradients, naive, truth, strict=True):
        assert gradient.dtype == torch.bfloat16
        error = (gradient.double() - reference).norm() / reference.norm()
        naive_error = (plain.double() - reference).norm() / reference.norm()
        assert 0 < error <= allowed * naive_error


@pytest.mark.parametrize("mode", MODES)
def test_head_in_another_dtype_than_the_hidden_states(mode):
    hidden, weight = leaf(N, H_T, seed=1, dtype=torch.float32), leaf(17, H_T, seed=2, dtype=torch.bfloat16).detach()
    labels = torch.arange(N) % 17
    out = chunked_head_loss(
        lambda logits, rows: ([F.cross_entropy(logits[0], rows[0], reduction="none")], []),
        [HeadInput(hidden, weight)],
        [labels],
        weights=[1.0],
        mode=mode,
    )
    (gradient,) = torch.autograd.grad(out.total, hidden)
    reference = hidden.detach().clone().requires_grad_()
    F.cross_entropy(reference @ weight.float().T, labels, reduction="sum").backward()
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, reference.grad, rtol=0, atol=0.02 * reference.grad.abs().max().item())


@pytest.mark.parametrize("mode", MODES)
def test_largest_tensor_is_a_chunk(mode):
    num_rows, vocab = 64, 500
    hidden, weight = leaf(num_rows, 4, seed=1, dtype=torch.float32), leaf(vocab, 4, seed=2, dtype=torch.float32)
    teacher = leaf(num_rows, 4, seed=3, dtype=torch.float32).detach()
    inputs = [HeadInput(hidden, weight), HeadInput(teacher, weight.detach())]
    probe = NewTensors()
    with probe:
        chunked_head_loss(
            lambda logits, rows: ([forward_kl(*logits)], []),
            inputs,
            [],
            weights=[1.0],
            mode=mode,
            chunk_bytes=chunk_bytes(inputs, 16, mode),
        ).total.backward()
    assert hidden.grad.count_nonzero() > 0
    assert max(probe.sizes) == 16 * vocab
    naive = NewTensors()
    with naive:
        forward_kl(F.linear(hidden, weight), F.linear(teacher, weight.detach())).sum().backward()
    assert max(naive.sizes) == num_rows * vocab


class TestTrainedParametersInsideTheRowLoss:
    def setup_method(self):
        self.case = Case()
        self.projector = leaf(13, 13, seed=9)

    def row_losses(self, logits, rows):
        return [F.cross_entropy(logits[0] @ self.projector, rows[0], reduction="none")], []

    def call(self, mode):
        return chunked_head_loss(
            self.row_losses, self.case.inputs, self.case.rows, weights=[1.0], mode=mode, chunk_bytes=1
        )

    def test_refused_in_one_pass(self):
        with pytest.raises(RuntimeError, match=r"\(13, 13\).*checkpoint"):
            self.call("one_pass")

    def test_refused_in_one_pass_when_nothing_else_is_trained(self):
        for tensor in self.case.leaves:
            tensor.requires_grad_(False)
        with pytest.raises(RuntimeError, match="checkpoint"):
            self.call("one_pass")

    def test_refused_in_one_pass_behind_a_graph(self):
        outer = torch.tanh(self.projector)
        self.projector = outer
        with pytest.raises(RuntimeError, match="checkpoint"):
            self.call("one_pass")

    def test_fine_in_one_pass_without_gradients(self):
        with torch.no_grad():
            assert self.call("one_pass").total.item() > 0

    def test_right_under_checkpoint(self):
        case = self.case
        student = 4.0 * torch.tanh(0.7 * (case.hidden @ case.weight.T + case.bias) / 4.0)
        loss = F.cross_entropy(student @ self.projector, case.labels, reduction="sum")
        leaves = [*case.leaves, self.projector]
        expected = torch.autograd.grad(loss, leaves)
        gradients = torch.autograd.grad(self.call("checkpoint").total, leaves)
        for gradient, reference in zip(gradients, expected, strict=True):
            assert reference.abs().max() > 1e-2
            torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("mode", MODES)
def test_rows_get_their_gradient(mode):
    case = Case()
    case.row_weights.requires_grad_()
    sums, _ = case.naive()
    leaves = [*case.leaves, case.row_weights]
    expected = torch.autograd.grad(sums[0] + 2.0 * sums[1], leaves)
    out = chunked_head_loss(case.row_losses, case.inputs, case.rows, weights=[1.0, 2.0], mode=mode, chunk_bytes=1)
    for gradient, reference in zip(torch.autograd.grad(out.total, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_a_loss_that_is_not_per_row_is_refused():
    case = Case()
    with pytest.raises(AssertionError, match=r"\[n\]"):
        chunked_head_loss(lambda logits, rows: ([logits[0].mean()], []), case.inputs, case.rows, weights=[1.0])


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_tensor_shared_between_inputs_is_not_overwritten(mode):
    """Autograd hands one and the same expanded tensor to both sides of a sum; cap and scale must not write into it."""
    hidden, other, weight = leaf(N, H_S, seed=1), leaf(N, H_S, seed=7), leaf(13, H_S, seed=2)
    inputs = [HeadInput(hidden, weight, soft_cap=2.0), HeadInput(other, weight, logit_scale=0.5)]
    out = chunked_head_loss(
        lambda logits, rows: ([(logits[0] + logits[1]).sum(-1)], []), inputs, [], weights=[1.0], mode=mode
    )
    gradients = torch.autograd.grad(out.total, [hidden, other, weight])
    reference = (2.0 * torch.tanh(hidden @ weight.T / 2.0) + 0.5 * (other @ weight.T)).sum()
    for gradient, expected in zip(gradients, torch.autograd.grad(reference, [hidden, other, weight]), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_head_logits_scales_then_caps():
    hidden, weight = torch.tensor([[2.0]], dtype=torch.bfloat16), torch.tensor([[1.0], [-8.0]], dtype=torch.bfloat16)
    logits = head_logits(hidden, weight, torch.tensor([1.0, 0.0]), soft_cap=5.0, logit_scale=0.5)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, 5.0 * torch.tanh(torch.tensor([[1.5, -8.0]]) / 5.0))


def test_cross_entropy_of_the_published_code():
    tensors = load_file(GOLDEN / "case_cross_entropy.safetensors")
    supervised = tensors["in.labels"].flatten() != -100
    logits = tensors["in.logits"].flatten(0, 1)[supervised].requires_grad_()
    labels = tensors["in.labels"].flatten()[supervised]
    head = HeadInput(logits, torch.eye(logits.shape[1]))
    out = chunked_head_loss(
        lambda logits, rows: (
            [F.cross_entropy(logits[0], rows[0], reduction="none")],
            [logits[0].argmax(-1) == rows[0]],
        ),
        [head],
        [labels],
        weights=[1.0],
        chunk_bytes=chunk_bytes([head], 5),
    )
    assert out.total.item() == pytest.approx(147.39317321777344, rel=2e-5)
    assert out.metrics.tolist() == [1.0]
    assert -token_log_probs(head, labels).sum().item() == pytest.approx(147.39317321777344, rel=2e-5)
    (gradient,) = torch.autograd.grad(out.total, logits)
    torch.testing.assert_close(gradient, tensors["grad.logits"].flatten(0, 1)[supervised], rtol=2e-4, atol=5e-6)
