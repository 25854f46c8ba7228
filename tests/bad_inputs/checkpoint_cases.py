"""Run folders, checkpoints to resume from, earlier evaluations, caches: what an earlier command, or another, left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bad_inputs.cases import DISTILL, RESUME, BadInput, Spoil
from bad_inputs.workplace import change_weights
from vocabridge.checkpoint_files import seal

EVALUATE = ("evaluate", "run", "--data", "test.jsonl", "--limit", "2", "--max-new-tokens", "2", "--seeds", "1")
ANALYZE = ("analyze", "run", "--data", "test.jsonl")
CACHE = ("cache-teacher", "recipe.yaml", "teacher.cache=cache")
ANEW = "start anew with --overwrite"


def stopped_after_step_1(edit: Callable[[Path], object]) -> Spoil:
    """The run as if it had ended there; the edit changes its checkpoint, whose record then says that all is well."""

    def spoil(folder: Path) -> None:
        run = folder / "run"
        shutil.rmtree(run / "checkpoint-2")
        for path in run.glob("*.safetensors"):
            path.unlink()
        edit(run / "checkpoint-1")
        seal(run / "checkpoint-1")

    return spoil


def resumed(name: str, edit: Callable[[Path], object], *says: str) -> BadInput:
    return BadInput(name, ("run/checkpoint-1", *says), stopped_after_step_1(edit), RESUME, has_run=True)


def holds(name: str, content: str, *says: str) -> BadInput:
    return resumed(
        f"{name} holds {content}", lambda checkpoint: (checkpoint / name).write_text(content), f"/{name}", *says
    )


def lacks(name: str, *says: str) -> BadInput:
    return resumed(f"{name} is missing", lambda checkpoint: (checkpoint / name).unlink(), *says)


def in_optimizer(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def change(checkpoint: Path) -> None:
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        edit(state)
        torch.save(state, checkpoint / "optimizer.pt")

    return change


def fewer_groups(state: dict[str, Any]) -> None:
    del state["param_groups"][1:]


def other_shapes(state: dict[str, Any]) -> None:
    for moments in state["state"].values():
        moments["exp_avg"] = torch.zeros(3)


def damaged_and_unsealed(folder: Path) -> None:
    stopped_after_step_1(lambda checkpoint: None)(folder)
    (folder / "run" / "checkpoint-1" / "model.safetensors").write_bytes(b"x")


def in_run(name: str, content: str | None) -> Spoil:
    path = Path("run", name)
    return lambda folder: (folder / path).unlink() if content is None else (folder / path).write_text(content)


def somebody_elses(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("years of work")


def other_things_in_the_cache(folder: Path) -> None:
    (folder / "cache").mkdir()
    (folder / "cache" / "thesis.txt").write_text("years of work")


RESUMING = [
    BadInput(
        "a finished run in the way", ("run is not empty", "--resume", "--overwrite"), command=DISTILL, has_run=True
    ),
    BadInput(
        "resumed with another recipe",
        (
            "run/recipe.yaml: the run was started with other values of training.learning_rate",
            "resume with the same recipe",
        ),
        command=(*RESUME, "training.learning_rate=0.1"),
        has_run=True,
    ),
    BadInput(
        "resumed in somebody else's folder",
        ("run does not look like a run folder", "name another folder"),
        somebody_elses,
        RESUME,
    ),
    BadInput(
        "overwriting somebody else's folder",
        ("run does not look like a run folder", "empty it yourself"),
        somebody_elses,
        (*DISTILL, "--overwrite"),
    ),
    BadInput(
        "the run's recipe is cut",
        ("run/recipe.yaml:1: not valid YAML", ANEW),
        in_run("recipe.yaml", "{"),
        RESUME,
        has_run=True,
    ),
    BadInput(
        "the run's recipe has a word for a section",
        ("run/recipe.yaml: the run was started with other values",),
        in_run("recipe.yaml", "data: rows"),
        RESUME,
        has_run=True,
    ),
    BadInput(
        "the only checkpoint is damaged",
        ("run: no checkpoint is whole", "model.safetensors has 1 bytes", ANEW),
        damaged_and_unsealed,
        RESUME,
        has_run=True,
    ),
    holds("trainer_state.json", "{}", "does not tell the step", ANEW),
    holds("log_window.json", "{}", "cannot be used", "last_logged_step", ANEW),
    holds("scheduler.pt", "nope", "could run any code", ANEW),
    holds("optimizer.pt", "nope", "no file that torch.save wrote", ANEW),
    holds("model.safetensors", "nope", "cannot be used", ANEW),
    holds("step_rows.json", "{", "cannot be used", ANEW),
    lacks("optimizer.pt", " lacks optimizer.pt", "save_only_model", ANEW),
    lacks("rng_state.pth", " lacks rng_state*.pth", "save_only_model", ANEW),
    lacks("model.safetensors", "its weights cannot be used", "model.safetensors", ANEW),
    resumed("moments of other parameters", in_optimizer(fewer_groups), "/optimizer.pt", "other parameters", ANEW),
    resumed("moments of other shapes", in_optimizer(other_shapes), "/optimizer.pt", "other shapes", ANEW),
    resumed(
        "a weight is missing",
        lambda checkpoint: change_weights(checkpoint, lambda tensors: tensors.pop("model.norm.weight")),
        "model.norm.weight is missing",
        "start anew",
    ),
    resumed(
        "weights that are not finite",
        lambda checkpoint: change_weights(checkpoint, lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))),
        "the weights of 'model.norm.weight' are not finite",
        ANEW,
    ),
]

EVALUATIONS = [
    BadInput(
        "an evaluation with other settings",
        ("run/evaluation holds an evaluation that differs in temperature", "--overwrite"),
        command=(*EVALUATE, "--temperature", "0.3"),
        has_run=True,
    ),
    BadInput(
        "a run without weights",
        ("'run': the model cannot be loaded",),
        in_run("model.safetensors", None),
        EVALUATE,
        has_run=True,
    ),
    BadInput(
        "a manifest of other types",
        ("run/evaluation/manifest.json is damaged", "--overwrite"),
        in_run("evaluation/manifest.json", '{"model": 1, "settings": [], "data": 3}'),
        EVALUATE,
        has_run=True,
    ),
    BadInput(
        "bits of another kind",
        ("run/evaluation/bits/test.json is damaged", "--overwrite"),
        in_run("evaluation/bits/test.json", '{"a": 1}'),
        EVALUATE,
        has_run=True,
    ),
]

ANALYSES = [
    BadInput(
        "analysing a model",
        ("student is no run folder", "training.output_dir of a finished run"),
        command=("analyze", "student", "--data", "test.jsonl"),
    ),
    BadInput(
        "analysing an unfinished run",
        ("no objective.safetensors", "--resume"),
        in_run("objective.safetensors", None),
        ANALYZE,
        has_run=True,
    ),
    BadInput(
        "analysing damaged parts",
        ("run/objective.safetensors is damaged", "start anew"),
        in_run("objective.safetensors", "nope"),
        ANALYZE,
        has_run=True,
    ),
    BadInput(
        "analysing a run without its seed",
        ("run/run.json does not tell the run's seed",),
        in_run("run.json", "[]"),
        ANALYZE,
        has_run=True,
    ),
    BadInput("a report of a model", ("student is neither a study file", "name what"), command=("report", "student")),
]

CACHES = [
    BadInput(
        "a cache folder of somebody else's",
        ("teacher.cache: folder cache is no teacher cache", "thesis.txt", "name an empty"),
        other_things_in_the_cache,
        CACHE,
    ),
    BadInput(
        "a cache folder that is a file",
        ("teacher.cache: folder test.jsonl cannot be written", "name another"),
        command=("cache-teacher", "recipe.yaml", "teacher.cache=test.jsonl"),
    ),
    BadInput(
        "a cache of no teacher",
        ("no 'teacher' section", "nothing to cache"),
        command=("cache-teacher", "recipe.yaml", "teacher=null", "objective={name: cross_entropy}"),
    ),
]

CHECKPOINTS = [*RESUMING, *EVALUATIONS, *ANALYSES, *CACHES]
