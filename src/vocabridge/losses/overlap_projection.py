"""Closed-form projections between two hidden spaces, from the head rows of tokens that both vocabularies hold.

A hidden state h' of one model gives its head the logits ``B h' + b`` over n shared tokens. The state x of the other
space whose logits ``A x + a`` come nearest, in least squares, is ``pinv(A) (B h' + b - a)``: an affine map of h', the
start that DSKDv2 (Zhang et al. 2025, arXiv 2504.11426) gives its projectors.

Axis letters: n shared tokens, k width of the space mapped into, m width of the space mapped from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SINGULAR_VALUE_CUTOFF = 1e-6
"""Relative to the largest one. Head rows in float32 or bfloat16 are noise below it."""

_ROWS_AT_ONCE = 8192
"""Float64 copies of ``[n, k]`` exist for so many rows: all of a large head would take gigabytes."""


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """``h' -> weight h' + bias``."""

    weight: Tensor
    """``[k, m]``"""
    bias: Tensor
    """``[k]``"""


def pseudo_inverse_rows(head_rows: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The transposed Moore-Penrose inverse ``[n, k]`` of ``head_rows [n, k]``, which may have any rank.

    Computed in float64 through the ``[k, k]`` Gram matrix: n is tens of thousands where k is hundreds, so that costs
    one matrix product instead of a singular value decomposition of all rows. ``dtype`` is that of the result; float32
    is enough for a result that is kept.
    """
    # Not every accelerator has float64.
    home = torch.device("cpu") if head_rows.device.type == "mps" else head_rows.device
    width = head_rows.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=home)
    for rows in head_rows.detach().split(_ROWS_AT_ONCE):
        exact = rows.to(home, torch.float64)
        gram.addmm_(exact.T, exact)
    # Eigenvalues are squared singular values.
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=SINGULAR_VALUE_CUTOFF**2)
    parts = [rows.to(home, torch.float64) @ inverse for rows in head_rows.detach().split(_ROWS_AT_ONCE)]
    return torch.cat([part.to(head_rows.device, dtype) for part in parts])


def overlap_projection(
    inverse_rows: Tensor, source_rows: Tensor, *, offsets: Tensor | None = None, scale: float = 1.0
) -> AffineMap:
    """The map whose image gives logits nearest those of the source, in the dtype of ``inverse_rows``; no gradient.

    Args:
        inverse_rows: ``[n, k]`` :func:`pseudo_inverse_rows` of the head that will read the image.
        source_rows: ``[n, m]`` head rows of the space mapped from, of the same tokens.
        offsets: ``[n]`` logits to add to ``scale * source_rows h'``: the source's bias less the image's; default 0.
        scale: factor on the source's logits relative to the image's.
    """
    inverse = inverse_rows.T
    source = source_rows.detach().to(inverse.device, inverse.dtype)
    weight = (inverse @ source).mul_(scale)
    bias = inverse.new_zeros(len(inverse)) if offsets is None else inverse @ offsets.detach().to(source)
    return AffineMap(weight, bias)
