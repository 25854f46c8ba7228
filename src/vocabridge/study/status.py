"""How far one run of a study is: a small file in its folder, and a lock that dies with the process that trains it.

::

    study-status.json     state, message, times; written whole, by rename
    study-recipe.yaml     what the process trains
    study.log             what it printed
    .study.lock           held while a process trains in this folder

The lock tells a run that is trained at this moment from one whose process was killed: the operating system frees it
with the process, whatever killed it, while a process id in a file may long belong to another program.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from vocabridge.durable import write_in_one_piece
from vocabridge.errors import UserError
from vocabridge.recipe import Recipe, recipe_from_values
from vocabridge.recipe.loading import read_recipe_file
from vocabridge.settings import Settings, real_path
from vocabridge.study.plan import PlannedRun

STATUS_FILE = "study-status.json"
RECIPE_FILE = "study-recipe.yaml"
LOG_FILE = "study.log"
_LOCK_FILE = ".study.lock"

State = Literal["pending", "running", "done", "failed", "interrupted"]


class RunStatus(Settings):
    """How far a run is."""

    state: State = "pending"
    """``interrupted`` and ``failed`` runs go on from their last checkpoint when the study is started again."""
    message: str = ""
    """Why it failed."""
    recipe: str = ""
    """Fingerprint of the recipe that was trained; another one makes the run pending again."""
    folder: str = ""
    """Where the run lay when it was trained."""
    seconds: float = 0.0
    """Time of all its processes that ended by themselves, training and evaluation, in seconds."""
    sessions: int = 0
    """Processes that were started for it."""
    steps: int | None = None
    """Optimizer steps trained, once it is done."""


def read_status(folder: Path) -> RunStatus:
    """The status of a run folder; of a folder that has none, or a damaged one, that it is pending.

    A run whose process is gone without a word counts as interrupted, not as running. A damaged file costs little: the
    run goes on from its last checkpoint, and one that was done finds its evaluation there.
    """
    path = folder / STATUS_FILE
    try:
        status = RunStatus.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return RunStatus()
    except (OSError, ValidationError):
        return RunStatus(message="its status file is damaged")
    if status.state == "running" and not is_locked(folder):
        return status.model_copy(update={"state": "interrupted", "message": "its process is gone"})
    return status


def current_status(run: PlannedRun) -> RunStatus:
    """The status of a planned run: one that was done with another recipe, or lost its results, is pending again."""
    status = read_status(run.folder)
    if status.state != "done":
        return status
    if not _was_trained(run, status):
        return status.model_copy(update={"state": "pending", "message": "its recipe has changed"})
    if not results_file(run.folder).is_file():
        return status.model_copy(update={"state": "pending", "message": "its results are gone"})
    return status


def _was_trained(run: PlannedRun, status: RunStatus) -> bool:
    """Whether a finished run is of the planned recipe.

    Settings that were not known then stood at their defaults, and a study may be moved with what it reads.
    """
    planned = recipe_fingerprint(run.recipe)
    if status.recipe == planned:
        return True
    file = run.folder / RECIPE_FILE
    try:
        if fingerprint(file.read_text(encoding="utf-8")) != status.recipe:
            return False
        before = _as_moved(read_recipe_file(file).values, run.recipe.values(), status.folder, real_path(run.folder))
        return recipe_fingerprint(recipe_from_values(before)) == planned
    except (OSError, ValueError, UserError):
        return False


def _as_moved(before: Any, planned: Any, old: str, new: Path) -> Any:
    """Values of a recipe in which a path is the planned one where both are the same as seen from the run folders."""
    if isinstance(before, dict) and isinstance(planned, dict):
        return {key: _as_moved(value, planned.get(key), old, new) for key, value in before.items()}
    if isinstance(before, list) and isinstance(planned, list) and len(before) == len(planned):
        return [_as_moved(*values, old, new) for values in zip(before, planned, strict=True)]
    paths = [value for value in (before, planned) if isinstance(value, str) and os.path.isabs(value)]
    is_moved = old and len(paths) == 2 and os.path.relpath(before, old) == os.path.relpath(planned, new)
    return planned if is_moved else before


def results_file(folder: Path) -> Path:
    """Where the evaluation of a run writes its scores."""
    return folder / "evaluation" / "results.json"


def write_status(folder: Path, status: RunStatus) -> None:
    """Replace the status of a run folder."""
    write_in_one_piece(folder / STATUS_FILE, json.dumps(status.model_dump(), indent=2) + "\n")


def run_lock(folder: Path) -> FileLock:
    """The lock of a run folder, not yet taken."""
    return FileLock(folder / _LOCK_FILE)


def is_locked(folder: Path) -> bool:
    """Whether a living process trains in this folder."""
    if not (folder / _LOCK_FILE).exists():
        return False
    lock = run_lock(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False


def recipe_fingerprint(recipe: Recipe) -> str:
    """Changes with anything the recipe says, its run folder aside: a study may be moved."""
    return fingerprint(recipe.resolved_yaml())


def fingerprint(resolved: str) -> str:
    """As above, of the text of a resolved recipe."""
    without_folder = re.sub(r"^  output_dir: .*$", "", resolved, count=1, flags=re.MULTILINE)
    return hashlib.sha256(without_folder.encode()).hexdigest()[:16]
