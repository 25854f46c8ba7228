"""Two processes with gloo are started once; all tests of this folder read what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class TwoProcesses:
    """What the cases of worker.py wrote."""

    folder: Path
    results: dict[str, Any]

    def __getitem__(self, case: str) -> dict[str, Any]:
        found: dict[str, Any] = self.results[case]
        return found


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> TwoProcesses:
    folder = tmp_path_factory.mktemp("sharded")
    worker = Path(__file__).with_name("worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launcher, str(worker), str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return TwoProcesses(folder, json.loads((folder / "results.json").read_text(encoding="utf-8")))
