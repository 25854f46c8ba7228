"""Tiny finished runs, made once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import PreTrainedTokenizerFast

from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.matching.config import Matching
from vocabridge.recipe import recipe_from_values
from vocabridge.run import distill

sys.path.append(str(Path(__file__).parent))  # for random_example

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dskd_cma": {"name": "dskd_cma", "matching": "gan", "gan": {"hidden_size": 16}, "position_weight": 0.2},
    "dskd_cla": {"name": "dskd_cla", "query_start": "random"},
    "composed": {"terms": [{"name": "cross_entropy"}, {"name": "uld"}, {"name": "dskd_cla", "query_start": "random"}]},
    "uld": {"name": "uld"},
    "lora": {"name": "dskd_cma", "matching": "none", "matching_weight": 0},
    **{
        kind: {"name": "dskd_cma", "matching": kind, "matching_weight": 0 if kind == "none" else 0.1}
        for kind in get_args(Matching)
    },
}
STUDENTS: dict[str, dict[str, Any]] = {"lora": {"lora": {"r": 4}, "dtype": "float32"}}


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> Callable[[str], Path]:
    """Folder of a run of 6 steps over all of ``ROWS``, whose probe set is ``ROWS`` too; the rows are in data.jsonl."""
    root = tmp_path_factory.mktemp("runs")
    for name, model, tokenizer in [
        ("student", student_model(tiny_bpe_tokenizer), tiny_bpe_tokenizer),
        ("teacher", teacher_model(tiny_sentencepiece_tokenizer), tiny_sentencepiece_tokenizer),
    ]:
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    @cache
    def make(name: str) -> Path:
        training = {
            "output_dir": str(root / name),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.02,
            "projector_learning_rate": 0.02,
            "seed": 7,
            "logging_steps": 2,
            "diagnostics_steps": 3,
            "diagnostics_examples": len(ROWS),
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        values = {
            "data": {"train": str(root / "data.jsonl"), "max_length": 128},
            "student": {"model": str(root / "student"), **STUDENTS.get(name, {})},
            "teacher": {"model": str(root / "teacher")},
            "objective": OBJECTIVES[name],
            "training": training,
        }
        return distill(recipe_from_values(values)).run_dir

    return make
