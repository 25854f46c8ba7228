"""Imports point down the pipeline only, and what must answer at once imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vocabridge.recipe

PACKAGE = Path(vocabridge.recipe.__file__).parents[1]

LAYERS: list[set[str]] = [
    {"errors", "suggest", "settings", "durable", "preemption", "metrics_log"},
    {"ranks"},
    {"objectives.config", "matching.config"},  # plain settings, read without torch by the objective registry
    {"text"},
    {"alignment", "prompts", "pairs"},
    {"models", "fingerprints"},
    {"losses"},
    {"matching"},
    {"objectives"},
    {"recipe"},
    {"distillation_model"},
    {"compilation", "sharding", "zero"},
    {"checkpoint_files"},
    {"saving", "interrupt", "model_card", "run_record", "training_arguments", "pair_cache", "assembly", "diagnostics"}
    | {"checkpoint_contents", "rehearsal", "hub"},
    {"batching", "sharded_state", "step_rows"},
    {"resuming"},
    {"run_start"},
    {"checkpointing"},
    {"optimizing"},
    {"trainer"},
    {"evaluation"},
    {"analysis"},
    {"run", "generate_data", "cache_teacher"},
    {"plan"},
    {"study"},
    {"report"},
    {"command_line"},
    {"cli", "__main__"},
    {""},  # the package itself: public names
]
"""Lowest first; a module may import its own layer and those below it."""

TORCH_FREE = (
    "recipe",
    "cli",
    "text",
    "alignment",
    "models.spec",
    "objectives",
    "matching.config",
    "settings",
    "report.page",
)
SLOW = ("torch", "transformers", "datasets", "numpy", "peft", "sklearn")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> int:
    """The layer of the longest listed name that ``module`` is or lies in."""
    names = [module.rsplit(".", cut)[0] for cut in range(module.count(".") + 1)]
    for name in names:
        for index, layer_names in enumerate(LAYERS):
            if name in layer_names:
                return index
    raise AssertionError(f"vocabridge.{module} has no layer; give it one in tests/test_imports.py")


def imported(module: str, *, module_level_only: bool = False) -> Iterator[str]:
    """Absolute names of what a module imports at run time; ``from x import y`` gives ``x.y``."""
    path = MODULES[module]
    package = ["vocabridge", *module.split(".")] if module else ["vocabridge"]
    package = package if path.name == "__init__.py" else package[:-1]
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), module_level_only):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def statements(node: ast.AST, module_level_only: bool) -> Iterator[ast.AST]:
    """All nodes below ``node`` but those under ``if TYPE_CHECKING``, and perhaps those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (part for statement in child.orelse for part in statements(statement, module_level_only))
        elif not (module_level_only and isinstance(child, ast.FunctionDef)):
            yield child
            yield from statements(child, module_level_only)


def own_module(name: str) -> str | None:
    """``vocabridge.losses.divergences.forward_kl`` -> ``losses.divergences``; None for other packages."""
    if name.split(".")[0] != "vocabridge":
        return None
    inner = name.removeprefix("vocabridge").removeprefix(".")
    while inner not in MODULES:
        inner = inner.rpartition(".")[0]
    return inner


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_down_the_pipeline(module: str) -> None:
    for name in imported(module):
        if (target := own_module(name)) is not None:
            assert layer(target) <= layer(module), f"vocabridge.{module} imports {name}, which comes after it"


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "losses"])
def test_losses_import_nothing_of_ours(module: str) -> None:
    foreign = {own_module(name) for name in imported(module)} - {None}
    assert all(name == "losses" or name.startswith("losses.") for name in foreign if name is not None), foreign


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "objectives"])
def test_objectives_never_import_the_trainer(module: str) -> None:
    later = {"trainer", "run", "evaluation", "recipe", "cli"}
    assert not {(own_module(name) or "").split(".")[0] for name in imported(module)} & later


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.split(".")[0] in ("recipe", "cli", "text", "alignment", "settings")]
)
def test_light_modules_name_no_torch_at_module_level(module: str) -> None:
    heads = {name.split(".")[0] for name in imported(module, module_level_only=True)}
    assert not heads & {"torch", "peft", "datasets", "sklearn"}


def test_the_reader_of_imports_finds_what_it_should() -> None:
    assert "vocabridge.recipe.loading.load_recipe" in set(imported("recipe"))
    assert "vocabridge.run.distill" in set(imported("cli"))  # inside a function
    assert "vocabridge.run.distill" not in set(imported("cli", module_level_only=True))
    assert "vocabridge.recipe.Recipe" not in set(imported("cli", module_level_only=True))  # for type checkers only
    assert own_module("vocabridge.errors.UserError") == "errors"
    assert layer("objectives.config") < layer("objectives.dskd_cma") < layer("trainer") < layer("cli")
    with pytest.raises(AssertionError, match="has no layer"):
        layer("nowhere")


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_modules_import_no_torch(module: str) -> None:
    code = f"import sys, vocabridge.{module}; print(*sorted(set(sys.modules) & {set(SLOW)}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Arrays and a tokenizer's type; a study's statistics.
    allowed = {"alignment": {"numpy", "transformers"}, "report.page": {"numpy"}}.get(module, set())
    assert set(result.stdout.split()) <= allowed
