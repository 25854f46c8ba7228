"""Throws inputs at a target and counts them: ``python tests/fuzz/run.py --inputs 100000 --json build/fuzz.json``.

Each target runs in a process of its own, because a recipe must be refused without torch while spans need it. A failure
is shrunk by hypothesis, printed, and counted; the next targets still run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
for folder in (FOLDER, FOLDER.parent):
    sys.path.append(str(folder))

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

SHARES = {"jsonl": 0.5, "spans": 0.4, "chunks": 0.1, "recipe-values": 0.02, "recipe-text": 0.04, "recipe-spoiled": 0.04}
"""Target -> its share of the inputs; recipes, which take longest, come on top."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of one target."""

    target: str
    inputs: int
    """Calls of the target that ended, so also those that shrinking repeats."""
    read: int
    refused: int
    seconds: float
    failures: tuple[str, ...]
    """Distinct ones, each with the smallest input found."""


@dataclass(frozen=True, slots=True)
class Target:
    """A check of one input, and the inputs."""

    check: Callable[..., str]
    inputs: tuple[st.SearchStrategy[Any], ...]


def target(name: str, folder: Path) -> Target:
    """The target of this name; imports no more than it needs."""
    if name.startswith("recipe"):
        import recipe_target as recipes

        recipes.forbid_models()
        return {
            "recipe-values": Target(lambda values: recipes.check_values(values, folder), (recipes.RECIPES,)),
            "recipe-spoiled": Target(lambda values: recipes.check_values(values, folder), (recipes.spoiled(),)),
            "recipe-text": Target(
                lambda text, overrides: recipes.check_text(text, overrides, folder),
                (recipes.spoiled_text(), recipes.OVERRIDES),
            ),
        }[name]
    if name == "jsonl":
        import jsonl_target

        return Target(lambda content: jsonl_target.check(content, folder), (jsonl_target.FILES,))
    import spans_target as spans

    if name == "spans":
        return Target(spans.check_spans, (spans.TEXTS, st.sampled_from(spans.FAMILIES)))
    lossless = st.sampled_from(spans.LOSSLESS)
    return Target(spans.check_chunks, (spans.TEXTS, lossless, lossless))


def fuzz(name: str, inputs: int, *, number: int) -> Figures:
    """Try so many inputs of a target.

    Args:
        name: of the target.
        inputs: how many.
        number: seed of the inputs.
    """
    started = time.monotonic()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        chosen = target(name, Path(folder))

        @seed(number)
        @settings(
            max_examples=inputs,
            deadline=None,
            database=None,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(st.tuples(*chosen.inputs))
        def one(given_inputs: tuple[Any, ...]) -> None:
            outcomes[chosen.check(*given_inputs)] += 1

        failures: tuple[str, ...] = ()
        try:
            one()
        except ExceptionGroup as errors:  # distinct failures, each shrunk
            failures = tuple(map(_shown, errors.exceptions))
        except Exception as error:
            failures = (_shown(error),)
    seconds = round(time.monotonic() - started, 1)
    return Figures(name, sum(outcomes.values()), outcomes["read"], outcomes["refused"], seconds, failures)


def fuzz_in_own_process(name: str, inputs: int, *, number: int = 0) -> dict[str, Any]:
    """The fields of the target's :class:`Figures`; the seed decides the inputs, so the order of sets is fixed, too."""
    words = [sys.executable, __file__, "--child", name, "--inputs", str(inputs), "--seed", str(number)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    ended = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _shown(error: Exception) -> str:
    """The last steps to an error, the error, and the input that hypothesis noted on it."""
    lines = traceback.format_exception(error)
    return re.sub(r"(.{1,4}?)\1{40,}", r"\1 many times", "".join(lines[-6:]))[-3000:]


def main() -> int:
    """Run the targets; exit status 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="files and texts together; recipes come on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", choices=SHARES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(asdict(fuzz(options.child, options.inputs, number=options.seed))))
        return 0
    found = []
    for name in options.targets:
        inputs = max(1, round(options.inputs * SHARES[name]))
        figures = fuzz_in_own_process(name, inputs, number=options.seed)
        print(f"{name}: {figures['inputs']:,} inputs, {figures['read']:,} read, {figures['refused']:,} refused, "
              f"{len(figures['failures'])} failures, {figures['seconds']} s", flush=True)  # fmt: skip
        print(*figures["failures"], sep="\n", end="", flush=True)
        found.append(figures)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"seed": options.seed, "targets": found}, indent=2) + "\n")
    return int(any(figures["failures"] for figures in found))


if __name__ == "__main__":
    sys.exit(main())
