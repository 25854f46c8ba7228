"""Tokenized pairs kept in the user's cache folder: a study tokenizes its rows once, not in every run.

Both tokenizers together take about a millisecond a row (Dolly's 11,436 rows under Gemma 3 and SmolLM2: 13 s on one
core, more than half of it inside the tokenizers library); the file, 35 MB, is found, read and unpacked in 2 s.

The name of the file stands for everything that the pairs depend on, so a file is never out of date: the rows, both
tokenizers, templates as they render today (some write the date), the length limit, and the code that makes pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from vocabridge.alignment.vocabulary_cache import Arrays, cached
from vocabridge.fingerprints import data_fingerprint
from vocabridge.pairs import (
    IGNORE_INDEX,
    PairDataset,
    PairStats,
    PairTokenizer,
    TokenizedPair,
    TokenizedSide,
    log_stats,
    tokenize_examples,
)
from vocabridge.prompts import PromptRenderer
from vocabridge.text import Example, Message

_FEWEST_ROWS = 1000
"""Fewer are tokenized in a second, which is what naming a large vocabulary takes."""

_PROBE = Example("vocabridge probe", (Message("user", "vocabridge probe"),), "answer", ("answer",), "probe")


def cached_pairs(examples: Sequence[Example], pair_tokenizer: PairTokenizer, *, progress: bool = False) -> PairDataset:
    """:func:`vocabridge.pairs.tokenize_examples`, read back if the same was tokenized before.

    Args:
        examples: the rows.
        pair_tokenizer: both tokenizers and the length limit.
        progress: show a progress bar.

    Raises:
        UserError: there is no example, or none has a response left.
    """
    name = _name(examples, pair_tokenizer) if len(examples) >= _FEWEST_ROWS else None
    if name is None:
        return tokenize_examples(examples, pair_tokenizer, progress=progress)
    made: list[PairDataset] = []

    def make() -> Arrays:
        made.append(tokenize_examples(examples, pair_tokenizer, progress=progress))
        return pack(made[0])

    arrays = cached(name, make)
    if made:
        return made[0]
    pairs = unpack(arrays)
    log_stats(pairs.stats, pair_tokenizer.max_length)
    return pairs


def pack(pairs: PairDataset) -> Arrays:
    """Plain arrays of everything in ``pairs``; each side's rows one after the other."""
    arrays: Arrays = {
        "truncated": np.array([pair.truncated for pair in pairs]),
        "stats": np.array(pairs.stats.counts),
    }
    for name in ("student", "teacher"):
        sides = [side for pair in pairs if (side := getattr(pair, name)) is not None]
        if sides:
            arrays |= {
                f"{name}_lengths": np.array([len(side.input_ids) for side in sides]),
                f"{name}_supervised": np.array([len(side.spans) for side in sides]),
                f"{name}_input_ids": np.concatenate([np.array(side.input_ids, dtype=np.int32) for side in sides]),
                f"{name}_spans": np.concatenate([side.spans.astype(np.int32) for side in sides]),
                f"{name}_chunk_ids": np.concatenate([side.chunk_ids.astype(np.int32) for side in sides]),
            }
    return arrays


def unpack(arrays: Arrays) -> PairDataset:
    """The inverse of :func:`pack`."""
    truncated = arrays["truncated"].tolist()
    teachers: Iterable[TokenizedSide | None] = [None] * len(truncated)
    if "teacher_lengths" in arrays:
        teachers = _unpack_side(arrays, "teacher")
    rows = zip(_unpack_side(arrays, "student"), teachers, truncated, strict=True)
    pairs = [TokenizedPair(student, teacher, is_cut) for student, teacher, is_cut in rows]
    return PairDataset(pairs, PairStats(*arrays["stats"].tolist()))


def _unpack_side(arrays: Arrays, name: str) -> Iterator[TokenizedSide]:
    lengths, supervised = arrays[f"{name}_lengths"], arrays[f"{name}_supervised"]
    input_ids = np.split(arrays[f"{name}_input_ids"], lengths.cumsum()[:-1])
    spans = np.split(arrays[f"{name}_spans"].astype(np.int64), supervised.cumsum()[:-1])
    chunks = np.split(arrays[f"{name}_chunk_ids"].astype(np.int64), supervised.cumsum()[:-1])
    prompts = (lengths - supervised).tolist()  # the supervised positions of a row are its last ones
    for row, prompt in enumerate(prompts):
        ids = input_ids[row].tolist()
        yield TokenizedSide(ids, [IGNORE_INDEX] * prompt + ids[prompt:], spans[row], chunks[row])


def _name(examples: Sequence[Example], pair_tokenizer: PairTokenizer) -> str | None:
    """The cache's name of these pairs; None where a tokenizer written in Python has no text that stands for it."""
    digest = hashlib.blake2b(digest_size=16)
    parts: list[Any] = [transformers.__version__, tokenizers.__version__, pair_tokenizer.max_length]
    for side in (pair_tokenizer.student, pair_tokenizer.teacher):
        if side is None:
            parts.append(None)
            continue
        backend = getattr(side.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        digest.update(backend.to_str().encode())
        parts.append(_rendering(side))
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    digest.update(data_fingerprint(examples).encode())
    package = Path(__file__).parent
    for path in (Path(__file__), package / "pairs.py", package / "prompts.py", *sorted(package.glob("alignment/*.py"))):
        digest.update(path.read_bytes())
    return f"pairs-{digest.hexdigest()}"


def _rendering(side: PromptRenderer) -> list[Any]:
    tokenizer = side.tokenizer
    special_tokens = [tokenizer.special_tokens_map, side.end_token_id]
    return [side.template, tokenizer.chat_template, special_tokens, side(_PROBE)]
