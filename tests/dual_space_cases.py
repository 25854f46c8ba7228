"""Micro-batches for the dual-space methods, and their losses as plain loops over positions, from the formulas alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vocabridge.models.forward import SideForward
from vocabridge.models.heads import OutputHead
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup

CHUNKS = [
    # One example each: chunk of every student position, of every teacher position; -1 is none. The last has no chunk.
    ([0, 0, -1, 1, 2, 2, 2], [0, 1, 1, -1, 2]),
    ([0, 1, 1, 2], [0, 0, 0, 1, 2]),
    ([-1] * 5, [-1] * 3),
]
ONE_TO_ONE = [(list(range(n)), list(range(n))) for n in (4, 6)]


def setup(student_size: int, teacher_size: int) -> ObjectiveSetup:
    """For objectives that look at nothing but the hidden sizes."""
    return ObjectiveSetup(
        student_hidden_size=student_size,
        student_embedding=nn.Embedding(2, 2),
        student_tokenizer=None,
        student_head=None,
        teacher_hidden_size=teacher_size,
        teacher_embedding=nn.Embedding(2, 2),
        teacher_tokenizer=None,
    )


def padded(rows: list[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])


class DualCase:
    """Random states of both models in float64, packed, with given chunks."""

    def __init__(self, chunks=CHUNKS, *, vocabularies=(5, 9), sizes=(6, 8), seed=0):
        self.chunks = chunks
        self.vocabularies, self.sizes = vocabularies, sizes
        generator = torch.Generator().manual_seed(seed)
        self.sides = [self._side(side, generator) for side in (0, 1)]
        self.sides[0].hidden_states.requires_grad_(True)
        self.sides[0].head.weight.requires_grad_(True)

    def _side(self, side: int, generator: torch.Generator) -> SideForward:
        lengths = [len(example[side]) for example in self.chunks]
        vocabulary, size = self.vocabularies[side], self.sizes[side]

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def ids() -> Tensor:
            return torch.randint(vocabulary, (sum(lengths),), generator=generator)

        return SideForward(
            hidden_states=random(sum(lengths), size),
            input_ids=ids(),
            labels=ids(),
            rows=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
            head=OutputHead(random(vocabulary, size), None, None, 1.0),
            embedding=nn.Embedding.from_pretrained(random(vocabulary, size)),
        )

    @property
    def pair(self) -> ForwardPair:
        return ForwardPair(*self.sides)

    def batch(self) -> dict[str, Tensor]:
        return {
            "input_ids": torch.zeros(len(self.chunks), 1, dtype=torch.long),
            "chunk_ids": padded([student for student, _ in self.chunks]),
            "teacher_chunk_ids": padded([teacher for _, teacher in self.chunks]),
        }

    def gradients(self, loss: Tensor, objective: nn.Module) -> dict[str, Tensor]:
        tensors = {
            "hidden": self.sides[0].hidden_states,
            "head": self.sides[0].head.weight,
            **{name: p for name, p in objective.named_parameters() if p.requires_grad},
        }
        values = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        return {name: value for name, value in zip(tensors, values, strict=True) if value is not None}


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum().log()


def kl(p_logits: Tensor, q_logits: Tensor, temperature: float) -> Tensor:
    p, q = log_softmax(p_logits / temperature), log_softmax(q_logits / temperature)
    return (p.exp() * (p - q)).sum()


def reference_loss(
    case: DualCase, objective: nn.Module, weights, *, temperature: float, kd_weight: float, top_k: int | None = None
) -> Tensor:
    """Forward KL in both spaces.

    Args:
        case: the micro-batch.
        objective: has the projectors.
        weights: ``(example, partners) -> weights`` of one position: a list of partner indices on the other side (within
            the example), the position's own index and side in, a list of scalars out.
        temperature: of the divergences.
        kd_weight: share of distillation.
        top_k: the teacher's likeliest tokens, which alone are compared in its space.
    """
    student, teacher = case.sides
    total = torch.zeros((), dtype=torch.float64)
    for b, (s_chunks, t_chunks) in enumerate(case.chunks):
        s_at = (student.rows == b).nonzero().squeeze(1).tolist()
        t_at = (teacher.rows == b).nonzero().squeeze(1).tolist()
        t_hidden, t_label = teacher.hidden_states[t_at], teacher.embedding.weight[teacher.labels[t_at]]
        values = t_hidden / t_hidden.std() + t_label / t_label.std()
        for i, at in enumerate(s_at):
            own = student.head.weight @ student.hidden_states[at]
            label = int(student.labels[at])
            total = total - (1 - kd_weight) * log_softmax(own)[label]
            if not (shares := weights(b, 0, i, s_chunks, t_chunks)):
                continue
            mixed = sum(w * objective.teacher_to_student(values[j]) for j, w in shares.items())
            projected = student.head.weight.detach() @ mixed
            total = total - kd_weight * log_softmax(projected)[label]
            if int(projected.argmax()) == label:
                total = total + kd_weight * kl(projected.detach(), own, temperature)
        for j, at in enumerate(t_at):
            if not (shares := weights(b, 1, j, s_chunks, t_chunks)):
                continue
            mixed = sum(w * objective.student_to_teacher(student.hidden_states[s_at[i]]) for i, w in shares.items())
            own = teacher.head.weight @ teacher.hidden_states[at]
            kept = own.argsort(descending=True)[:top_k]
            total = total + kd_weight * kl(own[kept], (teacher.head.weight @ mixed)[kept], temperature)
    return total


def attention_scores(case: DualCase, objective: nn.Module, b: int, *, scale: float, position_weight: float = 0.0):
    """``scores[i][j]`` of one example, for a random start."""
    student, teacher = case.sides
    s_at, t_at = [(side.rows == b).nonzero().squeeze(1).tolist() for side in case.sides]
    inputs = [
        torch.cat([side.embedding.weight[side.input_ids[at]], side.embedding.weight[side.labels[at]]], -1)
        for side, at in ((student, s_at), (teacher, t_at))
    ]
    keys = inputs[1] / inputs[1].std()
    queries = [objective.query_projector(row) for row in inputs[0]]
    n, m = len(s_at), len(t_at)
    return [
        [scale * ((queries[i] * keys[j]).sum() - position_weight * abs((j + 1) / m - (i + 1) / n)) for j in range(m)]
        for i in range(n)
    ]


def softmax_over(scores: dict[int, Tensor]) -> dict[int, Tensor]:
    total = sum(score.exp() for score in scores.values())
    return {index: score.exp() / total for index, score in scores.items()}


def golden_chunk_batch(case) -> dict[str, Tensor]:
    """A golden case's batch with its chunks, from the end offsets that both tokenizations share."""
    ids = []
    for student, teacher in zip(case.tensors["in.student_offsets"], case.tensors["in.teacher_offsets"], strict=True):
        common = sorted(set(student.tolist()) & set(teacher.tolist()))
        ids.append([[sum(end < own for end in common) for own in side.tolist()] for side in (student, teacher)])
    return {
        "input_ids": case.tensors["in.student_labels"],
        "chunk_ids": torch.tensor([pair[0] for pair in ids]),
        "teacher_chunk_ids": torch.tensor([pair[1] for pair in ids]),
    }


PROJECTORS = {"query": "query_projector", "t2s": "teacher_to_student", "s2t": "student_to_teacher"}
DIVERGENCES = {
    "forward": "forward_kl",
    "reverse": "reverse_kl",
    "jensen_shannon": "js_divergence",
    "skewed_forward": "skewed_forward_kl",
    "skewed_reverse": "skewed_reverse_kl",
}
"""Ours to published. Their adaptive one applies its temperatures twice."""


def load_golden_projectors(objective: nn.Module, case) -> None:
    with torch.no_grad():
        for published, name in PROJECTORS.items():
            if module := getattr(objective, name, None):
                module.weight.copy_(case.tensors[f"in.projector_{published}_weight"])
                module.bias.copy_(case.tensors[f"in.projector_{published}_bias"])


def check_golden(objective: nn.Module, case, divergence: str) -> None:
    """Values and every gradient of a golden case that has chunks."""
    published = DIVERGENCES[divergence]
    tolerance = {"rtol": 2e-4, "atol": 5e-6}
    load_golden_projectors(objective, case)
    pair = case.pair()
    terms = objective(pair.forward, golden_chunk_batch(case))
    parts = {name: float(ratio.sum) for term in terms.values() for name, ratio in term.metrics.items()}
    expected = case.scalars
    for name, published_name in {
        "cross_entropy": "nll_loss",
        "t2s_cross_entropy": "t2s_ce_loss",
        "t2s_divergence": f"{published}.t2s_kd_loss",
        "s2t_divergence": "s2t_kd_loss",
        "t2s_accuracy": "t2s_acc",
    }.items():
        torch.testing.assert_close(parts[name], float(expected[published_name]), rtol=2e-5, atol=2e-6)
    num_teacher = case.tensors["in.teacher_labels"].numel()
    assert abs(parts["s2t_accuracy"] / num_teacher - expected["s2t_acc"] / expected["batch_denom"]) < 1e-6
    loss = sum(term.sum for term in terms.values())
    torch.testing.assert_close(float(loss.detach()), expected[f"{published}.total"], rtol=2e-5, atol=0.0)
    loss.backward()
    torch.testing.assert_close(
        pair.student_hidden.grad, case.tensors[f"grad.total.{published}.student_hidden"], **tolerance
    )
    if divergence != "forward":
        return  # the other gradients do not depend on it, and are stored once
    torch.testing.assert_close(
        pair.student_head.grad, case.tensors["grad.total.forward_kl.student_lm_head_weight"], **tolerance
    )
    checked = 0
    for published_name, name in PROJECTORS.items():
        for kind in ("weight", "bias") if hasattr(objective, name) else ():
            stored = case.tensors[f"grad.total.forward_kl.projector_{published_name}_{kind}"]
            torch.testing.assert_close(getattr(getattr(objective, name), kind).grad, stored, **tolerance)
            checked += 1
    assert checked == sum(1 for _ in objective.parameters())
