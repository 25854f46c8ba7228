"""The page: templates filled, plotly embedded once and compressed, a content security policy that allows no network.

Only the two scripts whose hashes the policy names can run, so nothing that comes from data can become one, even if an
escape were missing. Plotly and the charts' data are unpacked by the page itself, in a browser of 2023 or newer.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vocabridge.report.collect import PAIR_FILE, Report
from vocabridge.report.curves import MAX_POINTS
from vocabridge.report.facts import commands, cost_table, environment_table, flat_recipe, pair_tables, recipes
from vocabridge.report.figures import line_styles
from vocabridge.report.probe_tables import cloud_charts, heatmap_browser, probe_tables
from vocabridge.report.results_tables import results
from vocabridge.report.training_charts import training
from vocabridge.report.view import Chart
from vocabridge.report.wording import summary

_SCRIPTS = ("report.js", "heatmap.js")


def render_page(report: Report, *, now: datetime | None = None) -> str:
    """The whole HTML document.

    Args:
        report: what to show.
        now: the moment that the page names; default: this one.
    """
    styles = line_styles(report.variants, report.baseline)
    found_results = results(report)
    found_training = training(report, styles)
    clouds = cloud_charts(report)
    browser = heatmap_browser(report)
    charts = [
        *found_results.charts,
        *found_training.losses,
        *found_training.others,
        *found_training.stability,
        *found_training.distances,
        *clouds,
    ]
    script = Markup("\n".join(_asset(name) for name in _SCRIPTS))
    plotly = _plotly()
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            rendered=(now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC"),
            version=version("vocabridge"),
            summary=summary(report),
            results=found_results,
            training=found_training,
            clouds=clouds,
            heatmaps=browser,
            probes=probe_tables(report),
            pair=pair_tables(report.pair) if report.pair else [],
            pair_file=report.folder / PAIR_FILE,
            models=_models(report),
            cost=cost_table(report),
            recipes=recipes(report),
            environment=environment_table(report),
            commands=commands(report),
            styles=styles,
            max_points=MAX_POINTS,
            data=_packed(_json({"figures": _figures(charts), "heatmaps": browser.data})),
            css=Markup(_asset("report.css")),
            script=script,
            plotly=plotly.packed,
            policy=_policy(script, plotly.text),
        )
    )


def _figures(charts: list[Chart]) -> dict[str, Any]:
    assert len({chart.key for chart in charts}) == len(charts), "two charts share a key"
    return {chart.key: chart.figure for chart in charts}


def _models(report: Report) -> list[str]:
    """Student, teacher and data as ``inspect-pair`` is given them, of the first recipe that has a teacher."""
    for run in report.runs:
        facts = dict(flat_recipe(run.recipe or ""))
        student, teacher, train = map(facts.get, ("student.model", "teacher.model", "data.train"))
        if student and teacher and train:
            return [str(student), str(teacher), str(train[0] if isinstance(train, list) else train)]
    return ["STUDENT", "TEACHER", "FILE"]


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("vocabridge.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _asset(name: str) -> str:
    return files("vocabridge.report").joinpath("templates", name).read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Plotly:
    """Plotly's script."""

    text: str
    packed: str


@cache
def _plotly() -> _Plotly:
    from plotly.offline import get_plotlyjs

    text = get_plotlyjs()
    return _Plotly(text, _packed(text))


def _packed(text: str) -> str:
    """Gzip in base64: small, and without a character that means anything in HTML."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _policy(*scripts: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    # Plotly writes style attributes; images are what its download button makes of a chart.
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
