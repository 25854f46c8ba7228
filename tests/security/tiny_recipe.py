"""A recipe of two tiny models in one folder, trained and evaluated in a second or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerFast

from tiny_pair import ROWS, save_pair


def write_recipe(
    folder: Path, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, **training: Any
) -> Path:
    save_pair(folder, student, teacher)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]), encoding="utf-8")
    values = {
        "data": {"train": "train.jsonl", "max_length": 64},
        "student": {"model": "student", "dtype": "float32"},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "objective": {"name": "dskd_cma", "matching": "gan", "gan": {"hidden_size": 16}},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "save_steps": 1,
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            **training,
        },
        "evaluation": {"data": ["train.jsonl"], "seeds": [1], "max_new_tokens": 2, "limit": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
