"""Both sides of a batch with random hidden states and heads in float64, for objectives that need no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from tiny_pair import ROWS
from vocabridge.models.forward import SideForward, supervised_tokens
from vocabridge.models.heads import OutputHead
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup
from vocabridge.pairs import PairBatch, PairCollator, PairTokenizer, TokenizedPair
from vocabridge.text import read_examples

STUDENT_SIZE, TEACHER_SIZE = 5, 7


@dataclass
class RandomSides:
    """What an objective is made from and called with; the student's hidden states and head are leaves."""

    setup: ObjectiveSetup
    forward: ForwardPair
    batch: PairBatch
    pairs: list[TokenizedPair]

    @property
    def leaves(self) -> list[torch.Tensor]:
        student = self.forward.student
        return [student.hidden_states, student.head.weight, student.head.bias]

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, self.leaves))


def random_sides(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    rows: list[dict[str, str]] = ROWS,
    extra_head_rows: tuple[int, int] = (0, 0),
    soft_cap: float | None = None,
    seed: int = 0,
) -> RandomSides:
    """``rows`` under both tokenizers; ``extra_head_rows`` pads the heads beyond the tokenizers' sizes."""
    tokenize = PairTokenizer(student_tokenizer, teacher_tokenizer, max_length=128)
    pairs = [tokenize(example) for example in read_examples(rows)]
    batch = PairCollator(0, 0)(pairs)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def side(prefix: str, num_rows: int, size: int) -> SideForward:
        tokens = supervised_tokens(batch[f"{prefix}input_ids"], batch[f"{prefix}labels"])
        head = OutputHead(random(num_rows, size), random(num_rows), soft_cap, 1.0)
        embedding = torch.nn.Embedding.from_pretrained(random(num_rows, size))
        hidden = random(len(tokens.labels), size)
        return SideForward(hidden, tokens.input_ids, tokens.labels, tokens.rows, head, embedding)

    student = side("", len(student_tokenizer) + extra_head_rows[0], STUDENT_SIZE)
    teacher = side("teacher_", len(teacher_tokenizer) + extra_head_rows[1], TEACHER_SIZE)
    for leaf in (student.hidden_states, student.head.weight, student.head.bias):
        leaf.requires_grad_()
    setup = ObjectiveSetup(
        student_hidden_size=STUDENT_SIZE,
        student_embedding=student.embedding,
        student_tokenizer=student_tokenizer,
        student_head=student.head,
        teacher_hidden_size=TEACHER_SIZE,
        teacher_embedding=teacher.embedding,
        teacher_head=teacher.head,
        teacher_tokenizer=teacher_tokenizer,
        student_end_token_id=tokenize.student.end_token_id,
        teacher_end_token_id=tokenize.teacher.end_token_id,
    )
    return RandomSides(setup, ForwardPair(student, teacher), batch, pairs)


def divergence_by_formula(name: str, q: torch.Tensor, p: torch.Tensor, *, beta: float, skew: float) -> torch.Tensor:
    """Of one row, from the teacher's probabilities ``q`` and the student's ``p``, in plain autograd."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a.log() - b.log())).sum()

    if name == "total_variation":
        return (p - q).abs().sum() / 2
    if name == "adaptive":
        order = q.argsort()
        tail = torch.zeros_like(q, dtype=torch.bool)
        tail[order] = q[order].cumsum(0) <= 0.5
        gap = (q - p).abs().detach()
        share = gap[tail].sum() / gap.sum()
        return (1 - share) * kl(q, p) + share * kl(p, q)
    beta = 0.5 if name == "jensen_shannon" else beta
    middle = beta * q + (1 - beta) * p
    return {
        "forward": lambda: kl(q, p),
        "reverse": lambda: kl(p, q),
        "jensen_shannon": lambda: beta * kl(q, middle) + (1 - beta) * kl(p, middle),
        "generalised_jsd": lambda: beta * kl(q, middle) + (1 - beta) * kl(p, middle),
        "skewed_forward": lambda: kl(q, skew * q + (1 - skew) * p),
        "skewed_reverse": lambda: kl(p, skew * p + (1 - skew) * q),
    }[name]()
