"""What ``dtype: auto`` becomes on processors with and without bfloat16, everywhere a teacher is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vocabridge.cache_teacher import cache_teacher
from vocabridge.errors import UserError
from vocabridge.models import dtypes
from vocabridge.models.dtypes import fast_dtype, has_bfloat16, tell_choice
from vocabridge.models.loading import load_model, load_student, load_teacher, resolve_dtype
from vocabridge.models.spec import LoraSpec, ModelSpec
from vocabridge.models.trunkless import load_ends
from vocabridge.text import read_examples

CPU = torch.device("cpu")
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")

Processor = Callable[..., None]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processor]:
    """``processor(avx=..., amx=...)``: what the CPU says it has; None takes the probe away."""

    def pretend(*, avx: bool | None, amx: bool | None) -> None:
        for name, answer in zip(PROBES, (avx, amx), strict=True):
            if answer is None:
                monkeypatch.delattr(torch.cpu, name, raising=False)
            else:
                monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)

    tell_choice.cache_clear()
    yield pretend
    tell_choice.cache_clear()


def save(
    tiny_model: Callable[..., PreTrainedModel],
    folder: Path,
    dtype: torch.dtype,
    *,
    family: str = "gemma3",
    hidden_size: int = 16,
) -> ModelSpec:
    tiny_model(family, vocab_size=704, hidden_size=hidden_size).to(dtype).save_pretrained(folder)
    return ModelSpec(model=str(folder), device="cpu")


@pytest.mark.parametrize(
    ("avx", "amx", "has"),
    [(True, False, True), (False, True, True), (False, False, False), (None, None, False), (None, True, True)],
)
def test_either_instruction_set_will_do_and_a_missing_probe_is_a_no(
    processor: Processor, avx: bool | None, amx: bool | None, has: bool
) -> None:
    processor(avx=avx, amx=amx)
    assert has_bfloat16(CPU) is has
    assert fast_dtype(BFLOAT16, CPU) == (BFLOAT16 if has else FLOAT32)
    assert fast_dtype(FLOAT16, CPU) == FLOAT32
    assert [fast_dtype(dtype, CPU) for dtype in (FLOAT32, torch.float64)] == [FLOAT32, torch.float64]


def test_accelerators_are_asked_themselves(monkeypatch: pytest.MonkeyPatch, processor: Processor) -> None:
    processor(avx=False, amx=False)
    assert fast_dtype(BFLOAT16, torch.device("mps")) == BFLOAT16
    asked: list[tuple[int, bool]] = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            asked.append((self.index, True))

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "device", Device)
    for answer in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=answer: answer)
        expected = BFLOAT16 if answer else FLOAT32
        assert fast_dtype(BFLOAT16, torch.device("cuda:1")) == expected
    assert fast_dtype(FLOAT16, torch.device("cuda:1")) == FLOAT16
    assert asked == [(1, True), (1, True)]


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("stored", [BFLOAT16, FLOAT16, FLOAT32])
def test_every_way_of_loading_takes_the_same_type(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, processor: Processor, stored: torch.dtype, has: bool
) -> None:
    processor(avx=has, amx=False)
    spec = save(tiny_model, tmp_path, stored)
    expected = BFLOAT16 if stored == BFLOAT16 and has else FLOAT32
    assert load_model(spec).dtype == load_teacher(spec).dtype == expected
    ends = load_ends(spec)
    assert not ends.has_trunk
    assert ends.model.dtype == expected
    lora = spec.model_copy(update={"lora": LoraSpec(r=2)})
    frozen = [p for p in load_student(lora).parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {expected}
    assert load_student(spec).dtype == FLOAT32


def test_what_is_converted_is_what_float32_loads(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, processor: Processor
) -> None:
    """Not the bfloat16 model made wider: its buffers (Gemma's embedding scale) would stay rounded."""
    processor(avx=False, amx=False)
    spec = save(tiny_model, tmp_path, BFLOAT16, hidden_size=24)  # whose root is no bfloat16 number
    asked = load_model(spec.model_copy(update={"dtype": "float32"}))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(load_model(spec)(input_ids=ids).logits, asked(input_ids=ids).logits)
        rounded = load_model(spec.model_copy(update={"dtype": "bfloat16"})).float()
        assert not torch.equal(rounded(input_ids=ids).logits, asked(input_ids=ids).logits)


def test_a_type_that_is_asked_for_is_kept(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, processor: Processor
) -> None:
    processor(avx=False, amx=False)
    spec = save(tiny_model, tmp_path, BFLOAT16, family="llama").model_copy(update={"dtype": "bfloat16"})
    assert resolve_dtype(spec) == "bfloat16"
    assert load_teacher(spec).dtype == load_ends(spec).model.dtype == BFLOAT16


def test_ends_get_the_type_of_the_device_they_will_be_moved_to(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read on the CPU, which may be slow in a type that the accelerator is fast in."""
    processor(avx=False, amx=False)
    spec = save(tiny_model, tmp_path, BFLOAT16).model_copy(update={"device": None})
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert load_ends(spec).model.dtype == BFLOAT16
    student = load_student(spec.model_copy(update={"lora": LoraSpec(r=2)}))
    assert {p.dtype for p in student.parameters() if not p.requires_grad} == {BFLOAT16}


def test_the_choice_is_logged_once(
    tiny_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    processor: Processor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, dtypes.__name__)
    slow, fast = (save(tiny_model, tmp_path / name, dtype) for name, dtype in (("a", BFLOAT16), ("b", FLOAT32)))
    processor(avx=False, amx=False)
    for spec in (slow, fast, slow):
        load_ends(spec)
        load_teacher(spec)
    first, second = [record for record in caplog.records if "dtype auto" in record.message]
    assert (first.levelname, second.levelname) == ("WARNING", "INFO")
    assert f"'{slow.model}': the checkpoint is bfloat16" in first.message
    assert "dtype auto is float32; set dtype: bfloat16" in first.message
    assert f"'{fast.model}': dtype auto is float32, the checkpoint's own" in second.message


def test_a_teacher_cache_is_bound_to_the_type_that_was_computed_in(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_bpe_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    processor: Processor,
) -> None:
    spec = save(tiny_model, tmp_path / "teacher", BFLOAT16).model_copy(update={"device": None})
    tiny_bpe_tokenizer.save_pretrained(tmp_path / "teacher")
    spec = ModelSpec.model_validate({**spec.model_dump(), "device": "cpu", "cache": str(tmp_path / "cache")})
    examples = read_examples([{"prompt": "Say hi.\n", "response": "hi"}])
    processor(avx=True, amx=True)
    key = cache_teacher(spec, examples, tokenizer=tiny_bpe_tokenizer, max_length=32).cache.key
    assert (key.compute_dtype, key.storage_dtype) == ("bfloat16", "bfloat16")
    processor(avx=False, amx=False)
    with pytest.raises(UserError, match=r"stale: it was written with other teacher\.dtype \(bfloat16, now float32\)"):
        cache_teacher(spec, examples, tokenizer=tiny_bpe_tokenizer, max_length=32)
    stated = spec.model_copy(update={"dtype": "bfloat16"})
    assert cache_teacher(stated, examples, tokenizer=tiny_bpe_tokenizer, max_length=32).cache.key == key
