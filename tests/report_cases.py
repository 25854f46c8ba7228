"""A study of three variants and three seeds with everything a report shows, and text that tries to run as a script."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from study_cases import BASE, STUDY, finish
from vocabridge.study.plan import PlannedRun, StudyPlan, load_study
from vocabridge.study.results import study_results
from vocabridge.study.status import RunStatus, recipe_fingerprint, write_status

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1><b>&amp;\u2028"
"""Runs or changes the page wherever it is not escaped."""

STEPS = 60
_GAIN = {"cma": 0.0, "cma_ga": 0.004, "sft": -0.05}

STUDENT = ["Der", "\u2423Fl", "u\u00df", "\u2423ist", "\u2423\u4e00", "<E4 BD>", "\u0634\u0645\u0633", "</s>"]
TEACHER = ["Der", "\u2423Flu\u00df", "\u2423is", "t", "\u2423\u4e00\u4f60", "\u0634\u0645\u0633", "<eos>"]
CHUNKS = ([0, 1, 1, 2, 3, 3, 4, 5], [0, 1, 2, 2, 3, 4, 5])


def write_study(folder: Path) -> Path:
    """A study file beside its recipe; paths in it are absolute, so the current folder does not matter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False), encoding="utf-8")
    study = {**STUDY, "output_dir": str(folder / "out")}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def finished_study(folder: Path) -> Path:
    """The study with all runs done, one of them having diverged in a logged value."""
    path = write_study(folder)
    for run in load_study(path).runs:
        finish_run(run)
    write_pair(folder / "out")
    return path


def partial_study(folder: Path) -> Path:
    """One run done, one failed, one in the middle of a line of its log, the others not begun."""
    path = write_study(folder)
    plan = load_study(path)
    finish_run(plan.runs[0])
    failed, torn = plan.runs[1], plan.runs[2]
    failed.folder.mkdir(parents=True)
    message = "UserError: loss term 'dskd_cma' is not finite, so training stops"
    write_status(failed.folder, RunStatus(state="failed", message=message, recipe=recipe_fingerprint(failed.recipe)))
    torn.folder.mkdir(parents=True)
    (torn.folder / "metrics.jsonl").write_text('{"loss": 3.0, "step": 5}\n{"loss": 2.9, "st', encoding="utf-8")
    return path


def bare_run(folder: Path) -> Path:
    """A run folder with a log and nothing else; markup in its name."""
    run = folder / "<b>run&amp;"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"loss": 3.0, "step": 5}\n', encoding="utf-8")
    return run


def finish_run(run: PlannedRun) -> None:
    """Scores, log, record, recipe and analysis of one run."""
    generator = random.Random(f"{run.variant} {run.seed}")
    level = 0.3 + _GAIN[run.variant] + 0.01 * generator.random()
    answers = {
        name: {seed: [min(1.0, abs(generator.gauss(level, 0.05))) for _ in range(40)] for seed in (10, 20)}
        for name in ("test", "other")
    }
    finish(run, answers, bits=1.2 - _GAIN[run.variant])
    write_run(run.folder, seed=run.seed, attends=run.variant != "sft", lift=40 * _GAIN[run.variant])
    (run.folder / "recipe.yaml").write_text(run.recipe.resolved_yaml(), encoding="utf-8")


def write_run(folder: Path, *, seed: int, attends: bool = True, lift: float = 0.0) -> None:
    """Log and record of a run, and its analysis where its objective attends."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry) + "\n" for entry in log_entries(seed, attends=attends, lift=lift))
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    write_json(folder / "run.json", run_record(seed))
    if attends:
        write_json(folder / "analysis" / "probe.json", probe())
        write_json(folder / "analysis" / "heatmaps.json", heatmaps())
        write_json(folder / "analysis" / "points.json", points(seed))


def log_entries(seed: int, *, attends: bool, lift: float = 0.0) -> Iterator[dict[str, float]]:
    """Losses every 5 steps, distances every 20."""
    generator = random.Random(seed)
    for step in range(0, STEPS + 1, 5):
        fall = math.exp(-step / 30) + lift / 10
        if attends and step % 20 == 0:
            yield {
                "probe/mmd_squared": 0.2 * fall + 0.01 * generator.random(),
                "probe/mean_cosine": 0.9 - 0.5 * fall,
                "probe/two_sample_accuracy": math.nan if seed == 2 else 0.9,
                "step": step,
            }
        if step:
            entry = {"loss": 4 + 6 * fall + generator.random(), "cross_entropy": 2 + fall, "grad_norm": 3 + 9 * fall}
            if attends:
                entry |= {
                    "loss/student_space": 2 + fall,
                    "discriminator_query_accuracy": 0.5 + 0.4 * fall,
                    "discriminator_key_accuracy": 0.5 + 0.3 * fall,
                    "query_gradient_ratio": 0.01 + 0.02 * generator.random(),
                    "coverage": 0.98,
                }
            if seed == 1 and step == 30:
                entry["loss"] = math.nan
            yield {**entry, "learning_rate": 1e-4 * fall, "epoch": step / STEPS, "step": step}
    yield {"train_runtime": 30.0 + seed, "train_steps_per_second": 2.0, "step": STEPS}


def run_record(seed: int, **facts: Any) -> dict[str, Any]:
    """``run.json``."""
    machine = {"platform": "Linux", "cpu_count": 2, "device": "cpu"}
    packages = {"torch": "2.13.0", "transformers": "5.23.0"}
    record = {"seed": seed, "objective": "dskd_cma", "python": "3.11.7", "packages": packages, "machine": machine}
    return record | {"git_commit": "c0ffee", "command": ["/x/vocabridge/__main__.py", "distill", "r.yaml"], **facts}


def probe() -> dict[str, Any]:
    """``probe.json`` with a field that the report does not know."""
    results, changes, repetition = [], [], []
    for attention, mass in (("uniform", 0.1), ("before", 0.3), ("after", 0.7)):
        cost = {"mass_in_chunk": {"mean": -mass / 2, "low": -mass, "high": 0.0}}
        repetition.append({"attention": attention, "grouping": "teacher bigram", "measures": cost})
        for grouping, group in (("all", "all"), ("chunk type", "1:1"), ("chunk type", "n:m")):
            measures = {"mass_in_chunk": {"mean": mass, "low": mass - 0.1, "high": mass + 0.1}}
            measures["entropy"] = {"mean": 1.5, "low": None, "high": None}
            result = {"attention": attention, "grouping": grouping, "group": group, "positions": 1234}
            results.append(result | {"coverage": 1.0, "measures": measures, "new": 1})
    change = {"mass_in_chunk": {"mean": 0.4, "low": 0.35, "high": 0.45}}
    changes.append({"grouping": "all", "group": "all", "measures": change})
    about = {"data": "test.jsonl", "examples": 8, "confidence": 0.95}
    return about | {"results": results, "changes": changes, "repetition": repetition}


def heatmaps(*, long: int = 90) -> dict[str, Any]:
    """A short response with tokens of many scripts, and a long one."""
    short = {"name": "example 1", "student": STUDENT, "teacher": TEACHER}
    short |= {"student_chunks": CHUNKS[0], "teacher_chunks": CHUNKS[1]}
    short["attentions"] = {
        "before": [[row, row % len(TEACHER), 0.25] for row in range(len(STUDENT))],
        "after": [[0, 0, 0.912], [1, 1, 0.8], [2, 1, 0.7], [2, 6, 0.2], [3, 2, 0.6], [7, 6, 0.99]],
    }
    names = [f"tok{index}" for index in range(long)]
    wide = {"name": "example 2", "student": names, "teacher": names}
    wide |= {"student_chunks": list(range(long)), "teacher_chunks": list(range(long))}
    wide |= {"chosen": "least in chunk", "mass_in_chunk": {"before": 0.25, "after": None}, "student_tokens": 300}
    diagonal = [[row, row, 0.9] for row in range(long)]
    wide["attentions"] = {"before": [[row, 0, 0.3] for row in range(long)], "after": diagonal}
    return {"examples": [short, wide]}


def points(seed: int) -> dict[str, Any]:
    """``points.json``"""
    generator = random.Random(seed)

    def cloud(count: int, middle: float) -> list[list[float]]:
        return [[generator.gauss(middle, 1), generator.gauss(0, 1)] for _ in range(count)]

    stages = {
        stage: {"queries": cloud(len(STUDENT), shift), "keys": cloud(len(TEACHER), 0)}
        for stage, shift in (("before", 4), ("after", 0))
    }
    return {"explained": [0.4, 0.2], "stages": stages, "query_names": STUDENT, "key_names": TEACHER}


def pair_report(**facts: Any) -> dict[str, Any]:
    """What ``inspect-pair --json`` writes."""
    side = {
        "name": "org/student",
        "template": "plain",
        "vocabulary_size": 49152,
        "shared_share": 0.512,
        "tokens": 1000,
        "tokens_per_byte": 0.21,
        "one_to_one_share": 0.7,
        "coverage": 0.99,
        "tokens_per_chunk": 1.2,
        "byte_coverage": 1.0,
        "roles": {},
    }
    sizes = {"1:1": 700, "2:1": 80, "1:2": 20}
    return {
        "student": side,
        "teacher": side | {"name": "org/teacher"},
        "shared_tokens": 25123,
        "response_bytes": 5000,
        "chunks": 800,
        "chunk_sizes": sizes,
        "warnings": ["The student has a chat template but is given plain prompts."],
        **facts,
    }


def write_pair(folder: Path) -> None:
    """The tokenizer-pair report in a study's folder."""
    write_json(folder / "tokenizer-pair.json", pair_report())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def hostile_study(folder: Path) -> Path:
    """A study's folder in which every text is :data:`HOSTILE`, variant names and log names included."""
    plan = load_study(finished_study(folder))
    record = json.loads(json.dumps(study_results(plan).to_dict()))
    record["study"] = HOSTILE
    _rename(record, plan)
    out = folder / "hostile"
    write_json(out / "study.json", record)
    for run in record["runs"]:
        place = out / "runs" / run["variant"] / f"seed{run['seed']}"
        write_run(place, seed=run["seed"])
        with (place / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            for name in (f"loss/{HOSTILE}", f"probe/{HOSTILE}", HOSTILE):
                stream.write(json.dumps({name: 1.0, "step": 5}) + "\n")
        write_json(
            place / "run.json", run_record(run["seed"], git_commit=HOSTILE, command=["x", HOSTILE], extra=HOSTILE)
        )
        (place / "recipe.yaml").write_text(f"a: {json.dumps(HOSTILE)}\n", encoding="utf-8")
        _spoil_analysis(place / "analysis")
    write_json(out / "tokenizer-pair.json", pair_report(warnings=[HOSTILE], chunk_sizes={HOSTILE: 800}))
    return out


def _rename(record: dict[str, Any], plan: StudyPlan) -> None:
    """Variants become ``HOSTILE 0``, ``HOSTILE 1``...; a slash would be another folder, so it goes."""
    names = {name: f"{HOSTILE.replace('/', '')} {index}" for index, name in enumerate(plan.variants)}
    record["baseline"] = names[record["baseline"]]
    record["variants"] = list(names.values())
    for part in ("runs", "scores", "summaries", "comparisons"):
        for row in record[part]:
            row |= {key: names[row[key]] for key in ("variant", "baseline") if key in row}
            if row.get("scope") == "test":
                row["scope"] = HOSTILE
    for run in record["runs"]:
        run |= {"message": HOSTILE, "objective": HOSTILE, "state": "failed"}


def _spoil_analysis(folder: Path) -> None:
    found = probe() | {"data": HOSTILE}
    for result in found["results"]:
        result |= {"attention": HOSTILE, "group": HOSTILE}
    for effect in found["repetition"]:
        effect |= {"attention": HOSTILE, "grouping": HOSTILE}
    write_json(folder / "probe.json", found)
    maps = heatmaps()
    for example in maps["examples"]:
        example["student"] = [HOSTILE] * len(example["student"])
        example["teacher"] = [HOSTILE] * len(example["teacher"])
        example["name"] = f"{example['name']} {HOSTILE}"
        example["attentions"] = {HOSTILE: example["attentions"]["after"]}
    write_json(folder / "heatmaps.json", maps)
    cloud = points(0)
    cloud["query_names"] = [HOSTILE] * len(STUDENT)
    cloud["stages"] = {HOSTILE: cloud["stages"]["before"]}
    write_json(folder / "points.json", cloud)
