"""The table of ``docs/scaling.md``: what known pairs need on 1, 8 and 16 GPUs; ``docs/tables.py`` writes it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DEVICE_MEMORY = 80 * 10**9
LAYOUTS: tuple[tuple[Literal["ddp", "fsdp2"], int], ...] = (("ddp", 1), ("ddp", 8), ("fsdp2", 8), ("fsdp2", 16))
ROWS, LENGTH = 8, 512

CONFIGS: dict[str, dict[str, Any]] = {
    "GPT-2 124M": {"model_type": "gpt2"},
    "Qwen1.5-1.8B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "TinyLlama 1.1B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "Mistral 7B": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "Qwen2.5-72B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""As published, for what has weights."""


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the table."""

    student: str
    teacher: str
    objective: str
    teacher_settings: dict[str, Any]
    text: str = ""
    """What the teacher's settings come to."""


CASES = (
    Case("GPT-2 124M", "Qwen1.5-1.8B", "dskd_cma", {}),
    Case("TinyLlama 1.1B", "Mistral 7B", "dskd_cma", {}),
    Case("TinyLlama 1.1B", "Mistral 7B", "dskd_cma", {"cache": True}, "cached"),
    Case("Qwen2.5-7B", "Qwen2.5-72B", "logit_kd", {"quantization": "4bit"}, "4 bits"),
    Case("Qwen2.5-7B", "Qwen2.5-72B", "logit_kd", {"cache": True}, "cached"),
)


def plan_table() -> str:
    """Gigabytes on each GPU; in brackets what does not fit."""
    from vocabridge.plan.models import planned_models
    from vocabridge.plan.recipe_plan import planned_total

    heads = [f"{number} x {strategy}" if number > 1 else "1 GPU" for strategy, number in LAYOUTS]
    lines = [f"| student | teacher | objective | {' | '.join(heads)} |", "|---" * (3 + len(LAYOUTS)) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            recipe = _recipe(case, Path(folder))
            models = planned_models(recipe)
            cells = [
                _cell(planned_total(recipe, models, strategy=strategy, world_size=number))
                for strategy, number in LAYOUTS
            ]
            teacher = f"{case.teacher}, {case.text}" if case.text else case.teacher
            lines.append(f"| {case.student} | {teacher} | `{case.objective}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(total: int) -> str:
    from vocabridge.plan.recipe_plan import USABLE

    size = f"{total / 1e9:.0f}"
    return size if total <= USABLE * DEVICE_MEMORY else f"({size})"


def _recipe(case: Case, folder: Path) -> Any:
    from vocabridge.recipe import recipe_from_values

    tokenizer = _tokenizer_folder(folder)
    student, teacher = (
        {"model": _model_folder(name, folder), "tokenizer": tokenizer} for name in (case.student, case.teacher)
    )
    objective = {"query_start": "random"} if case.objective == "dskd_cma" else {}
    training = {"bf16": True, "activation_checkpointing": True, "per_device_train_batch_size": ROWS}
    values = {
        "data": {"train": ["org/data"], "max_length": LENGTH},
        "student": student,
        "teacher": teacher | case.teacher_settings,
        "objective": {"name": case.objective, **objective},
        "training": {"output_dir": str(folder / "run"), **training},
    }
    return recipe_from_values(values)


def _model_folder(name: str, folder: Path) -> str:
    from transformers import AutoConfig

    path = folder / name.replace(" ", "-")
    values: dict[str, Any] = {"dtype": "bfloat16", "tie_word_embeddings": name.startswith("GPT-2")} | CONFIGS[name]
    AutoConfig.for_model(**values).save_pretrained(path)
    return str(path)


def _tokenizer_folder(folder: Path) -> str:
    """One of bytes for all models: no objective of the table learns anything of a vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = folder / "tokenizer"
    pieces = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(path)
    return str(path)
