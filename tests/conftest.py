"""Tokenizers that many tests share: two tiny trained ones, and the real ones that ship in packages."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Read when torch is imported, and passed on to every process that a test starts. The models are tiny: with more threads
# the workers of pytest-xdist wait for each other's (some tests took ten times as long), and sums change their order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from transformers import PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parent))  # importlib mode leaves the path alone; tokenizer_zoo lies here

import real_tokenizers
import tokenizer_zoo
from tiny_pair import save, teacher_model

gc.freeze()  # accelerate collects garbage for every trainer; torch's and transformers' million objects are none


@pytest.fixture(scope="session", autouse=True)
def _no_traces_in_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOCABRIDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_bpe_tokenizer() -> Iterator[PreTrainedTokenizerFast]:
    """Byte-level BPE, 700 tokens, with pad, eos and bos; no normaliser, no prefix space."""
    yield from _unchanged(tokenizer_zoo.byte_level_bpe())


@pytest.fixture(scope="session")
def tiny_sentencepiece_tokenizer() -> Iterator[PreTrainedTokenizerFast]:
    """SentencePiece-style BPE with byte fallback and a prefix marker (Llama 2), 800 tokens, with pad, eos, bos, unk."""
    yield from _unchanged(tokenizer_zoo.sentencepiece_bpe())


@pytest.fixture(scope="session")
def teacher_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The tiny teacher with its tokenizer, as a checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    save(folder, teacher_model(tiny_sentencepiece_tokenizer), tiny_sentencepiece_tokenizer)
    return folder


@pytest.fixture(scope="session")
def smollm2_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer from its package; skips when the package is missing."""
    return real_tokenizers.smollm2(_cache_folder(request))


@pytest.fixture(scope="session")
def gemma_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Gemma 3's tokenizer from its package; skips when the package is missing."""
    return real_tokenizers.gemma(_cache_folder(request))


@pytest.fixture(scope="session")
def minilm_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """MiniLM's WordPiece tokenizer from its package; skips when the package is missing."""
    return real_tokenizers.minilm(_cache_folder(request))


def _unchanged(tokenizer: PreTrainedTokenizerFast) -> Iterator[PreTrainedTokenizerFast]:
    """Lends the tokenizer to all tests, and finds out at the end if one of them kept a change for the next."""

    def state() -> tuple[object, ...]:
        return len(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.padding_side

    before = state()
    yield tokenizer
    assert state() == before, "a test changed a tokenizer that all tests share; it should take copy.deepcopy(tokenizer)"


def _cache_folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("vocabridge-tokenizers"))
