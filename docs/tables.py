"""Writes the tables that documents take from the code: ``python docs/tables.py``.

Each table stands between ``<!-- name -->`` and ``<!-- /name -->`` in its document; ``tests/test_docs.py`` holds them in
step.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

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


RECIPES = {"cross_entropy": "sft", "dskd_cma": "quickstart"}
"""Of objectives whose recipe has another name."""

TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"objectives": objectives_table},
    "docs/papers.md": {"papers": papers_table},
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
