"""Everything a report shows, read from a study file, a study's folder or a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vocabridge.errors import UserError
from vocabridge.metrics_log import METRICS_FILE, Log
from vocabridge.report.analysis_files import AnalysisFiles, read_analysis
from vocabridge.report.reading import Reader, with_relative_paths
from vocabridge.report.study_record import RunRecord, StudyRecord
from vocabridge.settings import real_path
from vocabridge.study.plan import StudyPlan, load_study, run_folder
from vocabridge.study.results import RESULTS_FILE, study_results
from vocabridge.study.status import results_file

PAIR_FILE = "tokenizer-pair.json"
"""Where the report looks for what ``vocabridge inspect-pair --json`` wrote: in the study's or the run's folder."""


class PairSide(BaseModel):
    """One side of the tokenizer-pair report."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    template: str
    vocabulary_size: int
    shared_share: float
    tokens: int
    tokens_per_byte: float
    one_to_one_share: float
    coverage: float
    tokens_per_chunk: float
    byte_coverage: float


class PairFile(BaseModel):
    """What ``inspect-pair`` wrote; see :class:`vocabridge.alignment.report.PairReport`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    student: PairSide
    teacher: PairSide
    shared_tokens: int
    response_bytes: int
    chunks: int
    chunk_sizes: dict[str, int]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One run and what its folder holds; a part that is not there is empty or None."""

    record: RunRecord
    folder: Path
    log: Log
    environment: Mapping[str, Any] | None
    recipe: str | None
    evaluation: Mapping[str, Any] | None
    analysis: AnalysisFiles

    @property
    def title(self) -> str:
        """What tables and menus call the run."""
        return f"{self.record.variant}, seed {self.record.seed}"


@dataclass(frozen=True, slots=True)
class Report:
    """What there is to show; ``study`` is None for a single run."""

    name: str
    source: Path
    folder: Path
    study: StudyRecord | None
    runs: tuple[Run, ...]
    pair: PairFile | None
    notes: tuple[str, ...]

    @property
    def variants(self) -> tuple[str, ...]:
        """In the study's order."""
        return self.study.variants if self.study else tuple(run.record.variant for run in self.runs)

    @property
    def baseline(self) -> str | None:
        """Variant that the others are compared with."""
        return self.study.baseline if self.study else None

    def runs_of(self, variant: str) -> tuple[Run, ...]:
        """Runs of a variant, by seed as planned."""
        return tuple(run for run in self.runs if run.record.variant == variant)


def collect(path: Path) -> Report:
    """Read a study file, a study's folder or a run folder, at whatever stage it is.

    Raises:
        UserError: it is none of these, or the study file is wrong.
    """
    if path.is_file():
        return _study_report(path, load_study(path))
    if (path / RESULTS_FILE).is_file():
        return _folder_report(path)
    if any((path / name).is_file() for name in ("recipe.yaml", METRICS_FILE, "run.json")):
        return _run_report(path)
    if (path / "runs").is_dir():
        raise UserError(f"{path} has no {RESULTS_FILE} yet; name the study's YAML file instead of its folder.")
    what = "is neither a study file, a study's folder nor a run folder" if path.exists() else "does not exist"
    raise UserError(f"{path} {what}; name what 'vocabridge study' or 'vocabridge distill' was given or wrote.")


def _study_report(source: Path, plan: StudyPlan) -> Report:
    record = StudyRecord.model_validate(study_results(plan).to_dict())
    return _report(source, plan.folder, record)


def _folder_report(folder: Path) -> Report:
    """From the study's file where it is still in its place, for the newest state; else from its last results."""
    path = folder / RESULTS_FILE
    try:
        record = StudyRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} cannot be read as a study's results; write it anew: vocabridge study FILE.") from error
    file = Path(record.study)
    if file.is_file():
        plan = load_study(file)
        if real_path(plan.folder) == real_path(folder):
            return _study_report(file, plan)
    return _report(folder, folder, record)


def _report(source: Path, folder: Path, record: StudyRecord) -> Report:
    reader = Reader()
    runs = tuple(_run(run, run_folder(folder, run.variant, run.seed), reader) for run in record.runs)
    pair = reader.model(folder / PAIR_FILE, PairFile)
    name = Path(record.study).stem if Path(record.study).stem != "study" else folder.absolute().name
    return Report(name, source, folder, record, runs, pair, tuple(reader.notes))


def _run_report(folder: Path) -> Report:
    reader = Reader()
    name = folder.absolute().name
    unknown = RunRecord(variant=name, seed=0, folder=str(folder), objective="unknown", state="unfinished")
    run = _run(unknown, folder, reader)
    facts = run.environment or {}
    record = _named(unknown, {key: facts[key] for key in ("seed", "objective") if key in facts})
    if runtimes := run.log.get("train_runtime"):
        # A run that was resumed logs the time of its last part only, and does not say that there were others.
        steps, seconds = max(runtimes.items())
        record = record.model_copy(update={"state": "done", "steps": steps, "seconds": seconds})
    pair = reader.model(folder / PAIR_FILE, PairFile)
    return Report(name, folder, folder, None, (replace(run, record=record),), pair, tuple(reader.notes))


def _named(record: RunRecord, facts: Mapping[str, Any]) -> RunRecord:
    try:
        return RunRecord.model_validate({**record.model_dump(), **facts})
    except ValidationError:  # what is no seed or no name is shown among the other facts of the record
        return record


def _run(record: RunRecord, folder: Path, reader: Reader) -> Run:
    recipe = reader.text(folder / "recipe.yaml")
    return Run(
        record=record.model_copy(update={"message": with_relative_paths(record.message)}),
        folder=folder,
        log=reader.log(folder / METRICS_FILE),
        environment=reader.mapping(folder / "run.json"),
        recipe=None if recipe is None else with_relative_paths(recipe),
        evaluation=reader.mapping(results_file(folder)),
        analysis=read_analysis(folder / "analysis", reader),
    )
