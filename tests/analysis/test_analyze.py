"""``vocabridge analyze``: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file, save_file

from vocabridge import cli
from vocabridge.analysis.analyze import analyze_run
from vocabridge.analysis.probe import ProbeReport
from vocabridge.errors import UserError

FinishedFolder = Callable[[str], Path]


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_command(
    finished_run: FinishedFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, output = finished_run("dskd_cma"), tmp_path / "out"
    command = ["vocabridge", "analyze", str(folder), "--data", str(folder.parent / "data.jsonl")]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [*command, "--limit", "3", "--output", str(output)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    heatmaps = [f"heatmaps/example-{n}.{stage}.page-1.svg" for n in (1, 2, 3) for stage in ("after", "before")]
    assert files_of(output) == ["distances.json", *heatmaps, "probe.json", "query-key.svg"]
    report = ProbeReport.model_validate_json((output / "probe.json").read_text(encoding="utf-8"))
    assert (report.examples, report.objective) == (3, "dskd_cma")
    assert [row["step"] for row in json.loads((output / "distances.json").read_text())] == [0, 3, 6]
    for name in ("query-key.svg", *heatmaps):
        assert ElementTree.parse(output / name).getroot().tag.endswith("svg")
    printed = capsys.readouterr().out
    mass = report.result("after").measures["mass_in_chunk"].mean
    for words in (f"{mass:.3f} [", "after - before", "CLP", "mmd squared", str(output)):
        assert words in printed


def test_default_folder_and_stale_pictures(finished_run: FinishedFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run("dskd_cla"), folder)
    data = str(finished_run("dskd_cla").parent / "data.jsonl")
    analysis = analyze_run(folder, data)
    assert analysis.folder == folder / "analysis"
    assert len(list((analysis.folder / "heatmaps").iterdir())) == 8
    again = analyze_run(folder, data, limit=1)
    assert len(list((again.folder / "heatmaps").iterdir())) == 2
    assert again.probe.examples == 1


def test_training_data_may_be_gone(finished_run: FinishedFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run("dskd_cma"), folder)
    recipe = folder / "recipe.yaml"
    data = finished_run("dskd_cma").parent / "data.jsonl"
    text = recipe.read_text(encoding="utf-8")
    assert str(data) in text
    recipe.write_text(text.replace(str(data), str(tmp_path / "gone.jsonl")), encoding="utf-8")
    assert analyze_run(folder, str(data)).probe.examples == 8


def refused(folder: Path, data: Path, **options: Path) -> str:
    with pytest.raises(UserError) as error:
        analyze_run(folder, str(data), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_analysed(finished_run: FinishedFolder, tmp_path: Path) -> None:
    data = finished_run("dskd_cma").parent / "data.jsonl"
    message = refused(finished_run("uld"), data)
    assert "'uld' has no cross-model attention" in message
    assert "dskd_cla and dskd_cma" in message
    assert "no run folder" in refused(tmp_path, data)
    assert "missing.jsonl" in refused(finished_run("dskd_cma"), tmp_path / "missing.jsonl")
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refused(finished_run("dskd_cma"), data, output_dir=file)


@pytest.mark.parametrize("name", ["objective.safetensors", "model.safetensors", "run.json"])
def test_an_unfinished_run(finished_run: FinishedFolder, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run("dskd_cma"), folder)
    data = finished_run("dskd_cma").parent / "data.jsonl"
    (folder / name).unlink()
    message = refused(folder, data)
    assert name in message
    assert "not finished" in message


def test_a_run_record_without_a_seed(finished_run: FinishedFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run("dskd_cma"), folder)
    (folder / "run.json").write_text("{}", encoding="utf-8")
    assert "seed" in refused(folder, finished_run("dskd_cma").parent / "data.jsonl")


def test_a_run_that_diverged(finished_run: FinishedFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run("dskd_cma"), folder)
    state = load_file(folder / "objective.safetensors")
    state["query_projector.weight"][0, 0] = float("nan")
    save_file(state, folder / "objective.safetensors")
    assert "diverged" in refused(folder, finished_run("dskd_cma").parent / "data.jsonl")
