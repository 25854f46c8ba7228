"""What a recipe holds: one frozen, validated section per stage, in the order of the pipeline."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from vocabridge.errors import UserError
from vocabridge.models.spec import CacheSpec, Dtype, Engine, ModelSpec, check_side
from vocabridge.recipe.objective import ObjectiveSettings
from vocabridge.recipe.training import TrainingSettings
from vocabridge.recipe.yaml_text import dump
from vocabridge.settings import LARGEST_INTEGER, Name, Settings, real_path
from vocabridge.suggest import did_you_mean
from vocabridge.text import Example, read_examples


def _one_or_many(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


Names = Annotated[tuple[Annotated[Name, Field(min_length=1)], ...], BeforeValidator(_one_or_many)]
"""One name or a list of names."""


Seed = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]


class DataSettings(Settings):
    """Which text is learned from."""

    train: Annotated[Names, Field(min_length=1)]
    """JSONL files, ``datasets`` folders or hub ids, read one after the other."""
    validation: Names = ()
    """The same for the loss during training; needs ``training.eval_strategy``."""
    max_length: int = Field(512, ge=8)
    """Longest prompt and response together, in tokens of each side; longer responses are cut at the same byte."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many training examples."""
    streaming: bool = False
    """Read the training data while training instead of before; needs ``training.max_steps``."""

    def training_examples(self) -> list[Example]:
        """All that is learned from, held in memory.

        Raises:
            UserError: a source is missing or empty, or a row is broken; names the file, line and field.
        """
        return read_examples(self.train, limit=self.limit)

    def validation_examples(self) -> list[Example]:
        """The same of ``validation``; an empty list where that names nothing."""
        return read_examples(self.validation) if self.validation else []


class EvaluationSettings(Settings):
    """What the finished student is measured on, and how it generates."""

    data: Annotated[Names, Field(min_length=1)]
    """Files to score, each on its own."""
    in_domain: Names = ()
    """Names of the files that resemble the training data (first file when left out); the rest is out of domain.

    A file's name is that of ``dolly.jsonl`` without its ending, with the folder in front (``dolly-test`` for
    ``dolly/test.jsonl``) where two files share it.
    """
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (10, 20, 30, 40, 50)
    """Sampling seeds; scores are reported for each, with mean and standard deviation."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest generated response, in tokens."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Share of the probability mass that is sampled from."""
    batch_size: int = Field(16, ge=1)
    """Prompts generated at once."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many examples of each file."""
    dtype: Dtype = "auto"
    """Type of the weights while evaluating; ``auto`` is that of the saved student."""
    engine: Engine = "transformers"
    """What generates; ``vllm`` must be installed."""

    @field_validator("data", "seeds")
    @classmethod
    def _once(cls, given: tuple[Any, ...]) -> tuple[Any, ...]:
        for index, item in enumerate(given):
            if item in given[:index]:
                raise ValueError(f"{item} is given twice")
        return given


class Recipe(Settings):
    """A whole distillation run; made by :func:`vocabridge.recipe.load_recipe` or ``recipe_from_values``."""

    data: DataSettings
    student: ModelSpec
    teacher: ModelSpec | None = None
    objective: ObjectiveSettings
    training: TrainingSettings
    evaluation: EvaluationSettings | None = None

    def values(self) -> dict[str, Any]:
        """Plain values, in pipeline order; :func:`vocabridge.recipe.recipe_from_values` reads them back."""
        sections = {
            "data": self.data.model_dump(mode="json"),
            "student": self.student.model_dump(mode="json"),
            "teacher": self.teacher and self.teacher.model_dump(mode="json"),
            "objective": self.objective.values(),
            "training": self.training.arguments(),
            "evaluation": self.evaluation and self.evaluation.model_dump(mode="json"),
        }
        return {name: section for name, section in sections.items() if section is not None}

    def resolved_yaml(self) -> str:
        """The recipe with overrides applied, paths resolved and defaults written out, to keep beside the results."""
        return dump(self.values())


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two settings that do not go together, told at one of them."""

    key: str
    problem: str


def conflicts(sections: Mapping[str, Any]) -> list[Conflict]:
    """Impossible pairs among the sections that are present and valid; the others are skipped."""
    data, student, teacher = sections.get("data"), sections.get("student"), sections.get("teacher")
    objective, training = sections.get("objective"), sections.get("training")
    found: list[Conflict] = []
    if objective and "teacher" in sections and teacher is None and "teacher" in objective.needs:
        problem = f"'{objective.name}' needs a teacher, but the recipe has no 'teacher' section."
        found.append(Conflict("objective.name", problem))
    if teacher and teacher.cache is not None:
        found += _cache_conflicts(teacher.cache, sections)
    for side, model in (("student", student), ("teacher", teacher)):
        if model:
            found += _model_conflicts(side, model, training)
    if training and training.shard_teacher and "teacher" in sections:
        found += _shard_conflicts(teacher)
    if training:
        found += _training_conflicts(data, training)
        found += _folder_conflicts(sections, training)
    if evaluation := sections.get("evaluation"):
        found += _evaluation_conflicts(evaluation)
    return found


def _model_conflicts(side: Any, model: ModelSpec, training: TrainingSettings | None) -> list[Conflict]:
    found = []
    try:
        check_side(model, side)
    except UserError as error:
        key, _, problem = str(error).partition(" ")
        found.append(Conflict(key, problem))
    if training and model.device is not None:
        problem = f"is '{model.device}', but training places the models itself; leave it out or set training.use_cpu."
        found.append(Conflict(f"{side}.device", problem))
    if side == "student" and model.dtype == "float16" and model.lora is None:
        problem = "is 'float16', in which small gradients vanish; leave it out, and set training.bf16 or fp16."
        found.append(Conflict("student.dtype", problem))
    return found


def _shard_conflicts(teacher: ModelSpec | None) -> list[Conflict]:
    if teacher is None:
        problem = "has nothing to share out, since the recipe has no 'teacher' section; remove it."
    elif teacher.cache is not None:
        problem = (
            "has nothing to share out: with teacher.cache no layer of the teacher is loaded; remove one of the two."
        )
    elif teacher.quantization is not None:
        problem = "cannot cut quantised weights into pieces; remove it or teacher.quantization."
    else:
        return []
    return [Conflict("training.shard_teacher", problem)]


def _cache_conflicts(cache: CacheSpec, sections: Mapping[str, Any]) -> list[Conflict]:
    data, objective, training = sections.get("data"), sections.get("objective"), sections.get("training")
    found = []
    if training and cache.folder is not None:
        run_dir, folder = map(real_path, (training.output_dir, cache.folder))
        if folder == run_dir or run_dir in folder.parents:
            problem = f"lies in the run folder '{run_dir}', which --overwrite would delete; name another folder."
            found.append(Conflict("teacher.cache", problem))
    if objective and "layers" in objective.needs:
        problem = f"holds last hidden states only, but objective '{objective.name}' reads inner layers; remove it."
        found.append(Conflict("teacher.cache", problem))
    if data and data.streaming:
        problem = "needs the rows before training, which data.streaming does not know; remove one of the two."
        found.append(Conflict("teacher.cache", problem))
    return found


def _folder_conflicts(sections: Mapping[str, Any], training: TrainingSettings) -> list[Conflict]:
    """What the run would write over, or ``--overwrite`` delete: its own inputs, or the folder you stand in."""
    run_dir = real_path(training.output_dir)
    found = []
    if run_dir == Path.cwd() or run_dir in Path.cwd().parents or run_dir == Path.home():
        problem = f"is '{run_dir}', which holds more than this run; name a new folder."
        found.append(Conflict("training.output_dir", problem))
    inputs = []
    for side in ("student", "teacher"):
        if model := sections.get(side):
            inputs += [(f"the {side}'s own folder", name) for name in (model.model, model.tokenizer) if name]
    if data := sections.get("data"):
        inputs += [("the data", name) for name in (*data.train, *data.validation)]
    if evaluation := sections.get("evaluation"):
        inputs += [("the data", name) for name in evaluation.data]
    for what, name in dict.fromkeys(inputs):
        path = real_path(name)
        if run_dir == path or (path.exists() and run_dir in path.parents):
            problem = f"is or contains {what} '{name}', which the run would overwrite; choose another."
            found.append(Conflict("training.output_dir", problem))
    return found


def _training_conflicts(data: DataSettings | None, training: TrainingSettings) -> list[Conflict]:
    arguments = training.arguments()
    max_steps, eval_strategy = arguments.get("max_steps", -1), arguments.get("eval_strategy", "no")
    found = []
    if data and data.streaming and max_steps <= 0:
        problem = "needs training.max_steps: the length of a stream is not known beforehand."
        found.append(Conflict("data.streaming", problem))
    if data and eval_strategy != "no" and not data.validation:
        problem = f"is '{eval_strategy}', but data.validation names no data to evaluate on."
        found.append(Conflict("training.eval_strategy", problem))
    if arguments.get("load_best_model_at_end") and eval_strategy == "no":
        problem = "needs training.eval_strategy and data.validation: without them no checkpoint is the best."
        found.append(Conflict("training.load_best_model_at_end", problem))
    if data and data.streaming:
        found += [
            Conflict(f"training.{key}", "needs the length of every row, but data.streaming is true.")
            for key in _length_keys(arguments)
        ]
    if arguments.get("max_tokens_per_batch") and "per_device_train_batch_size" in arguments:
        problem = "takes the place of training.per_device_train_batch_size; leave one of them out."
        found.append(Conflict("training.max_tokens_per_batch", problem))
    if max_steps == 0:
        found.append(Conflict("training.max_steps", "is 0; leave it out to train by epochs, or give at least 1."))
    return found


def _length_keys(arguments: Mapping[str, Any]) -> Iterator[str]:
    """What asks for rows grouped by length."""
    if arguments.get("max_tokens_per_batch"):
        yield "max_tokens_per_batch"
    if arguments.get("train_sampling_strategy") == "group_by_length":
        yield "train_sampling_strategy"


def _evaluation_conflicts(evaluation: EvaluationSettings) -> list[Conflict]:
    """Told here because the evaluation comes last: a misspelled name would show after hours of training."""
    paths = [Path(name).absolute() for name in evaluation.data]
    stems = [path.stem for path in paths]
    known = [path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}-{path.stem}" for path in paths]
    wrong = [name for name in evaluation.in_domain if name not in known]
    found = [
        Conflict(
            "evaluation.in_domain",
            f"names '{name}', which is no data file{did_you_mean(name, known) or '.'} Known: {', '.join(known)}.",
        )
        for name in wrong
    ]
    if evaluation.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        problem = "is 'vllm', but that package is not installed (pip install 'vocabridge[vllm]'); install or remove it."
        found.append(Conflict("evaluation.engine", problem))
    return found
