"""Runs on two processes at once, started by torchrun; every rank writes what it saw of every case."""

from __future__ import annotations

import dataclasses
import gc
import io
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1]))

import data_parallel_cases as cases
import vocabridge.evaluation.evaluate
import vocabridge.evaluation.generation
from vocabridge import cli
from vocabridge.checkpoint_files import checkpoints as checkpoints_of
from vocabridge.checkpoint_files import damage
from vocabridge.errors import UserError
from vocabridge.objectives.dskd_cma import DskdCma
from vocabridge.ranks import launched_ranks
from vocabridge.trainer import DistillationTrainer

RANK = 0


def run(folder: Path, names: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in names or CASES:
        try:
            results[name] = CASES[name](folder)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        torch.distributed.barrier()
    return results


# --- training ---------------------------------------------------------------------------------------------------------


def gradients(folder: Path) -> dict[str, Any]:
    """Written by the first rank; both tell which bits they have."""
    (folder / "gradients").mkdir(exist_ok=True)
    found = {}
    for name, objective in {**cases.OBJECTIVES, **cases.DEPENDENT}.items():
        tensors = cases.gradients(folder / "gradient_run", objective, num_processes=2, accumulation=1)
        found[name] = cases.same_bits(tensors)
        if RANK == 0:
            save_file(tensors, folder / "gradients" / f"{name}.safetensors")
    return found


def learned_parts(folder: Path) -> dict[str, Any]:
    """Bits of everything that is trained, before and after four steps; the ranks start apart."""
    trainer = cases.trainer(folder / "learned_parts", cases.GAN, num_processes=2, max_steps=4)
    if RANK == 1:
        for parameter in trainer.objective_module.parameters():
            parameter.data.add_(1.0)
    trained = {name: p for name, p in trainer.distillation_model.named_parameters() if p.requires_grad}
    before = cases.same_bits(trained)
    trainer.train()
    return {"before": before, "after": cases.same_bits(trained)}


def checkpoints(folder: Path) -> dict[str, Any]:
    """Losses of a run that keeps a checkpoint, and of one that goes on from the checkpoint of one process."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = cases.trainer(folder / "two", cases.GAN, num_processes=2, **options)
    whole.train()
    resumed = cases.trainer(folder / "two_after_one", cases.GAN, num_processes=2, max_steps=4)
    resumed.train(resume_from_checkpoint=str(folder / "one" / "checkpoint-2"))
    return {"whole": cases.losses(whole.state.log_history), "resumed": cases.losses(resumed.state.log_history)}


# --- commands ---------------------------------------------------------------------------------------------------------


def command(words: list[str]) -> dict[str, Any]:
    """Exit status and output of ``vocabridge``, in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", ["vocabridge", *words]):
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        except Exception as error:
            status = repr(error)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


@contextmanager
def counted_batches() -> Iterator[list[Any]]:
    """The row numbers of the batches that this rank generates; the first of them waits for the other rank's."""
    engine = vocabridge.evaluation.generation.TransformersEngine
    found: list[Any] = []
    original = engine.generate

    def generate(self: Any, prompts: Any, *, indices: Any, seed: int) -> Any:
        if not found:
            torch.distributed.barrier()
        found.append([seed, *indices])
        return original(self, prompts, indices=indices, seed=seed)

    with patch.object(engine, "generate", generate):
        yield found


def evaluate(folder: Path) -> dict[str, Any]:
    with counted_batches() as batches:
        first = command(cases.evaluate_words(folder, folder / "evaluation"))
    again = command(cases.evaluate_words(folder, folder / "evaluation"))
    return {"first": first, "batches": batches, "again": again}


def generate(folder: Path) -> dict[str, Any]:
    with counted_batches() as batches:
        found = command(cases.generate_words(folder, folder / "generated.jsonl"))
    return {**found, "batches": batches}


def failing(error: Callable[[], BaseException]) -> Callable[[Path], dict[str, Any]]:
    """The second rank fails at its second batch, and what is there is gone on with."""

    def case(folder: Path) -> dict[str, Any]:
        output = folder / f"evaluation_{error().__class__.__name__}"
        engine = vocabridge.evaluation.generation.TransformersEngine
        original, num_batches = engine.generate, 0

        def generate(self: Any, prompts: Any, *, indices: Any, seed: int) -> Any:
            nonlocal num_batches
            num_batches += 1
            if num_batches == 1:
                torch.distributed.barrier()
            if num_batches == 2 and RANK == 1:
                raise error()
            return original(self, prompts, indices=indices, seed=seed)

        with patch.object(engine, "generate", generate):
            failed = command(cases.evaluate_words(folder, output))
        torch.distributed.barrier()
        left = [path.name for path in output.rglob("*.partial")]
        torch.distributed.barrier()
        return {"failed": failed, "left": left, "again": command(cases.evaluate_words(folder, output))}

    return case


def bad_start(folder: Path) -> dict[str, Any]:
    """A mistake that all ranks see, and a model that one rank cannot load."""
    words = cases.evaluate_words(folder, folder / "nothing")
    on_all = command([*words, "--in-domain", "nowhere"])
    original = vocabridge.evaluation.evaluate.load_model

    def load_model(*args: Any, **options: Any) -> Any:
        if RANK == 1:
            raise UserError("the second process cannot load the model.")
        return original(*args, **options)

    with patch.object(vocabridge.evaluation.evaluate, "load_model", load_model):
        on_one = command(words)
    with patch("vocabridge.evaluation.evaluate.model_fingerprint", lambda *args: f"model of rank {RANK}"):
        apart = command(words)
    return {"on_all": on_all, "on_one": on_one, "apart": apart, "is_there": (folder / "nothing").exists()}


def cache_teacher(folder: Path) -> dict[str, Any]:
    words = ["cache-teacher", str(folder / "recipe.yaml")]
    with patch("vocabridge.models.teacher_capture.TOKENS_PER_BATCH", 64):  # several batches
        first = command(words)
    return {"first": first, "again": command(words)}


def distill(folder: Path) -> dict[str, Any]:
    words = ["distill", str(folder / "recipe.yaml")]
    return {"first": command(words), "again": command(words), "resumed": command([*words, "--resume"])}


def resume(folder: Path) -> dict[str, Any]:
    """A run of two processes; one of one process gone on with, with half the rows for each process, and with all."""
    return {
        "whole": command(cases.resumable_words(folder, "by_two", rows=2)),
        "resumed": command(cases.resumable_words(folder, "by_one_then_two", rows=2, resume=True)),
        "refused": command(cases.resumable_words(folder, "refused", rows=4, resume=True)),
    }


def preempted(folder: Path) -> dict[str, Any]:
    """An undisturbed run; then SIGTERM to the second rank alone, within an epoch and in the last step of one."""
    original = DistillationTrainer.compute_loss

    def stopped_in(step: int) -> dict[str, Any]:
        def compute_loss(self: DistillationTrainer, *args: Any, **options: Any) -> Any:
            if RANK == 1 and self.state.global_step + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args, **options)

        words = cases.long_distill_words(folder, folder / f"stopped_in_{step}")
        with patch.object(DistillationTrainer, "compute_loss", compute_loss):
            stopped = command(words)
        torch.distributed.barrier()
        left = {path.name: damage(path) for path in checkpoints_of(folder / f"stopped_in_{step}")}
        torch.distributed.barrier()
        return {"stopped": stopped, "left": left, "resumed": command([*words, "--resume"])}

    whole = command(cases.long_distill_words(folder, folder / "undisturbed"))
    return {"whole": whole, **{str(step): stopped_in(step) for step in (3, 4)}}


def not_finite(folder: Path) -> dict[str, Any]:
    """A term is NaN on the second rank alone, in the third step."""
    original, called = DskdCma.forward, itertools.count(1)

    def forward(self: DskdCma, *given: Any) -> Any:
        terms = original(self, *given)
        if next(called) == 3 and RANK == 1:
            terms["student_space"] = dataclasses.replace(terms["student_space"], sum=torch.tensor(float("nan")))
        return terms

    with patch.object(DskdCma, "forward", forward):
        return command(cases.long_distill_words(folder, folder / "not_finite"))


def large_value(folder: Path) -> dict[str, Any]:
    """More than the store takes at once, in both directions, and fewer items than processes."""
    data = bytes(range(256)) * 40_000
    with launched_ranks() as ranks:
        told = ranks.on_first(lambda: data)
        found = list(ranks.spread(["a", "b", "c"], lambda item: (item, data)))
        nothing = list(ranks.spread([], str))
        single = list(ranks.spread(["x"], str.upper))
        ranks.wait()
        return {
            "told": told == data,
            "places": sorted(place for place, _ in found),
            "items": sorted(item for _, (item, _) in found),
            "whole": all(value == data for _, (_, value) in found),
            "nothing": nothing,
            "single": single,
        }


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "gradients": gradients,
    "learned_parts": learned_parts,
    "checkpoints": checkpoints,
    "evaluate": evaluate,
    "generate": generate,
    "user_error": failing(lambda: UserError("the second process has had enough.")),
    "interrupt": failing(KeyboardInterrupt),
    "bad_start": bad_start,
    "cache_teacher": cache_teacher,
    "distill": distill,
    "resume": resume,
    "preempted": preempted,
    "large_value": large_value,
}


if __name__ == "__main__":
    gc.freeze()  # accelerate collects garbage after each training, among all objects of all packages
    torch.distributed.init_process_group("gloo")
    RANK = torch.distributed.get_rank()
    seen = run(Path(sys.argv[1]), sys.argv[2:])
    torch.distributed.barrier()
    # The last one: a process that fails in training ends, which the other one notices when it wants to average with it.
    seen["not_finite"] = not_finite(Path(sys.argv[1]))
    (Path(sys.argv[1]) / f"rank{RANK}.json").write_text(json.dumps(seen), encoding="utf-8")
    os._exit(0)
