"""Tiny trainers that differ in the engine alone: data parallelism, FSDP2, or one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tokenizer_zoo
from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.models.lora import add_lora
from vocabridge.models.spec import LoraSpec
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig

GAN = {"name": "dskd_cma", "matching": "gan", "gan": {"hidden_size": 16, "dropout": 0.0}}
OBJECTIVES: dict[str, Any] = {
    "sft": "cross_entropy",
    "gan": GAN,
    "uld": "uld",
    "alm": "alm",
    "hidden_state": {"terms": [{"name": "cross_entropy", "weight": 0.5}, {"name": "hidden_state", "weight": 0.5}]},
}


READ_FROM_THE_TEACHER: dict[str, Any] = {
    "last states": GAN,
    "inner states": OBJECTIVES["hidden_state"],
    "inner attention": {
        "terms": [{"name": "cross_entropy", "weight": 0.5}, {"name": "attention_relations", "weight": 0.5}]
    },
}
"""What a teacher is asked for, and an objective that asks."""


def trainer(
    folder: Path,
    objective: Any,
    *,
    fsdp: bool = False,
    tied: bool = True,
    lora: bool = False,
    evaluate: bool = False,
    num_processes: int = 2,
    teacher: bool = True,
    **arguments: Any,
) -> DistillationTrainer:
    """Eight rows a step on every number of processes."""
    for variable in [key for key in os.environ if key.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[variable]  # accelerate remembers there what the last trainer was
    student_tokenizer, teacher_tokenizer = tokenizer_zoo.byte_level_bpe(), tokenizer_zoo.sentencepiece_bpe()
    student = student_model(student_tokenizer, tied=tied)
    accumulation = int(arguments.get("gradient_accumulation_steps", 1))
    options = {
        "per_device_train_batch_size": 8 // num_processes // accumulation,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "projector_learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "diagnostics_steps": 0,
        "diagnostics_examples": 4,
        "ddp_backend": "gloo" if num_processes > 1 else None,
        "fsdp": fsdp or None,
        **arguments,
    }
    return DistillationTrainer(
        add_lora(student, LoraSpec(r=4)) if lora else student,
        teacher_model(teacher_tokenizer) if teacher else None,
        objective=objective,
        args=DistillationConfig(output_dir=str(folder), **options),
        train_dataset=ROWS,
        eval_dataset=ROWS[:5] if evaluate else None,
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer if teacher else None,
    )


def losses(log: list[dict[str, float]]) -> dict[int, float]:
    """Loss by step."""
    return {int(entry["step"]): entry["loss"] for entry in log if "loss" in entry}
