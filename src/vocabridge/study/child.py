"""The process that trains one run of a study: ``python -m vocabridge.study.child RUN_FOLDER``.

It does what ``vocabridge distill study-recipe.yaml --resume`` does and keeps the run's status itself, so that a study
whose own process was killed still learns what became of the run.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from vocabridge.errors import UserError
from vocabridge.preemption import INTERRUPTED, sigterm_raises
from vocabridge.recipe import Recipe, load_recipe
from vocabridge.settings import real_path
from vocabridge.study.status import (
    RECIPE_FILE,
    RunStatus,
    read_status,
    recipe_fingerprint,
    run_lock,
    write_status,
)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training came to."""

    steps: int
    interrupted: bool


Train = Callable[[Recipe], Trained]
"""Trains and evaluates a recipe, from its last checkpoint if there is one."""


def run_child(folder: Path, train: Train) -> int:
    """Train one run under its lock and write its status before, after and on failure.

    Returns:
        Exit status: 0 done, 1 failed, 130 interrupted, 2 when another process trains in this folder.
    """
    try:
        held = run_lock(folder).acquire(blocking=False)
    except Timeout:
        print(f"{folder}: another process trains here", file=sys.stderr)
        return 2
    with held:
        recipe = load_recipe(folder / RECIPE_FILE)
        before = read_status(folder)
        started = time.monotonic()
        running = RunStatus(
            state="running",
            recipe=recipe_fingerprint(recipe),
            folder=str(real_path(folder)),
            seconds=before.seconds,
            sessions=before.sessions + 1,
        )
        with sigterm_raises():
            write_status(folder, running)
            end = _outcome(recipe, train)
        seconds = round(before.seconds + time.monotonic() - started, 3)
        write_status(folder, running.model_copy(update={**end, "seconds": seconds}))
    return {"done": 0, "interrupted": INTERRUPTED}.get(str(end["state"]), 1)


def _outcome(recipe: Recipe, train: Train) -> dict[str, object]:
    """Fields of the status after the training."""
    try:
        trained = train(recipe)
    except KeyboardInterrupt:
        return {"state": "interrupted"}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        # What 'vocabridge distill' does with --overwrite, a study does in a folder that is gone.
        hint = " In a study: remove its folder." if "--overwrite" in str(error) else ""
        return {"state": "failed", "message": f"{error}{hint}"}
    except Exception as error:
        traceback.print_exc()
        return {"state": "failed", "message": f"{type(error).__name__}: {error}"}
    return {"state": "interrupted"} if trained.interrupted else {"state": "done", "steps": trained.steps}


def _distill(recipe: Recipe) -> Trained:
    from vocabridge.run import distill

    result = distill(recipe, resume=True)
    return Trained(steps=result.steps, interrupted=result.interrupted)


if __name__ == "__main__":
    sys.exit(run_child(Path(sys.argv[1]), _distill))
