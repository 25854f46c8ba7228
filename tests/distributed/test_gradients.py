"""One process with 8 rows, two with 4, and accumulated batches of 4 and 2 rows give one gradient, for every objective.

The difference of two gradients is the largest absolute difference of a number, relative to the largest number of the
same parameter group (student, projectors, discriminator) with one process; models are in float32, without dropout.
``GRADIENT_REPORT=FILE`` writes the differences, by objective and by way to split, to a JSON file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

import data_parallel_cases as cases
from vocabridge.objectives import objective_names

TOLERANCE = 1e-5
ACCUMULATED = {"2 x 4 accumulated": 2, "4 x 2 accumulated": 4}

Differences = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def differences() -> Iterator[Differences]:
    found: Differences = {}
    yield found
    if path := os.environ.get("GRADIENT_REPORT"):
        rounded = {name: {way: float(f"{value:.1e}") for way, value in ways.items()} for name, ways in found.items()}
        report = {"tolerance": TOLERANCE, "differences": rounded}
        Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def largest(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Of each parameter group: the largest absolute number of a gradient."""
    found: dict[str, float] = {}
    for name, gradient in gradients.items():
        group = name.split("/")[0]
        found[group] = max(found.get(group, 0.0), float(gradient.abs().max()))
    return found


def difference(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the worst parameter group, as the module says."""
    assert gradients.keys() == expected.keys()
    scale = largest(expected)
    apart = largest({name: gradients[name] - value for name, value in expected.items()})
    assert all(size > 0 for size in scale.values()), "a group without gradient shows nothing"
    return max(apart[group] / scale[group] for group in scale)


def all_differences(folder: Path, split: dict[str, Tensor], objective: dict) -> dict[str, float]:
    def alone(accumulation: int) -> dict[str, Tensor]:
        return cases.gradients(folder, objective, num_processes=1, accumulation=accumulation)

    whole = alone(1)
    ways = {"2 processes x 4": split, **{name: alone(steps) for name, steps in ACCUMULATED.items()}}
    return {name: difference(gradients, whole) for name, gradients in ways.items()}


def gradients_of_two(two_processes, name: str) -> dict[str, Tensor]:
    first, second = two_processes["gradients"]
    assert first[name] == second[name], "the ranks would step apart"
    assert len(first[name]) > 10
    return load_file(two_processes.folder / "gradients" / f"{name}.safetensors")


@pytest.mark.parametrize("name", cases.OBJECTIVES)
def test_gradients_do_not_depend_on_how_a_step_is_split(two_processes, tmp_path, differences, name):
    found = all_differences(tmp_path, gradients_of_two(two_processes, name), cases.OBJECTIVES[name])
    differences[name] = found
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", cases.DEPENDENT)
def test_what_depends_on_the_split_is_known(two_processes, tmp_path, name):
    """Otherwise the list of exceptions would go stale."""
    found = all_differences(tmp_path, gradients_of_two(two_processes, name), cases.DEPENDENT[name])
    assert max(found.values()) > TOLERANCE, f"{name} does not belong on the list"


def test_all_objectives_are_there_and_learned_parts_have_gradients(two_processes):
    assert set(objective_names()) <= set(cases.OBJECTIVES)
    groups = set(largest(gradients_of_two(two_processes, "dskd_cma")))
    assert groups == {"student", "projectors", "discriminator"}
