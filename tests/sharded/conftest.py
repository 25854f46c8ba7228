"""Two processes with gloo are started once for each engine; the tests of this folder read what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import is_deepspeed_available
from filelock import FileLock


@dataclass(frozen=True)
class TwoProcesses:
    """What a worker's cases wrote."""

    folder: Path
    results: dict[str, Any]

    def __getitem__(self, case: str) -> dict[str, Any]:
        found: dict[str, Any] = self.results[case]
        return found


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> TwoProcesses:
    return _run("worker.py", tmp_path_factory, "fsdp")


@pytest.fixture(scope="session")
def under_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> TwoProcesses:
    if not is_deepspeed_available():
        pytest.skip("DeepSpeed is not installed; see the end of 'make venv'")
    return _run("deepspeed_worker.py", tmp_path_factory, "deepspeed")


def _run(worker: str, tmp_path_factory: pytest.TempPathFactory, name: str) -> TwoProcesses:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):  # several workers of pytest share one start
        if not (folder / "results.json").exists():
            _start(Path(__file__).with_name(worker), folder)
    return TwoProcesses(folder, json.loads((folder / "results.json").read_text(encoding="utf-8")))


def _start(worker: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launcher, str(worker), str(folder)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
