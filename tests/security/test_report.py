"""Whatever a run recorded is shown as text: in the page, in pictures, in tables of the terminal and in model cards."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from rich.console import Console
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import report_cases
from report_cases import write_json
from study_cases import BASE, STUDY
from vocabridge.analysis.heatmap import HeatmapData, heatmap_pages
from vocabridge.analysis.probe import MEASURES, ProbeReport
from vocabridge.analysis.tables import render_comparison
from vocabridge.analysis.training_distances import DistanceTable, StageDistances, render_distances
from vocabridge.cli import main
from vocabridge.evaluation.bits import ReferenceBits
from vocabridge.evaluation.engine import GenerationSettings
from vocabridge.evaluation.results import EvaluationResult, FileResult, SeedScores, domain_average, results_table
from vocabridge.evaluation.statistics import MeanStd
from vocabridge.report.collect import collect
from vocabridge.report.page import render_page
from vocabridge.study.plan import load_study
from vocabridge.study.status import RunStatus
from vocabridge.study.tables import plan_table

PAYLOADS = [
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<svg/onload=window.pwned=1>",
    "\"'><iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "</textarea></style></title></script><script>window.pwned=1</script>",
    "<a href='javascript:window.pwned=1' autofocus onfocus='window.pwned=1'>x</a>",
    "<details open ontoggle=window.pwned=1>",
    "<!--><script>window.pwned=1</script>-->",
    "{{ 7*7 }}{% raw %}<script>window.pwned=1</script>",
    "';window.pwned=1;//",
    "\u2028window.pwned=1;\u2029`${window.pwned=1}`",
    "<b onmouseover=window.pwned=1>%{x}<br><extra></extra>",
]
"""The last ones are for JavaScript strings and for plotly's own markup."""

ALL = " ".join(PAYLOADS)
NAME = ALL.replace("/", "").replace("\u2028", "")[:200]
"""What can be the name of a file or folder."""


def hostile_run(folder: Path) -> Path:
    """A run folder in which every text that a report reads is a payload: its own name, too."""
    run = folder / NAME
    report_cases.write_run(run, seed=0)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        for prefix in ("", "loss/", "probe/", "eval_", "discriminator_"):
            for payload in PAYLOADS:
                stream.write(json.dumps({prefix + payload: 1.0, "step": 5}) + "\n")
    recipe = {ALL: ALL, "student": {"model": ALL, ALL: [ALL]}, "teacher": {"model": ALL}, "data": {"train": [ALL]}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"objective": {"name": ALL}}))
    record = report_cases.run_record(0, command=["vocabridge", ALL], git_commit=ALL, objective=ALL)
    write_json(run / "run.json", record | {ALL: ALL, "machine": {"device": ALL, ALL: ALL}, "packages": {ALL: ALL}})
    probe = report_cases.probe() | {"data": ALL}
    for result in probe["results"]:
        result |= {"grouping": result["grouping"], "group": ALL}
    write_json(run / "analysis" / "probe.json", probe)
    maps = report_cases.heatmaps(long=12)
    for example in maps["examples"]:
        example |= {"student": [ALL] * len(example["student"]), "teacher": [ALL] * len(example["teacher"])}
        example |= {"name": ALL, "prompt": ALL, "response": ALL}
    write_json(run / "analysis" / "heatmaps.json", maps)
    cloud = report_cases.points(0) | {"query_names": [ALL] * 8, "key_names": [ALL] * 7}
    write_json(run / "analysis" / "points.json", cloud)
    pair = report_cases.pair_report(warnings=PAYLOADS, chunk_sizes={ALL: 800})
    for side in ("student", "teacher"):
        pair[side] = pair[side] | {"name": ALL, "template": ALL}
    write_json(run / "tokenizer-pair.json", pair)
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_page(collect(hostile_run(tmp_path_factory.mktemp("hostile"))))


class Elements(HTMLParser):
    """Tags and attributes of a page; it trusts no escaping, only what a parser makes of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_no_payload_becomes_an_element_or_an_attribute(page: str) -> None:
    tags = Elements(page).tags
    assert {"iframe", "img", "b", "textarea"}.isdisjoint(tag for tag, _ in tags)
    assert sum(tag == "script" for tag, _ in tags) == 3
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert not str(attributes.get("href", "#")).lower().startswith(("javascript:", "data:", "http")), attributes
    assert page.count("&lt;img src=x onerror=window.pwned=1&gt;") > 20, "they are shown, as text"
    assert "49{% raw" not in page, "no template is made of data"


def test_no_script_runs_even_without_the_policy(browser: Chrome, page: str, tmp_path: Path) -> None:
    """The page forbids all scripts but its own; here it must do without that, by escaping alone."""
    bare, number = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert number == 1
    (tmp_path / "report.html").write_text(bare, encoding="utf-8")
    browser.get((tmp_path / "report.html").as_uri())
    drawn = "return document.documentElement.dataset.charts === 'drawn'"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(drawn))
    for details in browser.find_elements(By.CSS_SELECTOR, "details"):
        browser.execute_script("arguments[0].open = true", details)
    undrawn = ".chart:not([data-drawn])"
    WebDriverWait(browser, 60).until(lambda driver: not driver.find_elements(By.CSS_SELECTOR, undrawn))
    assert browser.execute_script("return window.pwned") is None
    count = "return document.querySelectorAll('img, iframe, main b, main script, main [onload], main [onerror]').length"
    assert browser.execute_script(count) == 0
    cells = browser.execute_script("return document.getElementById('heatmap').textContent.length")
    assert cells > 0, "the heatmap with hostile tokens was drawn"


def test_the_browser_would_have_noticed(browser: Chrome, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f"<!doctype html><title>x</title><body>{PAYLOADS[0]}</body>")
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.execute_script("return window.pwned") == 1


@pytest.mark.parametrize("payload", PAYLOADS)
def test_pictures_hold_payloads_as_text(payload: str) -> None:
    names = [payload, "a"]
    weights = np.array([[0.9, 0.1], [0.6, 0.4]])
    chunks, spans = np.array([0, 1]), np.array([[0, 1], [1, 2]])
    data = HeatmapData(weights, names, names, chunks, chunks, spans, spans)
    for picture in heatmap_pages(data, title=payload):
        root = ElementTree.fromstring(picture)
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert tags <= {"svg", "rect", "circle", "text", "title", "line", "path", "g"}
        assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]
        texts = [element.text or "" for element in root.iter()]
        assert payload in str(root.get("aria-label"))
        assert any(payload in text for text in texts), "shown, as text"


# --- files of a run folder that are not what they should be ----------------------------------------------------------


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(12)
)
STRANGE: dict[str, tuple[str, str]] = {
    "a recipe that makes objects": ("recipe.yaml", "a: !!python/object/apply:os.mkdir [CANARY]"),
    "a recipe with a date that is none": ("recipe.yaml", "a: !!timestamp 2020-99-99"),
    "a recipe that holds itself": ("recipe.yaml", "a: &a [*a]"),
    "a deep recipe": ("recipe.yaml", "a: " + "[" * 1500),
    "a recipe that unfolds": ("recipe.yaml", BOMB),
    "a recipe without a student": ("recipe.yaml", "teacher: {model: x}\ndata: {train: y}\n"),
    "a deep record": ("run.json", '{"a":' * 50_000),
    "a record of other types": ("run.json", '{"seed": {"a": 1}, "objective": [], "command": {"a": 1}, "machine": 3}'),
    "a number beyond floats": ("metrics.jsonl", '{"loss": 1' + "0" * 400 + ', "step": 1}\n'),
    "a step beyond integers": ("metrics.jsonl", '{"loss": 1, "step": 1e999}\n'),
    "a deep line": ("metrics.jsonl", "[" * 50_000 + "\n"),
    "a deep probe": ("analysis/probe.json", "[" * 50_000),
    "scores of other types": ("evaluation/results.json", '{"files": 3, "model": []}'),
    "deep scores": ("evaluation/results.json", "[" * 50_000),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_file_in_a_run_folder_costs_its_section_only(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    report_cases.write_run(run, seed=0)
    file, text = STRANGE[name]
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_text(text.replace("CANARY", str(tmp_path / "canary")))
    page = render_page(collect(run))
    assert len(page) < 4_500_000
    assert not (tmp_path / "canary").exists()


# --- terminal --------------------------------------------------------------------------------------------------------


def printed(shown: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200, force_terminal=False).print(shown)
    return stream.getvalue()


BRACKETS = ["[/bold]", "[link=file:///etc/passwd]x[/link]", "[red]x", "a[b]c", "\\[x]"]
"""A name in brackets would vanish, become a link, or stop the command with a MarkupError, were it taken for markup."""


@pytest.mark.parametrize("name", BRACKETS)
def test_names_of_models_and_files_are_printed_as_they_are(name: str) -> None:
    bits = ReferenceBits(bits=8.0, num_bytes=4, num_tokens=2, num_cut=0, num_skipped=0)
    score, seeds = MeanStd(1.0, None), (SeedScores(0, 1.0, 1.0, 1.0),)
    file = FileResult(name, True, 1, 0, 0, score, score, 2.0, bits, seeds)
    result = EvaluationResult(name, GenerationSettings(), (file,), domain_average([file]), None)
    lines = printed(results_table(result)).splitlines()
    assert lines[0].startswith(f"{Path(name).name}: ")
    assert sum(name in line for line in lines[1:]) == 1


@pytest.mark.parametrize("name", [name for name in BRACKETS if "/" not in name])
def test_names_of_folders_are_printed_as_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(BASE))
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, "output_dir": name}))
    plan = load_study("study.yaml")
    statuses = {run: RunStatus() for run in plan.runs}
    assert printed(plan_table(plan, statuses, jobs=1)).startswith(f"{name}: 9 runs")


@pytest.mark.parametrize("name", BRACKETS)
def test_names_of_runs_and_measures_are_printed_as_they_are(name: str) -> None:
    def cell(mean: float) -> dict[str, float | None]:
        return {"mean": mean, "low": None, "high": None}

    measures = {measure: cell(0.5) for measure in MEASURES}
    group = {"grouping": "all", "group": "all"}
    results = [
        {"attention": attention, "positions": 1, "coverage": 1.0, "measures": measures, **group}
        for attention in ("before", "after")
    ]
    counts = {"examples": 1, "supervised_positions": 1, "positions_in_chunk": 1}
    texts = {"run": name, "objective": name, "data": name}
    bootstrap = {"confidence": 0.95, "resamples": 1, "seed": 0, "repetition": []}
    changes = [{"measures": measures, **group}]
    report = ProbeReport.model_validate({**texts, **counts, **bootstrap, "results": results, "changes": changes})
    data = StageDistances({"mmd_squared": 1.0, name: 1.0}, {"mmd_squared": 1.0, name: 1.0})
    assert f"{name} ({name})" in printed(render_comparison([(report, data)]))
    assert name in printed(render_distances(DistanceTable((), ()), data))


@pytest.mark.parametrize("text", ["\x1b[2J\x1b[31m", "\x07", "\r", "\x9b31m", "\u202e", "\x1b]8;;http://x\x1b\\"])
def test_errors_do_not_act_on_the_terminal(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file's name or content is quoted in errors: clearing the screen or hiding a line must not be in its power."""
    monkeypatch.setattr("sys.argv", ["vocabridge", "report", str(tmp_path / f"x{text}y")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    assert "does not exist" in line
