"""Log-likelihoods of text chunks under two models, and how far apart they are (approximate likelihood matching).

Legend: N / M packed student / teacher positions, C byte-exact chunks of a micro-batch, G chunks after merging, V a
vocabulary. l = log-probability of a chunk's tokens, plus that of its end being one (its *outcome*).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vocabridge.losses.chunk_rows import ChunkRows, Ranges, segment_sum
from vocabridge.losses.divergences import MAX_LOG_RATIO

EPSILON = 1e-6
"""Taken off every tempered log-probability, as published: log(1 - exp(0)) is infinite, and float32 knows no more."""


def label_and_boundary_log_probs(logits: Tensor, labels: Tensor, boundary_mask: Tensor | None) -> Tensor:
    """``[n, 2]``: log-probabilities of the label, and of the next token being one of ``boundary_mask``.

    Args:
        logits: ``[n, V]``.
        labels: ``[n]``.
        boundary_mask: ``[V]`` bool; None leaves the second column 0, which is certainty.
    """
    total = logits.logsumexp(-1)
    label = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - total
    if boundary_mask is None:
        boundary = torch.zeros_like(label)
    else:
        boundary = logits.masked_fill(~boundary_mask, -math.inf).logsumexp(-1) - total
    return torch.stack([label, boundary], dim=-1).clamp(max=0)  # rounding may exceed certainty


@dataclass(frozen=True, slots=True, eq=False)
class ChunkLogProbs:
    """Log-likelihoods in nats of the same G pieces of text under both models."""

    student: Tensor
    """``[G]``, at most 0; differentiable where the given numbers are."""
    teacher: Tensor
    """``[G]``, at most 0."""


def chunk_log_probs(
    chunks: ChunkRows,
    student: Tensor,
    teacher: Tensor,
    *,
    student_rows: Tensor,
    teacher_rows: Tensor,
    append_outcome: bool,
    merge_threshold: float | None,
) -> ChunkLogProbs:
    """Add up the log-probabilities of chunks, perhaps joined to pieces that the teacher is likely to end where they do.

    The outcome of a chunk is read at the position that predicts the token behind it. At the end of an example there is
    none (the text is over, or cut): then it counts as certain on both sides, and a piece ends there in any case.

    Args:
        chunks: of the micro-batch.
        student: ``[N, 2]`` of :func:`label_and_boundary_log_probs`.
        teacher: ``[M, 2]``.
        student_rows: ``[N]`` example of each packed position.
        teacher_rows: ``[M]``.
        append_outcome: count the outcome of each piece.
        merge_threshold: join a chunk to the next where the teacher's probability of the outcome is not above this.
    """
    followed = _is_followed(chunks.student, student_rows) & _is_followed(chunks.teacher, teacher_rows)
    sides = []
    for ranges, numbers in ((chunks.student, student), (chunks.teacher, teacher)):
        likelihood = segment_sum(numbers[:, 0], ranges.chunks, chunks.num_chunks)
        behind = numbers[ranges.ends.clamp(max=max(len(numbers) - 1, 0)), 1]
        sides.append((likelihood, torch.where(followed, behind, 0.0)))
    closes = _closes(chunks.rows, sides[1][1], merge_threshold)
    pieces = closes.cumsum(0) - closes.long()  # how many pieces are closed before this chunk
    num_pieces = int(closes.sum())
    totals = [
        segment_sum(likelihood, pieces, num_pieces) + (outcome[closes] if append_outcome else 0.0)
        for likelihood, outcome in sides
    ]
    return ChunkLogProbs(*totals)


def _is_followed(ranges: Ranges, rows: Tensor) -> Tensor:
    """``[C]`` bool: the position behind the chunk is supervised and of the same example."""
    if not len(rows):
        return ranges.starts.bool()  # no position, no chunk
    behind = ranges.ends.clamp(max=len(rows) - 1)
    return (ranges.ends < len(rows)) & (rows[behind] == rows[ranges.last])


def _closes(chunk_rows: Tensor, outcome: Tensor, merge_threshold: float | None) -> Tensor:
    """``[C]`` bool: a piece ends with this chunk; the last chunk of an example always closes one."""
    if merge_threshold is None:
        return torch.ones_like(chunk_rows, dtype=torch.bool)
    is_last = torch.ones_like(chunk_rows, dtype=torch.bool)
    is_last[:-1] = chunk_rows[1:] != chunk_rows[:-1]
    return is_last | (outcome.exp() > merge_threshold)


# --- differences -----------------------------------------------------------------------------------------------------

ChunkDifference = Callable[[Tensor, Tensor], Tensor]
"""``(teacher [G], student [G]) -> [G]``: log-likelihoods to a loss whose least value is where both agree."""


def chunk_difference(name: str, *, temperature: float, renyi_alpha: float) -> ChunkDifference:
    """The difference of two log-likelihoods called ``name``, with its settings bound.

    With a = l_T / temperature - 1e-6 and b = l_S / temperature - 1e-6, e^a and e^b are the likelihoods to the power
    1 / temperature. Every tempered difference is multiplied by the temperature, so that its gradient does not vanish as
    the temperature grows: ``binary_cross_entropy`` less its least value then tends to ``binary_kl_limit``.

    Args:
        name: one of

            - ``binary_cross_entropy``: -[e^a b + (1 - e^a) log(1 - e^b)], least where b = a: the entropy of e^a;
            - ``binary_reverse_kl``: e^b (b - a) + (1 - e^b) (log(1 - e^b) - log(1 - e^a));
            - ``binary_kl_limit``: (l_T - l_S) + l_T log(l_S / l_T);
            - ``absolute_log``: the absolute value of l_T - l_S;
            - ``absolute_probability``: the absolute value of e^a - e^b;
            - ``renyi``: log(e^(alpha a) e^((1 - alpha) b) + (1 - e^a)^alpha (1 - e^b)^(1 - alpha)) / (alpha - 1);
            - ``k2``: r^2 / 2, and ``k3``: e^r - 1 - r, with r = (l_T - l_S) / temperature.
        temperature: at least 1 in practice; the likelihood of a long chunk is near 0 without it.
        renyi_alpha: order of ``renyi``, positive and not 1.
    """
    untempered: dict[str, ChunkDifference] = {
        "absolute_log": lambda teacher, student: (teacher - student).abs(),
        "binary_kl_limit": _binary_kl_limit,
    }
    if name in untempered:
        return untempered[name]
    tempered: dict[str, ChunkDifference] = {
        "binary_cross_entropy": _binary_cross_entropy,
        "binary_reverse_kl": _binary_reverse_kl,
        "absolute_probability": lambda a, b: (a.exp() - b.exp()).abs(),
        "renyi": partial(_renyi, alpha=renyi_alpha),
        "k2": lambda a, b: (a - b).square() / 2,
        "k3": _k3,
    }
    formula = tempered[name]

    def at_temperature(teacher: Tensor, student: Tensor) -> Tensor:
        return temperature * formula(teacher / temperature - EPSILON, student / temperature - EPSILON)

    return at_temperature


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation, in two branches that meet at exp(x) = 1/2."""
    is_near_zero = x > -math.log(2)
    # Each branch gets harmless numbers where the other one counts: an infinite derivative times 0 would be NaN.
    near = torch.where(is_near_zero, x, -0.5)
    far = torch.where(is_near_zero, -1.0, x)
    return torch.where(is_near_zero, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))


def _binary_cross_entropy(a: Tensor, b: Tensor) -> Tensor:
    return -(a.exp() * b - torch.expm1(a) * log1mexp(b))


def _binary_reverse_kl(a: Tensor, b: Tensor) -> Tensor:
    return b.exp() * (b - a) - torch.expm1(b) * (log1mexp(b) - log1mexp(a))


def _binary_kl_limit(teacher: Tensor, student: Tensor) -> Tensor:
    a, b = teacher - EPSILON, student - EPSILON
    return (a - b) + a * (b / a).log()


def _k3(a: Tensor, b: Tensor) -> Tensor:
    ratio = a - b
    near = ratio.clamp(max=MAX_LOG_RATIO)
    return torch.expm1(near) * (1 + ratio - near) - ratio  # a straight line where the exponential would overflow


def _renyi(a: Tensor, b: Tensor, *, alpha: float) -> Tensor:
    realised = alpha * a + (1 - alpha) * b
    rest = alpha * log1mexp(a) + (1 - alpha) * log1mexp(b)
    return torch.logaddexp(realised, rest) / (alpha - 1)
