"""Names and links that try to lead out of the folder that a command was given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from payload import write_payload
from tiny_recipe import write_recipe
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import report_cases
from study_cases import BASE, STUDY
from vocabridge.checkpoint_files import seal
from vocabridge.cli import app
from vocabridge.durable import open_to_append
from vocabridge.errors import UserError
from vocabridge.evaluation.plan import named_sources
from vocabridge.evaluation.run_folder import PredictionFile
from vocabridge.study.plan import load_study
from vocabridge.study.runner import run_study
from vocabridge.study.status import LOG_FILE

ESCAPES = ["../x", "..", ".", "/tmp/x", "a/b", "a\\b", "x/../../y", ".hidden", "~", "a\x00b", "", " ", "-x", "CON/x"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_variant_cannot_name_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(BASE))
    variants = {"cma": {}, name: {"objective.matching": "none"}}
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, "variants": variants}))
    with pytest.raises(UserError, match="is no variant's name"):
        load_study("study.yaml")


@pytest.mark.parametrize("key", ["training.output_dir", "training", "evaluation"])
def test_a_variant_cannot_move_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(BASE))
    value = {"training": {"output_dir": "../x"}, "evaluation": {"data": "../x"}}.get(key, "../x")
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, "variants": {"cma": {}, "other": {key: value}}}))
    with pytest.raises(UserError, match="cannot be changed by a variant"):
        load_study("study.yaml")


def test_runs_of_a_study_lie_below_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(BASE))
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, "variants": {"cma": {}, "a..b": {}, "x-+._9": {}}}))
    plan = load_study("study.yaml")
    assert len(plan.runs) == 9
    for run in plan.runs:
        assert run.folder.resolve().is_relative_to((tmp_path / "study" / "runs").resolve())


@pytest.mark.parametrize("name", ["../x", "", "a/b", "/x"])
def test_a_name_for_a_data_file_cannot_be_a_path(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a data file"):
        named_sources({name: [{"prompt": "x", "response": "y"}]})


@pytest.mark.parametrize("name", ["../../outside", "/etc", "..", "."])
def test_a_results_file_cannot_name_runs_elsewhere(tmp_path: Path, name: str, witness: Any) -> None:
    """``study.json`` from a stranger: its variants are names below the folder, or it is refused."""
    report_cases.finished_study(tmp_path / "given")
    plan = load_study(tmp_path / "given" / "study.yaml")
    from vocabridge.study.results import study_results

    record = json.loads(json.dumps(study_results(plan).to_dict()))
    record |= {"study": "gone.yaml", "variants": [name, *record["variants"][1:]]}
    for part in ("runs", "scores", "summaries", "comparisons"):
        for row in record[part]:
            row["variant"] = name if row["variant"] == "cma" else row["variant"]
    record["baseline"] = name if record["baseline"] == "cma" else record["baseline"]
    folder = tmp_path / "stranger"
    report_cases.write_json(folder / "study.json", record)
    for place in (tmp_path / "outside" / "seed0", tmp_path / "seed0"):
        report_cases.write_run(place, seed=0)
    witness.begin()
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert isinstance(result.exception, UserError)
    assert "cannot be read as a study's results" in str(result.exception)
    assert witness.saw("seed0") == []


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "precious"
    path.parent.mkdir()
    path.write_text("precious")
    return path


@pytest.mark.parametrize("name", ["report.html", "report.html.tmp"])
def test_a_report_is_not_written_through_a_link(tmp_path: Path, victim: Path, name: str) -> None:
    run = tmp_path / "run"
    report_cases.write_run(run, seed=0)
    (run / name).symlink_to(victim)
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert victim.read_text() == "precious"
    assert (run / "report.html").is_file()
    assert not (run / "report.html").is_symlink()


WRITTEN = [
    *(f"{name}{end}" for name in ("recipe.yaml", "run.json") for end in ("", ".tmp")),
    "README.md",
    "metrics.jsonl",
    "model.safetensors",
    "objective.safetensors",
    "config.json",
    "trainer_state.json",
    "tokenizer.json",
]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A folder with a recipe and its run after two steps, without evaluation."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(folder, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    run_recipe(path, "evaluation=null")
    return folder


def run_recipe(path: Path, *overrides: str, **options: bool) -> Any:
    from vocabridge.recipe import load_recipe
    from vocabridge.run import distill

    return distill(load_recipe(path, overrides), **options)


def test_a_resumed_run_does_not_write_through_links(tmp_path: Path, victim: Path, finished: Path) -> None:
    """A run folder from a stranger may hold links where the run will write."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    run = folder / "run"
    for name in WRITTEN:
        if name != "metrics.jsonl" and name != "recipe.yaml":  # these are read first
            (run / name).unlink(missing_ok=True)
            (run / name).symlink_to(victim)
    here = [f"training.output_dir={run}", f"data.train={folder}/train.jsonl", "evaluation=null", "training.max_steps=3"]
    (run / "recipe.yaml").unlink()
    run_recipe(folder / "recipe.yaml", *here, resume=True)
    assert victim.read_text() == "precious"
    assert (run / "model.safetensors").stat().st_size > 1000
    for name in WRITTEN:
        assert not (run / name).is_symlink(), name


def test_lines_are_not_added_through_a_link(tmp_path: Path, victim: Path) -> None:
    """Logs and unfinished predictions grow in place, where a link would be followed."""
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(UserError, match=r"metrics\.jsonl is a link"):
        open_to_append(tmp_path / "metrics.jsonl")
    with open_to_append(tmp_path / "new.jsonl") as stream:
        stream.write(b"line\n")
    with open_to_append(tmp_path / "new.jsonl") as stream:
        stream.write(b"line\n")
    assert (tmp_path / "new.jsonl").read_text() == "line\nline\n"
    assert victim.read_text() == "precious"


def test_unfinished_predictions_that_are_a_link_are_not_cut_off(tmp_path: Path, victim: Path) -> None:
    """What follows the last whole line is removed before more is written: here all of it, in somebody's file."""
    predictions = PredictionFile(tmp_path / "test.seed1.jsonl")
    predictions.partial_path.symlink_to(victim)
    assert predictions.load() == {}
    predictions.append([{"index": 0, "prediction": "x"}])
    assert predictions.load() == {0: {"index": 0, "prediction": "x"}}
    assert victim.read_text() == "precious"


def test_a_study_does_not_log_through_a_link(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(BASE))
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, "seeds": [0], "variants": {"cma": {}}}))
    plan = load_study("study.yaml")
    plan.runs[0].folder.mkdir(parents=True)
    (plan.runs[0].folder / LOG_FILE).symlink_to(victim)
    with pytest.raises(UserError, match=rf"{LOG_FILE} is a link"):
        run_study(plan, command=lambda folder: pytest.fail("it was started"))
    assert victim.read_text() == "precious"


def test_overwriting_deletes_through_no_link(tmp_path: Path, victim: Path, finished: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    run = folder / "run"
    (run / "elsewhere").symlink_to(victim.parent, target_is_directory=True)
    (run / "checkpoint-99").symlink_to(victim.parent, target_is_directory=True)
    run_recipe(folder / "recipe.yaml", f"training.output_dir={run}", "evaluation=null", overwrite=True)
    assert victim.read_text() == "precious"
    assert not (run / "elsewhere").exists()


def test_a_run_folder_that_is_a_link_is_emptied_like_any_other(tmp_path: Path, finished: Path) -> None:
    """Checkpoints of the run before must not be what a later --resume goes on from."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    (folder / "run").rename(tmp_path / "scratch")
    (folder / "run").symlink_to(tmp_path / "scratch", target_is_directory=True)
    (folder / "run" / "checkpoint-77").mkdir()
    run_recipe(folder / "recipe.yaml", f"training.output_dir={folder}/run", "evaluation=null", overwrite=True)
    assert (folder / "run").is_symlink(), "the user's own link stays"
    assert (tmp_path / "scratch" / "model.safetensors").is_file()
    assert not (tmp_path / "scratch" / "checkpoint-77").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_the_state_of_a_strangers_checkpoint_runs_nothing(tmp_path: Path, finished: Path, name: str) -> None:
    """A resumption reads what torch.save wrote; it takes tensors and numbers from it, and nothing that could run."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    checkpoint = folder / "run" / "checkpoint-2"
    assert (checkpoint / name).is_file()
    write_payload(checkpoint / name, tmp_path / "canary")
    write_payload(checkpoint / "training_args.bin", tmp_path / "canary")
    seal(checkpoint)
    here = [f"training.output_dir={folder}/run", "evaluation=null", "training.max_steps=3"]
    (folder / "run" / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=rf"checkpoint-2/{name} holds .* could run any code and is not read"):
        run_recipe(folder / "recipe.yaml", *here, resume=True)
    assert not (tmp_path / "canary").exists()
