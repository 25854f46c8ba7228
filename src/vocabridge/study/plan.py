"""From a study file to its runs, every one of them checked before the first starts.

::

    base: recipes/quickstart.yaml        # a recipe's file, or its sections written here
    output_dir: build/ablation           # relative to the current folder, as in a recipe
    baseline: dskd_cma
    baselines: {dskd_cma_ga_frozen: dskd_cma_ga}   # optional: variants that are compared with another one
    seeds: [0, 1, 2, 3, 4]               # training seeds
    evaluation:                          # laid over the recipe's own section; the same for all variants
      data: [data/test.jsonl, data/self-instruct.jsonl]
      seeds: [10, 20, 30]                # sampling seeds
    variants:                            # what each changes in the recipe, as overrides on the command line do
      dskd_cma: {objective.matching: none}
      dskd_cma_ga: {}
      dskd_cma_ga_frozen: {objective.gan.train_discriminator: false}
      sft: {teacher: null, objective: {name: cross_entropy}}

Imports no torch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from vocabridge.errors import UserError
from vocabridge.recipe import Recipe, yaml_text
from vocabridge.recipe.loading import Source, build_recipe, make_absolute, read_recipe_file, set_value
from vocabridge.recipe.problems import Problem, boolean_problems, validation_problems, without_echoes
from vocabridge.settings import Name, Settings, real_path
from vocabridge.suggest import did_you_mean

_VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_SET_BY_THE_STUDY = {
    "evaluation": "the study's own 'evaluation' section, so that all variants are measured alike",
    "training.seed": "the study's 'seeds'",
    "training.output_dir": "the study's 'output_dir'",
}
"""What a variant may not change, and where it is set instead."""


class StudySettings(Settings):
    """A study file."""

    base: Name | dict[str, Any]
    """Recipe that the variants change: a file, or its sections."""
    output_dir: Name = Field(min_length=1)
    """Folder of the study; each run has its own in ``runs/VARIANT/seedN``."""
    baseline: str
    """Variant that the others are compared with."""
    baselines: dict[str, str] = Field(default_factory=dict)
    """Variant -> the one that it is compared with instead, so that an ablation changes one thing and nothing else."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Training seeds; every variant is trained with each."""
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Name -> what it changes: ``section.key: value``, or ``section: {...}`` for a whole section."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Keys of a recipe's evaluation section: files, sampling seeds, how responses are generated."""

    @field_validator("seeds")
    @classmethod
    def _once(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        for index, seed in enumerate(given):
            if seed in given[:index]:
                raise ValueError(f"{seed} is given twice")
        return given


@dataclass(frozen=True, slots=True, eq=False)  # a recipe may hold dicts, which have no hash
class PlannedRun:
    """One variant trained with one seed; equal to itself only.

    Attributes:
        variant: the variant's name.
        seed: the training seed.
        folder: run folder, a Hugging Face checkpoint in the end.
        recipe: what is trained; its ``output_dir`` is ``folder``.
    """

    variant: str
    seed: int
    folder: Path
    recipe: Recipe

    @property
    def title(self) -> str:
        """What messages call the run."""
        return f"{self.variant}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """All runs of a study, seed by seed, so that an unfinished study has every variant with some seeds."""

    source: Path
    folder: Path
    baseline: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]
    baselines: Mapping[str, str] = field(default_factory=dict)

    def baseline_of(self, variant: str) -> str:
        """What the variant is compared with; the study's baseline is its own."""
        return self.baselines.get(variant, self.baseline)


@dataclass(frozen=True, slots=True)
class _Base:
    """The base recipe's sections and where they were written."""

    values: dict[str, Any]
    file: str
    lines: Mapping[yaml_text.Path, int]


def load_study(path: str | Path) -> StudyPlan:
    """Read a study file and check the recipe of every run.

    Raises:
        UserError: names every problem, one line each, with file, line and key.
    """
    file = Path(path)
    mapping = read_recipe_file(file)
    settings = _settings(mapping, str(path))
    base = _base(settings, mapping, file)
    make_absolute(evaluation := {"evaluation": copy.deepcopy(settings.evaluation)}, file.parent)
    base.values["evaluation"] = (base.values.get("evaluation") or {}) | evaluation["evaluation"]
    folder = Path(settings.output_dir)
    in_base = _problems_of_base(base, folder)
    recipes: dict[tuple[str, int], Recipe] = {}
    problems: list[str] = []
    for variant, overrides in settings.variants.items():
        place = f"{path}:{mapping.lines.get(('variants', variant), 0)}: variants.{variant}"
        try:
            for seed in settings.seeds:
                own = {"training.seed": seed, "training.output_dir": str(run_folder(folder, variant, seed))}
                recipes[variant, seed] = _recipe(base, overrides, own=own, place=place, folder=file.parent)
        except UserError as error:
            # No variant changes the evaluation, so a mistake in it is the study's and told once.
            lines = str(error).replace(f"{place}: evaluation", f"{path}: evaluation").splitlines()
            known = (place, f"{path}: evaluation")
            problems += [line if line.startswith(known) or line in in_base else f"{place}: {line}" for line in lines]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    whole = [*_problems_of_folder(folder, recipes.values()), *_problems_of_hub(recipes.values())]
    Source(str(path), mapping.lines).refuse(whole)
    runs = tuple(
        PlannedRun(variant, seed, run_folder(folder, variant, seed), recipes[variant, seed])
        for seed in settings.seeds
        for variant in settings.variants
    )
    variants = tuple(settings.variants)
    return StudyPlan(file, folder, settings.baseline, variants, settings.seeds, runs, settings.baselines)


def run_folder(study_folder: Path, variant: str, seed: int) -> Path:
    """Where one run lies.

    >>> run_folder(Path("build/study"), "sft", 3).as_posix()
    'build/study/runs/sft/seed3'
    """
    return study_folder / "runs" / variant / f"seed{seed}"


def _settings(mapping: yaml_text.YamlMapping, file: str) -> StudySettings:
    source = Source(file, mapping.lines)
    # A variant that changes nothing reads best with nothing after its colon.
    if isinstance(variants := mapping.values.get("variants"), dict):
        mapping.values["variants"] = {name: {} if given is None else given for name, given in variants.items()}
    try:
        settings = StudySettings.model_validate(mapping.values)
    except ValidationError as error:
        source.refuse(without_echoes(validation_problems(error, StudySettings, mapping.values, ())))
        raise AssertionError("pydantic refused a study without saying why") from error
    source.refuse([*boolean_problems(settings, mapping.values, ()), *_name_problems(settings), *_taken(settings)])
    return settings


def _name_problems(settings: StudySettings) -> Iterator[Problem]:
    for name in settings.variants:
        if not _VARIANT_NAME.fullmatch(name):
            yield Problem(
                ("variants", name), "is no variant's name: use letters, digits and . _ + - (it names a folder)."
            )
    if len({name.lower() for name in settings.variants}) < len(settings.variants):
        yield Problem(("variants",), "has two names that differ in capitals only; some file systems take them for one.")
    if settings.baseline not in settings.variants:
        yield Problem(("baseline",), f"is {_no_variant(settings.baseline, settings)}")
    for name, baseline in settings.baselines.items():
        if name not in settings.variants:
            yield Problem(("baselines", name), f"is for {_no_variant(name, settings)}")
        if baseline not in settings.variants:
            yield Problem(("baselines", name), f"is {_no_variant(baseline, settings)}")
        elif baseline == name:
            yield Problem(("baselines", name), "is the variant itself; name the one that it is compared with.")


def _no_variant(name: str, settings: StudySettings) -> str:
    hint = did_you_mean(name, settings.variants) or "."
    return f"'{name}', which is no variant{hint} Known: {', '.join(settings.variants)}."


def _taken(settings: StudySettings) -> Iterator[Problem]:
    """Overrides of what the study itself sets."""
    for name, overrides in settings.variants.items():
        for key, value in overrides.items():
            for taken, instead in _SET_BY_THE_STUDY.items():
                section, _, inner = taken.partition(".")
                nested = key == section and isinstance(value, dict) and inner in value
                if key == taken or key.startswith(f"{taken}.") or nested:
                    yield Problem(("variants", name, key), f"cannot be changed by a variant: {taken} is {instead}.")


def _base(settings: StudySettings, mapping: yaml_text.YamlMapping, file: Path) -> _Base:
    if isinstance(settings.base, str):
        beside = file.parent / settings.base
        path = beside if beside.is_file() else Path(settings.base)
        if not path.is_file():
            Source(str(file), mapping.lines).refuse([Problem(("base",), f"is '{settings.base}', which is no file.")])
        recipe = read_recipe_file(path)
        return _Base(recipe.values, str(path), recipe.lines)
    values = copy.deepcopy(settings.base)
    make_absolute(values, file.parent)
    inner = {path[1:]: line for path, line in mapping.lines.items() if path[0] == "base" and len(path) > 1}
    return _Base(values, str(file), inner)


def _problems_of_base(base: _Base, folder: Path) -> set[str]:
    """What is wrong with the base as it stands, which need not be complete; all else is a variant's doing."""
    try:
        _recipe(base, {}, own={"training.output_dir": str(folder / "runs")}, place=base.file, folder=folder)
    except UserError as error:
        return set(str(error).splitlines())
    return set()


def _problems_of_folder(folder: Path, recipes: Iterable[Recipe]) -> list[Problem]:
    """A study writes beside its runs, too."""
    models = {spec.model for recipe in recipes for spec in (recipe.student, recipe.teacher) if spec is not None}
    return [
        Problem(("output_dir",), f"is the folder of the model '{model}'; name a new one.")
        for model in sorted(models)
        if real_path(model) == real_path(folder)
    ]


def _problems_of_hub(recipes: Iterable[Recipe]) -> Iterator[Problem]:
    """Run folders of all variants are called ``seed0``, ``seed1``, as their repositories would be."""
    if any(recipe.training.arguments().get("push_to_hub") for recipe in recipes):
        yield Problem(
            ("base",),
            "or a variant sets training.push_to_hub, so that runs would overwrite each other on the hub; leave it out "
            "and upload the run that you choose: hf upload REPOSITORY RUN_FOLDER . --exclude 'checkpoint-*' "
            "--exclude 'evaluation/*' --exclude 'study*' --exclude '.*'.",
        )


def _recipe(base: _Base, overrides: Mapping[str, Any], *, own: Mapping[str, Any], place: str, folder: Path) -> Recipe:
    values = copy.deepcopy(base.values)
    paths: set[yaml_text.Path] = {("evaluation",)}
    for dotted, value in [*overrides.items(), *own.items()]:
        keys = dotted.split(".")
        if not all(keys):
            raise UserError(f"{place}: '{dotted}' is no override; write section.key: value.")
        found = _with_absolute_paths(keys, copy.deepcopy(value), folder)
        paths.add(set_value(values, keys, found, place=f"{place}: '{dotted}'"))
    if not values["evaluation"]:
        raise UserError(f"{place}: the study needs an 'evaluation' section with data: without it nothing is compared.")
    return build_recipe(values, Source(base.file, base.lines, frozenset(paths), place))


def _with_absolute_paths(keys: list[str], value: Any, folder: Path) -> Any:
    """The value with data and model paths found from the study's folder, as a recipe's are from its own."""
    section: Any = value
    for key in reversed(keys):
        section = {key: section}
    make_absolute(section, folder)
    for key in keys:
        section = section[key]
    return section
