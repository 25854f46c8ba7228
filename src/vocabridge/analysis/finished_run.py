"""What is left of a run to look at its cross-model attention: embeddings, query projectors, tokenizers; no trunk runs.

Queries and keys depend on input embeddings and the query projector alone, so both models load without their layers
where their checkpoints allow it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vocabridge.assembly import build_objective
from vocabridge.errors import UserError
from vocabridge.models.loading import check_tokenizer_matches, load_tokenizer
from vocabridge.models.spec import ModelSpec
from vocabridge.models.trunkless import drop_trunk, load_ends
from vocabridge.objectives import objective_info, objective_names
from vocabridge.objectives._composition import Composition
from vocabridge.objectives._cross_model_attention import CrossModelAttention
from vocabridge.objectives.base import Objective
from vocabridge.objectives.config import CrossAttentionConfig
from vocabridge.pairs import PairTokenizer
from vocabridge.recipe import Recipe, recipe_from_values
from vocabridge.recipe.yaml_text import read_mapping
from vocabridge.saving import OBJECTIVE_FILE, load_objective

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """Queries at one moment of the run: the projector and the student's embeddings of that moment."""

    attention: CrossModelAttention
    student_embedding: nn.Module


@dataclass(frozen=True, slots=True, eq=False)
class FinishedRun:
    """A run whose objective has cross-model attention; all on the CPU and frozen."""

    folder: Path
    recipe: Recipe
    """Model, objective and length settings as the run had them; its data are those that are analysed."""
    pair_tokenizer: PairTokenizer
    before: Stage
    """Freshly started, from the run's seed."""
    after: Stage
    teacher_embedding: nn.Module
    part: str
    """Name of the part with the attention in a composition, which its entries in the log begin with; else empty."""


def attention_objectives() -> list[str]:
    """Names of the objectives whose runs can be analysed."""
    return [name for name in objective_names() if issubclass(objective_info(name).config_class, CrossAttentionConfig)]


def load_finished_run(folder: Path, data: str) -> FinishedRun:
    """Load what the attention of a run depends on.

    Of a composition, the first objective with attention is taken.

    Args:
        folder: run folder, as ``vocabridge distill`` leaves it.
        data: what will be analysed; the training data need not be there any more.

    Raises:
        UserError: not the folder of a finished run, its objective has no attention, it diverged, or a model cannot be
            loaded.
    """
    recipe, part = check_can_be_analysed(folder, data)
    seed = _seed(folder)
    assert recipe.teacher is not None, "an objective with cross-model attention needs a teacher"
    student_tokenizer, teacher_tokenizer = load_tokenizer(recipe.student), load_tokenizer(recipe.teacher)
    pair_tokenizer = PairTokenizer(
        student_tokenizer,
        teacher_tokenizer,
        student_template=recipe.student.template,
        teacher_template=recipe.teacher.template,
        max_length=recipe.data.max_length,
    )
    student, teacher = _ends(recipe.student), _ends(recipe.teacher)
    trained = _ends(ModelSpec(model=str(folder), trust_remote_code=recipe.student.trust_remote_code))
    check_tokenizer_matches(student_tokenizer, student, "student")
    check_tokenizer_matches(teacher_tokenizer, teacher, "teacher")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # as the trainer does right before it builds the objective
        objective = build_objective(
            recipe.objective.values(),
            student,
            student_tokenizer,
            teacher,
            teacher_tokenizer,
            pair_tokenizer=pair_tokenizer,
        )
    objective.eval().requires_grad_(False)
    before = copy.deepcopy(_select(objective, part))
    load_objective(objective, folder)
    after = Stage(_select(objective, part), trained.get_input_embeddings())
    _check_finite(folder, after)
    return FinishedRun(
        folder=folder,
        recipe=recipe,
        pair_tokenizer=pair_tokenizer,
        before=Stage(before, student.get_input_embeddings()),
        after=after,
        teacher_embedding=teacher.get_input_embeddings(),
        part=list(objective.parts)[part] if isinstance(objective, Composition) else "",
    )


def check_can_be_analysed(folder: Path, data: str) -> tuple[Recipe, int]:
    """Refuse what is no run, has no attention or is not finished, without loading anything large.

    Returns:
        The recipe, and which term of its objective has the attention.

    Raises:
        UserError: one of these.
    """
    recipe = _read_recipe(folder, data)
    part = _attention_part(folder, recipe)
    _check_finished(folder)
    return recipe, part


def _read_recipe(folder: Path, data: str) -> Recipe:
    """The sections that matter here; the rest may name files that are gone or folders that are elsewhere by now."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} is no run folder (it has no recipe.yaml); give the training.output_dir of a finished run."
        )
    values = read_mapping(path.read_text(encoding="utf-8"), source=str(path)).values
    kept: dict[str, Any] = {name: values[name] for name in ("student", "teacher", "objective") if name in values}
    lengths = _section(values, "data")
    kept["data"] = {"train": data} | {name: lengths[name] for name in ("max_length",) if name in lengths}
    kept["training"] = {"output_dir": "analysis-writes-no-run"}
    return recipe_from_values(kept, source=str(path))


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _attention_part(folder: Path, recipe: Recipe) -> int:
    """Which term of the objective has the attention."""
    for index, term in enumerate(recipe.objective.terms):
        if isinstance(term.config, CrossAttentionConfig):
            return index
    raise UserError(
        f"{folder}: its objective '{recipe.objective.name}' has no cross-model attention; runs of "
        f"{' and '.join(attention_objectives())} can be analysed."
    )


def _check_finished(folder: Path) -> None:
    missing = [] if any((folder / name).is_file() for name in _WEIGHT_FILES) else [_WEIGHT_FILES[0]]
    missing += [name for name in (OBJECTIVE_FILE, "run.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}, so this run has not finished; go on with it by "
            "vocabridge distill RECIPE --resume."
        )


def _seed(folder: Path) -> int:
    path = folder / "run.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not tell the run's seed, without which its start cannot be repeated.") from error


def _check_finite(folder: Path, after: Stage) -> None:
    tensors = [*after.attention.parameters(), *after.student_embedding.parameters()]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise UserError(f"{folder}: the trained weights are not all finite (the run diverged), so nothing is measured.")


def _ends(spec: ModelSpec) -> PreTrainedModel:
    """Embeddings and head on the CPU; adapters and quantization leave the input embeddings as they are."""
    ends = load_ends(spec.model_copy(update={"device": "cpu", "lora": None, "quantization": None, "cache": None}))
    if ends.has_trunk:
        drop_trunk(ends.model)
    return ends.model


def _select(objective: Objective, index: int) -> CrossModelAttention:
    part = list(objective.parts.values())[index] if isinstance(objective, Composition) else objective
    assert isinstance(part, CrossModelAttention)
    return part
