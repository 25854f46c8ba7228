"""How time and peak memory of the vocabulary heads grow with tokens, vocabulary, chunk size and padding.

    python benchmarks/growth.py

No pretrained model: random hidden states and heads, and the losses of DSKD's two output spaces, which read either head
twice. Forward and backward in float32. Extra memory is how far the process grows beyond heads, hidden states and their
gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from harness import Bar, Row, extra_peak_bytes, interleaved, megabytes, parse, parser, report
from vocabridge.losses.chunked_head import DEFAULT_CHUNK_BYTES, HeadInput, chunked_head_loss
from vocabridge.objectives._dual_space import DualSpaceLosses
from vocabridge.objectives.dskd_cma import Config

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is swept, and where the rest stands meanwhile."""

    tokens: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    vocabularies: tuple[int, ...] = (8_192, 16_384, 32_768, 65_536, 131_072, 262_144)
    chunk_mib: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    paddings: tuple[int, ...] = (1, 64, 128, 256, 512)
    num_tokens: int = 512
    vocabulary: int = 32_768
    large_vocabulary: int = 131_072
    hidden: int = 512


SMOKE = Sizes((16, 32), (64, 128), (1, 2), (1, 64), num_tokens=32, vocabulary=64, large_vocabulary=128, hidden=16)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the four sweeps."""
    arguments = parse(parser("growth", __doc__), argv)
    sizes = SMOKE if arguments.smoke else Sizes()
    torch.manual_seed(0)
    tokens = _sweep("supervised tokens", {n: Heads.random(n, sizes.vocabulary, sizes.hidden) for n in sizes.tokens})
    vocabularies = _sweep(
        "vocabulary", {v: Heads.random(sizes.num_tokens, v, sizes.hidden) for v in sizes.vocabularies}
    )
    heads = Heads.random(sizes.num_tokens, sizes.large_vocabulary, sizes.hidden)
    chunks = {mib: heads.with_chunks(mib * MIB) for mib in sizes.chunk_mib}
    tables = {
        "supervised tokens": tokens(arguments),
        "vocabulary": vocabularies(arguments),
        "chunk size": _sweep("chunk_bytes MiB", chunks)(arguments),
        "padding": _padding(arguments, sizes),
    }
    report(arguments, tables, settings=_settings(sizes), bars=[] if arguments.smoke else _bars(tables))


def _settings(sizes: Sizes) -> Row:
    return {
        "tokens": sizes.num_tokens,
        "vocabulary": sizes.vocabulary,
        "vocabulary where chunks are swept": sizes.large_vocabulary,
        "hidden size": sizes.hidden,
        "chunk_bytes MiB": DEFAULT_CHUNK_BYTES // MIB,
    }


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Both models' packed rows, their projections into the other space, and both heads."""

    student: HeadInput
    teacher: HeadInput
    projected_teacher: HeadInput
    projected_student: HeadInput
    student_labels: Tensor
    teacher_labels: Tensor
    chunk_bytes: int = DEFAULT_CHUNK_BYTES

    @classmethod
    def random(cls, num_tokens: int, vocabulary: int, hidden: int) -> Heads:
        """As many tokens on either side, and the same vocabulary and width."""
        student_weight = torch.randn(vocabulary, hidden).mul_(0.05).requires_grad_()
        teacher_weight = torch.randn(vocabulary, hidden).mul_(0.05)
        states = [torch.randn(num_tokens, hidden) for _ in range(4)]
        return cls(
            HeadInput(states[0].requires_grad_(), student_weight),
            HeadInput(states[1], teacher_weight),
            HeadInput(states[2].requires_grad_(), student_weight, train_head=False),
            HeadInput(states[3].requires_grad_(), teacher_weight),
            *torch.randint(vocabulary, (2, num_tokens)),
        )

    def with_chunks(self, chunk_bytes: int) -> Heads:
        """The same tensors under another budget."""
        sides = self.student, self.teacher, self.projected_teacher, self.projected_student
        return Heads(*sides, self.student_labels, self.teacher_labels, chunk_bytes)

    @property
    def trained(self) -> list[Tensor]:
        """What gets a gradient."""
        inputs = self.student, self.projected_teacher, self.projected_student
        return [self.student.weight, *(item.hidden for item in inputs)]

    def __call__(self) -> None:
        """Both losses, forward and backward."""
        for tensor in self.trained:
            tensor.grad = None
        losses = DualSpaceLosses.of(Config())
        covered = torch.ones_like(self.student_labels, dtype=torch.bool)
        own = chunked_head_loss(
            losses.student_rows,
            [self.student, self.projected_teacher],
            [self.student_labels, covered],
            weights=[0.5, 0.5, 0.5],
            chunk_bytes=self.chunk_bytes,
        )
        other = chunked_head_loss(
            losses.teacher_rows,
            [self.projected_student, self.teacher],
            [self.teacher_labels, covered],
            weights=[0.5],
            chunk_bytes=self.chunk_bytes,
        )
        (own.total + other.total).backward()

    def extra_bytes(self) -> int | None:
        """Growth of the process in one call, without the gradients that it leaves."""
        for tensor in self.trained:
            tensor.grad = None
        grown = extra_peak_bytes(self)
        return None if grown is None else grown - sum(t.grad.nbytes for t in self.trained if t.grad is not None)


def _sweep(name: str, runs: dict[int, Heads]) -> Callable[[argparse.Namespace], list[Row]]:
    def measure(arguments: argparse.Namespace) -> list[Row]:
        timings = interleaved({str(size): run for size, run in runs.items()}, repeats=arguments.repeats)
        first = next(iter(runs))
        rows = []
        for size, run in runs.items():
            seconds = timings[str(size)].median
            growth = seconds / timings[str(first)].median
            extra = megabytes(run.extra_bytes())
            ratio = {} if name.startswith("chunk") else {f"{name} / first": size / first}
            rows.append({name: size, "seconds": seconds, **ratio, "seconds / first": growth, "extra MB": extra})
        return rows

    return measure


# --- padding ----------------------------------------------------------------------------------------------------------


def _padding(arguments: argparse.Namespace, sizes: Sizes) -> list[Row]:
    """Rows padded further and further: the trunk pays for what it reads, the heads read supervised positions only."""
    num_rows, prompt, response = 4, 32, 48
    if arguments.smoke:
        prompt, response = 4, 6
    trunk = LlamaModel(
        LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.hidden,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=1024,
        )
    )
    heads = Heads.random(num_rows * response, sizes.vocabulary, sizes.hidden)
    trunks = {p: _Trunk(trunk, num_rows, prompt, response, -(-(prompt + response) // p) * p) for p in sizes.paddings}
    losses = {p: _HeadsBehind(padded, heads) for p, padded in trunks.items()}
    names: dict[str, Callable[[], object]] = {f"trunk {padding}": run for padding, run in trunks.items()}
    timings = interleaved(names | {f"heads {p}": run for p, run in losses.items()}, repeats=arguments.repeats)
    first = timings[f"heads {sizes.paddings[0]}"].median
    return [
        {
            "pad_to_multiple_of": padding,
            "padded length": padded.width,
            "trunk seconds": timings[f"trunk {padding}"].median,
            "heads seconds": timings[f"heads {padding}"].median,
            "heads / unpadded": timings[f"heads {padding}"].median / first,
            "heads extra MB": megabytes(losses[padding].heads.extra_bytes()),
        }
        for padding, padded in trunks.items()
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _Trunk:
    """Reads padded rows and packs their supervised positions, as a training step does."""

    model: LlamaModel
    num_rows: int
    prompt: int
    response: int
    width: int

    @torch.no_grad()
    def __call__(self) -> Tensor:
        length = self.prompt + self.response
        attention_mask = (torch.arange(self.width) < length).long().expand(self.num_rows, -1)
        input_ids = torch.arange(self.width).remainder(self.model.config.vocab_size).expand(self.num_rows, -1)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return hidden[:, self.prompt - 1 : length - 1].flatten(0, 1)


class _HeadsBehind:
    """The losses on what a trunk packed."""

    def __init__(self, trunk: _Trunk, heads: Heads) -> None:
        packed = trunk()
        assert packed.shape == heads.student.hidden.shape, "padding reached the heads"
        own = HeadInput(packed.requires_grad_(), heads.student.weight)
        sides = own, heads.teacher, heads.projected_teacher, heads.projected_student
        self.heads = Heads(*sides, heads.student_labels, heads.teacher_labels)

    def __call__(self) -> None:
        self.heads()


def _bars(tables: dict[str, list[Row]]) -> list[Bar]:
    tokens, vocabulary, padding = tables["supervised tokens"], tables["vocabulary"], tables["padding"]
    bars = [
        Bar(
            "heads: growth of time with tokens / growth of tokens",
            tokens[-1]["seconds / first"] / tokens[-1]["supervised tokens / first"],
            1.1,
        ),
        Bar("heads: time padded to 512 / unpadded", padding[-1]["heads / unpadded"], 1.05),
    ]
    if all(row["extra MB"] is not None for row in vocabulary):
        name = "heads: extra memory / chunk_bytes, largest over 8k to 262k tokens"
        bars.append(Bar(name, max(row["extra MB"] for row in vocabulary) * 1e6 / DEFAULT_CHUNK_BYTES, 1.2))
        full = [row for row in vocabulary if row["vocabulary"] >= 65_536]  # smaller ones leave a chunk half empty
        name = "heads: extra memory at 262k tokens / at 65k"
        bars.append(Bar(name, full[-1]["extra MB"] / full[0]["extra MB"], 1.1))
    return bars


if __name__ == "__main__":
    main()
