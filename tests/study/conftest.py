"""Writes study files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from study_cases import BASE, STUDY, WriteStudy


@pytest.fixture
def write_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteStudy:
    """Write the study with changes into the current folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False), encoding="utf-8")

    def write(**changes: Any) -> Path:
        path = Path("study.yaml")
        path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False), encoding="utf-8")
        return path

    return write
