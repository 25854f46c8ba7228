"""What produced a run: versions, commit, machine, command; written as ``run.json`` beside the weights."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vocabridge.durable import write_in_one_piece

_PACKAGES = (
    "vocabridge",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "peft",
    "safetensors",
    "numpy",
)


def environment() -> dict[str, Any]:
    """Versions, machine and git commit of the current folder, as JSON values."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": {
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(0) if cuda else "cpu",
            "device_count": torch.cuda.device_count() if cuda else 0,
        },
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def write_run_record(run_dir: Path, **facts: Any) -> None:
    """Write :func:`environment` and ``facts`` to ``run.json``, by rename."""
    write_in_one_piece(run_dir / "run.json", json.dumps({**facts, **environment()}, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
