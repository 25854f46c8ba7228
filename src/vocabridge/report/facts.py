"""Tokenizer pair, cost, recipes and environment."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from vocabridge.report.collect import PairFile, Report, Run
from vocabridge.report.reading import with_relative_paths
from vocabridge.report.view import MISSING, Cell, Table, number, words
from vocabridge.report.wording import plain
from vocabridge.study.status import RECIPE_FILE
from vocabridge.study.tables import duration, gigabytes

_MOST_CHUNK_SIZES = 8
_MEMORY = ("before_init_mem_{}", "init_mem_{}_alloc_delta", "train_mem_{}_alloc_delta", "train_mem_{}_peaked_delta")
"""What ``skip_memory_metrics: false`` logs in bytes; the highest level while training is their sum."""


@dataclass(frozen=True, slots=True)
class RecipeText:
    """The resolved recipe of a variant's first run."""

    variant: str
    text: str


@dataclass(frozen=True, slots=True)
class Recipes:
    """What differs between variants, and every recipe in full."""

    differences: Table | None
    texts: tuple[RecipeText, ...]


# --- tokenizer pair --------------------------------------------------------------------------------------------------


def pair_tables(pair: PairFile) -> list[Table]:
    """How the two tokenizers fit, and how many tokens share a chunk."""
    fields = {
        "name": "{}",
        "template": "{}",
        "vocabulary_size": "{:,}",
        "shared_share": "{:.1%}",
        "tokens": "{:,}",
        "tokens_per_byte": "{:.3f}",
        "one_to_one_share": "{:.1%}",
        "coverage": "{:.1%}",
        "tokens_per_chunk": "{:.3f}",
        "byte_coverage": "{:.1%}",
    }
    rows = []
    for name, pattern in fields.items():
        sides = (Cell(pattern.format(getattr(side, name))) for side in (pair.student, pair.teacher))
        rows.append((words(name.replace("_", " ").replace("one to one", "1:1")), *sides))
    caption = f"{pair.shared_tokens:,} tokens of identical bytes; {pair.response_bytes:,} bytes of responses"
    sizes = list(pair.chunk_sizes.items())[:_MOST_CHUNK_SIZES]
    rest = pair.chunks - sum(count for _, count in sizes)
    shares = [*sizes, *([("other", rest)] if rest else [])]
    chunks = [(words(size), number(count, "{:,}"), number(count / pair.chunks, "{:.1%}")) for size, count in shares]
    return [
        Table(caption, ("", "student", "teacher"), tuple(rows)),
        Table("Chunks by number of tokens", ("student:teacher", "chunks", "share"), tuple(chunks)),
    ]


# --- cost ------------------------------------------------------------------------------------------------------------


def cost_table(report: Report) -> Table | None:
    """Mean over a variant's runs of what each run's log and status tell."""
    rows = []
    for variant in report.variants:
        runs = [run for run in report.runs_of(variant) if _seconds_per_step(run) is not None]
        if runs:
            rows.append(
                (
                    words(variant),
                    number(len(runs), "{}"),
                    _mean([_seconds_per_step(run) for run in runs], "{:.3f}"),
                    _time([run.record.seconds or None for run in runs]),
                    _size([_peak_memory(run) for run in runs]),
                    _mean([_tokens(run) for run in runs], "{:,.0f}"),
                    words(", ".join(sorted({_device(run) for run in runs}))),
                )
            )
    headings = ("variant", "runs", "seconds per step", "time per run", "peak memory", "tokens trained on", "device")
    return Table("Cost, mean over the runs of each variant", headings, tuple(rows)) if rows else None


def _seconds_per_step(run: Run) -> float | None:
    """Of training alone where the log has it; a resumed run logs its last part, so its status has to do."""
    runtimes = run.log.get("train_runtime")
    steps = run.record.steps or (max(runtimes) if runtimes else None)
    if not steps:
        return None
    if runtimes and run.record.sessions <= 1:
        return runtimes[max(runtimes)] / steps
    return run.record.seconds / steps if run.record.seconds else None


def _peak_memory(run: Run) -> float | None:
    """Of the device where one was measured, else of the process."""
    for device in ("gpu", "cpu"):
        parts = [run.log.get(name.format(device), {}) for name in _MEMORY]
        if parts[-1]:
            step = max(parts[-1])
            return sum(points.get(step, 0.0) for points in parts)
    return None


def _tokens(run: Run) -> float | None:
    points = run.log.get("num_input_tokens_seen")
    return points[max(points)] if points else None


def _device(run: Run) -> str:
    machine = (run.environment or {}).get("machine")
    return str(machine.get("device", "unknown")) if isinstance(machine, Mapping) else "unknown"


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Sequence[float | None], pattern: str) -> Cell:
    known = _known(values)
    return number(fmean(known), pattern) if known else MISSING


def _time(values: Sequence[float | None]) -> Cell:
    known = _known(values)
    return Cell(duration(fmean(known)), fmean(known)) if known else MISSING


def _size(values: Sequence[float | None]) -> Cell:
    known = _known(values)
    return Cell(gigabytes(fmean(known)), fmean(known)) if known else MISSING


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipes(report: Report) -> Recipes:
    """Resolved recipes: the keys in which variants differ, then each in full."""
    texts = []
    for variant in report.variants:
        found = [run.recipe for run in report.runs_of(variant) if run.recipe is not None]
        if found:
            texts.append(RecipeText(variant, found[0]))
    return Recipes(_differences(texts) if len(texts) > 1 else None, tuple(texts))


def _differences(texts: Sequence[RecipeText]) -> Table | None:
    flat = {recipe.variant: dict(flat_recipe(recipe.text)) for recipe in texts}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    differing = [
        key
        for key in keys
        if key not in ("training.output_dir", "training.seed")
        and len({repr(values.get(key)) for values in flat.values()}) > 1
    ]
    rows = [
        (words(key), *(words(plain(values[key]) if key in values else "\u2013") for values in flat.values()))
        for key in differing
    ]
    return Table("Keys in which the variants' recipes differ", ("key", *flat), tuple(rows)) if rows else None


def flat_recipe(text: str) -> Iterator[tuple[str, Any]]:
    """Every value of a recipe's text by its dotted key; nothing where the text is no YAML."""
    try:
        # A resolved recipe has no alias, and a few lines of them can stand for more than any memory holds.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            return iter(())
        return iter(list(_flat(yaml.safe_load(text))))
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):  # the latter by tags such as !!int
        return iter(())


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf by its dotted key."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value


# --- environment -----------------------------------------------------------------------------------------------------


def environment_table(report: Report) -> Table | None:
    """Facts of ``run.json``; a fact that is not the same in all runs lists its values with the number of runs."""
    facts: dict[str, list[str]] = {}
    for run in report.runs:
        for key, value in _flat(run.environment or {}):
            if key not in ("seed", "objective", "command"):
                facts.setdefault(key, []).append(plain(value))
    rows = [
        (words(key.replace("packages.", "").replace("machine.", "")), words(_shared(values)))
        for key, values in facts.items()
    ]
    return (
        Table("Versions, machine and commit, as the runs recorded them", ("fact", "value"), tuple(rows))
        if rows
        else None
    )


def _shared(values: Sequence[str]) -> str:
    different = dict.fromkeys(values)
    if len(different) == 1:
        return values[0]
    return "; ".join(f"{value} ({values.count(value)} runs)" for value in different)


def commands(report: Report) -> list[str]:
    """What to type for the runs, each line once."""
    found = [(run.environment or {}).get("command") for run in report.runs]
    lines = [_typed(list(map(str, command)), report) for command in found if isinstance(command, list) and command]
    return list(dict.fromkeys(with_relative_paths(line) for line in lines if line))


def _typed(command: Sequence[str], report: Report) -> str:
    """The command line for a recorded one; empty where another program, perhaps a notebook, called the library."""
    program, *arguments = command
    place = Path(program).parts[-2:]
    if place == ("study", "child.py"):  # a study starts it, nobody types it
        if report.study:
            return shlex.join(["vocabridge", "study", report.study.study])
        recipe = [str(Path(folder, RECIPE_FILE)) for folder in arguments]
        return shlex.join(["vocabridge", "distill", *recipe, "--resume"])
    is_ours = Path(program).stem == "vocabridge" or place == ("vocabridge", "__main__.py")
    return shlex.join(["vocabridge", *arguments]) if is_ours else ""
