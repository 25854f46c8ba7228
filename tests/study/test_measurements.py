"""What finished runs logged, read from their folders and compared by brute force."""

from __future__ import annotations

import itertools
import json
import random
from statistics import fmean, stdev

import pytest

from study_cases import WriteStudy, finish
from vocabridge.study.measurements import Measurement, compare_measurements, measurements
from vocabridge.study.plan import StudyPlan, load_study
from vocabridge.study.results import study_results

SCORES = {"test": {10: [0.5, 1.0]}}


def finished(write_study: WriteStudy, **changes: object) -> StudyPlan:
    """A study whose runs logged random distances; ``sft`` logs none."""
    plan = load_study(write_study(**changes))
    generator = random.Random(0)
    for run in plan.runs:
        finish(run, SCORES)
        shift = {"cma": 0.0, "cma_ga": -0.5, "sft": 0.0}.get(run.variant, 0.25)
        entries = [
            {"probe/energy_distance": generator.random() + (shift if step else 0.0), "loss": 1.0, "step": step}
            for step in (0, 5, 10)
        ]
        if run.variant == "sft":
            entries = [{"loss": 1.0, "step": 5}]
        lines = [json.dumps(entry) for entry in entries]
        (run.folder / "metrics.jsonl").write_text("\n".join([*lines, '{"probe/x": NaN, "step": 10}', '{"torn']))
    return plan


def test_first_and_last_finite_values_of_the_wanted_quantities(write_study: WriteStudy) -> None:
    plan = finished(write_study)
    run = plan.runs[0]
    lines = [
        {"probe/a": 1.0, "loss/gan": 4.0, "loss": 9.0, "learning_rate": 1.0, "step": 10},
        {"probe/a": 2.0, "step": 0},
        {"probe/a": float("nan"), "step": 20},
        {"loss/gan": 5.0, "step": 20},
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measurements([run]) == [
        Measurement(run.variant, run.seed, "probe/a", first=2.0, last=1.0),
        Measurement(run.variant, run.seed, "loss/gan", first=4.0, last=5.0),
    ]
    (run.folder / "metrics.jsonl").unlink()
    assert measurements([run]) == []


def test_differences_over_seeds_by_brute_force(write_study: WriteStudy) -> None:
    plan = finished(write_study, seeds=[0, 1, 2, 3, 4])
    found = measurements(plan.runs)
    last = {(each.variant, each.seed): each.last for each in found}
    (comparison,) = compare_measurements(plan, found)
    differences = [last["cma_ga", seed] - last["cma", seed] for seed in plan.seeds]
    assert (comparison.variant, comparison.baseline, comparison.seeds) == ("cma_ga", "cma", plan.seeds)
    assert comparison.difference == pytest.approx(fmean(differences))
    assert comparison.std == pytest.approx(stdev(differences))
    flips = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=5)
    ]
    as_far = fmean(abs(flip) >= abs(sum(differences)) - 1e-12 for flip in flips)
    assert comparison.over_seeds.test.p_value == pytest.approx(as_far)
    assert comparison.over_seeds.p_holm == pytest.approx(as_far), "the only comparison of its quantity"


def test_holm_is_over_the_variants_and_each_has_its_own_baseline(write_study: WriteStudy) -> None:
    variants = {"cma": {"objective.matching": "none"}, "cma_ga": None, "cma_weight": {"objective.matching_weight": 0.5}}
    plan = finished(write_study, variants=variants, baselines={"cma_weight": "cma_ga"})
    of_ga, of_weight = compare_measurements(plan, measurements(plan.runs))
    assert (of_ga.baseline, of_weight.baseline) == ("cma", "cma_ga")
    plain = [each.over_seeds.test.p_value for each in (of_ga, of_weight)]
    assert min(each.over_seeds.p_holm for each in (of_ga, of_weight)) == pytest.approx(min(1.0, 2 * min(plain)))


def test_results_hold_finished_runs_only(write_study: WriteStudy) -> None:
    plan = finished(write_study)
    (plan.runs[0].folder / "study-status.json").unlink()
    values = study_results(plan).to_dict()
    json.dumps(values, allow_nan=False)
    unfinished = (plan.runs[0].variant, plan.runs[0].seed)
    assert unfinished not in {(each["variant"], each["seed"]) for each in values["measurements"]}
    assert {each["name"] for each in values["measurements"]} == {"probe/energy_distance"}
    (comparison,) = values["measurement_comparisons"]
    assert len(comparison["seeds"]) == 2
    assert comparison["seeds_p_value"] in (0.5, 1.0), "what the sign flips of two seeds can give"
