"""Runs on two processes at once, started by torchrun: every case trains tiny models; rank 0 writes what it saw."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

sys.path.append(str(Path(__file__).parents[1]))

import sharded_cases as cases
import vocabridge.checkpointing
from vocabridge.checkpoint_files import seal
from vocabridge.errors import UserError
from vocabridge.models.teacher import LiveTeacher
from vocabridge.trainer import DistillationTrainer


def run(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        results[name] = case(folder / name)
        torch.distributed.barrier()
    return results


def trained(trainer: DistillationTrainer, **train_options: Any) -> dict[str, Any]:
    """Train, save, and tell the log."""
    trainer.train(**train_options)
    trainer.save_model()
    return {"log": trainer.state.log_history, "pieces": pieces(trainer)}


def pieces(trainer: DistillationTrainer) -> dict[str, list[int]]:
    """Of each trained parameter: numbers that this rank holds, and all."""
    parameters = trainer.distillation_model.named_parameters()
    return {
        name: [(p.to_local() if isinstance(p, DTensor) else p).numel(), p.numel()]
        for name, p in parameters
        if p.requires_grad
    }


def both_engines(objective: Any, **options: Any) -> Callable[[Path], dict[str, Any]]:
    def case(folder: Path) -> dict[str, Any]:
        result = {}
        for engine in ("ddp", "fsdp"):
            trainer = cases.trainer(folder / engine, objective, fsdp=engine == "fsdp", **options)
            if torch.distributed.get_rank() == 1:  # the first rank's start counts
                for parameter in trainer.objective_module.parameters():
                    parameter.data.add_(1.0)
            result[engine] = trained(trainer)
        return result

    return case


def shared_teacher(folder: Path) -> dict[str, Any]:
    """The teacher's layers in pieces, under either engine of the student, beside one that is whole."""
    result: dict[str, Any] = {}
    for name, objective in cases.READ_FROM_THE_TEACHER.items():
        for engine, shared in (("ddp", False), ("ddp", True), ("fsdp", True)):
            options = {"fsdp": engine == "fsdp", "shard_teacher": shared, "evaluate": True, "eval_strategy": "epoch"}
            trainer = cases.trainer(folder / name / f"{engine}-{shared}", objective, **options)
            case = trained(trainer)
            assert isinstance(trainer.teacher, LiveTeacher)
            teacher = trainer.teacher.model.named_parameters()
            case["teacher"] = {
                key: [(value.to_local() if isinstance(value, DTensor) else value).numel(), value.numel()]
                for key, value in teacher
            }
            result[f"{name} {engine} {'shared' if shared else 'whole'}"] = case
    return result


def resumed(folder: Path) -> dict[str, Any]:
    """Checkpoints of either engine, gone on with by either."""
    result = {}
    for first in ("ddp", "fsdp"):
        options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-3}
        whole = trained(cases.trainer(folder / first, cases.GAN, fsdp=first == "fsdp", **options))
        result[first] = whole
        for second in ("ddp", "fsdp")[first == "ddp" :]:
            trainer = cases.trainer(folder / f"{first}-{second}", cases.GAN, fsdp=second == "fsdp", learning_rate=3e-3)
            checkpoint = str(folder / first / "checkpoint-2")
            result[f"{first}-{second}"] = trained(trainer, resume_from_checkpoint=checkpoint)
    return result


def best(folder: Path) -> dict[str, Any]:
    """The best of all checkpoints is loaded into the sharded model at the end."""
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "greater_is_better": True,  # the loss falls, so that the first one is "best"
    }
    result = {}
    for engine in ("ddp", "fsdp"):
        trainer = cases.trainer(folder / engine, "cross_entropy", fsdp=engine == "fsdp", evaluate=True, **options)
        result[engine] = trained(trainer)
        result[engine]["best"] = trainer.state.best_model_checkpoint
    return result


def failed_save(folder: Path) -> dict[str, Any]:
    """The second checkpoint cannot be written on one rank; what the other one is told."""
    rank = torch.distributed.get_rank()
    told: dict[str, Any] = {}
    for where in ("weights", "optimizer"):
        options = {"save_strategy": "steps", "save_steps": 1, "fsdp": where == "weights"}
        trainer = cases.trainer(folder / where, "cross_entropy", **options)
        target = (vocabridge.checkpointing, "save_parts") if where == "weights" else (torch, "save")
        original = getattr(*target)

        def full(*args: Any, trainer: Any = trainer, original: Any = original) -> None:
            if trainer.state.global_step == 2:
                raise OSError(28, "No space left on device")
            original(*args)

        with patch.object(*target, full) if rank == 0 else nullcontext():
            try:
                trainer.train()
            except UserError as error:
                message = str(error)
            else:
                message = "nothing"
        messages: list[str] = ["", ""]
        torch.distributed.all_gather_object(messages, message)
        told[where] = messages
    return told


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def foreign_pieces(folder: Path) -> dict[str, Any]:
    """A checkpoint whose optimizer comes in PyTorch's own format for pieces, with code in its pickle."""
    checkpoint, mark = folder / "checkpoint-2", folder / "was_unpickled"
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder.parent / "resumed" / "fsdp" / "checkpoint-2", checkpoint)
        (checkpoint / "optimizer.pt").unlink()
        (checkpoint / "optimizer_0").mkdir()
        (checkpoint / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Payload(mark)))
        seal(checkpoint)
    torch.distributed.barrier()
    trainer = cases.trainer(folder / "run", cases.GAN, fsdp=True)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except UserError as error:
        message = str(error)
    else:
        message = "nothing"
    return {"told": message, "was_unpickled": mark.exists()}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{
        name: both_engines(objective, gradient_accumulation_steps=2, diagnostics_steps=2 if name == "gan" else 0)
        for name, objective in cases.OBJECTIVES.items()
    },
    **{name: both_engines(name) for name in cases.OTHERS},
    "checkpointing": both_engines(cases.GAN, activation_checkpointing=True),
    "bf16": both_engines(cases.GAN, bf16=True, activation_checkpointing=True),
    "untied": both_engines(cases.GAN, tied=False),
    "lora": both_engines(cases.GAN, lora=True, learning_rate=1e-2),
    "shared_teacher": shared_teacher,
    "resumed": resumed,
    "foreign_pieces": foreign_pieces,
    "best": best,
    "failed_save": failed_save,
}


if __name__ == "__main__":
    output = Path(sys.argv[1])
    if len(sys.argv) > 2:
        CASES = {name: CASES[name] for name in sys.argv[2:]}
    torch.distributed.init_process_group("gloo")
    found = run(output)
    if torch.distributed.get_rank() == 0:
        (output / "results.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
