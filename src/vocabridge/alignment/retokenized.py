"""The tokens of one vocabulary spelled in those of another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from vocabridge.alignment.prepared import PreparedTokenizer, prepare
from vocabridge.alignment.vocabulary import first_id_by_bytes


@dataclass(frozen=True, slots=True, eq=False)
class RaggedIds:
    """Several ids per token.

    Attributes:
        offsets: int64 [V + 1]; token i has ``ids[offsets[i]:offsets[i + 1]]``.
        ids: int64, those of all tokens one after another.
    """

    offsets: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, token_id: int) -> np.ndarray:
        """The ids of one token; empty where it has no spelling."""
        return self.ids[self.offsets[token_id] : self.offsets[token_id + 1]]


def retokenized(source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase) -> RaggedIds:
    """Spell every source token in target tokens.

    A token's text is encoded by the target tokenizer as it continues other text: without a synthetic space in front,
    spellings of control tokens read as text. A token that is no text (a part of a character), or whose encoding loses
    bytes, is spelled byte by byte with the fewest target tokens, where there are any. Only a tokenizer that rewrites
    text or has no tokens for spaces may spell other bytes: those of its own form of the text.

    Takes seconds for 262,144 tokens, so keep the result.

    Args:
        source_tokenizer: a fast tokenizer, or ByT5.
        target_tokenizer: the same.

    Returns:
        Target ids of each source id, in order; none for control, unknown and unused ids and for what cannot be spelled.

    Raises:
        UserError: A tokenizer is not covered.
    """
    source, target = (prepare(tokenizer, check_size=True) for tokenizer in (source_tokenizer, target_tokenizer))
    pieces = [piece or b"" for piece in source.table.text_bytes()]
    texts = {token_id: text for token_id, piece in enumerate(pieces) if (text := _decoded(piece)) is not None}
    encoded = target.encoder.encode_ids(list(texts.values()), specials="text", prefix=target.family.drops_space)
    spellings = dict(zip(texts, encoded, strict=True))
    tiles = _Tiles(first_id_by_bytes(target))
    for token_id, piece in enumerate(pieces):
        if token_id not in spellings or not _is_faithful(piece, spellings[token_id], target):
            spellings[token_id] = tiles.fewest(piece)
    in_order = [spellings[token_id] for token_id in range(len(pieces))]
    return RaggedIds(
        offsets=np.cumsum([0, *map(len, in_order)], dtype=np.int64),
        ids=np.array([token_id for ids in in_order for token_id in ids], dtype=np.int64),
    )


def _decoded(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _is_faithful(piece: bytes, ids: list[int], target: PreparedTokenizer) -> bool:
    """Whether the ids spell the bytes, or what the target's own normaliser may make of them."""
    table = target.table
    if target.rewrite is None and not target.family.drops_space:
        return b"".join(table.data[token_id] or b"" for token_id in ids) == piece
    return table.unknown_id not in ids


class _Tiles:
    """Spells bytes by single tokens of one vocabulary.

    Args:
        ids: id by byte string.
    """

    def __init__(self, ids: dict[bytes, int]) -> None:
        self._ids = ids
        self._longest = max(map(len, ids), default=0)

    def fewest(self, data: bytes) -> list[int]:
        """The fewest tokens whose joined bytes are ``data``, longer ones first; empty if there are none."""
        best: list[list[int] | None] = [None] * len(data) + [[]]
        for start in reversed(range(len(data))):
            for end in range(min(len(data), start + self._longest), start, -1):
                rest, token_id = best[end], self._ids.get(data[start:end])
                if rest is None or token_id is None:
                    continue
                known = best[start]
                if known is None or len(rest) + 1 < len(known):
                    best[start] = [token_id, *rest]
        return best[0] or []
