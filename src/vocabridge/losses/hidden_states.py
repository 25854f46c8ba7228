"""States of byte-exact chunks, and distances between a projected student state and the teacher's.

Axis letters: N packed positions, C chunks, F features of one model, H_t the teacher's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vocabridge.losses.chunk_rows import Ranges, segment_mean

Pool = Literal["first", "mean"]


def pool_chunks(states: Tensor, ranges: Ranges, pool: Pool) -> Tensor:
    """One state per chunk, ``[N, ...] -> [C, ...]``, in float32 (float64 stays).

    ``first`` takes the chunk's first position, ``mean`` the mean over its positions.
    """
    promoted = states.to(torch.promote_types(states.dtype, torch.float32))
    if pool == "first":
        return promoted[ranges.starts]
    return segment_mean(promoted, ranges.chunks, ranges.starts.shape[0])


def cosine_distance(projected: Tensor, teacher: Tensor) -> Tensor:
    """``[C]`` 1 - cos of ``projected [C, H_t]`` and ``teacher [C, H_t]``, from 0 to 2."""
    return 1.0 - cosine_similarity(projected, teacher, dim=-1)


def relative_squared_distance(projected: Tensor, teacher: Tensor) -> Tensor:
    """``[C]`` squared difference of ``projected`` and ``teacher [C, H_t]``, in units of the teacher's squared norm."""
    scale = teacher.square().mean(-1)
    return (projected - teacher).square().mean(-1) / scale.clamp(min=torch.finfo(scale.dtype).tiny)
