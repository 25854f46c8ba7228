"""What a run may take, told before any run is done: disk by the planner, time by counting its multiplications.

A forward pass multiplies once for each weight and token, a backward pass twice. That number, over a fifth of the speed
at which this machine multiplies matrices of the student's width at the moment, and the start of a process, is a guess;
estimates from runs that are done take its place. Learned parts of objectives are left out: they are small.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from vocabridge.errors import UserError
from vocabridge.models.capture import trunk_shape
from vocabridge.pairs import PairTokenizer
from vocabridge.plan.disk import checkpoint_bytes, finished_bytes
from vocabridge.plan.models import PlannedModels, num_elements, pair_tokenizers, planned_pair
from vocabridge.plan.step import has_checkpointing
from vocabridge.recipe import Recipe
from vocabridge.text import read_examples

_START_SECONDS = 10.0
"""Of importing torch and transformers and loading models; a run of ``make study-mini`` is hardly more than that."""
_UTILISATION = 0.2
"""Share of that speed that whole runs reach; they also read memory, wait, generate token by token."""
_SAMPLED_ROWS = 200
_MEASURED_SECONDS = 0.2
_MEASURED_ROWS = 256


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one run may take.

    Attributes:
        seconds: time, training and evaluation.
        num_bytes: its folder.
        cache_bytes: the teacher's cache, which the runs of a study share; 0 without one.
    """

    seconds: float
    num_bytes: float
    cache_bytes: float


@dataclass(frozen=True, slots=True)
class _Rows:
    """Training rows of one pass: how many, and the mean tokens of the first ones on both sides."""

    number: int
    student_tokens: float
    teacher_tokens: float
    cached_positions: float
    """Of the teacher, those of the response."""


def forecast(recipe: Recipe, *, threads: int | None = None) -> Forecast | None:
    """Guess what a run of ``recipe`` takes; None where its models or data are not on this machine.

    Args:
        recipe: of the run.
        threads: that its process will have on a processor; None: as many as this one.
    """
    try:
        models = PlannedModels(*planned_pair(recipe), nn.ModuleList())
        pair = pair_tokenizers(recipe.student, recipe.teacher, recipe.data.max_length).pair
        rows = _rows_of_a_pass(recipe, pair)
        products = _in_training(recipe, models, rows) + _in_evaluation(recipe, models, pair)
        checkpoints = _num_checkpoints(recipe, rows) * checkpoint_bytes(recipe.training.arguments(), models)
    except UserError:
        return None
    seconds = _START_SECONDS + products / (_UTILISATION * _products_per_second(recipe, models, threads))
    return Forecast(seconds, finished_bytes(models) + checkpoints, _cache_bytes(recipe, models, rows))


def _rows_of_a_pass(recipe: Recipe, pair_tokenizer: PairTokenizer) -> _Rows:
    limit = _SAMPLED_ROWS if recipe.data.streaming else recipe.data.limit
    examples = read_examples(recipe.data.train, limit=limit)
    pairs = [pair for pair in map(pair_tokenizer, examples[:_SAMPLED_ROWS]) if pair is not None]
    student = _mean(len(pair.student.input_ids) for pair in pairs)
    sides = [pair.teacher for pair in pairs if pair.teacher is not None]
    teacher, cached = _mean(len(side.input_ids) for side in sides), _mean(len(side.spans) for side in sides)
    return _Rows(len(examples), student, teacher, cached)


def _num_steps(recipe: Recipe, rows: _Rows) -> float:
    arguments = recipe.training.arguments()
    if (max_steps := arguments.get("max_steps", -1)) > 0:
        return float(max_steps)
    return float(arguments.get("num_train_epochs", 3)) * rows.number / _rows_of_a_step(arguments, rows)


def _rows_of_a_step(arguments: dict[str, Any], rows: _Rows) -> float:
    budget, longest = arguments.get("max_tokens_per_batch"), max(1.0, rows.student_tokens, rows.teacher_tokens)
    number = budget / longest if budget else arguments.get("per_device_train_batch_size", 8)
    return float(number * arguments.get("gradient_accumulation_steps", 1))


def _in_training(recipe: Recipe, models: PlannedModels, rows: _Rows) -> float:
    arguments = recipe.training.arguments()
    passes = 4 if has_checkpointing(arguments) else 3
    products = passes * num_elements(list(models.student.parameters())) * rows.student_tokens
    if models.teacher is not None and recipe.teacher is not None and recipe.teacher.cache is None:
        products += num_elements(list(models.teacher.parameters())) * rows.teacher_tokens
    return products * _num_steps(recipe, rows) * _rows_of_a_step(arguments, rows)


def _in_evaluation(recipe: Recipe, models: PlannedModels, pair_tokenizer: PairTokenizer) -> float:
    """Every answer as if it had the most tokens, and one pass over all rows for bits per byte."""
    settings = recipe.evaluation
    if settings is None:
        return 0.0
    examples = [example for source in settings.data for example in read_examples(source, limit=settings.limit)]
    pairs = [pair for pair in map(pair_tokenizer, examples[:_SAMPLED_ROWS]) if pair is not None]
    tokens = _mean(len(pair.student.input_ids) for pair in pairs)
    num_answers = len(settings.seeds) if settings.temperature > 0 else 1
    per_row = tokens + num_answers * (tokens + settings.max_new_tokens)
    return len(examples) * per_row * num_elements(list(models.student.parameters()))


def _num_checkpoints(recipe: Recipe, rows: _Rows) -> int:
    """That are there in the end."""
    arguments, steps = recipe.training.arguments(), _num_steps(recipe, rows)
    if arguments.get("save_strategy", "steps") == "epoch":
        every = rows.number / _rows_of_a_step(arguments, rows)
    else:
        save_steps = arguments.get("save_steps", 500)
        every = save_steps if save_steps >= 1 else save_steps * steps  # a share of all steps
    saved = math.ceil(steps / every)
    return min(saved, arguments.get("save_total_limit") or saved)


def _cache_bytes(recipe: Recipe, models: PlannedModels, rows: _Rows) -> float:
    if models.teacher is None or recipe.teacher is None or recipe.teacher.cache is None:
        return 0.0
    return (
        rows.number
        * rows.cached_positions
        * trunk_shape(models.teacher).last_hidden_size
        * models.teacher.dtype.itemsize
    )


def _products_per_second(recipe: Recipe, models: PlannedModels, threads: int | None) -> float:
    """Of a matrix of the student's width with a few hundred rows, in the type of the training."""
    arguments = recipe.training.arguments()
    on_cpu = arguments.get("use_cpu") or not torch.accelerator.is_available()
    width = models.student.get_input_embeddings().get_parameter("weight").shape[1]
    dtype = torch.bfloat16 if arguments.get("bf16") else torch.float32
    return _measured_speed("cpu" if on_cpu else str(torch.accelerator.current_accelerator()), dtype, width, threads)


@functools.lru_cache(maxsize=8)  # the variants of a study shall differ by what they do alone
def _measured_speed(device: str, dtype: torch.dtype, width: int, threads: int | None) -> float:
    given = torch.ones(_MEASURED_ROWS, width, device=device, dtype=dtype)
    weight = torch.ones(width, 4 * width, device=device, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        (given @ weight).sum().item()
        count, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < _MEASURED_SECONDS:
            (given @ weight).sum().item()  # which waits for an accelerator
            count += 1
    finally:
        torch.set_num_threads(before)
    return count * given.numel() * weight.shape[1] / seconds


def _mean(values: Iterator[int]) -> float:
    found = list(values)
    return fmean(found) if found else 0.0
