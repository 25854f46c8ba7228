"""A headless Chromium, one for all tests of this folder; without it they skip and say what is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver import Chrome

import report_cases
from vocabridge.report.collect import collect
from vocabridge.report.page import render_page

_PROGRAMS = (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """Chromium with its console recorded; skips where it, or its driver, is not installed."""
    found = [next(filter(None, map(shutil.which, names)), None) for names in _PROGRAMS]
    if None in found:
        pytest.skip("no Chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,900"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to sandbox for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=webdriver.ChromeService(found[1]))
    yield driver
    driver.quit()


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
