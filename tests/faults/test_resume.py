"""Going on from a checkpoint is exact to the last bit, wherever it lies: weights, moments, schedule, numbers, log."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.phases import run_results
from vocabridge.checkpoint_files import FILES_RECORD, checkpoints
from vocabridge.recipe import load_recipe
from vocabridge.run import distill
from vocabridge.trainer import DistillationTrainer

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
    "evaluated, logged and saved by pass, the best one kept": [
        "data.validation=test.jsonl", "training.eval_strategy=epoch", "training.save_strategy=epoch",
        "training.logging_strategy=epoch", "training.load_best_model_at_end=true", "training.max_steps=8",
    ],
    "saved at the end of a pass, before it is evaluated": [
        "data.validation=test.jsonl", "training.eval_strategy=epoch", "training.save_steps=3",
        "training.lr_scheduler_type=reduce_lr_on_plateau", "training.max_steps=7",
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


STOPPED = {
    "by pass, the best one kept": [
        "training.eval_strategy=epoch", "training.save_strategy=epoch", "training.logging_strategy=epoch",
        "training.load_best_model_at_end=true", "training.logging_steps=3",
    ],
    "saved by step, evaluated by pass": ["training.eval_strategy=epoch", "training.save_steps=3"],
    "never saved": ["training.eval_strategy=epoch", "training.save_strategy=no"],
    "only the best one saved, which is the first": [
        "training.eval_strategy=steps", "training.eval_steps=1", "training.save_strategy=best",
        "training.metric_for_best_model=eval_loss", "training.greater_is_better=true",
    ],
}  # fmt: skip


def evaluations(run_dir: Path) -> list[int]:
    return [entry["step"] for entry in run_results(run_dir)["log"] if "eval_loss" in entry]


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_ends_as_the_undisturbed_one(
    recipe_file: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM within an epoch, in its last step, and in the last step of all, in the middle of one."""
    options = ["data.validation=test.jsonl", "training.save_total_limit=9", "training.max_steps=5", *STOPPED[name]]
    original, stop_in = DistillationTrainer.compute_loss, 0

    def compute_loss(self: DistillationTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss)
    distill(load_recipe(recipe_file, options))
    shutil.move("run", "whole")
    assert evaluations(Path("whole")) == ([3, 5] if "epoch" in options[3] else [1, 2, 3, 4, 5])
    for stop_in in (2, 3, 5):
        stopped = distill(load_recipe(recipe_file, options))
        assert (stopped.steps, stopped.interrupted, stopped.preempted) == (stop_in, True, True)
        assert checkpoints(Path("run"))[-1].name == f"checkpoint-{stop_in}"
        stop_in = 0
        distill(load_recipe(recipe_file, options), resume=True)
        assert run_results(Path("run")) == run_results(Path("whole"))
        shutil.rmtree("run")


def evaluate_until(step: int) -> Callable[..., Any]:
    """An evaluation that does not live to see this step's."""
    original = DistillationTrainer.evaluate

    def evaluate(trainer: DistillationTrainer, *args: Any, **options: Any) -> Any:
        if trainer.state.global_step == step:
            raise RuntimeError("killed")
        return original(trainer, *args, **options)

    return evaluate


def test_a_kill_between_the_last_step_and_its_evaluation(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of the last step is there, and nothing that comes after it; a start more changes nothing."""
    options = ["data.validation=test.jsonl", "training.eval_strategy=epoch", "training.save_steps=5"]
    for max_steps in (5, 6):
        to_the_end = [*options, f"training.max_steps={max_steps}", "training.save_total_limit=9"]
        distill(load_recipe(recipe_file, to_the_end))
        whole = run_results(Path("run"))
        assert evaluations(Path("run")) == [3, max_steps]
        shutil.rmtree("run")
        with monkeypatch.context() as patch:
            patch.setattr(DistillationTrainer, "evaluate", evaluate_until(max_steps))
            with pytest.raises(RuntimeError, match="killed"):
                distill(load_recipe(recipe_file, to_the_end))
        assert evaluations(Path("run")) == [3]
        assert Path(f"run/checkpoint-{max_steps}").is_dir()
        for _ in range(2):
            distill(load_recipe(recipe_file, to_the_end), resume=True)
            assert run_results(Path("run")) == whole
        shutil.rmtree("run")
