"""The vLLM engine against the transformers engine, on a stand-in for the package."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerFast

import fake_vllm
import vocabridge.evaluation.evaluate as evaluation
from fake_vllm import Calls
from vocabridge.errors import UserError
from vocabridge.evaluation import vllm_engine
from vocabridge.evaluation.engine import Generation, GenerationSettings, OutputTokens
from vocabridge.evaluation.evaluate import evaluate_model
from vocabridge.evaluation.generation import TransformersEngine
from vocabridge.evaluation.vllm_engine import VllmEngine, VllmModel, check_vllm, row_seed
from vocabridge.models.spec import ModelSpec

TOKENS = OutputTokens((3, 7, 11, 12, 13), vocab_size=61)
PROMPTS = [[9 + (3 * row + place) % 50 for place in range(1 + 5 * row)] for row in range(5)]
GREEDY = GenerationSettings(max_new_tokens=12, temperature=0.0)
SAMPLED = GenerationSettings(max_new_tokens=12, temperature=0.8, top_p=0.9)
ROWS = [{"prompt": f"{word}?\n", "response": word} for word in ("the", "cat", "sat", "on a mat", "then")]

Built = Callable[..., VllmEngine]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def engine(tmp_path: Path, calls: Calls) -> Built:
    """``engine(settings)``: of a model whose head has three rows of padding."""
    model = tiny_llama(64)
    model.save_pretrained(tmp_path / "model")

    def build(settings: GenerationSettings, *, max_length: int = 33) -> VllmEngine:
        served = VllmModel(ModelSpec(model=str(tmp_path / "model")), "float32", num_logits=64)
        return VllmEngine(served, settings=settings, tokens=TOKENS, max_length=max_length)

    return build


@pytest.fixture
def student(tmp_path: Path, tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> ModelSpec:
    tiny_llama(len(tiny_bpe_tokenizer)).float().save_pretrained(tmp_path / "student")
    tiny_bpe_tokenizer.save_pretrained(tmp_path / "student")
    return ModelSpec(model=str(tmp_path / "student"))


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [str(path)]


def generate(engine: Any, *, seed: int = 1, indices: list[int] | None = None) -> list[Generation]:
    return engine.generate(PROMPTS, indices=list(range(5)) if indices is None else indices, seed=seed)


def test_greedy_answers_are_those_of_transformers(engine: Built) -> None:
    expected = generate(TransformersEngine(tiny_llama(64), GREEDY, TOKENS))
    assert generate(engine(GREEDY)) == expected
    assert {generation.finished for generation in expected} == {True, False}, "both ends must be seen"


def test_answers_come_in_the_order_that_was_asked_for(engine: Built) -> None:
    whole = {generation.index: generation for generation in generate(engine(SAMPLED))}
    assert generate(engine(SAMPLED), indices=[3, 0]) == [whole[3], whole[0]]


def test_a_row_is_sampled_alike_whatever_else_is_generated(engine: Built, calls: Calls) -> None:
    first = generate(engine(SAMPLED), seed=1)
    assert generate(engine(SAMPLED), seed=1) == first
    assert generate(engine(SAMPLED), seed=2) != first
    assert (calls.params[0].temperature, calls.params[0].top_p, calls.params[0].max_tokens) == (0.8, 0.9, 12)


def test_every_row_and_seed_has_a_seed_of_its_own() -> None:
    seeds = {row_seed(seed, index) for seed in range(5) for index in range(200)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert row_seed(10, 3) == row_seed(10, 3)


def test_padding_rows_of_the_head_are_never_generated(engine: Built, calls: Calls) -> None:
    sampled = [token for seed in range(4) for row in generate(engine(SAMPLED), seed=seed) for token in row.token_ids]
    assert max(sampled) < 61
    assert set(calls.params[0].logit_bias or {}) == {61, 62, 63}


def test_the_model_starts_once_and_only_when_needed(engine: Built, calls: Calls, tmp_path: Path) -> None:
    built = engine(GREEDY)
    assert calls.models == []
    generate(built)
    generate(built, indices=[1])
    assert calls.models == [
        {
            "model": str(tmp_path / "model"),
            "skip_tokenizer_init": True,
            "trust_remote_code": False,
            "dtype": "float32",
            "revision": None,
            "max_model_len": 33,
            "generation_config": "vllm",
        }
    ]


def test_rows_go_in_large_batches_as_they_come(engine: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "ROWS_AT_ONCE", 3)
    assert engine(GREEDY).batches([5, 1, 9, 9, 2, 7, 1]) == [[0, 1, 2], [3, 4, 5], [6]]


def test_what_goes_wrong_is_one_sentence(engine: Built, calls: Calls) -> None:
    with pytest.raises(UserError, match=r"vllm refuses to generate: temperature must be in \[0, 2\], got 3"):
        generate(engine(GenerationSettings(temperature=3.0)))
    calls.finish_reason = "abort"
    with pytest.raises(UserError, match=r"vllm gave up on prompt 0 \(abort\)"):
        generate(engine(GREEDY))
    calls.fail_to_load = "Engine core\ninitialization failed."
    with pytest.raises(UserError, match=r"vllm cannot load '.*/model': Engine core initialization failed\."):
        generate(engine(GREEDY))


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_an_evaluation_scores_alike_and_resumes(
    student: ModelSpec, data: list[str], tmp_path: Path, calls: Calls
) -> None:
    settings = {"seeds": [3], "max_new_tokens": 4, "temperature": 0.0}
    plain = evaluate_model(student, data, output_dir=tmp_path / "plain", **settings)
    served = evaluate_model(student, data, output_dir=tmp_path / "served", engine="vllm", **settings)
    assert served.files == plain.files
    assert (calls.batches, calls.models[0]["dtype"]) == ([5], "float32")
    again = evaluate_model(student, data, output_dir=tmp_path / "served", engine="vllm", **settings)
    assert again == served
    assert len(calls.models) == 1, "nothing is left to generate, so vLLM is not started"
    with pytest.raises(UserError, match=r"engine \(vllm there, None now\)"):
        evaluate_model(student, data, output_dir=tmp_path / "served", **settings)


def test_the_model_is_dropped_before_vllm_starts(
    student: ModelSpec, data: list[str], tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    load, start = evaluation.load_model, VllmEngine._start

    def remember(spec: ModelSpec) -> Any:
        model = load(spec)
        models.append(weakref.ref(model))
        return model

    def started(self: VllmEngine) -> Any:
        llm = start(self)
        assert [model() for model in models] == [None]
        return llm

    monkeypatch.setattr(evaluation, "load_model", remember)
    monkeypatch.setattr(VllmEngine, "_start", started)
    evaluate_model(student, data, output_dir=tmp_path / "out", seeds=[3], max_new_tokens=4, engine="vllm")
    assert len(models) == 1


def test_room_is_made_for_the_longest_prompt(
    student: ModelSpec, tmp_path: Path, calls: Calls, tiny_bpe_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": "word " * 400 + "end\n", "response": "a"}, {"prompt": "short\n", "response": "b"}]
    for name, chosen in (("long", rows), ("short", rows[1:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        evaluate_model(student, [str(path)], output_dir=tmp_path / name, seeds=[3], max_new_tokens=4, engine="vllm")
    short = len(tiny_bpe_tokenizer("short\n", add_special_tokens=False)["input_ids"])
    assert [model["max_model_len"] for model in calls.models] == [256, short + 4]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_without_the_package_nothing_is_loaded(
    student: ModelSpec, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(evaluation, "load_model", lambda spec: pytest.fail("too late"))
    with pytest.raises(UserError, match=r"engine vllm needs the package vllm; install it \(pip install"):
        evaluate_model(student, data, output_dir=tmp_path / "out", engine="vllm")


def test_specs_that_vllm_cannot_serve_are_refused(student: ModelSpec, tmp_path: Path, calls: Calls) -> None:
    check_vllm(student)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="does not read the GGUF file"):
        check_vllm(ModelSpec(model=str(tmp_path / "m.gguf")))
    for change, words in ({"quantization": "4bit"}, "quantization"), ({"device": "cpu"}, "chooses its device itself"):
        with pytest.raises(UserError, match=words):
            check_vllm(student.model_copy(update=change))
    with pytest.raises(UserError, match="in one process"):
        check_vllm(student, num_processes=2)
    (Path(student.model) / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it into its base model"):
        check_vllm(student)
    with pytest.raises(UserError, match=r"does not run '.*' in float64; set dtype"):
        VllmModel.like(tiny_llama(30).to(torch.float64), student)
