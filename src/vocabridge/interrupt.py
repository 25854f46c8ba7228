"""Ctrl-C and preemption during training: finish the optimizer step, save, leave cleanly."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vocabridge.preemption import Preempted

logger = logging.getLogger(__name__)


class InterruptCallback(TrainerCallback):
    """The first SIGINT or SIGTERM asks for a checkpoint and a stop after the running step.

    A second SIGINT stops at once; a second SIGTERM is ignored, because launchers and schedulers both send one.
    """

    def __init__(self) -> None:
        self.interrupted = False
        """Training was stopped before its end, after a checkpoint."""
        self.preempted = False
        """The signal was SIGTERM."""
        self._signalled = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the two signals (only possible in the main thread)."""
        self.interrupted = self.preempted = self._signalled = False
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous.setdefault(number, signal.signal(number, self._handle))
            except ValueError:
                logger.info("not in the main thread: signals are left alone")
                return

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to save and stop; with several processes, as soon as one of them was told to."""
        self._stop_if_told(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The checkpoint may be there already; an epoch's own evaluation and saving would come in the middle of it."""
        if self.interrupted:
            control.should_save = False
        else:  # the signal may have come after the epoch's last step, while that was evaluated or saved
            self._stop_if_told(args, control)
        if self.interrupted:
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

    def raise_late(self) -> None:
        """Raise for a signal that came when no step was left to stop after.

        Raises:
            Preempted: it was SIGTERM.
            KeyboardInterrupt: it was SIGINT.
        """
        if self._signalled and not self.interrupted:
            raise Preempted if self.preempted else KeyboardInterrupt

    def _stop_if_told(self, args: TrainingArguments, control: TrainerControl) -> None:
        if args.world_size > 1:
            flags = torch.tensor([self._signalled, self.preempted], dtype=torch.float32, device=args.device)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            self._signalled, self.preempted = map(bool, flags.tolist())
        if self._signalled:
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGTERM:
            return
        if self._signalled:
            self.restore()
            raise KeyboardInterrupt
        self._signalled, self.preempted = True, number == signal.SIGTERM
        again = "" if self.preempted else "; press Ctrl-C again to stop at once"
        logger.warning("stopping after this step and saving a checkpoint%s", again)
