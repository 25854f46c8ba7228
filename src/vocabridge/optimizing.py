"""Which parameters learn at which rate, and how their gradients are clipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from vocabridge.checkpointing import CheckpointingTrainer
from vocabridge.errors import UserError, one_line
from vocabridge.rehearsal import rehearse
from vocabridge.training_arguments import DistillationConfig


class OptimizingTrainer(CheckpointingTrainer):
    """A trainer in which student, projectors and discriminator have learning rates of their own."""

    args: DistillationConfig

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Named groups: student, projectors, discriminator, each with and without weight decay.

        Raises:
            UserError: an optimizer that builds its own parameter groups.
        """
        if self.optimizer is None:
            trained = cast(nn.Module, self.model if model is None else model)
            optimizer_class, kwargs = self.named_optimizer(trained)
            self.optimizer = optimizer_class(self.grouped_parameters(trained, kwargs), **kwargs)
        return self.optimizer

    def named_optimizer(self, model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """The class that ``optim`` names, and what it is given.

        Raises:
            UserError: it cannot be had, or builds its own parameter groups.
        """
        try:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, model))
        except (ValueError, ImportError, TypeError, KeyError) as error:
            raise UserError(f"training.optim: {one_line(error).rstrip('.')}; or name another optimizer.") from error
        is_plain = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
        if not is_plain or {"params", "model", "optimizer_dict"} & set(kwargs):
            raise UserError(
                f"training.optim: '{self.args.optim}' builds its own parameter groups and would miss the "
                "projectors' learning rates; use an AdamW, Adafactor or SGD variant."
            )
        return optimizer_class, kwargs

    def check_arguments(self) -> None:
        """Build what the training arguments name once, small; nothing has been written by then.

        Raises:
            UserError: a part refuses its settings.
        """
        if not self.is_deepspeed_enabled:  # which builds its own
            rehearse(self.args, *self.named_optimizer(cast(nn.Module, self.model)))

    def grouped_parameters(self, model: nn.Module, optimizer_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The optimizer's groups, by kind and by whether weights decay.

        Args:
            model: all that is trained.
            optimizer_kwargs: what the optimizer is given besides.
        """
        names = {id(p): name for name, ps in self.objective_module.parameter_groups().items() for p in ps}
        projector_rate = self.args.projector_learning_rate
        projector_rate = self.args.learning_rate if projector_rate is None else projector_rate
        discriminator_rate = self.args.discriminator_learning_rate
        rates = {
            "student": self.args.learning_rate,
            "projectors": projector_rate,
            "discriminator": projector_rate if discriminator_rate is None else discriminator_rate,
        }
        # Momentum makes the two-player game circle: on shifted Gaussians MMD^2 fell from 0.33 to 0.02 with these
        # betas and rose to 0.54 with AdamW's own.
        takes_betas = "betas" in optimizer_kwargs and "schedule_free" not in self.args.optim
        special = {"discriminator": {"betas": (0.0, 0.9)}} if takes_betas else {}
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            kind, decays = names.get(id(parameter), "student"), name in decayed
            group = groups.setdefault(
                (kind, decays),
                {
                    "params": [],
                    "lr": rates[kind],
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                    "name": kind,
                    **special.get(kind, {}),
                },
            )
            group["params"].append(parameter)
        return list(groups.values())

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clips the discriminator on its own: its gradient, at full rate, must not shrink the student's."""
        discriminator = self.objective_module.parameter_groups().get("discriminator", [])
        if not discriminator or self.is_deepspeed_enabled:  # DeepSpeed clips all together inside its step
            return super()._clip_grad_norm(model)
        own = {id(parameter) for parameter in discriminator}
        others = [parameter for parameter in model.parameters() if id(parameter) not in own]
        norm = self.accelerator.clip_grad_norm_(others, self.args.max_grad_norm)  # also unscales all under fp16
        nn.utils.clip_grad_norm_(discriminator, self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
