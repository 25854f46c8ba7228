"""The document: self-contained, small, escaped, and complete at every stage of a study."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs
from typer.testing import CliRunner

import report_cases
from vocabridge.cli import app
from vocabridge.report.collect import collect
from vocabridge.report.page import render_page

SECTIONS = [
    "summary",
    "results",
    "training",
    "stability",
    "distances",
    "clouds",
    "heatmaps",
    "probe",
    "pair",
    "cost",
    "recipes",
    "environment",
]


class Document(HTMLParser):
    """Elements, attributes and texts of a page, as a browser would take them apart."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    @property
    def policy(self) -> str:
        metas = [attributes for tag, attributes in self.tags if tag == "meta"]
        (policy,) = [each["content"] for each in metas if each.get("http-equiv") == "Content-Security-Policy"]
        assert policy is not None
        return policy


@pytest.fixture(scope="module")
def documents(pages: Path) -> dict[str, Document]:
    return {path.stem: Document(path.read_text(encoding="utf-8")) for path in pages.glob("*.html")}


ALL = pytest.mark.parametrize("name", ["full", "partial", "hostile", "run"])


@ALL
def test_every_section_is_there(documents: dict[str, Document], name: str) -> None:
    assert [attributes["id"] for tag, attributes in documents[name].tags if tag == "section"] == SECTIONS


@ALL
def test_nothing_is_loaded(documents: dict[str, Document], name: str) -> None:
    document = documents[name]
    for tag, attributes in document.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not [attribute for attribute in attributes if attribute.startswith("on")]
    assert document.policy.startswith("default-src 'none';")
    assert "http" not in document.policy


@ALL
def test_the_policy_names_the_hashes_of_both_scripts(documents: dict[str, Document], name: str) -> None:
    document = documents[name]
    _, packed, script = document.scripts
    plotly = gzip.decompress(base64.b64decode(packed)).decode()
    assert plotly == get_plotlyjs()
    allowed = re.search(r"script-src ([^;]*);", document.policy)
    assert allowed is not None
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, plotly)]
    assert allowed[1].split() == [f"'sha256-{each}'" for each in hashes]


def test_hostile_text_adds_no_element(documents: dict[str, Document]) -> None:
    full, hostile = ({tag for tag, _ in documents[name].tags} for name in ("full", "hostile"))
    assert hostile <= full | {"p"}
    assert len(documents["hostile"].scripts) == 3
    assert "window.pwned" not in documents["hostile"].scripts[2]
    everything = "".join(documents["hostile"].texts)
    assert everything.count("<img src=x onerror=window.pwned=1>") > 50  # it is shown, as text


@ALL
def test_a_page_is_below_five_megabytes(pages: Path, name: str) -> None:
    assert (pages / f"{name}.html").stat().st_size < 3_000_000


def test_an_empty_section_says_how_to_fill_it(documents: dict[str, Document]) -> None:
    told = " ".join(" ".join(documents["run"].texts).split())
    for words in (
        "vocabridge evaluate",
        "vocabridge analyze RUN --data FILE",
        "vocabridge inspect-pair STUDENT TEACHER --data FILE --json",
        "training.diagnostics_steps",
        "recipe.yaml when a run starts",
    ):
        assert words in told
    told = " ".join(" ".join(documents["partial"].texts).split())
    assert "vocabridge inspect-pair org/student org/teacher --data org/rows --json" in told
    assert "is not finite, so training stops" in told


def test_the_same_data_gives_the_same_page(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    report = collect(report_cases.finished_study(tmp_path))
    now = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    page = render_page(report, now=now)
    assert page == render_page(report, now=now)
    assert "2026-01-02 03:04 UTC" in page


def test_command_writes_beside_the_run_or_where_told(tmp_path: Path) -> None:
    report_cases.write_run(tmp_path / "run", seed=0)
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "report.html: 2." in result.output
    assert (tmp_path / "run" / "report.html").is_file()
    elsewhere = tmp_path / "new" / "page.html"
    (tmp_path / "run" / "run.json").write_text("{", encoding="utf-8")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--output", str(elsewhere)])
    assert "note: " in result.stderr
    assert elsewhere.is_file()


def test_command_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    report_cases.write_run(tmp_path / "run", seed=0)
    for arguments in (
        [str(tmp_path / "nothing")],
        [str(tmp_path / "run"), "--output", str(tmp_path / "file" / "page.html")],
    ):
        command = [sys.executable, "-m", "vocabridge", "report", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
