"""The trainer: normalise, log each term, save; everything else is ``transformers.Trainer``."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from vocabridge.assembly import EndlessPairs, as_pairs, build_objective, refuse_own_folder, resolve_model
from vocabridge.batching import LengthGroupingTrainer, check_batches
from vocabridge.compilation import compile_trunks, take_over_compilation
from vocabridge.diagnostics import DiagnosticsCallback
from vocabridge.distillation_model import DistillationModel, tally_dtype
from vocabridge.errors import UserError
from vocabridge.interrupt import InterruptCallback
from vocabridge.models.cached_teacher import CachedTeacher, teacher_signal
from vocabridge.models.forward import check_head
from vocabridge.models.loading import vocabulary_size
from vocabridge.models.teacher import LiveTeacher, TeacherSignal
from vocabridge.objectives.base import Objective
from vocabridge.pairs import (
    IGNORE_INDEX,
    PairBatch,
    PairCollator,
    PairDataset,
    PairTokenizer,
    StreamingPairs,
    pad_token_id,
)
from vocabridge.saving import load_parts, publish, save_parts, staged_folder
from vocabridge.training_arguments import DistillationConfig

__all__ = ["DistillationConfig", "DistillationTrainer"]

METRICS_FILE = "metrics.jsonl"


class DistillationTrainer(LengthGroupingTrainer):
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
        except (ValueError, ImportError, RuntimeError) as error:  # a tracker, optimizer or engine that is not there
            raise error if isinstance(error, UserError) else UserError(f"training: {error}") from error
        take_over_compilation(self.accelerator, built.layers, is_asked=args.torch_compile)
        if self.teacher is not None:
            self.teacher.to(args.device)
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.check_rows(pairs, self.eval_dataset)
        self._tally: dict[str, Tensor] = {}
        self._probe_batch: PairBatch | None = None
        self._checked = False
        if args.diagnostics_steps:
            self.add_callback(DiagnosticsCallback(self.measure_distributions, self.log))

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

    # --- training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As ``transformers.Trainer.train``, after the start-up check of both heads on one batch."""
        self.check_models()
        if self.args.torch_compile:  # not before the check, whose few small batches would each be compiled
            teacher = self.teacher.model if isinstance(self.teacher, LiveTeacher) else None
            compile_trunks([self.student, teacher], str(self.args.torch_compile_backend), self.args.torch_compile_mode)
        self._tally = {}
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.interrupt.restore()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Named groups: student, projectors, discriminator, each with and without weight decay.

        Raises:
            UserError: an optimizer that builds its own parameter groups.
        """
        if self.optimizer is None:
            trained = cast(nn.Module, self.model if model is None else model)
            try:
                optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, trained))
            except (ValueError, ImportError) as error:
                raise UserError(f"training.optim: {error}") from error
            is_plain = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
            if not is_plain or {"params", "model", "optimizer_dict"} & set(kwargs):
                raise UserError(
                    f"training.optim: '{self.args.optim}' builds its own parameter groups and would miss the "
                    "projectors' learning rates; use an AdamW, Adafactor or SGD variant."
                )
            self.optimizer = optimizer_class(self._parameter_groups(trained, kwargs), **kwargs)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module, optimizer_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
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
        if not discriminator or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        own = {id(parameter) for parameter in discriminator}
        others = [parameter for parameter in model.parameters() if id(parameter) not in own]
        norm = self.accelerator.clip_grad_norm_(others, self.args.max_grad_norm)  # also unscales all under fp16
        nn.utils.clip_grad_norm_(discriminator, self.args.max_grad_norm)
        return norm

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

    def _get_num_items_in_batch(self, batch_samples: list[PairBatch], device: torch.device) -> Any:
        """Supervised positions of the whole optimizer step by unit, summed over accumulation and ranks."""
        if not batch_samples:  # a stream that ends with the step before
            return None
        counts = torch.stack([_count_supervised(batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        student, teacher = counts.clamp(min=1).to(tally_dtype(device)).unbind()
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
        loss, tally = model(batch=inputs, teacher=teacher, step_counts=num_items_in_batch)
        for name, pair in tally.items():
            self._tally[name] = self._tally[name] + pair if name in self._tally else pair
        # Data parallelism averages gradients over ranks; ours are already shares of the step-wide sum.
        loss = loss.float() * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

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
            with (Path(str(self.args.output_dir)) / METRICS_FILE).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(self.state.log_history[-1]) + "\n")

    def _drain(self, tally: Mapping[str, Tensor]) -> dict[str, float]:
        if not tally:
            return {}
        stacked = torch.stack([tally[name] for name in sorted(tally)])
        if self.args.world_size > 1:
            stacked = self.accelerator.reduce(stacked, "sum")
        values = (stacked[:, 0] / stacked[:, 1].clamp(min=1e-12)).tolist()
        return dict(zip(sorted(tally), values, strict=True))

    def measure_distributions(self) -> dict[str, float]:
        """The objective's diagnostics on the fixed probe set, named ``probe/<name>`` (empty when it has none)."""
        if self.teacher is None or self.train_dataset is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return {}
        batch = self._probe()
        student_embedding = self.student.get_input_embeddings()
        teacher_embedding = self.teacher.embedding
        was_training = self.objective_module.training
        self.objective_module.eval()
        try:
            report = self.objective_module.probe(batch, student_embedding, teacher_embedding)
        finally:
            self.objective_module.train(was_training)
        return {f"probe/{name}": value for name, value in report.items() if math.isfinite(value)}

    def _probe(self) -> PairBatch:
        if self._probe_batch is None:
            self._probe_batch = self._collate(self._first_pairs(self.args.diagnostics_examples))
        return self._probe_batch

    def _first_pairs(self, size: int) -> list[Any]:
        """A fixed choice of training pairs: by seed, or the first ones of a stream."""
        if not isinstance(self.train_dataset, PairDataset):
            return list(islice(iter(cast(EndlessPairs, self.train_dataset)), size))
        size = min(size, len(self.train_dataset))
        chosen = random.Random(self.args.seed).sample(range(len(self.train_dataset)), size)
        return [self.train_dataset[index] for index in chosen]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As ``transformers.Trainer.evaluate``; rows and files are tokenized first."""
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
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        model = cast(nn.Module, self.model_wrapped if sharded else self.model)
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
        counts = _count_supervised(batch).to(device=device, dtype=tally_dtype(device))
        student, teacher = counts.clamp(min=1).unbind()
        signal = self.teacher(batch) if self.teacher is not None else None
        with self.accelerator.autocast():
            loss, tally = model(
                batch=batch, teacher=signal, step_counts={"student_tokens": student, "teacher_tokens": teacher}
            )
        return tally | {"loss": torch.stack([loss.to(student.dtype) * student, student])}

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written aside, then renamed into place: a kill or a full disk never leaves a torn checkpoint."""
        run_dir = Path(super()._get_output_dir(trial))
        if self.args.world_size > 1:
            super()._save_checkpoint(model, trial)
            return
        with staged_folder(run_dir) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._leave_staging(staging, run_dir)
            publish(staging, run_dir)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    _staging: Path | None = None

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
        for folder in staging.glob("checkpoint-*"):
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Student as a Hugging Face checkpoint, learned parts and tokenizer beside it; no pickled arguments."""
        folder = Path(str(output_dir or self.args.output_dir))
        if not self.args.should_save:
            return
        if self._staging is None and self.args.world_size == 1:
            with staged_folder(folder) as staging:
                self._write_parts(staging, state_dict)
                publish(staging, folder)
        else:
            self._write_parts(folder, state_dict)

    def _write_parts(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_parts(self.student, self.objective_module, folder, state_dict)
        self.student_tokenizer.save_pretrained(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_parts(self.student, self.objective_module, Path(resume_from_checkpoint))
        if self.is_world_process_zero():
            self._rewind_metrics(Path(resume_from_checkpoint))

    def _rewind_metrics(self, checkpoint: Path) -> None:
        """Drop the lines of steps that are about to be trained again, so that every step stands once in the file."""
        path = Path(str(self.args.output_dir)) / METRICS_FILE
        if not path.is_file() or not (checkpoint / "trainer_state.json").is_file():
            return
        step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        complete = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in complete if json.loads(line)["step"] <= step and "train_runtime" not in line]
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(path)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            load_parts(self.student, self.objective_module, Path(self.state.best_model_checkpoint))

    # --- start-up -----------------------------------------------------------------------------------------------------

    def _collate(self, pairs: list[Any]) -> PairBatch:
        return cast(PairBatch, self._prepare_inputs(self.data_collator(pairs)))

    def check_models(self) -> None:
        """Compare both heads with the models' own logits on one row, once; nothing has been written by then.

        Raises:
            UserError: a model computes its logits in a way we do not know, or they are not finite.
        """
        if self._checked or self.train_dataset is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        self._checked = True
        batch = self._collate(self._first_pairs(1))
        check_head(
            self.student,
            batch["input_ids"],
            batch["attention_mask"],
            batch["labels"],
            vocab_size=self.distillation_model.vocab_size,
        )
        if self.teacher is not None:
            self.teacher.check(batch)


def _count_supervised(batch: PairBatch) -> Tensor:
    """``[2]`` supervised positions of the student's and the teacher's side."""
    sides = (batch["labels"], batch.get("teacher_labels"))
    return torch.stack([torch.tensor(0) if labels is None else labels.ne(IGNORE_INDEX).sum().cpu() for labels in sides])
