"""From what a user hands to the trainer to models, objective and tokenized pairs that fit together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vocabridge.errors import UserError
from vocabridge.models.capture import learned_positions, trunk_shape
from vocabridge.models.heads import base_model, output_head
from vocabridge.models.loading import (
    check_tokenizer_matches,
    load_student,
    load_teacher,
    load_tokenizer,
    vocabulary_size,
)
from vocabridge.models.spec import ModelSpec, Side
from vocabridge.objectives import objective_class
from vocabridge.objectives._composition import Composition, WeightedPart
from vocabridge.objectives.base import Objective, ObjectiveSetup
from vocabridge.pair_cache import cached_pairs
from vocabridge.pairs import PairDataset, PairTokenizer, StreamingPairs, TokenizedPair
from vocabridge.recipe.objective import read_objective
from vocabridge.settings import real_path
from vocabridge.text import Example, read_examples

logger = logging.getLogger(__name__)


def resolve_model(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None, side: Side
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what was given by name, find the tokenizer of a model given as an object, and check that they fit.

    Raises:
        UserError: a part is missing or the tokenizer belongs to another model.
    """
    if isinstance(model, str):
        spec = ModelSpec(model=model)
        model = load_student(spec) if side == "student" else load_teacher(spec)
        tokenizer = tokenizer or load_tokenizer(spec)
    elif tokenizer is None:
        name = getattr(model.config, "_name_or_path", "")
        if not name:
            raise UserError(f"{side}_tokenizer is needed: this {side} model does not say where it came from.")
        tokenizer = load_tokenizer(ModelSpec(model=name))
    check_tokenizer_matches(tokenizer, model, side)
    return model, tokenizer


def build_objective(
    objective: str | Mapping[str, Any] | Objective,
    student: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    *,
    pair_tokenizer: PairTokenizer,
) -> Objective:
    """The objective by name or settings, ready to train this pair.

    Raises:
        UserError: unknown name, bad settings, or a teacher is needed and missing.
    """
    if isinstance(objective, Objective):
        return objective
    settings, problems = read_objective({"name": objective} if isinstance(objective, str) else objective)
    if settings is None:
        raise UserError("; ".join(f"{problem.key} {problem.text}" for problem in problems))
    if "teacher" in settings.needs and teacher is None:
        raise UserError(f"objective '{settings.name}' needs a teacher; give teacher=... or use cross_entropy.")
    student_embedding = student.get_input_embeddings()
    teacher_embedding = None if teacher is None else teacher.get_input_embeddings()
    setup = ObjectiveSetup(
        student_hidden_size=_width(student_embedding),
        student_embedding=student_embedding,
        student_tokenizer=student_tokenizer,
        student_head=output_head(student, vocabulary_size(student_tokenizer)),
        teacher_hidden_size=None if teacher_embedding is None else _width(teacher_embedding),
        teacher_embedding=teacher_embedding,
        teacher_head=None
        if teacher is None or teacher_tokenizer is None
        else output_head(teacher, vocabulary_size(teacher_tokenizer)),
        teacher_tokenizer=teacher_tokenizer,
        student_end_token_id=pair_tokenizer.student.end_token_id,
        teacher_end_token_id=None if pair_tokenizer.teacher is None else pair_tokenizer.teacher.end_token_id,
        student_trunk=trunk_shape(student),
        teacher_trunk=None if teacher is None else trunk_shape(teacher),
    )
    parts = [objective_class(term.name)(term.config, setup) for term in settings.terms]
    if not settings.is_composed:
        return parts[0]
    weighted = zip(settings.terms, parts, strict=True)
    return Composition([WeightedPart(term.name, term.weight, part) for term, part in weighted])


def check_lengths(pairs: PairDataset | StreamingPairs | None, sides: Mapping[Side, PreTrainedModel | None]) -> None:
    """Refuse rows that are longer than a model with learned positions can read: it has no embedding for the rest.

    Raises:
        UserError: names the side and both lengths.
    """
    if not isinstance(pairs, PairDataset):
        return
    for side, model in sides.items():
        most = None if model is None else learned_positions(model)
        if most is None:
            continue
        longest = max(len(tokens.input_ids) for pair in pairs if (tokens := getattr(pair, side)) is not None)
        if longest > most:
            raise UserError(
                f"{side}: the longest row has {longest} tokens, but the model has positions for {most}; set "
                f"data.max_length to {most} or less."
            )


def told_if_swapped(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Say so where the student is the larger one, which is rarely meant but can be."""
    sizes = [base_model(model).num_parameters() for model in (student, teacher)]
    if sizes[0] > sizes[1]:
        logger.warning(
            "the student has %s parameters and the teacher %s: if they were swapped, swap the models of the sections "
            "student and teacher",
            *(f"{size:,}" for size in sizes),
        )


def _width(embedding: nn.Module) -> int:
    """Width of the last hidden states too: the head reads them at the embedding's width."""
    return cast(nn.Embedding, embedding).embedding_dim


class EndlessPairs(IterableDataset[TokenizedPair]):
    """A stream of pairs that starts over at its end, so that ``max_steps`` alone says how long to train.

    A finite stream would end inside a gradient accumulation, and a resumed run would not find its place in a later
    pass.
    """

    def __init__(self, pairs: StreamingPairs):
        self.pairs = pairs

    def __iter__(self) -> Iterator[TokenizedPair]:
        while True:
            yield from self.pairs


def as_pairs(
    data: Any, pair_tokenizer: PairTokenizer, *, progress: bool = False
) -> PairDataset | StreamingPairs | None:
    """Tokenize rows in any form that :func:`vocabridge.text.read_examples` takes; pairs stay as they are."""
    if data is None or isinstance(data, PairDataset | StreamingPairs):
        return data
    examples = data if isinstance(data, list) and data and isinstance(data[0], Example) else read_examples(data)
    return cached_pairs(examples, pair_tokenizer, progress=progress)


def refuse_own_folder(model: PreTrainedModel | str, output_dir: str | None, side: Side) -> None:
    """Refuse to save over the folder that a model came from.

    Raises:
        UserError: ``output_dir`` is that folder.
    """
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if name and output_dir and Path(name).is_dir() and real_path(name) == real_path(output_dir):
        raise UserError(f"output_dir is the {side}'s own folder '{name}', which saving would overwrite; name another.")
