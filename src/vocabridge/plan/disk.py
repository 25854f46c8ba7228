"""What a run writes: checkpoints, the finished student, a teacher's cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from vocabridge.cache_teacher import teacher_rows
from vocabridge.models.capture import trunk_shape
from vocabridge.models.dtypes import dtype_name
from vocabridge.models.loading import load_tokenizer
from vocabridge.models.spec import CacheSpec
from vocabridge.models.teacher_cache import CacheKey
from vocabridge.models.teacher_capture import CaptureSize, capture_size
from vocabridge.plan.models import PlannedModels
from vocabridge.plan.optimizer_states import optimizer_state_bytes
from vocabridge.plan.step import Part
from vocabridge.plan.training_state import Placement, held
from vocabridge.recipe import Recipe

_ONE_PROCESS = Placement()


def disk_parts(recipe: Recipe, models: PlannedModels, placement: Placement = _ONE_PROCESS) -> Iterator[Part]:
    """Of the whole run, whatever the number of ranks: they write one checkpoint together."""
    arguments = recipe.training.arguments()
    if checkpoint := checkpoint_bytes(arguments, models, placement):
        basis = "student, learned parts" + ("" if arguments.get("save_only_model") else ", optimizer")
        limit = arguments.get("save_total_limit")
        kept = "all are kept: set training.save_total_limit" if limit is None else f"{limit} kept, 1 being written"
        yield Part("checkpoint", checkpoint, f"each; {kept}")
        if limit is not None:
            yield Part("checkpoints together", checkpoint * (limit + 1), basis)
    yield Part("finished student", finished_bytes(models, placement), "with learned parts")
    if recipe.teacher is not None and recipe.teacher.cache is not None and (size := cache_size(recipe, models)):
        yield Part("teacher cache", size.num_bytes, f"{size.rows:,} rows, {size.tokens:,} tokens")


def checkpoint_bytes(arguments: Mapping[str, Any], models: PlannedModels, placement: Placement = _ONE_PROCESS) -> int:
    """Of one checkpoint; 0 where none is saved.

    Raises:
        UserError: the optimizer is not known.
    """
    if arguments.get("save_strategy", "steps") == "no":
        return 0
    optimizer = 0
    if not arguments.get("save_only_model"):
        optim, optim_args = arguments.get("optim", "adamw_torch"), arguments.get("optim_args")
        trained = [held(value, placement) for value in models.trained]
        optimizer = optimizer_state_bytes(trained, optim, optim_args)
    return _student_bytes(models.student, placement) + _learned_bytes(models, placement) + optimizer


def finished_bytes(models: PlannedModels, placement: Placement = _ONE_PROCESS) -> int:
    """Of what a finished run is for: the student whole, adapters merged, and the learned parts."""
    return _held_bytes(models.student.parameters(), placement) + _learned_bytes(models, placement)


def cache_size(recipe: Recipe, models: PlannedModels) -> CaptureSize | None:
    """Size of the teacher's cache for the recipe's data; None where these are not on this machine.

    Raises:
        UserError: the data or the tokenizer cannot be read.
    """
    assert recipe.teacher is not None
    assert models.teacher is not None
    sources = [*recipe.data.train, *recipe.data.validation]
    if not all(Path(source.partition(":")[0]).exists() for source in sources):
        return None
    tokenizer = load_tokenizer(recipe.teacher)
    examples = recipe.data.training_examples() + recipe.data.validation_examples()
    rows = teacher_rows(examples, tokenizer, recipe.teacher, max_length=recipe.data.max_length)
    compute = dtype_name(models.teacher.dtype)
    chosen = (recipe.teacher.cache or CacheSpec()).dtype
    key = CacheKey(
        teacher="",
        compute_dtype=compute,
        attention="",
        hidden_size=trunk_shape(models.teacher).last_hidden_size,
        storage_dtype=compute if chosen == "auto" else chosen,
    )
    return capture_size(list({row.key: row for row in rows}.values()), key)


def _learned_bytes(models: PlannedModels, placement: Placement) -> int:
    return _held_bytes(models.objective.state_dict(keep_vars=True).values(), placement)


def _held_bytes(values: Iterable[Tensor], placement: Placement) -> int:
    """A save writes the types in which weights are held."""
    return sum(held(value, placement).nbytes for value in values)


def _student_bytes(student: nn.Module, placement: Placement) -> int:
    """Of LoRA's adapters alone, which is what a checkpoint holds of them."""
    saved = [value for value in student.parameters() if value.requires_grad or not isinstance(student, PeftModel)]
    return _held_bytes(saved, placement)
