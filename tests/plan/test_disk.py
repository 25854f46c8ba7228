"""Sizes on disk against what a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tiny_pair import student_model, teacher_model
from vocabridge.cache_teacher import cache_teacher
from vocabridge.plan.disk import cache_size, disk_parts
from vocabridge.plan.models import planned_models
from vocabridge.plan.recipe_plan import recipe_plan
from vocabridge.run import distill
from vocabridge.text import read_examples


@pytest.fixture
def with_weights(
    pair_folder: Path,
    tmp_path: Path,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, dict[str, str]]:
    """Recipe sections that name whole checkpoints."""
    sides = (
        ("student", student_model(tiny_bpe_tokenizer), tiny_bpe_tokenizer),
        ("teacher", teacher_model(tiny_sentencepiece_tokenizer), tiny_sentencepiece_tokenizer),
    )
    for side, model, tokenizer in sides:
        model.save_pretrained(tmp_path / side)
        tokenizer.save_pretrained(tmp_path / side)
    return {side: {"model": str(tmp_path / side)} for side, _, _ in sides}


def test_cache_and_checkpoints_are_of_the_planned_size(
    make_recipe: Any, with_weights: dict[str, Any], pair_folder: Path, tmp_path: Path
):
    with_weights["teacher"]["cache"] = str(tmp_path / "cache")
    training = {"max_steps": 1, "save_steps": 1, "save_total_limit": 2, "report_to": "none", "diagnostics_steps": 0}
    recipe = make_recipe(**with_weights, training=training)
    models = planned_models(recipe)
    parts = {part.name: part.num_bytes for part in disk_parts(recipe, models)}

    examples = read_examples(str(pair_folder / "train.jsonl"))
    cached = cache_teacher(recipe.teacher, examples, max_length=32)
    size = cache_size(recipe, models)
    assert size is not None
    assert size.rows == len(cached.cache)
    assert size.num_bytes == parts["teacher cache"]
    assert parts["teacher cache"] <= cached.cache.num_bytes < parts["teacher cache"] + 8_000  # headers of the files

    distill(recipe)
    run = Path(recipe.training.output_dir)
    names = ("model.safetensors", "objective.safetensors", "optimizer.pt")
    written = sum((run / "checkpoint-1" / name).stat().st_size for name in names)
    assert parts["checkpoint"] == pytest.approx(written, rel=0.15)  # the optimizer's file names each of its tensors
    assert parts["checkpoint"] < written
    assert parts["checkpoints together"] == 3 * parts["checkpoint"]
    assert parts["finished student"] == pytest.approx(sum((run / name).stat().st_size for name in names[:2]), rel=0.1)


def test_only_adapters_and_no_checkpoints(make_recipe: Any):
    recipe = make_recipe(student={"lora": {"r": 2}}, objective={"name": "cross_entropy"}, teacher=None)
    models = planned_models(recipe)
    adapters = sum(value.nbytes for value in models.trained)
    states = sum(2 * value.nbytes + 4 for value in models.trained)
    parts = {part.name: part.num_bytes for part in disk_parts(recipe, models)}
    assert adapters > 0
    assert parts["checkpoint"] == adapters + states
    assert "checkpoints together" not in parts  # all are kept
    without = make_recipe(training={"save_strategy": "no"})
    assert [part.name for part in disk_parts(without, planned_models(without))] == ["finished student"]


def test_fsdp2_saves_the_float32_in_which_it_trains(make_recipe: Any):
    sides = {"objective": {"name": "cross_entropy"}, "teacher": None}
    recipe = make_recipe(student={"dtype": "bfloat16"}, training={"bf16": True}, **sides)
    models = planned_models(recipe)
    number = sum(value.numel() for value in models.student.parameters())
    num_tensors = len(models.trained)  # each with the number of the step
    for strategy, width in (("ddp", 2), ("fsdp2", 4)):
        plan = recipe_plan(recipe, strategy=strategy, world_size=2)
        parts = {part.name: part.num_bytes for part in plan.disk}
        assert parts["checkpoint"] == 3 * width * number + 4 * num_tensors
        assert parts["finished student"] == width * number


def test_data_of_elsewhere_leave_the_cache_open(make_recipe: Any):
    recipe = make_recipe(data={"train": ["org/data"]}, teacher={"cache": True})
    assert cache_size(recipe, planned_models(recipe)) is None
