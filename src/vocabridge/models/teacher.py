"""Where the teacher's signal comes from, hidden behind one call."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from vocabridge.models.capture import NO_LAYERS, LayerRequest, check_layers
from vocabridge.models.forward import SideForward, check_head, teacher_side
from vocabridge.pairs import PairBatch


class TeacherSignal(Protocol):
    """Anything that gives the teacher's supervised positions for a batch."""

    @property
    def embedding(self) -> nn.Module:
        """The input embeddings."""
        ...

    def to(self, device: torch.device) -> None:
        """Move what is needed of the model."""
        ...

    def check(self, batch: PairBatch) -> None:
        """Start-up check on a small batch; raises a ``UserError``."""
        ...

    def __call__(self, batch: PairBatch) -> SideForward:
        """The packed supervised positions of the batch's teacher side, without gradient."""
        ...


class LiveTeacher:
    """A frozen model that runs for every batch, in its own dtype and on its own device.

    Args:
        model: a causal language model; becomes frozen and stays in eval mode.
        vocab_size: rows of the head to keep; see :func:`vocabridge.models.heads.output_head`.
        layers: inner layers to capture in every forward.

    Raises:
        UserError: the model does not let these layers be captured.
    """

    def __init__(self, model: PreTrainedModel, *, vocab_size: int | None = None, layers: LayerRequest = NO_LAYERS):
        check_layers(model, layers)
        self.model = model.eval().requires_grad_(False)
        self.vocab_size = vocab_size
        self.layers = layers

    @property
    def embedding(self) -> nn.Module:
        """The input embeddings."""
        return self.model.get_input_embeddings()

    def to(self, device: torch.device) -> None:
        """Move the model, unless it is quantised or already spread over devices."""
        place(self.model, device)

    def check(self, batch: PairBatch) -> None:
        """Compare the head with the model's own logits on a small batch; see :func:`check_head`.

        Raises:
            UserError: they differ, or the model looks ahead.
        """
        check_head(
            self.model,
            batch["teacher_input_ids"],
            batch["teacher_attention_mask"],
            batch["teacher_labels"],
            vocab_size=self.vocab_size,
        )

    def __call__(self, batch: PairBatch) -> SideForward:
        """Run the trunk on the teacher's tokens; autocast of the student's training does not reach it."""
        device = batch["teacher_input_ids"].device
        with torch.autocast(device.type, enabled=False):
            return teacher_side(
                self.model,
                batch["teacher_input_ids"],
                batch["teacher_attention_mask"],
                batch["teacher_labels"],
                vocab_size=self.vocab_size,
                layers=self.layers,
            )


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model, unless it is quantised or already spread over devices."""
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        nn.Module.to(model, device)
