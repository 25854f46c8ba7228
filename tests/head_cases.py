"""Heads with hidden states, their losses as plain loops over rows, and a watch on the tensors that appear."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vocabridge.losses import chunked_head
from vocabridge.losses.chunked_head import HeadInput

N, H_S, H_T = 23, 5, 6
CHUNKS = (1, 4, 7, N, N + 77)


def chunk_bytes(inputs, num_rows, mode="one_pass"):
    """The budget that allows ``num_rows`` rows a chunk."""
    if mode == "checkpoint":
        return num_rows * chunked_head.TENSORS_PER_INPUT * chunked_head._logits_bytes(inputs)
    return num_rows * chunked_head._bytes_per_row(inputs)


def leaf(*shape, seed, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


class Case:
    """Two vocabularies, a bias, a soft cap and a scale: everything at once."""

    def __init__(self, v_s=13, v_t=17, *, num_rows=N, dtype=torch.float64, train_head=True):
        self.hidden = leaf(num_rows, H_S, seed=1, dtype=dtype)
        self.weight = leaf(v_s, H_S, seed=2, dtype=dtype)
        self.bias = leaf(v_s, seed=3, dtype=dtype)
        self.teacher_hidden = leaf(num_rows, H_T, seed=4, dtype=dtype).detach()
        self.teacher_weight = leaf(v_t, H_T, seed=5, dtype=dtype).detach()
        self.labels = torch.arange(num_rows) % v_s
        self.row_weights = (
            leaf(num_rows, seed=6).detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
        )
        self.inputs = [
            HeadInput(self.hidden, self.weight, self.bias, soft_cap=4.0, logit_scale=0.7, train_head=train_head),
            HeadInput(self.teacher_hidden, self.teacher_weight),
        ]
        self.rows = [self.labels, self.row_weights]
        self.leaves = [self.hidden, self.weight, self.bias]

    @staticmethod
    def row_losses(logits, rows):
        student, teacher = logits
        labels, row_weights = rows
        cross_entropy = F.cross_entropy(student, labels, reduction="none") * row_weights
        sorted_student = torch.softmax(student, -1).sort(-1, descending=True).values
        sorted_teacher = torch.softmax(teacher, -1).sort(-1, descending=True).values
        width = min(student.shape[1], teacher.shape[1])
        sorted_distance = (sorted_student[:, :width] - sorted_teacher[:, :width]).abs().sum(-1)
        return [cross_entropy, sorted_distance], [
            (student.argmax(-1) == labels).float(),
            student.detach().logsumexp(-1),
        ]

    def naive(self):
        """Sums of both losses and both metrics from whole logits, written out by hand."""
        student = 4.0 * torch.tanh(0.7 * (self.hidden @ self.weight.T + self.bias) / 4.0)
        teacher = self.teacher_hidden @ self.teacher_weight.T
        log_probs = student - student.exp().sum(1, keepdim=True).log()
        picked = torch.stack([log_probs[i, label] for i, label in enumerate(self.labels)])
        first = -(picked * self.row_weights).sum()
        second = 0
        for s, t in zip(student, teacher, strict=True):
            s, t = (x.exp() / x.exp().sum() for x in (s, t))
            ordered = zip(s.sort(descending=True).values, t.sort(descending=True).values, strict=False)
            second = second + sum((a - b).abs() for a, b in ordered)
        right = sum(row.argmax() == label for row, label in zip(student, self.labels, strict=True))
        metrics = torch.stack([right.double(), student.exp().sum(1).log().sum().detach()])
        return torch.stack([first, second]), metrics


class NewTensors(TorchDispatchMode):
    """Records size and shape of every tensor that an operation returns, views and in-place results aside."""

    def __init__(self):
        super().__init__()
        self.sizes = []
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {item.untyped_storage().data_ptr() for item in args if isinstance(item, torch.Tensor)}
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, torch.Tensor) and item.untyped_storage().data_ptr() not in old:
                self.sizes.append(item.numel())
                self.shapes.add(tuple(item.shape))
        return result
