"""Writes the tables that documents take from the code: ``python docs/tables.py``.

Each table stands between ``<!-- name -->`` and ``<!-- /name -->`` in its document; ``tests/test_docs.py`` holds them in
step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from plan_table import plan_table

from vocabridge.objectives import objective_info, objective_names

ROOT = Path(__file__).resolve().parents[1]


def objectives_table() -> str:
    """What ``vocabridge objectives`` shows."""
    lines = ["| name | what it does | needs | heads per step | use it when |", "|---|---|---|---|---|"]
    for name in objective_names():
        info = objective_info(name)
        config = info.config_class
        needs = ", ".join(config.needs) or "-"
        lines.append(f"| `{name}` | {info.summary} | {needs} | {config.cost} | {config.use_when} |")
    return "\n".join(lines)


def papers_table() -> str:
    """Paper, file, test and recipe of every objective."""
    lines = ["| paper | objective | test | recipe |", "|---|---|---|---|"]
    for name in objective_names():
        config = objective_info(name).config_class
        file = f"[`{name}`](../src/vocabridge/objectives/{name}.py)"
        test = f"[test](../tests/objectives/test_{name}.py)"
        recipe = RECIPES.get(name, name)
        lines.append(f"| {config.paper or '-'} | {file} | {test} | [{recipe}](../recipes/{recipe}.yaml) |")
    return "\n".join(lines)


def cost_table() -> str:
    """What ``benchmarks/objectives.py`` measured, as kept in ``docs/results/objectives.json``."""
    measured = json.loads((ROOT / "docs/results/objectives.json").read_text(encoding="utf-8"))["results"]
    base = next(result for result in measured if result["variant"] == "cross_entropy")
    lines = [
        "| objective | loss, first to last | cross-entropy, first to last | coverage | step / SFT | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for result in measured:
        coverage = "-" if result["coverage"] is None else f"{result['coverage']:.3f}"
        loss, reference = (f"{result[f'{name}_first']:.2f} - {result[f'{name}_last']:.2f}" for name in LOSSES)
        ratio = result["step_seconds"] / base["step_seconds"]
        peak = result["peak_bytes"] / 1e9
        lines.append(f"| `{result['variant']}` | {loss} | {reference} | {coverage} | {ratio:.2f} | {peak:.1f} |")
    return "\n".join(lines)


LOSSES = ("loss", "cross_entropy")

RECIPES = {"cross_entropy": "sft", "dskd_cma": "quickstart"}
"""Of objectives whose recipe has another name."""

TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"objectives": objectives_table},
    "docs/papers.md": {"papers": papers_table},
    "docs/choosing.md": {"cost": cost_table},
    "docs/scaling.md": {"plan": plan_table},
}
"""Document -> name of the marks -> what stands between them."""


def rewritten(text: str, name: str, table: str) -> str:
    """``text`` with ``table`` between the marks."""
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    assert len(marks.findall(text)) == 1, name
    return marks.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def main() -> None:
    """Rewrite every table."""
    for document, tables in TABLES.items():
        path = ROOT / document
        text = path.read_text(encoding="utf-8")
        for name, make in tables.items():
            text = rewritten(text, name, make())
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
