"""The map to the nearest token of another vocabulary, against a search over all pairs."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import tokenizer_zoo
from vocabridge.alignment import inverse_nearest_tokens, nearest_tokens, shared_vocabulary, token_bytes
from warping_oracle import edit_distance, texts

PAIRS = [("byte_level", "sentencepiece"), ("sentencepiece", "byte_level"), ("word_piece", "byte_level")]
MAKE: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": tokenizer_zoo.byte_level_bpe,
    "sentencepiece": tokenizer_zoo.sentencepiece_bpe,
    "word_piece": tokenizer_zoo.word_piece,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VOCABRIDGE_CACHE", str(tmp_path))
    return tmp_path


def common_prefix(left: str, right: str) -> int:
    return next((n for n in range(min(len(left), len(right)), 0, -1) if left[:n] == right[:n]), 0)


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_nearest_by_all_pairs(source_name: str, target_name: str) -> None:
    source, target = MAKE[source_name](), MAKE[target_name]()
    mapped = nearest_tokens(source, target)
    assert mapped.dtype == np.int64
    source_texts, target_texts = texts(source), texts(target)
    assert len(mapped) == len(source_texts)
    candidates = [(i, text) for i, text in enumerate(target_texts) if text]
    random = np.random.default_rng(0)
    unmapped = [i for i, text in enumerate(source_texts) if text and text not in target_texts]
    assert len(unmapped) > 100
    for i in random.choice(unmapped, 60, replace=False).tolist():
        text = source_texts[i]
        best = min((edit_distance(text, other), -common_prefix(text, other), j) for j, other in candidates)
        found = target_texts[mapped[i]]
        assert found is not None
        # Of several ids with the same text the preferred one is taken, which need not be the lowest.
        assert (edit_distance(text, found), -common_prefix(text, found)) == best[:2]
        assert found == target_texts[best[2]]


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_identical_bytes_come_first(source_name: str, target_name: str) -> None:
    source, target = MAKE[source_name](), MAKE[target_name]()
    mapped, source_bytes, target_bytes = nearest_tokens(source, target), token_bytes(source), token_bytes(target)
    shared = shared_vocabulary(source, target)
    assert mapped[shared.student_ids].tolist() == shared.teacher_ids.tolist()
    known = set(target_bytes) - {None}
    same = [i for i, data in enumerate(source_bytes) if data in known]
    assert len(same) >= len(shared.student_ids) > 100
    assert all(source_bytes[i] == target_bytes[mapped[i]] for i in same)


def test_control_tokens_map_by_role() -> None:
    source, target = MAKE["byte_level"](), MAKE["sentencepiece"]()
    mapped = nearest_tokens(source, target)
    for role in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert mapped[getattr(source, role)] == getattr(target, role)
    back = nearest_tokens(target, source)
    assert back[target.unk_token_id] == -1  # the byte-level tokenizer has no unknown token
    assert set(back[back >= 0].tolist()) <= set(range(len(source)))


def test_a_token_of_two_roles_takes_the_first() -> None:
    source, target = MAKE["byte_level"](), MAKE["sentencepiece"]()
    source.pad_token = source.eos_token
    assert nearest_tokens(source, target)[source.eos_token_id] == target.eos_token_id


def test_control_tokens_without_a_role_have_no_partner() -> None:
    source, target = MAKE["byte_level"](), MAKE["sentencepiece"]()
    source.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    mapped = nearest_tokens(source, target)
    assert mapped[source.convert_tokens_to_ids("<|tool|>")] == -1


@pytest.mark.parametrize(("student_name", "teacher_name"), PAIRS)
def test_inverse_is_one_nearest_teacher_token_per_student_token(student_name: str, teacher_name: str) -> None:
    student, teacher = MAKE[student_name](), MAKE[teacher_name]()
    forward, inverse = nearest_tokens(teacher, student), inverse_nearest_tokens(student, teacher)
    student_texts, teacher_texts = texts(student), texts(teacher)
    assert len(inverse) == len(student_texts)
    several = 0
    for student_id, teacher_id in enumerate(inverse.tolist()):
        sources = np.flatnonzero(forward == student_id).tolist()
        several += len(sources) > 1
        assert (teacher_id in sources) if sources else teacher_id == -1
        if sources:
            distances = {i: edit_distance(student_texts[student_id] or "", teacher_texts[i] or "") for i in sources}
            assert distances[teacher_id] == min(distances.values())
    assert several > 20
    shared = shared_vocabulary(student, teacher)
    assert inverse[shared.student_ids].tolist() == shared.teacher_ids.tolist()


def test_second_call_reads_the_file_and_a_damaged_one_is_made_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = MAKE["byte_level"](), MAKE["sentencepiece"]()
    expected = nearest_tokens(source, target)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    calls: list[int] = []
    module = importlib.import_module("vocabridge.alignment.nearest_tokens")  # the package has a function of that name
    search = module._map_text
    monkeypatch.setattr(module, "_map_text", lambda *pair: calls.append(1) or search(*pair))
    assert nearest_tokens(source, target).tolist() == expected.tolist()
    assert not calls
    for damaged in (b"", whole[:100], whole[:-60], b"x" * len(whole), whole[:2000] + b"\x55\x55" + whole[2002:]):
        file.write_bytes(damaged)
        caplog.clear()
        assert nearest_tokens(source, target).tolist() == expected.tolist()
        assert "damaged" in caplog.text
    assert len(calls) == 5
    assert [path.name for path in cache.iterdir()] == [file.name]


def test_another_vocabulary_has_another_file(cache: Path) -> None:
    source, target = MAKE["byte_level"](), MAKE["sentencepiece"]()
    before = nearest_tokens(source, target)
    source.add_tokens(["zebra crossing"])
    after = nearest_tokens(source, target)
    assert len(after) == len(before) + 1
    assert len(list(cache.iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VOCABRIDGE_CACHE", str(tmp_path / "file" / "folder"))
    source, target = MAKE["byte_level"](), MAKE["sentencepiece"]()
    assert (nearest_tokens(source, target) >= 0).sum() > 600
    assert "VOCABRIDGE_CACHE" in caplog.text


def test_real_vocabularies(
    smollm2_tokenizer: PreTrainedTokenizerFast, gemma_tokenizer: PreTrainedTokenizerFast
) -> None:
    start = time.perf_counter()
    mapped = nearest_tokens(smollm2_tokenizer, gemma_tokenizer)
    assert time.perf_counter() - start < 60  # about 4 seconds on an idle core
    source, target = token_bytes(smollm2_tokenizer), token_bytes(gemma_tokenizer)
    assert target[mapped[source.index(b" Negot")]] == b" Negoti"
    assert (mapped >= 0).sum() > 49_000
