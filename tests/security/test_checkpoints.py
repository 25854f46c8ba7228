"""Checkpoints from strangers: no pickle is read, no code that ships with a model runs unless it was allowed."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from payload import Payload, write_payload
from transformers import PreTrainedTokenizerFast

from tiny_pair import student_model
from vocabridge.errors import UserError
from vocabridge.models.loading import load_model, load_student, load_teacher, load_tokenizer
from vocabridge.models.spec import ModelSpec
from vocabridge.models.trunkless import load_ends

LOADERS = {"model": load_model, "student": load_student, "teacher": load_teacher, "ends": load_ends}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    student_model(tiny_bpe_tokenizer).save_pretrained(folder)
    tiny_bpe_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that is allowed is copied to a folder of the user's, which must not be the real one."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr("sys.path", [folder, *sys.path])
        yield


@pytest.fixture
def checkpoint(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def as_spec(folder: Path, **settings: Any) -> ModelSpec:
    return ModelSpec(model=str(folder), device="cpu", **settings)


def test_the_payload_works(tmp_path: Path, canary: Path) -> None:
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists()
    write_payload(tmp_path / "payload.bin", other := tmp_path / "other")
    torch.load(tmp_path / "payload.bin", weights_only=False)
    assert other.exists()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_is_refused_with_the_reason(checkpoint: Path, canary: Path, name: str, loader: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    write_payload(checkpoint / name, canary)
    with pytest.raises(UserError, match=rf"as a pickle \({name}\), which can run any code .* as safetensors"):
        LOADERS[loader](as_spec(checkpoint))
    assert not canary.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_trusting_a_models_code_does_not_allow_its_pickle(checkpoint: Path, canary: Path, trusted: bool) -> None:
    (checkpoint / "model.safetensors").unlink()
    write_payload(checkpoint / "pytorch_model.bin", canary)
    with pytest.raises(UserError, match="as a pickle"):
        load_model(as_spec(checkpoint, trust_remote_code=trusted))
    assert not canary.exists()


def test_a_pickle_beside_the_weights_is_not_read(checkpoint: Path, canary: Path) -> None:
    write_payload(checkpoint / "pytorch_model.bin", canary)
    write_payload(checkpoint / "training_args.bin", canary)
    load_student(as_spec(checkpoint))
    load_tokenizer(as_spec(checkpoint))
    assert not canary.exists()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("name", "why"),
    [("pytorch_model.bin", "as a pickle"), ("../outside.safetensors", "outside"), ("/etc/hostname", "outside")],
)
def test_an_index_names_safetensors_in_its_own_folder_only(
    checkpoint: Path, canary: Path, name: str, why: str, loader: str
) -> None:
    """A decoy makes the folder look like safetensors; the index decides what is read."""
    shutil.copy(checkpoint / "model.safetensors", checkpoint.parent / "outside.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "decoy.safetensors")
    write_payload(checkpoint / "pytorch_model.bin", canary)
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=why):
        LOADERS[loader](as_spec(checkpoint))
    assert not canary.exists()


def with_own_code(checkpoint: Path, canary: Path) -> Path:
    """The checkpoint with Python files for its configuration, model and tokenizer that leave a mark when they run."""
    code = f"import os\nos.makedirs({str(canary)!r}, exist_ok=True)\n"
    for module, base, name in (
        ("configuration_own", "transformers.LlamaConfig", "OwnConfig"),
        ("modeling_own", "transformers.LlamaForCausalLM", "OwnModel"),
        ("tokenization_own", "transformers.PreTrainedTokenizerFast", "OwnTokenizer"),
    ):
        own = f"import transformers\n{code}\nclass {name}({base}):\n"
        own += {
            "OwnConfig": "    model_type = 'own'\n",
            "OwnModel": "    from .configuration_own import OwnConfig as config_class\n",
            "OwnTokenizer": "    pass\n",
        }[name]
        (checkpoint / f"{module}.py").write_text(own)
    change_json(
        checkpoint / "config.json",
        auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
        model_type="own",
    )
    change_json(
        checkpoint / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        tokenizer_class="OwnTokenizer",
    )
    return checkpoint


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("loader", [*LOADERS, "tokenizer"])
def test_code_of_a_model_does_not_run_unless_allowed(
    checkpoint: Path, canary: Path, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked instead of refusing"))
    with_own_code(checkpoint, canary)
    with pytest.raises(UserError, match="trust_remote_code"):
        (LOADERS | {"tokenizer": load_tokenizer})[loader](as_spec(checkpoint))
    assert not canary.exists()


@pytest.mark.parametrize("loader", ["model", "ends", "tokenizer"])
def test_code_that_is_allowed_is_announced_before_it_runs(
    checkpoint: Path, canary: Path, loader: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_own_code(checkpoint, canary)
    announced: list[bool] = []

    def told(name: str, *rest: Any, **options: Any) -> Any:
        announced.append(any("trust_remote_code is on" in record.message for record in caplog.records))
        return original(name, *rest, **options)

    from transformers import dynamic_module_utils

    original = dynamic_module_utils.get_class_in_module
    monkeypatch.setattr(dynamic_module_utils, "get_class_in_module", told)
    spec = as_spec(checkpoint, trust_remote_code=True)
    (LOADERS | {"tokenizer": load_tokenizer})[loader](spec)
    assert canary.exists()
    assert announced
    assert all(announced)
    assert sum("trust_remote_code is on" in record.message for record in caplog.records) == 1, "once a model, not more"
    assert str(checkpoint) in caplog.text


def test_trust_is_given_for_one_model_at_a_time() -> None:
    from vocabridge.recipe import recipe_from_values

    recipe = recipe_from_values(
        {
            "data": {"train": "org/rows"},
            "student": {"model": "org/student"},
            "teacher": {"model": "org/teacher", "trust_remote_code": True},
            "objective": {"name": "uld"},
            "training": {"output_dir": "runs/x"},
        }
    )
    assert recipe.teacher is not None
    assert (recipe.student.trust_remote_code, recipe.teacher.trust_remote_code) == (False, True)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_pickled_adapter_beside_the_weights_does_not_run(checkpoint: Path, canary: Path, loader: str) -> None:
    """The library puts an adapter that it finds in the folder on top of the model."""
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "other/model"}
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter))
    write_payload(checkpoint / "adapter_model.bin", canary)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        LOADERS[loader](as_spec(checkpoint))
    assert not canary.exists()
