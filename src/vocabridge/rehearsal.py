"""What training arguments name is built once on a single number: a setting it refuses shows before anything is written.

``transformers`` builds optimizer, schedule, data loader and gradient checkpointing when training has begun, and what
torch then raises names neither the setting nor the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from vocabridge.errors import UserError, one_line


def rehearse(
    args: TrainingArguments, optimizer_class: type[torch.optim.Optimizer], optimizer_kwargs: Mapping[str, Any]
) -> None:
    """Build everything small and throw it away.

    Args:
        args: training arguments.
        optimizer_class: what they name.
        optimizer_kwargs: what it is given.

    Raises:
        UserError: a part refuses its settings; the message names them.
    """
    if args.fp16 and args.device.type == "cpu":
        raise UserError("training: fp16 is for accelerators; set bf16 instead, or leave it out.")
    with _refusal("optim, optim_args, adam_beta1, adam_beta2 and adam_epsilon"):
        optimizer = optimizer_class([nn.Parameter(torch.zeros(1, device=args.device))], **optimizer_kwargs)
    with _refusal("lr_scheduler_type, lr_scheduler_kwargs and learning_rate"):
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(2),
            num_training_steps=2,
            scheduler_specific_kwargs=_mapping(args.lr_scheduler_kwargs),
        )
    with _refusal("dataloader_num_workers, dataloader_persistent_workers and dataloader_multiprocessing_context"):
        DataLoader(
            [0],  # type: ignore[arg-type]  # a list will do
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
    if args.gradient_checkpointing:
        with _refusal("gradient_checkpointing_kwargs"):
            settings = {"use_reentrant": False} | _mapping(args.gradient_checkpointing_kwargs)
            checkpoint(torch.square, torch.ones(1, requires_grad=True), **settings)


def _mapping(given: Any) -> dict[str, Any]:
    """What ``transformers`` has read by now, though it declares text, too."""
    return dict(given or {})


@contextmanager
def _refusal(keys: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch and transformers raise ValueError, TypeError, AssertionError, ImportError, ...
        raise UserError(
            f"training: {keys}: {one_line(error).rstrip('.')}; change or leave out what does not fit."
        ) from error
