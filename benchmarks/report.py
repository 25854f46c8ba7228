"""Writes the tables of docs/performance.md and the charts in docs/performance/ from what the benchmarks left.

    python benchmarks/report.py [--results build/bench] [--page docs/performance.md]

Each benchmark's tables stand between ``<!-- name -->`` and ``<!-- /name -->``. A benchmark without results keeps what
its marks hold; results of ``--smoke`` are refused.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from harness import RESULTS, ROOT, Row, cell

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Result = dict[str, Any]
"""One JSON file as :func:`harness.report` writes it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Read all results; rewrite page and charts."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    arguments = options.parse_args(argv)
    results = read_results(arguments.results)
    if not results:
        raise SystemExit(f"{arguments.results} holds no results; run 'make bench' first")
    text = arguments.page.read_text(encoding="utf-8")
    for name, result in results.items():
        text = rewritten(text, name, "\n\n".join(_sections(result)))
    text = rewritten(text, "bars", markdown([bar for result in results.values() for bar in result["bars"]]))
    text = rewritten(text, "machine", "\n".join(_machines(results)))
    arguments.page.write_text(text, encoding="utf-8")
    charts = arguments.page.with_suffix("")
    charts.mkdir(exist_ok=True)
    for name, draw in CHARTS.items():
        if name in results:
            save(charts / f"{name}.svg", draw, results[name]["tables"])


def read_results(folder: Path) -> dict[str, Result]:
    """By the benchmark's name.

    Raises:
        SystemExit: a result of a smoke run, whose numbers mean nothing.
    """
    results: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "benchmark" not in result:  # objectives.py has a form of its own, for docs/choosing.md
            continue
        if result["smoke"]:
            raise SystemExit(f"{path} comes from a --smoke run; delete it or run {result['benchmark']}.py without")
        results[result["benchmark"]] = result
    return results


def rewritten(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the marks of ``name``."""
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    assert len(marks.findall(text)) == 1, name
    return marks.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def markdown(rows: Sequence[Row]) -> str:
    """A table; the columns are the keys."""
    if not rows:
        return "(none)"
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(map(cell, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sections(result: Result) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    parts = [f"{settings}."]
    for title, rows in result["tables"].items():
        parts += [f"{title[0].upper()}{title[1:]}:", markdown(rows)]
    return parts


def _machines(results: Mapping[str, Result]) -> list[str]:
    """One line per machine that took part, with the benchmarks that ran there."""
    found: dict[str, list[str]] = {}
    for name, result in results.items():
        machine = result["machine"]
        line = (
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:g} GB, flags "
            f"{' '.join(machine['flags']) or 'none of interest'}; {machine['threads']} threads, {machine['system']}, "
            f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}; "
            f"{machine['date']}, commit {machine['commit']}"
        )
        found.setdefault(line, []).append(f"{name} (load {machine['load_average']:g})")
    return [f"- {line}: {', '.join(names)}" for line, names in found.items()]


# --- charts -----------------------------------------------------------------------------------------------------------

Tables = Mapping[str, Sequence[Row]]


def save(path: Path, draw: Callable[[Tables], None], tables: Tables) -> None:
    """Draw and write an SVG that is the same for the same numbers."""
    with plt.rc_context({"svg.hashsalt": "vocabridge", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        draw(tables)
        plt.tight_layout()
        plt.savefig(path, metadata={"Date": None})
        plt.close("all")


def _floor(tables: Tables) -> None:
    rows = sorted(tables["step against floor"], key=lambda row: row["step / floor"])
    _, axes = plt.subplots(figsize=(7, 0.3 * len(rows) + 1))
    names = [row["objective"] for row in rows]
    axes.barh(names, [row["step s"] for row in rows], color="tab:blue", label="step")
    axes.barh(names, [row["floor s"] for row in rows], color="tab:gray", height=0.45, label="floor")
    axes.set_xlabel("seconds a step (forward and backward)")
    axes.legend()


def _growth(tables: Tables) -> None:
    _, panels = plt.subplots(2, 3, figsize=(9, 5), sharex="col")
    columns = {"supervised tokens": "supervised tokens", "vocabulary": "vocabulary", "chunk size": "chunk_bytes MiB"}
    for (title, column), (above, below) in zip(columns.items(), panels.T, strict=True):
        rows = tables[title]
        sizes = [row[column] for row in rows]
        _line(above, sizes, [row["seconds"] for row in rows], "seconds")
        _line(below, sizes, [row["extra MB"] for row in rows], "extra MB")
        below.set_xlabel(column)


def _line(axes: Axes, sizes: list[float], values: list[float | None], label: str) -> None:
    axes.plot(sizes, [float("nan") if value is None else value for value in values], marker="o")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)


def _gold(tables: Tables) -> None:
    rows = tables["length"]
    _, axes = plt.subplots(figsize=(5, 3))
    chunks = [row["chunks"] for row in rows]
    for name in ("ours s", "TRL s"):
        if all(row[name] is not None for row in rows):
            axes.plot(chunks, [row[name] for row in rows], marker="o", label=name.removesuffix(" s"))
    axes.set_yscale("log")
    axes.set_xlabel("chunks")
    axes.set_ylabel("seconds, loss and backward")
    axes.legend()


CHARTS: dict[str, Callable[[Tables], None]] = {"floor": _floor, "growth": _growth, "gold_vs_trl": _gold}
"""By the benchmark whose results they draw."""


if __name__ == "__main__":
    main()
