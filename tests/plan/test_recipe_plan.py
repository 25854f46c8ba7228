"""The plan of a recipe: its parts, the proposed changes, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from vocabridge import cli
from vocabridge.errors import UserError
from vocabridge.plan.models import planned_models
from vocabridge.plan.recipe_plan import Plan, device_parts, recipe_plan
from vocabridge.plan.sizes import parse_size
from vocabridge.plan.step import step_of, teacher_weight_bytes
from vocabridge.plan.training_state import Placement
from vocabridge.recipe import recipe_from_values


def sizes(plan: Plan) -> dict[str, int]:
    return {part.name: part.num_bytes for part in plan.device}


def test_parts_and_their_sum(make_recipe: Any):
    plan = recipe_plan(make_recipe())
    assert plan.total == sum(sizes(plan).values())
    assert plan.fits is None
    tokens, student_width, teacher_width = 4 * 32, 32, 48
    assert sizes(plan)["packed hidden states"] == 4 * tokens * (4 * student_width + 3 * teacher_width)
    assert sizes(plan)["gradient of the head"] == 4 * 700 * student_width
    logits = 4 * tokens * 2 * (700 + 800)
    assert sizes(plan)["chunks of logits"] == logits + 6 * logits  # both smaller than their budgets
    assert "copies of heads" not in sizes(plan)


def test_longest_step(make_recipe: Any):
    step = step_of(make_recipe(data={"max_length": 30}, training={"pad_to_multiple_of": 8}))
    assert (step.rows, step.length) == (4, 32)
    training = {"max_tokens_per_batch": 640, "output_dir": "run"}
    recipe = make_recipe()
    values = recipe.values() | {"training": training}
    assert step_of(recipe_from_values(values)).rows == 640 // (2 * 32)


def test_half_precision_by_strategy(make_recipe: Any):
    recipe = make_recipe(training={"bf16": True})
    plans = {name: recipe_plan(recipe, strategy=name, world_size=2) for name in ("ddp", "fsdp2", "zero2")}
    assert sizes(plans["ddp"])["copies of weights"] > 0
    assert "copies of weights" not in sizes(plans["fsdp2"])
    weights = {name: sizes(plan)["student's weights"] for name, plan in plans.items()}
    assert weights["zero2"] * 2 == weights["ddp"]
    activations = {name: sizes(plan)["student's activations"] for name, plan in plans.items()}
    assert activations["fsdp2"] == activations["zero2"] < activations["ddp"]


def test_cached_and_quantized_teachers(make_recipe: Any):
    recipe = make_recipe(teacher={"cache": True})
    models = planned_models(recipe)
    assert models.teacher is not None
    ends = [models.teacher.get_input_embeddings(), models.teacher.get_output_embeddings(), models.teacher.model.norm]
    assert teacher_weight_bytes(models.teacher, step_of(recipe)) == sum(
        value.nbytes for end in ends for value in end.parameters()
    )
    assert "teacher's activations" not in sizes(recipe_plan(recipe))
    whole = sum(value.nbytes for value in models.teacher.parameters())
    linear = sum(
        value.nbytes for layer in models.teacher.model.layers for value in layer.parameters() if value.dim() == 2
    )
    for quantization, share in (("8bit", 1 / 4), ("4bit", (0.5 + 4 / 64) / 4)):
        step = step_of(make_recipe(teacher={"quantization": quantization}))
        found = teacher_weight_bytes(models.teacher, step)
        assert found == pytest.approx(whole - linear + share * linear, abs=len(list(models.teacher.parameters())))


def test_a_teacher_in_pieces(make_recipe: Any):
    recipe = make_recipe(training={"shard_teacher": True})
    models = planned_models(recipe)
    assert models.teacher is not None
    whole = teacher_weight_bytes(models.teacher, step_of(recipe, 1))
    layers = [sum(value.nbytes for value in layer.parameters()) for layer in models.teacher.model.layers]
    for ranks in (2, 4):
        found = teacher_weight_bytes(models.teacher, step_of(recipe, ranks))
        assert found == whole - sum(layers) + sum(layers) // ranks + 2 * layers[0]
    assert teacher_weight_bytes(models.teacher, step_of(make_recipe(), 4)) == whole, "only where it is asked for"


def test_changes_save_what_they_say(make_recipe: Any):
    recipe = make_recipe()
    plan = recipe_plan(recipe, world_size=2, device_memory=10**9)
    texts = [change.text for change in plan.changes]
    assert set(texts) == {
        "training.activation_checkpointing=true",
        "training.per_device_train_batch_size=2 training.gradient_accumulation_steps=2",
        "teacher.cache=true",
        "student.lora.r=16",
        "--strategy fsdp2",
        "training.shard_teacher=true",
    } - ({"student.lora.r=16", "training.shard_teacher=true"} - set(texts))  # which save nothing of models this small
    savings = [change.saving for change in plan.changes]
    assert savings == sorted(savings, reverse=True)
    assert all(change.fits for change in plan.changes)
    saved = {change.text: change.saving for change in plan.changes}
    cached = recipe_plan(make_recipe(teacher={"cache": True}), world_size=2)
    assert saved["teacher.cache=true"] == plan.total - cached.total
    assert saved["--strategy fsdp2"] == plan.total - recipe_plan(recipe, world_size=2, strategy="fsdp2").total


def test_changes_that_cannot_be_are_not_proposed(make_recipe: Any):
    training = {"activation_checkpointing": True, "per_device_train_batch_size": 1}
    recipe = make_recipe(objective={"name": "hidden_state"}, training=training, student={"lora": {"r": 2}})
    assert recipe_plan(recipe).changes == ()  # hidden_state reads inner layers, which no cache holds


def test_command(make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(make_recipe().values()))
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["plan", str(tmp_path / "recipe.yaml"), "training.per_device_train_batch_size=2", "--strategy", "fsdp2"]
    more = ["--world-size", "4", "--device-memory", "2MB", "--json", str(tmp_path / "plan.json")]
    shown = CliRunner().invoke(cli.app, [*arguments, *more])
    assert shown.exit_code == 0, shown.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["strategy"], written["world_size"], written["fits"]) == ("fsdp2", 4, False)
    assert written["total"] == sum(part["num_bytes"] for part in written["device"])
    assert "does not fit" in shown.output
    assert "training.activation_checkpointing=true" in shown.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1.5g", 1_500_000_000), ("512MiB", 2**29)]
)
def test_sizes(text: str, size: int):
    assert parse_size(text, option="--device-memory") == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "80 apples", "1e3", "80GBs"])
def test_sizes_that_are_none(text: str):
    with pytest.raises(UserError, match=r"--device-memory: '.*' is no size of memory; write a number and a unit"):
        parse_size(text, option="--device-memory")


def test_parts_without_teacher(make_recipe: Any):
    recipe = make_recipe(teacher=None, objective={"name": "cross_entropy"})
    names = {part.name for part in device_parts(recipe, planned_models(recipe), Placement())}
    assert not [name for name in names if "teacher" in name or "objective" in name]
