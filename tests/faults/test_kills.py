"""Kill -9 at random moments of everything that takes long: the next start goes on, and nothing differs in the end.

The long form, ``make test-faults``, is ``run.py`` with many more kills.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from faults.phases import PHASES, Trials
from faults.starts import ForkServer

KILLS = {"training": 2, "saving": 3, "caching": 2, "evaluating": 2, "studying": 2}


@pytest.mark.fault
@pytest.mark.parametrize("name", PHASES)
def test_a_killed_command_goes_on_to_the_same_end(name: str, server: ForkServer, models: Path, tmp_path: Path) -> None:
    trials = Trials(server, PHASES[name], models, tmp_path)
    choice = random.Random(f"{name} 1")
    for _ in range(KILLS[name]):
        trials.kill(choice)
    assert not trials.tally.failures
    assert trials.tally.kills > 0, "none of the moments came"
