"""Memory of a step beyond both models and all gradients, with and without gradient checkpointing, by objective.

    python benchmarks/step_memory.py [--objectives dskd_cma gold ...]

What plain fine-tuning takes is the student's own: activations of its trunk, and its logits by chunks. The rest is the
objective's.
"""

from __future__ import annotations

from collections.abc import Sequence

import material
from floor import Bench
from harness import Bar, Row, megabytes, parse, parser, report

BASELINE = "cross_entropy"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every objective both ways."""
    options = parser("step_memory", __doc__)
    material.add_pair_options(options)
    options.add_argument("--rows", type=int, default=4)
    options.add_argument("--bytes", type=int, default=350, help="of each prompt and response where --data is not given")
    options.add_argument("--objectives", nargs="*", default=["dskd_cma", "dskd_eta", "gold", "uld", "alm"])
    arguments = parse(options, argv)
    pair = material.find_pair(arguments)
    rows = material.examples(arguments, arguments.rows, num_bytes=arguments.bytes)
    bench = Bench.load(pair.student, pair.teacher, rows, max_length=512)
    names = [BASELINE, *arguments.objectives]
    whole = {name: _extra_megabytes(bench, name, arguments.repeats) for name in names}
    bench.student.activation_checkpointing_enable()
    checkpointed = {name: _extra_megabytes(bench, name, arguments.repeats) for name in names}
    table: list[Row] = [
        {
            "objective": name,
            "extra MB": whole[name],
            "beyond fine-tuning": _difference(whole, name),
            "extra MB, checkpointing": checkpointed[name],
            "beyond fine-tuning, checkpointing": _difference(checkpointed, name),
        }
        for name in names
    ]
    bars = [] if pair.is_stand_in else _bars(_difference(whole, "dskd_cma"), checkpointed.get("dskd_cma"))
    report(arguments, {"extra memory of a step": table}, settings=pair.facts() | bench.facts(), bars=bars)


def _extra_megabytes(bench: Bench, name: str, repeats: int) -> float | None:
    """Smallest of several: what else happens in the process only adds."""
    step = bench.step(name)
    step()
    found = [megabytes(step.extra_bytes()) for _ in range(repeats)]
    return min((value for value in found if value is not None), default=None)


def _difference(megabytes_by_name: dict[str, float | None], name: str) -> float | None:
    own, baseline = megabytes_by_name.get(name), megabytes_by_name[BASELINE]
    return None if own is None or baseline is None else max(0.0, own - baseline)


def _bars(beyond: float | None, checkpointed: float | None) -> list[Bar]:
    values = {
        "dskd_cma: extra MB beyond fine-tuning": beyond,
        "dskd_cma: extra MB with gradient checkpointing": checkpointed,
    }
    return [Bar(name, value, 500) for name, value in values.items() if value is not None]


if __name__ == "__main__":
    main()
