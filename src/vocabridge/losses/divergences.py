"""Divergences between next-token distributions, as row losses on logits.

Legend: N rows, V vocabulary entries; p = softmax of the student, q = softmax of the teacher, at the given temperature.
*Forward* means KL(teacher || student) = sum q log(q / p), *reverse* KL(student || teacher).

Every row loss here

* maps ``student_logits [N, V], teacher_logits [N, V] -> [N]`` in nats; float32 inside and out (float64 stays float64);
* takes the teacher as a constant: only ``student_logits`` receives a gradient, and no second derivative exists;
* is exactly 0 with an exactly zero gradient where the two rows of logits are equal;
* treats ``0 log 0`` as 0, so columns that are ``-inf`` on both sides have no effect;
* divides the student's logits by ``temperature`` and the teacher's by ``temperature * teacher_temperature``, without a
  ``temperature ** 2`` factor: as in the published code of DSKD the gradient shrinks as the temperature grows.

Loss and gradient are computed together from one log-softmax a side, because autograd would keep about twice as many
``[N, V]`` tensors and cannot give exact zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

DEFAULT_SKEW = 0.1
DEFAULT_ADAPTIVE_ALPHA = 0.5
DEFAULT_JSD_BETA = 0.5

MAX_LOG_RATIO = 80.0
"""exp() of it fits float32; where one probability exceeds the other by more, the smaller one is below 1e-34."""


def divergence(
    name: str,
    *,
    skew: float = DEFAULT_SKEW,
    adaptive_alpha: float = DEFAULT_ADAPTIVE_ALPHA,
    jsd_beta: float = DEFAULT_JSD_BETA,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the row loss called ``name`` with its settings bound.

    Args:
        name: ``forward``, ``reverse``, ``jensen_shannon`` (``generalised_jsd`` at 0.5), ``generalised_jsd``,
            ``skewed_forward``, ``skewed_reverse``, ``adaptive`` or ``total_variation``.
        skew: share of the numerator's distribution in the skewed mixtures, in (0, 1).
        adaptive_alpha: teacher probability mass that counts as the tail in ``adaptive``, in [0, 1].
        jsd_beta: the teacher's share in the mixture of ``generalised_jsd``, in (0, 1).
        temperature: divides both sides' logits.
        teacher_temperature: divides the teacher's logits once more.

    Raises:
        ValueError: the name is unknown.
    """
    row_losses: dict[str, Callable[..., Tensor]] = {
        "forward": forward_kl,
        "reverse": reverse_kl,
        "jensen_shannon": partial(generalised_jsd, beta=0.5),
        "generalised_jsd": partial(generalised_jsd, beta=jsd_beta),
        "skewed_forward": partial(skewed_forward_kl, skew=skew),
        "skewed_reverse": partial(skewed_reverse_kl, skew=skew),
        "adaptive": partial(adaptive_kl, alpha=adaptive_alpha),
        "total_variation": total_variation,
    }
    if name not in row_losses:
        raise ValueError(f"unknown divergence {name!r}; known: {', '.join(row_losses)}")
    return partial(row_losses[name], temperature=temperature, teacher_temperature=teacher_temperature)


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, teacher_temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) of every row: sum q (log q - log p)."""
    return _row_loss(_forward, student_logits, teacher_logits, temperature, teacher_temperature)


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, teacher_temperature: float = 1.0
) -> Tensor:
    """KL(student || teacher) of every row: sum p (log p - log q)."""
    return _row_loss(_reverse, student_logits, teacher_logits, temperature, teacher_temperature)


def generalised_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = DEFAULT_JSD_BETA,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of every row (GKD, arXiv 2306.13649), at most the entropy of ``beta``.

    With the mixture m = beta q + (1 - beta) p it is beta KL(q || m) + (1 - beta) KL(p || m): the Jensen-Shannon
    divergence (at most log 2) at 0.5, near beta KL(teacher || student) for a small ``beta`` and near
    (1 - beta) KL(student || teacher) for one close to 1. Some implementations mean the student's share by beta.

    Raises:
        ValueError: ``beta`` is not strictly between 0 and 1.
    """
    _check_share("beta", beta)
    return _row_loss(
        partial(_generalised_jsd, beta=beta), student_logits, teacher_logits, temperature, teacher_temperature
    )


def skewed_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = DEFAULT_SKEW,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """KL(q || skew q + (1 - skew) p) of every row (DistiLLM, arXiv 2402.03898); at most -log(skew).

    Raises:
        ValueError: ``skew`` is not strictly between 0 and 1.
    """
    _check_share("skew", skew)
    formula = partial(_skewed_forward, skew=skew)
    return _row_loss(formula, student_logits, teacher_logits, temperature, teacher_temperature)


def skewed_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = DEFAULT_SKEW,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """KL(p || skew p + (1 - skew) q) of every row (DistiLLM, arXiv 2402.03898); at most -log(skew).

    Raises:
        ValueError: ``skew`` is not strictly between 0 and 1.
    """
    _check_share("skew", skew)
    formula = partial(_skewed_reverse, skew=skew)
    return _row_loss(formula, student_logits, teacher_logits, temperature, teacher_temperature)


def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = DEFAULT_ADAPTIVE_ALPHA,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """Forward and reverse KL, weighted row by row by where the two distributions differ (AKL, arXiv 2404.02657).

    The tail is the least likely teacher entries whose cumulative probability stays within ``alpha``, the head the rest.
    With g the summed |q - p| over each part, the loss is (g_head forward + g_tail reverse) / (g_head + g_tail); the
    weights carry no gradient. The code released with DSKD-KQ divides by the temperatures a second time inside the two
    KLs; here they act once.
    """
    return _row_loss(partial(_adaptive, alpha=alpha), student_logits, teacher_logits, temperature, teacher_temperature)


def total_variation(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, teacher_temperature: float = 1.0
) -> Tensor:
    """Total variation distance of every row: half the sum of abs(p - q), between 0 and 1 and without a unit.

    The gradient takes sign(0) as 0.
    """
    return _row_loss(_total_variation, student_logits, teacher_logits, temperature, teacher_temperature)


@dataclass(frozen=True, slots=True, eq=False)
class _RowResult:
    """A row loss and its derivative with respect to the tempered student logits."""

    loss: Tensor
    """``[N]``"""
    gradient: Tensor
    """``[N, V]``"""


_Formula = Callable[[Tensor, Tensor], _RowResult]
"""``log_p [N, V], log_q [N, V] -> _RowResult``; free to overwrite both arguments, which are finite."""


def _row_loss(
    formula: _Formula, student_logits: Tensor, teacher_logits: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    assert student_logits.shape == teacher_logits.shape, (student_logits.shape, teacher_logits.shape)
    with torch.no_grad():
        log_q = _log_probs(teacher_logits, temperature * teacher_temperature)
    loss: Tensor = _RowDivergence.apply(formula, student_logits, log_q, temperature)
    return loss


class _RowDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: _Formula, student_logits: Tensor, log_q: Tensor, temperature: float) -> Tensor:
        result = formula(_log_probs(student_logits, temperature), log_q)
        ctx.temperature = temperature
        ctx.logits_dtype = student_logits.dtype
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(result.gradient)
        return result.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * (upstream / ctx.temperature).unsqueeze(-1)).to(ctx.logits_dtype), None, None


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Fresh ``[N, V]`` log-probabilities, with log 0 as the lowest finite number so that 0 * log 0 is 0."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
    return log_probs.clamp_(min=torch.finfo(log_probs.dtype).min)


def _forward(log_p: Tensor, log_q: Tensor) -> _RowResult:
    p, q = log_p.exp(), log_q.exp()
    loss = log_q.sub_(log_p).mul_(q).sum(-1)
    return _RowResult(loss, p.sub_(q))


def _reverse(log_p: Tensor, log_q: Tensor) -> _RowResult:
    p = log_p.exp()
    terms = log_p.sub_(log_q).mul_(p)
    loss = terms.sum(-1)
    return _RowResult(loss, _minus_row_share(terms, p, loss))


def _generalised_jsd(log_p: Tensor, log_q: Tensor, beta: float) -> _RowResult:
    p, q = log_p.exp(), log_q.exp()
    log_ratio = log_p.sub_(log_q)
    teacher_loss = _log_mixture_ratio(log_ratio, 1 - beta).mul_(q).sum(-1).neg_()
    terms = _log_mixture_ratio(log_ratio.neg_(), beta).mul_(p).neg_()  # p log(p / m)
    student_loss = terms.sum(-1)
    # The derivative by p is (1 - beta) (log(p / m) + 1 - m / m): the mixture's own part cancels.
    gradient = _minus_row_share(terms, p, student_loss).mul_(1 - beta)
    return _RowResult(beta * teacher_loss + (1 - beta) * student_loss, gradient)


def _skewed_forward(log_p: Tensor, log_q: Tensor, skew: float) -> _RowResult:
    p, q = log_p.exp(), log_q.exp()
    excess = _mixture_excess(log_p.sub_(log_q), 1 - skew)  # m / q - 1
    loss = torch.log1p(excess).mul_(q).sum(-1).neg_()
    terms = excess.div_(1 + excess).mul_(q)  # q (1 - q / m)
    gradient = _minus_row_share(terms, p, terms.sum(-1)).mul_(-skew)
    return _RowResult(loss, gradient.add_(p.sub_(q), alpha=1 - skew))


def _skewed_reverse(log_p: Tensor, log_q: Tensor, skew: float) -> _RowResult:
    p = log_p.exp()
    excess = _mixture_excess(log_q.sub_(log_p), 1 - skew)  # m / p - 1
    log_mixture = torch.log1p(excess)  # log(m / p)
    loss = (log_mixture * p).sum(-1).neg_()
    terms = excess.div_(1 + excess).mul_(skew).sub_(log_mixture).mul_(p)
    return _RowResult(loss, _minus_row_share(terms, p, terms.sum(-1)))


def _adaptive(log_p: Tensor, log_q: Tensor, alpha: float) -> _RowResult:
    p, q = log_p.exp(), log_q.exp()
    tail_share = _tail_share(p, q, alpha)
    log_ratio = log_p.sub_(log_q)
    forward_loss = (log_ratio * q).sum(-1).neg_()
    terms = log_ratio.mul_(p)
    reverse_loss = terms.sum(-1)
    gradient = _minus_row_share(terms, p, reverse_loss).mul_(tail_share.unsqueeze(-1))
    gradient.addcmul_(p.sub_(q), (1 - tail_share).unsqueeze(-1))
    return _RowResult(torch.lerp(forward_loss, reverse_loss, tail_share), gradient)


def _total_variation(log_p: Tensor, log_q: Tensor) -> _RowResult:
    p, q = log_p.exp_(), log_q.exp_()
    difference = p - q
    loss = difference.abs().sum(-1).mul_(0.5)
    terms = difference.sign_().mul_(p).mul_(0.5)
    return _RowResult(loss, _minus_row_share(terms, p, terms.sum(-1)))


def _tail_share(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """Share ``[N]`` of |q - p| that lies in the teacher's tail; 0 where both rows are equal."""
    sorted_q, order = q.sort(dim=-1)
    gap = (q - p).abs_().gather(-1, order)
    tail_mask = sorted_q.cumsum(-1) <= alpha
    total = gap.sum(-1)
    return gap.mul_(tail_mask).sum(-1) / total.clamp_(min=torch.finfo(total.dtype).tiny)


def _mixture_excess(log_ratio: Tensor, weight: float) -> Tensor:
    """``weight * (exp(log_ratio) - 1)``: (a + weight (b - a)) / a - 1 for log_ratio = log(b / a), exact near equality.

    Overwrites ``log_ratio``.
    """
    return log_ratio.clamp_(max=MAX_LOG_RATIO).expm1_().mul_(weight)


def _log_mixture_ratio(log_ratio: Tensor, weight: float) -> Tensor:
    """``log((a + weight (b - a)) / a)`` for log_ratio = log(b / a), as a new tensor."""
    return _mixture_excess(log_ratio.clone(), weight).log1p_()


def _minus_row_share(terms: Tensor, p: Tensor, row_sum: Tensor) -> Tensor:
    """``terms - p * row_sum`` in place: the derivative through the softmax of a row whose terms sum to ``row_sum``."""
    return terms.addcmul_(p, row_sum.unsqueeze(-1), value=-1)


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(
            f"{name} must lie strictly between 0 and 1, not {share}; use the plain forward or reverse KL for the limits"
        )
