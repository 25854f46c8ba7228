"""Which type the weights get where ``dtype: auto`` leaves it open: the checkpoint's own, if the device is fast in it.

Measured on one core of an AMD EPYC with AVX512-BF16 (trunk of Gemma-3-270M, 4 rows of 256 tokens): bfloat16 takes 0.53
of float32's time with these instructions, and 1.9 times float32's without them.
"""

from __future__ import annotations

import functools
import logging

import torch

logger = logging.getLogger(__name__)


def fast_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of the checkpoint, or float32 where the device would have to imitate it.

    Args:
        stored: what the checkpoint's weights are.
        device: where the model will run.
    """
    if stored == torch.bfloat16 and not has_bfloat16(device):
        return torch.float32
    if stored == torch.float16 and device.type == "cpu":
        return torch.float32
    return stored


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; of processors, those with AVX512-BF16 or AMX."""
    if device.type == "cpu":
        return any(_processor_has(name) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def _processor_has(probe: str) -> bool:
    """Ask a probe of ``torch.cpu``; they are private, so another release may have none."""
    ask = getattr(torch.cpu, probe, None)
    return ask is not None and bool(ask())


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


@functools.cache  # a recipe loads the same model more than once
def tell_choice(model: str, stored: torch.dtype, chosen: torch.dtype, device_type: str) -> None:
    """Log once which type a model with ``dtype: auto`` got."""
    if stored == chosen:
        logger.info("'%s': dtype auto is %s, the checkpoint's own", model, dtype_name(chosen))
        return
    logger.warning(
        "'%s': the checkpoint is %s, for which this machine's %s has no fast instructions, so dtype auto is %s; "
        "set dtype: %s to save memory instead of time",
        model,
        dtype_name(stored),
        device_type,
        dtype_name(chosen),
        dtype_name(stored),
    )
