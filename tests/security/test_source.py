"""What the package's own source never does: no shell, no evaluated text, no pickle, no YAML that makes objects."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vocabridge

PACKAGE = Path(vocabridge.__file__).parent
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pty", "commands"}
HARMLESS_NAMES = {"UnpicklingError"}
"""An exception to catch, of torch.load with weights_only."""
FORBIDDEN_CALLS = {
    "eval": "evaluates text",
    "exec": "runs text",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "yaml.unsafe_load": "makes objects",
    "yaml.full_load": "makes objects",
    "torch.hub.load": "runs downloaded code",
    "runpy.run_path": "runs a file",
    "runpy.run_module": "runs a module",
    "tempfile.mktemp": "a name that somebody else may take first",
}
ALLOWED = {("objectives/__init__.py", "exec"), ("ranks.py", "pickle")}
"""The registry compiles config classes out of the package's own files; names are looked up in their list first.
Processes of one launch send each other pickles, as torch.distributed does: whoever is on their network is trusted."""


def dotted(node: ast.expr) -> str:
    """``subprocess.run`` of a call's function; empty for anything that is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


def problems(source: str, file: str) -> Iterator[str]:
    """What a module does that it must not, one line each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} <= HARMLESS_NAMES:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            forbidden = [name for name in names if name in FORBIDDEN_MODULES and (file, name) not in ALLOWED]
            yield from (f"{file}:{node.lineno}: imports {name}" for name in forbidden)
        if isinstance(node, ast.Call):
            yield from (f"{file}:{node.lineno}: {what}" for what in call_problems(node, file))


def call_problems(call: ast.Call, file: str) -> Iterator[str]:
    name = dotted(call.func)
    if name in FORBIDDEN_CALLS and (file, name) not in ALLOWED:
        yield f"{name}: {FORBIDDEN_CALLS[name]}"
    shell = keyword(call, "shell")
    if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
        yield "shell=True"
    if name in ("yaml.load", "yaml.load_all"):
        loader = keyword(call, "Loader")
        if loader is None or not dotted(loader).endswith(("SafeLoader", "_Loader")):
            yield "yaml.load without a safe loader"
    if name == "torch.load" and not is_true(keyword(call, "weights_only")):
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and not is_false(keyword(call, "allow_pickle")):
        yield "np.load without allow_pickle=False"


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_no_module_does_what_is_forbidden() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    found = [
        problem
        for path in files
        for problem in problems(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix())
    ]
    assert found == []


def test_the_loader_that_is_called_safe_is_safe() -> None:
    from yaml import SafeLoader

    from vocabridge.recipe import yaml_text

    assert issubclass(yaml_text._Loader, SafeLoader)
    assert yaml_text._Loader.yaml_constructors == SafeLoader.yaml_constructors
    assert yaml_text._Loader.yaml_multi_constructors == SafeLoader.yaml_multi_constructors


def test_the_registry_runs_no_name_from_a_recipe_as_a_file() -> None:
    """What is compiled there is a file of the package whatever the name, so a name cannot lead to another one."""
    from vocabridge.errors import UserError
    from vocabridge.objectives import objective_info

    for name in ("../evil", "/tmp/evil", "..", "base", "_divergence", "config"):
        with pytest.raises(UserError):
            objective_info(name)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.Popen('ls', shell=flag)",
        "eval('1')",
        "exec(text)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_check_notices(source: str) -> None:
    assert list(problems(source, "module.py"))


def test_templates_mark_nothing_as_safe() -> None:
    """``| safe`` and inner HTML would undo the escaping of the report."""
    templates = sorted((PACKAGE / "report" / "templates").iterdir())
    assert {path.suffix for path in templates} == {".js", ".j2", ".css"}
    for path in templates:
        text = path.read_text(encoding="utf-8")
        for word in ("| safe", "|safe", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, f"{path.name}: {word}"
        assert "autoescape false" not in text
