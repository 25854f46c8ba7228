"""The teacher cache from a recipe to a trained student, and its command."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from tiny_pair import ROWS, save, student_model
from vocabridge import cache_teacher as module
from vocabridge import cli
from vocabridge.cache_teacher import cache_teacher
from vocabridge.errors import UserError
from vocabridge.models import teacher_capture
from vocabridge.models.spec import CacheSpec, ModelSpec
from vocabridge.recipe import load_recipe
from vocabridge.run import distill, write_teacher_cache
from vocabridge.text import read_examples
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig

# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path, teacher_folder: Path, tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> Path:
    save(tmp_path / "student", student_model(tiny_bpe_tokenizer), tiny_bpe_tokenizer)
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "train.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    (tmp_path / "dev.jsonl").write_text("".join(lines[6:]), encoding="utf-8")
    values = {
        "data": {"train": "train.jsonl", "validation": "dev.jsonl", "max_length": 64},
        "student": {"model": "student"},
        "teacher": {"model": str(teacher_folder)},
        "objective": {"name": "dskd_cma", "matching": "none"},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "steps",
            "eval_steps": 3,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "diagnostics_steps": 10,
            "diagnostics_examples": 1,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def logged(run_dir: Path) -> list[dict[str, float]]:
    timed = ("runtime", "per_second", "epoch", "total_flos")
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if not any(t in name for t in timed)} for entry in entries]


def test_training_from_a_cache_gives_the_losses_of_a_live_teacher(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(load_recipe(recipe_file))
    cache = f"teacher.cache={tmp_path}/cache"
    distill(load_recipe(recipe_file, [cache, f"training.output_dir={tmp_path}/cached"]))
    expected, found = logged(tmp_path / "run"), logged(tmp_path / "cached")
    assert [sorted(entry) for entry in found] == [sorted(entry) for entry in expected]
    assert any("probe/" in name for entry in found for name in entry)
    assert any("eval_loss" in entry for entry in found)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-5)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(module, "load_teacher", refuse)
    again = load_recipe(recipe_file, [cache, f"training.output_dir={tmp_path}/again"])
    distill(again)
    assert logged(tmp_path / "again") == found, "from the same files the same numbers"
    assert load_recipe(tmp_path / "again" / "recipe.yaml") == again


def test_library_takes_a_cached_teacher(
    teacher_folder: Path, tmp_path: Path, tiny_bpe_tokenizer: PreTrainedTokenizerFast
) -> None:
    def trainer(objective: Any, rows: list[dict[str, str]] = ROWS) -> DistillationTrainer:
        arguments = DistillationConfig(
            output_dir=str(tmp_path / "run"), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
            save_strategy="no", diagnostics_steps=0,
        )  # fmt: skip
        return DistillationTrainer(
            student_model(tiny_bpe_tokenizer),
            cached,
            objective=objective,
            args=arguments,
            train_dataset=rows,
            student_tokenizer=tiny_bpe_tokenizer,
        )

    spec = ModelSpec(model=str(teacher_folder), cache=CacheSpec(folder=str(tmp_path / "cache")), device="cpu")
    cached = cache_teacher(spec, read_examples(ROWS))
    trained = trainer("uld")
    trained.train()
    assert trained.state.global_step == 2
    with pytest.raises(UserError, match="reads inner layers of the teacher, but a teacher cache holds"):
        trainer("hidden_state")
    with pytest.raises(UserError, match="lacks 1 of 9 rows"):
        trainer("uld", [*ROWS, {"prompt": "New?\n", "response": "Yes."}])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.cache=true"], r"student\.cache has no meaning"),
        (["teacher.cache=true", "data.streaming=true", "data.validation=[]", "training.eval_strategy=no"],
         r"teacher\.cache needs the rows before training"),
        (["teacher.cache=true", "objective={name: hidden_state}"], r"teacher\.cache holds last hidden states only"),
        (["teacher.cache=runs/x/cache", "training.output_dir=runs/x"], r"teacher\.cache lies in the run folder"),
        (["teacher.cache={foldr: x}"], r"teacher\.cache\.foldr is unknown; did you mean 'folder'"),
        (["teacher.cache=3"], r"teacher\.cache must be a mapping"),
        (["teacher.cache.dtype=int8"], r"teacher\.cache\.dtype must be one of"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(recipe_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(recipe_file, overrides)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("true", CacheSpec()),
        ("false", None),
        ("null", None),
        ("some/folder", CacheSpec(folder="some/folder")),
        ("{dtype: bfloat16}", CacheSpec(dtype="bfloat16")),
    ],
)
def test_ways_to_write_it(recipe_file: Path, text: str, expected: CacheSpec | None) -> None:
    recipe = load_recipe(recipe_file, [f"teacher.cache={text}"])
    assert recipe.teacher is not None
    assert recipe.teacher.cache == expected


# --- the command -----------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vocabridge", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_command_says_how_much_it_writes_and_where(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    arguments = ["cache-teacher", str(recipe_file), f"teacher.cache={cache}", "training.disable_tqdm=false"]
    assert command(monkeypatch, *arguments) == 0
    first = capsys.readouterr()
    tokens = write_teacher_cache(load_recipe(recipe_file, arguments[2:3])).cache._shards[0].facts.tokens
    size = tokens * (48 * 4 + 12) / 1e6
    assert f"teacher cache {cache}: 8 rows, {tokens} tokens, {size:.2f} MB to write (float32)\n" in first.err
    assert "Running the teacher" in first.out
    assert first.out.splitlines()[-1].startswith(f"{cache}: 8 rows, ")
    assert command(monkeypatch, *arguments) == 0
    assert "to write" not in capsys.readouterr().err
    first_shard = sorted(cache.glob("*.safetensors"))[0]
    first_shard.write_bytes(first_shard.read_bytes()[:-1])
    assert command(monkeypatch, *arguments) == 2
    assert f"error: teacher cache: {first_shard} is damaged (it has" in capsys.readouterr().err


def test_command_after_ctrl_c(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(teacher_capture, "TOKENS_PER_BATCH", 1)
    original, calls = teacher_capture.teacher_side, []

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(teacher_capture, "teacher_side", interrupt)
    arguments = ["cache-teacher", str(recipe_file), f"teacher.cache={tmp_path}/cache"]
    # A shell without job control starts its background jobs with SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert command(monkeypatch, *arguments) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.endswith("interrupted; the same command goes on where it stopped\n")
    assert command(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/cache: 8 rows, ")
    assert len(calls) == 3 + 1 + 5, "three rows were kept"


def test_command_needs_a_teacher(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["teacher=null", "objective={name: cross_entropy}"]
    assert command(monkeypatch, "cache-teacher", str(recipe_file), *overrides) == 2
    assert capsys.readouterr().err == "error: the recipe has no 'teacher' section, so there is nothing to cache.\n"
