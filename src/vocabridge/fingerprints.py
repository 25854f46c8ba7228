"""Short names for a model and for data, equal only when what they name is equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from vocabridge.text import Example

_SAMPLES_PER_TENSOR = 1024
_INTEGER_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FREE_CONFIG_KEYS = ("_name_or_path", "transformers_version")  # a copy in another folder is the same model


def model_fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of weights, configuration and tokenizer.

    Each tensor enters with its name, type, shape, the exact sum of its bit patterns and a thousand values: it runs on
    the tensor's device in a fraction of the time that hashing every byte takes, and training changes the sum.
    """
    return _digest((_config(model.config), _adapters(model), _tokenizer(tokenizer)), _named_tensors(model))


def weights_fingerprint(model: PreTrainedModel) -> str:
    """:func:`model_fingerprint` without the tokenizer: what decides the hidden states of given token ids."""
    return _digest((_config(model.config), _adapters(model)), _named_tensors(model))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of vocabulary, merges, normalisation, chat template and special tokens."""
    return _digest((_tokenizer(tokenizer),), ())


def checkpoint_fingerprint(config: PretrainedConfig, files: Sequence[Path]) -> str:
    """Fingerprint of a checkpoint's configuration and safetensors files, read one tensor at a time.

    It differs from :func:`weights_fingerprint` of the model that is loaded from them: names and types are the files'.
    """
    return _digest((_config(config),), _stored_tensors(files))


def data_fingerprint(examples: Sequence[Example]) -> str:
    """Fingerprint of everything that scores can depend on; where the rows came from plays no role."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        messages = [(message.role, message.content) for message in example.messages]
        digest.update(json.dumps([example.prompt, messages, example.references]).encode() + b"\n")
    return digest.hexdigest()


def _content(tensor: Tensor) -> bytes:
    if tensor.numel() == 0 or tensor.is_meta:
        return b""
    flat = tensor.detach().contiguous().view(-1).view(_INTEGER_OF_WIDTH[tensor.element_size()])
    samples = flat[:: max(1, len(flat) // _SAMPLES_PER_TENSOR)].cpu()
    return int(flat.sum(dtype=torch.int64)).to_bytes(8, "big", signed=True) + samples.numpy().tobytes()


def _digest(parts: Iterable[Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=_plain).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_content(tensor))
    return digest.hexdigest()


def _named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in sorted(model.state_dict().items()) if isinstance(tensor, Tensor))


def _stored_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as stored:
            for name in sorted(stored.keys()):
                yield name, stored.get_tensor(name)


def _config(config: PretrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _FREE_CONFIG_KEYS}


def _adapters(model: PreTrainedModel) -> dict[str, Any]:
    """LoRA settings by adapter name: rank and scale are not in the weights."""
    return {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # left behind by the last call
        parts.pop(state)
    return {"parts": parts, "chat_template": tokenizer.chat_template, "special": tokenizer.special_tokens_map}


def _plain(value: Any) -> Any:
    """What JSON lacks: sets (in a fixed order) and enumerations."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
