"""The short form of the fuzzing, and what it found; ``make test-fuzz`` throws a hundred thousand inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.run import fuzz_in_own_process
from vocabridge.errors import UserError
from vocabridge.recipe import load_recipe
from vocabridge.text import parse_row

INPUTS = {"recipe-values": 150, "recipe-text": 200, "recipe-spoiled": 200, "jsonl": 1000, "spans": 500, "chunks": 150}


@pytest.mark.parametrize("name", INPUTS)
def test_no_input_breaks_the_target(name: str) -> None:
    figures = fuzz_in_own_process(name, INPUTS[name])
    assert figures["failures"] == [], "\n".join(figures["failures"])
    assert figures["inputs"] >= INPUTS[name] * 0.9
    # Neither half of the inputs may be missing, or one half of the checks would be idle.
    assert figures["read"] >= INPUTS[name] * (0.02 if name == "recipe-spoiled" else 0.1)
    assert name == "spans" or figures["refused"] >= INPUTS[name] * 0.05


RECIPE = """\
data: {train: TRAIN}
student: {model: org/student}
objective: {name: cross_entropy}
training: {output_dir: runs/x, run_name: NAME}
"""
FOUND = {
    "a control character before the first key": ("\x1f" + RECIPE, "not valid YAML"),
    "a number of 5000 digits": (RECIPE.replace("NAME", "1" * 5000), "not valid YAML"),
    "a tag that does not fit its value": (RECIPE.replace("NAME", "!!int x"), "not valid YAML"),
    "a date that is none": (RECIPE.replace("NAME", "!!timestamp 99"), "not valid YAML"),
    "brackets 5000 deep": (RECIPE.replace("NAME", "[" * 5000), "nested too deeply"),
    "a name with a NUL": (RECIPE.replace("TRAIN", r'"a\0b"'), "a character that no name has"),
    "a name with a surrogate": (RECIPE.replace("TRAIN", r'"\udcff"'), "a character that no name has"),
    "a name of 300 letters": (RECIPE.replace("TRAIN", "x" * 300), "longer than any file system takes"),
    "a home without a user": (RECIPE.replace("TRAIN", "~nobody-here/x"), "there is no user 'nobody-here'"),
    "a value that moves the cursor": (RECIPE.replace("training:", '"a\\e[31m": 1\ntraining:'), r"a\x1b[31m is unknown"),
    "a value of two lines": (RECIPE.replace("runs/x", '"a\\nb: c"'), "a character that no name has"),
}


@pytest.mark.parametrize("name", FOUND)
def test_recipes_that_were_found_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    text, words = FOUND[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "a\nb", "content": ""}]},
        {"pr\x1b[31mompt": "x"},
        {"\ud800": "x"},
        {"messages": [{"\x80role": "user", "content": " "}]},
    ],
)
def test_rows_that_were_found_are_refused_in_one_line(row: dict[str, object]) -> None:
    with pytest.raises(UserError) as caught:
        parse_row(row, "rows.jsonl:1")
    assert str(caught.value).isprintable()
