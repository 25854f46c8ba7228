"""Examples under both tokenizers: ids, labels, byte spans and chunks of the same response, and batches of them.

Prompt and response are encoded separately on purpose: a model that generates sees the prompt's ids end where they end,
so no token may straddle the border. The response is encoded as the continuation that it is (no synthetic space), each
side ends in its own end token, and the two end tokens form the last chunk by role. A row that is too long is cut on
both sides at the same byte, the last chunk boundary that fits on both, and gets no end token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, cast, overload

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from vocabridge.alignment import chunk_ids, encode_continuation, token_bytes
from vocabridge.alignment.family import tokenizer_name
from vocabridge.errors import UserError
from vocabridge.prompts import PromptRenderer, Template, spelled_control_token
from vocabridge.text import Example, ExampleSource, iter_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""

NO_CHUNK = -1
"""Chunk index of a supervised position that is in no chunk, and of padding."""


@dataclass(frozen=True, slots=True)
class TokenizedSide:
    """One example under one tokenizer; R supervised positions, those whose label is not -100.

    Attributes:
        input_ids: prompt, response and, unless truncated, the end token.
        labels: as long as ``input_ids``: -100 on the prompt, the token id on the rest; not shifted.
        spans: [R, 2] int64, half-open byte ranges of the UTF-8 response; the end token's is (n, n).
        chunk_ids: [R] int64, chunk of each position, consecutive from 0; -1 in no chunk or without a teacher.
    """

    input_ids: list[int]
    labels: list[int]
    spans: np.ndarray
    chunk_ids: np.ndarray


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One example under both tokenizers; ``teacher`` is None when only a student is trained."""

    student: TokenizedSide
    teacher: TokenizedSide | None
    truncated: bool


class PairBatch(TypedDict):
    """Plain int64 tensors of B rows; L is a side's longest row, R its most supervised positions in a row.

    Ids, masks and labels are padded on the collator's side. Spans and chunk ids follow the supervised positions in
    order and are always padded at the end, with -1. The teacher's tensors are absent without a teacher.
    """

    input_ids: torch.Tensor  # [B, L_s]
    attention_mask: torch.Tensor  # [B, L_s]
    labels: torch.Tensor  # [B, L_s]
    spans: torch.Tensor  # [B, R_s, 2]
    chunk_ids: torch.Tensor  # [B, R_s]
    teacher_input_ids: NotRequired[torch.Tensor]  # [B, L_t]
    teacher_attention_mask: NotRequired[torch.Tensor]  # [B, L_t]
    teacher_labels: NotRequired[torch.Tensor]  # [B, L_t]
    teacher_spans: NotRequired[torch.Tensor]  # [B, R_t, 2]
    teacher_chunk_ids: NotRequired[torch.Tensor]  # [B, R_t]


# --- one example -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One side of an example before truncation."""

    prompt_ids: list[int]
    response_ids: list[int]
    spans: np.ndarray
    end_token_id: int


class PairTokenizer:
    """Turns an example into a ``TokenizedPair``.

    Attributes:
        student: renders the student's prompts and names its end token.
        teacher: the same for the teacher, or None.
        max_length: most tokens of a row on either side, prompt and end token included.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        student_template: Template = "plain",
        teacher_template: Template = "plain",
        max_length: int = 512,
    ) -> None:
        """Read the roles off both tokenizers.

        Raises:
            UserError: a side has no end token or lacks the chat template asked for, or ``max_length`` is below 2.
        """
        if max_length < 2:
            raise UserError(f"max_length must be at least 2 (a prompt token and a response token), not {max_length}.")
        self.max_length = max_length
        self.student = PromptRenderer(student_tokenizer, student_template)
        self.teacher = PromptRenderer(teacher_tokenizer, teacher_template) if teacher_tokenizer is not None else None
        # Counted once: it takes a fraction of a millisecond for a large vocabulary. It also fills the cache of token
        # bytes before any DataLoader worker is forked.
        self._num_ids = [len(token_bytes(side.tokenizer)) for side in (self.student, self.teacher) if side]

    def __call__(self, example: Example) -> TokenizedPair | None:
        """Tokenize one example; None when no response is left.

        Raises:
            UserError: a tokenizer's pieces do not spell the text, or a prompt cannot be rendered.
        """
        outcome = self.tokenize(example)
        return outcome if isinstance(outcome, TokenizedPair) else None

    def tokenize(self, example: Example) -> TokenizedPair | Literal["empty", "long"]:
        """As a call, but says why nothing is left: the response is ``empty``, or the prompt is too ``long``."""
        if not example.response.strip():
            return "empty"
        sides = [_encode(self.student, example, num_ids=self._num_ids[0])]
        if self.teacher is None:
            chunks = [np.full(len(sides[0].response_ids), NO_CHUNK, dtype=np.int64)]
        else:
            sides.append(_encode(self.teacher, example, num_ids=self._num_ids[1]))
            chunks = list(chunk_ids(sides[0].spans, sides[1].spans))
        if not all(side.response_ids for side in sides):
            return "empty"  # no token of this tokenizer stands for any of the text
        room = [self.max_length - len(side.prompt_ids) for side in sides]
        lengths = [len(side.response_ids) for side in sides]
        truncated = any(length + 1 > limit for length, limit in zip(lengths, room, strict=True))
        counts = _last_common_cut(chunks, room) if truncated else lengths
        if min(counts) < 1:
            return "long"
        num_bytes = len(example.response.encode("utf-8"))
        _check_same_cut(sides, counts, num_bytes)
        end = None if truncated else _End(num_bytes, int(chunks[0].max()) + 1 if self.teacher else NO_CHUNK)
        finished = [
            _finish(side, side_chunks[:count], end)
            for side, side_chunks, count in zip(sides, chunks, counts, strict=True)
        ]
        return TokenizedPair(finished[0], finished[1] if self.teacher else None, truncated)


def _encode(renderer: PromptRenderer, example: Example, *, num_ids: int) -> _Encoded:
    prompt_ids = renderer(example)
    response = encode_continuation(renderer.tokenizer, renderer.response_lead + example.response)
    # Spans count from the response, so the template's own space in front of it has no bytes.
    spans = np.maximum(response.spans - len(renderer.response_lead), 0)
    largest_id = max(*prompt_ids, *response.ids, renderer.end_token_id)
    if largest_id >= num_ids:
        raise UserError(
            f"{example.source}: {tokenizer_name(renderer.tokenizer)} gives the id {largest_id}, beyond its vocabulary "
            f"of {num_ids} ids; its special tokens are set up wrongly."
        )
    return _Encoded(prompt_ids, response.ids, spans, renderer.end_token_id)


def _last_common_cut(chunks: Sequence[np.ndarray], room: Sequence[int]) -> list[int]:
    """How many response tokens of each side to keep so that all sides fit and end with the same chunk.

    Args:
        chunks: chunk index per response token of each side; a single side without chunks is cut at its last token.
        room: tokens left for the response on each side; may be negative.
    """
    if len(chunks) == 1:
        return [max(0, min(room[0], len(chunks[0])))]
    num_chunks = max(side.max(initial=NO_CHUNK) for side in chunks) + 1
    ends = np.array([_chunk_ends(side, num_chunks) for side in chunks])  # [sides, num_chunks]
    fits = (ends <= np.array(room)[:, None]).all(axis=0)
    last = int(fits.sum()) - 1  # ends grow, so the chunks that fit come first
    return [int(side_ends[last]) if last >= 0 else 0 for side_ends in ends]


def _chunk_ends(chunks: np.ndarray, num_chunks: int) -> np.ndarray:
    """[num_chunks]: tokens up to and including the last one of each chunk."""
    (positions,) = np.nonzero(chunks != NO_CHUNK)
    return positions[np.searchsorted(chunks[positions], np.arange(num_chunks), side="right") - 1] + 1


def _check_same_cut(sides: Sequence[_Encoded], counts: Sequence[int], num_bytes: int) -> None:
    """Assert that one byte position ends what every side keeps and starts what every side leaves."""
    kept_to = max(int(side.spans[:count, 1].max()) for side, count in zip(sides, counts, strict=True))
    left_from = min(
        int(side.spans[count:, 0].min(initial=num_bytes)) for side, count in zip(sides, counts, strict=True)
    )
    assert kept_to <= left_from, f"the sides are cut at different bytes: one keeps {kept_to}, one leaves {left_from}"


@dataclass(frozen=True, slots=True)
class _End:
    """Where the end token stands: behind the last byte, in the chunk after the last."""

    num_bytes: int
    chunk_id: int


def _finish(side: _Encoded, chunks: np.ndarray, end: _End | None) -> TokenizedSide:
    """Keep the response tokens that have a chunk entry and put the end token behind, unless ``end`` is None."""
    ids, spans = side.response_ids[: len(chunks)], side.spans[: len(chunks)]
    if end is not None:
        ids = [*ids, side.end_token_id]
        spans = np.concatenate([spans, [[end.num_bytes, end.num_bytes]]])
        chunks = np.append(chunks, end.chunk_id)
    return TokenizedSide(
        input_ids=side.prompt_ids + ids,
        labels=[IGNORE_INDEX] * len(side.prompt_ids) + ids,
        spans=spans.astype(np.int64),
        chunk_ids=chunks.astype(np.int64),
    )


# --- many examples ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class PairStats:
    """What became of the rows.

    Attributes:
        rows: examples seen.
        kept: pairs made of them.
        truncated: kept, but cut to fit ``max_length``.
        dropped_empty: without a response, or with white space only.
        dropped_long: whose prompt leaves no room for a response.
        control_spellings: whose plain prompt spells a control token, which is read as text.
        trailing_spaces: whose plain prompt ends in a space, which most tokenizers would join to the response.
        first_dropped: where the first row without a pair stands.
    """

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped_empty: int = 0
    dropped_long: int = 0
    control_spellings: int = 0
    trailing_spaces: int = 0
    first_dropped: str = field(default="", compare=False)

    @property
    def counts(self) -> tuple[int, ...]:
        """All numbers in their order."""
        return astuple(self)[:-1]

    def summary(self) -> str:
        """One line for the log."""
        line = f"{self.kept} of {self.rows} rows kept"
        counts = {
            "truncated": self.truncated,
            "without a response dropped": self.dropped_empty,
            "whose prompt fills max_length dropped": self.dropped_long,
            "with a control token spelled out in a plain prompt (read as text)": self.control_spellings,
            "whose plain prompt ends in a space": self.trailing_spaces,
        }
        return "; ".join([line, *(f"{count} {what}" for what, count in counts.items() if count)])


class PairDataset(Sequence[TokenizedPair]):
    """Tokenized pairs in memory, with ``stats`` about the rows they came from."""

    def __init__(self, pairs: Sequence[TokenizedPair], stats: PairStats) -> None:
        """Hold the pairs."""
        self._pairs = list(pairs)
        self.stats = stats

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        """One pair, or a list of pairs for a slice."""
        return self._pairs[index]


def tokenize_examples(
    examples: Iterable[Example], pair_tokenizer: PairTokenizer, *, progress: bool = False
) -> PairDataset:
    """Tokenize examples into memory; logs how many rows were cut or dropped.

    Args:
        examples: the rows.
        pair_tokenizer: both tokenizers and the length limit.
        progress: show a progress bar.

    Raises:
        UserError: there is no example, or none has a response left.
    """
    stats = PairStats()
    if progress:
        from rich.progress import track

        examples = track(examples, description="Tokenizing")
    pairs = list(_tokenized(examples, pair_tokenizer, stats))
    log_stats(stats, pair_tokenizer.max_length)
    return PairDataset(pairs, stats)


class StreamingPairs(IterableDataset[TokenizedPair]):
    """Pairs of a source that is read anew in every epoch, one row in memory; for files larger than memory.

    Rows come in the order of the file. DataLoader workers share the rows out among themselves.

    Attributes:
        stats: of the last pass in this process, complete when the pass is.
    """

    def __init__(
        self,
        source: ExampleSource,
        pair_tokenizer: PairTokenizer,
        *,
        split: str | None = None,
        limit: int | None = None,
    ) -> None:
        """Keep the source; nothing is read before the first pass.

        Args:
            source: see ``vocabridge.text.ExampleSource``; must be one that can be read more than once.
            pair_tokenizer: both tokenizers and the length limit.
            split: of a dataset with several splits.
            limit: rows of a pass at most.
        """
        self.source = source
        self.pair_tokenizer = pair_tokenizer
        self.split = split
        self.limit = limit
        self.stats = PairStats()

    def __iter__(self) -> Iterator[TokenizedPair]:
        """Start a pass over the rows.

        Raises:
            UserError: a row is broken, or the pass ends without any pair.
        """
        self.stats = PairStats()
        examples: Iterable[Example] = islice(iter_examples(self.source, split=self.split), self.limit)
        worker = get_worker_info()
        if worker is not None:
            examples = islice(examples, worker.id, None, worker.num_workers)
        yield from _tokenized(examples, self.pair_tokenizer, self.stats)
        if worker is None or self.stats.rows:  # with few rows, a worker may have none
            log_stats(self.stats, self.pair_tokenizer.max_length)


def _tokenized(examples: Iterable[Example], pair_tokenizer: PairTokenizer, stats: PairStats) -> Iterator[TokenizedPair]:
    plain_sides = [
        side for side in (pair_tokenizer.student, pair_tokenizer.teacher) if side and side.template == "plain"
    ]
    for example in examples:
        outcome = pair_tokenizer.tokenize(example)
        stats.rows += 1
        stats.control_spellings += any(spelled_control_token(side.tokenizer, example.prompt) for side in plain_sides)
        stats.trailing_spaces += bool(plain_sides) and example.prompt.endswith((" ", "\t"))
        if isinstance(outcome, TokenizedPair):
            stats.kept += 1
            stats.truncated += outcome.truncated
            yield outcome
        else:
            stats.first_dropped = stats.first_dropped or example.source
            stats.dropped_empty += outcome == "empty"
            stats.dropped_long += outcome == "long"


def log_stats(stats: PairStats, max_length: int) -> None:
    """Log what became of the rows.

    Raises:
        UserError: nothing is left to train on.
    """
    if not stats.kept:
        raise UserError(
            f"No row is left: of {stats.rows} rows, {stats.dropped_empty} have no response and {stats.dropped_long} "
            f"have a prompt that leaves no room within max_length={max_length} tokens (the first is "
            f"{stats.first_dropped}); give rows with responses, or raise data.max_length."
        )
    level = logging.INFO if stats.kept == stats.rows and not stats.truncated else logging.WARNING
    logger.log(level, "%s (max_length %d)", stats.summary(), max_length)


# --- batches ---------------------------------------------------------------------------------------------------------


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows: the pad token, or the EOS token for a tokenizer without one (GPT-2).

    Either is masked out of attention and labels, so the choice changes no number.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise UserError(f"{tokenizer_name(tokenizer)} has neither a pad nor an EOS token; set one.")


class PairCollator:
    """Stacks pairs into a ``PairBatch``, padded to the longest row of the batch."""

    def __init__(
        self,
        student_pad_id: int,
        teacher_pad_id: int | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> None:
        """Set the padding.

        Args:
            student_pad_id: see ``pad_token_id``.
            teacher_pad_id: needed when the pairs have a teacher's side.
            pad_to_multiple_of: round the length of the ids, masks and labels up to a multiple of this.
            padding_side: of the ids, masks and labels.
        """
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise UserError(f"pad_to_multiple_of must be at least 1, not {pad_to_multiple_of}.")
        if padding_side not in ("left", "right"):
            raise UserError(f"padding_side must be 'left' or 'right', not {padding_side!r}.")
        self.student_pad_id = student_pad_id
        self.teacher_pad_id = teacher_pad_id
        self.pad_to_multiple_of = pad_to_multiple_of or 1
        self.padding_side = padding_side

    def __call__(self, pairs: Sequence[TokenizedPair]) -> PairBatch:
        """Collate B pairs; all of them have a teacher's side, or none has."""
        batch = self._side([pair.student for pair in pairs], self.student_pad_id)
        teachers = [pair.teacher for pair in pairs if pair.teacher is not None]
        if not teachers:
            return batch
        assert len(teachers) == len(pairs), "some pairs of the batch have a teacher's side and some have none"
        if self.teacher_pad_id is None:
            raise UserError("The pairs have a teacher's side, so PairCollator needs teacher_pad_id.")
        teacher = self._side(teachers, self.teacher_pad_id)
        return cast(PairBatch, batch | {f"teacher_{name}": tensor for name, tensor in teacher.items()})

    def _side(self, sides: Sequence[TokenizedSide], pad_id: int) -> PairBatch:
        longest = max(len(side.input_ids) for side in sides)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        most_supervised = max(len(side.spans) for side in sides)
        input_ids = np.full((len(sides), width), pad_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        spans = np.full((len(sides), most_supervised, 2), NO_CHUNK, dtype=np.int64)
        chunks = np.full((len(sides), most_supervised), NO_CHUNK, dtype=np.int64)
        for row, side in enumerate(sides):
            length = len(side.input_ids)
            columns = slice(length) if self.padding_side == "right" else slice(width - length, width)
            input_ids[row, columns] = side.input_ids
            attention_mask[row, columns] = 1
            labels[row, columns] = side.labels
            spans[row, : len(side.spans)] = side.spans
            chunks[row, : len(side.chunk_ids)] = side.chunk_ids
        return PairBatch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention_mask),
            labels=torch.from_numpy(labels),
            spans=torch.from_numpy(spans),
            chunk_ids=torch.from_numpy(chunks),
        )
