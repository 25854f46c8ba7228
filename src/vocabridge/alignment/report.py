"""How well two tokenizers fit together on given text: what to know before distilling one model into the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vocabridge.alignment import check_tokenizer_file, shared_vocabulary, token_bytes
from vocabridge.errors import UserError
from vocabridge.pairs import NO_CHUNK, PairStats, PairTokenizer, TokenizedPair, TokenizedSide, tokenize_examples
from vocabridge.text import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vocabridge.prompts import PromptRenderer

LOW_COVERAGE = 0.95
LOW_ONE_TO_ONE_SHARE = 0.5
LOW_SHARED_SHARE = 0.1
HIGH_TRUNCATED_SHARE = 0.05


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ControlToken(_Model):
    """A token with a role."""

    id: int
    token: str


class SideReport(_Model):
    """One side. Shares are fractions; end tokens, which pair by role, are not counted among the response's tokens."""

    name: str
    template: str
    vocabulary_size: int
    """Ids of the tokenizer, control tokens included."""
    shared_share: float
    """Share of these ids whose bytes are also one token of the other side."""
    tokens: int
    """Response tokens."""
    tokens_per_byte: float
    one_to_one_share: float
    """Share of response tokens that cover the same bytes as exactly one token of the other side."""
    coverage: float
    """Share of response tokens that are in a chunk."""
    tokens_per_chunk: float
    byte_coverage: float
    """Share of the response's bytes that some token stands for; below 1 where the tokenizer drops text."""
    roles: dict[str, ControlToken | None]
    """``end`` is what ends a response; ``bos``, ``eos``, ``pad`` and ``unk`` are as the tokenizer declares them."""


class PairReport(_Model):
    """What ``vocabridge inspect-pair`` prints and writes."""

    student: SideReport
    teacher: SideReport
    shared_tokens: int
    """Pairs of ids, one of each side, with identical bytes."""
    rows: PairStats
    max_length: int
    response_bytes: int
    """Bytes of all responses, as far as they are kept."""
    chunks: int
    chunk_sizes: dict[str, int]
    """Number of chunks by ``student tokens:teacher tokens``, most frequent first."""
    warnings: list[str]

    def to_json(self) -> str:
        """The report as indented JSON."""
        return self.model_dump_json(indent=2)


def pair_report(pair_tokenizer: PairTokenizer, examples: Iterable[Example], *, progress: bool = False) -> PairReport:
    """Tokenize examples on both sides and describe the fit.

    Args:
        pair_tokenizer: both tokenizers with their templates and the length limit.
        examples: the text to compare on.
        progress: show a progress bar.

    Raises:
        UserError: there is no teacher, no row is left, or a tokenizer cannot spell the text.
    """
    student, teacher = pair_tokenizer.student, pair_tokenizer.teacher
    if teacher is None:
        raise UserError("A pair report compares two tokenizers; the PairTokenizer given has no teacher.")
    pairs = tokenize_examples(examples, pair_tokenizer, progress=progress)
    vocabulary = shared_vocabulary(student.tokenizer, teacher.tokenizer)
    sizes = Counter(size for pair in pairs for size in _chunk_sizes(pair))
    counts = [_count_sides(pairs, "student"), _count_sides(pairs, "teacher")]
    num_bytes = sum(_kept_bytes(pair) for pair in pairs)
    report = PairReport(
        student=_side_report(student, vocabulary.student_ids, counts[0], sizes, num_bytes, axis=0),
        teacher=_side_report(teacher, vocabulary.teacher_ids, counts[1], sizes, num_bytes, axis=1),
        shared_tokens=len(vocabulary.student_ids),
        rows=pairs.stats,
        max_length=pair_tokenizer.max_length,
        response_bytes=num_bytes,
        chunks=sizes.total(),
        chunk_sizes={f"{size[0]}:{size[1]}": count for size, count in sizes.most_common()},
        warnings=[],
    )
    warnings = [
        *_row_warnings(report),
        *_side_warnings("student", report.student, student),
        *_side_warnings("teacher", report.teacher, teacher),
    ]
    return report.model_copy(update={"warnings": warnings})


def render_report(report: PairReport) -> RenderableType:
    """The report as tables for a terminal; print it with a ``rich`` console."""
    rows = report.rows
    summary = Text.assemble(
        f"{rows.kept} of {rows.rows} rows, {report.response_bytes:,} bytes of responses; ",
        f"{rows.truncated} cut to {report.max_length} tokens, {rows.dropped_empty} without a response and ",
        f"{rows.dropped_long} with too long a prompt dropped; {report.shared_tokens:,} tokens shared",
    )
    warnings = [Text(f"Warning: {warning}", style="yellow") for warning in report.warnings]
    return Group(_sides_table(report), _chunks_table(report), summary, *warnings)


# --- counting --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Counts:
    """Sums over one side of all pairs, without end tokens."""

    tokens: int = 0
    in_chunk: int = 0
    covered_bytes: int = 0


def _response(side: TokenizedSide, *, truncated: bool) -> slice:
    """The supervised positions without the end token, which only a truncated row lacks."""
    return slice(len(side.spans) if truncated else len(side.spans) - 1)


def _count_sides(pairs: Sequence[TokenizedPair], name: Literal["student", "teacher"]) -> _Counts:
    counts = _Counts()
    for pair in pairs:
        side: TokenizedSide = getattr(pair, name)
        response = _response(side, truncated=pair.truncated)
        counts.tokens += len(side.spans[response])
        counts.in_chunk += int((side.chunk_ids[response] != NO_CHUNK).sum())
        counts.covered_bytes += _covered_bytes(side.spans[response])
    return counts


def _chunk_sizes(pair: TokenizedPair) -> Iterator[tuple[int, int]]:
    """(student tokens, teacher tokens) of every chunk but the end tokens'."""
    assert pair.teacher is not None
    sizes = []
    for side in (pair.student, pair.teacher):
        chunks = side.chunk_ids[_response(side, truncated=pair.truncated)]
        sizes.append(np.bincount(chunks[chunks != NO_CHUNK]).tolist())
    return zip(*sizes, strict=True)


def _kept_bytes(pair: TokenizedPair) -> int:
    """Bytes of the response up to where the pair ends."""
    assert pair.teacher is not None
    return max(int(side.spans[:, 1].max()) for side in (pair.student, pair.teacher))


def _covered_bytes(spans: np.ndarray) -> int:
    """Bytes in the union of spans [R, 2] that are sorted by start."""
    reached = np.maximum.accumulate(np.concatenate([[0], spans[:, 1]]))[:-1]
    return int(np.maximum(spans[:, 1] - np.maximum(spans[:, 0], reached), 0).sum())


def _side_report(
    renderer: PromptRenderer,
    shared_ids: np.ndarray,
    counts: _Counts,
    sizes: Counter[tuple[int, int]],
    num_bytes: int,
    *,
    axis: int,
) -> SideReport:
    tokenizer = renderer.tokenizer
    return SideReport(
        name=tokenizer.name_or_path or type(tokenizer).__name__,
        template=renderer.template,
        vocabulary_size=len(token_bytes(tokenizer)),
        shared_share=len(np.unique(shared_ids)) / len(token_bytes(tokenizer)),
        tokens=counts.tokens,
        tokens_per_byte=counts.tokens / num_bytes,
        one_to_one_share=sizes[1, 1] / counts.tokens,
        coverage=counts.in_chunk / counts.tokens,
        tokens_per_chunk=sum(size[axis] * count for size, count in sizes.items()) / max(sizes.total(), 1),
        byte_coverage=counts.covered_bytes / num_bytes,
        roles={
            "end": _control_token(tokenizer, renderer.end_token_id),
            "bos": _control_token(tokenizer, tokenizer.bos_token_id),
            "eos": _control_token(tokenizer, tokenizer.eos_token_id),
            "pad": _control_token(tokenizer, tokenizer.pad_token_id),
            "unk": _control_token(tokenizer, tokenizer.unk_token_id),
        },
    )


def _control_token(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> ControlToken | None:
    if token_id is None:
        return None
    return ControlToken(id=token_id, token=cast(str, tokenizer.convert_ids_to_tokens(token_id)))


# --- warnings --------------------------------------------------------------------------------------------------------


def _row_warnings(report: PairReport) -> Iterator[str]:
    rows = report.rows
    if rows.truncated > HIGH_TRUNCATED_SHARE * rows.kept:
        yield f"{rows.truncated} of {rows.kept} rows are cut at max_length={report.max_length} and have no end token."
    if rows.dropped_long:
        yield f"{rows.dropped_long} rows are dropped: their prompt fills max_length={report.max_length}."
    if rows.dropped_empty:
        yield f"{rows.dropped_empty} rows are dropped: they have no response."
    if rows.control_spellings:
        yield (
            f"{rows.control_spellings} plain prompts spell a control token, which is read as text; if they were "
            "rendered with a chat template, give 'messages' and use template 'chat' instead."
        )
    if rows.trailing_spaces:
        yield f"{rows.trailing_spaces} plain prompts end in a space, which most models expect to begin the response."


def _side_warnings(name: str, side: SideReport, renderer: PromptRenderer) -> Iterator[str]:
    if side.coverage < LOW_COVERAGE:
        yield f"Only {side.coverage:.1%} of the {name}'s tokens are in a chunk; chunk-based objectives skip the others."
    if side.one_to_one_share < LOW_ONE_TO_ONE_SHARE:
        yield f"Only {side.one_to_one_share:.1%} of the {name}'s tokens match one token of the other side."
    if side.shared_share < LOW_SHARED_SHARE:
        yield f"Only {side.shared_share:.1%} of the {name}'s vocabulary has an identical token on the other side."
    if side.byte_coverage < 1:
        yield f"The {name}'s tokens leave out {1 - side.byte_coverage:.1%} of the text's bytes (white space, unknown)."
    if side.roles["pad"] is None:
        yield f"The {name}'s tokenizer has no pad token; its EOS token fills short rows (masked, so no number changes)."
    if side.template == "plain" and renderer.tokenizer.chat_template:
        yield f"The {name} has a chat template but is given plain prompts; template 'chat' is what it was tuned for."
    yield from check_tokenizer_file(renderer.tokenizer)


# --- tables ----------------------------------------------------------------------------------------------------------


def _sides_table(report: PairReport) -> Table:
    table = Table("", "student", "teacher", title="Tokenizer pair", title_justify="left")
    sides = (report.student, report.teacher)
    formats = {
        "name": "{}",
        "template": "{}",
        "vocabulary_size": "{:,}",
        "shared_share": "{:.1%}",
        "tokens": "{:,}",
        "tokens_per_byte": "{:.3f}",
        "one_to_one_share": "{:.1%}",
        "coverage": "{:.1%}",
        "tokens_per_chunk": "{:.3f}",
        "byte_coverage": "{:.1%}",
    }
    for field, pattern in formats.items():
        table.add_row(
            field.replace("_", " ").replace("one to one", "1:1"),
            *(Text(pattern.format(getattr(side, field))) for side in sides),
        )
    for role in report.student.roles:
        tokens = (side.roles[role] for side in sides)
        # Text, because a token such as "[PAD]" would be read as rich's markup.
        table.add_row(f"{role} token", *(Text(f"{t.token} ({t.id})" if t else "-") for t in tokens))
    return table


def _chunks_table(report: PairReport, *, most: int = 8) -> Table:
    table = Table("student:teacher tokens", "chunks", "share", title="Chunks", title_justify="left")
    shown = list(report.chunk_sizes.items())[:most]
    rest = report.chunks - sum(count for _, count in shown)
    for size, count in [*shown, *([("other", rest)] if rest else [])]:
        table.add_row(size, f"{count:,}", f"{count / report.chunks:.1%}")
    return table
