"""The teacher's forward in bfloat16 against float32: speed, and how far the last hidden states move.

    python benchmarks/teacher_dtype.py [--teacher DIR --data train.jsonl]

Processors with AMX multiply bfloat16 matrices several times as fast; those with AVX512-BF16 gain less, others lose.
The machine's flags stand in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

import material
from harness import Bar, Row, interleaved, machine_facts, megabytes, parse, parser, report
from vocabridge.models.forward import SideForward
from vocabridge.models.loading import load_teacher, load_tokenizer, vocabulary_size
from vocabridge.models.spec import Dtype, ModelSpec
from vocabridge.models.teacher import LiveTeacher
from vocabridge.pairs import PairCollator, PairTokenizer, pad_token_id, tokenize_examples

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure trunk and head in both types."""
    options = parser("teacher_dtype", __doc__)
    material.add_pair_options(options)
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--bytes", type=int, default=700, help="of each prompt and response where --data is not given")
    arguments = parse(options, argv)
    if arguments.smoke:
        arguments.rows, arguments.bytes = 2, 60
    models = material.find_pair(arguments)
    tokenizer = load_tokenizer(ModelSpec(model=models.teacher))
    pad = pad_token_id(tokenizer)
    examples = material.examples(arguments, arguments.rows, num_bytes=arguments.bytes)
    batch = PairCollator(pad, pad)(tokenize_examples(examples, PairTokenizer(tokenizer, tokenizer))[:])
    size = vocabulary_size(tokenizer)
    teachers = {
        dtype: LiveTeacher(load_teacher(ModelSpec(model=models.teacher, dtype=dtype, device="cpu")), vocab_size=size)
        for dtype in DTYPES
    }
    sides = {dtype: teacher(batch) for dtype, teacher in teachers.items()}
    runs: dict[str, Callable[[], object]] = {}
    for dtype, teacher in teachers.items():
        runs[f"trunk {dtype}"] = partial(teacher, batch)
        runs[f"head {dtype}"] = partial(_logits, sides[dtype])
    timings = interleaved(runs, repeats=arguments.repeats)
    reference = sides["float32"].hidden_states
    rows: list[Row] = []
    for dtype, side in sides.items():
        moved = (side.hidden_states.float() - reference).norm() / reference.norm()
        row: Row = {"dtype": dtype, "weights MB": megabytes(_num_bytes(teachers[dtype].model))}
        for part in ("trunk", "head"):
            seconds = timings[f"{part} {dtype}"].median
            row |= {f"{part} s": seconds, f"{part} speed / float32": timings[f"{part} float32"].median / seconds}
        rows.append(row | {"hidden states moved by": float(moved)})
    facts = {"tokens": list(batch["teacher_input_ids"].shape), "supervised": len(sides["float32"].labels)}
    bars = []
    if not models.is_stand_in and "amx_bf16" in machine_facts()["flags"]:
        bars = [Bar("bf16 teacher on AMX: speed / float32", rows[1]["trunk speed / float32"], 2, at_most=False)]
    report(arguments, {"forward": rows}, settings=models.facts() | facts, bars=bars)


def _num_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.no_grad()
def _logits(side: SideForward) -> torch.Tensor:
    return side.head(side.hidden_states)


if __name__ == "__main__":
    main()
