"""What is to be evaluated, checked and read before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from vocabridge.errors import UserError
from vocabridge.evaluation.engine import GenerationSettings
from vocabridge.suggest import did_you_mean
from vocabridge.text import Example, ExampleSource, read_examples

PAPER_SEEDS = (10, 20, 30, 40, 50)

DataFiles = Mapping[str, ExampleSource] | Sequence[str | PathLike[str]]
"""Paths or dataset names, or a mapping from names of one's own to anything that ``read_examples`` takes."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file: its rows that have a response, and how many have none."""

    name: str
    in_domain: bool
    examples: list[Example]
    num_without_response: int


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Files, seeds and settings of one evaluation."""

    files: tuple[DataFile, ...]
    seeds: tuple[int, ...]
    settings: GenerationSettings


def plan_evaluation(
    files: DataFiles,
    *,
    seeds: Sequence[int],
    settings: GenerationSettings,
    limit: int | None = None,
    in_domain: Sequence[str] | None = None,
) -> EvaluationPlan:
    """Read the files and check the seeds and names.

    Args:
        files: see ``DataFiles``.
        seeds: one generation of every response each; greedy decoding keeps only the first.
        settings: how responses are generated.
        limit: use only the first so many rows of each file.
        in_domain: names of the in-domain files; None or nothing means the first file.

    Raises:
        UserError: a seed, name, file or row that cannot be used.
    """
    seeds = _checked_seeds(seeds, settings)
    sources = named_sources(files)
    in_domain_names = _checked_in_domain(in_domain, list(sources))
    return EvaluationPlan(
        files=tuple(
            _read(name, source, limit=limit, in_domain=name in in_domain_names) for name, source in sources.items()
        ),
        seeds=seeds,
        settings=settings,
    )


def named_sources(files: DataFiles) -> dict[str, ExampleSource]:
    """Names for data files: the stem, with the folder in front where two stems are equal.

    >>> list(named_sources(["dolly/test.jsonl", "self-instruct/test.jsonl", "dolly/dev.jsonl"]))
    ['dolly-test', 'self-instruct-test', 'dev']

    Raises:
        UserError: no file, a file given twice, or names that cannot be told apart.
    """
    if isinstance(files, Mapping):
        if bad := [name for name in files if not name or Path(name).name != name]:
            raise UserError(f"'{bad[0]}' cannot name a data file: predictions are stored under that name.")
        sources: dict[str, ExampleSource] = dict(files)
    else:
        paths = [Path(path) for path in files]
        if twice := [path for index, path in enumerate(paths) if path in paths[:index]]:
            raise UserError(f"the data file {twice[0]} is given twice.")
        stems = [path.stem for path in paths]
        names = [
            path.stem if stems.count(path.stem) == 1 else f"{path.absolute().parent.name}-{path.stem}" for path in paths
        ]
        if same := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two data files would both be called '{same[0]}'; rename one of them or its folder.")
        sources = dict(zip(names, map(str, files), strict=True))
    if not sources:
        raise UserError("there is no data file to evaluate on.")
    return sources


def _checked_seeds(seeds: Sequence[int], settings: GenerationSettings) -> tuple[int, ...]:
    if not seeds:
        raise UserError("evaluation.seeds is empty; give at least one seed.")
    for index, seed in enumerate(seeds):
        if seed < 0:
            raise UserError(f"evaluation.seeds holds {seed}; a seed is a whole number from 0 on.")
        if seed in seeds[:index]:
            raise UserError(f"evaluation.seeds holds {seed} twice; the same seed gives the same text.")
    return tuple(seeds[:1]) if settings.greedy else tuple(seeds)


def _checked_in_domain(in_domain: Sequence[str] | None, names: list[str]) -> frozenset[str]:
    if not in_domain:
        return frozenset(names[:1])
    for name in in_domain:
        if name not in names:
            hint = did_you_mean(name, names) or "."
            raise UserError(f"evaluation.in_domain: there is no data file '{name}'{hint} Known: {', '.join(names)}.")
    return frozenset(in_domain)


def _read(name: str, source: ExampleSource, *, limit: int | None, in_domain: bool) -> DataFile:
    rows = read_examples(source, limit=limit)
    examples = [example for example in rows if example.response.strip()]
    if not examples:
        raise UserError(f"{name}: none of its {len(rows)} rows has a response to compare with.")
    return DataFile(name, in_domain, examples, num_without_response=len(rows) - len(examples))
