from pathlib import Path

import pytest

from vocabridge.errors import UserError
from vocabridge.models.checkpoint import check_weight_files, find_checkpoint


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen1.5-1.8B"])
def test_hub_ids(name):
    checkpoint = find_checkpoint(name)
    assert (checkpoint.name, checkpoint.gguf_file, checkpoint.is_local) == (name, None, False)
    check_weight_files(checkpoint)


def test_folder_and_gguf_file(tmp_path: Path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.GGUF").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = find_checkpoint("~/run")
    assert (folder.path, folder.gguf_file, folder.is_local) == (str(tmp_path / "run"), None, True)
    file = find_checkpoint("~/run/model.GGUF")
    assert (file.name, file.gguf_file, file.is_local) == (str(tmp_path / "run"), "model.GGUF", True)
    assert file.path == str(tmp_path / "run" / "model.GGUF")
    check_weight_files(file)


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "runs/a/b", "~/missing", "a b/c"])
def test_missing_folder(name):
    with pytest.raises(UserError, match=rf"folder '{name}' does not exist"):
        find_checkpoint(name)


def test_missing_names_have_suggestions(tmp_path: Path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(UserError, match=r"does not exist; did you mean 'teacher'\?"):
        find_checkpoint(str(tmp_path / "teachr"))
    with pytest.raises(UserError, match=r"GGUF file .* does not exist; did you mean 'model-q4.gguf'\?"):
        find_checkpoint(str(tmp_path / "model-q5.gguf"))


def test_other_file(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a file; give the folder"):
        find_checkpoint(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no config.json, so it is not a checkpoint.$"),
        (["a.gguf"], r"has no config.json.*; to load the GGUF file in it, give '.*a.gguf'"),
        (["config.json"], "has no model.safetensors.$"),
        (["config.json", "pytorch_model.bin"], r"as a pickle \(pytorch_model.bin\), which can run any code"),
        (["config.json", "pytorch_model.bin", "model-00001-of-00002.safetensors"], None),
    ],
)
def test_weight_files(tmp_path: Path, files, message):
    for name in files:
        (tmp_path / name).touch()
    checkpoint = find_checkpoint(str(tmp_path))
    if message is None:
        check_weight_files(checkpoint)
    else:
        with pytest.raises(UserError, match=message):
            check_weight_files(checkpoint)
