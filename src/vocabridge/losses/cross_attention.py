"""Cross-model attention over packed rows: student tokens (queries) attend to teacher tokens (keys) of their example.

Axis letters: B examples, N / M packed student / teacher positions, R_s / R_t positions of the longest example,
F features. Packed tensors are ordered by example, then position; ``rows`` names the example of each position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Padding:
    """Where each packed position stands in the padded [B, R] layout."""

    rows: Tensor
    """[N] example index."""
    columns: Tensor
    """[N] position inside the example."""
    mask: Tensor
    """[B, R] bool, True where a position exists."""

    @classmethod
    def of(cls, rows: Tensor, num_examples: int) -> Padding:
        """Layout of packed positions ``rows [N]`` (sorted) for ``num_examples`` examples."""
        counts = torch.bincount(rows, minlength=num_examples)
        starts = counts.cumsum(0) - counts
        columns = torch.arange(rows.shape[0], device=rows.device) - starts[rows]
        longest = int(counts.max()) if rows.numel() else 0
        mask = torch.arange(longest, device=rows.device)[None, :] < counts[:, None]
        return cls(rows, columns, mask)

    def pad(self, packed: Tensor) -> Tensor:
        """``[N, F] -> [B, R, F]`` with zeros where there is no position."""
        padded = packed.new_zeros(*self.mask.shape, packed.shape[-1])
        return padded.index_put((self.rows, self.columns), packed)

    def pack(self, padded: Tensor) -> Tensor:
        """``[B, R, ...] -> [N, ...]``."""
        return padded[self.rows, self.columns]


def attention_weights(scores: Tensor, key_mask: Tensor) -> Tensor:
    """Softmax of ``scores [B, R_q, R_k]`` over existing keys (``key_mask [B, R_k]`` or ``[B, R_q, R_k]``), in fp32.

    A query without any key gets all-zero weights rather than the uniform attention that an additive mask gives.
    """
    allowed = key_mask if key_mask.dim() == 3 else key_mask[:, None, :]
    promoted = scores if scores.dtype == torch.float64 else scores.float()
    weights = promoted.masked_fill(~allowed, torch.finfo(promoted.dtype).min).softmax(-1)
    return weights.masked_fill(~allowed, 0.0)


def scalar_std(packed: Tensor, rows: Tensor | None, num_examples: int) -> Tensor:
    """One standard deviation (n-1) over all elements of ``packed [N, F]``; with ``rows`` one per example, ``[N, 1]``.

    Per example it does not depend on which examples share the micro-batch, so gradient accumulation and data
    parallelism stay exact; over the whole batch (``rows=None``) it is the published form.
    """
    values = packed if packed.dtype == torch.float64 else packed.float()
    if rows is None:
        return values.std()
    width = values.shape[-1]
    elements = (torch.bincount(rows, minlength=num_examples) * width).clamp(min=2).to(values.dtype)
    mean = values.new_zeros(num_examples).index_add(0, rows, values.sum(-1)) / elements
    squared = (values - mean[rows][:, None]).square().sum(-1)
    variance = values.new_zeros(num_examples).index_add(0, rows, squared) / (elements - 1)
    return variance.sqrt()[rows][:, None]
