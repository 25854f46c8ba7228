"""Settings of the key-query matching terms; imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vocabridge.settings import Settings

Matching = Literal["none", "gan", "mmd"]


class GanConfig(Settings):
    """Discriminator and its training; defaults are the paper's, with the discriminator trained."""

    hidden_size: int = Field(768, gt=0)
    """Width of the discriminator's hidden layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    train_discriminator: bool = True
    """False freezes it at its random start, which is what the published code does; for ablations only."""
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
