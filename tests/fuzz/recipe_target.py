"""Recipes, good and bad: read back as they were written, or refused in sentences before anything heavy is imported.

Imports neither torch nor transformers, and :func:`forbid_models` makes sure that nothing else does.
"""

from __future__ import annotations

import io
import math
import string
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vocabridge.cli import distill
from vocabridge.errors import UserError
from vocabridge.models.spec import ModelSpec
from vocabridge.objectives import objective_info, objective_names
from vocabridge.recipe import (
    DataSettings,
    EvaluationSettings,
    Recipe,
    TrainingSettings,
    load_recipe,
    recipe_from_values,
)

MODEL_MODULES = ("torch", "transformers", "safetensors", "peft", "datasets", "vocabridge.run")
"""What a recipe that is refused must never have needed."""


def forbid_models() -> None:
    """From now on an import of these fails, which shows as an error that is no :class:`UserError`."""
    for name in MODEL_MODULES:
        assert name not in sys.modules, f"{name} is imported already"
        sys.modules[name] = None  # type: ignore[assignment]


def check_text(text: str, overrides: list[str], folder: Path) -> str:
    """Load a recipe file; gives ``read`` or ``refused``.

    Raises:
        AssertionError: it does not read back, or is refused in another way than in sentences that name the recipe.
    """
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome = _outcome(lambda: load_recipe(path, overrides), folder, places=(f"{path}:", "command line: "))
    assert _reaches_models(path, overrides) == (outcome == "read")
    return outcome


def _reaches_models(path: Path, overrides: list[str]) -> bool:
    """Whether ``vocabridge distill`` gets as far as the module that loads models, which :func:`forbid_models` took."""
    try:
        with redirect_stderr(io.StringIO()):
            distill(path, overrides)
    except UserError:
        return False
    except ImportError as error:
        return "vocabridge.run" in str(error)
    raise AssertionError("the command came to an end without models")


def check_values(values: dict[str, Any], folder: Path) -> str:
    """Validate nested values as a library caller gives them; gives ``read`` or ``refused``."""
    return _outcome(lambda: recipe_from_values(values), folder, places=("recipe: ",))


def _outcome(load: Callable[[], Recipe], folder: Path, *, places: tuple[str, ...]) -> str:
    sentences: list[str] = []
    try:
        recipe = load()
    except UserError as error:
        sentences = str(error).split("\n")
    else:
        check_round_trip(recipe, folder)
    assert all(line.startswith(places) and line.isprintable() for line in sentences), sentences
    return "refused" if sentences else "read"


def check_round_trip(recipe: Recipe, folder: Path) -> None:
    """Written out, read from the file and from its values, the recipe is the same."""
    resolved = folder / "resolved.yaml"
    resolved.write_text(recipe.resolved_yaml(), encoding="utf-8")
    again = load_recipe(resolved)
    assert same(again.values(), recipe.values()), (again.values(), recipe.values())
    assert again.resolved_yaml() == recipe.resolved_yaml()
    assert same(recipe_from_values(recipe.values()).values(), recipe.values())
    # Another reader of YAML gets the same values.
    assert same(yaml.safe_load(resolved.read_text(encoding="utf-8")), recipe.values())


def same(one: Any, other: Any) -> bool:
    """Equal, with equal types of numbers and truth values; lists and tuples are alike, as YAML has one of them."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


# --- good recipes, from the classes themselves -----------------------------------------------------------------------

WORDS = st.one_of(
    st.text(string.ascii_letters + string.digits + "-_. éß漢🙂'\":#{}[]&*!|>%@`,?", max_size=10),
    st.sampled_from(["no", "on", "null", "~", "1e5", "5e-4", "010", "1:30", "2020-01-01", ".nan", "<<", "=", "- x"]),
    st.text(max_size=5),
)
_NAMES = st.text(string.ascii_letters + string.digits + "-_ é漢", min_size=1, max_size=8).map("org/n".__add__)
_SPECIAL = {"model": _NAMES, "tokenizer": st.none() | _NAMES, "data": st.lists(_NAMES, min_size=1, max_size=3)}
_SPECIAL |= {
    "device": st.none(),
    "validation": st.just([]),
    "engine": st.just("transformers"),
    "streaming": st.just(False),
}
_SPECIAL |= {"train": _NAMES | st.lists(_NAMES, min_size=1, max_size=3), "output_dir": _NAMES.map("runs/".__add__)}


def of_type(annotation: Any, limits: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values of a field's type, as they are written in YAML."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return of_type(inner, (*more, *limits))
    if origin in (Union, UnionType):
        return st.one_of([of_type(each, limits) for each in get_args(annotation)])
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if origin in (tuple, list):
        return st.lists(of_type(get_args(annotation)[0]), min_size=1, max_size=3)
    if origin is dict or annotation is dict:
        return st.dictionaries(WORDS.filter(bool), st.one_of(WORDS, st.booleans(), _floats(())), max_size=2)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return of_model(annotation)
    by_type = {bool: st.booleans(), str: WORDS, type(None): st.none(), Any: WORDS}
    if annotation is int:
        return _integers(limits)
    return _floats(limits) if annotation is float else by_type[annotation]


def of_model(model: type[BaseModel], **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the fields of a section, each with a value of its type."""
    fields = {name: _of_field(name, field) for name, field in model.model_fields.items()} | fixed
    required = [name for name, field in model.model_fields.items() if field.is_required() or name in fixed]
    some = st.lists(st.sampled_from(sorted(fields)), max_size=5, unique=True) if fields else st.just([])
    return some.flatmap(lambda chosen: st.fixed_dictionaries({name: fields[name] for name in {*required, *chosen}}))


def _of_field(name: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    return _SPECIAL[name] if name in _SPECIAL else of_type(field.annotation, tuple(field.metadata))


def _bounds(limits: tuple[Any, ...]) -> tuple[float, float, bool, bool]:
    low, high, open_low, open_high = -math.inf, math.inf, False, False
    for limit in limits:
        for name, value in ((key, getattr(limit, key, None)) for key in ("ge", "gt", "le", "lt")):
            if isinstance(value, int | float) and name in ("ge", "gt"):
                low, open_low = value, name == "gt"
            elif isinstance(value, int | float):
                high, open_high = value, name == "lt"
    return low, high, open_low, open_high


def _integers(limits: tuple[Any, ...]) -> st.SearchStrategy[int]:
    low, high, open_low, open_high = _bounds(limits)
    first = -(10**12) if low == -math.inf else int(low) + open_low
    return st.integers(first, max(first, 10**12 if high == math.inf else int(high) - open_high))


def _floats(limits: tuple[Any, ...]) -> st.SearchStrategy[float]:
    low, high, open_low, open_high = _bounds(limits)
    return st.floats(
        None if low == -math.inf else low,
        None if high == math.inf else high,
        exclude_min=open_low,
        exclude_max=open_high,
        allow_nan=False,
        allow_infinity=False,
    )


def _objective(name: str) -> st.SearchStrategy[dict[str, Any]]:
    return of_model(objective_info(name).config_class).map(lambda own: {"name": name, **own})


def _term(objective: dict[str, Any], weight: float) -> dict[str, Any]:
    return {key: value for key, value in objective.items() if key != "kd_weight"} | {"weight": weight}


def _without(section: st.SearchStrategy[dict[str, Any]], *names: str) -> st.SearchStrategy[dict[str, Any]]:
    return section.map(lambda values: {name: value for name, value in values.items() if name not in names})


OBJECTIVES = st.one_of(
    st.sampled_from(objective_names()).flatmap(_objective),
    st.lists(
        st.builds(_term, st.sampled_from(objective_names()).flatmap(_objective), st.floats(1e-6, 1e6)),
        min_size=1,
        max_size=3,
    ).map(lambda terms: {"terms": terms}),
)

RECIPES = st.fixed_dictionaries(
    {
        "data": of_model(DataSettings),
        "student": _without(of_model(ModelSpec), "cache", "quantization"),
        "teacher": _without(of_model(ModelSpec), "lora"),
        "objective": OBJECTIVES,
        "training": of_model(TrainingSettings),
    },
    optional={"evaluation": of_model(EvaluationSettings)},
)
"""Sections whose values have the right types; pairs of them may exclude each other."""


# --- bad recipes -----------------------------------------------------------------------------------------------------

_ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.text(st.characters(), max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=5,
)
STRANGE_NAMES = [
    "~nobody/x",
    "a\x00b",
    "x" * 5000,
    "\udcff",
    "/" * 300,
    "~",
    ".",
    "..",
    "/",
    "",
    " ",
    ":",
    "a:b:c",
    "/dev",
]
"""What a path can do wrong."""


def _places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in inner for place in [(*path, key), *_places(each, (*path, key))]]


@st.composite
def spoiled(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe with one to three places removed, replaced or renamed."""
    values = draw(RECIPES)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(values)
        if not places:
            break
        *path, key = draw(st.sampled_from(places))
        here: Any = values
        for part in path:
            here = here[part]
        value = here.pop(key)
        change = draw(st.sampled_from(["remove", "replace", "rename", "strange"]))
        if change == "remove" or (change == "rename" and isinstance(here, list)):
            continue
        new_key = draw(WORDS) if change == "rename" else key
        strange = {"replace": _ANYTHING, "strange": st.sampled_from(STRANGE_NAMES), "rename": st.just(value)}[change]
        if isinstance(here, list):
            here.insert(key, draw(strange))
        else:
            here[new_key] = draw(strange)
    return values


_SNIPPETS = [
    *("&a ", "*a", "<<: *a", "&a [*a]", "!!python/object/apply:os.system [x]", "!!binary x", "!!timestamp 99"),
    *("!!int x", "!!set {a}", "!!float .", "!x ", "? ", "- ", ": ", "\t", "{", "}", "[", "]", "|", ">", "---\n"),
    *("...\n", "%YAML 9\n", "'", '"', "#", "\\ud800", "\\0", "\x85", "\u2028", "\ufeff", "\x00", "\ud800", "~x/"),
    *("1" * 5000, "[" * 2000, "{a: " * 500),
]


@st.composite
def spoiled_text(draw: st.DrawFn) -> str:
    """The text of a recipe with pieces of YAML cut out, repeated or put in."""
    text = yaml.safe_dump(draw(RECIPES), allow_unicode=True, sort_keys=False)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 6)))
        piece = draw(st.one_of(st.sampled_from(_SNIPPETS), st.text(max_size=3), st.just(text[start:end] * 2)))
        text = text[:start] + piece + text[end:]
    return text


OVERRIDES = st.lists(
    st.builds(
        lambda key, value: f"{key}={value}",
        st.sampled_from(
            ["training.learning_rate", "teacher", "data.train.0", "student.lora.r", "objective", "x.y", "", "data..x"]
        ),
        st.one_of(WORDS, st.sampled_from([*_SNIPPETS, *STRANGE_NAMES])),
    ),
    max_size=2,
)
