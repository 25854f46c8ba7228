"""Ctrl-C and preemption: finish the optimizer step, save, leave cleanly."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class InterruptCallback(TrainerCallback):
    """The first SIGINT or SIGTERM asks for a checkpoint and a stop after the running step; a second stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the two signals (only possible in the main thread)."""
        self.interrupted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous.setdefault(number, signal.signal(number, self._handle))
            except ValueError:
                logger.info("not in the main thread: signals are left alone")
                return

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to save and stop; with several processes, as soon as one of them was told to."""
        if args.world_size > 1:
            flag = torch.tensor(float(self.interrupted), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(flag.item())
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The checkpoint is written already; an epoch's own evaluation and saving would come in the middle of it."""
        if self.interrupted:
            control.should_save = False
            control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back."""
        self.restore()

    def restore(self) -> None:
        """Give the signals back; also called when training ends by an exception."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            self.restore()
            raise KeyboardInterrupt
        self.interrupted = True
        logger.warning("stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once")
