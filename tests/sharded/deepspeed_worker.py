"""Runs on two processes at once, started by torchrun: DeepSpeed trains what data parallelism has trained before."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from transformers.integrations import is_deepspeed_zero3_enabled

sys.path.append(str(Path(__file__).parents[1]))

import sharded_cases as cases
import vocabridge.checkpointing
from vocabridge.errors import UserError
from vocabridge.trainer import DistillationTrainer

ENGINES: dict[str, int | None] = {"ddp": None, "zero2": 2, "zero3": 3}


def trained(trainer: DistillationTrainer, **train_options: Any) -> dict[str, Any]:
    """Train, save, and tell the log, what each rank has of each parameter, and whether all have the same."""
    before = {name: p.detach().clone() for name, p in trainer.objective_module.named_parameters()}
    trainer.train(**train_options)
    trainer.save_model()
    return {
        "log": trainer.state.log_history,
        "pieces": {name: pieces(p) for name, p in trainer.distillation_model.named_parameters() if p.requires_grad},
        "alike": [same_on_all_ranks(p) for p in trainer.distillation_model.parameters() if not hasattr(p, "ds_id")],
        "moved": [name for name, p in trainer.objective_module.named_parameters() if not torch.equal(p, before[name])],
        "teacher_is_whole": trainer.teacher is None or all(p.numel() for p in trainer.teacher.model.parameters()),
        "from_pretrained_cuts": is_deepspeed_zero3_enabled(),
        "piece_bytes": sum(p.ds_tensor.nbytes for p in trainer.distillation_model.parameters() if hasattr(p, "ds_id")),
    }


def pieces(parameter: Any) -> list[int]:
    """Numbers that this rank holds, and all."""
    return (
        [parameter.ds_tensor.ds_numel, parameter.ds_numel] if hasattr(parameter, "ds_id") else [parameter.numel()] * 2
    )


def same_on_all_ranks(parameter: torch.Tensor) -> bool:
    values = [torch.empty_like(parameter.data) for _ in range(2)]
    torch.distributed.all_gather(values, parameter.data)
    return torch.equal(*values)


def all_engines(objective: Any, **options: Any) -> Callable[[Path], dict[str, Any]]:
    def case(folder: Path) -> dict[str, Any]:
        result = {}
        for engine, zero_stage in ENGINES.items():
            trainer = cases.trainer(folder / engine, objective, zero_stage=zero_stage, **options)
            if torch.distributed.get_rank() == 1:  # the first rank's start counts
                for parameter in trainer.distillation_model.parameters():
                    parameter.data.add_(1.0)
            result[engine] = trained(trainer)
        return result

    return case


def resumed(folder: Path) -> dict[str, Any]:
    """Checkpoints of either stage, gone on with by it, and refused by the other one and without DeepSpeed."""
    result: dict[str, Any] = {}
    for engine in ("zero2", "zero3"):
        result |= gone_on(folder, engine)
        for other in sorted(ENGINES.keys() - {engine}):
            trainer = cases.trainer(folder / f"{engine}-{other}", cases.GAN, zero_stage=ENGINES[other])
            result[f"{engine}-{other}"] = told(trainer, str(folder / engine / "checkpoint-2"))
    return result


def gone_on(folder: Path, engine: str, **options: Any) -> dict[str, Any]:
    """A run, and another one from its checkpoint in the middle."""
    options |= {"zero_stage": ENGINES[engine], "learning_rate": 3e-3}
    whole = trained(cases.trainer(folder / engine, cases.GAN, save_strategy="steps", save_steps=2, **options))
    again = cases.trainer(folder / f"{engine}-again", cases.GAN, **options)
    checkpoint = str(folder / engine / "checkpoint-2")
    return {engine: whole, f"{engine}-again": trained(again, resume_from_checkpoint=checkpoint)}


def told(trainer: DistillationTrainer, checkpoint: str | None = None) -> str:
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except UserError as error:
        return str(error)
    return "nothing"


def best(folder: Path) -> dict[str, Any]:
    """The best of all checkpoints is loaded into the model at the end."""
    trainer = cases.trainer(
        folder,
        cases.GAN,
        zero_stage=3,
        evaluate=True,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,  # the loss falls, so that the first one is "best"
    )
    return {**trained(trainer), "best": trainer.state.best_model_checkpoint}


def failed_save(folder: Path) -> list[str]:
    """The second checkpoint cannot be written on the first rank; what either rank is told."""
    trainer = cases.trainer(folder, "cross_entropy", zero_stage=3, save_strategy="steps", save_steps=1)
    original = vocabridge.checkpointing.save_parts

    def full(*args: Any) -> None:
        if trainer.state.global_step == 2:
            raise OSError(28, "No space left on device")
        original(*args)

    with patch.object(vocabridge.checkpointing, "save_parts", full):
        messages = ["", ""]
        torch.distributed.all_gather_object(messages, told(trainer))
    return messages


CASES: dict[str, Callable[[Path], Any]] = {
    "sft": all_engines("cross_entropy", gradient_accumulation_steps=2, tied=False),
    "gan": all_engines(
        cases.GAN,
        gradient_accumulation_steps=2,
        diagnostics_steps=2,
        projector_learning_rate=3e-3,
        discriminator_learning_rate=1e-2,
        weight_decay=0.1,
    ),
    "alternating": all_engines({**cases.GAN, "gan": {**cases.GAN["gan"], "updates": "alternating"}}),
    "hidden_state": all_engines(cases.OBJECTIVES["hidden_state"], activation_checkpointing=True),
    "lora": all_engines(cases.GAN, lora=True, learning_rate=1e-2),
    "bf16": all_engines(cases.GAN, bf16=True),
    **{name: all_engines(name) for name in cases.PLAIN},
    "resumed": resumed,
    "resumed_lora": partial(gone_on, engine="zero3", lora=True),
    "best": best,
    "failed_save": failed_save,
}


if __name__ == "__main__":
    output = Path(sys.argv[1])
    if len(sys.argv) > 2:
        CASES = {name: CASES[name] for name in sys.argv[2:]}
    gc.freeze()  # accelerate and DeepSpeed collect garbage after each training, among all objects of all packages
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does; that would be compiled for a minute
    torch.distributed.init_process_group("gloo")
    results = {}
    for name, case in CASES.items():
        results[name] = case(output / name)
        torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (output / "results.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
