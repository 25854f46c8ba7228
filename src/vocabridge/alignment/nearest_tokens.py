"""For every token of one vocabulary the nearest token of another: identical, else of least edit distance.

The vocabulary map of minimum edit distance alignment (FuseLLM, Wan et al. 2024, arXiv 2401.10491; MinED).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist, cpdist
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from vocabridge.alignment.prepared import PreparedTokenizer, prepare
from vocabridge.alignment.vocabulary import first_id_by_bytes
from vocabridge.alignment.vocabulary_cache import cached, fingerprint

ROLES = ("eos_token_id", "bos_token_id", "unk_token_id", "pad_token_id")
"""Roles of control tokens; a token of several roles takes the first that the other tokenizer has too."""

_BLOCK = 2**23
"""Distances computed at a time."""

_MAX_ID = 2**32 - 1

_LONG = 10**9
"""Pairs of tokens from which on a progress bar is shown; about ten seconds."""


def nearest_tokens(source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Map every source id to the target id that stands for the nearest text.

    A token with the same bytes on the other side is mapped to it, by the rules of `shared_vocabulary`. Any other goes
    to the token of least Levenshtein distance in characters (a space marker counts as a space, a byte that is no part
    of a character as a character of its own); among equally near ones the longest common prefix decides, then the
    lowest id. Control and unknown tokens map to the target's token of the same role.

    The result is kept on disk, because it takes up to a minute for 262,144 tokens against 49,152.

    Args:
        source_tokenizer: a fast tokenizer, or ByT5.
        target_tokenizer: the same.

    Returns:
        Target ids, int64 [V_source]; -1 for unused ids and for control tokens without a counterpart.

    Raises:
        UserError: A tokenizer is not covered.
    """
    source, target = (prepare(tokenizer, check_size=True) for tokenizer in (source_tokenizer, target_tokenizer))
    names = [fingerprint(source), fingerprint(target)]
    mapped: np.ndarray = cached("nearest-1-" + "-".join(names), lambda: {"ids": _map_text(source, target)})[
        "ids"
    ].copy()
    target_roles = _role_ids(target_tokenizer)
    for role, token_id in reversed(_role_ids(source_tokenizer).items()):  # the first role is written last
        if role in target_roles and source.table.text_bytes()[token_id] is None:
            mapped[token_id] = target_roles[role]
    return mapped


def inverse_nearest_tokens(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """For every student id the one teacher id, of those that `nearest_tokens` maps to it, that is nearest to it.

    Returns:
        Teacher ids, int64 [V_student]; -1 where no teacher token is mapped to the student's. Among equally near teacher
        tokens the one that `nearest_tokens` would choose in this direction is taken if it is among them, else the
        lowest id. Each teacher id occurs once at most.

    Raises:
        UserError: A tokenizer is not covered.
    """
    to_student = nearest_tokens(teacher_tokenizer, student_tokenizer)
    chosen = nearest_tokens(student_tokenizer, teacher_tokenizer)
    teacher_ids = np.flatnonzero(to_student >= 0)
    student_ids = to_student[teacher_ids]
    student, teacher = (token_texts(tokenizer) for tokenizer in (student_tokenizer, teacher_tokenizer))
    distances = cpdist(
        [student[i] or "" for i in student_ids],  # tokens mapped by their role: two empty texts
        [teacher[i] or "" for i in teacher_ids],
        scorer=Levenshtein.distance,
        dtype=np.int32,
    )
    # The last write wins, so the preferred ones come last.
    order = np.lexsort((-teacher_ids, chosen[student_ids] == teacher_ids, -distances))
    inverse = np.full(len(chosen), -1, dtype=np.int64)
    inverse[student_ids[order]] = teacher_ids[order]
    return inverse


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """The text of each id for edit distances; a byte that is no part of a character is a character of its own.

    None for control, unknown and unused ids.
    """
    return [None if piece is None else _text(piece) for piece in prepare(tokenizer, check_size=True).table.text_bytes()]


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "surrogateescape")


def _role_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = {role: getattr(tokenizer, role) for role in ROLES}
    return {role: token_id for role, token_id in ids.items() if token_id is not None}


def _map_text(source: PreparedTokenizer, target: PreparedTokenizer) -> np.ndarray:
    """The map over tokens with bytes; -1 for all others."""
    target_ids = first_id_by_bytes(target)
    pieces = source.table.text_bytes()
    unmapped = sorted({piece for piece in pieces if piece and piece not in target_ids})
    sources = _by_length(unmapped, np.arange(len(unmapped)))
    targets = _by_length(target_ids, np.fromiter(target_ids.values(), np.int64, len(target_ids)))
    nearest = np.full(len(unmapped), -1, dtype=np.int64)
    with _progress(sources, targets) as advance:
        for group in sources:
            nearest[group.ids] = _nearest(group, targets)
            advance(len(group.texts))
    all_ids = target_ids | dict(zip(unmapped, nearest.tolist(), strict=True))
    return np.array([all_ids.get(piece or b"", -1) for piece in pieces], dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Tokens of one length."""

    length: int
    texts: list[str]
    """[n], each of ``length`` characters."""
    codes: np.ndarray
    """uint32 [n, length], their characters."""
    ids: np.ndarray
    """int64 [n]"""


def _by_length(pieces: Iterable[bytes], ids: np.ndarray) -> list[_Group]:
    """Tokens grouped by their number of characters, ascending; ``ids`` are those of ``pieces``, in their order."""
    texts = np.array([_text(piece) for piece in pieces], dtype=object)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    groups = []
    for length in np.unique(lengths).tolist():
        members = np.flatnonzero(lengths == length)
        group = texts[members].tolist()
        codes = np.array(group, dtype=f"U{length}").view(np.uint32).reshape(len(group), length)
        groups.append(_Group(length, group, codes, ids[members]))
    return groups


def _nearest(source: _Group, targets: list[_Group]) -> np.ndarray:
    """Target ids, int64 [n], nearest to the source's tokens.

    Lengths that differ by d need at least d edits: lengths are taken in the order of their difference, and a token
    drops out once it has a target nearer than that.
    """
    distances = np.full(len(source.texts), np.iinfo(np.int64).max)
    ranks = np.zeros(len(source.texts), dtype=np.int64)
    for target in sorted(targets, key=lambda group: abs(group.length - source.length)):
        active = np.flatnonzero(distances >= abs(target.length - source.length))
        if not len(active):
            break
        for rows in np.array_split(active, math.ceil(len(active) * len(target.texts) / _BLOCK)):
            found, rank = _nearest_of_length(source, target, rows)
            better = (found < distances[rows]) | ((found == distances[rows]) & (rank > ranks[rows]))
            distances[rows[better]], ranks[rows[better]] = found[better], rank[better]
    return _MAX_ID - ranks % (_MAX_ID + 1)


def _nearest_of_length(source: _Group, target: _Group, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least distance to a target of this length, int64 [len(rows)], and the highest rank of the targets that have it.

    A rank orders equally near targets: the longer common prefix first, then the lower id.
    """
    table = cdist(
        [source.texts[row] for row in rows],
        target.texts,
        scorer=Levenshtein.distance,
        dtype=np.uint8 if max(source.length, target.length) < 256 else np.int32,
    )
    least = table.min(axis=1)
    row, column = np.nonzero(table == least[:, None])
    prefix = _common_prefix(source.codes, rows[row], target.codes, column)
    rank = prefix * (_MAX_ID + 1) + (_MAX_ID - target.ids[column])
    first_of_row = np.searchsorted(row, np.arange(len(rows)))
    return least.astype(np.int64), np.maximum.reduceat(rank, first_of_row)


def _common_prefix(left: np.ndarray, left_rows: np.ndarray, right: np.ndarray, right_rows: np.ndarray) -> np.ndarray:
    """Number of equal characters, int64 [k], at the start of ``left[left_rows]`` and ``right[right_rows]``."""
    lengths = np.zeros(len(left_rows), dtype=np.int64)
    equal = np.arange(len(left_rows))
    for position in range(min(left.shape[1], right.shape[1])):
        equal = equal[left[left_rows[equal], position] == right[right_rows[equal], position]]
        lengths[equal] += 1
    return lengths


@contextmanager
def _progress(sources: list[_Group], targets: list[_Group]) -> Iterator[Callable[[int], object]]:
    """A bar over the source's tokens, shown where the work is long; gives the function that advances it."""
    num_sources, num_targets = (sum(len(group.texts) for group in groups) for groups in (sources, targets))
    if num_sources * num_targets < _LONG:
        yield lambda _: None
        return
    with Progress(transient=True) as progress:
        task = progress.add_task("Mapping the vocabularies (kept for next time)", total=num_sources)
        yield partial(progress.advance, task)
