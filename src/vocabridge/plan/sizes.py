"""Sizes of memory as a user writes them, and the memory of this machine's accelerator."""

from __future__ import annotations

import re

import torch

from vocabridge.errors import UserError

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?")


def parse_size(text: str, *, option: str) -> int:
    """``80GB`` -> 80,000,000,000 bytes; ``80GiB`` has 1,024 where ``80GB`` has 1,000.

    Args:
        text: a number and a unit: B, kB, MB, GB, TB, KiB, MiB, GiB or TiB; the B may be left out.
        option: what to call it in the error.

    Raises:
        UserError: it is no size, or 0.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    size = int(float(match[1]) * _FACTORS[match[2]]) if match and match[2] in _FACTORS else 0
    if size < 1:
        raise UserError(f"{option}: '{text}' is no size of memory; write a number and a unit, such as 80GB or 24GiB.")
    return size


def accelerator_memory() -> int | None:
    """Bytes of the first CUDA device of this machine, or None."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
