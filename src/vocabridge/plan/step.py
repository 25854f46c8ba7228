"""What a step adds to what a rank holds: activations, packed states, logits by chunks.

Letters: B rows of a micro-batch, L tokens of a row, T = B L, N and M supervised positions of student and teacher (as if
prompts were empty: N = M = T), H and H' widths, V and V' vocabularies, n layers; ``b`` bytes of a number.

    student activations    what autograd keeps of its trunk (:mod:`vocabridge.plan.activations`);
                           with checkpointing b T H for each layer, 2 b T H for the last norm, and one layer's
    teacher activations    one layer's: nothing is kept without a gradient
    objective              4 (N + M) (in + out) for every learned matrix [out, in]
    packed states          2 b N H + b' M H', and 2 (b N H + b' M H') where states are projected into the other space
    chunks of logits       min(256 MiB, b N v) + 6 min(block, 4 N v), v all vocabularies that are read at once
    gradient of the head   4 V H for every term that applies it, besides the parameter's own
    copies of heads        2 bytes a number, where autocast casts heads of 4 bytes
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vocabridge.losses.chunked_head import ACCELERATOR_BLOCK_BYTES, BLOCK_BYTES, DEFAULT_CHUNK_BYTES
from vocabridge.models.heads import base_model
from vocabridge.plan.activations import TrunkActivations, layer_activations, trunk_activations
from vocabridge.plan.models import PlannedModels, layers_of, num_elements
from vocabridge.plan.training_state import Placement
from vocabridge.recipe import Recipe

_BLOCK_TENSORS = 6
"""Logits-sized tensors of a block: logits of both sides, their log-probabilities, probabilities and gradients."""

_BITS_4 = 0.5 + 4 / 64
"""Bytes of a number in 4 bits with a float32 scale for each 64."""


@dataclass(frozen=True, slots=True)
class Part:
    """Something that takes memory."""

    name: str
    num_bytes: int
    basis: str
    """What the number stands on, in a few words."""


@dataclass(frozen=True, slots=True)
class Step:
    """What of a recipe decides the memory of a step."""

    rows: int
    """B."""
    length: int
    """L, of either side."""
    checkpoint_every: int | None
    """Every so many layers one is computed again in the backward pass; None: none is."""
    on_cpu: bool
    teacher_is_cached: bool
    quantization: str | None
    """Of the teacher."""
    teacher_pieces: int
    """Processes that share the teacher's layers; 1: each holds them whole."""
    costs: tuple[str, ...]
    """Cost class of each term of the objective."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.rows * self.length


def step_of(recipe: Recipe, world_size: int = 1) -> Step:
    """The longest step that ``recipe`` allows on so many ranks: every row has ``data.max_length`` tokens."""
    arguments = recipe.training.arguments()
    multiple = arguments.get("pad_to_multiple_of") or 1
    length = -(-recipe.data.max_length // multiple) * multiple
    num_sides = 1 if recipe.teacher is None else 2
    budget = arguments.get("max_tokens_per_batch")
    rows = arguments.get("per_device_train_batch_size", 8) if budget is None else max(1, budget // (num_sides * length))
    return Step(
        rows=rows,
        length=length,
        checkpoint_every=_checkpoint_every(arguments),
        on_cpu=bool(arguments.get("use_cpu")),
        teacher_is_cached=recipe.teacher is not None and recipe.teacher.cache is not None,
        quantization=None if recipe.teacher is None else recipe.teacher.quantization,
        teacher_pieces=world_size if recipe.training.shard_teacher else 1,
        costs=tuple(term.config.cost for term in recipe.objective.terms),
    )


def has_checkpointing(arguments: Mapping[str, Any]) -> bool:
    """Whether the training arguments ask for it, under its name of today or before."""
    given = arguments.get("activation_checkpointing")
    return bool(arguments.get("gradient_checkpointing") if given is None else given)


def _checkpoint_every(arguments: Mapping[str, Any]) -> int | None:
    if not has_checkpointing(arguments):
        return None
    options = arguments.get("activation_checkpointing_kwargs") or arguments.get("gradient_checkpointing_kwargs")
    return int(options.get("every_n_layers", 1)) if isinstance(options, dict) else 1


def teacher_weight_bytes(teacher: nn.Module, step: Step) -> int:
    """Of the frozen teacher on every rank: whole, its layers in pieces, or with a cache embeddings and head alone.

    With pieces two whole layers come on top: the one that runs, and the next one, which is gathered meanwhile.
    """
    inside = {id(value) for layer in layers_of(teacher) for value in layer.parameters()}
    outside = sum(value.nbytes for value in teacher.parameters() if id(value) not in inside)
    if step.teacher_is_cached:
        return outside
    linear = {
        id(module.weight) for layer in layers_of(teacher) for module in layer.modules() if isinstance(module, nn.Linear)
    }
    of_number = {"8bit": 1.0, "4bit": _BITS_4}.get(step.quantization or "")
    of_layers = [
        sum(
            value.nbytes if of_number is None or id(value) not in linear else int(value.numel() * of_number)
            for value in layer.parameters()
        )
        for layer in layers_of(teacher)
    ]
    if step.teacher_pieces == 1:
        return outside + sum(of_layers)
    return outside + sum(of_layers) // step.teacher_pieces + sum(sorted(of_layers)[-2:])


def step_parts(models: PlannedModels, step: Step, placement: Placement) -> Iterator[Part]:
    """Everything of the module's docstring that is not 0, but what is not known; see :func:`unknown`."""
    yield from _activations(models, step, placement)
    rows = step.num_tokens * 2
    learned = [value for value in models.objective.parameters() if value.dim() == 2]
    yield Part("objective's activations", sum(4 * rows * sum(value.shape) for value in learned), "learned matrices")
    yield Part("packed hidden states", _packed_bytes(models, step), f"{step.num_tokens:,} positions a side at most")
    yield from _head_parts(models, step, placement)


def unknown(models: PlannedModels, step: Step, placement: Placement) -> Iterator[str]:
    """Sentences on what :func:`step_parts` leaves out."""
    for side, model in (("student", models.student), ("teacher", models.teacher)):
        runs = model is not None and not (side == "teacher" and step.teacher_is_cached)
        if runs and model is not None and _is_unknown(model, step, placement, is_student=side == "student"):
            name = type(base_model(model)).__name__
            yield f"the {side}'s activations are not counted: what {name} computes depends on values, not shapes alone"


def _is_unknown(model: nn.Module, step: Step, placement: Placement, *, is_student: bool) -> bool:
    return (_student_trunk(model, step, placement) if is_student else layer_activations(model, step.length)) is None


def _activations(models: PlannedModels, step: Step, placement: Placement) -> Iterator[Part]:
    if (kept := _student_trunk(models.student, step, placement)) is not None:
        if kept.constant:
            yield Part("copies of weights", kept.constant, "autocast's, in 2 bytes")
        basis = f"{step.rows} x {step.length} tokens{', checkpointing' if step.checkpoint_every else ''}"
        whole = step.rows * kept.per_row
        yield Part("student's activations", _checkpointed(whole, models.student, step, placement), basis)
    if models.teacher is None or step.teacher_is_cached:
        return
    if (layer := layer_activations(models.teacher, step.length)) is not None:
        yield Part("teacher's activations", step.rows * layer, "one layer at a time")


def _checkpointed(whole: int, student: nn.Module, step: Step, placement: Placement) -> int:
    """Of ``whole``, what is held when the backward pass computes the last layer again."""
    if step.checkpoint_every is None:
        return whole
    num_layers = max(1, len(layers_of(student)))
    num_again = math.ceil(num_layers / step.checkpoint_every)
    width = base_model(student).config.get_text_config().hidden_size
    inputs = (num_again + 2) * step.num_tokens * width * _stream_bytes(student, placement)
    return inputs + whole * (num_layers - num_again + 1) // num_layers


def _student_trunk(student: nn.Module, step: Step, placement: Placement) -> TrunkActivations | None:
    weights = torch.bfloat16 if placement.half and not placement.uses_autocast else None
    return trunk_activations(student, step.length, autocast=placement.uses_autocast, weights=weights)


def _stream_bytes(student: nn.Module, placement: Placement) -> int:
    """Of a number that passes from layer to layer: autocast leaves it in the embeddings' type."""
    if placement.half and not placement.uses_autocast:
        return 2
    return next(iter(base_model(student).get_input_embeddings().parameters())).itemsize


def _packed_bytes(models: PlannedModels, step: Step) -> int:
    student = step.num_tokens * _row_bytes(models.student)
    teacher = 0 if models.teacher is None else step.num_tokens * _row_bytes(models.teacher)
    is_projected = "both heads twice" in step.costs
    return 2 * student + teacher + (2 * (student + teacher) if is_projected else 0)


def _row_bytes(model: nn.Module) -> int:
    weight = _head(model)
    return weight.shape[1] * weight.itemsize


def _head(model: nn.Module) -> Tensor:
    head = base_model(model).get_output_embeddings()
    assert head is not None, "a causal language model has a head"
    weight = head.weight
    assert isinstance(weight, Tensor)
    return weight


def _head_parts(models: PlannedModels, step: Step, placement: Placement) -> Iterator[Part]:
    student = _head(models.student)
    heads = [student] if models.teacher is None else [student, _head(models.teacher)]
    width = max((_columns(heads, cost) for cost in step.costs), default=0)
    if width:
        itemsize = 2 if placement.half else max(head.itemsize for head in heads)
        block = BLOCK_BYTES["cpu"] if step.on_cpu else ACCELERATOR_BLOCK_BYTES
        chunk = min(DEFAULT_CHUNK_BYTES, itemsize * step.num_tokens * width)
        blocks = _BLOCK_TENSORS * min(block, 4 * step.num_tokens * width)
        yield Part("chunks of logits", chunk + blocks, f"{len(heads)} vocabularies" if len(heads) > 1 else "vocabulary")
    num_terms = sum(cost != "no head" for cost in step.costs)
    if student.requires_grad and num_terms:
        yield Part("gradient of the head", 4 * num_terms * student.numel(), f"float32, {num_terms} term(s)")
    if placement.uses_autocast:
        cast = [head for head in heads if head.itemsize > 2]
        yield Part("copies of heads", 2 * num_elements(cast), "autocast's, in 2 bytes")


def _columns(heads: list[Tensor], cost: str) -> int:
    """Logits of a position that a term may read at once."""
    if cost == "no head":
        return 0
    read = heads[:1] if cost == "student head" else heads
    return sum(len(head) for head in read) * (2 if cost == "both heads twice" else 1)
