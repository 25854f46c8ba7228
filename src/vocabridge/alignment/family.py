"""What a tokenizer's own components say about how its pieces spell text.

Everything here is read from the states of the normaliser, pre-tokenizer, decoder and model, never guessed from the
class name; the facts tell `reading` which liberties it may take when the joined pieces are not the text itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from vocabridge.errors import UserError

# White_Space as in Rust's char::is_whitespace; Python's str.isspace() also counts U+001C to U+001F.
WHITE_SPACE = frozenset("\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(code) for code in range(0x2000, 0x200B)
}

_KNOWN_PRE_TOKENIZERS = frozenset(
    {
        "BertPreTokenizer",
        "ByteLevel",
        "Digits",
        "FixedLength",
        "Metaspace",
        "Punctuation",
        "Split",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
    }
)
_SPACE_DROPPERS = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})


@dataclass(frozen=True, slots=True)
class TokenizerFamily:
    """How pieces spell text, for one tokenizer.

    Attributes:
        model: ``"BPE"``, ``"Unigram"``, ``"WordPiece"`` or ``"WordLevel"``; ``"ByT5"`` for the slow byte tokenizer.
        byte_level: pieces are written in GPT-2's byte alphabet.
        byte_fallback: pieces ``<0xNN>`` stand for one byte.
        fuses_unknown: one unknown token may cover several characters.
        space_marker: the character that stands for a space in pieces (U+2581), or None.
        continuing_prefix: marks a piece inside a word (``##``), or an empty string.
        word_suffix: marks a piece at the end of a word (``</w>``), or an empty string.
        synthetic_prefix: a space or marker that is not in the text is put in front of it.
        prefix_at_words: that prefix may come at every word, not only at the start.
        drops_space: white space between words has no token.
        unknown_token: the piece for what has no piece; None where unknown bytes or characters vanish silently.
        rewriting: the normaliser's components that rewrite text, in order (no prefix, no strip, no space marker).
        unsupported: the component that makes a search impossible, or an empty string.
    """

    model: str
    byte_level: bool
    byte_fallback: bool
    fuses_unknown: bool
    space_marker: str | None
    continuing_prefix: str
    word_suffix: str
    synthetic_prefix: bool
    prefix_at_words: bool
    drops_space: bool
    unknown_token: str | None
    rewriting: tuple[dict[str, Any], ...]
    unsupported: str


def component_state(component: Any) -> dict[str, Any] | None:
    """The JSON state of a normaliser, pre-tokenizer or decoder of the tokenizers library; None for None.

    Raises:
        UserError: The component is written in Python and has no state to read.
    """
    if component is None:
        return None
    try:
        return json.loads(component.__getstate__())
    except Exception as error:  # the library raises a bare Exception here
        raise UserError(
            f"the tokenizer has a custom {type(component).__name__} written in Python, so byte spans cannot be "
            "derived from its parts; use the tokenizer with the library's own components"
        ) from error


def flatten(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The components of a (nested) ``Sequence`` state in order; an empty list for None."""
    if state is None:
        return []
    if state["type"] != "Sequence":
        return [state]
    parts = next(value for value in state.values() if isinstance(value, list))
    return [leaf for part in parts for leaf in flatten(part)]


def read_family(backend: Tokenizer) -> TokenizerFamily:
    """The family facts of a fast tokenizer's backend.

    Raises:
        UserError: A component is a custom one written in Python.
    """
    normalizer = flatten(component_state(backend.normalizer))
    pre_tokenizer = flatten(component_state(backend.pre_tokenizer))
    decoder = flatten(component_state(backend.decoder))
    model = backend.model
    kind = type(model).__name__
    unigram = json.loads(model.__getstate__()) if kind == "Unigram" else {}
    prefixing = [index for index, part in enumerate(pre_tokenizer) if _adds_prefix(part)]
    return TokenizerFamily(
        model=kind,
        byte_level=any(part["type"] == "ByteLevel" for part in (*decoder, *pre_tokenizer, *normalizer)),
        byte_fallback=bool(unigram.get("byte_fallback") or getattr(model, "byte_fallback", False)),
        fuses_unknown=kind == "Unigram" or bool(getattr(model, "fuse_unk", False)),
        space_marker=next(_space_markers(normalizer, pre_tokenizer, decoder), None),
        # A WordPiece model always has a prefix; a BPE has one only where it says so.
        continuing_prefix=getattr(model, "continuing_subword_prefix", None) or "",
        word_suffix=getattr(model, "end_of_word_suffix", None) or "",
        synthetic_prefix=bool(prefixing) or any(part["type"] == "Prepend" for part in normalizer),
        prefix_at_words=bool(prefixing) and prefixing[-1] > 0,
        drops_space=any(_drops_space(part) for part in (*normalizer, *pre_tokenizer)),
        unknown_token=_unknown_token(model, unigram),
        rewriting=tuple(part for part in normalizer if _rewrites(part)),
        unsupported=next((p["type"] for p in pre_tokenizer if p["type"] not in _KNOWN_PRE_TOKENIZERS), ""),
    )


def read_slow_family(tokenizer: object) -> TokenizerFamily:
    """The family facts of a tokenizer without a fast backend; only ByT5 (bytes as characters) is covered.

    Raises:
        UserError: Any other slow tokenizer.
    """
    if all(base.__name__ != "ByT5Tokenizer" for base in type(tokenizer).__mro__):
        raise UserError(
            f"{tokenizer_name(tokenizer)} has no fast tokenizer (tokenizer.json), and byte spans of slow tokenizers "
            "are only covered for ByT5; convert it to a fast one or choose a model that has one"
        )
    return TokenizerFamily(
        model="ByT5",
        byte_level=False,
        byte_fallback=False,
        fuses_unknown=False,
        space_marker=None,
        continuing_prefix="",
        word_suffix="",
        synthetic_prefix=False,
        prefix_at_words=False,
        drops_space=True,  # its added tokens swallow the white space on both sides
        unknown_token=None,
        rewriting=(),
        unsupported="",
    )


def tokenizer_name(tokenizer: object) -> str:
    """How messages name a tokenizer: its class and, when known, where it came from."""
    source = getattr(tokenizer, "name_or_path", "")
    return f"the tokenizer {type(tokenizer).__name__}" + (f" ({source})" if source else "")


def _adds_prefix(part: dict[str, Any]) -> bool:
    if part["type"] == "Metaspace":
        return part["prepend_scheme"] != "never"
    return part["type"] == "ByteLevel" and part["add_prefix_space"]


def _space_markers(
    normalizer: list[dict[str, Any]], pre_tokenizer: list[dict[str, Any]], decoder: list[dict[str, Any]]
) -> Iterator[str]:
    for part in (*pre_tokenizer, *decoder):
        if part["type"] == "Metaspace":
            yield part["replacement"]
    for part in normalizer:
        if _marks_space(part):
            yield part["content"]
    for part in decoder:
        if part["type"] == "Replace" and part["content"] == " " and len(part["pattern"].get("String", "")) == 1:
            yield part["pattern"]["String"]


def _marks_space(part: dict[str, Any]) -> bool:
    return part["type"] == "Replace" and part["pattern"].get("String") == " " and len(part["content"]) == 1


def _drops_space(part: dict[str, Any]) -> bool:
    removes = part["type"] == "Split" and part["behavior"] == "Removed"
    strips = part["type"] == "Strip" and "strip_left" in part
    return part["type"] in _SPACE_DROPPERS or removes or strips


def _rewrites(part: dict[str, Any]) -> bool:
    return part["type"] not in ("Prepend", "Strip", "ByteLevel") and not _marks_space(part)


def _unknown_token(model: Any, unigram: dict[str, Any]) -> str | None:
    if unigram:
        unknown_id = unigram.get("unk_id")
        return None if unknown_id is None else unigram["vocab"][unknown_id][0]
    return getattr(model, "unk_token", None)
