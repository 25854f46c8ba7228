"""``vocabridge analyze``: probe, distances over training, heatmaps and point cloud of a finished run.

::

    probe.json                                   measures of the attention, see ``probe``
    distances.json                               distances between queries and keys, by step
    query-key.svg                                queries and keys in the plane, before and after training
    heatmaps/example-1.before.page-1.svg         attention of the first examples
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from vocabridge.analysis.attention import AttentionName, AttentionReader, ExampleAttention
from vocabridge.analysis.finished_run import FinishedRun, load_finished_run
from vocabridge.analysis.heatmap import heatmap_data, heatmap_pages
from vocabridge.analysis.point_cloud import query_key_picture
from vocabridge.analysis.probe import ProbeReport, ProbeSource, probe
from vocabridge.analysis.token_names import token_names
from vocabridge.analysis.training_distances import DistanceTable, training_distances
from vocabridge.errors import UserError
from vocabridge.pairs import IGNORE_INDEX, TokenizedPair, tokenize_examples
from vocabridge.text import read_examples

HEATMAP_EXAMPLES = 4
POINT_EXAMPLES = 32
_HEATMAP_STAGES: tuple[AttentionName, ...] = ("before", "after")


@dataclass(frozen=True, slots=True)
class Analysis:
    """What was found and where it lies."""

    folder: Path
    probe: ProbeReport
    distances: DistanceTable


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
    distances = training_distances(run_dir)
    pairs = list(tokenize_examples(examples, run.pair_tokenizer, progress=progress))
    reader = AttentionReader(run)
    attentions: Iterable[ExampleAttention] = reader.examples(pairs)
    if progress:
        attentions = track(attentions, description="Attending", total=len(pairs))
    first: list[ExampleAttention] = []
    report = probe(
        _keeping(attentions, first), ProbeSource(run=str(run_dir), objective=run.recipe.objective.name, data=data)
    )
    _write(
        folder,
        {
            "probe.json": report.to_json() + "\n",
            "distances.json": distances.to_json() + "\n",
            "query-key.svg": _points_picture(run, reader, pairs[:POINT_EXAMPLES]),
            **_heatmaps(run, first),
        },
    )
    return Analysis(folder, report, distances)


def _keeping(examples: Iterable[ExampleAttention], kept: list[ExampleAttention]) -> Iterator[ExampleAttention]:
    """Pass examples on and keep the first ones, so that not all of them lie in memory."""
    for example in examples:
        if len(kept) < HEATMAP_EXAMPLES:
            kept.append(example)
        yield example


def _heatmaps(run: FinishedRun, examples: Sequence[ExampleAttention]) -> dict[str, str]:
    """SVG by file name."""
    files = {}
    for number, example in enumerate(examples, start=1):
        for stage in _HEATMAP_STAGES:
            title = f"example {number}, {stage} training"
            data = heatmap_data(example, stage, pair_tokenizer=run.pair_tokenizer, title=title)
            for page, svg in enumerate(heatmap_pages(data), start=1):
                files[f"heatmaps/example-{number}.{stage}.page-{page}.svg"] = svg
    return files


def _points_picture(run: FinishedRun, reader: AttentionReader, pairs: Sequence[TokenizedPair]) -> str:
    assert run.pair_tokenizer.teacher is not None
    names = []
    for tokenizer, sides in (
        (run.pair_tokenizer.student.tokenizer, [pair.student for pair in pairs]),
        (run.pair_tokenizer.teacher.tokenizer, [pair.teacher for pair in pairs if pair.teacher is not None]),
    ):
        names.append(
            token_names(tokenizer, (label for side in sides for label in side.labels if label != IGNORE_INDEX))
        )
    title = f"Queries and keys of {len(pairs)} examples"
    return query_key_picture(reader.points(pairs), names[0], names[1], title=title)


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        (folder / "heatmaps").mkdir(parents=True, exist_ok=True)
        for stale in (folder / "heatmaps").glob("example-*.svg"):
            stale.unlink()
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {error.strerror}.") from error
