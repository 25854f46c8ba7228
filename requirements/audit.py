"""What can be told about the dependencies without a network: all of them pinned, as installed, under known licences.

Known vulnerabilities are published daily and asked for by ``make audit``, which needs the network.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FOLDER = Path(__file__).parent
FIRST = Requirement("vocabridge[dev]")
SELF = canonicalize_name(FIRST.name)
ENGINE = Requirement("deepspeed")
"""Installed by ``make venv`` where it can be built."""

PERMISSIVE = re.compile(r"\b(?:MIT|BSD|Apache|ISC|PSF|Python Software Foundation|MPL|Mozilla Public)\b")
RECIPROCAL = re.compile("GPL|General Public|EUPL|SSPL|Proprietary", re.IGNORECASE)
"""The first are fine for a dependency; the others, or none at all, are for a person to decide."""


def pins(file: Path) -> dict[str, str]:
    """Name -> version of a file whose every line pins one package.

    Raises:
        SystemExit: a line pins nothing.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        versions = [each.version for each in requirement.specifier if each.operator == "=="]
        if len(versions) != 1 or "*" in versions[0]:
            raise SystemExit(f"{file.name}:{number}: '{text}' is no pin; write name==version.")
        found[canonicalize_name(requirement.name)] = versions[0]
    return found


def needed(first: Requirement) -> set[str]:
    """Everything that a requirement brings along on this machine, itself included."""
    seen: set[tuple[str, str]] = set()
    waiting = [first]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in importlib.metadata.distribution(name).requires or ():
                inner = Requirement(text)
                # What the bare name brings was taken with the first, empty extra.
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    waiting.append(inner)
    return {name for name, _ in seen}


def licence(metadata: Mapping[str, str]) -> str:
    """What a package's metadata say about its licence, in one line; of a licence in full its beginning."""
    classifiers = [
        value.rpartition("::")[2].strip()
        for name, value in metadata.items()
        if name == "Classifier" and value.startswith("License ::")
    ]
    said = metadata.get("License-Expression") or "; ".join(classifiers) or metadata.get("License") or ""
    return " ".join(said.split())[:200]


def problems(pinned: Mapping[str, str], used: set[str]) -> Iterator[str]:
    """One sentence for everything that is not as it should be."""
    for name in sorted(used - {SELF}):
        installed = importlib.metadata.distribution(name)
        if name not in pinned:
            yield f"{name} {installed.version} is needed but not pinned in constraints.txt."
        elif Version(installed.version).public != Version(pinned[name]).public:
            yield f"{name} is pinned at {pinned[name]} but {installed.version} is installed; run 'make venv'."
        said = licence(installed.metadata)  # type: ignore[arg-type]  # a message, which has these two methods
        if not PERMISSIVE.search(said) or RECIPROCAL.search(said):
            yield f"{name} {installed.version}: its licence ({said or 'none named'}) is not known to be permissive."


def main() -> int:
    """Print what is wrong; exit status 1 if anything is."""
    pinned = pins(FOLDER / "constraints.txt")
    models = pins(FOLDER / "packaged-models.txt")
    used = needed(FIRST)
    if importlib.util.find_spec(ENGINE.name) is not None:
        used |= needed(ENGINE)
    found = list(problems(pinned, used))
    for problem in found:
        print(problem, file=sys.stderr)
    if not found:
        print(f"{len(used) - 1} dependencies pinned, as installed, licences known; {len(models)} model packages pinned")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
