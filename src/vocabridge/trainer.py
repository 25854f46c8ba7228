"""The trainer: normalise, log each term, save; everything else is ``transformers.Trainer``."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from vocabridge.assembly import (
    EndlessPairs,
    as_pairs,
    build_objective,
    check_lengths,
    refuse_own_folder,
    resolve_model,
    told_if_swapped,
)
from vocabridge.batching import check_batches
from vocabridge.checkpoint_contents import check_contents, check_weights
from vocabridge.compilation import compile_trunks, take_over_compilation
from vocabridge.diagnostics import DiagnosticsCallback
from vocabridge.distillation_model import DistillationModel, tally_dtype
from vocabridge.durable import open_to_append
from vocabridge.errors import UserError, one_line
from vocabridge.interrupt import InterruptCallback
from vocabridge.metrics_log import METRICS_FILE
from vocabridge.models.cached_teacher import CachedTeacher, teacher_signal
from vocabridge.models.forward import check_head
from vocabridge.models.loading import vocabulary_size
from vocabridge.models.teacher import LiveTeacher, TeacherSignal
from vocabridge.models.teacher_shards import share_layers
from vocabridge.objectives.base import Objective
from vocabridge.optimizing import OptimizingTrainer
from vocabridge.pairs import (
    IGNORE_INDEX,
    PairBatch,
    PairCollator,
    PairDataset,
    PairTokenizer,
    StreamingPairs,
    pad_token_id,
)
from vocabridge.resuming import SaveAgainCallback
from vocabridge.sharding import fsdp_plugin, gather_for, start_alike, use_fsdp
from vocabridge.suggest import did_you_mean
from vocabridge.training_arguments import DistillationConfig
from vocabridge.zero import leave_objective_alone, load_models_whole, prepare_for_zero3, root_parameters, whole

__all__ = ["DistillationConfig", "DistillationTrainer"]


class DistillationTrainer(OptimizingTrainer):
    """Distils ``teacher`` into ``student`` by an objective, on prompt-response rows.

    Args:
        student: a causal language model, or its hub id, folder or GGUF file.
        teacher: likewise, or a :class:`CachedTeacher`; None for objectives that need none. It is frozen.
        objective: a recipe name (``"dskd_cma"``), a mapping ``{"name": ..., **settings}``, or an :class:`Objective`.
        args: training arguments.
        train_dataset: a JSONL file, a ``datasets`` folder, id or dataset, a list of rows or examples, or a
            :class:`~vocabridge.pairs.PairDataset` that is tokenized already.
        eval_dataset: likewise; gives ``eval_loss`` in nats per supervised student token.
        student_tokenizer: default: loaded from where the student came from.
        teacher_tokenizer: likewise.
        callbacks: added to the default ones.
        optimizers: as in ``transformers.Trainer``.

    Raises:
        UserError: the objective, models, tokenizers and data do not fit together.
    """

    args: DistillationConfig
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: PreTrainedModel | str,
        teacher: PreTrainedModel | CachedTeacher | str | None = None,
        *,
        objective: str | Mapping[str, Any] | Objective = "dskd_cma",
        args: DistillationConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        student_tokenizer: PreTrainedTokenizerBase | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        set_seed(args.seed)  # the projectors start at random, before the base class sets the seed
        student, student_tokenizer = resolve_model(student, student_tokenizer, "student")
        refuse_own_folder(student, args.output_dir, "student")
        cached = teacher if isinstance(teacher, CachedTeacher) else None
        teacher = cached.model if cached is not None else cast(PreTrainedModel | str | None, teacher)
        if teacher is None:
            teacher_tokenizer = None
        else:
            refuse_own_folder(teacher, args.output_dir, "teacher")
            if teacher is student:
                raise UserError("student and teacher are the same object; load the teacher a second time.")
            teacher, teacher_tokenizer = resolve_model(teacher, teacher_tokenizer, "teacher")
            if cached is None:  # of which only the ends may be in memory
                told_if_swapped(student, teacher)
        self.pair_tokenizer = PairTokenizer(
            student_tokenizer,
            teacher_tokenizer,
            student_template=args.student_template,
            teacher_template=args.teacher_template,
            max_length=args.max_length,
        )
        built = build_objective(
            objective, student, student_tokenizer, teacher, teacher_tokenizer, pair_tokenizer=self.pair_tokenizer
        )
        self.teacher: TeacherSignal | None = None
        if teacher is not None and teacher_tokenizer is not None:
            self.teacher = teacher_signal(
                cached or teacher, vocab_size=vocabulary_size(teacher_tokenizer), layers=built.layers.teacher
            )
        self.interrupt = InterruptCallback()
        self.student_tokenizer = student_tokenizer
        pairs = as_pairs(train_dataset, self.pair_tokenizer, progress=not args.disable_tqdm)
        check_batches(pairs, args)
        check_lengths(pairs, {"student": student, "teacher": teacher if cached is None else None})
        train_pairs = EndlessPairs(pairs) if isinstance(pairs, StreamingPairs) else pairs
        collator = PairCollator(
            pad_token_id(student_tokenizer),
            None if teacher_tokenizer is None else pad_token_id(teacher_tokenizer),
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        try:
            super().__init__(
                model=DistillationModel(student, built, vocab_size=vocabulary_size(student_tokenizer)),
                args=args,
                data_collator=cast(Any, collator),
                train_dataset=cast(Any, train_pairs),
                eval_dataset=as_pairs(eval_dataset, self.pair_tokenizer, progress=not args.disable_tqdm),
                processing_class=student_tokenizer,
                callbacks=[*(callbacks or []), self.interrupt],
                optimizers=optimizers,
            )
        except UserError:
            raise
        except (ValueError, ImportError, RuntimeError) as error:  # a tracker, optimizer or engine that is not there
            raise UserError(f"training: {one_line(error).rstrip('.')}; change or leave out that setting.") from error
        take_over_compilation(self.accelerator, built.layers, is_asked=args.torch_compile)
        if args.shard_teacher:
            self._share_teacher()
        if self.teacher is not None:
            self.teacher.to(args.device)
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.check_rows(pairs, self.eval_dataset)
        self._tally: dict[str, Tensor] = {}
        self._probe_batch: PairBatch | None = None
        self._checked = False
        self.add_callback(SaveAgainCallback())
        if args.diagnostics_steps:
            self.add_callback(DiagnosticsCallback(self.measure_distributions, self.log))

    def _share_teacher(self) -> None:
        if not isinstance(self.teacher, LiveTeacher) or getattr(self.teacher.model, "is_quantized", False):
            raise UserError(
                "shard_teacher needs a teacher that runs in floating point: no teacher, a cached or a quantised one "
                "has no layers that could be shared out; leave it out."
            )
        share_layers(self.teacher.model, self.args.device)

    def create_accelerator_and_postprocess(self) -> None:
        """As in ``transformers``; FSDP also on a CPU, and without rounding at the root."""
        super().create_accelerator_and_postprocess()
        load_models_whole()  # which starting DeepSpeed has undone
        if (plugin := fsdp_plugin(self.args)) is not None:
            use_fsdp(self.accelerator, plugin)
            self.is_fsdp_enabled = True

    # --- training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As ``transformers.Trainer.train``, after the start-up check of both heads on one batch.

        Raises:
            UserError: models or checkpoint cannot be used.
        """
        self.check_models()
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if checkpoint is not None:
            self.check_engine_of(Path(checkpoint))
        if self.args.torch_compile:  # not before the check, whose few small batches would each be compiled
            teacher = self.teacher.model if isinstance(self.teacher, LiveTeacher) else None
            compile_trunks([self.student, teacher], str(self.args.torch_compile_backend), self.args.torch_compile_mode)
        self._tally = {}
        try:
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.interrupt.restore()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.is_engine_sharded and not self.is_engine_running:
            start_alike(self.distillation_model, self.args.device)
            if self.is_zero3:
                prepare_for_zero3(self.distillation_model)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_fsdp_enabled:
            gather_for(self.distillation_model, "probe")
        if self.is_zero3:
            leave_objective_alone(self.deepspeed, self.distillation_model)
        return prepared

    def check_checkpoint(self, checkpoint: Path, *, goes_on: bool = True) -> None:
        """Read what a resumption will read; nothing has been written by then.

        Args:
            checkpoint: one whose files are whole.
            goes_on: there are steps left to train; else only the weights are needed.

        Raises:
            UserError: a file of the checkpoint cannot be used; names it.
        """
        if goes_on:
            self.check_goes_on(checkpoint)
            self.check_engine_of(checkpoint)
        groups = None
        if not self.is_engine_sharded:
            model = cast(nn.Module, self.model)
            _, kwargs = self.named_optimizer(model)
            groups = [[tuple(p.shape) for p in group["params"]] for group in self.grouped_parameters(model, kwargs)]
        check_contents(checkpoint, parameter_groups=groups)
        check_weights(checkpoint, self.student, self.objective_module)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in ``transformers``, for ``push_to_hub``.

        Raises:
            UserError: the hub cannot be reached or does not let the repository be made.
        """
        try:
            super().init_hf_repo(token, private)
        except Exception as error:  # the hub's client raises what its network library raises
            raise UserError(
                f"training.push_to_hub: the repository cannot be made on the hub ({one_line(error)}); log in with "
                "'hf auth login', or leave it out."
            ) from error

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        """After an interruption the run goes on from the newest checkpoint: nothing may delete or replace it."""
        if not self.interrupt.interrupted:
            return super()._finalize_training(trial, num_train_samples, start_time)
        best, limit = self.args.load_best_model_at_end, self.args.save_total_limit
        self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.load_best_model_at_end, self.args.save_total_limit = best, limit

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether ``save_strategy: best`` saves; an interruption does so whatever the metric is."""
        return super()._determine_best_metric(metrics, trial) or self.interrupt.interrupted

    def _get_num_items_in_batch(self, batch_samples: list[PairBatch], device: torch.device) -> Any:
        """Supervised positions of the whole optimizer step by unit, summed over accumulation and ranks."""
        if not batch_samples:  # a stream that ends with the step before
            return None
        counts = torch.stack([_count_supervised(batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        student, teacher = counts.clamp(min=1).unbind()
        return {"student_tokens": student, "teacher_tokens": teacher}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The micro-batch's share of the optimizer step's loss; parts are kept for the log."""
        objective = self.objective_module
        objective.set_step(self.state.global_step)
        objective.record_gradients(self._logs_next())
        teacher = self.teacher(inputs) if self.teacher is not None else None
        with self._autocast():
            loss, tally = model(batch=inputs, teacher=teacher, step_counts=num_items_in_batch)
        for name, pair in tally.items():
            self._tally[name] = self._tally[name] + pair if name in self._tally else pair
        # Data parallelism averages gradients over ranks; ours are already shares of the step-wide sum.
        loss = loss.float() * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _autocast(self) -> AbstractContextManager[None]:
        """Mixed precision, as asked for; under DeepSpeed the weights themselves are in its type."""
        if not self.is_deepspeed_enabled:
            return self.accelerator.autocast()
        dtype = self.student.dtype
        return torch.autocast(self.args.device.type, dtype, enabled=dtype != torch.float32)

    def _logs_next(self) -> bool:
        every = int(self.state.logging_steps or 0)
        return bool(every) and (self.state.global_step + 1) % every == 0

    # --- log ----------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averages of all terms, the gradient measurements and, every k steps, the distribution distances."""
        if "loss" in logs:
            logs |= self._drain(self._tally)
            logs |= self.objective_module.gradient_metrics()
            self._tally = {}
        super().log(logs, start_time)
        if self.is_world_process_zero():
            with open_to_append(Path(str(self.args.output_dir)) / METRICS_FILE) as stream:
                stream.write(f"{json.dumps(self.state.log_history[-1])}\n".encode())

    def _drain(self, tally: Mapping[str, Tensor]) -> dict[str, float]:
        """Averages over all ranks, by name; a rank without a batch (of few evaluation rows) has no names."""
        names = sorted(tally)
        sums = torch.stack([tally[name] for name in names]).tolist() if names else []
        of_ranks = [dict(zip(names, sums, strict=True))]
        if self.args.world_size > 1:
            of_ranks *= self.args.world_size
            torch.distributed.all_gather_object(of_ranks, of_ranks[0])
        totals: dict[str, list[float]] = {}
        for ratios in of_ranks:
            for name, pair in ratios.items():
                totals[name] = [a + b for a, b in zip(totals.get(name, (0.0, 0.0)), pair, strict=True)]
        return {name: total / max(count, 1e-12) for name, (total, count) in sorted(totals.items())}

    def measure_distributions(self) -> dict[str, float]:
        """The objective's diagnostics on the fixed probe set, named ``probe/<name>`` (empty when it has none)."""
        if self.teacher is None or self.train_dataset is None:
            return {}
        batch = self._probe()
        was_training = self.objective_module.training
        self.objective_module.eval()
        try:
            model = self.distillation_model
            with (
                self._autocast() if self.is_engine_sharded else nullcontext(),
                whole(root_parameters(model)) if self.is_zero3 else nullcontext(),
            ):
                report = model.probe(batch, self.teacher.embedding)
        finally:
            self.objective_module.train(was_training)
        return {f"probe/{name}": value for name, value in report.items() if math.isfinite(value)}

    def _probe(self) -> PairBatch:
        if self._probe_batch is None:
            self._probe_batch = self._collate(self._first_pairs(self.args.diagnostics_examples))
        return self._probe_batch

    def _first_pairs(self, size: int) -> list[Any]:
        """The same training pairs whatever the seed, so that runs compare: chosen at random, or a stream's first."""
        if not isinstance(self.train_dataset, PairDataset):
            return list(islice(iter(cast(EndlessPairs, self.train_dataset)), size))
        size = min(size, len(self.train_dataset))
        chosen = random.Random(0).sample(range(len(self.train_dataset)), size)
        return [self.train_dataset[index] for index in chosen]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As ``transformers.Trainer.evaluate``; rows and files are tokenized first."""
        if self.is_engine_sharded and not self.is_engine_running:
            raise UserError(
                "FSDP and DeepSpeed take the model over when training starts, so it cannot be evaluated before; set "
                "training.eval_on_start: true."
            )
        given = as_pairs(eval_dataset, self.pair_tokenizer)
        return super().evaluate(cast(Any, given), ignore_keys, metric_key_prefix)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Averages every term over all supervised student positions of the data set, exactly (not over batches)."""
        model = cast(nn.Module, self.model_wrapped if self.is_engine_sharded else self.model)
        model.eval()
        tally: dict[str, Tensor] = {}
        num_samples = 0
        for inputs in dataloader:
            batch = cast(PairBatch, self._prepare_inputs(inputs))
            num_samples += batch["input_ids"].shape[0]
            for name, pair in self._evaluate_batch(model, batch).items():
                tally[name] = tally[name] + pair if name in tally else pair
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._drain(tally).items()}
        return EvalLoopOutput(cast(Any, None), None, metrics, num_samples)

    @torch.no_grad()
    def _evaluate_batch(self, model: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        self.objective_module.record_gradients(False)
        device = batch["labels"].device
        student, teacher = _count_supervised(batch).to(device).clamp(min=1).unbind()
        signal = self.teacher(batch) if self.teacher is not None else None
        with self._autocast():
            loss, tally = model(
                batch=batch, teacher=signal, step_counts={"student_tokens": student, "teacher_tokens": teacher}
            )
        count = student.to(tally_dtype(device))
        return tally | {"loss": torch.stack([loss.to(count.dtype) * count, count])}

    # --- start-up -----------------------------------------------------------------------------------------------------

    def _collate(self, pairs: list[Any]) -> PairBatch:
        return cast(PairBatch, self._prepare_inputs(self.data_collator(pairs)))

    def check_models(self) -> None:
        """Compare both heads with the models' own logits on one row, once; nothing has been written by then.

        FSDP and DeepSpeed take the student over later: until then it is whole and on the CPU, where the first rank
        checks it.

        Raises:
            UserError: a model computes its logits in a way we do not know, or they are not finite; or
                ``metric_for_best_model`` is nothing that an evaluation gives.
        """
        if self._checked or self.train_dataset is None:
            return
        self._checked = True
        batch = self._collate(self._first_pairs(1))
        if not self.is_engine_sharded or self.is_world_process_zero():
            device = self.student.device
            check_head(
                self.student,
                batch["input_ids"].to(device),
                batch["attention_mask"].to(device),
                batch["labels"].to(device),
                vocab_size=self.distillation_model.vocab_size,
            )
        if self.teacher is not None:
            self.teacher.check(batch)
        if self.args.eval_strategy != "no" and self.args.metric_for_best_model and not self.is_engine_sharded:
            self._check_metric(self.args.metric_for_best_model.removeprefix("eval_"), batch)

    def _check_metric(self, name: str, batch: PairBatch) -> None:
        """Every batch has the same metrics; ``transformers`` would look for one that is missing after hours."""
        if name == "loss":
            return
        model = cast(nn.Module, self.model)
        model.eval()
        known = self._evaluate_batch(model, batch)
        if name not in known:
            raise UserError(
                f"training.metric_for_best_model is '{name}', which no evaluation gives"
                f"{did_you_mean(name, known) or '.'} Known: {', '.join(sorted(known))}."
            )


def _count_supervised(batch: PairBatch) -> Tensor:
    """``[2]`` supervised positions of the student's and the teacher's side."""
    sides = (batch["labels"], batch.get("teacher_labels"))
    return torch.stack([torch.tensor(0) if labels is None else labels.ne(IGNORE_INDEX).sum().cpu() for labels in sides])
