"""The long form: ``python tests/faults/run.py --kills 20`` kills each phase so often and counts what came of it."""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import tokenizer_zoo
from faults.phases import PHASES, Trials, write_models
from faults.starts import ForkServer


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of one phase."""

    phase: str
    kills: int
    """Commands that were killed by SIGKILL."""
    preempted: int
    """Commands that were told to stop by SIGTERM."""
    starts: int
    failures: tuple[str, ...]
    """Trials whose end was another than that of an undisturbed run, or none."""
    seconds: float
    """Of the trials with kills."""


def figures(server: ForkServer, name: str, models: Path, *, kills: int, seed: int) -> Figures:
    """Kill until the number is reached; every tenth time ask for a stop as well."""
    with tempfile.TemporaryDirectory() as scratch:
        trials = Trials(server, PHASES[name], models, Path(scratch))
        choice = random.Random(f"{name} {seed}")
        preempted = 0
        while trials.tally.kills < kills and len(trials.tally.failures) < 5:
            trials.kill(choice)
            if trials.tally.kills >= 10 * (preempted + 1):
                preempted += 1
                stopped = trials.stop(signal.SIGTERM)
                if stopped.code != 0:
                    trials.tally.failures.append(f"exit status {stopped.code} after SIGTERM: {stopped.output[-500:]}")
        tally = trials.tally
        return Figures(name, tally.kills, preempted, tally.starts, tuple(tally.failures), round(tally.seconds, 1))


def main() -> None:
    """Print a table row for each phase and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each phase")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--json", type=Path, default=Path("build/faults.json"))
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        models.mkdir()
        write_models(models, tokenizer_zoo.byte_level_bpe(), tokenizer_zoo.sentencepiece_bpe())
        server = ForkServer(Path(folder))
        for name in options.phases:
            one = figures(server, name, models, kills=options.kills, seed=options.seed)
            found.append(one)
            print(f"| {name} | {one.kills} | {one.preempted} | {one.starts} | {len(one.failures)} |", flush=True)
            for failure in one.failures:
                print(failure, file=sys.stderr)
        server.close()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    values = {"kills_per_phase": options.kills, "seed": options.seed, "phases": [asdict(one) for one in found]}
    options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(one.failures for one in found))


if __name__ == "__main__":
    main()
