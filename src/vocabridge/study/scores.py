"""What the finished runs of a study scored: per run for tables, per example for paired tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vocabridge.errors import UserError
from vocabridge.study.plan import PlannedRun
from vocabridge.study.status import results_file

Metric = Literal["rouge_l", "exact_match", "bits_per_byte"]
METRICS: tuple[Metric, ...] = ("rouge_l", "exact_match", "bits_per_byte")
Domain = Literal["in", "out"]


@dataclass(frozen=True, slots=True)
class Scope:
    """What a score is over: one file, or the average over the files of a domain, every file counting the same.

    Attributes:
        name: the file's name, or ``in-domain`` or ``out-of-domain``.
        domain: whether it resembles the training data.
        files: names of the files.
    """

    name: str
    domain: Domain
    files: tuple[str, ...]

    @property
    def is_average(self) -> bool:
        """Several files, or one that stands for its domain."""
        return self.name in ("in-domain", "out-of-domain")


@dataclass(frozen=True, slots=True)
class Score:
    """One number of one run.

    Attributes:
        variant: the run's variant.
        seed: its training seed.
        metric: ROUGE-L and exact match in percent, bits per byte of the references.
        scope: file or average.
        value: mean over sampling seeds.
        sampling_std: their standard deviation (n - 1); None with one seed and for bits per byte.
        num_sampling_seeds: how many there were.
    """

    variant: str
    seed: int
    metric: Metric
    scope: Scope
    value: float
    sampling_std: float | None
    num_sampling_seeds: int


def run_scores(run: PlannedRun) -> list[Score]:
    """All scores of a finished run.

    Raises:
        UserError: its results.json cannot be read as one.
    """
    path = results_file(run.folder)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return list(_scores(run, results))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); remove {path.parent}.") from error


def _scores(run: PlannedRun, results: Mapping[str, Any]) -> Iterator[Score]:
    files = results["files"]
    num_seeds = len(files[0]["seeds"])
    parts = [(Scope(file["name"], "in" if file["in_domain"] else "out", (file["name"],)), file) for file in files]
    for domain, key in (("in", "in_domain"), ("out", "out_of_domain")):
        if average := results[key]:
            scope = Scope(f"{key.replace('_', '-')}", "in" if domain == "in" else "out", tuple(average["files"]))
            parts.append((scope, average))
    for scope, part in parts:
        for metric in ("rouge_l", "exact_match"):
            value, deviation = float(part[metric]["mean"]), part[metric]["std"]
            name: Metric = "rouge_l" if metric == "rouge_l" else "exact_match"
            yield Score(run.variant, run.seed, name, scope, value, deviation, num_seeds)
        yield Score(run.variant, run.seed, "bits_per_byte", scope, float(part["bits_per_byte"]), None, 1)


@dataclass(frozen=True, slots=True)
class ExampleScores:
    """Scores of one file's examples under one run; their mean is the file's score.

    Attributes:
        examples: what was scored: where each came from (``test.jsonl:12``), for bits per byte its bytes too; two runs
            compare only over the same examples.
        values: metric -> float64 ``[examples]``: percent with sampling seeds averaged, or bits per mean byte.
    """

    examples: tuple[object, ...]
    values: Mapping[Metric, np.ndarray]


def example_scores(run: PlannedRun, file: str) -> ExampleScores | None:
    """Scores of every example of a file from the predictions of a finished run; None where there are none."""
    settings = run.recipe.evaluation
    assert settings is not None, "a study's recipes have an evaluation section"
    folder = results_file(run.folder).parent / "predictions"
    seeds = settings.seeds[:1] if settings.temperature == 0 else settings.seeds  # greedy decoding keeps the first
    records = [_records(folder / f"{file}.seed{seed}.jsonl", numbers=METRICS[:2]) for seed in seeds]
    if any(rows is None for rows in records):
        return None
    per_seed = [rows for rows in records if rows is not None]
    sources = [tuple(str(row["source"]) for row in rows) for rows in per_seed]
    if len(set(sources)) != 1:
        return None
    values: dict[Metric, np.ndarray] = {}
    for metric in METRICS[:2]:
        scores = np.array([[100.0 * float(row[metric]) for row in rows] for rows in per_seed])
        values[metric] = scores.mean(axis=0)
    return ExampleScores(sources[0], values)


def example_bits(run: PlannedRun, file: str) -> ExampleScores | None:
    """What every example of a file adds to its bits per byte under a finished run; None where rows are missing.

    A row counts by its bits and not by its own bits per byte, in which a response of few bytes would weigh as much as a
    long one: ``bits * examples / bytes of the file``, whose mean over examples is the file's bits per byte.
    """
    rows = _records(results_file(run.folder).parent / "bits" / f"{file}.jsonl", numbers=("bits", "num_bytes"))
    if rows is None or not (num_bytes := sum(row["num_bytes"] for row in rows)):
        return None
    values = np.array([row["bits"] * len(rows) / num_bytes for row in rows])
    return ExampleScores(tuple((str(row["source"]), row["num_bytes"]) for row in rows), {"bits_per_byte": values})


def _records(path: Path, *, numbers: Sequence[str]) -> list[dict[str, Any]] | None:
    """The lines of a file with a score a row; None when it is missing, torn or something else."""
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        whole = all("source" in row and all(isinstance(row[name], int | float) for name in numbers) for row in rows)
        return rows if whole else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


class PairedExamples:
    """Example-level differences between two variants; reads each file once."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        self._runs = {(run.variant, run.seed): run for run in runs}
        self._cache: dict[tuple[str, int, str, bool], ExampleScores | None] = {}

    def differences(
        self, variant: str, baseline: str, *, seeds: Sequence[int], files: Sequence[str], metric: Metric
    ) -> list[np.ndarray] | None:
        """Variant minus baseline for every example of each file, averaged over training seeds.

        Returns:
            One float64 ``[examples]`` a file, in the units of :class:`ExampleScores`; None where scores of examples are
            missing or over other examples.
        """
        groups = []
        for file in files:
            ours = [self._scores(variant, seed, file, metric) for seed in seeds]
            theirs = [self._scores(baseline, seed, file, metric) for seed in seeds]
            there = [scores for scores in (*ours, *theirs) if scores is not None]
            if len(there) < len(ours) + len(theirs) or len({scores.examples for scores in there}) != 1:
                return None
            means = [np.mean([scores.values[metric] for scores in part], axis=0) for part in _halves(there)]
            groups.append(means[0] - means[1])
        return groups or None

    def _scores(self, variant: str, seed: int, file: str, metric: Metric) -> ExampleScores | None:
        of_bits = metric == "bits_per_byte"
        key = (variant, seed, file, of_bits)
        if key not in self._cache:
            read = example_bits if of_bits else example_scores
            self._cache[key] = read(self._runs[variant, seed], file)
        return self._cache[key]


def _halves(items: Sequence[ExampleScores]) -> tuple[Sequence[ExampleScores], Sequence[ExampleScores]]:
    return items[: len(items) // 2], items[len(items) // 2 :]
