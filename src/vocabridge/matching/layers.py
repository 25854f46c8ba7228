"""What the learned matching terms share: gradients scaled or reversed on the way back, and the highway layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by ``scale`` (Ganin & Lempitsky 2015, arXiv 1409.7495, with -scale)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.scale * grads[0], None


def scale_gradient(values: Tensor, scale: float) -> Tensor:
    """Identity forward, gradient times ``scale`` backward."""
    return _ScaleGradient.apply(values, scale)


def reverse_gradient(values: Tensor, scale: float) -> Tensor:
    """Identity forward, gradient times ``-scale`` backward."""
    return scale_gradient(values, -scale)


def highway(features: Tensor, layer: nn.Module) -> Tensor:
    """``s * relu(h) + (1 - s) * x`` for ``x [N, F]`` with ``h = layer(x) [N, F]`` and the gate ``s = sigmoid(h)``."""
    mixed = layer(features)
    gate = mixed.sigmoid()
    return gate * mixed.relu() + (1 - gate) * features
