"""The commands on two processes: the files of one process, one voice, and no rank that waits for a failed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data_parallel_cases as cases
from faults.phases import run_results
from vocabridge import cli

PREDICTIONS = [f"predictions/rows.seed{seed}.jsonl" for seed in (10, 20)]
EVALUATION_FILES = [*PREDICTIONS, "bits/rows.json", "bits/rows.jsonl", "manifest.json", "results.json"]


def alone(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vocabridge", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def sentences(results):
    """What all ranks wrote to standard error, but for progress bars."""
    lines = [line for result in results for line in result["err"].splitlines()]
    return [line for line in lines if "%|" not in line and " 0:00:0" not in line and line]


def assert_same_files(folder: Path, expected: Path):
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file())
    assert names == sorted(EVALUATION_FILES)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == names
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture(scope="module")
def evaluation_of_one(two_processes, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "evaluation"
    with pytest.MonkeyPatch.context() as patch:
        alone(cases.evaluate_words(two_processes.folder, output), patch)
    return output


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_sampled_evaluation_is_that_of_one_process(two_processes, evaluation_of_one):
    ranks = two_processes["evaluate"]
    assert_same_files(two_processes.folder / "evaluation", evaluation_of_one)
    texts = [json.loads(line)["prediction"] for line in (evaluation_of_one / PREDICTIONS[0]).read_text().splitlines()]
    assert len(set(texts)) > 4, "the same texts show no order"
    batches = [[tuple(batch) for batch in rank["batches"]] for rank in ranks]
    assert all(batches), "one rank did all the work"
    assert len(set(batches[0] + batches[1])) == len(batches[0] + batches[1]) == 8, "2 seeds x 4 batches, each once"
    for turn in ("first", "again"):
        first, second = (rank[turn] for rank in ranks)
        assert first["status"] == second["status"] == 0
        assert "ROUGE-L" in first["out"]
        assert second["out"] == ""
    assert not sentences([rank["first"] for rank in ranks])


def test_an_error_of_one_rank_ends_both_with_one_sentence(two_processes, evaluation_of_one):
    ranks = two_processes["user_error"]
    assert [rank["failed"]["status"] for rank in ranks] == [2, 2]
    assert sentences([rank["failed"] for rank in ranks]) == ["error: the second process has had enough."]
    assert ranks[0]["left"] == ["rows.seed10.jsonl.partial"]
    assert [rank["again"]["status"] for rank in ranks] == [0, 0]
    assert_same_files(two_processes.folder / "evaluation_UserError", evaluation_of_one)


def test_an_interruption_of_one_rank_ends_both_and_the_command_goes_on(two_processes, evaluation_of_one):
    ranks = two_processes["interrupt"]
    assert [rank["failed"]["status"] for rank in ranks] == [130, 130]
    hint = "interrupted; the same command goes on where it stopped"
    assert sentences([rank["failed"] for rank in ranks]) == [hint]
    assert [rank["again"]["status"] for rank in ranks] == [0, 0]
    assert_same_files(two_processes.folder / "evaluation_KeyboardInterrupt", evaluation_of_one)


def test_mistakes_are_told_once_and_leave_no_folder(two_processes):
    ranks = two_processes["bad_start"]
    messages = {
        "on_all": "error: evaluation.in_domain: there is no data file 'nowhere'. Known: rows.",
        "on_one": "error: the second process cannot load the model.",
        "apart": "error: model, settings or data are not the same on process 1 as on the first one; "
        "give all processes the same files and the same kind of device.",
    }
    for name, message in messages.items():
        assert [rank[name]["status"] for rank in ranks] == [2, 2]
        assert sentences([rank[name] for rank in ranks]) == [message]
    assert not any(rank["is_there"] for rank in ranks)


def test_large_values_and_few_items_are_shared(two_processes):
    first, second = two_processes["large_value"]
    assert first["told"]
    assert second["told"]
    assert first["whole"]
    assert first["places"] == [0, 1, 2]
    assert first["items"] == ["a", "b", "c"]
    assert first["single"] == [[0, "X"]]
    assert first["nothing"] == second["nothing"] == second["places"] == second["single"] == []


# --- data generation, teacher cache, distillation ---------------------------------------------------------------------


def test_greedy_data_generation_is_that_of_one_process(two_processes, tmp_path, monkeypatch):
    ranks = two_processes["generate"]
    assert [rank["status"] for rank in ranks] == [0, 0]
    assert all(rank["batches"] for rank in ranks), "one rank did all the work"
    alone(cases.generate_words(two_processes.folder, tmp_path / "alone.jsonl"), monkeypatch)
    written = (two_processes.folder / "generated.jsonl").read_bytes()
    assert written == (tmp_path / "alone.jsonl").read_bytes()
    assert len(written.splitlines()) > 2
    assert not (two_processes.folder / "generated.jsonl.generation").exists()
    assert f"{len(written.splitlines())} rows" in ranks[0]["out"]
    assert ranks[1]["out"] == ""


def test_both_ranks_fill_the_teacher_cache(two_processes, tmp_path, monkeypatch):
    ranks = two_processes["cache_teacher"]
    for turn in ("first", "again"):
        assert [rank[turn]["status"] for rank in ranks] == [0, 0]
        assert [rank[turn]["out"] for rank in ranks] == [
            f"{two_processes.folder / 'teacher_cache'}: 8 rows, 0.0 MB\n",
            "",
        ]
    recipe = str(two_processes.folder / "recipe.yaml")
    alone(["cache-teacher", recipe, f"teacher.cache.folder={tmp_path / 'cache'}"], monkeypatch)
    found, expected = cached_states(two_processes.folder / "teacher_cache"), cached_states(tmp_path / "cache")
    assert len(list((two_processes.folder / "teacher_cache").glob("*.safetensors"))) == 2, "one shard a rank"
    assert len(expected) == 8
    assert found.keys() == expected.keys()
    for row, states in expected.items():
        torch.testing.assert_close(found[row], states)


def cached_states(folder: Path) -> dict[tuple[int, ...], torch.Tensor]:
    """Hidden states by the response's token ids."""
    found = {}
    for path in folder.glob("*.safetensors"):
        shard = load_file(path)
        parts = [shard[name].split(shard["lengths"].tolist()) for name in ("response_ids", "hidden_states")]
        found |= {tuple(ids.tolist()): states for ids, states in zip(*parts, strict=True)}
    return found


def test_distillation_evaluates_on_both_ranks_and_speaks_once(two_processes, tmp_path, monkeypatch):
    ranks = two_processes["distill"]
    assert [[rank[turn]["status"] for rank in ranks] for turn in ("first", "again", "resumed")] == [
        [0, 0],
        [2, 2],
        [0, 0],
    ]
    told = sentences([rank["again"] for rank in ranks])
    assert len(told) == 1
    assert "is not empty; add --resume" in told[0]
    for turn in ("first", "resumed"):
        assert "done after 2 steps" in ranks[0][turn]["out"]
        assert ranks[1][turn]["out"] == ""
    run = two_processes.folder / "run"
    words = ["evaluate", str(run), "--data", str(two_processes.folder / "rows.jsonl"), "--seeds", "10"]
    words += ["--max-new-tokens", "6", "--batch-size", "2", "--output-dir", str(tmp_path / "alone")]
    alone(words, monkeypatch)
    for name in (PREDICTIONS[0], "bits/rows.json", "bits/rows.jsonl"):
        assert (run / "evaluation" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def assert_same_losses(run: Path, expected: Path):
    found, losses = cases.run_losses(run), cases.run_losses(expected)
    assert list(found) == [1, 2, 3, 4]
    assert len(set(losses.values())) == 4
    assert found == pytest.approx(losses, rel=1e-5)


def test_two_processes_resume_the_run_of_one(two_processes):
    ranks = two_processes["resume"]
    for turn in ("whole", "resumed"):
        assert [rank[turn]["status"] for rank in ranks] == [0, 0], [rank[turn]["err"] for rank in ranks]
    assert_same_losses(two_processes.folder / "by_two", two_processes.folder / "by_one")
    assert_same_losses(two_processes.folder / "by_one_then_two", two_processes.folder / "by_one")


def test_one_process_resumes_the_run_of_two(two_processes, tmp_path, monkeypatch):
    run = cases.stopped_after(two_processes.folder / "by_two", 3, tmp_path / "run")
    alone(cases.resumable_words(two_processes.folder, str(run), rows=4, resume=True), monkeypatch)
    assert_same_losses(run, two_processes.folder / "by_two")


def test_steps_of_other_rows_are_not_gone_on_with(two_processes):
    ranks = two_processes["resume"]
    assert [rank["refused"]["status"] for rank in ranks] == [2, 2]
    (told,) = sentences([rank["refused"] for rank in ranks])
    assert "refused/checkpoint-2 was written after steps of 4 rows, and now a step would hold 8" in told
    assert "set training.per_device_train_batch_size=2 training.gradient_accumulation_steps=1" in told
    run = two_processes.folder / "refused"
    assert not (run / "checkpoint-3").exists()
    assert "per_device_train_batch_size: 4" in (run / "recipe.yaml").read_text()
    assert json.loads((run / "run.json").read_text())["num_processes"] == 1


@pytest.mark.parametrize("step", ["3", "4"])
def test_sigterm_to_one_rank_stops_both_and_nothing_is_lost(two_processes, step):
    """Within an epoch, and in its last step, where its evaluation comes first."""
    ranks = two_processes["preempted"]
    assert [rank["whole"]["status"] for rank in ranks] == [0, 0]
    assert [rank[step]["stopped"]["status"] for rank in ranks] == [0, 0], "SIGTERM is no failure"
    told = [line for line in sentences([rank[step]["stopped"] for rank in ranks]) if "interrupted" in line]
    assert len(told) == 1
    assert told[0].startswith("interrupted; go on with: vocabridge distill ")
    assert [rank[step]["left"] for rank in ranks] == [{f"checkpoint-{step}": None}] * 2, (
        "one checkpoint, and it is whole"
    )
    assert [rank[step]["resumed"]["status"] for rank in ranks] == [0, 0]
    expected = run_results(two_processes.folder / "undisturbed")
    assert run_results(two_processes.folder / f"stopped_in_{step}") == expected
    assert [entry["step"] for entry in expected["log"] if "eval_loss" in entry] == [4, 8]
    assert [entry["step"] for entry in expected["log"] if "loss" in entry] == [2, 4, 6, 8]


def test_a_loss_that_is_not_finite_on_one_rank_ends_both_with_one_sentence(two_processes):
    first, second = two_processes["not_finite"]
    assert [first["status"], second["status"]] == [2, 2]
    assert sentences([first]) == []
    (told,) = sentences([second])
    assert told.startswith("error: loss term 'student_space' is not finite, so training stops;")
    assert not (two_processes.folder / "not_finite" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_launcher_ends_when_the_first_process_refuses(two_processes, tmp_path):
    """As users start it: each process is one of its own, and the launcher watches them."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    words = ["distill", str(two_processes.folder / "recipe.yaml"), f"training.output_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*launcher, "-m", "vocabridge", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1  # the launcher's own
    assert done.stderr.count("is not empty; add --resume") == 1
    assert done.stderr.count("error: ") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
