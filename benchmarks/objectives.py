"""Train every objective for a few steps on one pair: losses, coverage, time a step, peak memory.

    python benchmarks/objectives.py --student DIR --teacher DIR --data train.jsonl --json objectives.json

Each objective trains in a process of its own, on the same rows in the same order; ``--same-teacher`` is the teacher of
the objectives that need the student's own tokenizer. Step times are medians, given relative to cross_entropy in the
same run. Peak memory is the process's largest resident set: weights of both models, gradients and optimizer included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vocabridge.objectives import objective_info, objective_names

COMPOSED = {
    "composition": {
        "terms": [
            {"name": "cross_entropy", "weight": 0.5},
            {"name": "dskd_cma", "weight": 0.5, "matching": "gan"},
            {"name": "hidden_state", "weight": 0.1},
        ]
    }
}
MATCHING = {
    f"dskd_cma:{kind}": {"name": "dskd_cma", "matching": kind}
    for kind in ("none", "mmd", "energy", "coral", "sinkhorn", "conditional_transport")
}


def variants() -> dict[str, dict[str, Any]]:
    """What is measured: every objective with its defaults, every matching kind, one composition."""
    names = ["cross_entropy", *(name for name in objective_names() if name != "cross_entropy")]
    return {name: {"name": name} for name in names} | MATCHING | COMPOSED


def main() -> None:
    """Measure all, or one variant when called by itself."""
    arguments = _arguments()
    if arguments.only_one:
        print(json.dumps(_measure(arguments, arguments.only_one)))
        return
    results: list[dict[str, Any]] = []
    if arguments.json.exists():  # an interrupted benchmark goes on
        results = json.loads(arguments.json.read_text(encoding="utf-8"))["results"]
    done = {result["variant"] for result in results}
    for variant in arguments.variants or variants():
        if variant in done:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--only-one", variant]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            print(f"{variant}: failed\n{child.stderr[-2000:]}", file=sys.stderr)
            continue
        results.append(json.loads(child.stdout.splitlines()[-1]))
        arguments.json.write_text(json.dumps(_facts(arguments) | {"results": results}, indent=1), encoding="utf-8")
        print(json.dumps(results[-1]), file=sys.stderr)
    _print_table(results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--same-teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--variants", nargs="*")
    parser.add_argument("--only-one", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(arguments: argparse.Namespace, variant: str) -> dict[str, Any]:
    import tempfile

    from transformers import TrainerCallback

    from vocabridge import DistillationConfig, DistillationTrainer

    objective = variants()[variant]
    needs = {need for term in objective.get("terms", [objective]) for need in _needs(term["name"])}
    teacher = arguments.same_teacher if "same_tokenizer" in needs else arguments.teacher
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            arguments.student,
            teacher if "teacher" in needs else None,
            objective=objective,
            args=DistillationConfig(
                output_dir=folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=5e-5,
                projector_learning_rate=1e-3,
                discriminator_learning_rate=1e-4,
                max_length=arguments.max_length,
                student_template="chat",
                logging_steps=1,
                diagnostics_steps=0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=0,
            ),
            train_dataset=_rows(arguments),
            callbacks=[Clock()],
        )
        setup = time.perf_counter() - start
        sys.stdout, stdout = sys.stderr, sys.stdout  # the trainer prints its log
        trainer.train()
        sys.stdout = stdout
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = [end - begin for begin, end in zip(ends[::2], ends[1::2], strict=True)]
    epoch = max(1, arguments.rows // arguments.batch_size)
    coverages = [value for name, value in logged[-1].items() if name.split("/")[-1] == "coverage"]
    return {
        "variant": variant,
        "loss_first": _mean(entry["loss"] for entry in logged[:epoch]),
        "loss_last": _mean(entry["loss"] for entry in logged[-epoch:]),
        "cross_entropy_first": _cross_entropy(logged[:epoch]),
        "cross_entropy_last": _cross_entropy(logged[-epoch:]),
        "coverage": min(coverages) if coverages else None,
        "setup_seconds": setup,
        "step_seconds": statistics.median(steps[2:]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _needs(name: str) -> tuple[str, ...]:
    return objective_info(name).config_class.needs


def _rows(arguments: argparse.Namespace) -> list[Any]:
    from vocabridge.text import read_examples

    return read_examples(arguments.data, limit=arguments.rows)


def _cross_entropy(logged: list[dict[str, float]]) -> float:
    names = ("cross_entropy", "loss/cross_entropy", "loss")
    return _mean(next(entry[name] for name in names if name in entry) for entry in logged)


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    settings = {name: str(value) for name, value in vars(arguments).items() if name not in ("only_one", "variants")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return {"settings": settings, "machine": machine | {"torch": torch.__version__, "threads": torch.get_num_threads()}}


def _print_table(results: list[dict[str, Any]]) -> None:
    sft = next((result for result in results if result["variant"] == "cross_entropy"), None)
    table = Table("objective", "loss first", "last", "cross-entropy first", "last", "coverage", "step / SFT", "peak GB")
    for result in results:
        coverage = result["coverage"]
        table.add_row(
            result["variant"],
            *(
                f"{result[name]:.3f}"
                for name in ("loss_first", "loss_last", "cross_entropy_first", "cross_entropy_last")
            ),
            "-" if coverage is None else f"{coverage:.3f}",
            f"{result['step_seconds'] / sft['step_seconds']:.2f}" if sft else "-",
            f"{result['peak_bytes'] / 1e9:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
