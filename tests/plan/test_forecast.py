"""A forecast by hand, and where there can be none."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vocabridge.plan import forecast as forecasts
from vocabridge.plan.forecast import forecast
from vocabridge.plan.models import num_elements, pair_tokenizers, planned_models
from vocabridge.recipe import Recipe
from vocabridge.text import read_examples

SPEED = 1e6
"""Products a second, of which a fifth counts."""


@pytest.fixture(autouse=True)
def _known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "_measured_speed", lambda *_: SPEED)


def seconds_of(products: float) -> float:
    return 10.0 + products / (0.2 * SPEED)


def facts(recipe: Recipe) -> tuple[int, int, int, float, float, float]:
    """Weights of both models, rows, and mean tokens: the student's, the teacher's, the teacher's in the response."""
    models = planned_models(recipe)
    assert models.teacher is not None
    pair_tokenizer = pair_tokenizers(recipe.student, recipe.teacher, recipe.data.max_length).pair
    pairs = [pair for row in read_examples(recipe.data.train[0]) if (pair := pair_tokenizer(row))]
    teachers = [pair.teacher for pair in pairs if pair.teacher]
    student, teacher = (num_elements(list(model.parameters())) for model in (models.student, models.teacher))
    return (
        student,
        teacher,
        len(read_examples(recipe.data.train[0])),
        sum(len(pair.student.input_ids) for pair in pairs) / len(pairs),
        sum(len(side.input_ids) for side in teachers) / len(pairs),
        sum(len(side.spans) for side in teachers) / len(pairs),
    )


def test_time_of_training_is_its_multiplications(make_recipe: Any) -> None:
    recipe = make_recipe(training={"max_steps": 5, "gradient_accumulation_steps": 2})
    student, teacher, _, student_tokens, teacher_tokens, _ = facts(recipe)
    products = 5 * 2 * 4 * (3 * student * student_tokens + teacher * teacher_tokens)
    found = forecast(recipe)
    assert found is not None
    assert found.seconds == pytest.approx(seconds_of(products))
    assert found.cache_bytes == 0


def test_passes_over_the_data_and_a_cached_teacher(make_recipe: Any) -> None:
    recipe = make_recipe(
        teacher={"cache": True}, training={"num_train_epochs": 2, "activation_checkpointing": True, "use_cpu": True}
    )
    student, _, rows, student_tokens, _, cached = facts(recipe)
    found = forecast(recipe)
    assert found is not None
    assert found.seconds == pytest.approx(seconds_of(2 * rows * 4 * student * student_tokens))
    teacher = planned_models(recipe).teacher
    assert teacher is not None
    assert found.cache_bytes == pytest.approx(rows * cached * teacher.config.hidden_size * teacher.dtype.itemsize)


def test_answers_are_counted_for_each_seed_unless_they_are_greedy(make_recipe: Any, pair_folder: Path) -> None:
    train = {"max_steps": 1, "use_cpu": True}
    section = {"data": [str(pair_folder / "train.jsonl")], "seeds": [1, 2], "max_new_tokens": 7}
    alone = forecast(make_recipe(training=train))
    sampled = forecast(make_recipe(training=train, evaluation=section))
    greedy = forecast(make_recipe(training=train, evaluation={**section, "temperature": 0.0}))
    assert alone is not None
    assert sampled is not None
    assert greedy is not None
    student, _, rows, tokens, _, _ = facts(make_recipe())
    for found, num_answers in ((sampled, 2), (greedy, 1)):
        products = rows * student * (tokens + num_answers * (tokens + 7))
        assert found.seconds - alone.seconds == pytest.approx(products / (0.2 * SPEED))


@pytest.mark.parametrize(
    ("training", "num_checkpoints"),
    [
        ({"max_steps": 10, "save_strategy": "no"}, 0),
        ({"max_steps": 10, "save_steps": 4, "save_only_model": True}, 3),
        ({"max_steps": 10, "save_steps": 4, "save_only_model": True, "save_total_limit": 2}, 2),
        ({"max_steps": 10, "save_steps": 0.25, "save_only_model": True}, 4),
        ({"num_train_epochs": 5, "save_strategy": "epoch", "save_only_model": True}, 5),
        ({"max_steps": 5, "save_strategy": "epoch", "save_only_model": True}, 3),  # 8 rows, 4 a step: 2.5 passes
    ],
)
def test_disk_is_the_student_and_the_checkpoints_that_are_kept(
    make_recipe: Any, training: dict[str, Any], num_checkpoints: int
) -> None:
    recipe = make_recipe(training=training)
    found = forecast(recipe)
    assert found is not None
    assert found.num_bytes == (1 + num_checkpoints) * 4 * facts(recipe)[0]


def test_none_where_a_model_or_the_data_are_not_here(make_recipe: Any, tmp_path: Path) -> None:
    data, model = tmp_path / "gone.jsonl", tmp_path / "gone"
    data.write_text("{}")
    model.mkdir()
    recipes = [make_recipe(data={"train": [str(data)]}), make_recipe(student={"model": str(model)})]
    data.unlink()
    model.rmdir()
    assert [forecast(recipe) for recipe in recipes] == [None, None]


def test_the_speed_is_that_of_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by 0.06 s whenever it is looked at: three products in 0.24 s."""
    monkeypatch.undo()
    ticks = itertools.count()
    monkeypatch.setattr(forecasts, "time", SimpleNamespace(perf_counter=lambda: 0.06 * next(ticks)))
    threads = torch.get_num_threads()
    found = forecasts._measured_speed.__wrapped__("cpu", torch.float32, 64, 1)
    assert found == pytest.approx(3 * 256 * 64 * 256 / 0.24)
    assert torch.get_num_threads() == threads
