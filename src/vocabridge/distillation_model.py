"""Everything that is trained, in one module, so that DDP, FSDP and DeepSpeed see every trained parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vocabridge.errors import UserError
from vocabridge.losses.terms import LossTerm
from vocabridge.models.capture import check_layers, decoder_layers
from vocabridge.models.forward import SideForward, forward_side
from vocabridge.models.heads import base_model
from vocabridge.objectives.base import ForwardPair, Objective
from vocabridge.pairs import PairBatch


class NonFiniteLoss(UserError):
    """A loss term became NaN or infinite; training stops instead of going on with ruined weights."""


class DistillationModel(nn.Module):
    """Student and objective (projectors, discriminator). The teacher is frozen and stays outside.

    Raises:
        UserError: the objective reads inner layers that this student does not let be captured.
    """

    accepts_loss_kwargs = True
    """Tells ``transformers.Trainer`` that losses are divided by counts over the whole optimizer step."""

    student: PreTrainedModel
    objective: Objective

    def __init__(self, student: PreTrainedModel, objective: Objective, *, vocab_size: int | None = None):
        super().__init__()
        check_layers(student, objective.layers.student)
        self.student = student
        self.objective = objective
        self.vocab_size = vocab_size

    @property
    def config(self) -> PreTrainedConfig:
        """The student's configuration; DeepSpeed and the trainer read it."""
        return self.student.config

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Delegates to the student, whatever options this release of transformers has."""
        self.student.activation_checkpointing_enable(**options)

    @property
    def _no_split_modules(self) -> list[str]:
        """Accelerate makes each module of these classes a group of FSDP's: the student's layers."""
        return sorted({type(layer).__name__ for layer in decoder_layers(base_model(self.student))})

    def probe(self, batch: PairBatch, teacher_embedding: nn.Module) -> dict[str, float]:
        """The objective's diagnostics on a batch; here, so that FSDP can make the parameters whole for it."""
        return self.objective.probe(batch, self.student.get_input_embeddings(), teacher_embedding)

    def forward(
        self, batch: PairBatch, teacher: SideForward | None, step_counts: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch as its share of the whole optimizer step.

        Args:
            batch: plain tensors of the collator.
            teacher: the teacher's packed supervised positions, or None.
            step_counts: by unit, how many positions the whole optimizer step has over ranks and accumulation, as
                integers: mixed precision would round other numbers.

        Returns:
            The loss (a scalar; without auxiliary terms in eval mode) and, by name, ``[sum, count]`` pairs for the log,
            detached.

        Raises:
            NonFiniteLoss: names the term that is NaN or infinite.
        """
        student = forward_side(
            self.student,
            batch["input_ids"],
            batch["attention_mask"],
            batch["labels"],
            vocab_size=self.vocab_size,
            layers=self.objective.layers.student,
        )
        terms = self.objective(ForwardPair(student, teacher), batch)
        counted = [term for term in terms.values() if self.training or not term.is_auxiliary]
        dtype = tally_dtype(student.labels.device)
        counts = {unit: count.to(dtype) for unit, count in step_counts.items()}
        loss = torch.stack([term.weight * term.sum / counts[term.unit] for term in counted]).sum()
        if not torch.isfinite(loss):
            raise NonFiniteLoss(_name_culprit(terms))
        return loss, _tally(terms)


def tally_dtype(device: torch.device) -> torch.dtype:
    """Float64, so that long sums stay exact, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _tally(terms: Mapping[str, LossTerm]) -> dict[str, Tensor]:
    ratios: dict[str, tuple[Tensor | float, Tensor | float]] = {
        f"loss/{name}": (term.sum, term.count) for name, term in terms.items()
    }
    for term in terms.values():
        ratios |= {name: (ratio.sum, ratio.count) for name, ratio in term.metrics.items()}
    device = next(iter(terms.values())).sum.device
    dtype = tally_dtype(device)
    return {
        name: torch.stack([torch.as_tensor(value).detach().to(device=device, dtype=dtype) for value in pair])
        for name, pair in ratios.items()
    }


def _name_culprit(terms: Mapping[str, LossTerm]) -> str:
    bad = [name for name, term in terms.items() if not torch.isfinite(term.sum)]
    parts = [
        part
        for name in bad
        for part, ratio in terms[name].metrics.items()
        if not torch.isfinite(torch.as_tensor(ratio.sum))
    ]
    detail = f" (in {', '.join(parts)})" if parts else ""
    return (
        f"loss term '{', '.join(bad)}'{detail} is not finite, so training stops; "
        "lower the learning rate, train in float32 or bfloat16 instead of float16, or check the data of this step."
    )
