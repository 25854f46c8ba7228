"""Closed-form maps between two embedding spaces, from tokens whose byte strings are identical.

Orthogonal Procrustes (Schoenemann 1966) on centred unit-length vectors, as used for bilingual word embeddings
(Artetxe et al. 2018, arXiv 1805.06297; Conneau et al. 2018, arXiv 1710.04087).
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_centred(vectors: Tensor, center: Tensor) -> Tensor:
    """``(vectors - center)`` scaled to unit length along the last axis; a zero vector stays zero."""
    return torch.nn.functional.normalize(vectors - center, dim=-1)


def orthogonal_map(source: Tensor, target: Tensor) -> Tensor:
    """The matrix ``R [D, d]`` with orthonormal columns (rows if d > D) that brings ``source`` nearest ``target``.

    With ``source [n, d]`` and ``target [n, D]`` it minimises ``sum_i |R s_i - t_i|^2``: R = V U^T, where U S V^T is the
    singular value decomposition of ``source^T target``.
    """
    u, _, vh = torch.linalg.svd(source.double().T @ target.double(), full_matrices=False)
    return (u @ vh).T.to(source.dtype)
