"""Whether a whole checkpoint holds what a run of this recipe goes on with; read before anything is written.

Checksums say that the files are as they were written, not by whom. A file of another run, or of a stranger, would
otherwise be found out by a traceback in the middle of loading, by weights that stay at their start, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from vocabridge.errors import UserError, one_line
from vocabridge.objectives.base import Objective
from vocabridge.saving import load_parts

Shape = tuple[int, ...]

DEEPSPEED_FILE = "latest"
"""Of a checkpoint that DeepSpeed wrote; it names the folder with the optimizer's state."""

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""What an optimizer keeps in the shape of the parameter; other things have shapes of their own."""

_REMEDY = "resume from another checkpoint (delete this one), or start anew with --overwrite"


def read_state(checkpoint: Path) -> TrainerState:
    """Where in the training a checkpoint was written.

    Raises:
        UserError: it does not tell.
    """
    with refusing(checkpoint / TRAINER_STATE_NAME):
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if not all(isinstance(each, int) for each in (state.global_step, state.max_steps, state.train_batch_size)):
            raise ValueError("it does not tell the step")
    return state


def check_goes_on(checkpoint: Path) -> None:
    """Refuse a checkpoint of weights alone: optimizer, schedule and random numbers would quietly begin anew.

    Raises:
        UserError: some of that is missing.
    """
    optimizer = "global_step*" if (checkpoint / DEEPSPEED_FILE).is_file() else OPTIMIZER_NAME
    missing = [name for name in (optimizer, SCHEDULER_NAME, "rng_state*.pth") if not any(checkpoint.glob(name))]
    if missing:
        raise UserError(
            f"{checkpoint} lacks {', '.join(missing)}, as with training.save_only_model: true, so training cannot go "
            "on from it; delete it if there is an earlier checkpoint that has them, start a new run with this folder "
            "as student.model and another training.output_dir, or start anew with --overwrite."
        )


def check_contents(checkpoint: Path, *, parameter_groups: Sequence[Sequence[Shape]] | None) -> None:
    """Read every small file, and the shapes in the large ones.

    Args:
        checkpoint: one whose files are whole.
        parameter_groups: shapes of the parameters in each group of the optimizer; None under an engine that stores
            them in its own way.

    Raises:
        UserError: a file is missing or holds something else; names it.
    """
    read_state(checkpoint)
    for path in sorted(checkpoint.glob("log_window*.json")):
        with refusing(path):
            window = json.loads(path.read_text(encoding="utf-8"))
            int(window["last_logged_step"]), float(window["loss"])
            torch.tensor([[float(value) for value in pair] for pair in window["terms"].values()])
    for path in sorted(checkpoint.glob("*.safetensors")):
        with refusing(path), safe_open(path, framework="pt") as file:
            file.keys()
    for path in sorted([checkpoint / SCHEDULER_NAME, *checkpoint.glob("rng_state*.pth")]):
        if path.is_file():
            with refusing(path):
                _load(path)
    optimizer = checkpoint / OPTIMIZER_NAME
    if parameter_groups is not None and optimizer.is_file():
        with refusing(optimizer):
            _check_optimizer(_load(optimizer, stays_on_disk=True), parameter_groups)


def check_weights(checkpoint: Path, student: PreTrainedModel, objective: Objective) -> None:
    """Load the weights as a resumption does, into the same modules.

    Raises:
        UserError: they are missing, of another model or objective, or not finite.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # the run goes on with the checkpoint's own random numbers
            load_parts(student, objective, checkpoint)
    except UserError:
        raise
    except Exception as error:  # as below
        raise UserError(f"{checkpoint}: its weights cannot be used ({one_line(error)}); {_REMEDY}.") from error
    for name, weight in chain(student.named_parameters(), objective.named_parameters()):
        if not torch.isfinite(weight).all():
            raise UserError(f"{checkpoint}: the weights of '{name}' are not finite; {_REMEDY}.")


def _load(path: Path, *, stays_on_disk: bool = False) -> dict[str, Any]:
    try:
        with safe_globals():
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=stays_on_disk)
    except RuntimeError as error:
        raise ValueError("it is cut, or no file that torch.save wrote") from error
    if not isinstance(found, dict):
        raise TypeError(f"it holds a {type(found).__name__}")
    return found


def _check_optimizer(found: dict[str, Any], groups: Sequence[Sequence[Shape]]) -> None:
    stored = [list(group["params"]) for group in found["param_groups"]]
    if [len(group) for group in stored] != [len(group) for group in groups]:
        raise ValueError("it belongs to other parameters than this recipe trains")
    for indices, shapes in zip(stored, groups, strict=True):
        for index, shape in zip(indices, shapes, strict=True):
            state = found["state"].get(index, {})
            if any(tuple(state[name].shape) != shape for name in _MOMENTS if name in state):
                raise ValueError("it belongs to parameters of other shapes than this recipe trains")


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file of a checkpoint is read becomes one sentence that names it.

    Raises:
        UserError: something did.
    """
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and numbers, which could run any code and is not read, or is no "
            f"checkpoint file at all; {_REMEDY}."
        ) from error
    except Exception as error:  # json, torch and safetensors raise what a strange file leads them to
        raise UserError(f"{path} cannot be used ({one_line(error)}); {_REMEDY}.") from error
