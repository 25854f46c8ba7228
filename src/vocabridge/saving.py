"""What a run folder holds and how it is written: whole or not at all, and never by pickle where a user loads it.

A run folder (and each checkpoint in it) is a Hugging Face checkpoint of the student; the objective's learned parts lie
beside it in ``objective.safetensors``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from vocabridge.checkpoint_files import is_checkpoint, seal
from vocabridge.durable import sync_folder, sync_tree
from vocabridge.errors import UserError, one_line
from vocabridge.objectives.base import Objective

OBJECTIVE_FILE = "objective.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
STAGING = ".saving"
_REPLACED = ".replaced"


@contextmanager
def staged_folder(run_dir: Path) -> Iterator[Path]:
    """An empty folder inside ``run_dir`` to write into; whatever is left in it at the end is removed.

    Raises:
        UserError: the disk is full or the folder cannot be written; what was in ``run_dir`` before is untouched.
    """
    staging = run_dir / STAGING
    finish_publishing(run_dir)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save tells a failed write as a RuntimeError of its zip writer; any other one is a bug, not a full disk.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise UserError(
            f"{run_dir}: saving failed ({error}); earlier checkpoints are whole, nothing half-written stays behind. "
            "Free some space or mend the permissions and resume."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, target_dir: Path) -> None:
    """Move everything in ``staging`` into ``target_dir``; each file or folder appears whole, by rename.

    Everything is on the disk before it gets its name, and a checkpoint has the record that says it is whole.
    """
    target_dir.mkdir(parents=True, exist_ok=True)
    ready = sorted(staging.iterdir())
    for path in ready:
        if is_checkpoint(path):
            seal(path)
        sync_tree(path)
    for path in ready:
        target = target_dir / path.name
        if target.is_dir():  # deleted with the staging folder, when the new one is in its place
            target.rename(staging / f"{path.name}{_REPLACED}")
        path.replace(target)
    sync_folder(target_dir)


def finish_publishing(run_dir: Path) -> None:
    """Give a folder its name if a kill came when the one before it had just lost that name, and both are staged."""
    for replaced in (run_dir / STAGING).glob(f"*{_REPLACED}"):
        ready = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if ready.exists():  # whole and on the disk, as all that is about to be published
            ready.rename(run_dir / ready.name)


def save_parts(
    student: PreTrainedModel, objective: Objective, folder: Path, state_dict: dict[str, Tensor] | None
) -> None:
    """Write student and objective into ``folder``; ``state_dict`` is the gathered one of a sharded model.

    Raises:
        UserError: a weight is not finite; nothing is written.
    """
    if state_dict is None:
        named = chain(student.named_parameters(), objective.named_parameters())
        _refuse_non_finite((name, parameter) for name, parameter in named if parameter.requires_grad)
    else:
        _refuse_non_finite(state_dict.items())
    student_state = _part(state_dict, "student.") if state_dict is not None else None
    objective_state = _part(state_dict, "objective.") if state_dict is not None else objective.state_dict()
    save_student(student, folder, student_state)
    if objective_state:
        tensors = {name: value.detach().contiguous().cpu().clone() for name, value in objective_state.items()}
        save_file(tensors, folder / OBJECTIVE_FILE, metadata={"format": "pt"})


def save_student(student: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """``save_pretrained`` with the key-value cache on: training switches it off, but users generate with it."""
    config = student.config
    training_use_cache, config.use_cache = config.use_cache, True
    try:
        student.save_pretrained(str(folder), state_dict=state_dict)
    finally:
        config.use_cache = training_use_cache


def load_parts(student: PreTrainedModel, objective: Objective, folder: Path) -> None:
    """Read back what :func:`save_parts` wrote.

    Raises:
        UserError: the folder lacks a part or was written by another objective.
    """
    load_student_weights(student, folder)
    load_objective(objective, folder)


def load_student_weights(student: PreTrainedModel, folder: Path) -> None:
    """Read back what :func:`save_student` wrote: all weights, or those of an adapter.

    Raises:
        UserError: the folder lacks them.
    """
    if isinstance(student, PeftModel):
        set_peft_model_state_dict(student, load_file(existing(folder / ADAPTER_FILE)))
    else:
        student.load_state_dict(student_state(student, folder))


def student_state(student: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """A checkpoint's weights in the student's dtype, under the names that they have in memory."""
    from_pretrained: Any = type(student).from_pretrained  # annotated as returning no report
    saved, report = from_pretrained(
        str(folder),
        dtype=student.dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told here, by name
    )
    if lacking := sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]):
        raise UserError(
            f"{folder}: {lacking[0]} is missing in its weights or has another shape than config.json says; take "
            "another checkpoint or start anew."
        )
    state: dict[str, Tensor] = saved.state_dict()
    return state


def load_objective(objective: Objective, folder: Path) -> None:
    """Read the objective's learned parts back, where it has any.

    Raises:
        UserError: the folder lacks them or they were written by another objective.
    """
    if state := objective_state(objective, folder):
        objective.load_state_dict(state)


def objective_state(objective: Objective, folder: Path) -> dict[str, Tensor]:
    """The learned parts that a checkpoint has for this objective; empty when it learns nothing.

    Raises:
        UserError: the folder lacks them or they were written by another objective.
    """
    expected = objective.state_dict()
    if not expected:
        return {}
    path = existing(folder / OBJECTIVE_FILE)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); take another checkpoint or start anew.") from error
    if {name: value.shape for name, value in tensors.items()} != {name: v.shape for name, v in expected.items()}:
        raise UserError(
            f"{folder / OBJECTIVE_FILE}: its parts do not fit this recipe's objective; resume with the recipe that "
            "wrote the checkpoint (recipe.yaml in the run folder)."
        )
    return tensors


def _refuse_non_finite(weights: Iterable[tuple[str, Tensor]]) -> None:
    """A gradient may overflow where the loss does not; the next loss would tell, but a save may come first."""
    for name, value in weights:
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(
                f"the weights of '{name}' are not finite, so they are not saved; resume from the last checkpoint with "
                "a lower learning rate, or in float32 or bfloat16 instead of float16."
            )


def _part(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def existing(path: Path) -> Path:
    """The path itself.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing, so this checkpoint cannot be resumed; pick another one or start anew.")
    return path
