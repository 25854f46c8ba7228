"""Settings of the key-query matching terms; imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from vocabridge.settings import Settings

Matching = Literal["none", "gan", "conditional_transport", "sinkhorn", "energy", "mmd", "coral"]


class GanConfig(Settings):
    """Discriminator and its training; defaults are the paper's, with the discriminator trained."""

    hidden_size: int = Field(768, gt=0)
    """Width of the discriminator's hidden layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    train_discriminator: bool = True
    """False freezes it at its random start, which is what the published code does; for ablations only."""
    positions: Literal["supervised", "all"] = "supervised"
    """``all`` adds prompt and padding of both sides as the published code does, to which each such position is token id
    0; for ablations only: the term then depends on how rows are padded."""
    updates: Literal["reversal", "alternating"] = "reversal"
    """``reversal``: one backward trains both sides; ``alternating``: each step belongs to one of them."""
    discriminator_steps: int = Field(1, ge=1)
    """With ``alternating``: optimizer steps of the discriminator for each one of the query projector."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Targets become 1 - s and s."""
    r1_penalty: float = Field(0.0, ge=0)
    """Weight of the discriminator's squared gradient norm at the keys (Mescheder et al. 2018, arXiv 1801.04406)."""
    spectral_norm: bool = False
    """Spectral normalisation of the discriminator's linear layers (Miyato et al. 2018, arXiv 1802.05957)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.updates == "reversal" and self.discriminator_steps != 1:
            raise ValueError("discriminator_steps has no effect with updates 'reversal'; leave it out")
        if not self.train_discriminator and self.updates == "alternating":
            raise ValueError("updates 'alternating' would train nothing in the discriminator's turn; leave it out")
        if not self.train_discriminator and self.r1_penalty:
            raise ValueError("r1_penalty has no effect with train_discriminator: false; leave it out")
        return self


class TransportConfig(Settings):
    """The two kinds that transport queries to keys; each field belongs to one of them."""

    hidden_size: int = Field(256, gt=0)
    """With ``conditional_transport``: width of the hidden layer of critic and navigator."""
    output_size: int = Field(128, gt=1)
    """With ``conditional_transport``: features in which the critic measures cost and the navigator affinity."""
    regularization: float = Field(0.05, gt=0)
    """With ``sinkhorn``: entropic regularisation as a share of an example's mean squared query-key distance."""
    iterations: int = Field(20, ge=1)
    """With ``sinkhorn``: updates of the dual potentials."""


def check_matching_settings(matching: Matching, *, gan: GanConfig, transport: TransportConfig) -> None:
    """Refuses settings of a kind of matching that is not the chosen one.

    Raises:
        ValueError: names the settings that would have no effect.
    """
    if matching != "gan" and gan != GanConfig():
        raise ValueError(f"gan settings have no effect with matching '{matching}'; leave them out")
    readers = {
        "hidden_size": "conditional_transport",
        "output_size": "conditional_transport",
        "regularization": "sinkhorn",
        "iterations": "sinkhorn",
    }
    changed = transport.model_dump(exclude_defaults=True)
    if ignored := [name for name in changed if readers[name] != matching]:
        raise ValueError(
            f"transport settings {', '.join(ignored)} have no effect with matching '{matching}'; leave them out"
        )
