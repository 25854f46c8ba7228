"""An epoch with a teacher cache against an epoch with the live teacher, and against fine-tuning without any teacher.

    python benchmarks/cached_epoch.py [--student DIR --teacher DIR --data train.jsonl] [--objective dskd_cma]

Whole epochs of the trainer in float32, optimizer and data loading included; writing the cache is timed apart, as what
the first epoch pays.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import material
from harness import Bar, Row, parse, parser, report
from vocabridge import DistillationConfig, DistillationTrainer
from vocabridge.cache_teacher import cache_teacher
from vocabridge.models.loading import load_student, load_teacher, load_tokenizer
from vocabridge.models.spec import CacheSpec, ModelSpec
from vocabridge.text import Example


def main(argv: Sequence[str] | None = None) -> None:
    """Write a cache, then run epochs of the three kinds in rounds."""
    options = parser("cached_epoch", __doc__)
    material.add_pair_options(options)
    options.add_argument("--objective", default="dskd_cma")
    options.add_argument("--rows", type=int, default=16)
    options.add_argument("--bytes", type=int, default=350, help="of each prompt and response where --data is not given")
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--max-length", type=int, default=512)
    arguments = parse(options, argv)
    if arguments.smoke:
        arguments.rows, arguments.bytes, arguments.batch_size = 4, 60, 2
    pair = material.find_pair(arguments)
    examples = material.examples(arguments, arguments.rows, num_bytes=arguments.bytes)
    with tempfile.TemporaryDirectory() as folder:
        spec = ModelSpec(
            model=pair.teacher, dtype="float32", device="cpu", cache=CacheSpec(folder=str(Path(folder, "cache")))
        )
        began = time.perf_counter()
        cached = cache_teacher(spec, examples, max_length=arguments.max_length)
        capture_seconds = time.perf_counter() - began
        teachers: dict[str, Callable[[], Any]] = {
            "SFT": lambda: None,
            "live teacher": lambda: load_teacher(spec.model_copy(update={"cache": None})),
            "teacher cache": lambda: cached,
        }
        epochs = Epochs(arguments, pair, examples, folder)
        seconds: dict[str, list[float]] = {name: [] for name in teachers}
        for _ in range(arguments.repeats):
            for name, load in teachers.items():
                seconds[name].append(epochs.seconds(load()))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        cache = {"write s": capture_seconds, "rows": len(cached.cache), "cache MB": cached.cache.num_bytes / 1e6}
    rows: list[Row] = [
        {
            "epoch": name,
            "seconds": value,
            "seconds / SFT": value / medians["SFT"],
            "seconds / live": value / medians["live teacher"],
        }
        for name, value in medians.items()
    ]
    bar = Bar("cached epoch / SFT epoch", medians["teacher cache"] / medians["SFT"], 1.5)
    facts = {"objective": arguments.objective, "rows": arguments.rows, "batch": arguments.batch_size}
    tables = {"epochs": rows, "writing the cache (models loaded and checked, teacher run)": [cache]}
    report(arguments, tables, settings=pair.facts() | facts, bars=[] if pair.is_stand_in else [bar])


@dataclass(frozen=True, slots=True)
class Epochs:
    """Trains one epoch at a time, each from the same student."""

    arguments: argparse.Namespace
    pair: material.Pair
    examples: list[Example]
    folder: str

    def seconds(self, teacher: Any) -> float:
        """From the first step to the end of the last; without a teacher it is fine-tuning."""
        student = ModelSpec(model=self.pair.student, dtype="float32", device="cpu")
        clock = _Clock()
        trainer = DistillationTrainer(
            load_student(student),
            teacher,
            objective="cross_entropy" if teacher is None else self.arguments.objective,
            args=DistillationConfig(
                output_dir=self.folder,
                num_train_epochs=1,
                per_device_train_batch_size=self.arguments.batch_size,
                max_length=self.arguments.max_length,
                logging_steps=1000,
                diagnostics_steps=0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=self.examples,
            student_tokenizer=load_tokenizer(student),
            teacher_tokenizer=None if teacher is None else load_tokenizer(ModelSpec(model=self.pair.teacher)),
            callbacks=[clock],
        )
        trainer.train()
        return clock.ended - clock.began


class _Clock(TrainerCallback):
    began = ended = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.ended = time.perf_counter()


if __name__ == "__main__":
    main()
