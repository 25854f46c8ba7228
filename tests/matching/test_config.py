import pytest

from vocabridge.matching.config import GanConfig, TransportConfig, check_matching_settings


@pytest.mark.parametrize(
    ("matching", "settings", "named"),
    [
        ("mmd", {"gan": GanConfig(dropout=0.2)}, "gan settings"),
        ("energy", {"transport": TransportConfig(iterations=3)}, "transport settings iterations"),
        ("sinkhorn", {"transport": TransportConfig(hidden_size=3, output_size=2)}, "hidden_size, output_size"),
        ("conditional_transport", {"transport": TransportConfig(regularization=0.1)}, "regularization"),
    ],
)
def test_settings_of_another_kind_are_refused(matching, settings, named):
    with pytest.raises(ValueError, match=rf"{named}.* no effect with matching '{matching}'; leave them out"):
        check_matching_settings(matching, **{"gan": GanConfig(), "transport": TransportConfig(), **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"discriminator_steps": 2}, "discriminator_steps has no effect with updates 'reversal'"),
        ({"train_discriminator": False, "updates": "alternating"}, "'alternating' would train nothing"),
        ({"train_discriminator": False, "r1_penalty": 0.1}, "r1_penalty has no effect"),
    ],
)
def test_settings_of_the_discriminator_that_cancel_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GanConfig(**settings)


def test_settings_of_the_discriminator_read_back_with_defaults_written_out():
    for config in (GanConfig(), GanConfig(updates="alternating", discriminator_steps=3)):
        assert GanConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("matching", "gan", "transport"),
    [
        ("none", {}, {}),
        ("gan", {"hidden_size": 3}, {}),
        ("sinkhorn", {}, {"regularization": 0.2, "iterations": 5}),
        ("conditional_transport", {}, {"hidden_size": 3, "output_size": 2}),
    ],
)
def test_settings_of_the_chosen_kind_pass(matching, gan, transport):
    check_matching_settings(matching, gan=GanConfig(**gan), transport=TransportConfig(**transport))
