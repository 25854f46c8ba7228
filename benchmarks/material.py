"""What the benchmarks measure on: a pair of models, rows of text.

The models of the quick start where they have been converted (``python examples/quickstart.py prepare``), otherwise
small random ones on tokenizers trained on the spot: those show that a benchmark runs, not what it would measure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from harness import RESULTS, ROOT, Row
from vocabridge.text import Example, read_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

sys.path.append(str(ROOT / "examples"))

QUICKSTART = ROOT / "build" / "quickstart"


@dataclass(frozen=True, slots=True)
class Pair:
    """Folders of a student and a teacher, and what to call them."""

    student: str
    teacher: str
    is_stand_in: bool

    def facts(self) -> Row:
        """For the settings of a result."""
        names = {side: Path(getattr(self, side)).name for side in ("student", "teacher")}
        return names | {"models": "small random stand-ins" if self.is_stand_in else "pretrained"}


def add_pair_options(options: argparse.ArgumentParser) -> None:
    """``--student``, ``--teacher``, ``--data``."""
    options.add_argument("--student", help="folder or hub id; default: the quick start's, or a stand-in")
    options.add_argument("--teacher", help="likewise")
    options.add_argument("--data", type=Path, help="JSONL rows; default: the quick start's, joined to longer ones")


def find_pair(arguments: argparse.Namespace) -> Pair:
    """The models named on the command line, the quick start's, or stand-ins."""
    student, teacher = QUICKSTART / "models/smollm2-135m-instruct", QUICKSTART / "models/gemma-3-270m"
    is_named = bool(arguments.student or arguments.teacher)
    if not is_named and (arguments.smoke or not (student.is_dir() and teacher.is_dir())):
        return _stand_ins()
    return Pair(arguments.student or str(student), arguments.teacher or str(teacher), is_stand_in=arguments.smoke)


def examples(arguments: argparse.Namespace, num_rows: int, *, num_bytes: int) -> list[Example]:
    """Rows of ``--data`` as they are, or rows whose prompt and response have about ``num_bytes`` bytes each."""
    if arguments.data:
        return read_examples(arguments.data, limit=num_rows)
    rows = cycle(_short_rows(real=not arguments.smoke))
    return read_examples([_joined(rows, num_bytes) for _ in range(num_rows)])


def _joined(rows: Iterator[tuple[str, str]], num_bytes: int) -> dict[str, str]:
    prompt = response = ""
    while len(response) < num_bytes:
        question, answer = next(rows)
        prompt, response = f"{prompt} {question.strip()}", f"{response} {answer}"
    return {"prompt": prompt.strip()[-num_bytes:] + "\n", "response": response.strip()[:num_bytes]}


def _short_rows(*, real: bool) -> list[tuple[str, str]]:
    path = QUICKSTART / "data/train.jsonl"
    if real and path.is_file():
        return [(row["prompt"], row["response"]) for row in map(json.loads, path.read_text("utf-8").splitlines())]
    from demo_text import make_text

    return [(row["prompt"], row["response"]) for row in make_text(0).student]


def _stand_ins() -> Pair:
    """Made once, on the tokenizers of the demo."""
    folder = RESULTS / "stand-in"
    pair = Pair(str(folder / "student"), str(folder / "teacher"), is_stand_in=True)
    if not (folder / "done").exists():
        from demo_text import byte_level_tokenizer, make_text, sentencepiece_tokenizer

        corpus = [row["prompt"] + row["response"] for row in make_text(0).teacher]
        _save_random(byte_level_tokenizer(corpus), pair.student, hidden_size=64)
        _save_random(sentencepiece_tokenizer(corpus), pair.teacher, hidden_size=96)
        (folder / "done").touch()
    return pair


def _save_random(tokenizer: PreTrainedTokenizerFast, folder: str, *, hidden_size: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
