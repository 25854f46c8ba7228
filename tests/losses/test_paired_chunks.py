"""Losses of whole chunks in blocks against all logits at once."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from vocabridge.losses import chunked_head
from vocabridge.losses.chunk_rows import chunk_rows, segment_mean
from vocabridge.losses.chunked_head import HeadInput
from vocabridge.losses.paired_chunks import paired_chunks_loss

STUDENT_CHUNKS = [[0, 0, 1, -1, 2, 3], [0, 1, 1, 1, -1, 2]]
TEACHER_CHUNKS = [[0, 1, 1, 2, 2, 3], [-1, -1, 0, 0, 1, 2]]
ROW_BYTES = 3 * 8 * (11 + 17)


def leaf(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


class Case:
    def __init__(self, student_chunks=STUDENT_CHUNKS, teacher_chunks=TEACHER_CHUNKS):
        self.student = HeadInput(leaf(12, 4, seed=0), leaf(11, 4, seed=1), leaf(11, seed=2))
        self.teacher = HeadInput(leaf(12, 5, seed=3), leaf(17, 5, seed=4))
        self.labels = torch.randint(11, (12,), generator=torch.Generator().manual_seed(5))
        rows = torch.tensor([0] * 6 + [1] * 6)
        self.chunks = chunk_rows(rows, torch.tensor(student_chunks), rows, torch.tensor(teacher_chunks))
        self.blocks = []

    def chunk_losses(self, block):
        self.blocks.append(block)
        own = segment_mean(block.student.softmax(-1), block.student_chunks, block.num_chunks)[:, :3]
        theirs = segment_mean(block.teacher.softmax(-1), block.teacher_chunks, block.num_chunks)[:, :3]
        return [(own - theirs).square().sum(-1), own.max(-1).values], [theirs.sum(-1)]

    def loss(self, **options):
        return paired_chunks_loss(
            self.student,
            self.labels,
            self.teacher,
            chunks=self.chunks,
            chunk_losses=self.chunk_losses,
            weights=[1.0, 0.5],
            kd_weight=0.4,
            **options,
        )

    @property
    def leaves(self):
        return [self.student.hidden, self.student.weight, self.student.bias]


@pytest.mark.parametrize("chunk_bytes", [1, 3 * ROW_BYTES, 5 * ROW_BYTES, 10**9])
def test_sums_and_gradients_do_not_depend_on_the_blocks(chunk_bytes):
    case = Case()
    result = case.loss(chunk_bytes=chunk_bytes)
    gradients = torch.autograd.grad(3 * result.total, case.leaves)
    logits = case.student.hidden @ case.student.weight.T + case.student.bias
    teacher_logits = (case.teacher.hidden @ case.teacher.weight.T).detach()
    reference = cross_entropy(logits, case.labels, reduction="sum")
    sums = [0.0, 0.0, 0.0]
    for student_rows, teacher_rows in [
        ([0, 1], [0]),
        ([2], [1, 2]),
        ([4], [3, 4]),
        ([5], [5]),
        ([6], [8, 9]),
        ([7, 8, 9], [10]),
        ([11], [11]),
    ]:
        own, theirs = logits[student_rows].softmax(-1).mean(0), teacher_logits[teacher_rows].softmax(-1).mean(0)
        terms = ((own - theirs[:11])[:3].square().sum(), own[:3].max(), theirs[:3].sum())
        sums = [total + term for total, term in zip(sums, terms, strict=True)]
    total = 0.6 * reference + 0.4 * (sums[0] + 0.5 * sums[1])
    torch.testing.assert_close(result.total, total)
    torch.testing.assert_close(result.reference["cross_entropy"].sum, reference.detach())
    torch.testing.assert_close(result.sums, torch.stack(sums[:2]).detach())
    torch.testing.assert_close(result.metrics, sums[2].reshape(1))
    assert float(result.reference["student_accuracy"].sum) == float((logits.argmax(-1) == case.labels).sum())
    for gradient, expected in zip(gradients, torch.autograd.grad(3 * total, case.leaves), strict=True):
        torch.testing.assert_close(gradient, expected)
    assert sum(block.num_chunks for block in case.blocks) == 7
    assert {1: len(case.blocks) == 7, 10**9: len(case.blocks) == 1}.get(chunk_bytes, 1 < len(case.blocks) < 7)
    assert not any(block.teacher.requires_grad for block in case.blocks)


def test_without_chunks_only_cross_entropy_is_left():
    nothing = [[-1] * 6] * 2
    case = Case(nothing, nothing)
    result = case.loss()
    reference = cross_entropy(
        case.student.hidden @ case.student.weight.T + case.student.bias, case.labels, reduction="sum"
    )
    torch.testing.assert_close(result.total, 0.6 * reference)
    assert result.sums.tolist() == [0.0, 0.0]
    for gradient, expected in zip(
        torch.autograd.grad(result.total, case.leaves),
        torch.autograd.grad(0.6 * reference, case.leaves),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("mode", ["one_pass", "checkpoint"])
def test_no_group_is_parted(mode):
    """Slices of three rows would part groups of 2, 3, 1, 4 and 1 rows."""
    hidden, weight = leaf(11, 2, seed=0), leaf(5, 2, seed=1)
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4])
    seen = []

    def row_losses(logits, rows):
        seen.append(rows[0].tolist())
        return [logits[0].sum(-1)], []

    result = chunked_head.chunked_head_loss(
        row_losses,
        [HeadInput(hidden, weight)],
        [groups],
        weights=[1.0],
        chunk_bytes=3 * 3 * 8 * 5,
        mode=mode,
        group_starts=[0, 2, 5, 6, 10],
    )
    assert seen == [[0, 0], [1, 1, 1, 2], [3, 3, 3, 3, 4]]
    torch.testing.assert_close(result.total, (hidden @ weight.T).sum())
