"""``vocabridge study`` from the command line: a real, tiny study, stopped and gone on with; then messages and codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from study_cases import WriteStudy, finish
from tiny_pair import ROWS, save_pair
from vocabridge import cli
from vocabridge.plan.forecast import Forecast
from vocabridge.study.plan import load_study

EXAMPLES = {"test": {10: [0.5, 1.0, 0.25], 20: [0.5, 0.0, 0.75]}}


@pytest.fixture
def tiny_study(
    tmp_path: Path, tiny_bpe_tokenizer: PreTrainedTokenizerFast, tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast
) -> Path:
    save_pair(tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    for name in ("train", "unlike"):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    study = {
        "base": {
            "data": {"train": "train.jsonl", "max_length": 128},
            "student": {"model": "student", "dtype": "float32"},
            "teacher": {"model": "teacher", "dtype": "float32", "cache": str(tmp_path / "cache")},
            "objective": {"name": "dskd_cma", "matching": "none"},
            "training": {
                "max_steps": 20,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_steps": 2,
                "save_total_limit": 1,
                "use_cpu": True,
                "diagnostics_steps": 0,
            },
        },
        "output_dir": str(tmp_path / "study"),
        "baseline": "sft",
        "seeds": [0, 1],
        "evaluation": {"data": ["train.jsonl", "unlike.jsonl"], "seeds": [1, 2], "max_new_tokens": 4, "limit": 3},
        "variants": {"cma": None, "sft": {"teacher": None, "objective": {"name": "cross_entropy"}}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return tmp_path / "study.yaml"


def command(study: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "vocabridge", "study", str(study), *options]


ENVIRONMENT = {**os.environ, "COLUMNS": "250"}


@pytest.mark.slow
def test_a_study_is_stopped_and_goes_on_to_its_end(tiny_study: Path) -> None:
    folder = tiny_study.parent / "study"
    first = folder / "runs" / "cma" / "seed0"
    process = subprocess.Popen(command(tiny_study), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(first.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 130, messages
    assert "go on with: vocabridge study" in messages
    assert json.loads((first / "study-status.json").read_text())["state"] == "interrupted"
    assert not (first / "evaluation").exists(), "the run was over before the signal"

    shutil.rmtree(tiny_study.parent / "cache")  # the three first runs, two of them with the teacher, start without it
    done = subprocess.run(
        command(tiny_study, "--jobs", "3"), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "4 done" in done.stdout
    for run_dir in (folder / "runs").glob("*/*"):
        entries = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        steps = Counter(entry["step"] for entry in entries if "loss" in entry)
        assert steps == dict.fromkeys(range(1, 21), 1)
        AutoModelForCausalLM.from_pretrained(run_dir)
    shards = list((tiny_study.parent / "cache").glob("*.safetensors"))
    assert len(shards) == 1, "the teacher ran once for both seeds, though they began together"
    results = json.loads((folder / "study.json").read_text())
    assert {(run["variant"], run["seed"], run["state"], run["steps"]) for run in results["runs"]} == {
        (variant, seed, "done", 20) for variant in ("cma", "sft") for seed in (0, 1)
    }
    values = {score["value"] for score in results["scores"] if score["metric"] == "bits_per_byte"}
    assert len(values) == 4, "variants and seeds are different trainings; both files hold the same rows"
    (found,) = [
        record for record in results["comparisons"] if (record["metric"], record["scope"]) == ("rouge_l", "in-domain")
    ]
    assert (found["variant"], found["seeds"], found["examples_num"]) == ("cma", [0, 1], 3)

    again = subprocess.run(command(tiny_study), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "4 of 4 runs are done already" in again.stderr
    assert json.loads((folder / "study.json").read_text()) == results


def study(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, output and errors of ``vocabridge study study.yaml WORDS``."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(sys, "argv", ["vocabridge", "study", "study.yaml", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def no_training(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Every run's process ends at once with this exit status."""
    from vocabridge.study import runner

    original = runner.run_study

    def run_study(plan, *, jobs, tell):
        return original(plan, jobs=jobs, tell=tell, command=lambda folder: [sys.executable, "-c", f"exit({code})"])

    monkeypatch.setattr(runner, "run_study", run_study)


def test_results_at_any_moment(
    write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load_study(write_study())
    code, out, _ = study(monkeypatch, capsys, "--results")
    assert code == 0
    assert "9 pending" in out
    for run in plan.runs[:2]:
        finish(run, EXAMPLES)
    code, out, _ = study(monkeypatch, capsys, "--results")
    assert code == 0
    assert "2 done, 7 pending" in out
    assert "against cma" in out
    assert json.loads(Path("study/study.json").read_text())["comparisons"]


def test_failures_are_summed_up_and_exit_with_1(
    write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load_study(write_study(seeds=[0]))
    finish(plan.runs[0], EXAMPLES)
    no_training(monkeypatch, 3)
    code, out, err = study(monkeypatch, capsys)
    assert code == 1
    assert "1 done, 2 failed" in out
    assert "sft, seed 0: failed: its process ended with exit status 3; see" in err


def test_dry_run_writes_nothing(
    write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study()
    for guess, left in ((None, "left: unknown"), (Forecast(60.0, 5e6, 3e9), "left: 9 min, 45 MB")):
        monkeypatch.setattr("vocabridge.plan.forecast.forecast", lambda *_, guess=guess, **__: guess)
        code, out, _ = study(monkeypatch, capsys, "--dry-run")
        assert code == 0
        assert left in out
        assert ("the teacher's cache: 3.0 GB" in out) == ("A guess" in out) == (guess is not None)
    assert not Path("study").exists()


def test_options_that_exclude_each_other(
    write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study()
    code, _, err = study(monkeypatch, capsys, "--dry-run", "--results")
    assert code == 2
    assert "exclude each other" in err


def test_a_mistake_is_one_line(
    write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(baseline="cma_gan")
    code, _, err = study(monkeypatch, capsys)
    assert code == 2
    assert err.startswith("error: study.yaml:3: baseline is 'cma_gan'")
