"""Tiny trainers that differ in the engine alone: data parallelism, FSDP2, DeepSpeed, or one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import tokenizer_zoo
from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.models.lora import add_lora
from vocabridge.models.spec import LoraSpec
from vocabridge.objectives import objective_info, objective_names
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
OTHERS = [name for name in objective_names() if name not in ("cross_entropy", "dskd_cma", *OBJECTIVES)]
"""Every other objective, by its defaults."""
PLAIN = ["uld", "alm", *OTHERS]
"""Objectives that are compared as they are."""


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
    zero_stage: int | None = None,
    tied: bool = True,
    lora: bool = False,
    evaluate: bool = False,
    num_processes: int = 2,
    teacher: bool = True,
    **arguments: Any,
) -> DistillationTrainer:
    """Eight rows a step on every number of processes; both sides have one tokenizer where the objective needs that."""
    for variable in [key for key in os.environ if key.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[variable]  # accelerate remembers there what the last trainer was
    if zero_stage is not None:
        os.environ |= launch_environment(zero_stage)
    needs_same = isinstance(objective, str) and "same_tokenizer" in objective_info(objective).config_class.needs
    student_tokenizer = tokenizer_zoo.byte_level_bpe()
    teacher_tokenizer = student_tokenizer if needs_same else tokenizer_zoo.sentencepiece_bpe()
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
    args = DistillationConfig(output_dir=str(folder), **options)
    if zero_stage == 3:  # these models are so small that by default every rank would keep them whole
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return DistillationTrainer(
        add_lora(student, LoraSpec(r=4)) if lora else student,
        teacher_model(teacher_tokenizer) if teacher else None,
        objective=objective,
        args=args,
        train_dataset=ROWS,
        eval_dataset=ROWS[:5] if evaluate else None,
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer if teacher else None,
    )


def launch_environment(zero_stage: int) -> dict[str, str]:
    """What ``accelerate launch --config_file configs/deepspeed_zero<stage>.yaml`` sets for each process."""
    config = Path(__file__).parents[1] / "configs" / f"deepspeed_zero{zero_stage}.yaml"
    given = launch_command_parser().parse_args(["--config_file", str(config), "--main_process_port", "0", "script.py"])
    read, *_ = _validate_launch_command(given)
    read.deepspeed_fields_from_accelerate_config = ""  # set by the step between the two
    _, environment = prepare_deepspeed_cmd_env(read)
    return {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}


def learns(pieces: dict[str, Any]) -> bool:
    """Whether the objective has learned parts, by the names of what is trained."""
    return any(name.startswith("objective.") for name in pieces)


def losses(log: list[dict[str, float]]) -> dict[int, float]:
    """Loss by step."""
    return {int(entry["step"]): entry["loss"] for entry in log if "loss" in entry}


def assert_close(found: dict[int, float], expected: dict[int, float], *, rel: float = 1e-4) -> None:
    """Losses of four steps, of which no two are the same."""
    assert found.keys() == expected.keys()
    assert len(expected) == 4
    assert len(set(expected.values())) == 4, "nothing was trained"
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=rel), step


def assert_same_files(found: Path, expected: Path, name: str, *, atol: float = 1e-4) -> None:
    """Tensors of two folders' files of that name."""
    first, second = load_file(found / name), load_file(expected / name)
    assert first.keys() == second.keys()
    for key, value in second.items():
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def assert_is_plain_checkpoint(run: Path, base_tokenizer: PreTrainedTokenizerFast) -> None:
    """A trained student that anybody loads, tied weights stored once, no pickle beside it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(run / "model.safetensors"), "tied weights were written twice"
    before = student_model(base_tokenizer).state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ids = tokenizer("Who jumps?\n", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert not [path for pattern in ("*.bin", "*.pt", "*.pth") for path in run.rglob(pattern)]
