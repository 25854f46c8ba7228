"""Bytes of an optimizer's states, by its name in ``training.optim``.

An optimizer of PyTorch or transformers takes one step on parameters without memory; what it then holds is counted, its
step numbers included: AdamW has 8 bytes a parameter in float32, Adafactor a row and a column of each matrix, SGD
without momentum nothing. Those of bitsandbytes and torchao need their package, and a GPU, so they have a formula: ``b``
bits a number and a float32 scale for each 256 of them; tensors of fewer than 4,096 numbers stay in float32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from vocabridge.errors import UserError

_BLOCK = 256
_SMALLEST_QUANTIZED = 4096

_NUM_STATES = {"lion": 1, "rmsprop": 1, "ademamix": 3, "adamw": 2}
"""Of a parameter, by what the name of an optimizer of bitsandbytes or torchao holds."""

_BITS = {"4bit": 4, "8bit": 8, "32bit": 32}
_WITHOUT_BITS = ("rmsprop_bnb", "ademamix", "paged_ademamix")


def optimizer_state_bytes(parameters: Sequence[Tensor], optim: str, optim_args: str | None = None) -> int:
    """Bytes that the optimizer holds for these parameters after its first step.

    Args:
        parameters: of which shapes and types matter, such as those of a rank.
        optim: its name.
        optim_args: as in ``training.optim_args``.

    Raises:
        UserError: an unknown optimizer, or one whose package is not installed.
    """
    bits = next((bits for ending, bits in _BITS.items() if optim.endswith(ending)), None)
    if optim in _WITHOUT_BITS or (bits is not None and "galore" not in optim):
        return sum(_packed_bytes(parameter.numel(), optim, bits or 32) for parameter in parameters)
    # States follow from shape and type, and a model has few of these, so one parameter stands for its likes.
    alike = Counter((tuple(parameter.shape), parameter.dtype) for parameter in parameters)
    optimizer = _optimizer(
        [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in alike], optim, optim_args
    )
    optimizer.step()
    total = 0
    for parameter, state in optimizer.state.items():
        size = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
        total += size * alike[tuple(parameter.shape), parameter.dtype]
    return total


def _packed_bytes(num_elements: int, optim: str, bits: int) -> int:
    num_states = next(number for name, number in _NUM_STATES.items() if name in optim)
    if bits == 32 or num_elements < _SMALLEST_QUANTIZED:
        return 4 * num_states * num_elements
    return num_states * (math.ceil(num_elements * bits / 8) + 4 * math.ceil(num_elements / _BLOCK))


def _optimizer(parameters: Sequence[Tensor], optim: str, optim_args: str | None) -> torch.optim.Optimizer:
    try:
        arguments = TrainingArguments(
            output_dir="unused", optim=optim, optim_args=optim_args, use_cpu=True, report_to="none"
        )
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, ImportError) as error:
        raise UserError(f"training.optim: {error}") from error
    options = {name: value for name, value in options.items() if name != "fused"}  # a kernel, with the same states
    trained = [nn.Parameter(value) for value in parameters]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    made: torch.optim.Optimizer = optimizer_class(trained, **options)
    return made
