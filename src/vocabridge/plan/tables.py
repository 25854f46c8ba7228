"""A plan for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from vocabridge.models.teacher_capture import gigabytes
from vocabridge.plan.recipe_plan import USABLE, Plan
from vocabridge.plan.step import Part


def plan_tables(plan: Plan) -> list[Table]:
    """Memory of a rank, disk of the run, and what changes would save."""
    ranks = "rank" if plan.world_size == 1 else "ranks"
    device = _parts(f"memory of each rank: {plan.strategy}, {plan.world_size} {ranks}", plan.device)
    device.add_section()
    device.add_row("together, at most", gigabytes(plan.total), "")
    tables = [device, _parts("disk of the run", plan.disk)]
    if plan.changes:
        changes = Table("change", "saves", "then fits", title="what to change first, each alone", title_justify="left")
        for change in plan.changes:
            fits = {True: "yes", False: "no", None: ""}[change.fits]
            changes.add_row(change.text, gigabytes(change.saving), fits)
        tables.append(changes)
    return tables


def verdict(plan: Plan) -> str:
    """One sentence."""
    if plan.device_memory is None:
        return f"{gigabytes(plan.total)} on each device; give --device-memory to see whether that fits"
    limit, size = gigabytes(int(USABLE * plan.device_memory)), gigabytes(plan.device_memory)
    word = "fits" if plan.fits else "does not fit"
    return f"{word}: {gigabytes(plan.total)} of {limit} ({USABLE:.0%} of {size}) on each device"


def _parts(title: str, parts: Sequence[Part]) -> Table:
    table = Table("part", "size", "of", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for part in parts:
        table.add_row(part.name, gigabytes(part.num_bytes), part.basis)
    return table
