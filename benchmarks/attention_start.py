"""How well cross-model attention is aligned before any training, by start and position weight.

    python benchmarks/attention_start.py --student DIR --teacher DIR --data dev.jsonl

Compares the attention of ``dskd_cma`` as it starts with the byte-exact chunks of the first rows of a file.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

from vocabridge.assembly import build_objective
from vocabridge.models.loading import load_student, load_teacher, load_tokenizer
from vocabridge.models.spec import ModelSpec
from vocabridge.pairs import PairCollator, PairTokenizer, TokenizedPair, pad_token_id
from vocabridge.text import read_examples

COLUMNS = ("coverage", "exact_pair_accuracy", "attention_in_chunk", "attention_top1_in_chunk")
STARTS = [("random", 0.0), ("random", 0.5), *product(["closed_form"], [0.0, 0.25, 0.5, 1.0, 2.0])]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=100)
    arguments = parser.parse_args()
    specs = [ModelSpec(model=arguments.student, template="chat"), ModelSpec(model=arguments.teacher)]
    student_tokenizer, teacher_tokenizer = (load_tokenizer(spec) for spec in specs)
    student, teacher = load_student(specs[0]), load_teacher(specs[1])
    tokenize = PairTokenizer(student_tokenizer, teacher_tokenizer, student_template="chat", max_length=512)
    pairs = [tokenize(example) for example in read_examples(arguments.data, limit=arguments.rows)]
    collate = PairCollator(pad_token_id(student_tokenizer), pad_token_id(teacher_tokenizer))
    batch = collate([pair for pair in pairs if isinstance(pair, TokenizedPair)])
    table = Table("query_start", "position_weight", *COLUMNS)
    for start, weight in STARTS:
        torch.manual_seed(0)
        objective = build_objective(
            {"name": "dskd_cma", "query_start": start, "position_weight": weight, "matching": "none"},
            student,
            student_tokenizer,
            teacher,
            teacher_tokenizer,
            pair_tokenizer=tokenize,
        )
        report = objective.probe(batch, student.get_input_embeddings(), teacher.get_input_embeddings())
        table.add_row(start, f"{weight:g}", *(f"{report[name]:.3f}" for name in COLUMNS))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
