"""How a trainer writes and reads checkpoints: whole or not at all, on any number of processes, under any engine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from vocabridge.checkpoint_contents import DEEPSPEED_FILE, check_goes_on
from vocabridge.checkpoint_files import last_whole_checkpoint, retire
from vocabridge.distillation_model import DistillationModel
from vocabridge.durable import write_in_one_piece
from vocabridge.errors import UserError
from vocabridge.hub import upload_run
from vocabridge.metrics_log import METRICS_FILE
from vocabridge.objectives.base import Objective
from vocabridge.resuming import ResumableTrainer
from vocabridge.saving import STAGING, finish_publishing, load_parts, publish, save_parts, staged_folder
from vocabridge.sharded_state import gather_optimizer, gather_weights, load_optimizer, load_weights
from vocabridge.sharding import is_sharded


class CheckpointingTrainer(ResumableTrainer):
    """A trainer of a :class:`DistillationModel` that saves students a user can load, beside what a resumption needs."""

    student_tokenizer: PreTrainedTokenizerBase
    _staging: Path | None = None
    _failure: Exception | None = None

    @property
    def distillation_model(self) -> DistillationModel:
        """The unwrapped module that is trained."""
        return cast(DistillationModel, self.accelerator.unwrap_model(self.model))

    @property
    def student(self) -> PreTrainedModel:
        """The student."""
        return self.distillation_model.student

    @property
    def objective_module(self) -> Objective:
        """The objective with its learned parts (``Trainer.objective`` is something else: the sweep's metric)."""
        return self.distillation_model.objective

    @property
    def is_engine_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed trains, so that not every rank has all that it would need to run alone."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def is_zero3(self) -> bool:
        """Whether DeepSpeed holds the weights themselves in pieces."""
        return bool(self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3)

    @property
    def is_engine_running(self) -> bool:
        """Whether FSDP or DeepSpeed has taken the model over already, which they do when training starts."""
        return is_sharded(cast(nn.Module, self.model)) if self.is_fsdp_enabled else self.deepspeed is not None

    # --- find ---------------------------------------------------------------------------------------------------------

    def checkpoint_to_resume(self, given: str | os.PathLike[str] | bool | None) -> str | None:
        """The folder that ``resume_from_checkpoint`` means; of True the last whole one of ``output_dir``.

        Raises:
            UserError: there is none, or none is whole.
        """
        if not isinstance(given, bool):
            return None if given is None else os.fspath(given)
        found = [self._on_first(self._last_whole_checkpoint) if given else None]
        broadcast_object_list(found)  # the first rank looks for all, for it reads the files from end to end
        return found[0]

    def _last_whole_checkpoint(self) -> str:
        run_dir = Path(str(self.args.output_dir))
        finish_publishing(run_dir)
        checkpoint = last_whole_checkpoint(run_dir)
        if checkpoint is None:
            raise UserError(f"{run_dir} has no checkpoint to resume from; name one, or start anew without.")
        return str(checkpoint)

    # --- write --------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``transformers.Trainer.save_model``, but whole under every engine; uploaded with ``push_to_hub``.

        Raises:
            UserError: it cannot be written, or was written and cannot be uploaded.
        """
        if self.is_engine_sharded:
            in_pieces = (self.is_fsdp_enabled or self.is_zero3) and self.is_engine_running
            model, keep = self.distillation_model, self.args.should_save
            self._save(output_dir, gather_weights(model, device=self.args.device, keep=keep) if in_pieces else None)
        else:
            super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            folder = Path(str(output_dir or self.args.output_dir))
            self._on_first(lambda: upload_run(folder, self.args, commit_message="Model save"))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in ``transformers``, but of the run folder only what :mod:`vocabridge.hub` uploads, and no new card.

        Returns:
            The commit's address; None on other ranks than the first.

        Raises:
            UserError: it cannot be uploaded, or something is asked for that is not done.
        """
        if kwargs or not blocking:
            raise UserError(
                "push_to_hub uploads the run folder as it is, before it returns: leave 'blocking' out, and what is "
                "for a model card, too; write README.md in the run folder instead."
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        return self._on_first(
            lambda: upload_run(
                Path(str(self.args.output_dir)),
                self.args,
                commit_message=commit_message,
                token=token,
                revision=revision,
                private=private,
            )
        )

    def _on_first(self, make: Callable[[], str]) -> str | None:
        made: list[str] = []
        first = self.is_world_process_zero()
        on_all_ranks(self.args, lambda: made.append(make()) if first else None)
        return made[0] if made else None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: ``transformers`` would pickle its arguments, and upload folders that are renamed meanwhile."""

    def save_state(self) -> None:
        """As its base, which writes in place: a link of the file's name must not be followed."""
        if self.args.should_save:
            (Path(str(self.args.output_dir)) / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super().save_state()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Student as a Hugging Face checkpoint, learned parts and tokenizer beside it; no pickled arguments."""
        folder = Path(str(output_dir or self.args.output_dir))
        if not self.args.should_save:
            return
        if self._staging is None:
            with staged_folder(folder) as staging:
                self._write_parts(staging, state_dict)
                publish(staging, folder)
            return
        try:
            self._write_parts(folder, state_dict)
        except (OSError, SafetensorError, UserError) as error:
            # Other ranks go on to steps that need this one; the failure is told when all are done.
            self._failure = error

    def _write_parts(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_parts(self.student, self.objective_module, folder, state_dict)
        self.student_tokenizer.save_pretrained(str(folder))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written aside by all ranks, then renamed by the first: a kill or a full disk leaves no torn checkpoint."""
        run_dir = Path(super()._get_output_dir(trial))
        staging = run_dir / STAGING
        with ExitStack() as stack:
            first = self.args.should_save
            on_all_ranks(self.args, lambda: stack.enter_context(staged_folder(run_dir)) if first else None)
            on_all_ranks(self.args, lambda: self._write_checkpoint(staging, model, trial))
            on_all_ranks(self.args, lambda: self._publish_checkpoint(staging, run_dir))

    def _write_checkpoint(self, staging: Path, model: nn.Module, trial: Any) -> None:
        self._staging, self._failure = staging, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self._failure is not None:
            raise self._failure

    def _publish_checkpoint(self, staging: Path, run_dir: Path) -> None:
        self._leave_staging(staging, run_dir)
        if self.args.should_save:
            publish(staging, run_dir)
            retire(
                run_dir,
                staging,
                newest=f"checkpoint-{self.state.global_step}",
                limit=self.args.save_total_limit,
                best=self.state.best_model_checkpoint,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _leave_staging(self, staging: Path, run_dir: Path) -> None:
        """The state inside the checkpoint must name the best checkpoint where it will be, not where it was made."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = str(run_dir / Path(best).name)
        elif best is None and self.state.best_global_step:
            candidate = run_dir / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(candidate) if candidate.exists() else None
        if self.args.should_save:
            for folder in staging.glob("checkpoint-*"):
                self.state.save_to_json(str(folder / "trainer_state.json"))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Whole under FSDP too; DeepSpeed writes its own format."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        keep, optimizer = self.args.should_save, cast(torch.optim.Optimizer, self.optimizer)
        state = gather_optimizer(optimizer, device=self.args.device, keep=keep)
        if keep:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(cast(LRScheduler, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    # --- read ---------------------------------------------------------------------------------------------------------

    def check_engine_of(self, checkpoint: Path) -> None:
        """Refuse a checkpoint whose optimizer state this run's engine cannot read.

        Raises:
            UserError: DeepSpeed wrote it and does not train now, or the reverse, or it has other pieces now.
        """
        by_deepspeed = (checkpoint / DEEPSPEED_FILE).is_file()
        if by_deepspeed != bool(self.is_deepspeed_enabled):
            raise UserError(
                f"{checkpoint} was written {'under' if by_deepspeed else 'without'} DeepSpeed, and its optimizer state "
                "cannot be read otherwise; resume with the launcher config that started the run, or start a new run "
                "with this folder as student.model."
            )
        pieces = list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))
        was_zero3 = any(checkpoint.glob("global_step*/*zero_pp_rank_*_model_states.pt"))
        if pieces and (len(pieces), was_zero3) != (self.args.world_size, self.is_zero3):
            stages = ["under ZeRO-3" if is_zero3 else "without ZeRO-3" for is_zero3 in (was_zero3, self.is_zero3)]
            raise UserError(
                f"{checkpoint} was written by {len(pieces)} processes {stages[0]}, and this is a run of "
                f"{self.args.world_size} {stages[1]}; DeepSpeed goes on with the same number and stage only, so resume "
                "with these, or start a new run with this folder as student.model."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights; before the model is wrapped, but after it is sharded."""
        self._load_weights(Path(resume_from_checkpoint))

    def _load_weights(self, folder: Path) -> None:
        if self.is_fsdp_enabled:
            load_weights(self.distillation_model, folder)
        else:
            load_parts(self.student, self.objective_module, folder)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As ``transformers`` does, into an optimizer of FSDP too."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        check_goes_on(folder)  # the base class passes over what is missing, or reads a folder of pickles instead
        if self.is_world_process_zero():
            self._rewind_metrics(folder)
        if not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        load_optimizer(self.distillation_model, optimizer, folder / OPTIMIZER_NAME)
        schedule = torch.load(folder / SCHEDULER_NAME, weights_only=True)
        cast(LRScheduler, self.lr_scheduler).load_state_dict(schedule)

    def _rewind_metrics(self, checkpoint: Path) -> None:
        """Keep the lines that the checkpoint knows; what came after them is about to come again."""
        path = Path(str(self.args.output_dir)) / METRICS_FILE
        if not path.is_file() or not (checkpoint / TRAINER_STATE_NAME).is_file():
            return
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        known = {json.dumps(entry, sort_keys=True) for entry in state["log_history"]}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _in_order(line) in known]
        write_in_one_piece(path, "".join(f"{line}\n" for line in kept))


def _in_order(line: str) -> str:
    """A line of the log with its names in order; empty of one that a kill tore."""
    try:
        return json.dumps(json.loads(line), sort_keys=True)
    except ValueError:
        return ""


def on_all_ranks(args: TrainingArguments, step: Callable[[], object]) -> None:
    """Run a step of this rank, wait for the others, and raise on every rank if it failed on one.

    Raises:
        UserError: it failed on another rank, which tells why.
    """
    failure: Exception | None = None
    try:
        step()
    except Exception as error:  # whatever it is, the others must not wait for this rank for ever
        failure = error
    if args.world_size > 1:
        flag = torch.tensor(float(failure is not None), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if failure is None and flag.item():
            raise UserError("saving failed on another process, whose message says why; this one stops with it.")
    if failure is not None:
        raise failure
