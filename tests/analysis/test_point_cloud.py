"""The principal plane against its definition, and the picture's points."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from vocabridge.analysis.attention import Points
from vocabridge.analysis.point_cloud import MAX_POINTS, point_cloud, principal_plane
from vocabridge.objectives._cross_model_attention import QueryKeys

SVG = "{http://www.w3.org/2000/svg}"


def test_plane_keeps_the_most_variance_and_says_how_much() -> None:
    rng = np.random.default_rng(0)
    clouds = [rng.normal(size=(30, 6)) * [1, 5, 1, 3, 1, 1] + 2, rng.normal(size=(17, 6))]
    projection = principal_plane(clouds)
    pooled = np.concatenate(clouds)
    values, vectors = np.linalg.eigh(np.cov(pooled.T))
    for axis in range(2):
        expected = (pooled - pooled.mean(0)) @ vectors[:, -1 - axis]
        found = np.concatenate(projection.clouds)[:, axis]
        assert abs(np.corrcoef(expected, found)[0, 1]) == pytest.approx(1)
        assert found.var(ddof=1) == pytest.approx(values[-1 - axis])
        assert projection.explained[axis] == pytest.approx(values[-1 - axis] / values.sum())
    assert [len(cloud) for cloud in projection.clouds] == [30, 17]
    model = PCA(n_components=2).fit(pooled)
    np.testing.assert_allclose(np.abs(np.concatenate(projection.clouds)), np.abs(model.transform(pooled)), atol=1e-9)
    np.testing.assert_allclose(projection.explained, model.explained_variance_ratio_)


def test_plane_depends_on_the_data_alone() -> None:
    rng = np.random.default_rng(1)
    cloud = rng.normal(size=(20, 4)) * [4, 2, 1, 1]
    order = rng.permutation(20)
    first, second = principal_plane([cloud]).clouds[0], principal_plane([cloud[order]]).clouds[0]
    np.testing.assert_allclose(first[order], second, atol=1e-9)


def test_equal_points_have_a_plane() -> None:
    assert not principal_plane([np.ones((3, 4))]).clouds[0].any()


def sides(num_queries: int, num_keys: int, seed: int) -> QueryKeys:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(count, 8, generator=generator) for count in (num_queries, num_keys))
    rows = [torch.zeros(count, dtype=torch.int64) for count in (num_queries, num_keys)]
    return QueryKeys(queries, queries, keys, rows[0], rows[1], 1)


def test_picture_shows_all_points_twice_and_escapes_names() -> None:
    names = [f"<q{index}>&" for index in range(9)], [f"k{index}" for index in range(7)]
    svg = point_cloud(Points(sides(9, 7, 0), sides(9, 7, 1)), names[0], names[1]).to_svg("<i>")
    root = ElementTree.fromstring(svg)
    told = [circle.find(f"{SVG}title").text for circle in root.iter(f"{SVG}circle") if len(circle)]
    assert sorted(told) == sorted([*names[0], *names[1]] * 2)
    assert "<i>" not in svg
    width = float(root.get("width"))
    assert all(0 < float(circle.get("cx")) < width for circle in root.iter(f"{SVG}circle"))


def test_many_points_are_thinned() -> None:
    names = [["q"] * 2000, ["k"] * 30]
    cloud = point_cloud(Points(sides(2000, 30, 0), sides(2000, 30, 1)), names[0], names[1])
    svg = cloud.to_svg("")
    assert svg.count("<title>q") == 2 * MAX_POINTS
    assert svg.count("<title>k") == 60


def test_json_has_the_points_of_both_moments_on_the_axes_of_all() -> None:
    points = Points(sides(9, 7, 0), sides(9, 7, 1))
    found = json.loads(point_cloud(points, [f"q{index}" for index in range(9)], ["k"] * 7).to_json())
    parts = [points.before.queries, points.before.keys, points.after.queries, points.after.keys]
    model = PCA(n_components=2).fit(torch.cat(parts).double().numpy())
    stages = [found["stages"][name][kind] for name in ("before", "after") for kind in ("queries", "keys")]
    for part, stage in zip(parts, stages, strict=True):
        expected = model.transform(part.double().numpy())
        np.testing.assert_allclose(np.abs(stage), np.abs(expected), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["explained"], model.explained_variance_ratio_, rtol=1e-4)
    assert (found["query_names"][8], len(found["key_names"])) == ("q8", 7)


def test_one_scale_for_both_moments_and_axes() -> None:
    before, after = sides(9, 7, 0), sides(9, 7, 1)
    svg = point_cloud(Points(before, after), ["q"] * 9, ["k"] * 7).to_svg("")
    found = json.loads(point_cloud(Points(before, after), ["q"] * 9, ["k"] * 7).to_json())["stages"]
    circles = [
        (float(circle.get("cx")), float(circle.get("cy")))
        for circle in ElementTree.fromstring(svg).iter(f"{SVG}circle")
        if len(circle)
    ]
    told = [point for name in ("before", "after") for kind in ("keys", "queries") for point in found[name][kind]]
    for panel in (slice(0, 16), slice(16, 32)):
        pixels, values = np.array(circles[panel]), np.array(told[panel])
        right, up = np.polyfit(values[:, 0], pixels[:, 0], 1)[0], np.polyfit(values[:, 1], pixels[:, 1], 1)[0]
        assert right == pytest.approx(-up, rel=1e-3)
        assert right == pytest.approx(324 / np.ptp(np.array(told), axis=0).max(), rel=1e-3)
