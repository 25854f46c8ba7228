"""Plotly figures as plain mappings; colours of text, axes and grid are the page's style sheet's.

Plotly reads a little HTML in labels, so every label that comes from data is escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vocabridge.report.analysis_files import PointCloud
from vocabridge.report.curves import Band, Curve

_OTHERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a63d2")
_BASELINE = "#7a828e"
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_WIDTH, _HEIGHT = 340, 230
QUERY_COLOUR, KEY_COLOUR = "#0072b2", "#d55e00"

Figure = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LineStyle:
    """How one variant is drawn everywhere on the page."""

    colour: str
    dash: str


@dataclass(frozen=True, slots=True)
class VariantCurves:
    """One variant's seeds in one chart."""

    variant: str
    seeds: Mapping[int, Curve]
    band: Band | None


@dataclass(frozen=True, slots=True)
class Difference:
    """One variant against its baseline in one domain, with the differences seed by seed."""

    variant: str
    domain: str
    mean: float
    low: float | None
    high: float | None
    by_seed: Mapping[int, float]


def line_styles(variants: Sequence[str], baseline: str | None) -> dict[str, LineStyle]:
    """Colours that colour-blind readers can tell apart (Okabe and Ito), the baseline grey; then other dashes."""
    styles = {}
    others = [variant for variant in variants if variant != baseline]
    for index, variant in enumerate(others):
        turn, colour = divmod(index, len(_OTHERS))
        styles[variant] = LineStyle(_OTHERS[colour], _DASHES[turn % len(_DASHES)])
    if baseline is not None:
        styles[baseline] = LineStyle(_BASELINE, "solid")
    return styles


def curve_figure(
    parts: Iterable[VariantCurves], styles: Mapping[str, LineStyle], *, unit: str, log_scale: bool = False
) -> Figure:
    """A quantity over optimizer steps: a thin line a seed, the mean of seeds and a band from lowest to highest."""
    traces: list[dict[str, Any]] = []
    for part in parts:
        style = styles[part.variant]
        if part.band is not None and part.band.steps:
            traces.append(_band_trace(part.variant, part.band, style))
        single = len(part.seeds) == 1
        for seed, curve in part.seeds.items():
            traces.append(_line(part.variant, curve, style, words=f"seed {seed}", is_seed=not single))
        if part.band is not None and part.band.steps:
            mean = Curve(part.band.steps, part.band.mean)
            traces.append(_line(part.variant, mean, style, words="mean of seeds", is_seed=False))
    layout = _layout(x="optimizer step", y=unit)
    if log_scale:
        layout["yaxis"] |= {"type": "log", "dtick": 1}
    if unit == "share":
        layout["yaxis"] |= {"range": [-0.03, 1.03]}
    return {"data": traces, "layout": layout}


def difference_figure(parts: Sequence[Difference], variants: Sequence[str], *, unit: str) -> Figure:
    """Differences from the baselines: mean with interval, filled in domain, open out of domain; a tick a seed."""
    traces = []
    for domain, symbol, shift in (("in", "circle", 0.16), ("out", "circle-open", -0.16)):
        own = [part for part in parts if part.domain == domain]
        rows = [variants.index(part.variant) for part in own]
        words = "in domain" if domain == "in" else "out of domain"
        seeds = [
            (seed, value, -row + shift)
            for part, row in zip(own, rows, strict=True)
            for seed, value in part.by_seed.items()
        ]
        traces.append(
            _marks([s[1] for s in seeds], [s[2] for s in seeds], symbol="line-ns-open", opacity=0.5)
            | {"text": [f"seed {s[0]}, {words}" for s in seeds]}
        )
        traces.append(
            _marks([part.mean for part in own], [-row + shift for row in rows], symbol=symbol, size=9)
            | {"text": [f"mean, {words}" for _ in own], "error_x": _error_bars(own)}
        )
    layout = _layout(x=f"difference, {unit}", y="")
    layout["height"] = 90 + 44 * len(variants)
    layout["margin"] |= {"l": 140}
    layout["yaxis"] |= {
        "tickvals": [-index for index in range(len(variants))],
        "ticktext": [label(_short(variant)) for variant in variants],
        "range": [-len(variants) + 0.4, 0.6],
        "showgrid": False,
        "zeroline": False,
    }
    layout["xaxis"] |= {"zeroline": True, "zerolinewidth": 1.5}
    return {"data": traces, "layout": layout}


def cloud_figure(cloud: PointCloud) -> Figure:
    """Queries and keys in the plane, a panel for each stage, all panels on the same axes."""
    traces: list[dict[str, Any]] = []
    annotations = []
    stages = list(cloud.stages)
    for index, stage in enumerate(stages):
        axis = "" if index == 0 else str(index + 1)
        points = cloud.stages[stage]
        kinds = (
            ("key (teacher)", points.keys, cloud.key_names, KEY_COLOUR, "diamond"),
            ("query (student)", points.queries, cloud.query_names, QUERY_COLOUR, "circle"),
        )
        for kind, places, names, colour, symbol in kinds:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": [rounded(place[0]) for place in places],
                    "y": [rounded(place[1]) for place in places],
                    "text": [label(f"{name}: {kind}") for name in names],
                    "hovertemplate": "%{text}<extra></extra>",
                    "marker": {"color": colour, "symbol": symbol, "size": 5, "opacity": 0.5},
                    "xaxis": f"x{axis}",
                    "yaxis": f"y{axis}",
                    "showlegend": False,
                }
            )
        middle = (index + 0.5) / len(stages)
        annotations.append(
            {"text": label(f"{stage} training"), "x": middle, "y": 1.09, "xref": "paper", "yref": "paper"}
            | {"showarrow": False, "xanchor": "center", "font": {"size": 13}}
        )
    layout = _layout(x="", y="") | {"annotations": annotations, "width": 704, "height": 390}
    layout["margin"] = {"l": 36, "r": 8, "t": 36, "b": 44}
    for index in range(len(stages)):
        axis = "" if index == 0 else str(index + 1)
        left, right = index / len(stages), (index + 1) / len(stages)
        frame = {"zeroline": False, "automargin": False}
        layout[f"xaxis{axis}"] = (
            frame
            | {
                "domain": [left + 0.015 * (index > 0), right - 0.015 * (index + 1 < len(stages))],
                "title": {"text": f"axis 1 ({cloud.explained[0]:.0%} of the variance)"},
                "anchor": f"y{axis}",
            }
            | ({"matches": "x"} if index else {})
        )
        layout[f"yaxis{axis}"] = (
            frame
            | {"anchor": f"x{axis}", "showticklabels": index == 0}
            | ({"matches": "y"} if index else {"title": {"text": f"axis 2 ({cloud.explained[1]:.0%})"}})
        )
    return {"data": traces, "layout": layout}


def label(text: str) -> str:
    """Text that plotly shows as it is."""
    return html.escape(text, quote=False)


def rounded(value: float) -> float:
    """Five significant digits: what a screen can show."""
    return float(f"{value:.5g}")


def _line(variant: str, curve: Curve, style: LineStyle, *, words: str, is_seed: bool) -> dict[str, Any]:
    few = len(curve.steps) <= 12 and not is_seed
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "x": [rounded(step) for step in curve.steps],
        "y": [rounded(value) for value in curve.values],
        "line": {"color": style.colour, "dash": style.dash, "width": 1 if is_seed else 2.2},
        "marker": {"size": 4},
        "opacity": 0.45 if is_seed else 1,
        "name": label(f"{variant}, {words}"),
        "hovertemplate": "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        "meta": {"variant": variant, "seed": is_seed},
        "showlegend": False,
    }


def _band_trace(variant: str, band: Band, style: LineStyle) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [rounded(step) for step in (*band.steps, *reversed(band.steps))],
        "y": [rounded(value) for value in (*band.low, *reversed(band.high))],
        "fill": "toself",
        "fillcolor": _translucent(style.colour),
        "line": {"width": 0},
        "hoverinfo": "skip",
        "meta": {"variant": variant, "seed": False},
        "showlegend": False,
    }


def _marks(x: Sequence[float], y: Sequence[float], *, symbol: str, size: int = 8, opacity: float = 1.0) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [rounded(value) for value in x],
        "y": list(y),
        "marker": {"symbol": symbol, "size": size, "color": _OTHERS[0], "opacity": opacity, "line": {"width": 2}},
        "hovertemplate": "%{x:+.4g}<br>%{text}<extra></extra>",
        "showlegend": False,
    }


def _error_bars(parts: Sequence[Difference]) -> dict[str, Any]:
    lows = [part.mean if part.low is None else part.low for part in parts]
    highs = [part.mean if part.high is None else part.high for part in parts]
    return {
        "type": "data",
        "symmetric": False,
        "array": [rounded(high - part.mean) for high, part in zip(highs, parts, strict=True)],
        "arrayminus": [rounded(part.mean - low) for low, part in zip(lows, parts, strict=True)],
        "thickness": 1.6,
        "width": 4,
    }


def _layout(*, x: str, y: str) -> dict[str, Any]:
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "margin": {"l": 54, "r": 8, "t": 20, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 11},
        "hovermode": "closest",
        "dragmode": "zoom",
        "showlegend": False,
        "xaxis": {"title": {"text": x, "standoff": 6}, "zeroline": False},
        "yaxis": {"title": {"text": y, "standoff": 4}, "zeroline": False, "nticks": 6},
    }


def _translucent(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"


def _short(name: str, length: int = 20) -> str:
    return name if len(name) <= length else name[: length - 1] + "\u2026"
