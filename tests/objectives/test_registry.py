"""Objectives of a user's own, by dotted path."""

import pytest

from vocabridge.errors import UserError
from vocabridge.objectives import objective_info


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("own_nothing", ""),
        ("own_number", "Config = 3"),
        ("own_settings", "from vocabridge.settings import Settings\nclass Config(Settings):\n    weight: float = 1.0"),
    ],
)
def test_a_module_without_a_config_of_an_objective_is_refused(tmp_path, monkeypatch, name, source):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "mine.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=rf"'{name}.mine' must define a class 'Config' derived from ObjectiveConfig"):
        objective_info(f"{name}.mine")
