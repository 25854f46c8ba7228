"""The page in a real browser, opened from disk."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from report_cases import STUDENT, TEACHER


def open_page(browser: Chrome, path: Path) -> None:
    """Open a page and wait until all its visible charts are drawn."""
    browser.get_log("browser")  # what earlier pages said
    browser.get(path.as_uri())
    WebDriverWait(browser, 60).until(
        lambda driver: driver.execute_script("return document.documentElement.dataset.charts === 'drawn'")
    )


def console(browser: Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def find(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def choose(browser: Chrome, name: str, index: int) -> None:
    Select(find(browser, f"#{name}")).select_by_index(index)


def readout(browser: Chrome) -> str:
    return find(browser, "#heatmap-readout").text


@pytest.mark.parametrize("name", ["full", "partial", "hostile", "run"])
def test_page_opens_without_a_word_in_the_console(browser: Chrome, pages: Path, name: str) -> None:
    open_page(browser, pages / f"{name}.html")
    assert console(browser) == []
    for details in browser.find_elements(By.CSS_SELECTOR, "details"):
        browser.execute_script("arguments[0].open = true", details)
    WebDriverWait(browser, 30).until(
        lambda driver: not driver.find_elements(By.CSS_SELECTOR, ".chart:not([data-drawn])")
    )
    assert console(browser) == []
    assert browser.execute_script("return window.pwned") is None
    drawn = browser.execute_script("return [...document.querySelectorAll('.chart')].every(c => c.querySelector('svg'))")
    assert drawn
    assert find(browser, "#trouble").get_attribute("hidden") is not None


def test_nothing_from_data_becomes_an_element(browser: Chrome, pages: Path) -> None:
    open_page(browser, pages / "hostile.html")
    script = (
        "return [document.images.length, document.querySelectorAll('main b, main a[href^=http], main script').length]"
    )
    assert browser.execute_script(script) == [0, 0]
    # Plotly shows the label as it was written instead of taking it for markup.
    names = browser.execute_script("return charts.figures['difference-rouge_l'].layout.yaxis.ticktext")
    ticks = [tick.text for tick in browser.find_elements(By.CSS_SELECTOR, "[data-figure='difference-rouge_l'] .ytick")]
    assert len(names) == 2
    assert ticks == [name.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for name in names]


def test_the_policy_lets_no_request_out(browser: Chrome, pages: Path) -> None:
    open_page(browser, pages / "full.html")
    requests = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert requests == []
    refused = browser.execute_async_script(
        "const done = arguments[0]; fetch('data:text/plain,x').then(() => done('sent'), () => done('refused'))"
    )
    assert refused == "refused"
    # A script that is not one of the page's own does not run, however it came into the page.
    browser.execute_script(
        "const made = document.createElement('script');"
        "made.textContent = 'window.pwned = 1'; document.body.append(made)"
    )
    assert browser.execute_script("return window.pwned") is None


def test_table_sorts_by_click(browser: Chrome, pages: Path) -> None:
    open_page(browser, pages / "full.html")
    table = find(browser, "#results table")

    def column(index: int) -> list[str]:
        return [cell.text for cell in table.find_elements(By.CSS_SELECTOR, f"tbody td:nth-child({index})")]

    headings = table.find_elements(By.CSS_SELECTOR, "th button")
    assert [heading.text for heading in headings[:3]] == ["variant", "seeds", "mean \u00b1 sd"]
    assert column(1) == ["cma (baseline)", "cma_ga", "sft"]
    headings[2].click()
    means = [float(text.split()[0]) for text in column(3)]
    assert means == sorted(means)
    assert headings[2].find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    headings[2].click()
    assert [float(text.split()[0]) for text in column(3)] == sorted(means, reverse=True)
    headings[4].click()  # the baseline has no difference and stays last whichever way
    assert column(1)[-1] == "cma (baseline)"
    headings[4].click()
    assert column(1)[-1] == "cma (baseline)"
    headings[0].send_keys(Keys.ENTER)
    assert column(1) == ["cma (baseline)", "cma_ga", "sft"]


def test_heatmap_browser_switches_and_follows_the_keyboard(browser: Chrome, pages: Path) -> None:
    open_page(browser, pages / "full.html")
    heatmap = find(browser, "#heatmap")

    def cells() -> int:
        return len(heatmap.find_elements(By.CSS_SELECTOR, "rect[class^=cell]"))

    runs = [option.text for option in Select(find(browser, "#heatmap-run")).options]
    assert runs == [f"{variant}, seed {seed}" for seed in range(3) for variant in ("cma", "cma_ga")]
    choose(browser, "heatmap-attention", 0)
    assert cells() == len(STUDENT)
    choose(browser, "heatmap-attention", 1)
    assert cells() == 6
    assert len(heatmap.find_elements(By.CSS_SELECTOR, ".cell-outside")) == 1
    assert len(heatmap.find_elements(By.CSS_SELECTOR, ".chunk")) == 6
    labels = [label.get_attribute("textContent") for label in heatmap.find_elements(By.CSS_SELECTOR, "text")]
    assert labels == TEACHER + STUDENT
    heatmap.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.END)
    assert (
        readout(browser) == "student 3 \u201cu\u00df\u201d \u2192 teacher 7 \u201c<eos>\u201d: 0.200, outside the chunk"
    )
    heatmap.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert readout(browser).endswith("teacher 2 \u201c\u2423Flu\u00df\u201d: 0.700, inside the chunk")
    choose(browser, "heatmap-example", 1)
    assert cells() == 90
    choose(browser, "heatmap-run", 3)
    assert cells() == 90  # the example and the attention stay as they were chosen


def test_attention_outside_the_chunk_is_sharpened_and_rows_that_stray_are_marked(browser: Chrome, pages: Path) -> None:
    open_page(browser, pages / "full.html")
    heatmap = find(browser, "#heatmap")

    def opacities(kind: str) -> list[float]:
        cells = heatmap.find_elements(By.CSS_SELECTOR, f".{kind}")
        return [float(cell.value_of_css_property("fill-opacity")) for cell in cells]

    def marked() -> list[str]:
        labels = heatmap.find_elements(By.CSS_SELECTOR, "text")
        plain = labels[0].value_of_css_property("fill")
        return [label.text for label in labels if label.value_of_css_property("fill") != plain]

    choose(browser, "heatmap-attention", 1)
    assert opacities("cell-inside") == pytest.approx([0.912, 0.8, 0.7, 0.6, 0.99])
    assert opacities("cell-outside") == pytest.approx([0.2**0.5])
    assert marked() == []  # the row with something outside has more inside
    choose(browser, "heatmap-attention", 0)
    assert opacities("cell-outside") == pytest.approx([0.5] * 4)
    assert marked() == [STUDENT[row] for row in (2, 5, 6, 7)]


def test_pointer_names_both_tokens_and_long_responses_scroll(browser: Chrome, pages: Path) -> None:
    open_page(browser, pages / "full.html")
    choose(browser, "heatmap-example", 1)
    choose(browser, "heatmap-attention", 1)
    heatmap = find(browser, "#heatmap")
    browser.execute_script(
        "const box = document.querySelectorAll('#heatmap .cell-inside')[2].getBoundingClientRect();"
        "document.querySelector('#heatmap .body').dispatchEvent(new PointerEvent('pointermove',"
        "{clientX: box.x + box.width / 2, clientY: box.y + box.height / 2}))"
    )
    assert readout(browser) == "student 3 \u201ctok2\u201d \u2192 teacher 3 \u201ctok2\u201d: 0.900, inside the chunk"
    size = browser.execute_script("return [arguments[0].scrollHeight, arguments[0].clientHeight]", heatmap)
    assert size[0] > size[1]
    heatmap.send_keys(*[Keys.PAGE_DOWN] * 9, Keys.END)
    assert "student 90" in readout(browser)
    assert "teacher 90" in readout(browser)
    seen = browser.execute_script(
        "const [cell, map] = [document.querySelector('.cursor'), arguments[0]].map(e => e.getBoundingClientRect());"
        "return cell.top > map.top && cell.bottom < map.bottom && cell.right < map.right",
        heatmap,
    )
    assert seen
    before = browser.execute_script("return arguments[0].scrollWidth", heatmap)
    find(browser, "#heatmap-smaller").click()
    assert browser.execute_script("return arguments[0].scrollWidth", heatmap) < before


def test_variants_can_be_hidden_in_all_charts(browser: Chrome, pages: Path) -> None:
    open_page(browser, pages / "full.html")

    def lines() -> int:
        return len(browser.find_elements(By.CSS_SELECTOR, "[data-figure='curve-loss'] .scatterlayer .trace"))

    all_lines = lines()
    assert all_lines == 3 * (1 + 3 + 1)  # band, seeds and mean of three variants
    find(browser, "[data-variant=sft]").click()
    assert lines() == 10
    find(browser, "#seeds").click()
    assert lines() == 4
    find(browser, "[data-variant=sft]").click()
    find(browser, "#seeds").click()
    assert lines() == all_lines


def test_light_and_dark(browser: Chrome, pages: Path) -> None:
    def brightness() -> float:
        image = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
        return float(np.asarray(image.convert("L")).mean())

    feature = {"name": "prefers-color-scheme"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature | {"value": "dark"}]})
    try:
        open_page(browser, pages / "full.html")
        assert brightness() < 80
        find(browser, "#theme").click()
        assert brightness() > 200
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_browser_that_knows_no_light_dark_shows_the_light_page(browser: Chrome, pages: Path, tmp_path: Path) -> None:
    page = tmp_path / "old.html"
    page.write_text((pages / "full.html").read_text(encoding="utf-8").replace("light-dark(", "unknown("), "utf-8")
    open_page(browser, page)
    colour = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()"
    colours = {name: browser.execute_script(colour, name) for name in ("--paper", "--ink", "--inside", "--outside")}
    assert all(value.startswith("#") for value in colours.values()), colours
    assert len(set(colours.values())) == 4
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.parametrize("width", [390, 1300])
def test_screenshot_is_not_blank_and_nothing_sticks_out(browser: Chrome, pages: Path, width: int) -> None:
    size = {"width": width, "height": 3000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        open_page(browser, pages / "full.html")
        pixels = np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    inked = (pixels < 200).mean(axis=1)  # share of dark pixels in each line of the picture
    bands = inked.reshape(-1, 500).max(axis=1)
    assert (bands > 0.01).all()


def test_prints_with_charts_and_the_chosen_heatmap(browser: Chrome, pages: Path) -> None:
    open_page(browser, pages / "full.html")
    choose(browser, "heatmap-example", 1)
    browser.execute_script(
        "window.seen = [];"
        "addEventListener('beforeprint', () => seen.push(document.getElementById('heatmap').style.zoom));"
        "addEventListener('afterprint', () => seen.push(document.getElementById('heatmap').style.zoom))"
    )
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF")
    zoom, after = browser.execute_script("return seen")
    assert 0.2 < float(zoom) < 0.7  # 90 cells of 16 pixels made to fit the paper
    assert after == ""


def test_what_is_closed_is_open_on_paper(browser: Chrome, pages: Path) -> None:
    open_page(browser, pages / "full.html")
    browser.execute_script("document.querySelectorAll('details')[1].open = true")
    state = (
        "return [[...document.querySelectorAll('details')].map(details => details.open),"
        "document.querySelectorAll('.chart:not([data-drawn])').length]"
    )
    before, _ = browser.execute_script(state)
    assert before.count(True) == 1
    for _ in range(2):  # some browsers tell it twice
        after_event, not_drawn = browser.execute_script("dispatchEvent(new Event('beforeprint'));" + state)
        assert all(after_event)
        assert not_drawn == 0
    assert browser.execute_script("dispatchEvent(new Event('afterprint'));" + state)[0] == before
    # What the reader opens later stays open.
    browser.execute_script(
        "document.querySelectorAll('details')[0].open = true; dispatchEvent(new Event('afterprint'))"
    )
    assert browser.execute_script(state)[0] == [True, True, *before[2:]]
    assert console(browser) == []
