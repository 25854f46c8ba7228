"""Two small good recipes, and what the tests of recipes do with them."""

from __future__ import annotations

from pathlib import Path

from vocabridge.recipe import Recipe, load_recipe, recipe_from_values

SFT = """\
data:
  train: org/rows
student:
  model: org/student
objective:
  name: cross_entropy
training:
  output_dir: runs/sft
"""
DISTIL = """\
data:
  train: org/rows
student:
  model: org/student
teacher:
  model: org/teacher
objective:
  name: dskd_cma
training:
  output_dir: runs/distil
evaluation:
  data: org/test
"""


def write(text: str, name: str = "recipe.yaml") -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def with_lines(base: str, section: str, *lines: str) -> str:
    """``base`` with lines added at the start of a section."""
    return base.replace(f"{section}:\n", f"{section}:\n" + "".join(f"  {line}\n" for line in lines))


def assert_round_trip(recipe: Recipe) -> None:
    text = recipe.resolved_yaml()
    again = load_recipe(write(text, "resolved.yaml"))
    assert again == recipe
    assert again.resolved_yaml() == text
    assert recipe_from_values(recipe.values()) == recipe
