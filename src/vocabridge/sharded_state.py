"""Weights and optimizer states that an engine holds in pieces, whole in files and back again.

A checkpoint has the same files under FSDP2 as from one process, so either goes on from the other's: the student's
checkpoint, ``objective.safetensors`` and ``optimizer.pt``. PyTorch's own format for pieces is not used because its
metadata are a pickle, which would run whatever a stranger's checkpoint says. Under ZeRO-3 only the weights are gathered
here: DeepSpeed keeps optimizer states in files of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from vocabridge.distillation_model import DistillationModel
from vocabridge.errors import UserError
from vocabridge.saving import ADAPTER_FILE, existing, objective_state, student_state
from vocabridge.zero import is_in_zero_pieces, whole


def gather_weights(model: DistillationModel, *, device: torch.device, keep: bool) -> dict[str, Tensor]:
    """Whole weights of a model that FSDP2 or ZeRO-3 holds, on the CPU, gathered one by one; all ranks must call it.

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
        parameter = parameters.get(name)
        identity = id(value if parameter is None else parameter)
        if identity in frozen:
            continue  # only the adapter is saved
        if identity not in gathered:  # tied weights stay tied
            if parameter is not None and is_in_zero_pieces(parameter):
                with whole([parameter]):
                    gathered[identity] = _kept(parameter.detach().clone(), keep=keep)
            else:
                gathered[identity] = _whole(value, device, keep=keep)
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


def gather_optimizer(optimizer: torch.optim.Optimizer, *, device: torch.device, keep: bool) -> dict[str, Any]:
    """The state of an optimizer of FSDP2, as one process would have it; all ranks must call it.

    Args:
        optimizer: of parameters in pieces.
        device: where ranks talk to each other.
        keep: False on ranks that do not save; their result has no numbers.
    """
    pieces = optimizer.state_dict()
    state = {
        number: {
            name: _whole(value, device, keep=keep) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in pieces["state"].items()
    }
    return {"state": state, "param_groups": pieces["param_groups"]}


def load_optimizer(model: DistillationModel, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Read the whole state of an optimizer into one of FSDP2; every rank reads the file, of which it keeps its piece.

    Args:
        model: whose parameters the optimizer holds.
        optimizer: of the coming steps.
        path: ``optimizer.pt`` of a checkpoint of any engine but DeepSpeed.

    Raises:
        UserError: it is the state of other parameters.
    """
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # Numbers count the parameters group by group, and the groups are made in the same order in every run.
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    if len(order) != sum(len(group["params"]) for group in saved["param_groups"]):
        raise UserError(f"{path} is of other parameters; resume with the recipe that wrote it.")
    groups = [{**group, "params": [order[number] for number in group["params"]]} for group in saved["param_groups"]]
    state = {order[number]: values for number, values in saved["state"].items()}
    named: dict[str, Any] = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True))


def _whole(value: Tensor, device: torch.device, *, keep: bool) -> Tensor:
    """On the CPU; empty where it is not kept."""
    return _kept(cast(DTensor, value.to(device)).full_tensor() if isinstance(value, DTensor) else value, keep=keep)


def _kept(value: Tensor, *, keep: bool) -> Tensor:
    return value.cpu() if keep else value.new_empty(0)
