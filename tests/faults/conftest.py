"""One fork server for all tests here, and one folder of tiny models to copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from faults.phases import write_models
from faults.starts import ForkServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    started = ForkServer(tmp_path_factory.mktemp("server"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Student, teacher, data, recipe and study; copy it, do not write to it."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    return folder


@pytest.fixture
def workplace(models: Path, tmp_path: Path) -> Path:
    """A folder of the test's own with all of that."""
    return Path(shutil.copytree(models, tmp_path / "workplace"))
