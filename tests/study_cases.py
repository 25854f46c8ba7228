"""A study whose models exist by name only, and the files that a finished run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vocabridge.study.plan import PlannedRun
from vocabridge.study.status import RECIPE_FILE, RunStatus, recipe_fingerprint, write_status

BASE: dict[str, Any] = {
    "data": {"train": "org/rows"},
    "student": {"model": "org/student"},
    "teacher": {"model": "org/teacher"},
    "objective": {"name": "dskd_cma", "matching": "gan"},
    "training": {"output_dir": "runs/x", "max_steps": 4},
}
STUDY: dict[str, Any] = {
    "base": "recipe.yaml",
    "output_dir": "study",
    "baseline": "cma",
    "seeds": [0, 1, 2],
    "evaluation": {"data": ["org/test", "org/other"], "seeds": [10, 20]},
    "variants": {
        "cma": {"objective.matching": "none"},
        "cma_ga": None,
        "sft": {"teacher": None, "objective": {"name": "cross_entropy"}},
    },
}

WriteStudy = Callable[..., Path]


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean and deviation as an evaluation writes them."""
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    return {"mean": mean, "std": deviation}


def write_evaluation(folder: Path, examples: Mapping[str, Mapping[int, list[float]]], *, bits: float = 2.0) -> None:
    """The files of an evaluation with ROUGE-L of every example: file -> sampling seed -> values in [0, 1]."""
    evaluation = folder / "evaluation"
    (evaluation / "predictions").mkdir(parents=True, exist_ok=True)
    files = []
    for position, (name, by_seed) in enumerate(examples.items()):
        for seed, values in by_seed.items():
            rows = [
                {
                    "index": i,
                    "source": f"{name}:{i + 1}",
                    "rouge_l": value,
                    "exact_match": value == 1,
                    "prediction": "a\u2028b",
                }
                for i, value in enumerate(values)
            ]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (evaluation / "predictions" / f"{name}.seed{seed}.jsonl").write_text(lines, encoding="utf-8")
        rouge = [100 * sum(values) / len(values) for values in by_seed.values()]
        exact = [100 * sum(value == 1 for value in values) / len(values) for values in by_seed.values()]
        seeds = [
            {"seed": seed, "rouge_l": r, "exact_match": e, "finished": 1.0}
            for seed, r, e in zip(by_seed, rouge, exact, strict=True)
        ]
        part = {"name": name, "in_domain": position == 0, "seeds": seeds, "bits_per_byte": bits + position}
        files.append(part | {"rouge_l": spread(rouge), "exact_match": spread(exact)})
    averages = {}
    for key, in_domain in (("in_domain", True), ("out_of_domain", False)):
        own = [part for part in files if part["in_domain"] == in_domain]
        averages[key] = _average(own) if own else None
    (evaluation / "results.json").write_text(json.dumps({"model": "m", "files": files, **averages}), encoding="utf-8")


def _average(files: list[dict[str, Any]]) -> dict[str, Any]:
    def per_seed(metric: str) -> list[float]:
        return [sum(row) / len(row) for row in zip(*([s[metric] for s in f["seeds"]] for f in files), strict=True)]

    return {
        "files": [part["name"] for part in files],
        "rouge_l": spread(per_seed("rouge_l")),
        "exact_match": spread(per_seed("exact_match")),
        "bits_per_byte": sum(part["bits_per_byte"] for part in files) / len(files),
    }


def finish(run: PlannedRun, examples: Mapping[str, Mapping[int, list[float]]], *, bits: float = 2.0) -> None:
    """Make a planned run look done."""
    run.folder.mkdir(parents=True)
    write_evaluation(run.folder, examples, bits=bits)
    (run.folder / RECIPE_FILE).write_text(run.recipe.resolved_yaml())
    status = RunStatus(
        state="done",
        recipe=recipe_fingerprint(run.recipe),
        folder=str(run.folder.absolute()),
        seconds=8.0,
        sessions=1,
        steps=4,
    )
    write_status(run.folder, status)
