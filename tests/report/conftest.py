"""A headless Chromium and the pages that it opens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

import report_cases
from chromium import open_chromium
from vocabridge.report.collect import collect
from vocabridge.report.page import render_page


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """As ``chromium.open_chromium`` gives it, one for all tests of this folder."""
    yield from open_chromium()


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with full.html, partial.html, hostile.html and run.html."""
    folder = tmp_path_factory.mktemp("report")
    makers = {
        "full": report_cases.finished_study,
        "partial": report_cases.partial_study,
        "hostile": report_cases.hostile_study,
        "run": report_cases.bare_run,
    }
    for name, make in makers.items():
        page = render_page(collect(make(folder / name)))
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return folder
