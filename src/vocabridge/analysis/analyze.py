"""``vocabridge analyze``: probe, distances, heatmaps and point cloud of finished runs.

What is written to ``RUN/analysis``::

    probe.json                                   measures of the attention: ``probe.ProbeReport``
    distances.json                               distances between queries and keys: ``training_distances``
    points.json, query-key.svg                   both in the plane, before and after training: ``point_cloud``
    heatmaps.json                                attention of a few examples, for other programs: ``heatmap_json``
    heatmaps/example-1.before.page-1.svg         the same as pictures, none of it cut: ``heatmap``

The few examples are the first three and the three with the least attention mass in chunk after training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from vocabridge.analysis.attention import AttentionReader, ExampleAttention
from vocabridge.analysis.finished_run import FinishedRun, check_can_be_analysed, load_finished_run
from vocabridge.analysis.handful import STAGES, DrawnExample, Handful
from vocabridge.analysis.heatmap import heatmap_data, heatmap_pages
from vocabridge.analysis.heatmap_json import HeatmapRecord, heatmaps_json
from vocabridge.analysis.point_cloud import PointCloud, point_cloud
from vocabridge.analysis.probe import ProbeReport, ProbeSource, probe
from vocabridge.analysis.token_names import token_names
from vocabridge.analysis.training_distances import (
    DistanceTable,
    StageDistances,
    data_distances,
    distances_json,
    training_distances,
)
from vocabridge.durable import write_in_one_piece
from vocabridge.errors import UserError
from vocabridge.pairs import IGNORE_INDEX, TokenizedPair, tokenize_examples
from vocabridge.text import read_examples

POINT_EXAMPLES = 32
"""Examples of the point cloud and of the distances on the analysed data: the first ones."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """What was found and where it lies."""

    folder: Path
    probe: ProbeReport
    distances: DistanceTable
    """As logged while the run trained, on its own probe set."""
    data_distances: StageDistances
    """On the first of the analysed examples."""


def analyze_runs(
    run_dirs: Sequence[Path],
    data: str,
    *,
    output_dir: Path | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> list[Analysis]:
    """Analyse runs one after the other, once all of them have been found fit for it.

    Args:
        run_dirs: run folders.
        data: as for :func:`analyze_run`, as is the rest.
        output_dir: for one run only.
        limit: first examples only.
        progress: show progress bars.

    Raises:
        UserError: as for :func:`analyze_run`; or ``output_dir`` for several runs.
    """
    if output_dir is not None and len(run_dirs) > 1:
        raise UserError(f"--output {output_dir} is for one RUN; without it each run gets a folder RUN/analysis.")
    for run_dir in run_dirs:
        check_can_be_analysed(run_dir, data)
    return [analyze_run(each, data, output_dir=output_dir, limit=limit, progress=progress) for each in run_dirs]


def analyze_run(
    run_dir: Path, data: str, *, output_dir: Path | None = None, limit: int | None = None, progress: bool = False
) -> Analysis:
    """Analyse a finished run and write everything to a folder.

    Args:
        run_dir: run folder of an objective with cross-model attention.
        data: JSONL file, datasets folder or hub id with the responses to look at.
        output_dir: default: ``analysis`` in the run folder. Files of an earlier analysis are replaced.
        limit: first examples only.
        progress: show progress bars.

    Raises:
        UserError: the run cannot be analysed, the data cannot be read, or the folder cannot be written.
    """
    folder = output_dir or run_dir / "analysis"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a folder.")
    examples = read_examples(data, limit=limit)
    run = load_finished_run(run_dir, data)
    logged = training_distances(run_dir, part=run.part)
    pairs = list(tokenize_examples(examples, run.pair_tokenizer, progress=progress))
    reader = AttentionReader(run)
    attentions: Iterable[ExampleAttention] = reader.examples(pairs)
    if progress:
        attentions = track(attentions, description="Attending", total=len(pairs))
    handful = Handful()
    source = ProbeSource(run=str(run_dir), objective=run.recipe.objective.name, data=data)
    report = probe(handful.watch(attentions), source)
    points = reader.points(pairs[:POINT_EXAMPLES])
    on_data = data_distances(points)
    cloud = point_cloud(points, *_point_names(run, pairs[:POINT_EXAMPLES]))
    _write(
        folder,
        {
            "probe.json": report.to_json() + "\n",
            "distances.json": distances_json(logged, on_data) + "\n",
            "points.json": cloud.to_json() + "\n",
            "query-key.svg": _picture(cloud, len(pairs)),
            **_heatmaps(run, handful.drawn()),
        },
    )
    return Analysis(folder, report, logged, on_data)


def _heatmaps(run: FinishedRun, drawn: Sequence[DrawnExample]) -> dict[str, str]:
    """JSON and SVG by file name."""
    files, records = {}, []
    for item in drawn:
        heatmaps = {stage: heatmap_data(item.example, stage, pair_tokenizer=run.pair_tokenizer) for stage in STAGES}
        name = f"example {item.number}"
        records.append(HeatmapRecord(name, item.chosen, heatmaps, item.mass_in_chunk))
        for stage, data in heatmaps.items():
            for page, svg in enumerate(heatmap_pages(data, title=f"{name}, {stage} training"), start=1):
                files[f"heatmaps/example-{item.number}.{stage}.page-{page}.svg"] = svg
    return {"heatmaps.json": heatmaps_json(records) + "\n", **files}


def _picture(cloud: PointCloud, num_examples: int) -> str:
    return cloud.to_svg(f"Queries and keys of {min(num_examples, POINT_EXAMPLES)} examples")


def _point_names(run: FinishedRun, pairs: Sequence[TokenizedPair]) -> tuple[list[str], list[str]]:
    """Of queries and keys: the tokens that their positions predict."""
    assert run.pair_tokenizer.teacher is not None
    student = [pair.student for pair in pairs]
    teacher = [pair.teacher for pair in pairs if pair.teacher is not None]
    queries, keys = (
        [label for side in sides for label in side.labels if label != IGNORE_INDEX] for sides in (student, teacher)
    )
    return (
        token_names(run.pair_tokenizer.student.tokenizer, queries),
        token_names(run.pair_tokenizer.teacher.tokenizer, keys),
    )


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        (folder / "heatmaps").mkdir(parents=True, exist_ok=True)
        for stale in (folder / "heatmaps").glob("example-*.svg"):
            stale.unlink()
        for name, text in files.items():
            write_in_one_piece(folder / name, text)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {error.strerror}.") from error
