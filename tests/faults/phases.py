"""What is killed: a command of every kind on tiny models, and everything that it leaves when nothing disturbs it."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from faults.starts import Ended, Fault, ForkServer
from tiny_pair import ROWS, save_pair

Found = Mapping[str, Any]
"""Names and contents of results."""

TIMES = ("runtime", "per_second", "total_flos", "train_loss")


def write_models(folder: Path, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> None:
    """Models, data, a recipe and a study."""
    save_pair(folder, student, teacher)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    values = recipe()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    evaluation = {"data": ["test.jsonl"], "seeds": [1], "max_new_tokens": 2, "limit": 2}
    short = {**values, "training": {**values["training"], "max_steps": 2, "save_steps": 1}}
    variants = {"gan": {}, "sft": {"teacher": None, "objective": {"name": "cross_entropy"}}}
    study = {"base": short, "output_dir": "study", "baseline": "sft", "seeds": [0], "variants": variants}
    (folder / "study.yaml").write_text(yaml.safe_dump({**study, "evaluation": evaluation}))


def recipe() -> dict[str, Any]:
    """Six steps with every learned part; saves are in the middle of epochs and of the lines of the log.

    The steps at the end of an epoch are saved before the epoch is evaluated.
    """
    return {
        "data": {"train": "train.jsonl", "validation": "test.jsonl", "max_length": 128},
        "student": {"model": "student", "dtype": "float32"},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "objective": {"name": "dskd_cma", "matching": "gan", "gan": {"hidden_size": 16}},
        "training": {
            "output_dir": "run",
            "max_steps": 6,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_steps": 1,
            "save_total_limit": 2,
            "eval_strategy": "epoch",
            "disable_tqdm": True,
            "use_cpu": True,
            "diagnostics_steps": 0,
        },
    }


@dataclass(frozen=True, slots=True)
class Phase:
    """A command, which of its file operations are struck, and what must come out in the end."""

    name: str
    command: tuple[str, ...]
    pattern: str
    """Of paths whose operations are counted."""
    results: Callable[[Path], Found]
    delay: float | None = None
    """Longest time between an operation and the kill, in seconds; None: half of the kills fall exactly before one."""
    resume: tuple[str, ...] = ()
    """What is added to the command at later starts."""
    preparations: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("command",)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """Every number of the log but times."""
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    entries = [{k: v for k, v in entry.items() if not any(time in k for time in TIMES)} for entry in entries]
    return [entry for entry in entries if set(entry) - {"epoch", "step"}]


def run_results(run_dir: Path) -> Found:
    """Weights, learned parts and the log of a run, and its scores where it has any."""
    files = {path.name: sha256(path) for path in run_dir.glob("*.safetensors")}
    return {**files, "log": logged(run_dir), **evaluation_results(run_dir / "evaluation")}


def evaluation_results(folder: Path) -> Found:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*.json*"))}


def cache_results(folder: Path) -> Found:
    """States of every row; which shard they are in is chance."""
    rows = {}
    for path in folder.glob("*.safetensors"):
        assert path.with_suffix(".json").exists(), f"{path} was never finished"
        with safe_open(path, framework="pt") as file:
            starts = [0, *file.get_tensor("lengths").cumsum(0).tolist()]
            ids, states = file.get_tensor("response_ids"), file.get_tensor("hidden_states")
        for start, end in itertools.pairwise(starts):
            name = str(ids[start:end].tolist())
            assert name not in rows, "a row stands twice in the cache"
            rows[name] = hashlib.sha256(states[start:end].numpy().tobytes()).hexdigest()
    return rows


def study_results(folder: Path) -> Found:
    runs = sorted(path.parent for path in folder.glob("runs/*/*/study-status.json"))
    states = {
        str(run.relative_to(folder)): json.loads((run / "study-status.json").read_text())["state"] for run in runs
    }
    return {
        **states,
        **{f"{name}/{key}": value for name in states for key, value in run_results(folder / name).items()},
    }


EVALUATE = (
    *("evaluate", "student", "--data", "test.jsonl", "--output-dir", "scores", "--seeds", "1", "2"),
    *("--max-new-tokens", "3", "--limit", "5", "--batch-size", "2"),
)
PHASES = {
    phase.name: phase
    for phase in (
        Phase(
            "training", ("distill", "recipe.yaml"), r"checkpoint-\d+$|metrics\.jsonl$",
            lambda folder: run_results(folder / "run"), delay=0.15, resume=("--resume",),
        ),
        Phase(
            "saving", ("distill", "recipe.yaml"), r"/?run(/|$)",
            lambda folder: run_results(folder / "run"), resume=("--resume",),
        ),
        Phase(
            "caching", ("cache-teacher", "recipe.yaml", "teacher.cache=cache"), r"(^|/)cache(/|$)",
            lambda folder: cache_results(folder / "cache"), preparations=("small_shards",),
        ),
        Phase(
            "evaluating", EVALUATE, r"(^|/)scores(/|$)",
            lambda folder: evaluation_results(folder / "scores"),
        ),
        Phase(
            "studying", ("study", "study.yaml"), r"(^|/)study(/|$)",
            lambda folder: study_results(folder / "study"), roles=("command", "run"),
        ),
    )
}  # fmt: skip


@dataclass(slots=True)
class Tally:
    """What became of the kills of one phase."""

    kills: int = 0
    starts: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


class Trials:
    """Kills of one phase, each in a fresh copy of models and data, compared with a run that nothing disturbed."""

    def __init__(self, server: ForkServer, phase: Phase, models: Path, scratch: Path) -> None:
        self._server, self.phase, self._models, self._scratch = server, phase, models, scratch
        self.tally = Tally()
        folder = self._fresh()
        # A pattern counts the operations of a role; which numbers there are is seen in a run that no number strikes.
        self._operations = {}
        for role in phase.roles:
            if role == "command":
                ended = self._start(folder, first=True, fault=Fault(phase.pattern, 0))
                assert ended.code == 0, ended.output
                self._operations[role] = ended.operations
            else:  # counted inside another process; there are at least as many as files in a run's folder
                self._operations[role] = 40
        self.expected = phase.results(folder)
        assert self.expected
        assert min(self._operations.values()) > 5, self._operations

    def kill(self, choice: random.Random) -> None:
        """One trial: killed once, at times twice, then run to its end."""
        began = time.monotonic()
        folder = self._fresh()
        struck = 0
        for first in (True, False) if choice.random() < 0.3 else (True,):
            struck += self._start(folder, first=first, fault=self._fault(choice)).struck
        self.tally.kills += struck
        self._compare(folder, self._to_the_end(folder))
        self.tally.seconds += time.monotonic() - began

    def stop(self, number: int) -> Ended:
        """Ask for a stop by a signal halfway, then go on to the end.

        Returns:
            How the command that was asked ended.
        """
        folder = self._fresh()
        at = self._operations["command"] // 2
        stopped = self._start(folder, first=True, fault=Fault(self.phase.pattern, at, 0.0, number=number))
        assert stopped.struck, "it was over before the signal"
        self._compare(folder, self._to_the_end(folder))
        return stopped

    def _compare(self, folder: Path, ended: Ended) -> None:
        if ended.code != 0:
            self.tally.failures.append(f"exit status {ended.code}: {ended.output[-2000:]}")
        elif (found := self.phase.results(folder)) != self.expected:
            names = [name for name in {**found, **self.expected} if found.get(name) != self.expected.get(name)]
            self.tally.failures.append(f"other {', '.join(names)}")

    def _fault(self, choice: random.Random) -> Fault:
        role = choice.choice(self.phase.roles)
        at = choice.randint(1, self._operations[role])
        longest = self.phase.delay if self.phase.delay is not None else choice.choice((None, 0.01))
        delay = None if longest is None else choice.uniform(0, longest)
        return Fault(self.phase.pattern, at, delay, role)

    def _to_the_end(self, folder: Path) -> Ended:
        """Once is enough, except that a study whose run was killed says so and wants to be started again."""
        ended = self._start(folder, first=False)
        if "run" in self.phase.roles and ended.code == 1:
            ended = self._start(folder, first=False)
        return ended

    def _start(self, folder: Path, *, first: bool, fault: Fault | None = None) -> Ended:
        self.tally.starts += 1
        command = self.phase.command if first else (*self.phase.command, *self.phase.resume)
        return self._server.start(command, folder, fault=fault, preparations=self.phase.preparations)

    def _fresh(self) -> Path:
        """Always at the same place: results name their files by absolute paths."""
        folder = self._scratch / "place"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._models, folder)
        return folder
