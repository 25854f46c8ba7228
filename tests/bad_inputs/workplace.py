"""A folder in which every command succeeds, small edits that spoil it, and what lies in it before and after."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from tiny_pair import ROWS, save_pair

FINISHED_RUN = "finished"
"""Of the good recipe; a case that needs one finds its copy in ``run``."""


def write_workplace(folder: Path, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> None:
    """Models, data, a recipe and a study."""
    save_pair(folder, student, teacher)
    for name in ("train", "test"):
        write_rows(folder / f"{name}.jsonl", ROWS[:4])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(good_recipe(), sort_keys=False))
    (folder / "study.yaml").write_text(yaml.safe_dump(good_study(), sort_keys=False))


def good_recipe() -> dict[str, Any]:
    return {
        "data": {"train": "train.jsonl", "max_length": 64},
        "student": {"model": "student", "dtype": "float32"},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "objective": {"name": "dskd_cma", "matching": "none"},
        "training": {
            "output_dir": "run",
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "save_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
        },
        "evaluation": {"data": ["test.jsonl"], "seeds": [1], "max_new_tokens": 2, "limit": 2},
    }


def good_study() -> dict[str, Any]:
    variants = {"plain": {"teacher": None, "objective": {"name": "cross_entropy"}}, "kd": None}
    return {"base": "recipe.yaml", "output_dir": "study", "baseline": "plain", "seeds": [0], "variants": variants}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def contents(folder: Path) -> dict[str, str]:
    """Every path below, but those of the user's own cache, with the checksum of what is in it."""
    return {
        path.relative_to(folder).as_posix(): _checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.relative_to(folder).parts[0] != "user-cache"
    }


def _checksum(path: Path) -> str:
    if not path.is_file():
        return "no file"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


# --- edits -----------------------------------------------------------------------------------------------------------


def change_yaml(path: Path, **changes: Any) -> None:
    """``training__seed=-1`` sets a key of a section; None removes it."""
    values = yaml.safe_load(path.read_text())
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        here = values
        for section in sections:
            here = here[section]
        if value is None:
            del here[key]
        else:
            here[key] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path} has no {old!r}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def change_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Sets keys; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_weights(folder: Path, edit: Any) -> None:
    """``edit`` changes the mapping of names to tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
