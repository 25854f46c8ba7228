"""Every objective's settings, and objectives of a user's own, by dotted path."""

import itertools
from typing import Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from vocabridge.errors import UserError
from vocabridge.objectives import objective_info, objective_names
from vocabridge.objectives.config import DivergenceConfig


@pytest.mark.parametrize("name", objective_names())
def test_settings_read_back_with_every_default_written_out(name):
    """A resolved recipe holds them so: what is refused only because it was written would break resuming."""
    config_class = objective_info(name).config_class
    choices = {}
    for field, info in config_class.model_fields.items():
        values = get_args(info.annotation) if get_origin(info.annotation) is Literal else (True, False)
        if get_origin(info.annotation) is Literal or info.annotation is bool:
            choices[field] = [{}, *({field: value} for value in values if value != info.default)]
    num_read = 0
    for combination in itertools.product(*choices.values()):
        try:
            config = config_class(**{key: value for choice in combination for key, value in choice.items()})
        except ValidationError:
            continue  # refused for what it says
        assert config_class.model_validate(config.model_dump(mode="json")) == config
        num_read += 1
    assert num_read > len(choices)


@pytest.mark.parametrize(
    ("field", "readers"),
    [
        ("skew", {"skewed_forward", "skewed_reverse"}),
        ("adaptive_alpha", {"adaptive"}),
        ("jsd_beta", {"generalised_jsd"}),
    ],
)
def test_settings_of_another_divergence_are_refused(field, readers):
    for divergence in get_args(DivergenceConfig.model_fields["divergence"].annotation):
        if divergence in readers:
            assert getattr(DivergenceConfig(divergence=divergence, **{field: 0.3}), field) == 0.3
            continue
        with pytest.raises(ValidationError, match=f"{field} has no effect with divergence '{divergence}'"):
            DivergenceConfig(divergence=divergence, **{field: 0.3})


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
