"""``torch.compile`` for the two trunks, and for nothing else.

A trunk has one graph without breaks for all numbers and lengths of rows; a batch of a single row and evaluation have
graphs of their own. Accelerate would compile the whole trained module: the objective sorts positions into pairs and
chunks whose numbers differ from batch to batch, and heads run in loops of our own, so that nearly every step would
break the graph anew.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, TorchDynamoPlugin
from torch import nn

from vocabridge.errors import UserError
from vocabridge.models.heads import base_model
from vocabridge.objectives.base import LayerNeeds
from vocabridge.suggest import did_you_mean

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Of backend ``inductor``."""


def check_compilation(backend: str, mode: str | None, device: torch.device) -> None:
    """Early check of ``torch_compile_backend`` and ``torch_compile_mode``; torch would complain at the first batch.

    Raises:
        UserError: an unknown name, a mode without effect, or no C++ compiler where there must be one.
    """
    backends = [each.value.lower() for each in DynamoBackend if each != DynamoBackend.NO]
    if backend not in backends:
        raise _unknown("torch_compile_backend", backend, backends)
    if mode is not None and backend != "inductor":
        raise UserError(f"training.torch_compile_mode has no effect with backend '{backend}'; leave it out.")
    if mode is not None and mode not in _MODES:
        raise _unknown("torch_compile_mode", mode, _MODES)
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if backend == "inductor" and device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"training.torch_compile: backend 'inductor' needs the C++ compiler '{compiler}' on a CPU, which is not "
            "there; install it, name another one in the environment variable CXX, or leave torch_compile out."
        )


def take_over_compilation(accelerator: Accelerator, layers: LayerNeeds, *, is_asked: bool) -> None:
    """Keep ``accelerator`` from compiling the whole module.

    Args:
        accelerator: not yet given a model.
        layers: inner layers that the objective reads.
        is_asked: ``training.torch_compile``.

    Raises:
        UserError: compilation was asked for in a way, or together with something, that is not supported.
    """
    if not is_asked:
        if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise UserError(
                "accelerate is set to compile whole models (dynamo_backend); switch that off and set "
                "training.torch_compile: true, which compiles the two trunks."
            )
        return
    if layers.student or layers.teacher:
        # Hooks that come and go with each batch are not seen by a compiled module.
        raise UserError(
            "training.torch_compile: the objective reads inner layers, which a compiled model does not show; leave "
            "torch_compile out."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError("training.torch_compile cannot be used with FSDP or DeepSpeed; leave one of them out.")
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")


def compile_trunks(models: Sequence[nn.Module | None], backend: str, mode: str | None) -> None:
    """Compile everything below the heads of causal language models, in place and once; state dicts keep their names."""
    for model in models:
        trunk = None if model is None else base_model(model).get_decoder()
        if trunk is not None and trunk._compiled_call_impl is None:
            trunk.compile(backend=backend, mode=mode, dynamic=True)


def _unknown(field: str, given: str, known: list[str] | tuple[str, ...]) -> UserError:
    return UserError(f"training.{field}: '{given}' is unknown{did_you_mean(given, known)}. Known: {', '.join(known)}.")
