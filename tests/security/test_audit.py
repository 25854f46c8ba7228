"""The offline part of the dependency audit notices what it is there for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from email.message import Message
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "requirements" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def described(*fields: tuple[str, str]) -> Message:
    message = Message()
    for name, value in fields:
        message[name] = value
    return message


def test_both_files_pin_every_line(audit: ModuleType) -> None:
    pinned = audit.pins(ROOT / "requirements" / "constraints.txt")
    assert pinned["torch"].startswith("2.")
    assert len(pinned) > 80
    assert audit.pins(ROOT / "requirements" / "packaged-models.txt")


@pytest.mark.parametrize("line", ["torch", "torch>=2", "torch==2.*", "torch==2.1,!=2.2,==2.3"])
def test_a_line_that_pins_nothing_is_refused(audit: ModuleType, tmp_path: Path, line: str) -> None:
    (tmp_path / "constraints.txt").write_text(f"# why\nrich==15.0.0\n{line}\n")
    with pytest.raises(SystemExit, match=r"constraints\.txt:3: .* is no pin"):
        audit.pins(tmp_path / "constraints.txt")


def test_needs_of_needs_are_followed(audit: ModuleType) -> None:
    used = audit.needed(audit.FIRST)
    assert {"torch", "pydantic-core", "pytest", "markupsafe"} <= used
    assert "vllm" not in used, "an extra that was not asked for"
    assert "hypothesis" not in audit.needed(type(audit.FIRST)("vocabridge"))


@pytest.mark.parametrize(
    ("fields", "fine"),
    [
        ([("License-Expression", "Apache-2.0 OR BSD-2-Clause")], True),
        ([("Classifier", "License :: OSI Approved :: MIT License")], True),
        ([("License", "3-Clause BSD License")], True),
        ([("License-Expression", "MIT AND GPL-3.0-only")], False),
        ([("Classifier", "License :: OSI Approved :: GNU General Public License v3 (GPLv3)")], False),
        ([("License", "Proprietary, BSD in part")], False),
        ([("License", "see LICENSE")], False),
        ([], False),
    ],
)
def test_licences_are_known_or_told(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, fields: list[tuple[str, str]], fine: bool
) -> None:
    package = SimpleNamespace(version="1.0", metadata=described(*fields))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: package)
    found = list(audit.problems({"thing": "1.0"}, {"vocabridge", "thing"}))
    assert (found == []) == fine
    assert fine or "thing 1.0: its licence" in found[0]


def test_a_package_without_a_pin_or_of_another_version_is_told(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = SimpleNamespace(version="2.13.0+cpu", metadata=described(("License-Expression", "MIT")))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: package)
    assert list(audit.problems({"a": "2.13.0"}, {"a"})) == [], "a build of the same release"
    (unpinned,) = audit.problems({}, {"a"})
    assert unpinned == "a 2.13.0+cpu is needed but not pinned in constraints.txt."
    (other,) = audit.problems({"a": "2.12.0"}, {"a"})
    assert "is pinned at 2.12.0 but 2.13.0+cpu is installed" in other
