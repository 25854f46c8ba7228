"""Was the tokenizer loaded as its file says? transformers 5 rebuilds many pipelines from the Python class.

``AutoTokenizer`` takes only the vocabulary and merges of ``tokenizer.json`` when the class has its own constructor:
normaliser and pre-tokenizer then come from the class, and a model can be fed ids that it was never trained on. From a
GGUF file it ignores the field that names the pre-tokenizer. Both happen without a word, so they are looked for here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from vocabridge.alignment.family import component_state, flatten, tokenizer_name
from vocabridge.errors import UserError

_COMPONENTS = {"normalizer": "normaliser", "pre_tokenizer": "pre-tokenizer", "decoder": "decoder"}
_MODEL_FLAGS = (
    "unk_token",
    "byte_fallback",
    "fuse_unk",
    "ignore_merges",
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
)
# Names for which a bare ByteLevel (GPT-2's own regular expression) is what the GGUF file means.
_PLAIN_BYTE_LEVEL = frozenset({"gpt-2", "gpt2", "phi-2", "mpt", "olmo"})


def check_tokenizer_file(tokenizer: PreTrainedTokenizerBase, tokenizer_file: str | Path | None = None) -> list[str]:
    """Compare a loaded tokenizer with the file it came from.

    Args:
        tokenizer: the tokenizer as the caller will use it.
        tokenizer_file: its ``tokenizer.json`` or GGUF file. Default: looked for in the folder that it was loaded from
            or in the local hub cache; never downloaded.

    Returns:
        One warning sentence for each thing that differs, naming it; empty when all agree, when there is no file to
        compare with, or for a slow tokenizer.

    Raises:
        UserError: ``tokenizer_file`` was given and cannot be read.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    file = Path(tokenizer_file) if tokenizer_file is not None else _find_file(tokenizer)
    if file is None or not isinstance(backend, Tokenizer):
        return []
    name = tokenizer_name(tokenizer)
    if file.suffix == ".gguf":
        return [f"{name}: {what}" for what in _gguf_differences(backend, file)]
    remedy = "load it with PreTrainedTokenizerFast(tokenizer_file=...) to keep what the file says"
    return [f"{name}: {what}; {remedy}." for what in _json_differences(backend, _read_json(file))]


def _find_file(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    source = getattr(tokenizer, "name_or_path", "")
    if not source:
        return None
    folder = Path(source)
    if folder.is_dir():
        gguf_files = sorted(folder.glob("*.gguf"))
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
        return gguf_files[0] if len(gguf_files) == 1 else None
    try:
        cached = try_to_load_from_cache(source, "tokenizer.json")
    except HFValidationError:  # a path that is gone, not a hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return state | {"model": dict(state["model"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read as a tokenizer.json ({error}); give the tokenizer's file") from error


def _json_differences(backend: Tokenizer, state: dict[str, Any]) -> Iterator[str]:
    for key, word in _COMPONENTS.items():
        loaded = _parts(key, component_state(getattr(backend, key)))
        written = _parts(key, _canonical(key, state.get(key)))
        if loaded != written:
            yield f"its {word} is {_describe(loaded)}, but tokenizer.json says {_describe(written)}"
    yield from _model_differences(backend, state["model"])
    yield from _added_token_differences(backend, state.get("added_tokens", []))


def _canonical(key: str, component: dict[str, Any] | None) -> dict[str, Any] | None:
    """The component as the library itself writes it, so that left-out defaults do not count as differences."""
    if component is None:
        return None
    shell = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}
    return component_state(getattr(Tokenizer.from_str(json.dumps(shell | {key: component})), key))


def _parts(key: str, component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts in order, less the settings of ByteLevel that change neither ids nor text."""
    idle = {"trim_offsets"} if key != "decoder" else {"trim_offsets", "add_prefix_space", "use_regex"}
    return [
        {name: value for name, value in part.items() if part["type"] != "ByteLevel" or name not in idle}
        for part in flatten(component)
    ]


def _describe(parts: list[dict[str, Any]]) -> str:
    return " + ".join(_describe_part(part) for part in parts) or "none"


def _describe_part(part: dict[str, Any]) -> str:
    settings = ", ".join(f"{key}={json.dumps(value)}" for key, value in part.items() if key != "type")
    return f"{part['type']}({settings})" if settings else part["type"]


def _model_differences(backend: Tokenizer, written: dict[str, Any]) -> Iterator[str]:
    model = backend.model
    loaded_type = type(model).__name__
    if loaded_type != written.get("type", loaded_type):
        yield f"its model is {loaded_type}, but tokenizer.json says {written['type']}"
    for flag in _MODEL_FLAGS:
        if hasattr(model, flag) and (getattr(model, flag) or None) != (written.get(flag) or None):
            yield f"its model has {flag}={getattr(model, flag)!r}, but tokenizer.json says {written.get(flag)!r}"
    vocab = written.get("vocab", {})
    pieces = vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
    loaded = backend.get_vocab(False)
    moved = [piece for piece, token_id in pieces.items() if loaded.get(piece) != token_id]
    if moved:
        yield f"{len(moved)} pieces of tokenizer.json have another id or none in it, the first being {moved[0]!r}"


def _added_token_differences(backend: Tokenizer, written: list[dict[str, Any]]) -> Iterator[str]:
    loaded = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    changed = [token["content"] for token in written if loaded.get(token["content"]) != token["special"]]
    if changed:
        yield (
            f"{len(changed)} added tokens of tokenizer.json are missing in it or differ in being special, "
            f"the first being {changed[0]!r}"
        )


def _gguf_differences(backend: Tokenizer, file: Path) -> Iterator[str]:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a GGUF file ({error}); give the tokenizer's file") from error
    kind, pre_tokenizer = (
        fields[key].contents() if key in fields else None for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    loaded = [part["type"] for part in flatten(component_state(backend.pre_tokenizer))]
    is_named = kind == "gpt2" and pre_tokenizer is not None and pre_tokenizer not in _PLAIN_BYTE_LEVEL
    if is_named and loaded == ["ByteLevel"]:
        yield (
            f"{file.name} names the pre-tokenizer {pre_tokenizer!r}, which transformers does not read: it was built "
            "with ByteLevel alone, so that some text (numbers, runs of white space) can get other ids than in "
            "pre-training; the original tokenizer.json, where there is one, has no such difference."
        )
