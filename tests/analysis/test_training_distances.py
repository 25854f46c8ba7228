"""The table of logged distances."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from vocabridge.analysis.attention import AttentionReader
from vocabridge.analysis.finished_run import load_finished_run
from vocabridge.analysis.training_distances import (
    DistanceRow,
    DistanceTable,
    StageDistances,
    data_distances,
    distances_json,
    render_distances,
    training_distances,
)
from vocabridge.errors import UserError
from vocabridge.matching.config import Matching
from vocabridge.pairs import tokenize_examples
from vocabridge.text import read_examples

NAMES = {
    *("mmd_squared", "sliced_wasserstein", "energy_distance", "mean_cosine", "two_sample_accuracy"),
    *(f"mmd_squared_x{factor}" for factor in ("0.25", "0.5", "1", "2", "4")),
}


def write(folder: Path, entries: list[dict[str, float]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def test_rows_of_a_run(finished_run: Callable[[str], Path]) -> None:
    table = training_distances(finished_run("dskd_cla"))
    assert [row.step for row in table.rows] == [0, 3, 6]
    assert set(table.names) >= NAMES
    assert all(row.values.keys() >= NAMES for row in table.rows)


@pytest.mark.parametrize("matching", [name for name in get_args(Matching) if name != "gan"])
def test_every_kind_of_matching_is_measured_at_the_start_on_the_way_and_at_the_end(
    finished_run: Callable[[str], Path], matching: str
) -> None:
    """The run with ``gan`` is measured in the other tests."""
    table = training_distances(finished_run(matching))
    assert [row.step for row in table.rows] == [0, 3, 6]
    assert all(row.values.keys() >= NAMES for row in table.rows)
    assert table.rows[0].values != table.rows[-1].values


def test_a_part_of_a_composition_is_called_as_it_is_alone(finished_run: Callable[[str], Path]) -> None:
    folder = finished_run("composed")
    run = load_finished_run(folder, str(folder.parent / "data.jsonl"))
    table = training_distances(folder, part=run.part)
    assert run.part == "dskd_cla"
    assert set(table.names) == NAMES
    assert [row.step for row in table.rows] == [0, 3, 6]


def test_distances_on_the_probe_set_are_those_that_were_logged(finished_run: Callable[[str], Path]) -> None:
    """The probe set is all of the data here, in another order."""
    folder = finished_run("dskd_cma")
    data = str(folder.parent / "data.jsonl")
    run = load_finished_run(folder, data)
    pairs = list(tokenize_examples(read_examples(data), run.pair_tokenizer))
    found, logged = data_distances(AttentionReader(run).points(pairs)), training_distances(folder)
    for values, row in ((found.before, logged.rows[0]), (found.after, logged.rows[-1])):
        for name in NAMES - {"two_sample_accuracy", "sliced_wasserstein"}:  # they divide and project by order
            assert values[name] == pytest.approx(row.values[name], rel=2e-3), name
    assert found.before["energy_distance"] != pytest.approx(found.after["energy_distance"], rel=0.05)


def test_json() -> None:
    table = DistanceTable(("a",), (DistanceRow(0, {"a": 1.0}), DistanceRow(5, {"a": 2.0})))
    found = json.loads(distances_json(table, StageDistances({"a": 3.0}, {"a": 4.0})))
    assert found["training"] == [{"step": 0, "a": 1.0}, {"step": 5, "a": 2.0}]
    assert found["data"] == {"before": {"a": 3.0}, "after": {"a": 4.0}}
    assert found["bandwidth_factors"] == [0.25, 0.5, 1, 2, 4]


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


def test_table_shows_first_and_last_of_many_steps_and_the_data(tmp_path: Path) -> None:
    write(tmp_path, [{"probe/a": step / 8, "step": step} for step in range(0, 1000, 10)])
    console = Console(width=100, record=True, file=io.StringIO())
    data = StageDistances({"a": 0.625, "b_c": 77.0}, {"a": 0.125})
    console.print(render_distances(training_distances(tmp_path), data, most_steps=3))
    shown = console.export_text()
    for words in ("step 0", "step 500", "step 990", "124", "0.625", "0.125", "b c", "77"):
        assert words in shown
    assert shown.count("step ") == 3
    console.print(render_distances(DistanceTable((), ()), data))
    assert "77" in console.export_text()


def test_table_fits_a_terminal(tmp_path: Path) -> None:
    names = sorted(NAMES | {"attention_top1_in_chunk"})
    write(tmp_path, [{f"probe/{name}": 0.000123 for name in names} | {"step": 1000 * step} for step in range(9)])
    console = Console(width=80, record=True, file=io.StringIO())
    data = StageDistances(dict.fromkeys(names, 0.000456), dict.fromkeys(names, 0.000789))
    console.print(render_distances(training_distances(tmp_path), data))
    shown = console.export_text()
    assert "\u2026" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert (shown.count("0.000123"), shown.count("0.000456")) == (4 * len(names), len(names))
    assert shown.count("0.000789") == len(names)
