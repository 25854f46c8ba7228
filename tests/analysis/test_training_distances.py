"""The table of logged distances."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from vocabridge.analysis.training_distances import DistanceTable, render_distances, training_distances
from vocabridge.errors import UserError


def write(folder: Path, entries: list[dict[str, float]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def test_rows_of_a_run(finished_run: Callable[[str], Path]) -> None:
    table = training_distances(finished_run("dskd_cla"))
    assert [row.step for row in table.rows] == [0, 3, 6]
    names = {"mmd_squared", "sliced_wasserstein", "energy_distance", "mean_cosine", "two_sample_accuracy"}
    assert names <= set(table.names)
    assert all(names - {"two_sample_accuracy"} <= row.values.keys() for row in table.rows)
    assert [entry["step"] for entry in json.loads(table.to_json())] == [0, 3, 6]


def test_other_lines_are_left_out_and_the_later_measurement_counts(tmp_path: Path) -> None:
    probes = [{"probe/a": 1.0, "step": 0}, {"probe/a": 2.0, "step": 5}, {"probe/a": 3.0, "probe/b": 4.0, "step": 5}]
    write(tmp_path, [{"loss": 1.0, "step": 1}, *reversed(probes), {"train_loss": 2.0, "step": 6}, probes[2]])
    table = training_distances(tmp_path)
    assert [(row.step, row.values) for row in table.rows] == [(0, {"a": 1.0}), (5, {"a": 3.0, "b": 4.0})]
    assert set(table.names) == {"a", "b"}


def test_no_log_and_no_measurement(tmp_path: Path) -> None:
    assert training_distances(tmp_path) == DistanceTable((), ())
    write(tmp_path, [{"loss": 1.0, "step": 1}])
    assert training_distances(tmp_path) == DistanceTable((), ())


@pytest.mark.parametrize("line", ["{", "[1]", '{"probe/a": 1.0}'])
def test_broken_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"probe/a": 1.0, "step": 0}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        training_distances(tmp_path)


def test_table_shows_first_and_last_of_many(tmp_path: Path) -> None:
    write(tmp_path, [{"probe/a": step / 8, "step": step} for step in range(0, 1000, 10)])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_distances(training_distances(tmp_path), most_rows=5))
    shown = console.export_text()
    assert "123.8" in shown
    assert sum(line.startswith(("│", "|")) for line in shown.splitlines()) == 5
