"""What is left of a study: time from the step times of runs that are done, disk from their folders, or a forecast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import TYPE_CHECKING

from vocabridge.study.plan import PlannedRun, StudyPlan
from vocabridge.study.runner import threads_of_a_run
from vocabridge.study.status import RunStatus

if TYPE_CHECKING:
    from vocabridge.plan.forecast import Forecast  # imports torch


@dataclass(frozen=True, slots=True)
class VariantEstimate:
    """What one variant has and still needs.

    Attributes:
        variant: its name.
        states: state of each of its runs, by training seed.
        seconds_per_run: expected time of one run, evaluation included; None when nothing tells.
        bytes_per_run: expected size of one run folder.
        seconds_left, bytes_left: of all its runs that are not done.
    """

    variant: str
    states: Mapping[int, str]
    seconds_per_run: float | None
    bytes_per_run: float | None
    seconds_left: float | None
    bytes_left: float | None


def estimate(
    plan: StudyPlan,
    statuses: Mapping[PlannedRun, RunStatus],
    forecasts: Mapping[str, Forecast] = MappingProxyType({}),
) -> list[VariantEstimate]:
    """What every variant still needs.

    A run is expected to take the seconds a step of its own variant's done runs, evaluation included, times its steps;
    where none is done, those of all other variants' done runs, which may cost more or less a step. What an unfinished
    run has already trained or written is not deducted.

    Args:
        plan: all runs.
        statuses: how they stand.
        forecasts: by variant, for what no run that is done can tell.
    """
    done = [run for run in plan.runs if statuses[run].state == "done"]
    sizes = {run: folder_bytes(run.folder) for run in done}
    found = []
    for variant in plan.variants:
        runs = [run for run in plan.runs if run.variant == variant]
        like = [run for run in done if run.variant == variant] or done
        seconds = _seconds_per_run(runs[0], like, statuses)
        size = fmean(sizes[run] for run in like) if like else None
        if guess := forecasts.get(variant):
            seconds, size = seconds or guess.seconds, size or guess.num_bytes
        num_left = sum(statuses[run].state != "done" for run in runs)
        found.append(
            VariantEstimate(
                variant=variant,
                states={run.seed: statuses[run].state for run in runs},
                seconds_per_run=seconds,
                bytes_per_run=size,
                seconds_left=_product(num_left, seconds),
                bytes_left=_product(num_left, size),
            )
        )
    return found


def first_guesses(plan: StudyPlan, statuses: Mapping[PlannedRun, RunStatus], *, jobs: int) -> dict[str, Forecast]:
    """Forecasts by variant while no run is done; after that runs tell more, and models and data are not looked at."""
    if any(status.state == "done" for status in statuses.values()):
        return {}
    from vocabridge.plan.forecast import forecast

    found = {}
    for run in plan.runs[: len(plan.variants)]:  # every variant with the first seed
        if (guess := forecast(run.recipe, threads=threads_of_a_run(jobs))) is None:
            break  # nor would the others have their models, and a hub that is not there is asked for long
        found[run.variant] = guess
    return found


def total_seconds(estimates: Sequence[VariantEstimate], jobs: int) -> float | None:
    """Wall-clock seconds of all that is left with ``jobs`` processes that do not slow each other; None if unknown."""
    seconds = [part.seconds_left for part in estimates]
    known = [value for value in seconds if value is not None]
    return sum(known) / jobs if len(known) == len(seconds) else None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _seconds_per_run(
    run: PlannedRun, like: Sequence[PlannedRun], statuses: Mapping[PlannedRun, RunStatus]
) -> float | None:
    # A run with several sessions may have lost the time of one that was killed.
    clocked = [statuses[other] for other in like if statuses[other].sessions == 1 and statuses[other].steps]
    if not clocked:
        return None
    max_steps = run.recipe.training.arguments().get("max_steps", -1)
    return fmean(
        status.seconds / status.steps * (max_steps if max_steps > 0 else status.steps)
        for status in clocked
        if status.steps
    )


def _product(count: int, each: float | None) -> float | None:
    """Nothing left costs nothing, known or not."""
    return 0.0 if count == 0 else None if each is None else count * each
