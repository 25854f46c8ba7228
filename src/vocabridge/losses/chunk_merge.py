"""Rows of several tokens merged into one by the chain rule, and a divergence between rows that need not sum to 1.

Legend: n rows, N packed positions, C chunks, K entries.

A chunk's tokens y_1 .. y_m are predicted by rows P_1 .. P_m. Its merged row is

    P(v) = P_m(v) * P_1(y_1) * ... * P_(m-1)(y_(m-1))

the probability of the chunk's text with v as its last token; P(y_m) is the probability of the whole chunk. The product
is the row's *prefix*: a number for each chunk, 1 where the chunk is a single token, kept as a logarithm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vocabridge.losses.chunk_rows import Ranges, segment_sum
from vocabridge.losses.divergences import MAX_LOG_RATIO


def prefix_positions(ranges: Ranges) -> Tensor:
    """Packed positions ``[k]`` that lie in a chunk and are not its last one."""
    inside = ranges.chunks >= 0
    inside[ranges.last] = False
    return inside.nonzero().squeeze(1)


def log_prefix(label_log_probs: Tensor, positions: Tensor, ranges: Ranges) -> Tensor:
    """Logarithm ``[C]`` of every chunk's prefix, in nats; differentiable.

    Args:
        label_log_probs: ``[k]`` log-probability of the label at each of ``positions``.
        positions: ``[k]`` from :func:`prefix_positions`.
        ranges: the chunks on this side.
    """
    return segment_sum(label_log_probs, ranges.chunks[positions], ranges.starts.shape[0])


def mass_jsd(student_log: Tensor, teacher_log: Tensor, *, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of every row of masses, which need not sum to 1.

    With masses p (student), q (teacher) and m = beta q + (1 - beta) p it is

        sum_v beta q log(q / m) + (1 - beta) p log(p / m)

    As x log x is convex, every summand is at least 0, and 0 only where p = q: no renormalisation is needed. On rows
    that sum to 1 it is :func:`~vocabridge.losses.divergences.generalised_jsd`. The teacher is a constant; where both
    are equal, value and gradient are exact zeros.

    Args:
        student_log: ``[n, K]`` logarithms of the student's masses.
        teacher_log: ``[n, K]`` of the teacher's.
        beta: the teacher's share in the mixture, in (0, 1).

    Returns:
        ``[n]`` in nats.
    """
    assert student_log.shape == teacher_log.shape, (student_log.shape, teacher_log.shape)
    assert 0 < beta < 1, beta
    divergence: Tensor = _MassJsd.apply(student_log, teacher_log.detach(), beta)
    return divergence


class _MassJsd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_log: Tensor, teacher_log: Tensor, beta: float) -> Tensor:
        lowest = torch.finfo(student_log.dtype).min / 4  # finite, so that 0 log 0 is 0, and so are differences
        p_log, q_log = student_log.clamp(min=lowest), teacher_log.clamp(min=lowest)
        log_ratio = p_log - q_log
        student_terms = _log_mixture_ratio(-log_ratio, beta).mul_(p_log.exp_()).neg_()  # p log(p / m)
        teacher_terms = _log_mixture_ratio(log_ratio, 1 - beta).mul_(q_log.exp_()).neg_()  # q log(q / m)
        if ctx.needs_input_grad[0]:
            # d/dp of the summand is (1 - beta) log(p / m): what the mixture adds cancels. Times dp / d(log p) = p.
            ctx.save_for_backward(student_terms * (1 - beta))
        return student_terms.sum(-1) * (1 - beta) + teacher_terms.sum(-1) * beta

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(-1), None, None


def _log_mixture_ratio(log_ratio: Tensor, share: float) -> Tensor:
    """``log(m / a)`` of m = (1 - share) a + share b for log_ratio = log(b / a); exact zeros at equality."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).expm1_().mul_(share).log1p_()


def generalised_kl(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    """Generalised KL of every row of masses: sum_v q log(q / p) - q + p, at least 0 and 0 only where p = q.

    On rows that sum to 1 it is KL(teacher || student). Its gradient by ``log p`` is p - q.

    Args:
        student_log: ``[n, K]`` finite logarithms of the student's masses p.
        teacher_log: ``[n, K]`` finite logarithms of the teacher's masses q.

    Returns:
        ``[n]`` in nats; differentiable in both.
    """
    student, teacher = student_log.exp(), teacher_log.exp()
    return (teacher * (teacher_log - student_log) - teacher + student).sum(-1)
