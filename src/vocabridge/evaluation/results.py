"""What an evaluation found: per file and seed, per file, and in-domain and out-of-domain averages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from vocabridge.evaluation.bits import ReferenceBits
from vocabridge.evaluation.engine import GenerationSettings
from vocabridge.evaluation.statistics import MeanStd, mean_std


@dataclass(frozen=True, slots=True)
class SeedScores:
    """Scores of one file under one seed: ROUGE-L and exact match in percent, finished responses as a share."""

    seed: int
    rouge_l: float
    exact_match: float
    finished: float


@dataclass(frozen=True, slots=True)
class FileResult:
    """Scores of one file.

    Attributes:
        name: the file's name in tables and file names.
        in_domain: which of the two averages the file belongs to.
        num_examples: rows scored.
        num_without_response: rows left out because there is nothing to compare with.
        num_cut_prompts: rows whose prompt lost its beginning because the context is too short.
        rouge_l, exact_match: over seeds, in percent.
        bits_per_byte: of the reference responses and their end tokens; no seed plays a role.
        reference_bits: what ``bits_per_byte`` is the ratio of.
        seeds: scores per seed.
    """

    name: str
    in_domain: bool
    num_examples: int
    num_without_response: int
    num_cut_prompts: int
    rouge_l: MeanStd
    exact_match: MeanStd
    bits_per_byte: float
    reference_bits: ReferenceBits
    seeds: tuple[SeedScores, ...]


@dataclass(frozen=True, slots=True)
class DomainAverage:
    """Every file counts the same; the deviation is that of the per-seed averages."""

    files: tuple[str, ...]
    rouge_l: MeanStd
    exact_match: MeanStd
    bits_per_byte: float


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """All scores of one model; ``out_of_domain`` or ``in_domain`` is None when no file belongs to it."""

    model: str
    settings: GenerationSettings
    files: tuple[FileResult, ...]
    in_domain: DomainAverage | None
    out_of_domain: DomainAverage | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as results.json has them."""
        return asdict(self)

    def to_json(self) -> str:
        """The text of results.json."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def domain_average(files: Sequence[FileResult]) -> DomainAverage | None:
    """The average over files that share their seeds, or None without a file."""
    if not files:
        return None
    per_seed = list(zip(*(file.seeds for file in files), strict=True))  # one tuple of files' scores a seed
    return DomainAverage(
        files=tuple(file.name for file in files),
        rouge_l=mean_std([_mean(scores.rouge_l for scores in row) for row in per_seed]),
        exact_match=mean_std([_mean(scores.exact_match for scores in row) for row in per_seed]),
        bits_per_byte=_mean(file.bits_per_byte for file in files),
    )


def results_table(result: EvaluationResult) -> Table:
    """A table for the screen: one line a file, then the averages."""
    num_seeds = len(result.files[0].seeds)
    decoding = "greedy" if result.settings.greedy else f"{num_seeds} sampling seed{'s' * (num_seeds > 1)}"
    table = Table(title=f"{escape(Path(result.model).name)}: {decoding}", title_justify="left")
    table.add_column("data", overflow="fold")
    table.add_column("domain", no_wrap=True)
    for heading in ("rows", "ROUGE-L", "std", "exact", "std", "bits/byte"):
        table.add_column(heading, justify="right", no_wrap=True)
    for file in result.files:
        table.add_row(escape(file.name), "in" if file.in_domain else "out", str(file.num_examples), *_cells(file))
    table.add_section()
    for domain, average in (("in", result.in_domain), ("out", result.out_of_domain)):
        if average is not None:
            table.add_row("average", domain, "", *_cells(average))
    return table


def _cells(scores: FileResult | DomainAverage) -> list[str]:
    return [*_pair(scores.rouge_l), *_pair(scores.exact_match), f"{scores.bits_per_byte:.4f}"]


def _pair(score: MeanStd) -> tuple[str, str]:
    return f"{score.mean:.2f}", "-" if score.std is None else f"{score.std:.2f}"


def _mean(values: Iterable[float]) -> float:
    return mean_std(list(values)).mean
