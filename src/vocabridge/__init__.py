"""Distil a large language model into a small one when the two have different tokenizers and vocabularies.

Public names: DistillationTrainer, DistillationConfig, Example, PairTokenizer, PairCollator, Recipe, load_recipe,
distill, evaluate_model, pair_report, UserError, __version__. They are imported when first used, so that importing the
package (and the command line) costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vocabridge.alignment.report import pair_report
    from vocabridge.errors import UserError
    from vocabridge.evaluation.evaluate import evaluate_model
    from vocabridge.pairs import PairCollator, PairTokenizer
    from vocabridge.recipe import Recipe, load_recipe
    from vocabridge.run import distill
    from vocabridge.text import Example
    from vocabridge.trainer import DistillationTrainer
    from vocabridge.training_arguments import DistillationConfig

__version__ = "0.1.0"

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "Example",
    "PairCollator",
    "PairTokenizer",
    "Recipe",
    "UserError",
    "__version__",
    "distill",
    "evaluate_model",
    "load_recipe",
    "pair_report",
]

_HOMES = {
    "DistillationConfig": "training_arguments",
    "DistillationTrainer": "trainer",
    "Example": "text",
    "PairCollator": "pairs",
    "PairTokenizer": "pairs",
    "Recipe": "recipe",
    "UserError": "errors",
    "distill": "run",
    "evaluate_model": "evaluation.evaluate",
    "load_recipe": "recipe",
    "pair_report": "alignment.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vocabridge' has no attribute '{name}'")
    return getattr(importlib.import_module(f"vocabridge.{_HOMES[name]}"), name)
