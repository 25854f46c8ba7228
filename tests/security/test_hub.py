"""``push_to_hub``: one upload, of a finished run, and only what others need of it; the hub is a stand-in."""

from __future__ import annotations

import os
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from tiny_recipe import write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tiny_pair import ROWS, student_model
from vocabridge.errors import UserError
from vocabridge.hub import files_to_upload, upload_run
from vocabridge.recipe import load_recipe
from vocabridge.run import distill
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig

STUDENT = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RECORDS = {"README.md", "recipe.yaml", "run.json", "metrics.jsonl", "trainer_state.json"}


class StandIn:
    """Takes what the hub's client would send, into a folder for each upload."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[tuple[str, bool | None]] = []
        self.uploads: list[SimpleNamespace] = []
        self.is_down = False
        self.must_be_there: Path | None = None

    def create_repo(self, repo_id: str, *, private: bool | None = None, **_: Any) -> SimpleNamespace:
        self.made.append((repo_id, private))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> SimpleNamespace:
        if self.is_down:
            raise ConnectionError("the hub is\ndown")
        assert not options.get("run_as_future"), "the folder may change meanwhile"
        assert self.must_be_there is None or self.must_be_there.is_file()
        paths = [Path(folder, name) for folder, _, names in os.walk(folder_path) for name in names]
        names = sorted(path.relative_to(folder_path).as_posix() for path in paths)
        patterns = {key: options.get(key) for key in ("allow_patterns", "ignore_patterns")}
        sent, target = list(filter_repo_objects(names, **patterns)), self.folder / str(len(self.uploads))
        for name in sent:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, target / name)
        self.uploads.append(SimpleNamespace(repository=repo_id, names=set(sent), folder=target, **options))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/{len(self.uploads)}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, *args, **kw: stand_in.create_repo(*args, **kw))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, **kw: stand_in.upload_folder(**kw))
    return stand_in


def pickles(folder: Path) -> list[Path]:
    """Outside of checkpoints, which hold an optimizer's state for a resumption."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
    return [path for path in paths if not path.parts[0].startswith("checkpoint-")]


def test_a_run_is_pushed_once_when_it_is_finished(
    hub: StandIn,
    tmp_path: Path,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> None:
    on_hub = {"push_to_hub": True, "hub_model_id": "me/small", "hub_private_repo": True, "hub_revision": "trial"}
    recipe = write_recipe(tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, **on_hub)
    run = tmp_path / "run"
    hub.must_be_there = run / "evaluation" / "results.json"
    distill(load_recipe(recipe))
    assert (run / "checkpoint-2" / "optimizer.pt").is_file(), "it was saved meanwhile"
    (upload,) = hub.uploads
    assert (upload.repository, upload.revision) == ("me/small", "trial")
    assert set(hub.made) == {("me/small", True)}
    assert upload.names == STUDENT | RECORDS | {"objective.safetensors"}
    assert pickles(run) == []
    assert 'from_pretrained("me/small")' in (upload.folder / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(upload.folder)
    assert tokenizer("The capital").input_ids == tiny_bpe_tokenizer("The capital").input_ids
    pushed, kept = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (upload.folder, run))
    assert all(torch.equal(value, kept[name]) for name, value in pushed.items())


def test_a_push_that_fails_leaves_the_run_whole_and_says_how_to_do_it_by_hand(
    hub: StandIn,
    tmp_path: Path,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> None:
    recipe = write_recipe(tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, push_to_hub=True)
    run = tmp_path / "run"
    hub.is_down = True
    with pytest.raises(UserError) as caught:
        distill(load_recipe(recipe))
    told = str(caught.value)
    assert told.startswith(
        f"{run}: the run is finished and whole in its folder, but was not uploaded (the hub is down)"
    )
    words = shlex.split(told.partition("by hand: ")[2])
    assert words[:5] == ["hf", "upload", "me/run", str(run), "."]
    excluded = [pattern for option, pattern in pairwise(words) if option == "--exclude"]
    names = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]
    by_hand = set(filter_repo_objects([*names, ".secret.json", "study.log"], ignore_patterns=excluded))
    assert by_hand == set(files_to_upload(run)), "what the upload itself sends"
    assert by_hand >= STUDENT | RECORDS
    assert any(name.startswith("evaluation/") for name in names)
    assert any(name.startswith("checkpoint-2/") for name in names)
    assert {path.name for path in run.iterdir()} >= STUDENT | RECORDS | {"evaluation", "checkpoint-2"}
    AutoModelForCausalLM.from_pretrained(run)

    hub.is_down = False
    distill(load_recipe(recipe), resume=True)
    (upload,) = hub.uploads
    assert upload.repository == "me/run"
    assert upload.names >= STUDENT | RECORDS


def test_of_a_trainer_only_what_is_asked_for_is_pushed(
    hub: StandIn, tmp_path: Path, tiny_bpe_tokenizer: PreTrainedTokenizerFast
) -> None:
    run = tmp_path / "run"
    trainer = DistillationTrainer(
        student_model(tiny_bpe_tokenizer),
        objective="cross_entropy",
        args=DistillationConfig(
            str(run),
            push_to_hub=True,
            max_steps=2,
            save_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=ROWS[:4],
        student_tokenizer=tiny_bpe_tokenizer,
    )
    trainer.train()
    assert hub.uploads == [], "a checkpoint is no finished student"
    trainer.save_model()
    trainer.save_model(str(tmp_path / "other"))
    assert trainer.push_to_hub("Once more", revision="trial") == "https://hub/me/run/3"
    assert [upload.repository for upload in hub.uploads] == ["me/run"] * 3
    assert pickles(run) == pickles(tmp_path / "other") == []
    for upload in hub.uploads:
        assert upload.names >= STUDENT
        assert not any(name.startswith(("checkpoint-", ".")) for name in upload.names)
    assert (hub.uploads[-1].commit_message, hub.uploads[-1].revision) == ("Once more", "trial")
    for options in ({"blocking": False}, {"tags": ["mine"]}):
        with pytest.raises(UserError, match=r"write README\.md"):
            trainer.push_to_hub(**options)
    assert len(hub.uploads) == 3


def test_no_link_no_pickle_and_nothing_hidden_leaves_the_folder(hub: StandIn, tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    for name in (
        *(
            "config.json",
            "odd [name].json",
            "adapter/adapter_model.safetensors",
            "additional_chat_templates/tool.jinja",
        ),
        *("training_args.bin", "optimizer.pt", ".secret.json", ".saving/checkpoint-1/model.safetensors", "x.tmp"),
        *("checkpoint-1/config.json", "evaluation/answers.jsonl", "adapter/optimizer.pt", "runs/events.json"),
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    outside.mkdir()
    (outside / "private.json").write_text("{}")
    (run / "linked.json").symlink_to(outside / "private.json")
    upload_run(run, DistillationConfig(str(run), use_cpu=True, report_to="none"))
    shutil.rmtree(run / "adapter")
    (run / "adapter").symlink_to(outside)
    upload_run(run, DistillationConfig(str(run), use_cpu=True, report_to="none"))
    first, second = (upload.names for upload in hub.uploads)
    assert second == {"config.json", "odd [name].json", "additional_chat_templates/tool.jinja"}
    assert first == second | {"adapter/adapter_model.safetensors"}
