"""Training throughput with one and with two processes (gloo on CPU), the cores shared out among them.

    python benchmarks/processes.py [--student DIR --teacher DIR] [--objective dskd_cma]

Each process takes the same number of rows a step, so that two processes train on twice as many rows a step. All ranks
of one machine share its memory bandwidth; two machines would not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import material
from harness import Bar, ChildRun, Row, parse, parser, report, run_child

SKIPPED_STEPS = 2
"""The first steps fill caches."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one child for each number of processes; a child runs :func:`_train`."""
    options = parser("processes", __doc__)
    material.add_pair_options(options)
    options.add_argument("--objective", default="dskd_cma")
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options.add_argument("--rows-per-process", type=int, default=4)
    options.add_argument("--bytes", type=int, default=350, help="of each prompt and response where --data is not given")
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    arguments = parse(options, argv)
    if arguments.smoke:
        arguments.bytes, arguments.steps = 60, SKIPPED_STEPS + 1
    if arguments.train:
        _train(arguments)
        return
    pair = material.find_pair(arguments)  # once, so that ranks do not make stand-ins side by side
    given = list(sys.argv[1:] if argv is None else argv)
    rows: list[Row] = []
    for count in arguments.processes:
        threads = max(1, (arguments.threads or os.cpu_count() or 1) // count)
        child = _launch(count, threads, [*given, "--student", pair.student, "--teacher", pair.teacher])
        measured = json.loads(child.output.strip().splitlines()[-1])
        rate = measured["tokens"] / measured["step_seconds"]
        rows.append(
            {
                "processes": count,
                "threads each": threads,
                "step s": measured["step_seconds"],
                "student tokens a step": measured["tokens"],
                "tokens/s": rate,
                "speed / first": rate / rows[0]["tokens/s"] if rows else 1.0,
                "peak MB of a process": child.peak_bytes / 1e6,
            }
        )
    settings = pair.facts() | {"objective": arguments.objective, "steps": arguments.steps, "cores": os.cpu_count()}
    bars: list[Bar] = []  # no bar: cores that are shared cannot give more
    report(arguments, {"throughput": rows}, settings=settings, bars=bars)


def _launch(count: int, threads: int, given: list[str]) -> ChildRun:
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return run_child([*command, __file__, *given, "--train", "--threads", str(threads)], environment=environment)


def _train(arguments: argparse.Namespace) -> None:
    """One rank; rank 0 prints tokens and seconds of a step."""
    from transformers import TrainerCallback

    from vocabridge import DistillationConfig, DistillationTrainer
    from vocabridge.objectives import objective_info

    pair = material.find_pair(arguments)
    world_size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    needs = objective_info(arguments.objective).config_class.needs
    begun: list[float] = []
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begun.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - begun[-1])

    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            pair.student,
            pair.teacher if "teacher" in needs else None,
            objective=arguments.objective,
            args=DistillationConfig(
                output_dir=folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.rows_per_process,
                logging_steps=arguments.steps,
                diagnostics_steps=0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                ddp_backend="gloo" if world_size > 1 else None,
            ),
            train_dataset=material.examples(
                arguments, arguments.rows_per_process * world_size, num_bytes=arguments.bytes
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    if rank == 0:
        pairs: Any = trainer.train_dataset
        tokens = sum(len(row.student.input_ids) for row in pairs)
        print(json.dumps({"tokens": tokens, "step_seconds": statistics.median(seconds[SKIPPED_STEPS:])}))


if __name__ == "__main__":
    main()
