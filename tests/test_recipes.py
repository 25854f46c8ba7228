"""Every file in recipes/ passes validation and says in its header what it is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from vocabridge.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def stand_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name data that is not in the repository: here every such file exists in the current folder."""
    monkeypatch.chdir(tmp_path)
    for recipe in RECIPES:
        for name in re.findall(r"[\w./-]+\.(?:jsonl|gguf)", recipe.read_text(encoding="utf-8")):
            file = tmp_path / name
            assert tmp_path in file.resolve().parents, f"{recipe.name}: {name} lies outside the project"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()


def test_there_are_recipes() -> None:
    names = {recipe.stem for recipe in RECIPES}
    paper = {"paper_gpt2_qwen1.5", "paper_tinyllama_mistral"}
    assert names >= {*paper, *(f"{name}_teacher_sft" for name in paper), "lora_example", "sft"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    written = values["objective"]
    assert [term.name for term in recipe.objective.terms] == [term["name"] for term in written.get("terms", [written])]
    assert (recipe.teacher is not None) == ("teacher" in recipe.objective.needs)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_says_what_for_how_and_what_came_of_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = "\n".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])
    assert f"vocabridge distill recipes/{path.name}" in header
    for word in ("Command", "Hardware"):
        assert re.search(rf"^# {word}\b", header, re.MULTILINE), f"the header does not say: {word}"
    assert re.search(r"\bminutes?\b|not run here", header), (
        "the header does not say how long it takes and what came of it"
    )


@pytest.mark.parametrize("name", ["paper_gpt2_qwen1.5", "paper_tinyllama_mistral"])
def test_paper_recipes_hold_the_published_settings(name: str) -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == name))
    teacher = load_recipe(next(path for path in RECIPES if path.stem == f"{name}_teacher_sft"))
    assert recipe.teacher is not None
    assert recipe.teacher.model == teacher.training.output_dir
    objective, arguments = recipe.objective.values(), recipe.training.arguments()
    published = {"kd_weight": 0.5, "temperature": 2.0, "query_start": "random", "query_normalize": "none"}
    assert objective.items() >= {**published, "matching": "gan", "statistics": "batch"}.items()
    assert objective["gan"].items() >= {"hidden_size": 768, "dropout": 0.1}.items()
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == 32
    assert arguments["projector_learning_rate"] == 1e-3
    shared = {"lr_scheduler_type": "cosine", "weight_decay": 0.01, "max_grad_norm": 1.0, "bf16": True, "seed": 10}
    assert arguments.items() >= shared.items()
    assert teacher.training.arguments().items() >= shared.items()


def test_paper_recipes_differ_where_the_papers_settings_do() -> None:
    settings = {
        path.stem: (recipe.training.arguments()["learning_rate"], recipe.training.arguments()["num_train_epochs"], lora)
        for path in RECIPES
        if path.stem.startswith("paper_")
        for recipe in [load_recipe(path)]
        for lora in [
            recipe.student.lora and (recipe.student.lora.r, recipe.student.lora.alpha, recipe.student.lora.dropout)
        ]
    }
    assert settings == {
        "paper_gpt2_qwen1.5": (5e-4, 20, None),
        "paper_gpt2_qwen1.5_teacher_sft": (2e-5, 10, None),
        "paper_tinyllama_mistral": (1e-3, 10, (256, 8, 0.1)),
        "paper_tinyllama_mistral_teacher_sft": (1e-3, 10, (256, 8, 0.1)),
    }
