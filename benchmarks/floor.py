"""Step time of every objective against its floor: both trunks, and the products with the heads that its formula needs.

    python benchmarks/floor.py [--student DIR --teacher DIR --data train.jsonl] [--objectives dskd_cma gold ...]

A step is the teacher's forward, the student's forward, the loss and the backward pass on one batch in float32, without
the optimizer. Its floor is measured in the same rounds: the student's trunk forward and backward, the teacher's trunk
forward, and bare matrix products of the rows with the heads. All objectives share one process and one pair of models.

Extra memory is how far the process grows during one step beyond both models and all gradients.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import material
from harness import Bar, Row, Timing, extra_peak_bytes, interleaved, megabytes, parse, parser, report
from vocabridge.assembly import build_objective
from vocabridge.distillation_model import DistillationModel
from vocabridge.models.forward import IGNORE_INDEX, forward_side
from vocabridge.models.heads import output_head
from vocabridge.models.loading import load_student, load_teacher, load_tokenizer, vocabulary_size
from vocabridge.models.spec import ModelSpec
from vocabridge.models.teacher import LiveTeacher
from vocabridge.objectives import objective_info, objective_names
from vocabridge.objectives.config import Cost
from vocabridge.pairs import PairBatch, PairCollator, PairTokenizer, pad_token_id, tokenize_examples
from vocabridge.text import Example

OWN = ("student logits", "student hidden grad", "student weight grad")
PRODUCTS: dict[Cost, tuple[str, ...]] = {
    "no head": (),
    "student head": OWN,
    "both heads": (*OWN, "teacher logits"),
    # The student's head also reads projected teacher states and the teacher's head projected student states; both
    # heads are constants there.
    "both heads twice": (
        *OWN,
        "teacher logits",
        "student logits",
        "student hidden grad",
        "teacher logits",
        "teacher hidden grad",
    ),
}
"""Products of rows with a head, of 2 x rows x vocabulary x hidden size operations each, that a formula cannot avoid."""

LESS_THAN_COST: dict[str, tuple[str, ...]] = {
    "cdm": (*OWN, "student logits", "teacher logits"),  # the second student pass only ranks tokens
    "multilevel_ot": PRODUCTS["both heads"],  # computes logits twice to hold fewer
}
"""Objectives that apply heads more often than their formula asks."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all objectives in one process."""
    options = parser("floor", __doc__)
    material.add_pair_options(options)
    options.add_argument("--rows", type=int, default=4)
    options.add_argument("--bytes", type=int, default=350, help="of each prompt and response where --data is not given")
    options.add_argument("--max-length", type=int, default=512)
    options.add_argument("--objectives", nargs="*", default=None)
    arguments = parse(options, argv)
    names = arguments.objectives or (["cross_entropy", "dskd_cma"] if arguments.smoke else objective_names())
    models = material.find_pair(arguments)
    rows = material.examples(arguments, arguments.rows, num_bytes=arguments.bytes)
    across = Bench.load(models.student, models.teacher, rows, max_length=arguments.max_length)
    benches = dict.fromkeys(["cross_entropy", *names], across)
    if same_tokenizer := [name for name in names if "same_tokenizer" in _needs(name)]:
        same = Bench.load(models.student, models.student, rows, max_length=arguments.max_length, student=across.student)
        benches |= dict.fromkeys(same_tokenizer, same)
    tables, bars = _measure(benches, arguments, is_stand_in=models.is_stand_in)
    report(arguments, tables, settings=models.facts() | across.facts(), bars=bars)


def _needs(name: str) -> tuple[str, ...]:
    return objective_info(name).config_class.needs


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Bare products of rows with one head, into memory that exists already."""

    hidden: torch.Tensor
    weight: torch.Tensor
    logits: torch.Tensor
    hidden_grad: torch.Tensor
    weight_grad: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Head:
        """Random rows for the model's head."""
        weight = output_head(model, vocabulary_size(tokenizer)).weight.detach()
        hidden = torch.randn(num_rows, weight.shape[1])
        logits = torch.randn(num_rows, weight.shape[0])
        return cls(hidden, weight, logits, torch.empty_like(hidden), torch.empty_like(weight))

    @property
    def flops(self) -> int:
        """Of one product."""
        return 2 * self.hidden.shape[0] * self.weight.numel()

    def products(self, side: str) -> dict[str, Callable[[], object]]:
        """By the names of :data:`PRODUCTS`."""
        return {
            f"{side} logits": lambda: torch.mm(self.hidden, self.weight.t(), out=self.logits),
            f"{side} hidden grad": lambda: torch.mm(self.logits, self.weight, out=self.hidden_grad),
            f"{side} weight grad": lambda: torch.mm(self.logits.t(), self.hidden, out=self.weight_grad),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """One pair of models with one batch."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    pair_tokenizer: PairTokenizer
    batch: PairBatch
    heads: dict[str, Head]
    steps: itertools.count[int] = field(default_factory=itertools.count)

    @classmethod
    def load(
        cls,
        student_name: str,
        teacher_name: str,
        examples: list[Example],
        *,
        max_length: int,
        student: PreTrainedModel | None = None,
    ) -> Bench:
        """Both models in float32; ``student`` is one that is loaded already."""
        student_spec, teacher_spec = (
            ModelSpec(model=name, dtype="float32", device="cpu") for name in (student_name, teacher_name)
        )
        tokenizers = load_tokenizer(student_spec), load_tokenizer(teacher_spec)
        pair_tokenizer = PairTokenizer(*tokenizers, max_length=max_length)
        collate = PairCollator(pad_token_id(tokenizers[0]), pad_token_id(tokenizers[1]))
        batch = collate(tokenize_examples(examples, pair_tokenizer)[:])
        student = load_student(student_spec) if student is None else student
        assert student is not None
        teacher = load_teacher(teacher_spec)
        heads = {
            "student": Head.of(student, tokenizers[0], _num_supervised(batch["labels"])),
            "teacher": Head.of(teacher, tokenizers[1], _num_supervised(batch["teacher_labels"])),
        }
        return cls(student, teacher, tokenizers, pair_tokenizer, batch, heads)

    def facts(self) -> Row:
        """Sizes, for the settings of the result."""
        shapes = {f"{side}_head": list(head.weight.shape) for side, head in self.heads.items()}
        rows = {f"{side}_rows": len(head.hidden) for side, head in self.heads.items()}
        padded = {"student_batch": list(self.batch["input_ids"].shape)}
        return shapes | rows | padded | {"teacher_batch": list(self.batch["teacher_input_ids"].shape)}

    def student_trunk(self) -> None:
        """Forward and backward from a constant gradient on the supervised positions."""
        self.student.zero_grad(set_to_none=True)
        batch = self.batch
        side = forward_side(self.student, batch["input_ids"], batch["attention_mask"], batch["labels"])
        side.hidden_states.backward(torch.full_like(side.hidden_states, 1e-3))

    def teacher_trunk(self) -> None:
        """Forward only."""
        LiveTeacher(self.teacher)(self.batch)

    def step(self, objective_spec: str | Mapping[str, Any]) -> Step:
        """The objective of that name (with its defaults, or with the settings beside ``name``), ready to run."""
        name = objective_spec if isinstance(objective_spec, str) else str(objective_spec["name"])
        objective = build_objective(
            objective_spec,
            self.student,
            self.tokenizers[0],
            self.teacher,
            self.tokenizers[1],
            pair_tokenizer=self.pair_tokenizer,
        )
        teacher = None
        if "teacher" in _needs(name):
            size = vocabulary_size(self.tokenizers[1])
            teacher = LiveTeacher(self.teacher, vocab_size=size, layers=objective.layers.teacher)
        model = DistillationModel(self.student, objective, vocab_size=vocabulary_size(self.tokenizers[0])).train()
        counts = {f"{side}_tokens": torch.tensor(float(len(head.hidden))) for side, head in self.heads.items()}
        return Step(model, teacher, self.batch, counts, self.steps)

    def products(self, name: str) -> tuple[str, ...]:
        """Products with heads that the objective's formula cannot avoid."""
        return LESS_THAN_COST.get(name, PRODUCTS[objective_info(name).config_class.cost])


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One forward and backward pass of an objective."""

    model: DistillationModel
    teacher: LiveTeacher | None
    batch: PairBatch
    counts: dict[str, torch.Tensor]
    steps: itertools.count[int]

    def __call__(self) -> None:
        """Run it; gradients of the step before are dropped first."""
        nn.Module.zero_grad(self.model, set_to_none=True)
        self.model.objective.set_step(next(self.steps))
        signal = None if self.teacher is None else self.teacher(self.batch)
        loss, _ = self.model(self.batch, signal, self.counts)
        loss.backward()

    def extra_bytes(self) -> int | None:
        """Growth of the process during a step, without the gradients that it leaves."""
        nn.Module.zero_grad(self.model, set_to_none=True)
        grown = extra_peak_bytes(self)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return None if grown is None else grown - sum(grad.nbytes for grad in gradients)

    def flops(self) -> int:
        """Matrix products of one step."""
        return _flops(self)


def _flops(function: Callable[[], object]) -> int:
    """Operations of all matrix products."""
    # The counter does not know the in-place form by which the gradient of a head is summed.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        function()
    return int(counter.get_total_flops())


def _addmm_flops(_: torch.Size, left: torch.Size, right: torch.Size, *, out_shape: torch.Size) -> int:
    return 2 * left.numel() * right[1]


def _num_supervised(labels: torch.Tensor) -> int:
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def _measure(
    benches: dict[str, Bench], arguments: argparse.Namespace, *, is_stand_in: bool
) -> tuple[dict[str, list[Row]], list[Bar]]:
    prefixes = {id(bench): f"{number} " for number, bench in enumerate(dict.fromkeys(benches.values()))}
    steps = {name: bench.step(name) for name, bench in benches.items()}
    parts: dict[str, Callable[[], object]] = {}
    for bench in dict.fromkeys(benches.values()):
        own: dict[str, Callable[[], object]] = {"student trunk": bench.student_trunk}
        own["teacher trunk"] = bench.teacher_trunk
        for side, head in bench.heads.items():
            own |= head.products(side)
        parts |= {prefixes[id(bench)] + part: run for part, run in own.items()}
    timings = interleaved(parts | steps, repeats=arguments.repeats)
    found = {}
    for name, bench in benches.items():
        prefix = prefixes[id(bench)]
        own_timings = {part.removeprefix(prefix): t for part, t in timings.items() if part.startswith(prefix)}
        found[name] = _row(name, bench, steps[name], own_timings | {"step": timings[name]}, timings["cross_entropy"])
    table = {
        "parts of the floor, seconds": [
            {"part": part.split(" ", 1)[1], "seconds": timings[part].median} for part in parts if part.startswith("0 ")
        ],
        "step against floor": list(found.values()),
    }
    return table, [] if is_stand_in or "dskd_cma" not in found else _bars(found["dskd_cma"])


def _row(name: str, bench: Bench, step: Step, timings: dict[str, Timing], sft: Timing) -> Row:
    products = bench.products(name)
    trunks = timings["student trunk"].median
    floor_flops = _flops(bench.student_trunk) + sum(bench.heads[product.split()[0]].flops for product in products)
    if step.teacher is not None:
        trunks += timings["teacher trunk"].median
        floor_flops += _flops(bench.teacher_trunk)
    floor = trunks + sum(timings[product].median for product in products)
    baseline = sft.median + (timings["teacher trunk"].median if step.teacher is not None else 0.0)
    seconds = timings["step"].median
    return {
        "objective": name,
        "step s": seconds,
        "floor s": floor,
        "step / floor": seconds / floor,
        "step / (SFT + teacher)": seconds / baseline,
        "operations / floor": step.flops() / floor_flops,
        "extra MB": megabytes(step.extra_bytes()),
    }


def _bars(row: Row) -> list[Bar]:
    bars = [
        Bar("dskd_cma: step / floor", row["step / floor"], 1.2),
        Bar("dskd_cma: step / (SFT step + teacher forward)", row["step / (SFT + teacher)"], 1.6),
    ]
    return bars if row["extra MB"] is None else [*bars, Bar("dskd_cma: extra MB", row["extra MB"], 500)]


if __name__ == "__main__":
    main()
