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
from vocabridge.recipe import Recipe, load_recipe
from vocabridge.settings import Settings
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
    recipe_in_place: str = ""
    """The same with every file named as seen from the run folder."""
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
    """Whether a finished run is of the planned recipe; settings that were not known then stood at their defaults."""
    planned = recipe_fingerprint(run.recipe)
    if status.recipe == planned or status.recipe_in_place == recipe_in_place_fingerprint(run.recipe):
        return True
    file = run.folder / RECIPE_FILE
    try:
        is_of_the_run = fingerprint(file.read_text(encoding="utf-8")) == status.recipe
        return is_of_the_run and recipe_fingerprint(load_recipe(file)) == planned
    except (OSError, ValueError, UserError):
        return False


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
    return _hash(re.sub(r"^  output_dir: .*$", "", resolved, count=1, flags=re.MULTILINE))


def recipe_in_place_fingerprint(recipe: Recipe) -> str:
    """The same wherever a study lies, as long as its data and models lie beside it as they did."""
    values = recipe.values()
    training = dict(values.pop("training"))
    folder = os.path.abspath(training.pop("output_dir"))
    return _hash(json.dumps(_seen_from(folder, {**values, "training": training}), sort_keys=True))


def _seen_from(folder: str, value: Any) -> Any:
    """A recipe's values, absolute paths made relative to a folder."""
    if isinstance(value, dict):
        return {key: _seen_from(folder, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_seen_from(folder, each) for each in value]
    return os.path.relpath(value, folder) if isinstance(value, str) and os.path.isabs(value) else value


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
