"""Bytes a second from token ids to byte spans and chunks, per tokenizer family, on one core.

    python benchmarks/alignment.py

One megabyte of English, code and other scripts, cut into short responses, where the cost of a call counts most, into
long ones, and into documents, where it no longer counts. ``spans``: from the ids of a text to the bytes of each token,
encoded as the continuation that a response is. ``chunks``: from two lists of spans to common chunks, each tokenizer
against the first. ``encode``: the tokenizer's own work, for comparison; ``encode and align`` is all that preparing a
pair costs on that side.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from harness import RESULTS, ROOT, Bar, Row, interleaved, parse, parser, report
from vocabridge.alignment import chunk_ids, encode_continuation, prepared
from vocabridge.alignment.prepared import RawTokens, Specials

sys.path.append(str(ROOT / "tests"))

DOCUMENT_CHARACTERS = (200, 2_000, 50_000)
BPE = "BPE"
"""What the bar speaks of, as families name it."""
TOGETHER = "spans + chunks MB/s"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every tokenizer that is there."""
    options = parser("alignment", __doc__)
    options.add_argument("--megabytes", type=float, default=1.0)
    arguments = parse(options, argv)
    num_bytes = 20_000 if arguments.smoke else int(arguments.megabytes * 1e6)
    tokenizers = _tokenizers(real=not arguments.smoke)
    partner = next(iter(tokenizers.values()))
    tables, bars = {}, []
    for length in DOCUMENT_CHARACTERS:
        documents = mixed_text(num_bytes, document_characters=length)
        rows = [_measure(name, tokenizer, partner, documents, arguments) for name, tokenizer in tokenizers.items()]
        tables[f"documents of {length:,} characters"] = rows
        bars += [
            Bar(f"{row['tokenizer']}, {length:,} characters: spans and chunks MB/s", row[TOGETHER], 10, at_most=False)
            for row in rows
            if BPE in row["family"]
        ]
    report(arguments, tables, settings={"bytes": num_bytes}, bars=[] if arguments.smoke else bars)


def mixed_text(num_bytes: int, *, document_characters: int) -> list[str]:
    """Documents of English prose, Python code and sentences in a dozen scripts, in equal parts; no network.

    Prose and code come from the standard library, so they change a little with the Python release.
    """
    import pydoc_data.topics as prose

    from tokenizer_zoo import CORPUS

    rng = random.Random(0)
    library = Path(random.__file__).parent
    code = "\n".join((library / f"{name}.py").read_text("utf-8") for name in ("argparse", "typing", "inspect", "ast"))
    words = [word for line in CORPUS for word in line.split(" ")]
    scripts = " ".join(rng.choices(words, k=60_000))
    sources = ["\n".join(prose.topics.values()), code, scripts]
    documents: list[str] = []
    size, starts = 0, [0, 0, 0]
    while size < num_bytes:
        kind = len(documents) % 3
        start = starts[kind] % (len(sources[kind]) - document_characters)
        document = sources[kind][start : start + document_characters]
        starts[kind] += document_characters
        documents.append(document)
        size += len(document.encode())
    return documents


def _tokenizers(*, real: bool) -> dict[str, PreTrainedTokenizerFast]:
    """The packaged real ones that are installed, and one trained on the spot for each family that has none."""
    import tokenizer_zoo

    found: dict[str, PreTrainedTokenizerFast] = {}
    if real:
        import pytest

        import real_tokenizers

        cache = RESULTS / "tokenizers"
        cache.mkdir(parents=True, exist_ok=True)
        for name in ("smollm2", "gemma", "minilm"):
            try:
                found[name] = getattr(real_tokenizers, name)(cache)
            except pytest.skip.Exception as error:
                print(f"left out: {error}")
    if not found:
        found = {
            "trained byte-level BPE": tokenizer_zoo.byte_level_bpe(),
            "trained SentencePiece BPE": tokenizer_zoo.sentencepiece_bpe(),
            "trained WordPiece": tokenizer_zoo.word_piece(),
        }
    return found | {"trained Unigram": tokenizer_zoo.unigram(byte_fallback=True)}


@dataclass(frozen=True, slots=True)
class Recorded:
    """An encoder that gives back what another one made, so that its time is left out.

    Attributes:
        encoder: the other one.
        raw: what it made, filled at the first pass over the texts.
    """

    encoder: prepared.Encoder
    raw: dict[tuple[str, bool], RawTokens]

    def encode(self, text: str, *, specials: Specials, prefix: bool) -> RawTokens:
        """Look it up."""
        found = self.raw.get((text, prefix))
        if found is None:
            found = self.raw[text, prefix] = self.encoder.encode(text, specials=specials, prefix=prefix)
        return found

    def encode_ids(self, texts: list[str], *, specials: Specials, prefix: bool) -> list[list[int]]:
        """Look them up."""
        return [self.encode(text, specials=specials, prefix=prefix).ids for text in texts]


def _measure(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    partner: PreTrainedTokenizerFast,
    documents: list[str],
    arguments: argparse.Namespace,
) -> Row:
    own = prepared.prepare(tokenizer)
    recorded = Recorded(own.encoder, {})
    # encode_continuation reads what a tokenizer encodes with from this cache.
    prepared._CACHE[tokenizer] = replace(own, encoder=recorded)
    spans = [encode_continuation(tokenizer, text).spans for text in documents]
    others = [encode_continuation(partner, text).spans for text in documents]

    def encode() -> None:
        for text, prefix in recorded.raw:
            own.encoder.encode(text, specials="text", prefix=prefix)

    def align() -> None:
        for text in documents:
            encode_continuation(tokenizer, text)

    def chunk() -> None:
        for mine, other in zip(spans, others, strict=True):
            chunk_ids(mine, other)

    timings = interleaved({"encode": encode, "spans": align, "chunks": chunk}, repeats=arguments.repeats)
    prepared._CACHE[tokenizer] = own
    size = sum(len(text.encode()) for text in documents) / 1e6
    encoded, aligned, chunked = (timings[part].median for part in ("encode", "spans", "chunks"))
    return {
        "tokenizer": name,
        "family": _family(own),
        "tokens": sum(map(len, spans)),
        "encode MB/s": size / encoded,
        "spans MB/s": size / aligned,
        "chunks MB/s": size / chunked,
        TOGETHER: size / (aligned + chunked),
        "encode and align MB/s": size / (encoded + aligned + chunked),
    }


def _family(tokenizer: prepared.PreparedTokenizer) -> str:
    family = tokenizer.family
    if family.model != BPE:
        return family.model
    return f"byte-level {BPE}" if family.byte_level else f"SentencePiece-style {BPE}"


if __name__ == "__main__":
    main()
