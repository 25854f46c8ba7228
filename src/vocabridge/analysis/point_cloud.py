"""Queries and keys in the plane: the first two principal axes of all of them together, before and after training.

Axis letters: N queries, M keys, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vocabridge.analysis.attention import Points
from vocabridge.analysis.svg import Box, Drawing

MAX_POINTS = 512
"""Of each kind."""

QUERY_COLOUR, KEY_COLOUR = "#0b5cad", "#d1242f"

_PANEL, _MARGIN, _TOP = 340.0, 20.0, 60.0


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """Points on two axes that are the same for all kinds."""

    clouds: tuple[np.ndarray, ...]
    """``[N, 2]`` of each kind, in the order given."""
    explained: tuple[float, float]
    """Share of the variance along each axis."""


@dataclass(frozen=True, slots=True, eq=False)
class NamedPoints:
    """One kind of points: where, and what each of them is."""

    points: np.ndarray
    """``[N, 2]``"""
    names: Sequence[str]


def principal_plane(clouds: Sequence[np.ndarray]) -> Projection:
    """Project clouds ``[N_k, F]`` on the first two principal axes of all their points, F >= 2.

    Each axis points to where the largest coefficient is positive, so that equal data give equal pictures.
    """
    pooled = np.concatenate([np.asarray(cloud, dtype=np.float64) for cloud in clouds])
    centre = pooled.mean(0)
    _, scales, axes = np.linalg.svd(pooled - centre, full_matrices=False)
    plane = axes[:2].T  # [F, 2]
    plane = plane * np.where(plane[np.abs(plane).argmax(0), np.arange(plane.shape[1])] < 0, -1.0, 1.0)
    total = max(float((scales**2).sum()), np.finfo(float).tiny)
    shares = [float(scale**2) / total for scale in scales[:2]]
    return Projection(tuple((cloud - centre) @ plane for cloud in clouds), (shares[0], shares[1]))


def query_key_picture(points: Points, query_names: Sequence[str], key_names: Sequence[str], *, title: str) -> str:
    """SVG with two panels, before and after training, on common axes and scales.

    Args:
        points: queries and keys.
        query_names: ``N`` tokens, shown when the pointer rests on a point.
        key_names: ``M``.
        title: of the picture.
    """
    chosen = [_spread(len(names)) for names in (query_names, key_names)]
    kinds = [
        (part[of].double().numpy())
        for stage in (points.before, points.after)
        for part, of in ((stage.queries, chosen[0]), (stage.keys, chosen[1]))
    ]
    projection = principal_plane(kinds)
    names = [[all_names[index] for index in of] for all_names, of in zip((query_names, key_names), chosen, strict=True)]
    scale = max(float(np.abs(cloud).max(initial=0)) for cloud in projection.clouds) or 1.0
    drawing = Drawing(width=2 * _PANEL + 3 * _MARGIN, height=_TOP + _PANEL + 36)
    drawing.describe(title)
    drawing.text(_MARGIN, 18, title, size=13)
    for panel, heading in enumerate(("before training", "after training")):
        frame = Box(_MARGIN + panel * (_PANEL + _MARGIN), _TOP, _PANEL, _PANEL)
        drawing.text(frame.x, _TOP - 8, heading)
        drawing.rectangle(frame, stroke="#d0d7de")
        queries, keys = projection.clouds[2 * panel], projection.clouds[2 * panel + 1]
        _draw_points(drawing, NamedPoints(keys, names[1]), frame, scale=scale, colour=KEY_COLOUR)
        _draw_points(drawing, NamedPoints(queries, names[0]), frame, scale=scale, colour=QUERY_COLOUR)
    _draw_legend(drawing, projection)
    return drawing.to_svg()


def _draw_points(drawing: Drawing, cloud: NamedPoints, frame: Box, *, scale: float, colour: str) -> None:
    half = frame.width / 2
    for (right, up), name in zip(cloud.points / scale * (half - 8), cloud.names, strict=True):
        drawing.circle(frame.x + half + right, frame.y + half - up, fill=colour, tooltip=name)


def _draw_legend(drawing: Drawing, projection: Projection) -> None:
    y = _TOP + _PANEL + 20
    for x, colour, words in ((_MARGIN, QUERY_COLOUR, "queries (student)"), (190.0, KEY_COLOUR, "keys (teacher)")):
        drawing.circle(x + 4, y - 4, fill=colour, radius=4)
        drawing.text(x + 14, y, words)
    shares = " and ".join(f"{share:.1%}" for share in projection.explained)
    drawing.text(330, y, f"principal axes of all points: {shares} of the variance")


def _spread(count: int) -> list[int]:
    """At most :data:`MAX_POINTS` indices, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int)).tolist()
