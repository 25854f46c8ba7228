"""GOLD's loss and backward pass against TRL 1.16's, on the same data.

    python -m pip install --no-deps --target build/trl 'trl==1.16.*'
    python benchmarks/gold_vs_trl.py

Only TRL's loss class is used, from a folder of its own: TRL is no dependency of this package, and what it depends on is
here anyway. Without that folder our side is measured alone.

Vocabularies of 32,000 (student) and 50,000 tokens, 485 chunks that hold 765 student and 563 teacher tokens, TRL's
``bayesian`` merge with its hybrid loss, cross-entropy at equal weight on both sides. Both start from last hidden states
and end with gradients of hidden states and of the student's head, because logits that exist already are what our loss
avoids; a second width shows how much of the time is the heads' own products. TRL's side gets no prompt and no padding,
which it would pay for in training.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from harness import ROOT, Bar, Row, extra_peak_bytes, interleaved, megabytes, parse, parser, report
from vocabridge.alignment import chunk_ids
from vocabridge.models.forward import IGNORE_INDEX, SideForward
from vocabridge.models.heads import OutputHead
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup
from vocabridge.objectives.gold import Config, Gold

TRL = ROOT / "build" / "trl"

CHUNKS = {(1, 1): 283, (2, 1): 124, (3, 2): 78}
"""(student tokens, teacher tokens) of a chunk: how many there are."""
CHUNK_BYTES = 6


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both sides at growing lengths, and at a width where the heads' products are next to nothing."""
    options = parser("gold_vs_trl", __doc__)
    arguments = parse(options, argv)
    shares, vocabularies, widths = [0.25, 0.5, 1.0], (32_000, 50_000), (576, 64)
    if arguments.smoke:
        shares, vocabularies, widths = [0.05], (600, 700), (16, 8)
    torch.manual_seed(0)
    tokenizers = _tokenizers(*vocabularies)
    lengths = [_measure(Data.random(tokenizers, share, widths[0]), arguments) for share in shares]
    narrow = [_measure(Data.random(tokenizers, shares[-1], widths[1]), arguments)]
    full = lengths[-1]
    bars = []
    if full["TRL / ours"] is not None and not arguments.smoke:
        bars = [
            Bar("gold: TRL's seconds / ours", full["TRL / ours"], 20, at_most=False),
            Bar("gold: growth of our time / growth of chunks", _linearity(lengths), 1.2),
        ]
    tables = {"length": lengths, "narrow heads": narrow}
    report(arguments, tables, settings={"vocabularies": list(vocabularies), "width": widths[0]}, bars=bars)


def _linearity(rows: list[Row]) -> float:
    first, last = rows[0], rows[-1]
    return float(last["ours s"] / first["ours s"] / (last["chunks"] / first["chunks"]))


# --- data -------------------------------------------------------------------------------------------------------------


def _tokenizers(*vocab_sizes: int) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Byte-level BPE without merges, which nothing is encoded with; every third word is one side's own."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    shared = sorted({"\u0120" + "".join(rng.choices(letters, k=6)) for _ in range(2 * min(vocab_sizes) // 3)})
    made = []
    for side, size in zip("st", vocab_sizes, strict=True):
        own = [f"\u0120{side}{number}" for number in range(size)]
        vocabulary = {piece: index for index, piece in enumerate([*alphabet, *shared, *own][:size])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.append(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>"))
    return made[0], made[1]


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One model's part of one example: a first token that is read only, the response, an end token."""

    tokenizer: PreTrainedTokenizerFast
    ids: Tensor
    """``[n + 1]``"""
    spans: np.ndarray
    """``[n, 2]`` of the response and the end token."""
    hidden: Tensor
    """``[n, H]`` hidden state before each of them."""
    weight: Tensor
    """``[V, H]``"""

    @classmethod
    def random(
        cls, tokenizer: PreTrainedTokenizerFast, counts: Sequence[int], hidden_size: int, *, train: bool
    ) -> Side:
        """Random words that cut each chunk into its number of tokens."""
        ends = [c * CHUNK_BYTES + CHUNK_BYTES * k // n for c, n in enumerate(counts) for k in range(1, n + 1)]
        size = len(counts) * CHUNK_BYTES
        spans = np.array([[0, *ends, size], [*ends, size, size]])[:, : len(ends) + 1].T
        spans[-1] = size
        ids = torch.randint(257, len(tokenizer), (len(ends) + 2,))
        ids[-1] = tokenizer.eos_token_id
        weight = torch.randn(len(tokenizer), hidden_size).mul_(hidden_size**-0.5).requires_grad_(train)
        hidden = torch.randn(len(ends) + 1, hidden_size).mul_(2).requires_grad_(train)
        return cls(tokenizer, ids, spans, hidden, weight)

    def forward(self) -> SideForward:
        """As an objective sees it."""
        head = OutputHead(self.weight, None, None, 1.0)
        rows = torch.zeros(len(self.hidden), dtype=torch.long)
        return SideForward(self.hidden, self.ids[:-1], self.ids[1:], rows, head, nn.Identity())

    @property
    def labels(self) -> Tensor:
        """``[1, n + 1]`` with the first token left out."""
        return torch.cat([torch.tensor([IGNORE_INDEX]), self.ids[1:]])[None]

    @property
    def logits(self) -> Tensor:
        """``[1, n + 1, V]`` as a model returns them; nothing reads the last row."""
        return nn.functional.linear(torch.cat([self.hidden, self.hidden[-1:]]), self.weight)[None]

    @property
    def byte_offsets(self) -> Tensor:
        """``[1, n + 1, 2]``; the first token has none."""
        return torch.from_numpy(np.concatenate([[[0, 0]], self.spans]))[None]


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """One example under both tokenizers."""

    student: Side
    teacher: Side
    num_chunks: int

    @classmethod
    def random(
        cls, tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], share: float, hidden_size: int
    ) -> Data:
        """A share of :data:`CHUNKS` in random order; chunks of one token on either side hold one shared word."""
        kinds = [kind for kind, count in CHUNKS.items() for _ in range(max(1, round(count * share)))]
        random.Random(0).shuffle(kinds)
        student = Side.random(tokenizers[0], [kind[0] for kind in kinds], hidden_size, train=True)
        teacher = Side.random(tokenizers[1], [kind[1] for kind in kinds], hidden_size, train=False)
        vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
        largest = max(vocabularies[0][word] for word in vocabularies[0].keys() & vocabularies[1].keys())
        starts = [np.cumsum([1, *(kind[side] for kind in kinds)])[:-1] for side in (0, 1)]
        alone = [index for index, kind in enumerate(kinds) if kind == (1, 1)]
        words = torch.randint(257, largest + 1, (len(alone),))
        student.ids[torch.from_numpy(starts[0][alone])] = words
        teacher.ids[torch.from_numpy(starts[1][alone])] = words
        return cls(student, teacher, len(kinds))

    def zero_grad(self) -> None:
        """Before each run."""
        self.student.hidden.grad = self.student.weight.grad = None


# --- the two sides ----------------------------------------------------------------------------------------------------


def _ours(data: Data) -> Callable[[], None]:
    setup = ObjectiveSetup(
        student_hidden_size=data.student.hidden.shape[1],
        student_embedding=nn.Identity(),
        student_tokenizer=data.student.tokenizer,
        student_head=data.student.forward().head,
        teacher_tokenizer=data.teacher.tokenizer,
        teacher_head=data.teacher.forward().head,
    )
    objective = Gold(Config(kd_weight=0.5), setup)

    def run() -> None:
        data.zero_grad()
        # Alignment counts: TRL does it in its loss, too.
        student_chunks, teacher_chunks = chunk_ids(data.student.spans[:-1], data.teacher.spans[:-1])
        batch: Any = {  # what the objective reads of a batch
            "chunk_ids": torch.from_numpy(np.append(student_chunks, data.num_chunks))[None],
            "teacher_chunk_ids": torch.from_numpy(np.append(teacher_chunks, data.num_chunks))[None],
        }
        (term,) = objective(ForwardPair(data.student.forward(), data.teacher.forward()), batch).values()
        (term.sum / term.count).backward()

    return run


def _theirs(data: Data) -> Callable[[], None] | None:
    """TRL's loss as its trainer calls it, or None when it is not installed."""
    if not TRL.is_dir():
        return None
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    sys.path.append(str(TRL))
    from trl.experimental.gold.gold_trainer import ULDLoss

    settings = SimpleNamespace(  # its config class is a whole set of training arguments
        uld_crossentropy_weight=0.5,
        uld_distillation_weight=0.5,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=True,
        uld_skip_teacher_eos=True,
        use_extended_uld=True,
        uld_token_merge_strategy="bayesian",
        uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None,
        beta=0.5,
    )
    loss = ULDLoss(settings, data.student.tokenizer, data.teacher.tokenizer, device="cpu")

    def run() -> None:
        data.zero_grad()
        student, teacher = data.student, data.teacher
        with torch.no_grad():
            teacher_logits = teacher.logits
        total = loss(
            student.logits,
            teacher_logits,
            student.labels,
            teacher.labels,
            student.ids[None],
            teacher.ids[None],
            student_byte_offsets=student.byte_offsets,
            teacher_byte_offsets=teacher.byte_offsets,
        )
        total.backward()

    return run


def _products(data: Data) -> Callable[[], None]:
    """The products with the heads alone, forward and backward."""

    def run() -> None:
        with torch.no_grad():
            logits = data.student.hidden @ data.student.weight.t()
            del_hidden, del_weight = logits @ data.student.weight, logits.t() @ data.student.hidden
            assert del_hidden.shape[1] == del_weight.shape[1]
            data.teacher.hidden @ data.teacher.weight.t()

    return run


def _measure(data: Data, arguments: argparse.Namespace) -> Row:
    theirs = _theirs(data)
    runs = {"ours": _ours(data), "products": _products(data)} | ({} if theirs is None else {"TRL": theirs})
    timings = interleaved(runs, repeats=arguments.repeats, warmup=True)
    seconds = {name: timing.median for name, timing in timings.items()}
    extra = {}
    for name in ("ours", "TRL"):
        data.zero_grad()
        extra[name] = megabytes(extra_peak_bytes(runs[name])) if name in runs else None
    return {
        "chunks": data.num_chunks,
        "student tokens": len(data.student.hidden),
        "teacher tokens": len(data.teacher.hidden),
        "width": data.student.hidden.shape[1],
        "heads' products s": seconds["products"],
        "ours s": seconds["ours"],
        "TRL s": seconds.get("TRL"),
        "TRL / ours": seconds["TRL"] / seconds["ours"] if theirs is not None else None,
        "ours extra MB": extra["ours"],
        "TRL extra MB": extra["TRL"],
    }


if __name__ == "__main__":
    main()
