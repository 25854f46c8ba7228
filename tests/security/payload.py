"""A pickle that leaves a mark when it is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def write_payload(path: Path, canary: Path) -> None:
    torch.save({"model.embed_tokens.weight": Payload(canary)}, path)
