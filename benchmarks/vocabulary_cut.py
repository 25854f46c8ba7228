"""What ``teacher_top_k`` saves and what it changes: seconds of a step, and the student's gradient.

    python benchmarks/vocabulary_cut.py [--sizes 16 64 256 1024]

The cut keeps, of the teacher's vocabulary, the most probable tokens of each position. Its error is a property of the
teacher's distribution, so it is measured on pretrained models only; the student's gradient comes from the whole loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import material
from floor import Bench, Step
from harness import Row, interleaved, parse, parser, report

OBJECTIVES = ("dskd_cma", "dskd_eta")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure time and gradient of both objectives at every size."""
    options = parser("vocabulary_cut", __doc__)
    material.add_pair_options(options)
    options.add_argument("--rows", type=int, default=4)
    options.add_argument("--bytes", type=int, default=350, help="of each prompt and response where --data is not given")
    options.add_argument("--sizes", nargs="+", type=int, default=[16, 64, 256, 1024])
    arguments = parse(options, argv)
    pair = material.find_pair(arguments)
    rows = material.examples(arguments, arguments.rows, num_bytes=arguments.bytes)
    bench = Bench.load(pair.student, pair.teacher, rows, max_length=512)
    sizes = [None, *(arguments.sizes if not arguments.smoke else arguments.sizes[:1])]
    tables = {f"{name} by teacher_top_k": _table(bench, name, sizes, arguments.repeats) for name in OBJECTIVES}
    report(arguments, tables, settings=pair.facts() | bench.facts())


def _table(bench: Bench, name: str, sizes: Sequence[int | None], repeats: int) -> list[Row]:
    steps = {}
    for size in sizes:
        torch.manual_seed(0)  # projectors that start at random are the same for every size
        steps[_label(size)] = bench.step({"name": name, "teacher_top_k": size})
    gradients = {label: _gradient(step) for label, step in steps.items()}
    timings = interleaved(
        steps | {"fine-tuning": bench.step("cross_entropy"), "teacher": bench.teacher_trunk}, repeats=repeats
    )
    whole, whole_seconds = gradients["whole"], timings["whole"].median
    fine_tuning, teacher = timings["fine-tuning"].median, timings["teacher"].median
    return [
        {
            "teacher_top_k": label,
            "step s": timings[label].median,
            "step / whole step": timings[label].median / whole_seconds,
            "step / (SFT + teacher)": timings[label].median / (fine_tuning + teacher),
            "without teacher's trunk / SFT": (timings[label].median - teacher) / fine_tuning,
            "cosine of the gradients": _cosine(gradients[label], whole),
            "norm / whole norm": math.sqrt(_dot(gradients[label], gradients[label]) / _dot(whole, whole)),
        }
        for label in steps
    ]


def _label(size: int | None) -> str:
    return "whole" if size is None else str(size)


def _gradient(step: Step) -> list[Tensor]:
    """One tensor for each of the student's parameters, after one step without dropout."""
    step.model.eval()
    step()
    gradient = [p.grad.clone() for p in step.model.student.parameters() if p.grad is not None]
    step.model.train()
    return gradient


def _cosine(left: list[Tensor], right: list[Tensor]) -> float:
    return _dot(left, right) / math.sqrt(_dot(left, left) * _dot(right, right))


def _dot(left: list[Tensor], right: list[Tensor]) -> float:
    """In float64: a float32 sum over a hundred million products is wrong in its second digit."""
    return sum(float(torch.sum(a.double() * b.double())) for a, b in zip(left, right, strict=True))


if __name__ == "__main__":
    main()
