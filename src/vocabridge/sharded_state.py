"""Weights and optimizer states of a run in forms that another number of processes, or another engine, can take.

Weights are always whole: the student's checkpoint and ``objective.safetensors``. The optimizer's state has two forms:
the file ``optimizer.pt``, whole and by number, from one process and from data parallelism; and the folder
``optimizer_0``, in pieces and by parameter name, from FSDP2. Either kind of run reads both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils.constants import OPTIMIZER_NAME
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from vocabridge.distillation_model import DistillationModel
from vocabridge.errors import UserError
from vocabridge.saving import ADAPTER_FILE, existing, objective_state, student_state

WHOLE_OPTIMIZER = "optimizer.pt"
SHARDED_OPTIMIZER = f"{OPTIMIZER_NAME}_0"


def gather_weights(model: DistillationModel, *, device: torch.device, keep: bool) -> dict[str, Tensor]:
    """Whole weights of a model that FSDP2 holds, on the CPU, gathered one by one; all ranks must call it.

    Args:
        model: the trained module.
        device: where ranks talk to each other; weights may be offloaded to the CPU.
        keep: False on ranks that do not save; they get an empty result.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    has_adapter = isinstance(model.student, PeftModel)
    frozen = {id(parameter) for parameter in model.student.parameters() if has_adapter and not parameter.requires_grad}
    gathered: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        identity = id(parameters.get(name, value))
        if identity in frozen:
            continue  # only the adapter is saved
        if identity not in gathered:  # tied weights stay tied
            whole = cast(DTensor, value.to(device)).full_tensor() if isinstance(value, DTensor) else value
            gathered[identity] = whole.cpu() if keep else whole.new_empty(0)
        state[name] = gathered[identity]
    return state if keep else {}


def load_weights(model: DistillationModel, folder: Path) -> None:
    """Read a checkpoint's weights into a model that FSDP2 holds; every rank reads the files.

    Raises:
        UserError: the folder lacks a part or was written by another objective.
    """
    student = model.student
    weights = _adapter_state(student, folder) if isinstance(student, PeftModel) else student_state(student, folder)
    state: dict[str, Any] = {f"student.{name}": value for name, value in weights.items()}
    state |= {f"objective.{name}": value for name, value in objective_state(model.objective, folder).items()}
    unknown = sorted(set(state) - set(model.state_dict()))
    assert not unknown, f"{folder} has weights that the model has not: {unknown[:3]}"
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


def _adapter_state(student: PeftModel, folder: Path) -> dict[str, Tensor]:
    """An adapter's file leaves its name out of the parameters' names."""
    part = f".{student.active_adapter}"
    names = {name.replace(part, ""): name for name in student.state_dict() if part in name}
    return {names[name]: value for name, value in load_file(existing(folder / ADAPTER_FILE)).items()}


def load_sharded_optimizer(model: DistillationModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read the state that FSDP2 wrote, into an optimizer of any engine; all ranks must call it.

    Args:
        model: whose parameters the optimizer holds, not a wrapper around it.
        optimizer: of the coming steps.
        folder: a checkpoint.
    """
    options = StateDictOptions(cpu_offload=True)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    reader = distributed_checkpoint.FileSystemReader(folder / SHARDED_OPTIMIZER)
    distributed_checkpoint.load(state, storage_reader=reader)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def shard_optimizer(model: DistillationModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read the whole state that one process or data parallelism wrote, into an optimizer of FSDP2.

    Args:
        model: whose parameters the optimizer holds.
        optimizer: of the coming steps.
        folder: a checkpoint.

    Raises:
        UserError: it is the state of other parameters.
    """
    saved: dict[str, Any] = torch.load(folder / WHOLE_OPTIMIZER, map_location="cpu", weights_only=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # Numbers count the parameters group by group, and the groups are made in the same order in every run.
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    if len(order) != sum(len(group["params"]) for group in saved["param_groups"]):
        raise UserError(f"{folder / WHOLE_OPTIMIZER} is of other parameters; resume with the recipe that wrote it.")
    groups = [{**group, "params": [order[number] for number in group["params"]]} for group in saved["param_groups"]]
    state = {order[number]: values for number, values in saved["state"].items()}
    named: dict[str, Any] = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True))
