"""``vocabridge analyze``: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from vocabridge import cli
from vocabridge.analysis.analyze import analyze_run, analyze_runs
from vocabridge.analysis.attention import AttentionReader
from vocabridge.analysis.finished_run import load_finished_run
from vocabridge.analysis.probe import ProbeReport
from vocabridge.errors import UserError
from vocabridge.pairs import tokenize_examples
from vocabridge.report.analysis_files import read_analysis
from vocabridge.report.reading import Reader
from vocabridge.text import read_examples

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
    others = ["heatmaps.json", *heatmaps, "points.json", "probe.json", "query-key.svg"]
    assert files_of(output) == sorted(["distances.json", *others])
    report = ProbeReport.model_validate_json((output / "probe.json").read_text(encoding="utf-8"))
    assert (report.examples, report.objective) == (3, "dskd_cma")
    distances = json.loads((output / "distances.json").read_text())
    assert [row["step"] for row in distances["training"]] == [0, 3, 6]
    assert distances["data"]["before"] != distances["data"]["after"]
    points = json.loads((output / "points.json").read_text(encoding="utf-8"))
    supervised = report.supervised_positions
    assert len(points["query_names"]) == len(points["stages"]["after"]["queries"]) == supervised
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
    assert len(list((analysis.folder / "heatmaps").iterdir())) == 2 * (3 + 3)
    again = analyze_run(folder, data, limit=1)
    assert len(list((again.folder / "heatmaps").iterdir())) == 2
    assert again.probe.examples == 1


def test_the_report_reads_what_is_written(finished_run: FinishedFolder, tmp_path: Path) -> None:
    """It has models of its own for these files, so that it imports no torch."""
    written = analyze_run(
        finished_run("dskd_cma"), str(finished_run("dskd_cma").parent / "data.jsonl"), output_dir=tmp_path
    )
    found = read_analysis(tmp_path, reader := Reader())
    assert not reader.notes
    assert found.probe is not None
    assert [result.model_dump() for result in found.probe.results] == [
        result.model_dump() for result in written.probe.results
    ]
    assert [change.model_dump() for change in found.probe.changes] == [
        change.model_dump() for change in written.probe.changes
    ]
    heatmaps = json.loads((tmp_path / "heatmaps.json").read_text(encoding="utf-8"))["examples"]
    assert len(found.heatmaps) == len(heatmaps) > 0
    for example, raw in zip(found.heatmaps, heatmaps, strict=True):
        read = json.loads(example.model_dump_json())
        assert read["attentions"]["after"]
        assert read == {name: raw[name] for name in read}
    points = json.loads((tmp_path / "points.json").read_text(encoding="utf-8"))
    assert found.points is not None
    read = json.loads(found.points.model_dump_json())
    assert read == {name: points[name] for name in read if name != "stages"} | {"stages": points["stages"]}


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


def test_heatmaps_json_is_the_attention_of_the_examples(finished_run: FinishedFolder, tmp_path: Path) -> None:
    folder = finished_run("dskd_cma")
    data = str(folder.parent / "data.jsonl")
    analyze_run(folder, data, output_dir=tmp_path)
    found = json.loads((tmp_path / "heatmaps.json").read_text(encoding="utf-8"))["examples"]
    run = load_finished_run(folder, data)
    pairs = list(tokenize_examples(read_examples(data), run.pair_tokenizer))
    examples = list(AttentionReader(run).examples(pairs))
    assert [item["chosen"] for item in found] == ["first"] * 3 + ["least in chunk"] * 3
    assert [item["name"] for item in found[:3]] == ["example 1", "example 2", "example 3"]
    masses = {}
    for number, example in enumerate(examples, start=1):
        inside = example.student.chunk_ids[:, None] == example.teacher.chunk_ids[None, :]
        positions = example.student.chunk_ids >= 0
        masses[number] = (example.weights["after"] * inside)[positions].sum(1).mean()
    least = sorted(range(4, len(examples) + 1), key=lambda number: masses[number])[:3]
    assert [int(item["name"].split()[1]) for item in found[3:]] == least
    for item in found:
        number = int(item["name"].split()[1])
        example = examples[number - 1]
        assert item["mass_in_chunk"]["after"] == pytest.approx(masses[number], abs=6e-4)
        assert item["student_chunks"] == example.student.chunk_ids.tolist()
        assert item["teacher_spans"] == example.teacher.spans.tolist()
        for stage in ("before", "after"):
            weights = np.zeros(example.weights[stage].shape)
            for row, column, weight in item["attentions"][stage]:
                weights[row, column] = weight
            np.testing.assert_allclose(weights, example.weights[stage], atol=0.0051)
            assert weights.max() > 0.1


def test_several_runs(
    finished_run: FinishedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = finished_run("dskd_cma").parent / "data.jsonl"
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, name in zip(folders, ("dskd_cma", "composed"), strict=True):
        shutil.copytree(finished_run(name), folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["vocabridge", "analyze", *map(str, folders), "--data", str(data), "--limit", "4"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    last = capsys.readouterr().out.rpartition("MMD^2 between")[2]
    for folder in folders:
        report = ProbeReport.model_validate_json((folder / "analysis" / "probe.json").read_text(encoding="utf-8"))
        distances = json.loads((folder / "analysis" / "distances.json").read_text())["data"]
        (line,) = (line for line in last.splitlines() if str(folder) in line)
        assert f"{report.result('after').measures['mass_in_chunk'].mean:.3f} [" in line
        assert f"{distances['after']['mmd_squared']:.4f}" in line


def test_several_runs_are_all_checked_before_the_first_is_analysed(
    finished_run: FinishedFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run("dskd_cma"), folder)
    data = str(finished_run("dskd_cma").parent / "data.jsonl")
    with pytest.raises(UserError, match="'uld' has no cross-model attention"):
        analyze_runs([folder, finished_run("uld")], data)
    assert not (folder / "analysis").exists()
    with pytest.raises(UserError, match="is for one RUN"):
        analyze_runs([folder, folder], data, output_dir=tmp_path / "out")
