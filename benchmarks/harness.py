"""What the benchmarks share: interleaved timings, memory peaks, facts about the machine, tables and JSON.

A benchmark is a script whose ``main(argv)`` measures, prints tables and writes ``build/bench/<name>.json``; with
``--smoke`` it does so at tiny sizes, to show that it works. Nothing here imports torch before it is needed, so that a
parent process stays small beside the children it measures.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "bench"

Row = dict[str, Any]
"""One line of a table: column -> text, number or None for what was not measured."""

_FLAGS = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the repeated runs of one function."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """What is reported."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio that the project holds itself to."""

    name: str
    value: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the limit."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def row(self) -> Row:
        """For a table."""
        sign = "<=" if self.at_most else ">="
        return {"bar": self.name, "measured": self.value, "limit": f"{sign} {self.limit:g}", "met": self.met}


@dataclass(frozen=True, slots=True)
class ChildRun:
    """What a finished child process left."""

    output: str
    peak_bytes: int
    """Largest resident set among the child and the processes it waited for."""


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``doc`` is its module docstring."""
    options = argparse.ArgumentParser(description=doc.splitlines()[0])
    options.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", help="where the results go")
    options.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it works and measures nothing")
    options.add_argument("--repeats", type=int, default=3, help="runs of each variant, interleaved")
    options.add_argument("--threads", type=int, help="of torch; default: all cores")
    options.set_defaults(benchmark=name)
    return options


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; sets torch's threads, and one repeat for a smoke run."""
    arguments = options.parse_args(argv)
    if arguments.smoke:
        arguments.repeats = 1
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    return arguments


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, repeats: int, warmup: bool = True
) -> dict[str, Timing]:
    """Time every function ``repeats`` times in rounds, so that a slow minute of the machine meets all of them alike.

    Args:
        functions: by name; each round runs every one once, starting one further each time.
        repeats: rounds that count.
        warmup: one round before that does not.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    if warmup:
        for name in names:
            functions[name]()
    for turn in range(repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            began = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - began)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


# --- memory -----------------------------------------------------------------------------------------------------------


def extra_peak_bytes(function: Callable[[], object]) -> int | None:
    """How far the resident set of this process rises while ``function`` runs; None where the kernel does not tell.

    Pages that the C library still holds from earlier are given back first, and the kernel's mark is reset.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def run_child(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> ChildRun:
    """Run a command to its end and take its peak memory from the kernel's account.

    Linux counts the parent's size at the start as well, so the parent must be the smaller one.

    Raises:
        SystemExit: the command failed; shows the end of what it wrote.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, cwd=ROOT, env=os.environ | dict(environment or {})
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: status {process.returncode}\n{errors.read()[-3000:]}")
        unit = 1 if platform.system() == "Darwin" else 1024
        return ChildRun(output.read(), usage.ru_maxrss * unit)


# --- results ----------------------------------------------------------------------------------------------------------


def machine_facts() -> Row:
    """Processor, memory, threads and versions, and how busy the machine is."""
    import torch

    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", "").split()
    return {
        "processor": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "vocabridge")},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _commit() -> str | None:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def report(
    arguments: argparse.Namespace,
    tables: Mapping[str, Sequence[Row]],
    *,
    settings: Row | None = None,
    bars: Sequence[Bar] = (),
) -> None:
    """Print the tables and write everything as JSON.

    Args:
        arguments: from :func:`parse`.
        tables: title -> lines; every line of a table has the same columns.
        settings: sizes and models, for whoever reads the numbers.
        bars: only what was measured on models and machines that the bar speaks of.
    """
    result = {
        "benchmark": arguments.benchmark,
        "smoke": arguments.smoke,
        "machine": machine_facts(),
        "settings": {"repeats": arguments.repeats} | (settings or {}),
        "tables": tables,
        "bars": [bar.row() for bar in bars],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for title, rows in (*tables.items(), ("bars", [bar.row() for bar in bars])):
        if rows:
            print_table(title, rows)


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Show lines on the terminal."""
    table = Table(title=title)
    for column, value in rows[0].items():
        table.add_column(column, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    Console(width=max(120, Console().width)).print(table)


def cell(value: Any) -> str:
    """A value as it stands in a table: three digits of a number."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def megabytes(num_bytes: int | None) -> float | None:
    """Bytes in units of 10^6, for tables."""
    return None if num_bytes is None else num_bytes / 1e6
