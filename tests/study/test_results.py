"""What a study concludes from the files of its runs, against numbers worked out by hand or by plain loops."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from rich.console import Console

from study_cases import WriteStudy, finish
from vocabridge.study.estimate import estimate, total_seconds
from vocabridge.study.plan import StudyPlan, load_study
from vocabridge.study.results import StudyResult, study_results, write_results
from vocabridge.study.statistics import seeds_needed
from vocabridge.study.status import RunStatus, current_status, write_status
from vocabridge.study.tables import plan_table, result_tables, unfinished_lines

SAMPLING = (10, 20)
GAIN = {"cma": 0.0, "cma_ga": 0.05, "sft": -0.10}
NUM = {"test": 4, "other": 3, "third": 2}


def rouge(variant: str, seed: int, sampling: int, file: str, example: int) -> float:
    """Some score in [0, 1] for every example, the same wherever it is asked for."""
    noise = math.sin(1000 * seed + 100 * sampling + 10 * example + 7 * list(GAIN).index(variant) + len(file))
    return 0.5 + GAIN[variant] + 0.1 * noise


def examples(variant: str, seed: int) -> dict[str, dict[int, list[float]]]:
    return {
        file: {
            sampling: [rouge(variant, seed, sampling, file, example) for example in range(num)] for sampling in SAMPLING
        }
        for file, num in NUM.items()
    }


@pytest.fixture
def plan(write_study: WriteStudy) -> StudyPlan:
    """Three files: the first in-domain, the others out-of-domain; nothing is finished."""
    return load_study(write_study(evaluation={"data": ["org/test", "org/other", "org/third"], "seeds": [10, 20]}))


@pytest.fixture
def finished(plan: StudyPlan) -> StudyPlan:
    """All is done but seed 2 of cma_ga."""
    for run in plan.runs:
        if (run.variant, run.seed) != ("cma_ga", 2):
            finish(run, examples(run.variant, run.seed), bits=2.0 - GAIN[run.variant] + 0.01 * run.seed)
    return plan


def one(records: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = [record for record in records if all(record[key] == value for key, value in wanted.items())]
    return found


def score(variant: str, seed: int, files: list[str]) -> float:
    """ROUGE-L in percent: examples, then sampling seeds, then files averaged."""
    return 100 * fmean(
        fmean(fmean(rouge(variant, seed, s, file, e) for e in range(NUM[file])) for s in SAMPLING) for file in files
    )


SCOPES = {"test": ["test"], "third": ["third"], "in-domain": ["test"], "out-of-domain": ["other", "third"]}


@pytest.mark.parametrize("scope", SCOPES)
def test_means_over_seeds_with_sampling_seeds_averaged_first(finished: StudyPlan, scope: str) -> None:
    records = study_results(finished).to_dict()
    for variant, seeds in (("cma", [0, 1, 2]), ("cma_ga", [0, 1])):
        values = [score(variant, seed, SCOPES[scope]) for seed in seeds]
        found = one(records["summaries"], variant=variant, metric="rouge_l", scope=scope)
        assert found["mean"] == pytest.approx(fmean(values))
        assert found["std"] == pytest.approx(stdev(values))
        assert found["seeds"] == seeds
        assert min(values) - 1e-9 <= found["low"] < found["mean"] < found["high"] <= max(values) + 1e-9
        assert found["sampling_std"] > 0
        for seed, value in zip(seeds, values, strict=True):
            single = one(records["scores"], variant=variant, seed=seed, metric="rouge_l", scope=scope)
            assert single["value"] == pytest.approx(value)
            assert single["num_sampling_seeds"] == 2


@pytest.mark.parametrize("scope", SCOPES)
def test_comparison_is_paired_over_seeds(finished: StudyPlan, scope: str) -> None:
    records = study_results(finished).to_dict()["comparisons"]
    for variant, seeds in (("cma_ga", [0, 1]), ("sft", [0, 1, 2])):
        differences = [score(variant, s, SCOPES[scope]) - score("cma", s, SCOPES[scope]) for s in seeds]
        found = one(records, variant=variant, metric="rouge_l", scope=scope)
        assert found["seeds"] == seeds
        assert found["difference"] == pytest.approx(fmean(differences))
        assert found["std"] == pytest.approx(stdev(differences))
        flips = itertools.product([1, -1], repeat=len(seeds))
        means = [abs(fmean(sign * value for sign, value in zip(signs, differences, strict=True))) for signs in flips]
        expected = sum(value >= abs(fmean(differences)) - 1e-9 for value in means) / len(means)
        assert found["seeds_p_value"] == expected
        assert found["seeds_smallest_p"] == 2 / 2 ** len(seeds)
        assert (found["cohen_dz"] is None) == (len(seeds) < 3)
        assert found["num_comparisons"] == 2
        assert found["seeds_needed"] == seeds_needed(0.37, stdev(differences), alpha=0.05 / 2)
    assert {record["variant"] for record in records} == {"cma_ga", "sft"}, "the baseline is not compared with itself"


@pytest.mark.parametrize("scope", SCOPES)
def test_examples_are_paired_and_files_count_alike(finished: StudyPlan, scope: str) -> None:
    found = one(study_results(finished).to_dict()["comparisons"], variant="sft", metric="rouge_l", scope=scope)
    files = SCOPES[scope]
    per_file = {
        file: [
            100 * fmean(rouge("sft", s, k, file, e) - rouge("cma", s, k, file, e) for s in range(3) for k in SAMPLING)
            for e in range(NUM[file])
        ]
        for file in files
    }
    weighted = [value / len(values) / len(files) for values in per_file.values() for value in values]
    assert found["examples_num"] == len(weighted)
    assert sum(weighted) == pytest.approx(found["difference"])
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, weighted, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(weighted))
    ]
    expected = sum(value >= abs(sum(weighted)) - 1e-9 for value in sums) / len(sums)
    assert found["examples_p_value"] == expected
    assert found["examples_exact"] is True
    assert found["examples_low"] < found["difference"] < found["examples_high"]


def test_holm_is_over_the_variants(finished: StudyPlan) -> None:
    records = study_results(finished).to_dict()["comparisons"]
    for scope, prefix in itertools.product(SCOPES, ("seeds", "examples")):
        both = [one(records, variant=name, metric="rouge_l", scope=scope) for name in ("cma_ga", "sft")]
        small, large = sorted(both, key=lambda record: record[f"{prefix}_p_value"])
        first = min(1.0, 2 * small[f"{prefix}_p_value"])
        assert small[f"{prefix}_p_holm"] == first
        assert large[f"{prefix}_p_holm"] == max(first, large[f"{prefix}_p_value"])


def test_an_ablation_is_compared_with_the_variant_that_it_names(finished: StudyPlan, write_study: WriteStudy) -> None:
    evaluation = {"data": ["org/test", "org/other", "org/third"], "seeds": [10, 20]}
    result = study_results(load_study(write_study(evaluation=evaluation, baselines={"sft": "cma_ga"})))
    assert sum(status.state == "done" for status in result.statuses.values()) == 8, "no run is to be trained anew"
    records = result.to_dict()["comparisons"]
    differences = [score("sft", s, ["test"]) - score("cma_ga", s, ["test"]) for s in (0, 1)]
    pair = [one(records, variant=name, metric="rouge_l", scope="test") for name in ("cma_ga", "sft")]
    assert [found["baseline"] for found in pair] == ["cma", "cma_ga"]
    assert pair[1]["difference"] == pytest.approx(fmean(differences))
    assert pair[1]["examples_num"] == NUM["test"]
    smallest = min(found["seeds_p_value"] for found in pair)
    assert min(found["seeds_p_holm"] for found in pair) == min(1.0, 2 * smallest), "one family, whoever the baseline is"
    titles = [line.strip() for line in shown(result).splitlines() if line.startswith("ROUGE-L against")]
    assert titles == ["ROUGE-L against cma", "ROUGE-L against cma_ga"]


LENGTHS = [4, 10, 25, 7, 18, 30]
"""Bytes of the responses of one file."""


def row_bits(variant: str, seed: int, row: int) -> float:
    return LENGTHS[row] * (2.0 - GAIN[variant] * (1 + row)) + math.sin(10 * seed + row + list(GAIN).index(variant))


def write_row_bits(plan: StudyPlan, *, file: str) -> None:
    """Bits of every row, and the ratio of their sums among the results, for all runs that are done."""
    for run in plan.runs:
        path = run.folder / "evaluation" / "results.json"
        if path.exists():
            rows = [
                {"source": f"{file}:{row + 1}", "bits": row_bits(run.variant, run.seed, row), "num_bytes": num}
                for row, num in enumerate(LENGTHS)
            ]
            (path.parent / "bits").mkdir(exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (path.parent / "bits" / f"{file}.jsonl").write_text(lines, encoding="utf-8")
            results = json.loads(path.read_text(encoding="utf-8"))
            part = one(results["files"], name=file)
            part["bits_per_byte"] = sum(row["bits"] for row in rows) / sum(LENGTHS)
            path.write_text(json.dumps(results), encoding="utf-8")


def test_bits_per_byte_are_tested_over_rows_by_what_each_adds(finished: StudyPlan) -> None:
    write_row_bits(finished, file="test")
    records = study_results(finished).to_dict()["comparisons"]
    for variant, seeds in (("cma_ga", (0, 1)), ("sft", (0, 1, 2))):
        found = one(records, variant=variant, metric="bits_per_byte", scope="test")
        added = [
            fmean(row_bits(variant, s, row) - row_bits("cma", s, row) for s in seeds) / sum(LENGTHS)
            for row in range(len(LENGTHS))
        ]
        assert sum(added) == pytest.approx(found["difference"])
        sums = [
            abs(sum(sign * value for sign, value in zip(signs, added, strict=True)))
            for signs in itertools.product([1, -1], repeat=len(added))
        ]
        assert found["examples_num"] == len(LENGTHS)
        assert found["examples_p_value"] == sum(value >= abs(sum(added)) - 1e-9 for value in sums) / len(sums)
        assert found["examples_low"] < found["difference"] < found["examples_high"]
    assert one(records, variant="sft", metric="bits_per_byte", scope="third")["examples_p_value"] is None


@pytest.mark.parametrize("damage", ["missing", "torn", "other bytes", "no bytes", "no number"])
def test_bits_of_other_or_damaged_rows_are_left_out(finished: StudyPlan, damage: str) -> None:
    write_row_bits(finished, file="test")
    path = finished.runs[0].folder / "evaluation" / "bits" / "test.jsonl"  # cma, seed 0
    lines = path.read_text(encoding="utf-8")
    if damage == "missing":
        path.unlink()
    else:
        changes = {
            "torn": lines[:-5],
            "other bytes": lines.replace('"num_bytes": 25', '"num_bytes": 24'),
            "no bytes": re.sub(r'"num_bytes": \d+', '"num_bytes": 0', lines),
            "no number": lines.replace('"num_bytes": 25', '"num_bytes": "25"'),
        }
        path.write_text(changes[damage], encoding="utf-8")
    found = one(study_results(finished).to_dict()["comparisons"], variant="sft", metric="bits_per_byte", scope="test")
    assert found["examples_p_value"] is None
    assert found["seeds_p_value"] is not None


def test_bits_per_byte_without_rows_have_seeds_only(finished: StudyPlan) -> None:
    found = one(study_results(finished).to_dict()["comparisons"], variant="sft", metric="bits_per_byte", scope="test")
    assert found["difference"] == pytest.approx(0.10)
    assert found["examples_p_value"] is found["examples_num"] is found["seeds_needed"] is None
    assert found["cohen_dz"] is None, "all seeds differ by the same: no spread to divide by"


def test_json_is_tidy_and_read_back(finished: StudyPlan) -> None:
    path = write_results(study_results(finished))
    assert path == Path("study", "study.json")
    read = json.loads(path.read_text())
    assert read["version"] == 2
    assert read["baseline"] == "cma"
    for name in ("runs", "scores", "summaries", "comparisons"):
        assert len({tuple(record) for record in read[name]}) == 1, f"{name}: every record has the same fields"
        assert not any(isinstance(value, dict) for record in read[name] for value in record.values())
    assert len(read["runs"]) == 9
    assert one(read["runs"], variant="cma_ga", seed=2)["state"] == "pending"
    assert len(read["scores"]) == 8 * 3 * 5  # runs, metrics, scopes
    assert study_results(finished).to_dict() == study_results(finished).to_dict(), "nothing random without a seed"


def test_nothing_finished(plan: StudyPlan) -> None:
    result = study_results(plan)
    assert (result.scores, result.summaries, result.comparisons) == ((), (), ())
    assert result_tables(result) == []
    write_results(result)


def test_without_the_baseline_there_are_means_only(plan: StudyPlan) -> None:
    finish(plan.runs[1], examples("cma_ga", 0))
    result = study_results(plan)
    assert result.comparisons == ()
    assert {summary.std for summary in result.summaries} == {None}
    assert "cma_ga" in shown(result)


@pytest.mark.parametrize("text", ["", "{}", '{"files": []}', '{"files": [{"name": 3}]}', "[]"])
def test_damaged_results_count_as_failed(finished: StudyPlan, text: str) -> None:
    path = finished.runs[0].folder / "evaluation" / "results.json"
    path.write_text(text)
    result = study_results(finished)
    status = result.statuses[finished.runs[0]]
    assert status.state == "failed"
    assert "results.json is damaged" in status.message
    assert one(result.to_dict()["summaries"], variant="cma", metric="rouge_l", scope="test")["seeds"] == [1, 2]
    assert len(unfinished_lines(result.statuses)) == 1


@pytest.mark.parametrize("damage", ["missing", "torn", "other examples"])
def test_without_predictions_the_examples_are_left_out(finished: StudyPlan, damage: str) -> None:
    folder = finished.runs[0].folder / "evaluation" / "predictions"  # cma, seed 0
    for path in folder.glob("third.*"):
        lines = path.read_text().splitlines(keepends=True)
        if damage == "missing":
            path.unlink()
            break  # one sampling seed of two
        elif damage == "torn":
            path.write_text(lines[0] + lines[1][:10])
        else:
            path.write_text("".join(lines).replace("third:", "newer:"))
    records = study_results(finished).to_dict()["comparisons"]
    for scope, there in (("third", False), ("out-of-domain", False), ("test", True)):
        found = one(records, variant="sft", metric="rouge_l", scope=scope)
        assert (found["examples_p_value"] is not None) == there
        assert found["seeds_p_value"] is not None


def test_tables(finished: StudyPlan) -> None:
    text = " ".join(shown(study_results(finished)).split())
    difference = fmean(score("sft", s, ["test"]) - score("cma", s, ["test"]) for s in range(3))
    for expected in ("against cma", f"{difference:+.2f}", "out-of-domain", "seeds for 0.37", "below 0.5"):
        assert expected in text


def test_comparisons_that_share_the_level_need_more_seeds(write_study: WriteStudy) -> None:
    """Six seeds are enough for one comparison (2 / 2^6 = 0.031), not for two of them."""
    plan = load_study(write_study(seeds=list(range(6)), evaluation={"data": ["org/test"], "seeds": [10, 20]}))
    for variants, warned in ((("cma", "cma_ga"), False), (("sft",), True)):
        for run in plan.runs:
            if run.variant in variants:
                finish(run, {"test": examples(run.variant, run.seed)["test"]})
        text = " ".join(shown(study_results(plan)).split())
        assert ("cannot give a p over seeds below 0.0625" in text) == warned


def test_comparisons_are_whole_at_80_columns(write_study: WriteStudy) -> None:
    variants = {"cma": {"objective.matching": "none"}, "dskd_cma_ga_unmasked": None}
    evaluation = {"data": ["org/test", "org/self-instruct"], "seeds": [10, 20]}
    plan = load_study(write_study(variants=variants, evaluation=evaluation))
    for run in plan.runs:
        scored = examples("cma" if run.variant == "cma" else "cma_ga", run.seed)
        lower = 1.0 if run.variant == "cma" else 0.1  # differences of two digits before the point
        files = {
            name: {key: [lower * x for x in row] for key, row in scored["test"].items()}
            for name in ("test", "self-instruct")
        }
        finish(run, files, bits=1.0 + lower + 0.01 * run.seed)
    result = study_results(plan)
    text = shown(result, width=80)
    assert "\u2026" not in text
    for comparison in result.comparisons:
        interval, digits = comparison.over_seeds.interval, 4 if comparison.metric == "bits_per_byte" else 2
        assert interval is not None
        line = f"{comparison.difference:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
        assert line in text
    assert "in-domain" not in text, "the average over one file is that file"
    assert "out-of-domain" not in text
    assert "self-instruct (out)" in text


def shown(result: StudyResult, *, width: int = 250) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        for table in result_tables(result):
            console.print(table)
    return capture.get()


# --- what is left ----------------------------------------------------------------------------------------------------


def statuses(plan: StudyPlan) -> Mapping[Any, RunStatus]:
    return {run: current_status(run) for run in plan.runs}


def test_nothing_is_known_before_the_first_run(plan: StudyPlan) -> None:
    parts = estimate(plan, statuses(plan))
    assert {(part.seconds_per_run, part.seconds_left, part.bytes_left) for part in parts} == {(None, None, None)}
    assert total_seconds(parts, 1) is None
    console = Console(width=250)
    with console.capture() as capture:
        console.print(plan_table(plan, statuses(plan), jobs=1))
    assert "left: unknown until a run is done; " in capture.get()


def test_time_from_the_step_times_of_finished_runs(plan: StudyPlan) -> None:
    by_name = {(run.variant, run.seed): run for run in plan.runs}
    for name, seconds in ((("cma", 0), 8.0), (("cma", 1), 12.0), (("sft", 0), 2.0)):
        finish(by_name[name], examples(*name))
        write_status(by_name[name].folder, current_status(by_name[name]).model_copy(update={"seconds": seconds}))
    parts = {part.variant: part for part in estimate(plan, statuses(plan))}
    assert (parts["cma"].seconds_per_run, parts["cma"].seconds_left) == (10.0, 10.0)
    assert (parts["sft"].seconds_per_run, parts["sft"].seconds_left) == (2.0, 4.0)
    assert parts["cma_ga"].seconds_per_run == pytest.approx(22 / 3)  # of no run of its own
    assert total_seconds(list(parts.values()), 2) == pytest.approx((10 + 4 + 22) / 2)
    size = sum(path.stat().st_size for path in by_name["sft", 0].folder.rglob("*") if path.is_file())
    assert (parts["sft"].bytes_per_run, parts["sft"].bytes_left) == (size, 2 * size)


def test_a_run_that_was_killed_tells_no_time(plan: StudyPlan) -> None:
    run = plan.runs[0]
    finish(run, examples("cma", 0))
    write_status(run.folder, current_status(run).model_copy(update={"sessions": 2}))
    assert estimate(plan, statuses(plan))[0].seconds_per_run is None


def test_the_plan_is_shown(finished: StudyPlan) -> None:
    console = Console(width=250)
    with console.capture() as capture:
        console.print(plan_table(finished, statuses(finished), jobs=2))
    text = capture.get()
    for expected in (
        "cma (baseline)",
        "3 done",
        "2 done, 1 pending",
        "8 s, 0 MB",
        "cross_entropy",
        "left: 4 s with 2 processes",
    ):
        assert expected in text
