"""A fixed sparse map of probabilities from one vocabulary to another, made from how each spells the other's tokens.

Legend: V_s / V_t vocabularies of student and teacher, K teacher tokens that some student token maps to, n rows.

A token spelled t_1 t_2 .. in the other vocabulary gives its pieces weights in proportion to 1, 0.1, 0.01, ..: the first
piece is what the other model would predict at this place. Rows sum to 1 or, for a token without a partner, to 0.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_PIECES = 4
"""Pieces of a spelling that count, and entries of a row."""

DECAY = 0.1
"""Weight of a piece relative to the one before it."""


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Entries of a sparse matrix; with ``rows`` and ``columns`` int64, ``weights`` float64, all ``[e]``."""

    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray

    def transposed(self) -> Entries:
        """The entries of the transposed matrix."""
        return replace(self, rows=self.columns, columns=self.rows)

    def select(self, kept: np.ndarray) -> Entries:
        """Those that the mask or index ``kept`` names."""
        return Entries(self.rows[kept], self.columns[kept], self.weights[kept])


def spelling_entries(offsets: np.ndarray, ids: np.ndarray) -> Entries:
    """Weights of the first :data:`MAX_PIECES` pieces of every token's spelling; each token's sum to 1.

    Args:
        offsets: ``[V + 1]``; token i is spelled ``ids[offsets[i]:offsets[i + 1]]``.
        ids: ids of the other vocabulary.
    """
    lengths = np.diff(offsets)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(len(ids)) - offsets[rows]
    totals = np.cumsum(DECAY ** np.arange(MAX_PIECES))[np.clip(lengths, 1, MAX_PIECES) - 1]
    kept = places < MAX_PIECES
    weights = DECAY ** np.minimum(places, MAX_PIECES) / totals[rows]
    return Entries(rows, ids, weights).select(kept)


def projection_entries(spelled: Entries, spelling: Entries, *, pinned: Entries) -> Entries:
    """Entries of the map, ordered by row, then falling weight.

    Args:
        spelled: student tokens (rows) in teacher pieces (columns).
        spelling: teacher tokens (rows) in student pieces (columns).
        pinned: pairs of student and teacher tokens that are the same token: the only entry of their row.
    """
    both = _summed([spelled, spelling.transposed()])
    free = _first_of_each_row(both.select(~np.isin(both.rows, pinned.rows)), MAX_PIECES)
    totals = np.bincount(free.rows, free.weights)
    scaled = replace(free, weights=free.weights / totals[free.rows])
    return _sorted(_joined([scaled, replace(pinned, weights=np.ones(len(pinned.rows)))]))


def common_tokens(entries: Entries, *, pinned: Entries, threshold: float) -> Entries:
    """Pairs of one student and one teacher token whose weight in the map is at least ``threshold`` (above one half).

    Where several student tokens claim a teacher token, a pinned one has it, else the one of the greatest weight, else
    the lowest id. Ordered by student id.
    """
    claims = entries.select(entries.weights >= threshold)
    is_pinned = np.isin(claims.rows, pinned.rows)
    claims = claims.select(np.lexsort((claims.rows, -claims.weights, ~is_pinned)))
    _, winners = np.unique(claims.columns, return_index=True)
    return _sorted(claims.select(winners))


def _joined(parts: list[Entries]) -> Entries:
    return Entries(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.columns for part in parts]),
        np.concatenate([part.weights for part in parts]),
    )


def _summed(parts: list[Entries]) -> Entries:
    """All entries, those at the same place added up."""
    joined = _joined(parts)
    width = int(joined.columns.max(initial=0)) + 1
    # One number a place: finding equal pairs takes seconds for a large vocabulary.
    places, index = np.unique(joined.rows * width + joined.columns, return_inverse=True)
    return Entries(places // width, places % width, np.bincount(index, joined.weights, minlength=len(places)))


def _sorted(entries: Entries) -> Entries:
    return entries.select(np.lexsort((entries.columns, -entries.weights, entries.rows)))


def _first_of_each_row(entries: Entries, count: int) -> Entries:
    """The ``count`` heaviest entries of each row; of equal ones, the lowest columns."""
    ordered = _sorted(entries)
    starts = np.searchsorted(ordered.rows, ordered.rows)
    return ordered.select(np.arange(len(starts)) - starts < count)


# --- the map as a matrix ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """The map, kept in both orders: one for probabilities, one for their gradient."""

    matrix: Tensor
    """``[V_s, K]`` sparse CSR."""
    transposed: Tensor
    """``[K, V_s]`` sparse CSR."""
    teacher_ids: Tensor
    """``[K]`` ascending: the teacher token of each column."""

    @classmethod
    def of(cls, entries: Entries, num_rows: int) -> Projection:
        """The matrix of ``entries`` in float32, without its empty columns."""
        teacher_ids, columns = np.unique(entries.columns, return_inverse=True)
        compact = replace(entries, columns=columns.reshape(-1))
        shape = (num_rows, len(teacher_ids))
        return cls(
            _csr(compact, shape), _csr(compact.transposed(), (shape[1], shape[0])), torch.from_numpy(teacher_ids)
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Projection:
        """On ``device`` and with weights of ``dtype``; itself where it is there already."""
        if self.matrix.device == device and self.matrix.dtype == dtype:
            return self
        return Projection(self.matrix.to(device, dtype), self.transposed.to(device, dtype), self.teacher_ids.to(device))


def _csr(entries: Entries, shape: tuple[int, int]) -> Tensor:
    ordered = entries.select(np.lexsort((entries.columns, entries.rows)))
    offsets = np.searchsorted(ordered.rows, np.arange(shape[0] + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.from_numpy(offsets.astype(np.int64)),
            torch.from_numpy(ordered.columns),
            torch.from_numpy(ordered.weights).float(),
            shape,
            check_invariants=True,
        )


def project(probs: Tensor, projection: Projection) -> Tensor:
    """``[n, K]`` probabilities of the teacher's tokens from ``probs [n, V_s]`` of the student's; differentiable."""
    projected: Tensor = _Project.apply(probs, projection)
    return projected


class _Project(torch.autograd.Function):
    """Autograd's own derivative of a sparse product would transpose the matrix in every backward pass."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, projection: Projection) -> Tensor:
        ctx.projection = projection
        with torch.autocast(probs.device.type, enabled=False):
            return (projection.transposed @ probs.T).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        # A backward pass may run under autocast, for whose bfloat16 there is no sparse product.
        with torch.autocast(upstream.device.type, enabled=False):
            return (ctx.projection.matrix @ upstream.T).T, None
