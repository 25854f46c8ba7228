"""Two examples under two invented tokenizers, as packed float64 sides: what objectives over chunks are tested with."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from vocabridge.models.forward import SideForward
from vocabridge.models.heads import OutputHead
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup

# One to one, one to many, many to one, many to many; positions in no chunk; an example without any on either side.
STUDENT_CHUNKS = [[0, 0, 1, 2, 3, 3, 4], [-1, 0, 1, 1, 1, -1], [], [0, 1]]
TEACHER_CHUNKS = [[0, 1, 1, 1, 2, 3, 3, 3, 4], [0, 1, -1], [], [0, 1]]


def make_side(
    vocab_size: int, chunks: Sequence[Sequence[int]], *, seed: int, width: int = 6, scale: float = 1.5
) -> SideForward:
    """Random hidden states, labels and a head with bias, scale and soft cap; states and head are leaves."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()

    count = sum(map(len, chunks))
    return SideForward(
        hidden_states=leaf(count, width),
        input_ids=torch.zeros(count, dtype=torch.int64),
        labels=torch.randint(vocab_size, (count,), generator=generator),
        rows=torch.tensor([i for i, row in enumerate(chunks) for _ in row], dtype=torch.int64),
        head=OutputHead(leaf(vocab_size, width), leaf(vocab_size), soft_cap=9.0, logit_scale=0.8),
        embedding=nn.Identity(),
    )


def certain_side(vocab_size: int, chunks: Sequence[Sequence[int]], labels: Sequence[int]) -> SideForward:
    """A side whose every row gives its label all the probability."""
    ids = torch.tensor(labels, dtype=torch.int64)
    return SideForward(
        hidden_states=(torch.eye(vocab_size, dtype=torch.float64)[ids] * 1000).requires_grad_(),
        input_ids=torch.zeros_like(ids),
        labels=ids,
        rows=torch.tensor([i for i, row in enumerate(chunks) for _ in row], dtype=torch.int64),
        head=OutputHead(torch.eye(vocab_size, dtype=torch.float64).requires_grad_(), None, None, 1.0),
        embedding=nn.Identity(),
    )


def make_batch(student: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]]) -> Any:
    """Enough of a PairBatch."""

    def pad(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        width = max((len(row) for row in rows), default=0)
        return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int64)

    return {
        "input_ids": torch.zeros(len(student), 1, dtype=torch.int64),
        "chunk_ids": pad(student),
        "teacher_chunk_ids": pad(teacher),
    }


def make_pair(v_s: int, v_t: int) -> ForwardPair:
    """Both sides of the examples at the top."""
    return ForwardPair(make_side(v_s, STUDENT_CHUNKS, seed=1), make_side(v_t, TEACHER_CHUNKS, seed=2, width=5))


def make_setup(pair: ForwardPair, *, ends: tuple[int, int] = (0, 0)) -> ObjectiveSetup:
    """Tokenizers that know only their end token."""
    assert pair.teacher is not None
    return ObjectiveSetup(
        student_hidden_size=pair.student.hidden_states.shape[1],
        student_embedding=nn.Identity(),
        student_tokenizer=SimpleNamespace(eos_token_id=ends[0]),
        student_head=pair.student.head,
        teacher_tokenizer=SimpleNamespace(eos_token_id=ends[1]),
        teacher_head=pair.teacher.head,
    )


def plain_logits(side: SideForward) -> torch.Tensor:
    """``[N, V]`` straight from the head's definition."""
    head = side.head
    logits = side.hidden_states @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


def trained(side: SideForward) -> list[torch.Tensor]:
    """The leaves of a side."""
    return [item for item in (side.hidden_states, side.head.weight, side.head.bias) if item is not None]


def gradients(loss: torch.Tensor, side: SideForward) -> list[torch.Tensor]:
    """Gradients of ``loss`` by the side's leaves; zeros where there is none."""
    found = torch.autograd.grad(loss, trained(side), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if item is None else item for leaf, item in zip(trained(side), found, strict=True)]


def positions_by_chunk(chunks: Sequence[Sequence[int]]) -> list[list[int]]:
    """Packed positions of every chunk, by example and then text."""
    found: dict[tuple[int, int], list[int]] = {}
    packed = 0
    for example, row in enumerate(chunks):
        for chunk in row:
            if chunk >= 0:
                found.setdefault((example, chunk), []).append(packed)
            packed += 1
    return [found[key] for key in sorted(found)]
