"""One recipe from start to end: folder, models, training, evaluation, record."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, set_seed

from vocabridge.cache_teacher import Processes, cache_teacher
from vocabridge.checkpoint_contents import read_state
from vocabridge.checkpoint_files import check_whole
from vocabridge.durable import write_in_one_piece
from vocabridge.errors import UserError, one_line
from vocabridge.evaluation.engine import GenerationSettings
from vocabridge.evaluation.evaluate import evaluate_model
from vocabridge.evaluation.plan import EvaluationPlan, plan_evaluation
from vocabridge.evaluation.responses import Responder
from vocabridge.evaluation.results import EvaluationResult
from vocabridge.hub import upload_run
from vocabridge.metrics_log import METRICS_FILE
from vocabridge.model_card import write_model_card
from vocabridge.models.cached_teacher import CachedTeacher
from vocabridge.models.loading import load_student, load_teacher, load_tokenizer, resolve_dtype
from vocabridge.models.spec import ModelSpec
from vocabridge.pairs import PairTokenizer, StreamingPairs
from vocabridge.ranks import Ranks, launched_ranks
from vocabridge.recipe import EvaluationSettings, Recipe
from vocabridge.run_record import write_run_record
from vocabridge.run_start import RECIPE_FILE, RUN_FILES, Start, check_folder, start_of
from vocabridge.saving import (
    OBJECTIVE_FILE,
    load_parts,
    load_student_weights,
    publish,
    save_student,
    staged_folder,
)
from vocabridge.text import Example
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to."""

    run_dir: Path
    interrupted: bool
    """A signal stopped it after a checkpoint; ``--resume`` goes on from there."""
    steps: int
    preempted: bool = False
    """The signal was SIGTERM."""
    evaluation: EvaluationResult | None = None
    """Scores on the recipe's evaluation files, when it names any."""


def distill(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Train the student of ``recipe`` and evaluate it; the run folder is ``training.output_dir``.

    Args:
        recipe: a validated recipe.
        resume: go on from the last whole checkpoint in the run folder.
        overwrite: delete an existing run folder first.

    Raises:
        UserError: the run folder is in use or its checkpoints damaged, or recipe, models and data do not fit together.
        KeyboardInterrupt: Ctrl-C or SIGTERM came when training was over; ``resume`` goes on.
    """
    with launched_ranks() as ranks:
        return _distill(recipe, ranks, resume=resume, overwrite=overwrite)


def _distill(recipe: Recipe, ranks: Ranks, *, resume: bool, overwrite: bool) -> RunResult:
    run_dir = Path(recipe.training.output_dir)
    arguments = _training_arguments(recipe)
    ranks.on_first(lambda: check_folder(run_dir, recipe, resume=resume, overwrite=overwrite))
    # The first rank looks for all, for it reads the files from end to end.
    start = ranks.on_first(lambda: start_of(run_dir, recipe, arguments)) if resume else Start()
    with _without_traces(run_dir, ranks):
        set_seed(arguments.seed)  # LoRA and projectors start at random, before the trainer sets its own seed
        trainer = _build_trainer(recipe, arguments, ranks)
        trainer.check_arguments()
        trainer.check_models()
        if start.checkpoint is not None:
            ranks.on_first(partial(trainer.check_checkpoint, start.checkpoint, goes_on=start.goes_on))
        ranks.wait()
    # Only now, when nothing in the recipe can be wrong any more, is the folder emptied or written to.
    facts = {"engine": trainer.accelerator.distributed_type.value, "num_processes": arguments.world_size}
    facts |= {"seed": arguments.seed, "objective": recipe.objective.name}
    ranks.on_first(lambda: _claim(run_dir, recipe, facts, overwrite=overwrite, is_fresh=start.checkpoint is None))
    _train(trainer, start, is_stream=recipe.data.streaming)
    steps = trainer.state.global_step
    if trainer.interrupt.interrupted:
        return RunResult(run_dir, interrupted=True, preempted=trainer.interrupt.preempted, steps=steps)
    _save_final(trainer, run_dir, recipe)
    trainer.interrupt.raise_late()
    del trainer  # its models and optimizer would crowd the evaluation out of memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    ranks.wait()  # the first one has the rest of the run folder to write
    evaluation = None if recipe.evaluation is None else _evaluate(recipe, run_dir, ranks=ranks)
    if arguments.push_to_hub:
        ranks.on_first(lambda: upload_run(run_dir, arguments))
    return RunResult(run_dir, interrupted=False, steps=steps, evaluation=evaluation)


@contextmanager
def _without_traces(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Make the run folder; if the block fails, what was made for it is gone again.

    Raises:
        UserError: it cannot be made.
    """
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    try:
        if ranks.is_first:
            with _writing(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # it is not empty, or was never made
                path.rmdir()
        raise


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"training.output_dir: {run_dir} cannot be written ({error.strerror}); mend that or name another folder."
        ) from error


def _train(trainer: DistillationTrainer, start: Start, *, is_stream: bool) -> None:
    """Train, from the checkpoint if there is one; a checkpoint that was the end is only loaded.

    ``Trainer`` looks at ``max_steps`` after a step only, so it would give a finished run one step too many.
    """
    if start.checkpoint is not None and not start.goes_on:
        state = read_state(start.checkpoint)
        load_parts(trainer.student, trainer.objective_module, _final_weights(trainer, state, start.checkpoint))
        trainer.state = state
        return
    try:
        trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
    except (RuntimeError, ConnectionError, EOFError) as error:
        # Torch notices the death by a signal; a batch that was just being fetched from the worker may fail before that.
        fetched = not isinstance(error, RuntimeError) and trainer.args.dataloader_num_workers > 0
        if not fetched and "DataLoader worker" not in str(error):
            raise
        with suppress(RuntimeError):  # the signal, if it is still to come; it would interrupt what is told
            time.sleep(0.2)
        remedy = "with --resume, and with fewer training.dataloader_num_workers"
        if is_stream:
            remedy = "with --resume when there is more (data is streamed: training.dataloader_num_workers must stay)"
        raise UserError(
            "a process that prepares batches has died, perhaps for want of memory; the checkpoints are whole, so go on "
            f"{remedy}."
        ) from error


def _final_weights(trainer: DistillationTrainer, state: TrainerState, last: Path) -> Path:
    """The checkpoint whose weights a finished run ends with: the last one, unless the best one is asked for."""
    best = last.with_name(f"checkpoint-{state.best_global_step}")
    if not trainer.args.load_best_model_at_end or not best.is_dir():
        return last
    check_whole(best)
    return best


def _claim(run_dir: Path, recipe: Recipe, facts: dict[str, Any], *, overwrite: bool, is_fresh: bool) -> None:
    """Write into the folder whose it is, before anything else is in it.

    Raises:
        UserError: it cannot be written.
    """
    with _writing(run_dir):
        if overwrite:
            _empty(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_in_one_piece(run_dir / RECIPE_FILE, recipe.resolved_yaml())
        write_run_record(run_dir, **facts)
        if is_fresh:  # of a run that was killed before its first checkpoint: its steps are about to be trained again
            (run_dir / METRICS_FILE).unlink(missing_ok=True)


def _empty(run_dir: Path) -> None:
    """Delete what is in a run folder, its recipe last: a kill must not leave checkpoints that are anybody's."""
    for path in sorted(run_dir.iterdir() if run_dir.is_dir() else (), key=lambda path: path.name in RUN_FILES):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_teacher_cache(recipe: Recipe) -> CachedTeacher:
    """Run the teacher of ``recipe`` over its data, once, and keep its hidden states; the student plays no role.

    Raises:
        UserError: the recipe has no teacher, or as :func:`vocabridge.cache_teacher.cache_teacher`.
    """
    if recipe.teacher is None:
        raise UserError("the recipe has no 'teacher' section, so there is nothing to cache.")
    with launched_ranks() as ranks:
        arguments = _training_arguments(recipe)
        tokenizer = load_tokenizer(recipe.teacher)
        examples = recipe.data.training_examples() + recipe.data.validation_examples()
        return _cached_teacher(recipe.teacher, examples, arguments, tokenizer, ranks)


def _cached_teacher(
    teacher: ModelSpec,
    examples: list[Example],
    arguments: DistillationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    ranks: Ranks,
) -> CachedTeacher:
    processes = Processes(rank=ranks.rank, world_size=ranks.world_size, wait=ranks.wait, device=arguments.device)
    return cache_teacher(
        teacher,
        examples,
        max_length=arguments.max_length,
        tokenizer=tokenizer,
        processes=processes,
        progress=not arguments.disable_tqdm,
    )


def _training_arguments(recipe: Recipe) -> DistillationConfig:
    templates = {"student_template": recipe.student.template}
    if recipe.teacher is not None:
        templates["teacher_template"] = recipe.teacher.template
    values = {**recipe.training.arguments(), "max_length": recipe.data.max_length, **templates}
    try:
        return DistillationConfig(**values)
    except UserError:
        raise
    except (ValueError, ImportError, RuntimeError, TypeError, KeyError, OSError) as error:
        raise UserError(f"training: {one_line(error).rstrip('.')}; change or leave out that setting.") from error


def _build_trainer(recipe: Recipe, arguments: DistillationConfig, ranks: Ranks) -> DistillationTrainer:
    # Data first: a mistake in it should show before the models have been read.
    training_examples = None if recipe.data.streaming else recipe.data.training_examples()
    validation_examples = recipe.data.validation_examples()
    if recipe.evaluation is not None:  # it comes last, after hours
        _plan_evaluation(recipe.evaluation)
    student_tokenizer = load_tokenizer(recipe.student)
    teacher_tokenizer = load_tokenizer(recipe.teacher) if recipe.teacher else None
    student = load_student(recipe.student)
    if recipe.evaluation is not None:
        settings = _generation_settings(recipe.evaluation)
        Responder.of(student.config, student_tokenizer, settings=settings, template=recipe.student.template)
    teacher: PreTrainedModel | CachedTeacher | None = None
    if recipe.teacher is not None and recipe.teacher.cache is not None:
        examples = (training_examples or []) + validation_examples
        teacher = _cached_teacher(recipe.teacher, examples, arguments, teacher_tokenizer, ranks)
    elif recipe.teacher is not None:
        teacher = load_teacher(_on_cpu(recipe.teacher) if arguments.shard_teacher else recipe.teacher)
    return DistillationTrainer(
        student,
        teacher,
        objective=recipe.objective.values(),
        args=arguments,
        train_dataset=training_examples
        if training_examples is not None
        else _stream(recipe, arguments, student_tokenizer, teacher_tokenizer),
        eval_dataset=validation_examples or None,
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
    )


def _on_cpu(teacher: ModelSpec) -> ModelSpec:
    """For a teacher of which the device shall hold a piece only; its type is still that of the device."""
    return teacher.model_copy(update={"dtype": resolve_dtype(teacher), "device": "cpu"})


def _stream(
    recipe: Recipe, arguments: DistillationConfig, student_tokenizer: Any, teacher_tokenizer: Any
) -> StreamingPairs:
    pair_tokenizer = PairTokenizer(
        student_tokenizer,
        teacher_tokenizer,
        student_template=arguments.student_template,
        teacher_template=arguments.teacher_template,
        max_length=arguments.max_length,
    )
    return StreamingPairs(recipe.data.train, pair_tokenizer, limit=recipe.data.limit)


def _save_final(trainer: DistillationTrainer, run_dir: Path, recipe: Recipe) -> None:
    trainer.save_model(_internal_call=True)  # nothing is uploaded before all is there
    trainer.save_state()
    student = trainer.student
    if isinstance(student, PeftModel) and trainer.is_world_process_zero():
        if trainer.is_engine_sharded:  # this rank has only its pieces in memory, and all of them in the run folder
            student = load_student(recipe.student)
            load_student_weights(student, run_dir)
        with staged_folder(run_dir) as staging:
            student.save_pretrained(str(staging / "adapter"))
            save_student(student.merge_and_unload(safe_merge=True), staging)
            # At no moment may both be there: from_pretrained would put the adapter on top of weights that contain it.
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (run_dir / name).unlink(missing_ok=True)
            publish(staging, run_dir)
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        write_model_card(
            run_dir,
            recipe,
            steps=trainer.state.global_step,
            seed=trainer.args.seed,
            last_log=logs[-1] if logs else {},
            has_learned_parts=(run_dir / OBJECTIVE_FILE).is_file(),
        )


def _generation_settings(settings: EvaluationSettings) -> GenerationSettings:
    return GenerationSettings(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_size=settings.batch_size,
    )


def _plan_evaluation(settings: EvaluationSettings) -> EvaluationPlan:
    return plan_evaluation(
        settings.data,
        seeds=settings.seeds,
        settings=_generation_settings(settings),
        limit=settings.limit,
        in_domain=settings.in_domain,
    )


def _evaluate(recipe: Recipe, run_dir: Path, *, ranks: Ranks) -> EvaluationResult | None:
    settings = recipe.evaluation
    assert settings is not None
    if settings.engine == "vllm":  # which generates in one process
        if not ranks.is_first:
            return None
        ranks = Ranks()
    changes = {"model": str(run_dir), "dtype": settings.dtype, "lora": None, "tokenizer": None, "revision": None}
    spec = recipe.student.model_copy(update=changes)
    return evaluate_model(
        spec,
        list(settings.data),
        output_dir=run_dir / "evaluation",
        seeds=list(settings.seeds),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_size=settings.batch_size,
        limit=settings.limit,
        in_domain=list(settings.in_domain) or None,
        overwrite="other model",  # the scores of a run that was shorter then, or a kill came before they were discarded
        engine=settings.engine,
        ranks=ranks,
    )
