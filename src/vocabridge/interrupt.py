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
    """The first SIGINT or SIGTERM asks for a checkpoint and a stop after the running step, and what is due after it.

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
        """Ask the trainer to save and stop; with several processes, as soon as one of them was told to.

        At the end of an epoch the stop can wait for :meth:`on_epoch_end`: no later start would make up for what is
        logged, evaluated and remembered as the best there.
        """
        if not _ends_epoch(state, control):
            self._stop_if_told(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after the epoch's evaluation, with a checkpoint that knows it.

        In the middle of an epoch, where the trainer calls this after a stop as well, the checkpoint is there already,
        and what an epoch ends with is left to the later start.
        """
        if self.interrupted:
            control.should_log = control.should_evaluate = control.should_save = False
        else:
            self._stop_if_told(args, control)

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


def _ends_epoch(state: TrainerState, control: TrainerControl) -> bool:
    """Whether this step is an epoch's last one, or training's."""
    is_whole = state.epoch is not None and float(state.epoch).is_integer()
    return is_whole or control.should_epoch_stop or control.should_training_stop
