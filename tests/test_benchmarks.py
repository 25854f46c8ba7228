"""Every benchmark runs at tiny sizes and leaves results that the report reads; no time is asserted."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import harness  # noqa: E402

SCRIPTS = (
    "floor",
    "step_memory",
    "vocabulary_cut",
    "growth",
    "alignment",
    "gold_vs_trl",
    "cached_epoch",
    "generation",
    "processes",
    "teacher_dtype",
)


def train_here(count, threads, given):
    """One rank in this process instead of new ones, which would take ten seconds to start."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        importlib.import_module("processes").main([*given, "--train", "--threads", str(threads)])
    return harness.ChildRun(output.getvalue(), count)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder in place of ``build/bench``, and torch as it was afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(importlib.import_module("material"), "RESULTS", tmp_path)
    monkeypatch.setattr(importlib.import_module("processes"), "_launch", train_here)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_and_writes_results(name, results):
    path = results / f"{name}.json"
    importlib.import_module(name).main(["--smoke", "--json", str(path)])
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["benchmark"] == name
    assert result["machine"]["torch"] == torch.__version__
    assert result["bars"] == [], "numbers of a smoke run say nothing about a bar"
    for rows in result["tables"].values():
        assert rows
        assert all(row.keys() == rows[0].keys() for row in rows)
        numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
        assert all(0 <= number < float("inf") for number in numbers)


def test_operations_of_fine_tuning_are_those_of_its_floor(results):
    """Both are counted, so this holds on any machine: nothing is multiplied twice."""
    path = results / "floor.json"
    importlib.import_module("floor").main(["--smoke", "--objectives", "cross_entropy", "--json", str(path)])
    (row,) = json.loads(path.read_text())["tables"]["step against floor"]
    assert row["operations / floor"] == pytest.approx(1, abs=1e-3)


def test_extra_peak_sees_what_is_freed_again():
    grown = harness.extra_peak_bytes(lambda: torch.ones(10_000_000).sum())
    assert grown is None or 35e6 < grown < 80e6


def test_child_is_run_and_measured():
    child = harness.run_child([sys.executable, "-c", "import os; print(os.environ['WORD'])"], environment={"WORD": "a"})
    assert child.output == "a\n"
    assert child.peak_bytes > 1e6
    with pytest.raises(SystemExit, match="boom"):
        harness.run_child([sys.executable, "-c", "raise SystemExit('boom')"])


def test_rounds_run_every_function_equally_often():
    calls = []
    timings = harness.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=3)
    assert calls == list("abcabcbcacab")
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3, 3]


def test_bars_know_their_direction():
    assert harness.Bar("ratio", 1.2, 1.2).met
    assert not harness.Bar("ratio", 1.3, 1.2).met
    assert harness.Bar("speed", 20, 10, at_most=False).met


def page_with_results(folder):
    """The tracked page and one result."""
    report = importlib.import_module("report")
    page = folder / "performance.md"
    shutil.copy(ROOT / "docs" / "performance.md", page)
    arguments = harness.parse(harness.parser("growth", "Growth."), ["--json", str(folder / "growth.json")])
    rows = [{"size": size, "seconds": 0.5 * size, "extra MB": None} for size in (1, 2)]
    tables = {
        title: [{column: row["size"], **row} for row in rows]
        for title, column in [
            ("supervised tokens", "supervised tokens"),
            ("vocabulary", "vocabulary"),
            ("chunk size", "chunk_bytes MiB"),
        ]
    }
    harness.report(arguments, tables, bars=[harness.Bar("linear", 1.01, 1.1)])
    return report, page


def between_marks(page, name):
    return page.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


def test_report_fills_the_page_and_draws(tmp_path):
    report, page = page_with_results(tmp_path)
    before = page.read_text()
    command = ["--results", str(tmp_path), "--page", str(page)]
    report.main(command)
    text = page.read_text()
    assert "| linear | 1.01 | <= 1.1 | yes |" in text
    assert f"torch {torch.__version__}" in text
    assert between_marks(text, "floor") == between_marks(before, "floor"), "no result, so nothing to write"
    assert between_marks(text, "growth") != between_marks(before, "growth")
    chart = tmp_path / "performance" / "growth.svg"
    first = chart.read_bytes()
    report.main(command)
    assert page.read_text() == text
    assert chart.read_bytes() == first


def test_report_refuses_smoke_runs(tmp_path):
    report, page = page_with_results(tmp_path)
    (tmp_path / "floor.json").write_text(json.dumps({"benchmark": "floor", "smoke": True}))
    with pytest.raises(SystemExit, match=re.escape("floor.json")):
        report.main(["--results", str(tmp_path), "--page", str(page)])


def test_page_has_a_place_for_every_benchmark():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for name in (*SCRIPTS, "bars", "machine"):
        assert f"<!-- {name} -->\n" in text
        assert f"`benchmarks/{name}.py`" in text or name in ("bars", "machine")
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^BENCHMARKS := (.*)$", makefile, re.M)[1].split() == list(SCRIPTS)
