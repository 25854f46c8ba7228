"""Which rows an optimizer step holds: what of it must stay when a run goes on, written into each checkpoint.

A resumed run finds its place in the data by counting steps. Were they larger or smaller than before, rows would be
trained twice or never, and the learning rate's schedule would be another one.
"""

from __future__ import annotations

import json
from pathlib import Path

from vocabridge.checkpoint_contents import refusing
from vocabridge.errors import UserError
from vocabridge.training_arguments import DistillationConfig

STEP_ROWS_FILE = "step_rows.json"

_BATCH_SIZE = "training.per_device_train_batch_size"
_ACCUMULATION = "training.gradient_accumulation_steps"
_ROWS = "rows of an optimizer step"


def step_rows(args: DistillationConfig, *, is_stream: bool) -> dict[str, int]:
    """What decides which rows meet in a step, by name; two runs of one recipe have the same steps if these agree.

    Args:
        args: of the run, with the number of its processes.
        is_stream: rows are read as they come; then each data worker fills batches of its own.
    """
    if args.groups_by_length:  # batches are cut for so many processes, and mixed as wholes
        sizes = {"processes": args.world_size, _BATCH_SIZE: args.per_device_train_batch_size}
        return {**sizes, _ACCUMULATION: args.gradient_accumulation_steps}
    if is_stream and args.dataloader_num_workers > 1:
        sizes = {"rows of a batch over all processes": _rows_of_a_batch(args)}
        workers = {"training.dataloader_num_workers": args.dataloader_num_workers}
        return {**sizes, _ACCUMULATION: args.gradient_accumulation_steps, **workers}
    return {_ROWS: _rows_of_a_batch(args) * args.gradient_accumulation_steps}


def check_step_rows(checkpoint: Path, now: dict[str, int], args: DistillationConfig) -> None:
    """Compare the steps before a checkpoint with those that would follow; one without a record is taken as it is.

    Raises:
        UserError: they hold other rows; tells which values would do.
    """
    path = checkpoint / STEP_ROWS_FILE
    if not path.is_file():
        return
    with refusing(path):
        before = {str(name): int(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    if before == now:
        return
    if before.keys() == now.keys() == {_ROWS}:
        raise UserError(
            f"{checkpoint} was written after steps of {before[_ROWS]} rows, and now a step would hold {now[_ROWS]} "
            f"({_BATCH_SIZE} x {_ACCUMULATION} x processes), so that rows would be trained twice or never; "
            f"{_fitting(before[_ROWS], args)}."
        )
    raise UserError(
        f"{checkpoint} was written with {_listed(before)}, which decide the rows of a step here and may not change "
        f"(now: {_listed(now)}); resume with the same ones, or start anew with --overwrite."
    )


def _rows_of_a_batch(args: DistillationConfig) -> int:
    """Over all processes, which share one batch if it is split."""
    return args.per_device_train_batch_size * (1 if _splits_batches(args) else args.world_size)


def _splits_batches(args: DistillationConfig) -> bool:
    return bool(getattr(args.accelerator_config, "split_batches", False))


def _fitting(rows: int, args: DistillationConfig) -> str:
    """How this number of processes gets steps of so many rows, with batches no larger than they are now."""
    processes = args.world_size
    if rows % processes:
        return f"start a number of processes that divides {rows}"
    sizes = range(processes, _rows_of_a_batch(args) + 1, processes)
    batch = max(size for size in sizes if rows % size == 0)
    per_device = batch if _splits_batches(args) else batch // processes
    return f"set {_BATCH_SIZE}={per_device} {_ACCUMULATION}={rows // batch}, or start another number of processes"


def _listed(facts: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
