"""Two processes with gloo are started once; the tests of this folder read what they wrote."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import TrainerState

import data_parallel_cases as cases
from vocabridge import cli


@dataclass(frozen=True)
class TwoProcesses:
    """What the cases of worker.py wrote; each result is a list, one entry a rank."""

    folder: Path
    results: list[dict[str, Any]]
    losses_of_one: dict[int, float]
    """Of one process, which keeps its checkpoint after two of four steps in ``one``."""

    def __getitem__(self, case: str) -> list[Any]:
        found = [rank[case] for rank in self.results]
        assert not any("error" in result for result in found), found
        return found


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> TwoProcesses:
    gc.freeze()  # accelerate collects garbage after each training, among all objects of all packages
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_processes"
    with FileLock(f"{folder}.lock"):  # several workers of pytest share one start
        if not (folder / "rank1.json").exists():
            _start(folder)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    state = TrainerState.load_from_json(str(folder / "one" / "trainer_state.json"))
    return TwoProcesses(folder, ranks, cases.losses(state.log_history))


def _distill_alone(folder: Path) -> None:
    """A run of the command line, and what two processes go on with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vocabridge", *cases.resumable_words(folder, "by_one", rows=4)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    for name in ("by_one_then_two", "refused"):
        cases.stopped_after(folder / "by_one", 2, folder / name)


def _start(folder: Path) -> None:
    cases.write_inputs(folder)
    alone = cases.trainer(folder / "one", cases.GAN, num_processes=1, max_steps=4, save_strategy="steps", save_steps=2)
    alone.train()
    alone.save_state()
    _distill_alone(folder)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name("worker.py")), str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
