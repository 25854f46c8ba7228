"""What autograd keeps of a trunk until the backward pass, found by running it on tensors without memory.

The trunk runs as in training, with its real shapes, types and attention kernel, under PyTorch's fake tensors: every
operation is recorded, none is computed. What the graph then holds, parameters apart, is what training holds. It is a
straight line in the number of rows, ``constant + rows * per_row``, so two runs tell all.

For orientation, a Llama layer with ``T`` tokens, width ``H``, ``A`` heads of width ``D`` and inner width ``F`` keeps
about ``T (6 H + 4 A D + 4 F)`` numbers, which ``tests/plan/test_activations.py`` counts.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from vocabridge.models.capture import decoder_layers
from vocabridge.models.forward import position_ids
from vocabridge.models.heads import base_model

logger = logging.getLogger(__name__)

_ROWS = (2, 3)
"""Not 1, for which some models have a path of its own."""


@dataclass(frozen=True, slots=True)
class TrunkActivations:
    """Bytes that a trunk keeps for rows of one length."""

    per_row: int
    constant: int
    """Whatever the rows: weights that autocast has cast to a narrower type, which the graph holds, too."""


@functools.lru_cache(maxsize=16)
def trunk_activations(
    model: nn.Module, length: int, *, autocast: bool = False, weights: torch.dtype | None = None
) -> TrunkActivations | None:
    """What the trunk of ``model`` keeps without gradient checkpointing.

    Args:
        model: a causal language model on any device, wrapped by PEFT or not; dropout is as its mode says.
        length: tokens of a row, padding included.
        autocast: it runs under autocast to bfloat16.
        weights: type that its weights have while it runs; none leaves them.

    Returns:
        None for a model whose forward depends on values, as that of a mixture of experts does.
    """
    try:
        first, second = (_kept_bytes(model, rows, length, autocast=autocast, weights=weights) for rows in _ROWS)
    except Exception as error:  # whatever a family's code does without values
        _tell(model, error)
        return None
    per_row = (second - first) // (_ROWS[1] - _ROWS[0])
    return TrunkActivations(per_row, max(0, first - _ROWS[0] * per_row))


@functools.lru_cache(maxsize=16)
def layer_activations(model: nn.Module, length: int) -> int | None:
    """Bytes that the first layer of ``model`` would keep for a row, which is about what it holds while it runs.

    Args:
        model: as for :func:`trunk_activations`.
        length: tokens of a row.

    Returns:
        None where the layer depends on values, or where it is not known where the layers lie.
    """
    rows, kept = _ROWS[0], _Kept()
    before: list[int] = []

    def start(*_: object) -> None:
        before.append(kept.num_bytes)

    def stop(*_: object) -> None:
        raise _FirstLayerDone

    try:
        layer = decoder_layers(base_model(model))[0]
        with layer.register_forward_pre_hook(start), layer.register_forward_hook(stop):
            _run(model, rows, length, kept)
    except _FirstLayerDone:
        return (kept.num_bytes - before[0]) // rows
    except Exception as error:  # as above
        _tell(model, error)
        return None
    raise AssertionError("a trunk runs its first layer")


class _FirstLayerDone(Exception):
    """Ends a run after its first layer."""


def _tell(model: nn.Module, error: Exception) -> None:
    logger.info("%s cannot be run without values: %s", type(base_model(model)).__name__, error)


class _Kept:
    """Storages that a graph holds, each once."""

    def __init__(self) -> None:
        self._storages: dict[int, UntypedStorage] = {}
        self.own: set[int] = set()
        """Those of parameters and buffers, which do not count."""

    def keep(self, tensor: Tensor) -> Tensor:
        """As a hook for saved tensors."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage  # held, so that no other one takes its place
        return tensor

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(storage.nbytes() for key, storage in self._storages.items() if key not in self.own)


def _kept_bytes(model: nn.Module, rows: int, length: int, *, autocast: bool, weights: torch.dtype | None) -> int:
    kept = _Kept()
    _run(model, rows, length, kept, autocast=autocast, weights=weights)
    return kept.num_bytes


def _run(
    model: nn.Module,
    rows: int,
    length: int,
    kept: _Kept,
    *,
    autocast: bool = False,
    weights: torch.dtype | None = None,
) -> None:
    trunk = base_model(model).get_decoder()
    with _without_tracebacks(), FakeTensorMode(allow_non_fake_inputs=True):
        parameters = {name: _unreal(value, weights) for name, value in trunk.named_parameters()}
        buffers = {name: _unreal(value, None) for name, value in trunk.named_buffers()}
        kept.own = {value.untyped_storage()._cdata for value in chain(parameters.values(), buffers.values())}
        input_ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones_like(input_ids)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": position_ids(mask),
            "use_cache": False,
        }
        hooks = saved_tensors_hooks(kept.keep, lambda tensor: tensor)
        with torch.enable_grad(), hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            functional_call(trunk, (parameters, buffers), kwargs=inputs)


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """PyTorch logs one for an operation without a rule for shapes, and then raises what is dealt with here."""
    torch_log = logging.getLogger(FakeTensorMode.__module__)
    before, torch_log.disabled = torch_log.disabled, True
    try:
        yield
    finally:
        torch_log.disabled = before


def _unreal(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """One of the same shape without memory, on the processor: on ``meta`` attention has no kernel of its own."""
    dtype = tensor.dtype if dtype is None else dtype
    return torch.empty(tensor.shape, dtype=dtype, device="cpu").requires_grad_(tensor.requires_grad)
