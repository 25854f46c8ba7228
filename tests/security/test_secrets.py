"""Tokens of model hubs: they stay in the environment; nothing that a run writes or prints holds one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_recipe import write_recipe
from transformers import PreTrainedTokenizerFast

from vocabridge.errors import UserError
from vocabridge.recipe import load_recipe
from vocabridge.report.collect import collect
from vocabridge.report.page import render_page
from vocabridge.run import distill

TOKEN = "hf_" + "aVerySecretTokenOfTheHub"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The token where users have it: in the environment and in the file that 'hf auth login' writes."""
    for name in VARIABLES:
        monkeypatch.setenv(name, TOKEN)
    (tmp_path / "hf-home").mkdir()
    (tmp_path / "hf-home" / "token").write_text(TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hf-home" / "token"))


def files_with(folder: Path, word: bytes) -> Iterator[str]:
    return (str(path) for path in sorted(folder.rglob("*")) if path.is_file() and word in path.read_bytes())


def test_no_file_and_no_line_of_a_run_holds_the_token(
    secrets: None,
    tmp_path: Path,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import get_token

    assert get_token() == TOKEN, "the libraries do find it"
    caplog.set_level(logging.DEBUG)
    distill(load_recipe(write_recipe(tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)))
    run = tmp_path / "run"
    page = render_page(collect(run))
    names = {path.name for path in run.rglob("*") if path.is_file()}
    assert {"run.json", "recipe.yaml", "README.md", "metrics.jsonl", "trainer_state.json", "results.json"} <= names
    assert list(files_with(run, TOKEN.encode())) == []
    assert TOKEN not in page
    captured = capfd.readouterr()
    assert caplog.text
    assert TOKEN not in caplog.text + captured.out + captured.err
    assert list(files_with(run, b"run.json")), "the search finds what is there"


def test_what_a_run_records_of_its_environment_is_a_fixed_list(secrets: None, tmp_path: Path) -> None:
    from vocabridge.run_record import environment

    found = environment()
    assert set(found) == {"python", "packages", "machine", "git_commit", "command"}
    assert set(found["machine"]) == {"platform", "cpu_count", "torch_threads", "device", "device_count"}
    assert TOKEN not in json.dumps(found)


BASE = """\
data: {train: org/rows}
student: {model: org/student}
objective: {name: cross_entropy}
training:
  output_dir: runs/x
"""


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub_token"])
def test_a_token_in_a_recipe_is_refused_and_not_repeated(tmp_path: Path, key: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{BASE}  {key}: {TOKEN}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert f"training.{key}" in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("override", ["training.hub_token=TOKEN", "training.hub_tokn=TOKEN", "student.token=TOKEN"])
def test_a_token_on_the_command_line_is_refused_and_not_repeated(tmp_path: Path, override: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE)
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override.replace("TOKEN", TOKEN)])
    assert "command line: " in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_the_hint_says_where_a_token_belongs(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{BASE}  hub_token: {TOKEN}\n")
    with pytest.raises(UserError, match=r"training\.hub_token cannot be set in a recipe: log in with 'hf auth login'"):
        load_recipe(path)
