"""Transport between two samples, for a batch of padded pairs of samples.

Axis letters: E examples, n / m rows of the longest sample x / y, F features. ``x_mask [E, n]`` and ``y_mask [E, m]``
are bool, True where a row exists; every example has a row on both sides. Computed in float32 (float64 stays), autocast
or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vocabridge.losses.cross_attention import attention_weights


@dataclass(frozen=True, slots=True)
class ConditionalCosts:
    """Both directions of conditional transport; 0 at padding."""

    x_costs: Tensor
    """[E, n] expected cost of sending each row of x to y."""
    y_costs: Tensor
    """[E, m] expected cost of sending each row of y to x."""
    x_entropies: Tensor
    """[E, n] entropy of each row's plan, in nats; a constant."""
    y_entropies: Tensor
    """[E, m]"""


def conditional_costs(cost: Tensor, affinity: Tensor, *, x_mask: Tensor, y_mask: Tensor) -> ConditionalCosts:
    """Expected costs under the plans ``pi(y_j | x_i) = softmax_j(affinity)`` and ``pi(x_i | y_j) = softmax_i``.

    Conditional transport, Zheng & Zhou 2021, arXiv 2012.14100, eqs. 3 to 5 for uniform weights.

    Args:
        cost: ``[E, n, m]``.
        affinity: ``[E, n, m]``, in nats.
        x_mask: ``[E, n]``.
        y_mask: ``[E, m]``.
    """
    x_plan = attention_weights(affinity, y_mask) * x_mask[:, :, None]
    y_plan = attention_weights(affinity.transpose(1, 2), x_mask) * y_mask[:, :, None]
    return ConditionalCosts(
        x_costs=(x_plan * cost).sum(-1),
        y_costs=(y_plan * cost.transpose(1, 2)).sum(-1),
        x_entropies=torch.special.entr(x_plan.detach()).sum(-1),
        y_entropies=torch.special.entr(y_plan.detach()).sum(-1),
    )


@dataclass(frozen=True, slots=True)
class SinkhornDivergence:
    """One value per example."""

    divergence: Tensor
    """[E] in the units of the cost."""
    marginal_error: Tensor
    """[E] total variation distance, in [0, 1], between the plan's weights on y and uniform ones: how far the potentials
    are from convergence; a constant."""


def squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """``[E, n, m]`` squared Euclidean distances of ``u [E, n, F]`` and ``v [E, m, F]``."""
    squares = u.square().sum(-1)[:, :, None] + v.square().sum(-1)[:, None, :]
    return torch.baddbmm(squares, u, v.transpose(1, 2), alpha=-2).clamp_min(0)


def manhattan_distances(u: Tensor, v: Tensor) -> Tensor:
    """``[E, n, m]`` sums of absolute differences of ``u [E, n, F]`` and ``v [E, m, F]``."""
    return torch.cdist(u, v, p=1.0)


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    x_mask: Tensor,
    y_mask: Tensor,
    regularization: float,
    iterations: int,
    distances: Callable[[Tensor, Tensor], Tensor] = squared_distances,
) -> SinkhornDivergence:
    """Debiased entropic transport ``OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2``.

    ``OT`` is the minimum over plans P with uniform marginals a, b of ``<P, C> + eps KL(P | a b^T)`` (Feydy et al. 2019,
    arXiv 1810.08278; Genevay et al. 2018, arXiv 1706.00292). It is taken from its dual, in the log domain:
    ``a.f + b.g`` with f the soft minimum of C - g, which for any g bounds OT from below.

    The gradient is that of this value with g held, ``a_i P(j | i) dC_ij``: by the envelope theorem the gradient of OT
    where g has converged, and for every g the exact gradient of a lower bound. Going back through the iterations would
    keep ``iterations`` times [E, n, m] in memory to add a term that vanishes at convergence.

    Args:
        x: ``[E, n, F]``.
        y: ``[E, m, F]``.
        x_mask: ``[E, n]``.
        y_mask: ``[E, m]``.
        regularization: eps as a share of the example's mean cost between x and y (a constant to the gradient); one eps
            for all three problems, so that the divergence of equal samples is 0.
        iterations: updates of the potentials of each problem.
        distances: the cost, unchanged when both samples move by the same vector.
    """
    x, y = _promoted(x), _promoted(y)
    x_weights, y_weights = _log_uniform(x_mask, x.dtype), _log_uniform(y_mask, y.dtype)
    # Moving both samples by the mean of y changes no distance but saves digits.
    centre = (y.detach() * y_weights.exp()[:, :, None]).sum(1, keepdim=True)
    x, y = x - centre, y - centre
    with torch.autocast(x.device.type, enabled=False):
        cost = distances(x, y)
        weights = x_weights.exp()[:, :, None] * y_weights.exp()[:, None, :]
        eps = regularization * (weights * cost.detach()).sum((1, 2)).clamp(min=1e-12)
        within_x = _Problem(distances(x, x), x_weights, x_weights, eps)
        within_y = _Problem(distances(y, y), y_weights, y_weights, eps)
        across = _Problem(cost, x_weights, y_weights, eps)
        x_potential, y_potential = within_x.self_potential(iterations), within_y.self_potential(iterations)
        # Where x lies like y this start is the answer, so the divergence of equal samples is 0 whatever the iterations.
        potential = across.potential(y_potential, iterations)
        divergence = across.value(potential) - (within_x.value(x_potential) + within_y.value(y_potential)) / 2
        return SinkhornDivergence(divergence, across.marginal_error(potential))


@dataclass(frozen=True, slots=True)
class _Problem:
    """An entropic transport problem per example."""

    cost: Tensor
    """[E, n, m]"""
    row_weights: Tensor
    """[E, n] log of the marginal; -inf at padding."""
    column_weights: Tensor
    """[E, m]"""
    eps: Tensor
    """[E]"""

    def rows(self, columns: Tensor) -> Tensor:
        """Best row potential ``[E, n]`` for a column potential ``[E, m]``: the soft minimum of cost - column."""
        return _soft_minimum(self.cost, columns, self.column_weights, self.eps)

    def columns(self, rows: Tensor) -> Tensor:
        """Best column potential ``[E, m]`` for a row potential ``[E, n]``."""
        return _soft_minimum(self.cost.transpose(1, 2), rows, self.row_weights, self.eps)

    @torch.no_grad()
    def potential(self, columns: Tensor, iterations: int) -> Tensor:
        """Column potential ``[E, m]`` after ``iterations`` updates of both sides in turn, from the one given."""
        for _ in range(iterations):
            columns = self.columns(self.rows(columns))
        return columns

    @torch.no_grad()
    def self_potential(self, iterations: int) -> Tensor:
        """The one potential ``[E, n]`` of a sample against itself; a mean of old and new halves the error or better."""
        potential = torch.zeros_like(self.column_weights)
        for _ in range(iterations):
            potential = (potential + self.rows(potential)) / 2
        return potential

    def value(self, columns: Tensor) -> Tensor:
        """``[E]`` dual value at a constant column potential and its best row potential."""
        rows = (self.row_weights.exp() * self.rows(columns)).sum(-1)
        return rows + (self.column_weights.exp() * columns).sum(-1)

    @torch.no_grad()
    def marginal_error(self, columns: Tensor) -> Tensor:
        """``[E]`` total variation distance between the plan's column sums and the column marginal."""
        scores = (columns[:, None, :] - self.cost) / self.eps[:, None, None] + self.column_weights[:, None, :]
        sums = (self.row_weights.exp()[:, :, None] * scores.softmax(-1)).sum(1)
        return (sums - self.column_weights.exp()).abs().sum(-1) / 2


def _soft_minimum(cost: Tensor, potential: Tensor, log_weights: Tensor, eps: Tensor) -> Tensor:
    """``-eps log sum_j exp(log_weights_j + (potential_j - cost_ij) / eps)``: ``[E, n]`` for a cost ``[E, n, m]``."""
    scores = (potential[:, None, :] - cost) / eps[:, None, None] + log_weights[:, None, :]
    return -eps[:, None] * scores.logsumexp(-1)


def _log_uniform(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Log of the uniform distribution over existing rows, -inf at padding."""
    return mask.to(dtype).log() - mask.sum(-1, keepdim=True).to(dtype).log()


def _promoted(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()
