"""Whether a run may begin in its folder, and where: anew, or from a checkpoint with a recipe that goes with it."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState

from vocabridge.checkpoint_contents import read_state
from vocabridge.checkpoint_files import last_whole_checkpoint
from vocabridge.errors import UserError
from vocabridge.recipe import Recipe, recipe_from_values
from vocabridge.recipe.loading import read_recipe_file
from vocabridge.recipe.yaml_text import read_mapping
from vocabridge.resuming import lacks_evaluation
from vocabridge.saving import finish_publishing
from vocabridge.step_rows import STEP_ROWS_FILE
from vocabridge.training_arguments import DistillationConfig

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
RUN_FILES = (RECIPE_FILE, "run.json")
_FREE_KEYS = (
    "evaluation.",
    "teacher.cache",
    *(f"training.{name}" for name in ("max_steps", "num_train_epochs", "save_", "logging_", "eval_", "diagnostics_")),
    *(f"training.{name}" for name in ("disable_tqdm", "output_dir", "dataloader_", "per_device_eval_")),
    *(f"training.{name}" for name in ("report_to", "push_to_hub", "hub_")),
)
"""What may change between a run and its resumption: how long it trains and what is seen of it. Optimizer settings may
not: the checkpoint's own would go on, and the recipe would record others."""
_BATCH_KEYS = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
"""May change with the number of processes, where the checkpoint tells how many rows a step had."""
_FIXED_KEYS = ("training.dataloader_drop_last", "training.save_only_model")
"""Not free though their names begin so: an epoch would have other steps; nothing could go on from the checkpoints."""
_FIXED_OF_STREAMS = ("training.dataloader_num_workers",)
"""Workers share the rows of a stream out among themselves, so that its order depends on their number."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where training begins."""

    checkpoint: Path | None = None
    goes_on: bool = True
    """There are steps left to train."""


def start_of(run_dir: Path, recipe: Recipe, arguments: DistillationConfig) -> Start:
    """Where a resumption begins; checks what of the recipe may have changed for that.

    Raises:
        UserError: all checkpoints are damaged, or more of the recipe has changed than may.
    """
    finish_publishing(run_dir)
    checkpoint = last_whole_checkpoint(run_dir)
    goes_on = checkpoint is None or not _is_end(read_state(checkpoint), arguments)
    steps_are_compared = checkpoint is not None and goes_on and (checkpoint / STEP_ROWS_FILE).is_file()
    changed = _check_same_recipe(run_dir / RECIPE_FILE, recipe, batches_may_change=steps_are_compared)
    if changed:
        logger.warning("resuming with changed settings: %s", ", ".join(changed))
    return Start(checkpoint, goes_on)


def _is_end(state: TrainerState, arguments: DistillationConfig) -> bool:
    """Whether a checkpoint is the end of the training that is asked for."""
    if lacks_evaluation(arguments, state) and not arguments.save_only_model:  # nothing can go on from weights alone
        return False
    if arguments.max_steps > 0:
        return state.global_step >= arguments.max_steps
    return state.num_train_epochs == arguments.num_train_epochs and state.global_step >= state.max_steps


def check_folder(run_dir: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something else, or a run that is not to go on; nothing is read but the recipe there.

    Raises:
        UserError: it is such a one.
    """
    used = run_dir.is_dir() and any(run_dir.iterdir())
    is_run = any((run_dir / name).exists() for name in RUN_FILES) or any(run_dir.glob("checkpoint-*"))
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"training.output_dir: {run_dir} is a file; name a folder.")
    if used and overwrite:
        if not is_run:
            raise UserError(
                f"training.output_dir: {run_dir} does not look like a run folder (no {' or '.join(RUN_FILES)}), "
                "so --overwrite does not delete it; empty it yourself or name another folder."
            )
    elif used and not resume:
        raise UserError(
            f"training.output_dir: {run_dir} is not empty; add --resume to go on from its last checkpoint, "
            "--overwrite to delete it, or name another folder."
        )
    elif used and not is_run and not all(map(_may_come_before_a_run, run_dir.iterdir())):
        raise UserError(
            f"training.output_dir: {run_dir} does not look like a run folder (no {' or '.join(RUN_FILES)}), so there "
            "is nothing to resume; name another folder."
        )
    elif used:
        _check_same_recipe(run_dir / RECIPE_FILE, recipe, batches_may_change=True)  # until the checkpoint is known


def _may_come_before_a_run(path: Path) -> bool:
    """A study's own files, hidden ones, and what a kill left half written."""
    return path.name.startswith(("study", ".")) or path.suffix == ".tmp"


def _check_same_recipe(path: Path, recipe: Recipe, *, batches_may_change: bool) -> list[str]:
    """A resumed run must be the same experiment; only how long it trains and what is measured may change.

    Returns:
        The settings that have changed and may.

    Raises:
        UserError: others have.
    """
    if not path.is_file():
        return []
    try:
        before = read_recipe_file(path).values
    except UserError as error:
        raise UserError(f"{error} Without it the run cannot be resumed; start anew with --overwrite.") from error
    with suppress(UserError):  # what a version before did not know stood at its default; else the keys below tell
        before = _resolved(recipe_from_values(before))
    now = _resolved(recipe)
    free = (*_FREE_KEYS, *_BATCH_KEYS) if batches_may_change else _FREE_KEYS
    never = (*_FIXED_KEYS, *_FIXED_OF_STREAMS) if recipe.data.streaming else _FIXED_KEYS
    found: list[str] = []
    for section in sorted(set(before) | set(now)):
        changed = sorted(_changed_keys(section, before.get(section), now.get(section)))
        fixed = [key for key in changed if key in never or not key.startswith(free)]
        if fixed:
            raise UserError(
                f"{path}: the run was started with other values of {', '.join(fixed)}; resume with the same recipe, "
                "or start anew with --overwrite."
            )
        found += changed
    return found


def _resolved(recipe: Recipe) -> dict[str, Any]:
    return read_mapping(recipe.resolved_yaml(), source="recipe").values


def _changed_keys(section: str, old: Any, new: Any) -> set[str]:
    old, new = old if isinstance(old, dict) else {}, new or {}
    return {f"{section}.{key}" for key in set(old) | set(new) if old.get(key) != new.get(key)}
