"""Kill -9 at random moments of everything that takes long: the next start goes on, and nothing differs in the end.

The long form, ``make test-faults``, is ``run.py`` with many more kills.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from faults.phases import PHASES, Trials
from faults.starts import ForkServer

pytestmark = pytest.mark.fault
KILLS = {"training": 2, "saving": 3, "caching": 2, "evaluating": 2, "studying": 2}


@pytest.fixture(scope="module", params=PHASES)
def trials(
    request: pytest.FixtureRequest, server: ForkServer, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trials:
    return Trials(server, PHASES[request.param], models, tmp_path_factory.mktemp("trials"))


def test_a_killed_command_goes_on_to_the_same_end(trials: Trials) -> None:
    choice = random.Random(f"{trials.phase.name} 1")
    for _ in range(KILLS[trials.phase.name]):
        trials.kill(choice)
    assert not trials.tally.failures
    assert trials.tally.kills > 0, "none of the moments came"


def test_preemption_is_no_failure(trials: Trials) -> None:
    """SIGTERM: what is done is kept, the exit status is 0, a line says how to go on, and nothing is lost."""
    stopped = trials.stop(signal.SIGTERM)
    assert stopped.code == 0, stopped.output
    name = "distill recipe.yaml --resume" if trials.phase.resume else "study study.yaml"
    by_itself = trials.phase.name in ("caching", "evaluating")
    hint = "the same command goes on where it stopped" if by_itself else f"go on with: vocabridge {name}"
    assert stopped.output.splitlines()[-1] == f"interrupted; {hint}"
    assert "Traceback" not in stopped.output
    assert not trials.tally.failures
