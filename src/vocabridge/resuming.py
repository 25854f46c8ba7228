"""What a resumed run needs beyond ``transformers``' own state, so that its log is the one of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from vocabridge.batching import LengthGroupingTrainer
from vocabridge.checkpoint_contents import check_goes_on
from vocabridge.checkpoint_files import check_whole
from vocabridge.distillation_model import tally_dtype
from vocabridge.step_rows import STEP_ROWS_FILE, check_step_rows, step_rows


class ResumableTrainer(LengthGroupingTrainer):
    """Goes on from whole checkpoints only, in the middle of what is logged as one number, and keeps the best one."""

    _tally: dict[str, Tensor]
    """By name, ``[sum, count]`` since the last line of the log."""
    _epoch_to_end: int | None = None
    """All steps of this epoch are in the resumed checkpoint, and the evaluation at its end is not."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As ``transformers.Trainer.train``.

        Raises:
            UserError: the checkpoint is damaged or was never finished, or the run cannot go on from it exactly.
        """
        if isinstance(resume_from_checkpoint, str):
            checkpoint = Path(resume_from_checkpoint)
            if self.is_world_process_zero():
                check_whole(checkpoint)
            self.check_goes_on(checkpoint)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def check_goes_on(self, checkpoint: Path) -> None:
        """Refuse a checkpoint without the training's state, or from steps of other rows.

        Raises:
            UserError: it is such a one.
        """
        check_goes_on(checkpoint)
        check_step_rows(checkpoint, self._step_rows, self.args)

    @property
    def _step_rows(self) -> dict[str, int]:
        return step_rows(self.args, is_stream=isinstance(self.train_dataset, IterableDataset))

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """The best checkpoint is looked for beside the one that is resumed: the run folder may have been moved.

        An epoch that lacks only the evaluation at its end is not over.
        """
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._epoch_to_end = None
        if resume_from_checkpoint is None:
            return epochs_trained, steps_trained
        if self.state.best_global_step:
            best = Path(resume_from_checkpoint).with_name(f"checkpoint-{self.state.best_global_step}")
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
        step = self.state.global_step
        is_whole = step % num_update_steps_per_epoch == 0
        if (is_whole or step >= max_steps) and lacks_evaluation(self.args, self.state):
            epochs_trained, steps_trained = epochs_trained - is_whole, 0
            self._epoch_to_end = epochs_trained
        return epochs_trained, steps_trained

    def _run_epoch(
        self,
        model: Any,
        epoch: int,
        train_dataloader: Any,
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        trial: Any,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        resume_from_checkpoint: str | None,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
    ) -> None:
        """As in ``transformers``, and only the end of an epoch whose steps are all trained."""
        if epoch != self._epoch_to_end:
            super()._run_epoch(
                model=model,
                epoch=epoch,
                train_dataloader=train_dataloader,
                steps_in_epoch=steps_in_epoch,
                num_update_steps_per_epoch=num_update_steps_per_epoch,
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
                start_time=start_time,
                resume_from_checkpoint=resume_from_checkpoint,
                epochs_trained=epochs_trained,
                steps_trained_in_current_epoch=steps_trained_in_current_epoch,
            )
            return
        self._load_rng_state(resume_from_checkpoint)
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self.control.should_save = True  # or a later start would evaluate once more
        self._maybe_log_save_evaluate(self._tr_loss, None, model, trial, epoch, ignore_keys_for_eval, start_time)

    # The two below are called on every rank, for its own share, and reading comes before the first resumed step.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        window = {
            "world_size": self.args.world_size,
            "last_logged_step": self._globalstep_last_logged,
            "loss": self._tr_loss.item(),
            "terms": {name: pair.tolist() for name, pair in self._tally.items()},
        }
        (Path(output_dir) / self._window_file).write_text(json.dumps(window, indent=2) + "\n", encoding="utf-8")
        if self.args.should_save:
            text = json.dumps(self._step_rows, indent=2) + "\n"
            (Path(output_dir) / STEP_ROWS_FILE).write_text(text, encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not (path := Path(checkpoint) / self._window_file).is_file():
            return  # written by one process and read by several, or the reverse, as below
        window = json.loads(path.read_text(encoding="utf-8"))
        if window.get("world_size", self.args.world_size) != self.args.world_size:
            return  # its sums are shares of other sizes: the first line of the log begins at the checkpoint instead
        self._globalstep_last_logged = window["last_logged_step"]
        self._tr_loss.fill_(window["loss"])
        dtype = tally_dtype(self.args.device)
        self._tally = {
            name: torch.tensor(pair, dtype=dtype, device=self.args.device) for name, pair in window["terms"].items()
        }

    @property
    def _window_file(self) -> str:
        """Sums of the steps since the last line of the log."""
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return f"log_window{rank}.json"


class SaveAgainCallback(TrainerCallback):
    """Writes the checkpoint of an epoch's last step again, with the evaluation that the epoch ends with.

    ``save_strategy: steps`` saves when the step ends, which is before; the best checkpoint would not be known there.
    Where ``max_steps`` cuts an epoch off, the checkpoint stays as it is, for a longer training must go on from it as if
    it had never stopped there.
    """

    def __init__(self) -> None:
        self._saved_step = -1

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the step."""
        self._saved_step = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for another save after the evaluation."""
        is_whole = float(state.epoch or 0).is_integer()
        if is_whole and control.should_evaluate and self._saved_step == state.global_step:
            control.should_save = True


def lacks_evaluation(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a checkpoint of an epoch's last step was written before the evaluation that the epoch ends with.

    So it is when a kill came before :class:`SaveAgainCallback`, or ``max_steps`` cut the epoch off.
    """
    if args.eval_strategy != IntervalStrategy.EPOCH or (state.epoch or 0) < args.eval_delay:
        return False
    entries = [entry for entry in state.log_history if entry.get("step") == state.global_step]
    return not any(name.startswith("eval_") for entry in entries for name in entry)
