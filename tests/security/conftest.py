"""A headless Chromium for the page, and a witness of every file and address that is opened."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from chromium import open_chromium

sys.path.append(str(Path(__file__).parent))  # for what these tests share, in importlib mode


@dataclass(slots=True)
class Witness:
    """What the interpreter was asked to open since ``begin``."""

    opened: list[str] = field(default_factory=list)
    active: bool = False

    def begin(self) -> None:
        """Forget what was seen and look on."""
        self.opened.clear()
        self.active = True

    def saw(self, word: str) -> list[str]:
        """What was opened with ``word`` in its name."""
        return [each for each in self.opened if word in each]


_EVENTS = ("open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo", "urllib.Request", "os.exec")
_WITNESS = Witness()
_INSTALLED: list[bool] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _WITNESS.active and event in _EVENTS:
        _WITNESS.opened.append(f"{event} {arguments[0]!r} {arguments[1:2]!r}")


@pytest.fixture
def witness() -> Iterator[Witness]:
    """Sees every ``open`` and every connection of this process, whichever library asks for it."""
    if not _INSTALLED:
        sys.addaudithook(_hook)  # cannot be taken away again, so it is switched off
        _INSTALLED.append(True)
    _WITNESS.begin()
    yield _WITNESS
    _WITNESS.active = False


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that nothing in the data may lead to."""
    path = tmp_path / "outside" / "canary.jsonl"
    path.parent.mkdir()
    path.write_text('{"prompt": "secret", "response": "secret"}\n')
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """As ``chromium.open_chromium`` gives it."""
    yield from open_chromium()
