"""What a rank holds between steps: weights, gradients and optimizer states, under data parallelism of four kinds.

With ``P`` parameters of ``b`` bytes (4 in float32), ``P_t`` of them trained, optimizer states of ``s`` bytes (AdamW 8)
and ``W`` ranks:

==========  ============  ===============  =====================  ==================================================
strategy    weights       gradients        optimizer              besides
==========  ============  ===============  =====================  ==================================================
ddp         b P           b P_t            s P_t                  b P_t: buckets of the all-reduce, if W > 1
fsdp2       b P / W       b P_t / W        s P_t / W              2 c (R + 2 L) + 4 max(R, L): what is gathered, its
                                                                  gradients, and a buffer to sum those in float32
zero2       c P           (c + 4) P_t / W  (s + 4) P_t / W        5e8 c: a bucket of gradients
zero3       c P / W       (c + 4) P_t / W  (s + 4) P_t / W        5e8 c, and c min(P, R + 1e9) + c (R + L): what stays
                                                                  gathered, and gradients before they are summed
==========  ============  ===============  =====================  ==================================================

Under FSDP2 ``b`` of what is trained is 4 with ``bf16``, whatever type it was read in: accelerate makes it float32.
``c`` is 2 with ``bf16`` or ``fp16``, else b; ``R`` are the parameters outside the layers, ``L`` those of a layer.
DeepSpeed keeps the trained weights once more in float32 (the 4) and copies gradients to float32 for its step; it fills
a bucket of ``reduce_bucket_size`` (5e8) numbers, however small the model is. ZeRO-3 keeps layers that come again within
``stage3_max_reuse_distance`` (1e9) numbers, and parameters of up to 100,000 numbers for good. FSDP2 cuts each parameter
along its first axis, and the first rank has the larger pieces; that is counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vocabridge.plan.models import PlannedModels, layers_of, num_elements
from vocabridge.plan.optimizer_states import optimizer_state_bytes

Strategy = Literal["ddp", "fsdp2", "zero2", "zero3"]
"""Data parallelism: replicas; torch's sharding; DeepSpeed's, which shards all but the weights, and that of all."""

ZERO_BUCKET = 500_000_000
"""DeepSpeed's default ``reduce_bucket_size``; numbers, as in the next two."""
ZERO_REUSE_DISTANCE = 1_000_000_000
"""Its default ``stage3_max_reuse_distance``."""
ZERO_PERSISTENCE = 100_000
"""Its default ``stage3_param_persistence_threshold``."""
_GATHERED_LAYERS = 2
"""The one that computes and the one that is fetched meanwhile."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How the trained module is spread."""

    strategy: Strategy = "ddp"
    world_size: int = 1
    half: bool = False
    """The forward runs in a type of 2 bytes (``bf16`` or ``fp16``)."""

    @property
    def is_deepspeed(self) -> bool:
        """Whether the engine is DeepSpeed's."""
        return self.strategy in ("zero2", "zero3")

    @property
    def uses_autocast(self) -> bool:
        """Weights keep their type and are cast where they are used; else the module's own type changes."""
        return self.half and self.strategy == "ddp"

    def held_dtype(self, parameter: Tensor) -> torch.dtype:
        """Of a parameter between steps, DeepSpeed apart: with mixed precision accelerate trains float32 under FSDP2."""
        upcast = self.strategy == "fsdp2" and self.half and parameter.requires_grad
        return torch.float32 if upcast else parameter.dtype

    def computed_bytes(self, parameters: Sequence[Tensor]) -> int:
        """Of all these parameters in the type of the forward."""
        return sum(parameter.numel() * (2 if self.half else parameter.itemsize) for parameter in parameters)


def weight_bytes(parameters: Sequence[Tensor], placement: Placement) -> int:
    """Of a rank's part of these parameters of the trained module."""
    if placement.strategy == "zero3":
        persistent = [parameter for parameter in parameters if parameter.numel() <= ZERO_PERSISTENCE]
        pieces = [_flat_piece(parameter, placement.world_size) for parameter in parameters]
        return placement.computed_bytes([*pieces, *persistent])
    if placement.is_deepspeed:
        return placement.computed_bytes(parameters)
    return _stored_bytes(parameters, placement)


def gradient_bytes(trained: Sequence[Tensor], placement: Placement) -> int:
    """Of a rank's gradients, DeepSpeed's copy in float32 for its step included."""
    if placement.is_deepspeed:
        float32 = 4 * num_elements(trained)
        return math.ceil((placement.computed_bytes(trained) + float32) / placement.world_size)
    return _stored_bytes(trained, placement)


def optimizer_bytes(
    trained: Sequence[Tensor], placement: Placement, *, optim: str, optim_args: str | None = None
) -> int:
    """Of a rank's optimizer states, DeepSpeed's float32 weights included.

    Raises:
        UserError: as :func:`vocabridge.plan.optimizer_states.optimizer_state_bytes`.
    """
    if placement.is_deepspeed:  # which flattens all parameters
        flat = torch.empty(math.ceil(num_elements(trained) / placement.world_size), device="meta")
        return flat.nbytes + optimizer_state_bytes([flat], optim, optim_args)
    if placement.strategy == "fsdp2":
        trained = [_first_shard(parameter, placement) for parameter in trained]
    return optimizer_state_bytes(trained, optim, optim_args)


def communication_bytes(models: PlannedModels, placement: Placement) -> int:
    """Of what a rank gathers from the others, and of its buckets for them."""
    trained = models.trained
    if placement.strategy == "ddp":
        return gradient_bytes(trained, placement) if placement.world_size > 1 else 0
    bucket = ZERO_BUCKET * (2 if placement.half else 4)
    if placement.strategy == "zero2":
        return bucket
    everything = [*models.student.parameters(), *models.objective.parameters()]
    layers = [list(layer.parameters()) for layer in layers_of(models.student)]
    inside = {id(parameter) for layer in layers for parameter in layer}
    root = [parameter for parameter in everything if id(parameter) not in inside]
    largest: list[nn.Parameter] = max(layers, key=placement.computed_bytes, default=[])
    if placement.strategy == "zero3":
        kept = min(1.0, (num_elements(root) + ZERO_REUSE_DISTANCE) / max(1, num_elements(everything)))
        gradients = placement.computed_bytes(_trained([*root, *largest]))
        return bucket + math.ceil(kept * placement.computed_bytes(everything)) + gradients
    gathered = [*root, *_GATHERED_LAYERS * largest]
    summed = max(num_elements(_trained(root)), num_elements(_trained(largest)))
    return placement.computed_bytes(gathered) + placement.computed_bytes(_trained(gathered)) + 4 * summed


def _stored_bytes(parameters: Sequence[Tensor], placement: Placement) -> int:
    if placement.strategy == "ddp":
        return sum(parameter.nbytes for parameter in parameters)
    return sum(_first_shard(parameter, placement).nbytes for parameter in parameters)


def held(parameter: Tensor, placement: Placement) -> Tensor:
    """The whole of a parameter in its type between steps, DeepSpeed apart."""
    return parameter.detach().to(placement.held_dtype(parameter))


def _first_shard(parameter: Tensor, placement: Placement) -> Tensor:
    """What rank 0 gets under FSDP2: the first and largest of the pieces along the first axis."""
    whole = held(parameter, placement)
    return whole[: math.ceil(len(whole) / placement.world_size)] if whole.dim() else whole


def _flat_piece(parameter: Tensor, world_size: int) -> Tensor:
    """What each rank gets where parameters are flattened and cut."""
    return parameter.detach().flatten()[: math.ceil(parameter.numel() / world_size)]


def _trained(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.requires_grad]
