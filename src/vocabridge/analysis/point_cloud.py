"""Queries and keys in the plane: the first two principal axes of all of them together, before and after training.

Axis letters: N queries, M keys, F features. ``points.json``, five significant digits::

    {"explained": [0.22, 0.08],                       share of the variance along each axis
     "stages": {"before": {"queries": [[x, y], ...],   N points
                           "keys":    [[x, y], ...]},  M points
                "after":  {...}},                      the same tokens in the same order, on the same axes
     "query_names": ["a", ...], "key_names": [...]}    N and M labels, as ``token_names`` spells them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

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


@dataclass(frozen=True, slots=True, eq=False)
class StagePoints:
    """One moment of the run."""

    queries: np.ndarray
    """``[N, 2]``"""
    keys: np.ndarray
    """``[M, 2]``"""


@dataclass(frozen=True, slots=True, eq=False)
class PointCloud:
    """Queries and keys before and after training on common axes."""

    before: StagePoints
    after: StagePoints
    query_names: Sequence[str]
    """``N`` tokens, shown when the pointer rests on a point."""
    key_names: Sequence[str]
    """``M``"""
    explained: tuple[float, float]
    """Share of the variance along each axis."""

    def to_json(self) -> str:
        """``points.json``, see the module."""
        stages = {
            name: {"queries": _rounded(stage.queries), "keys": _rounded(stage.keys)}
            for name, stage in (("before", self.before), ("after", self.after))
        }
        values = {
            "explained": [float(f"{share:.5g}") for share in self.explained],
            "stages": stages,
            "query_names": list(self.query_names),
            "key_names": list(self.key_names),
        }
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"))

    def to_svg(self, title: str) -> str:
        """Two panels, before and after training, on one scale."""
        drawing = Drawing(width=2 * _PANEL + 3 * _MARGIN, height=_TOP + _PANEL + 36)
        drawing.describe(title)
        drawing.text(_MARGIN, 18, title, size=13)
        view = _View.of(self)
        for panel, (heading, stage) in enumerate((("before training", self.before), ("after training", self.after))):
            frame = Box(_MARGIN + panel * (_PANEL + _MARGIN), _TOP, _PANEL, _PANEL)
            drawing.text(frame.x, _TOP - 8, heading)
            drawing.rectangle(frame, stroke="#d0d7de")
            for points, names, colour in (
                (stage.keys, self.key_names, KEY_COLOUR),
                (stage.queries, self.query_names, QUERY_COLOUR),
            ):
                for (right, down), name in zip(view.pixels(points, frame), names, strict=True):
                    drawing.circle(right, down, fill=colour, tooltip=name)
        _draw_legend(drawing, self.explained)
        return drawing.to_svg()


def point_cloud(points: Points, query_names: Sequence[str], key_names: Sequence[str]) -> PointCloud:
    """At most :data:`MAX_POINTS` evenly spaced queries and keys on the principal axes of both kinds and moments.

    Args:
        points: N queries and M keys, before and after training.
        query_names: of all N.
        key_names: of all M.
    """
    chosen = _spread(len(query_names)), _spread(len(key_names))
    kinds = [
        rows[of].double().numpy()
        for stage in (points.before, points.after)
        for rows, of in ((stage.queries, chosen[0]), (stage.keys, chosen[1]))
    ]
    projection = principal_plane(kinds)
    return PointCloud(
        before=StagePoints(*projection.clouds[:2]),
        after=StagePoints(*projection.clouds[2:]),
        query_names=[query_names[index] for index in chosen[0]],
        key_names=[key_names[index] for index in chosen[1]],
        explained=projection.explained,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """The square around all points of both moments."""

    centre: np.ndarray
    """``[2]``"""
    half: float

    @classmethod
    def of(cls, cloud: PointCloud) -> _View:
        stages = cloud.before, cloud.after
        points = np.concatenate(list(chain.from_iterable((stage.queries, stage.keys) for stage in stages)))
        low, high = points.min(0), points.max(0)
        return cls((low + high) / 2, float((high - low).max()) / 2 or 1.0)

    def pixels(self, points: np.ndarray, frame: Box) -> list[tuple[float, float]]:
        """Where points ``[N, 2]`` stand in a frame, in pixels."""
        half = frame.width / 2
        offsets = (points - self.centre) / self.half * (half - 8) * [1, -1]
        return [(frame.x + half + right, frame.y + half + down) for right, down in offsets.tolist()]


def _draw_legend(drawing: Drawing, explained: tuple[float, float]) -> None:
    y = _TOP + _PANEL + 20
    for x, colour, words in ((_MARGIN, QUERY_COLOUR, "queries (student)"), (190.0, KEY_COLOUR, "keys (teacher)")):
        drawing.circle(x + 4, y - 4, fill=colour, radius=4)
        drawing.text(x + 14, y, words)
    shares = " and ".join(f"{share:.1%}" for share in explained)
    drawing.text(330, y, f"principal axes of all points: {shares} of the variance")


def _spread(count: int) -> list[int]:
    """At most :data:`MAX_POINTS` indices, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int)).tolist()


def _rounded(points: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in point] for point in points]
