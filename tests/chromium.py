"""A headless Chromium for the tests of the report; without it they skip and say what is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver import Chrome

_PROGRAMS = (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))


def open_chromium() -> Iterator[Chrome]:
    """Chromium with its console recorded, closed as the iterator goes on; skips where it or its driver is absent."""
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
