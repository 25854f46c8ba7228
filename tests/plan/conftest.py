"""A tiny pair on disk as a hub has it: configurations and tokenizers, but no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.recipe import Recipe, recipe_from_values


@pytest.fixture(scope="session")
def pair_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for side, make, tokenizer in (
        ("student", student_model, tiny_bpe_tokenizer),
        ("teacher", teacher_model, tiny_sentencepiece_tokenizer),
    ):
        make(tokenizer).config.save_pretrained(folder / side)
        tokenizer.save_pretrained(folder / side)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def make_recipe(pair_folder: Path, tmp_path: Path) -> Any:
    """``make_recipe(section={key: value}, ...)`` -> a recipe on the tiny pair."""

    def make(**sections: dict[str, Any] | None) -> Recipe:
        values: dict[str, Any] = {
            "data": {"train": [str(pair_folder / "train.jsonl")], "max_length": 32},
            "student": {"model": str(pair_folder / "student")},
            "teacher": {"model": str(pair_folder / "teacher")},
            "objective": {"name": "dskd_cma", "gan": {"hidden_size": 16}},
            "training": {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "use_cpu": True},
        }
        for name, section in sections.items():
            replaced = name == "objective" or section is None
            values[name] = section if replaced else {**values.get(name, {}), **(section or {})}
        return recipe_from_values(values)

    return make
