"""The ``training`` section: every field of ``transformers.TrainingArguments`` by its own name, and a few of ours.

Importing ``transformers.TrainingArguments`` takes seconds, so its field names and types are read from the installed
source file instead; a new transformers release brings its new fields along.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import annotated_types
from pydantic import Field, create_model

from vocabridge.settings import LARGEST_INTEGER, Name, Settings

_SIMPLE_TYPES = {"int": int, "float": float, "bool": bool, "str": str}
_LIMITS = {
    **dict.fromkeys(
        ("learning_rate", "num_train_epochs", "logging_steps", "save_steps", "eval_steps", "ddp_timeout"),
        annotated_types.Gt(0),
    ),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "dataloader_prefetch_factor",
            "save_total_limit",
        ),
        annotated_types.Ge(1),
    ),
    **dict.fromkeys(
        ("weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "dataloader_num_workers", "eval_delay"),
        annotated_types.Ge(0),
    ),
    **dict.fromkeys(("seed", "data_seed"), annotated_types.Interval(ge=0, le=LARGEST_INTEGER)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), annotated_types.Interval(ge=0, lt=1)),
    "max_steps": annotated_types.Ge(-1),
}
_CHOICES = dict.fromkeys(
    ("log_level", "log_level_replica"),
    Literal["detail", "debug", "info", "warning", "error", "critical", "passive"],
)
"""Of fields whose annotation is any text."""
NOT_TAKEN = {
    "resume_from_checkpoint": "continue a run with 'vocabridge distill RECIPE --resume'",
    "do_train": "'vocabridge distill' always trains",
    "do_eval": "set eval_strategy and data.validation",
    "do_predict": "use the evaluation section or 'vocabridge evaluate'",
    "local_rank": "torchrun and accelerate set it",
    "remove_unused_columns": "batches are plain tensors, no column is ever removed",
    "auto_find_batch_size": "steps would come to hold other rows than the recipe says; 'vocabridge plan' tells what "
    "fits, and training.max_tokens_per_batch bounds a batch",
    "average_tokens_across_devices": "losses are divided by the tokens of all processes, always",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint and stops anyway, and a second handler of it would be in the "
    "way",
    "save_on_each_node": "the first process writes for all, since all machines must see the run folder",
    "hub_token": "log in with 'hf auth login' or set HF_TOKEN, so that no file of the run holds a secret",
    "hub_strategy": "push_to_hub uploads the finished run, once",
    "hub_always_push": "push_to_hub uploads the finished run, once",
}
"""Fields of TrainingArguments that a recipe cannot set, and what to do instead."""


class OwnTrainingSettings(Settings):
    """What we add to ``TrainingArguments``."""

    output_dir: Name
    """Run folder; becomes a Hugging Face checkpoint of the student. Relative to the current folder."""
    projector_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the objective's learned projectors; that of the student when left out."""
    discriminator_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the discriminator of key-query matching; that of the projectors when left out."""
    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Round the padded length of a batch up to a multiple of this (8 suits tensor cores)."""
    max_tokens_per_batch: int | None = Field(None, ge=1)
    """Most padded tokens of a batch, both sides together: rows x (longest student row + longest teacher row). Rows of
    similar length share a batch, as many as fit; takes the place of ``per_device_train_batch_size`` and bounds
    evaluation batches too."""
    diagnostics_steps: int = Field(50, ge=0)
    """Optimizer steps between two measurements of the distance between queries and keys; 0 means never."""
    diagnostics_examples: int = Field(32, ge=1)
    """Training examples in the fixed set on which that distance is measured."""

    shard_teacher: bool = False
    """Each process holds a piece of every layer of the teacher and gathers a layer when it runs; needs several
    processes. For teachers that do not fit whole beside the student."""

    def arguments(self) -> dict[str, Any]:
        """What the recipe sets, and our own defaults: the keyword arguments of the training arguments class."""
        ours = {name: getattr(self, name) for name in OwnTrainingSettings.model_fields}
        return {**ours, **self.model_dump(exclude_unset=True)}


@functools.cache
def training_argument_types() -> dict[str, Any]:
    """Field name -> type of ``TrainingArguments``, for the fields that a YAML file can express."""
    tree, other = _parse("training_args.py"), _parse("trainer_utils.py")
    enums = {node.name: _enum_values(node) for node in [*tree.body, *other.body] if isinstance(node, ast.ClassDef)}
    fields = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    types: dict[str, Any] = {}
    for node in fields.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            members = _members(node.annotation, enums)
            if node.target.id in _CHOICES:
                types[node.target.id] = _CHOICES[node.target.id]
            elif members - {None} and node.target.id not in NOT_TAKEN:
                types[node.target.id] = Union[tuple(sorted(members, key=str))]  # noqa: UP007 - built at run time
    return types


def _parse(file_name: str) -> ast.Module:
    spec = importlib.util.find_spec("transformers")
    folders = spec.submodule_search_locations if spec else None
    assert folders, "transformers is a dependency of this package"
    return ast.parse((Path(folders[0]) / file_name).read_text(encoding="utf-8"))


def _enum_values(node: ast.ClassDef) -> list[str]:
    return [
        item.value.value
        for item in node.body
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str)
    ]


def _members(annotation: ast.expr, enums: dict[str, list[str]]) -> set[Any]:
    """The simple types of an annotation such as ``SchedulerType | str`` or ``dict[str, Any] | str | None``."""
    match annotation:
        case ast.BinOp(left=left, right=right):
            members = _members(left, enums) | _members(right, enums)
            named = any(isinstance(side, ast.Name) and enums.get(side.id) for side in (left, right))
            return members - {str} if named else members  # "SchedulerType | str" still means one of the enum's values
        case ast.Constant(value=None):
            return {None}
        case ast.Name(id=name) if name in _SIMPLE_TYPES:
            return {_SIMPLE_TYPES[name]}
        case ast.Name(id=name) if enums.get(name):
            return {Literal[tuple(enums[name])]}
        case ast.Name(id="dict") | ast.Subscript(value=ast.Name(id="dict")):
            return {dict[str, Any]}
        case ast.Name(id="list") | ast.Subscript(value=ast.Name(id="list")):
            return {list[str]}
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Constant(value=value)):
            return {Literal[value]}
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return {None} | _members(inner, enums)
    return set()


def _with_limit(name: str, annotation: Any) -> Any:
    return Annotated[annotation, _LIMITS[name]] if name in _LIMITS else annotation


if TYPE_CHECKING:
    TrainingSettings = OwnTrainingSettings
else:
    TrainingSettings = create_model(
        "TrainingSettings",
        __base__=OwnTrainingSettings,
        __doc__="Every field of ``transformers.TrainingArguments``, and ours.",
        **{
            name: (_with_limit(name, annotation), None)
            for name, annotation in training_argument_types().items()
            if name not in OwnTrainingSettings.model_fields
        },
    )
