"""DeepSpeed's ZeRO-3: which weights are whole and when.

ZeRO-3 gathers a module's weights while that module is called. Heads in chunks read theirs outside of any call, and
objectives call their parts as the data of a rank ask for it, where all ranks must gather alike. So everything outside
the decoder layers belongs to the call of :class:`~vocabridge.distillation_model.DistillationModel`, as under FSDP2: it
is whole from a batch's forward pass to the end of its backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from vocabridge.distillation_model import DistillationModel
from vocabridge.models.capture import decoder_layers
from vocabridge.models.heads import base_model


def load_models_whole() -> None:
    """Let ``from_pretrained`` give every process whole models; ZeRO-3's settings would cut up the teacher, too."""
    unset_hf_deepspeed_config()


def tell_deepspeed_of_cpu(device: torch.device) -> None:
    """Spare every training on a CPU a warning: accelerate imports DeepSpeed, if it is there, to know its models."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def prepare_for_zero3(model: DistillationModel) -> None:
    """Tell ZeRO-3, before it takes the model over, that the model's forward reads all that is outside of the layers.

    It would use a gradient again in a step where its parameter gets none, as a discriminator in the student's turn. So
    every learned part of the objective gets one, of zeros if need be.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for parameter in root_parameters(model):
        register_external_parameter(model, parameter)
    learned = [parameter for parameter in model.objective.parameters() if parameter.requires_grad]
    model.register_forward_hook(lambda _module, _given, result: (_Reached.apply(result[0], *learned), result[1]))


class _Reached(torch.autograd.Function):
    """The loss as it is, with gradients of zeros for parameters."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [parameter.shape for parameter in parameters]
        ctx.zeros = [parameter.new_zeros(()) for parameter in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        return (upstream, *(zero.expand(shape) for zero, shape in zip(ctx.zeros, ctx.shapes, strict=True)))


def leave_objective_alone(engine: Any, model: DistillationModel) -> None:
    """Take back what ZeRO-3 hung onto the modules of the objective, whose weights are whole without it.

    Args:
        engine: DeepSpeed's, around ``model``.
        model: the trained module.
    """
    offload = engine.optimizer.parameter_offload
    of_objective = {
        id(hooks)
        for module in model.objective.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    }
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        if id(handle.hooks_dict_ref()) in of_objective:
            handle.remove()


def root_parameters(model: DistillationModel) -> list[nn.Parameter]:
    """Embeddings, head, norms outside of layers, projectors and discriminator."""
    in_layers = {
        id(parameter) for layer in decoder_layers(base_model(model.student)) for parameter in layer.parameters()
    }
    return [parameter for parameter in model.parameters() if id(parameter) not in in_layers]


def is_in_zero_pieces(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has taken a parameter over."""
    return hasattr(parameter, "ds_id")


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Parameters that ZeRO-3 holds in pieces are whole inside the context, to be read; all ranks must enter it."""
    from deepspeed.runtime.zero import GatheredParameters

    return cast(AbstractContextManager[None], GatheredParameters(parameters))
