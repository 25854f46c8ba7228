"""Recipes: one YAML file per run, one section per stage, checked completely before any model loads.

Imports no torch, so that ``vocabridge validate`` answers at once.
"""

from vocabridge.recipe.loading import load_recipe, recipe_from_values
from vocabridge.recipe.objective import ObjectiveSettings
from vocabridge.recipe.schema import DataSettings, EvaluationSettings, Recipe
from vocabridge.recipe.training import TrainingSettings

__all__ = [
    "DataSettings",
    "EvaluationSettings",
    "ObjectiveSettings",
    "Recipe",
    "TrainingSettings",
    "load_recipe",
    "recipe_from_values",
]
