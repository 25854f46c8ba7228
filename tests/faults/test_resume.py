"""Going on from a checkpoint is exact to the last bit, wherever it lies: weights, moments, schedule, numbers, log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from faults.phases import run_results
from vocabridge.checkpoint_files import FILES_RECORD, checkpoints
from vocabridge.recipe import load_recipe
from vocabridge.run import distill

STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "log_window.json", "objective.safetensors")

CASES = {
    "accumulation, inside a pass and a line of the log": [
        "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=3", "training.save_steps=4",
        "training.logging_steps=3", "training.max_steps=7",
    ],
    "at the end of a pass": [
        "training.per_device_train_batch_size=2", "training.save_steps=4", "training.max_steps=6",
        "training.logging_steps=5",
    ],
    "rows grouped by length, saved by pass": [
        "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=3", "training.max_steps=8",
        "training.train_sampling_strategy=group_by_length", "training.save_strategy=epoch", "training.logging_steps=4",
    ],
    "token budget": [
        "training.max_tokens_per_batch=150",
        "training.gradient_accumulation_steps=2", "training.save_steps=3", "training.max_steps=5",
    ],
    "teacher cache, measured distances, evaluation": [
        "teacher.cache=cache", "data.validation=test.jsonl", "training.eval_strategy=steps", "training.eval_steps=2",
        "training.save_steps=3", "training.max_steps=5", "training.diagnostics_steps=2",
        "training.diagnostics_examples=2",
    ],
    "stream": ["data.streaming=true", "training.gradient_accumulation_steps=2", "training.save_steps=3"],
    "several terms": [
        "objective={terms: [{name: cross_entropy, weight: 0.5}, {name: uld}, {name: hidden_state, weight: 0.1}]}",
        "training.save_steps=4", "training.logging_steps=5", "training.lr_scheduler_type=cosine",
    ],
}  # fmt: skip


@pytest.fixture
def recipe_file(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With dropout in the student, so that random numbers matter."""
    monkeypatch.chdir(workplace)
    config = json.loads((workplace / "student" / "config.json").read_text())
    (workplace / "student" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return workplace / "recipe.yaml"


def state(checkpoint: Path) -> dict[str, Any]:
    """Checksums of what a resumption reads."""
    record = json.loads((checkpoint / FILES_RECORD).read_text())
    return {name: record[name] for name in (*STATE, "model.safetensors") if name in record}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_undisturbed_one(recipe_file: Path, name: str) -> None:
    if name == "token budget":  # takes the place of a number of rows
        recipe_file.write_text(recipe_file.read_text().replace("  per_device_train_batch_size: 3\n", ""))
    options = [*CASES[name], "training.save_total_limit=9"]
    distill(load_recipe(recipe_file, options))
    shutil.move("run", "whole")
    middle, *_, last = checkpoints(Path("whole"))
    Path("run").mkdir()
    shutil.copytree(middle, Path("run", middle.name))
    shutil.copy("whole/metrics.jsonl", "run/metrics.jsonl")
    distill(load_recipe(recipe_file, options), resume=True)
    assert run_results(Path("run")) == run_results(Path("whole"))
    assert state(Path("run", last.name)) == state(last)
    assert len(state(last)) >= 5
    assert any("loss" in entry for entry in run_results(Path("run"))["log"])
