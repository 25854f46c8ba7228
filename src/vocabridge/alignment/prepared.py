"""One tokenizer made ready for spans: its family, its table and the backends that encode for it, cached per object."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from vocabridge.alignment.family import TokenizerFamily, read_family, read_slow_family, tokenizer_name
from vocabridge.alignment.normal_form import Rewrite, make_rewrite
from vocabridge.alignment.token_table import TokenTable, build_table
from vocabridge.errors import UserError

Specials = Literal["text", "control"]


@dataclass(frozen=True, slots=True)
class RawTokens:
    """What a tokenizer made of a text, without BOS and EOS.

    Attributes:
        ids: token ids.
        encoding: the backend's own record, for its offsets; None for a slow tokenizer.
    """

    ids: list[int]
    encoding: Encoding | None


class Encoder(Protocol):
    """Encodes a text without BOS, EOS, truncation or padding."""

    def encode(self, text: str, *, specials: Specials, prefix: bool) -> RawTokens:
        """Encode; ``prefix=False`` leaves out the synthetic space in front."""

    def encode_ids(self, texts: list[str], *, specials: Specials, prefix: bool) -> list[list[int]]:
        """The ids alone, of many texts at once."""


class FastEncoder:
    """Encodes with a fast backend, which is left as it was found, or with edited copies of it.

    Args:
        backend: the user's own backend.
        family: its facts.
    """

    def __init__(self, backend: Tokenizer, family: TokenizerFamily) -> None:
        self._backend = backend
        self._family = family
        self._lock = threading.Lock()

    def encode(self, text: str, *, specials: Specials, prefix: bool) -> RawTokens:
        """Encode; see `Encoder`."""
        with self._lock, self._backend_for(specials, prefix=prefix) as backend:
            encoding = backend.encode(text, add_special_tokens=False)
        return RawTokens(encoding.ids, encoding)

    def encode_ids(self, texts: list[str], *, specials: Specials, prefix: bool) -> list[list[int]]:
        """Encode; see `Encoder`."""
        with self._lock, self._backend_for(specials, prefix=prefix) as backend:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    @contextmanager
    def _backend_for(self, specials: Specials, *, prefix: bool) -> Iterator[Tokenizer]:
        """The backend or an edited copy of it, for the time of a call."""
        if not prefix and self._family.synthetic_prefix:
            backend = self._prefix_free
        elif specials == "text" and self._family.model == "Unigram":
            backend = self._control_free
        else:
            backend = self._backend
        with _settings(backend, specials_as_text=specials == "text"):
            yield backend

    @cached_property
    def _control_free(self) -> Tokenizer:
        return _edited_copy(self._backend, drop_prefix=False)

    @cached_property
    def _prefix_free(self) -> Tokenizer:
        return _edited_copy(self._backend, drop_prefix=True)


class SlowEncoder:
    """Encodes with a slow tokenizer, held weakly so that the cache does not keep it alive.

    Args:
        tokenizer: a tokenizer written in Python without a synthetic prefix.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = weakref.ref(tokenizer)

    def encode(self, text: str, *, specials: Specials, prefix: bool) -> RawTokens:
        """Encode; see `Encoder`."""
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "the cache entry outlived its tokenizer"
        pieces = tokenizer.tokenize(text, split_special_tokens=specials == "text")
        ids = tokenizer.convert_tokens_to_ids(pieces)
        assert isinstance(ids, list)
        return RawTokens(ids, None)

    def encode_ids(self, texts: list[str], *, specials: Specials, prefix: bool) -> list[list[int]]:
        """Encode; see `Encoder`."""
        return [self.encode(text, specials=specials, prefix=prefix).ids for text in texts]


@dataclass(frozen=True, slots=True)
class PreparedTokenizer:
    """Everything about one tokenizer that does not depend on the text.

    Attributes:
        name: how messages name it.
        family: how its pieces spell text.
        table: bytes of each id.
        encoder: encodes text.
        rewrite: the rewriting part of its normaliser, or None.
        keeps_newlines: whether that part leaves a newline as it is.
        vocab_size: number of tokens when it was prepared.
    """

    name: str
    family: TokenizerFamily
    table: TokenTable
    encoder: Encoder
    rewrite: Rewrite | None
    keeps_newlines: bool
    vocab_size: int


_CACHE: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, PreparedTokenizer] = weakref.WeakKeyDictionary()


def prepare(tokenizer: PreTrainedTokenizerBase, *, check_size: bool = False) -> PreparedTokenizer:
    """The prepared form, made once per tokenizer object.

    Args:
        tokenizer: a fast tokenizer, or ByT5. Changing its pipeline after the first call is not seen; added tokens are.
        check_size: compare the number of tokens first and prepare again when it changed (slow with many added tokens).

    Raises:
        UserError: A slow tokenizer other than ByT5, or one with custom Python components.
    """
    prepared = _CACHE.get(tokenizer)
    if prepared is None or (check_size and prepared.vocab_size != len(tokenizer)):
        prepared = _CACHE[tokenizer] = _prepare(tokenizer)
    return prepared


def prepare_again(tokenizer: PreTrainedTokenizerBase) -> PreparedTokenizer:
    """The prepared form of a tokenizer that has changed since it was cached."""
    _CACHE.pop(tokenizer, None)
    return prepare(tokenizer)


def _prepare(tokenizer: PreTrainedTokenizerBase) -> PreparedTokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    encoder: Encoder
    if isinstance(backend, Tokenizer):
        family = read_family(backend)
        encoder = FastEncoder(backend, family)
        vocab, added = backend.get_vocab(True), backend.get_added_tokens_decoder()
    else:
        family = read_slow_family(tokenizer)
        encoder = SlowEncoder(tokenizer)
        vocab, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    rewrite = make_rewrite(family)
    return PreparedTokenizer(
        name=tokenizer_name(tokenizer),
        family=family,
        table=build_table(vocab, added, family=family),
        encoder=encoder,
        rewrite=rewrite,
        keeps_newlines=rewrite is None or rewrite("\n") == "\n",
        vocab_size=len(tokenizer),
    )


@contextmanager
def _settings(backend: Tokenizer, *, specials_as_text: bool) -> Iterator[None]:
    """Switch truncation and padding off and set how control spellings are read; put everything back."""
    before, truncation, padding = backend.encode_special_tokens, backend.truncation, backend.padding
    try:
        backend.encode_special_tokens = specials_as_text
        if truncation is not None:
            backend.no_truncation()
        if padding is not None:
            backend.no_padding()
        yield
    finally:
        backend.encode_special_tokens = before
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _edited_copy(backend: Tokenizer, *, drop_prefix: bool) -> Tokenizer:
    """A copy without post-processor whose Unigram model cannot spell control tokens; optionally without prefix."""
    try:
        state = json.loads(backend.to_str())
    except Exception as error:  # the library raises a bare Exception for custom components
        raise UserError(f"the tokenizer cannot be copied ({error}); use the library's own components") from error
    state["post_processor"] = None
    if drop_prefix:
        state["normalizer"] = _without_prefix(state["normalizer"])
        state["pre_tokenizer"] = _without_prefix(state["pre_tokenizer"])
    renamed = _hide_control_pieces(state) if state["model"]["type"] == "Unigram" else {}
    copy = Tokenizer.from_str(json.dumps(state))
    assert all(copy.id_to_token(token_id) == piece for token_id, piece in renamed.items()), "the copy moved ids"
    return copy


def _hide_control_pieces(state: dict[str, Any]) -> dict[int, str]:
    """Rename control and unknown pieces in place so that no text spells them; the ids stay.

    A Unigram model holds ``</s>`` as an ordinary piece, so the library's switch for added tokens is not enough, and no
    filter of the text sees a spelling that only the normaliser produces.
    """
    model = state["model"]
    hidden = {token["id"] for token in state["added_tokens"] if token["special"]} | {model["unk_id"]}
    renamed = {i: f"\U0010fffe{i}\U0010fffe" for i in sorted(hidden - {None}) if i < len(model["vocab"])}
    for token_id, piece in renamed.items():
        model["vocab"][token_id][0] = piece
    for token in state["added_tokens"]:
        token["content"] = renamed.get(token["id"], token["content"])
    return renamed


def _without_prefix(component: dict[str, Any] | None) -> dict[str, Any] | None:
    """The component's state without what puts a space or marker in front of the text."""
    if component is None or component["type"] == "Prepend":
        return None
    if component["type"] == "Metaspace":
        return component | {"prepend_scheme": "never"}
    if component["type"] == "ByteLevel" and "add_prefix_space" in component:
        return component | {"add_prefix_space": False}
    if component["type"] == "Sequence":
        key = next(key for key, value in component.items() if isinstance(value, list))
        parts = [part for part in map(_without_prefix, component[key]) if part is not None]
        return component | {key: parts}
    return component
