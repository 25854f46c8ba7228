"""Recipes read back as they were written, and the training section follows the installed transformers."""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recipe_cases import DISTIL, SFT, assert_round_trip, write
from vocabridge.objectives import objective_names
from vocabridge.recipe import load_recipe, recipe_from_values
from vocabridge.recipe.objective import read_objective
from vocabridge.recipe.training import NOT_TAKEN, OwnTrainingSettings, training_argument_types
from vocabridge.recipe.yaml_text import dump, read_mapping, read_value


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- round trip ------------------------------------------------------------------------------------------------------


def test_resolved_recipe_holds_sections_in_pipeline_order_and_defaults_written_out() -> None:
    recipe = load_recipe(write(DISTIL), ["training.learning_rate=1e-5"])
    values = yaml.safe_load(recipe.resolved_yaml())
    assert list(values) == ["data", "student", "teacher", "objective", "training", "evaluation"]
    assert values["objective"]["temperature"] == 2.0
    assert values["training"]["learning_rate"] == 1e-5
    assert "weight_decay" not in values["training"]
    assert_round_trip(recipe)


@pytest.mark.parametrize(
    "word", ["no", "on", "null", "~", "1e5", "5e-4", "010", "1:30", "2020-01-01", ".nan", "<<", "", "="]
)
def test_words_that_look_like_something_else_survive(word: str) -> None:
    recipe = recipe_from_values(yaml.safe_load(SFT) | {"training": {"output_dir": "runs/x", "run_name": word}})
    assert_round_trip(recipe)
    assert yaml.safe_load(recipe.resolved_yaml())["training"]["run_name"] == word  # a YAML 1.1 reader agrees


NAMES = st.text(string.ascii_letters + string.digits + "-_ éß漢🙂'\":#{}[]", min_size=1, max_size=12).map(
    "org/n".__add__
)
RATES = st.floats(1e-12, 1e3)
RECIPES = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {"train": NAMES | st.lists(NAMES, min_size=1, max_size=3)},
            optional={
                "validation": st.lists(NAMES, max_size=2),
                "max_length": st.integers(8, 10**6),
                "limit": st.none(),
            },
        ),
        "student": st.fixed_dictionaries(
            {"model": NAMES},
            optional={
                "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
                "revision": st.none() | st.text(string.hexdigits, min_size=1, max_size=8),
                "lora": st.none() | st.fixed_dictionaries({"r": st.integers(1, 512), "alpha": RATES}),
            },
        ),
        "teacher": st.fixed_dictionaries({"model": NAMES}, optional={"template": st.sampled_from(["plain", "chat"])}),
        "objective": st.fixed_dictionaries(
            {"name": st.just("dskd_cma")},
            optional={"temperature": RATES, "kd_weight": st.floats(0, 1), "score_scale": st.none() | RATES},
        ),
        "training": st.fixed_dictionaries(
            {"output_dir": NAMES.map("runs/".__add__)},
            optional={
                "learning_rate": RATES,
                "projector_learning_rate": st.none() | RATES,
                "max_steps": st.integers(-1, 10**9).filter(bool),
                "bf16": st.booleans(),
                "report_to": NAMES | st.lists(NAMES, max_size=2),
                "lr_scheduler_kwargs": st.dictionaries(NAMES, RATES | st.booleans() | NAMES, max_size=2),
                "lr_scheduler_type": st.sampled_from(["cosine", "linear"]),
            },
        ),
    },
    optional={
        "evaluation": st.fixed_dictionaries(
            {"data": st.lists(NAMES, min_size=1, max_size=3, unique=True)},
            optional={"seeds": st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4, unique=True)},
        )
    },
)


@settings(max_examples=150, deadline=None)
@given(RECIPES)
def test_valid_recipes_round_trip(values: dict[str, Any]) -> None:
    assert_round_trip(recipe_from_values(values))


@settings(max_examples=300, deadline=None)
@example("a\x85b")
@example("\u2028")
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(string.printable.strip()), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_yaml_writes_what_it_and_other_readers_read_back(value: Any) -> None:
    text = dump({"key": value})
    assert read_mapping(text, source="x").values == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-4", 5e-4), ("010", "010"), ("1:30", "1:30"), ("no", "no"), ("true", True), ("-3", -3), ("", None),
     ("~", None), (".inf", math.inf), ("-.inf", -math.inf), ("1_000", "1_000"), ("2020-01-01", "2020-01-01"),
     ("0x1F", "0x1F"), ("12e03", 12000.0), ("1.", 1.0), (".5", 0.5), ("+.5E+2", 50.0), ("'no'", "no"),
     ("[1, a]", [1, "a"])],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text: str, value: Any) -> None:
    read = read_value(text)
    assert read == value
    assert type(read) is type(value)


# --- the training section against the installed transformers --------------------------------------------------------


def test_training_fields_are_those_of_the_installed_transformers() -> None:
    import dataclasses

    from transformers import TrainingArguments

    real = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    offered = set(training_argument_types())
    assert offered <= real
    assert real - offered - set(NOT_TAKEN) == {"parallelism_config"}  # an object that YAML cannot express


def test_every_training_field_takes_its_own_default() -> None:
    from transformers import TrainingArguments

    defaults = {
        name: field.default
        for name, field in TrainingArguments.__dataclass_fields__.items()
        if name in training_argument_types() and isinstance(field.default, str | int | float | bool | None)
    }
    assert len(defaults) > 80
    values = yaml.safe_load(SFT) | {"training": defaults | {"output_dir": "runs/x", "eval_strategy": "no"}}
    assert recipe_from_values(values).training.arguments()["learning_rate"] == 5e-5


def test_our_own_training_fields_are_those_of_the_trainer() -> None:
    from vocabridge.trainer import DistillationConfig

    assert set(OwnTrainingSettings.model_fields) <= set(DistillationConfig.__dataclass_fields__)
    for name, field in OwnTrainingSettings.model_fields.items():
        if not field.is_required():
            assert DistillationConfig.__dataclass_fields__[name].default == field.default


@pytest.mark.parametrize("name", objective_names())
def test_settings_of_every_objective_read_back_with_their_defaults_written_out(name: str) -> None:
    settings, problems = read_objective({"name": name})
    assert settings is not None, problems
    assert read_objective(settings.values()) == (settings, [])
    composed, problems = read_objective({"terms": [{"name": name, "weight": 2.0}]})
    assert composed is not None, problems
    assert read_objective(composed.values()) == (composed, [])
