"""``study.json`` as the report reads it: fields it does not know are left alone, those it needs are checked."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Metric = Literal["rouge_l", "exact_match", "bits_per_byte"]
Domain = Literal["in", "out"]

AVERAGES = ("in-domain", "out-of-domain")
"""Scopes that are averages over files; any other scope is a file's name."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RunRecord(_Record):
    """Where one run stands."""

    variant: str
    seed: int
    folder: str
    objective: str
    state: str
    message: str = ""
    seconds: float = 0.0
    sessions: int = 0
    steps: int | None = None


class _Cell(_Record):
    variant: str
    metric: Metric
    scope: str
    domain: Domain


class ScoreRecord(_Cell):
    """One number of one run."""

    seed: int
    value: float
    num_sampling_seeds: int = 1


class SummaryRecord(_Cell):
    """One variant over its finished training seeds."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    seeds: tuple[int, ...]


class ComparisonRecord(_Cell):
    """One variant against its baseline; see :class:`vocabridge.study.results.Comparison`."""

    seeds: tuple[int, ...]
    difference: float
    std: float | None
    hedges_gz: float | None
    num_comparisons: int = 1
    seeds_needed: int | None
    seeds_low: float | None
    seeds_high: float | None
    seeds_p_holm: float
    seeds_smallest_p: float
    examples_num: int | None = None
    examples_p_holm: float | None = None


class MeasurementComparisonRecord(_Record):
    """One variant against its baseline in what was logged last; see :mod:`vocabridge.study.measurements`."""

    variant: str
    name: str
    baseline: str
    difference: float
    seeds_p_holm: float


class Power(_Record):
    """The difference for which the number of seeds is worked out."""

    difference: float
    alpha: float = 0.05
    power: float = 0.8


class StudyRecord(_Record):
    """The whole file."""

    study: str
    baseline: str
    baselines: dict[str, str] = Field(default_factory=dict)
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    power: Power
    runs: tuple[RunRecord, ...]
    scores: tuple[ScoreRecord, ...]
    summaries: tuple[SummaryRecord, ...]
    comparisons: tuple[ComparisonRecord, ...]
    measurement_comparisons: tuple[MeasurementComparisonRecord, ...] = ()

    def baseline_of(self, variant: str) -> str:
        """What the variant is compared with; the study's baseline is its own."""
        return self.baselines.get(variant, self.baseline)

    @field_validator("runs")
    @classmethod
    def _inside(cls, runs: tuple[RunRecord, ...]) -> tuple[RunRecord, ...]:
        """A variant names a folder of the study; the file may come from anybody."""
        for run in runs:
            if run.variant in ("", ".", "..") or set(run.variant) & set("/\\\0"):
                raise ValueError(f"'{run.variant}' is no variant's name")
        return runs
