"""What one process and two do alike: tiny trainers, and the files that the commands are given."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

import tokenizer_zoo
from tiny_pair import OBJECTIVE_SETTINGS, ROWS, save, student_model, teacher_model
from vocabridge.objectives import objective_info, objective_names
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig

MATCHINGS = ("none", "conditional_transport", "sinkhorn", "energy", "mmd", "coral")
GAN = {"name": "dskd_cma", "matching": "gan", "gan": {"hidden_size": 16, "dropout": 0.0}}

OBJECTIVES: dict[str, dict[str, Any]] = {
    **{name: {"name": name, **OBJECTIVE_SETTINGS.get(name, {})} for name in objective_names()},
    **{f"dskd_cma, matching {matching}": {"name": "dskd_cma", "matching": matching} for matching in MATCHINGS},
    "dskd_cma, alternating updates": {**GAN, "gan": {**GAN["gan"], "updates": "alternating"}},
    "dskd_cma, R1 penalty": {**GAN, "gan": {**GAN["gan"], "r1_penalty": 1.0}},
    "dskd_cma, teacher_top_k": {**GAN, "teacher_top_k": 8},
    "three terms": {
        "terms": [{"name": "cross_entropy", "weight": 0.5}, {**GAN, "weight": 0.3}, {"name": "alm", "weight": 0.2}]
    },
}
"""Every objective with its defaults, every kind of matching, and what takes another path."""

DEPENDENT: dict[str, dict[str, Any]] = {
    "statistics: batch": {"name": "dskd_cma", "matching": "none", "statistics": "batch"},
    "spectral_norm": {**GAN, "gan": {**GAN["gan"], "spectral_norm": True}},
}
"""What cannot be split without a difference: the standard deviation of a micro-batch's states (the published form), and
the spectral norm's power iteration, which advances with each forward pass."""


byte_level_bpe = cache(tokenizer_zoo.byte_level_bpe)
sentencepiece_bpe = cache(tokenizer_zoo.sentencepiece_bpe)


def tokenizers(objective: dict[str, Any]) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Of both sides: different ones where the objective allows it."""
    student = byte_level_bpe()
    names = [term["name"] for term in objective.get("terms", [objective])]
    alike = any("same_tokenizer" in objective_info(name).config_class.needs for name in names)
    return student, student if alike else sentencepiece_bpe()


def trainer(folder: Path, objective: dict[str, Any], *, num_processes: int, **arguments: Any) -> DistillationTrainer:
    """Eight rows a step on every number of processes; no dropout, which differs from batch to batch."""
    student_tokenizer, teacher_tokenizer = tokenizers(objective)
    options = {
        "per_device_train_batch_size": 8 // num_processes // int(arguments.get("gradient_accumulation_steps", 1)),
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "diagnostics_steps": 0,
        "ddp_backend": "gloo" if num_processes > 1 else None,
        **arguments,
    }
    built = DistillationTrainer(
        student_model(student_tokenizer),
        teacher_model(teacher_tokenizer),
        objective=objective,
        args=DistillationConfig(output_dir=str(folder), **options),
        train_dataset=ROWS,
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
    )
    for module in built.distillation_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return built


class _Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, dict[str, Tensor]()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        named = self.model.named_parameters()
        self.found = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


def gradients(folder: Path, objective: dict[str, Any], *, num_processes: int, accumulation: int) -> dict[str, Tensor]:
    """Of one optimizer step over all eight rows, by parameter, named ``group/parameter``."""
    built = trainer(
        folder,
        objective,
        num_processes=num_processes,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
    )
    callback = _Gradients(built.distillation_model)
    built.add_callback(callback)
    built.train()
    groups = {
        id(parameter): name
        for name, parameters in built.objective_module.parameter_groups().items()
        for parameter in parameters
    }
    kinds = {name: groups.get(id(p), "student") for name, p in built.distillation_model.named_parameters()}
    return {f"{kinds[name]}/{name}": value for name, value in callback.found.items()}


def losses(log: list[dict[str, float]]) -> dict[int, float]:
    """Loss by step."""
    return {int(entry["step"]): entry["loss"] for entry in log if "loss" in entry}


# --- commands ---------------------------------------------------------------------------------------------------------


def write_inputs(folder: Path) -> None:
    """Models, data and a recipe for the command line."""
    folder.mkdir(exist_ok=True)
    bpe, sentencepiece = byte_level_bpe(), sentencepiece_bpe()
    student, teacher = student_model(bpe, tied=False), teacher_model(sentencepiece)
    student.lm_head.weight.data[bpe.eos_token_id] *= 10  # some answers end, after different numbers of tokens
    save(folder / "student", student, bpe)
    save(folder / "teacher", teacher, sentencepiece)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)), encoding="utf-8")


def recipe(folder: Path) -> dict[str, Any]:
    """Two steps of distillation, then an evaluation."""
    rows = str(folder / "rows.jsonl")
    return {
        "data": {"train": rows, "max_length": 128},
        "student": {"model": str(folder / "student"), "dtype": "float32"},
        "teacher": {
            "model": str(folder / "teacher"),
            "dtype": "float32",
            "cache": {"folder": str(folder / "teacher_cache")},
        },
        "objective": {"name": "dskd_cma"},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
            "use_cpu": True,
        },
        "evaluation": {"data": rows, "seeds": [10], "max_new_tokens": 6, "batch_size": 2},
    }


def resumable_words(folder: Path, run: str, *, rows: int, resume: bool = False) -> list[str]:
    """The command line of four steps over half of the rows each, with a falling learning rate and all checkpoints."""
    training = {"output_dir": folder / run, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    training |= {"per_device_train_batch_size": rows, "learning_rate": 3e-3, "lr_scheduler_type": "linear"}
    words = ["distill", str(folder / "recipe.yaml"), "teacher=null", "objective={name: cross_entropy}"]
    words += ["evaluation=null", *(f"training.{key}={value}" for key, value in training.items())]
    return [*words, *(["--resume"] if resume else [])]


def stopped_after(whole: Path, step: int, run: Path) -> Path:
    """A finished run as it was after this step."""
    shutil.copytree(whole, run)
    for checkpoint in run.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    return run


def run_losses(run: Path) -> dict[int, float]:
    """Loss by step, as the run's log has it."""
    return losses([json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()])


def long_distill_words(folder: Path, output: Path) -> list[str]:
    """The command line of two epochs of four steps on two processes, each evaluated at its end; no scores."""
    settings = {
        "data.validation": folder / "rows.jsonl",
        "evaluation": "null",
        "training.output_dir": output,
        "training.max_steps": 8,
        "training.per_device_train_batch_size": 1,
        "training.eval_strategy": "epoch",
        "training.logging_steps": 2,
        "training.diagnostics_steps": 0,
    }
    return ["distill", str(folder / "recipe.yaml"), *(f"{name}={value}" for name, value in settings.items())]


def evaluate_words(folder: Path, output: Path) -> list[str]:
    """The command line of an evaluation with samples."""
    words = ["evaluate", str(folder / "student"), "--data", str(folder / "rows.jsonl"), "--seeds", "10", "20"]
    return [*words, "--max-new-tokens", "12", "--batch-size", "2", "--output-dir", str(output)]


def generate_words(folder: Path, output: Path) -> list[str]:
    """The command line of greedy data generation."""
    words = ["generate-data", str(folder / "student"), "--data", str(folder / "rows.jsonl"), "--output", str(output)]
    return [*words, "--max-new-tokens", "24", "--batch-size", "1"]


def same_bits(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A short name for exactly these numbers, by parameter."""
    bits = {name: value.detach().contiguous().numpy().tobytes() for name, value in tensors.items()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in bits.items()}
