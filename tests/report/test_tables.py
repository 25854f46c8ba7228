"""Tables and charts hold the numbers of the files they were made from."""

from __future__ import annotations

import html
import json
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import plotly.graph_objects as go
import pytest

import report_cases
from vocabridge.report.collect import Report, collect
from vocabridge.report.facts import commands, cost_table, environment_table, pair_tables, recipes
from vocabridge.report.figures import line_styles
from vocabridge.report.probe_tables import cloud_charts, heatmap_browser, probe_tables
from vocabridge.report.results_tables import results
from vocabridge.report.training_charts import Training, training
from vocabridge.report.view import Table
from vocabridge.study.plan import load_study


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return collect(report_cases.finished_study(tmp_path_factory.mktemp("study")))


def trained(report: Report) -> Training:
    return training(report, line_styles(report.variants, report.baseline))


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def scores(report: Report, variant: str, metric: str, key: str) -> list[float]:
    """From the evaluations' files, not from study.json."""
    values = []
    for run in report.runs_of(variant):
        found = json.loads((run.folder / "evaluation" / "results.json").read_text(encoding="utf-8"))[key][metric]
        values.append(found["mean"] if isinstance(found, dict) else found)
    return values


@pytest.mark.parametrize(("index", "key"), [(0, "in_domain"), (1, "out_of_domain")])
def test_results_hold_mean_deviation_and_difference(report: Report, index: int, key: str) -> None:
    table = results(report).averages[index]
    assert table.caption.startswith(f"ROUGE-L, {key.replace('_', '-')} average")
    baseline = scores(report, "cma", "rouge_l", key)
    for row, variant in zip(texts(table), ("cma", "cma_ga", "sft"), strict=True):
        values = scores(report, variant, "rouge_l", key)
        assert row[:3] == [row[0], "3", f"{fmean(values):.2f} \u00b1 {stdev(values):.2f}"]
        assert row[0].split()[0] == variant
        if variant != "cma":
            assert row[4].split()[0] == f"{fmean(values) - fmean(baseline):+.2f}"
            assert row[5] in ("0.250", "0.500")  # what two sign-flip tests of three seeds can say after Holm
    assert set(texts(table)[0][4:]) == {"\u2013"}


def test_a_variant_with_a_baseline_of_its_own(tmp_path: Path) -> None:
    path = report_cases.finished_study(tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + "baselines: {sft: cma_ga}\n", encoding="utf-8")
    report = collect(path)
    found = results(report)
    assert [row[0] for row in texts(found.averages[0])] == ["cma (baseline)", "cma_ga", "sft (against cma_ga)"]
    assert found.charts[0].title == "ROUGE-L against cma (sft against cma_ga)"
    ours, theirs = (scores(report, variant, "rouge_l", "in_domain") for variant in ("sft", "cma_ga"))
    assert found.charts[0].figure["data"][0]["x"][3:] == pytest.approx(np.subtract(ours, theirs), rel=1e-4)


def test_every_metric_has_both_averages_and_both_files(report: Report) -> None:
    found = results(report)
    assert len(found.averages) == 6
    assert len(found.files) == 6
    assert [chart.key for chart in found.charts] == [
        f"difference-{m}" for m in ("rouge_l", "exact_match", "bits_per_byte")
    ]


def test_difference_chart_shows_every_seed(report: Report) -> None:
    figure = results(report).charts[0].figure
    ours, theirs = (scores(report, variant, "rouge_l", "in_domain") for variant in ("cma_ga", "cma"))
    drawn = figure["data"][0]["x"][:3]
    assert drawn == pytest.approx(np.subtract(ours, theirs), rel=1e-4)
    assert figure["data"][1]["x"][0] == pytest.approx(fmean(drawn), rel=1e-3)


def test_all_figures_are_what_plotly_takes(report: Report) -> None:
    found = trained(report)
    charts = [*results(report).charts, *found.losses, *found.others, *found.stability, *found.distances]
    charts += cloud_charts(report)
    assert len(charts) > 15
    for chart in charts:
        go.Figure(chart.figure)  # names every property that it does not know
        json.dumps(chart.figure, allow_nan=False)


def test_labels_from_data_are_not_plotlys_markup(tmp_path: Path) -> None:
    hostile = collect(report_cases.hostile_study(tmp_path))
    charts = [*results(hostile).charts, *trained(hostile).losses, *cloud_charts(hostile)]
    labels: list[str] = []
    for chart in charts:
        for trace in chart.figure["data"]:
            text = trace.get("text", [])
            labels += [trace.get("name", ""), *text]
        layout = chart.figure["layout"]
        labels += layout["yaxis"].get("ticktext", []) + [note["text"] for note in layout.get("annotations", [])]
    marked = [label for label in labels if "script" in label]
    assert len(marked) > 50
    for label in marked:
        assert "<" not in label
        assert "<script>" in html.unescape(label)
    assert any("<b>&amp;" in html.unescape(label) for label in marked)


def test_loss_chart_has_seeds_mean_and_band(report: Report) -> None:
    (chart,) = [chart for chart in trained(report).losses if chart.key == "curve-loss"]
    own = [trace for trace in chart.figure["data"] if trace["meta"]["variant"] == "cma"]
    lowest_highest, *seeds, mean = own
    assert [trace["meta"]["seed"] for trace in own] == [False, True, True, True, False]
    by_step = [dict(zip(trace["x"], trace["y"], strict=True)) for trace in seeds]
    assert 30 not in by_step[1]  # not a number there
    assert by_step[0].keys() - by_step[1].keys() == {30}
    assert mean["x"] == sorted(by_step[1])
    assert mean["y"] == pytest.approx([fmean(values[x] for values in by_step) for x in mean["x"]], rel=1e-4)
    count = len(mean["x"])
    assert lowest_highest["y"][:count] == [min(values[x] for values in by_step) for x in mean["x"]]
    assert lowest_highest["y"][count:] == [max(values[x] for values in by_step) for x in reversed(mean["x"])]


def test_every_logged_name_has_one_place(report: Report) -> None:
    found = trained(report)
    names = {run_name for run in report.runs for run_name in run.log}
    parts = [found.losses, found.others, found.stability, found.distances]
    shown = [chart.key.removeprefix("curve-") for part in parts for chart in part]
    assert len(shown) == len(set(shown))
    assert names - set(shown) == {"epoch", "train_runtime", "train_steps_per_second"}
    assert {chart.key for chart in found.stability} >= {
        "curve-query_gradient_ratio",
        "curve-discriminator_key_accuracy",
    }


def test_divergence_and_failure_are_told(report: Report, tmp_path: Path) -> None:
    assert trained(report).failures == tuple(
        f"{variant}, seed 1 diverged: loss is not finite from step 30 on." for variant in ("cma", "cma_ga", "sft")
    )
    partial = trained(collect(report_cases.partial_study(tmp_path)))
    assert any("failed: UserError: loss term 'dskd_cma' is not finite" in line for line in partial.failures)
    assert len(partial.runs.rows) == 9


def test_distances_before_halfway_and_after(report: Report) -> None:
    table = trained(report).before_after
    assert table is not None
    rows = {(row[0], row[1]): row for row in texts(table)}
    assert {variant for variant, _ in rows} == {"cma (baseline)", "cma_ga"}
    series = [run.log["probe/mmd_squared"] for run in report.runs_of("cma")]
    row = rows["cma (baseline)", "MMD\u00b2, kernels of the pooled sample"]
    for column, step in ((3, 0), (4, 20), (5, 60)):
        values = [points[step] for points in series]
        assert row[column] == f"{fmean(values):.3g} \u00b1 {stdev(values):.2g}"
    assert row[6:] == ["\u2013", "\u2013"], "the baseline itself"
    ours = [run.log["probe/mmd_squared"][60] for run in report.runs_of("cma_ga")]
    theirs = [points[60] for points in series]
    difference, p_value = rows["cma_ga", "MMD\u00b2, kernels of the pooled sample"][6:]
    assert difference == f"{fmean(ours) - fmean(theirs):+.2g}"
    assert p_value in ("0.250", "0.500", "0.750", "1.000"), "what the sign flips of three seeds can give"
    assert rows["cma (baseline)", "Two-sample classifier accuracy"][2] == "2"  # one seed has none


def test_probe_tables_have_intervals(report: Report) -> None:
    found = probe_tables(report)
    assert found is not None
    assert len(found.runs.rows) == 6
    assert [cell.text for cell in found.runs.rows[0]][:4] == [
        "cma, seed 0",
        "0.300 [0.200, 0.400]",
        "0.700 [0.600, 0.800]",
        "+0.400 [+0.350, +0.450]",
    ]
    groups = texts(found.details[0].groups)
    assert len(groups) == 6 + 3
    dash = "\u2013"
    effect = ["teacher bigram", "repeated less unique", "after training", dash, dash]
    assert groups[-1] == [*effect, "-0.350 [-0.700, +0.000]", dash]
    assert texts(found.details[0].overall)[0][:3] == ["uniform: knows nothing", "1,234", "1.00"]


def test_heatmaps_take_turns_until_there_is_no_room(report: Report) -> None:
    everything = heatmap_browser(report)
    assert [entry["run"] for entry in everything.data][:3] == ["cma, seed 0", "cma_ga, seed 0", "cma, seed 1"]
    assert everything.left_out == ()
    size = len(json.dumps(everything.data[0], ensure_ascii=False))
    some = heatmap_browser(report, max_chars=3 * size + 20)
    assert [entry["run"] for entry in some.data] == ["cma, seed 0", "cma_ga, seed 0", "cma, seed 1"]
    assert some.left_out == ("cma_ga, seed 1", "cma, seed 2", "cma_ga, seed 2")
    example = everything.data[0]["examples"][1]
    assert example["name"] == "example 2 (least in chunk)"
    assert example["note"].startswith("The first 90 of the response's 300")
    assert [attention["name"] for attention in example["attentions"]] == [
        "before training, 0.25 in chunk",
        "after training",
    ]
    assert everything.data[0]["examples"][0]["attentions"][1]["cells"][:6] == [0, 0, 912, 1, 1, 800]


def test_cost_is_of_training_where_the_log_has_it(report: Report) -> None:
    table = cost_table(report)
    assert table is not None
    assert texts(table)[0] == ["cma", "3", f"{31 / 4:.3f}", "8 s", "\u2013", "\u2013", "cpu"]


def test_memory_and_tokens_are_shown_where_logged(tmp_path: Path) -> None:
    report_cases.write_run(tmp_path, seed=0)
    facts = {
        "before_init_mem_cpu": 2e8,
        "train_mem_cpu_alloc_delta": 1e8,
        "train_mem_cpu_peaked_delta": 4e8,
        "num_input_tokens_seen": 12345,
        "step": 60,
    }
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(facts) + "\n")
    table = cost_table(collect(tmp_path))
    assert table is not None
    assert texts(table)[0][2:6] == ["0.500", "30 s", "700 MB", "12,345"]


def test_recipes_name_what_differs(report: Report) -> None:
    found = recipes(report)
    assert found.differences is not None
    assert found.differences.headings == ("key", "cma", "cma_ga", "sft")
    rows = {row[0]: row[1:] for row in texts(found.differences)}
    assert rows["objective.matching"] == ["none", "gan", "\u2013"]
    assert rows["teacher.model"] == ["org/teacher", "org/teacher", "\u2013"]
    assert "training.seed" not in rows
    assert "training.output_dir" not in rows
    assert "student.model" not in rows
    assert [each.variant for each in found.texts] == ["cma", "cma_ga", "sft"]


def test_environment_counts_what_is_not_the_same(report: Report, tmp_path: Path) -> None:
    table = environment_table(report)
    assert table is not None
    assert ["git_commit", "c0ffee"] in texts(table)
    mixed = report_cases.finished_study(tmp_path)
    changed = collect(mixed).runs[0].folder / "run.json"
    report_cases.write_json(changed, report_cases.run_record(0, git_commit="beef"))
    table = environment_table(collect(mixed))
    assert table is not None
    assert ["git_commit", "beef (1 runs); c0ffee (8 runs)"] in texts(table)


def test_commands_can_be_typed(tmp_path: Path) -> None:
    study = report_cases.write_study(tmp_path)
    runs = load_study(study).runs
    recorded = {
        0: ["/x/vocabridge/study/child.py", str(runs[0].folder)],
        1: ["/x/vocabridge/study/child.py", str(runs[1].folder)],
        2: ["/x/bin/vocabridge", "distill", "my recipe.yaml", "training.seed=1"],
        3: ["/x/vocabridge/__main__.py", "distill", "r.yaml"],
        4: ["/x/lab/notebook.py", "-f", "kernel.json"],
        5: [],
    }
    for index, command in recorded.items():
        report_cases.write_json(runs[index].folder / "run.json", report_cases.run_record(0, command=command))
    assert commands(collect(study)) == [
        f"vocabridge study {study}",
        "vocabridge distill 'my recipe.yaml' training.seed=1",
        "vocabridge distill r.yaml",
    ]
    # Alone, the run does not know its study; its recipe lies beside it.
    alone = commands(collect(runs[0].folder))
    assert alone == [f"vocabridge distill {runs[0].folder / 'study-recipe.yaml'} --resume"]


def test_pair_tables(report: Report) -> None:
    assert report.pair is not None
    sides, chunks = pair_tables(report.pair)
    assert ["shared share", "51.2%", "51.2%"] in texts(sides)
    assert ["1:1 share", "70.0%", "70.0%"] in texts(sides)
    assert texts(chunks) == [["1:1", "700", "87.5%"], ["2:1", "80", "10.0%"], ["1:2", "20", "2.5%"]]


def test_a_single_run_shows_its_own_scores(report: Report) -> None:
    found = results(collect(report.runs[0].folder))
    (table,) = found.averages
    assert [row[:2] for row in texts(table)] == [["test", "in"], ["other", "out"]]
    assert found.charts == ()


def test_ten_variants_are_drawn_differently() -> None:
    styles = line_styles([f"v{index}" for index in range(10)], "v3")
    assert len({(style.colour, style.dash) for style in styles.values()}) == 10
