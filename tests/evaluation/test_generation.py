"""Batched generation against one-by-one generation, and what a seed promises."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from itertools import chain

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from transformers import GenerationConfig, PreTrainedModel

from vocabridge.errors import UserError
from vocabridge.evaluation.engine import Generation, GenerationSettings, OutputTokens
from vocabridge.evaluation.generation import InverseTransformSampling, TransformersEngine, length_buckets

VOCAB_SIZE = 61
END_IDS = (3, 7, 11, 12, 13)
GREEDY = GenerationSettings(max_new_tokens=12, temperature=0.0, batch_size=4)
SAMPLED = GenerationSettings(max_new_tokens=12, temperature=0.8, top_p=0.9, batch_size=4)


def _prompts(count: int = 11) -> list[list[int]]:
    random.seed(5)
    return [[random.randrange(8, VOCAB_SIZE) for _ in range(random.randint(1, 30))] for _ in range(count)]


def _run(
    model: PreTrainedModel,
    settings: GenerationSettings,
    *,
    seed: int = 10,
    prompts: list[list[int]] | None = None,
    end_token_ids: Sequence[int] = END_IDS,
    vocab_size: int = VOCAB_SIZE,
) -> list[Generation]:
    """All buckets of a file, in input order."""
    prompts = _prompts() if prompts is None else prompts
    engine = TransformersEngine(model, settings, OutputTokens(tuple(end_token_ids), vocab_size))
    buckets = [
        engine.generate(prompts, indices=indices, seed=seed)
        for indices in engine.batches([len(prompt) for prompt in prompts])
    ]
    return sorted(chain.from_iterable(buckets), key=lambda generation: generation.index)


def _alone(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Greedy decoding by whole forward passes: no cache, no padding, no batch."""
    ids = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in END_IDS:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_greedy_batches_equal_one_by_one_decoding_in_input_order(build: Callable[[int], PreTrainedModel]) -> None:
    model = build(VOCAB_SIZE)
    generations = _run(model, GREEDY)
    assert [generation.index for generation in generations] == list(range(11))
    assert [generation.token_ids for generation in generations] == [_alone(model, prompt) for prompt in _prompts()]
    lengths = {len(generation.token_ids) for generation in generations}
    assert len(lengths) > 1, "some responses must end early for the comparison to mean anything"
    assert all(generation.finished == (len(generation.token_ids) < 12) for generation in generations)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_batch_size_leaves_the_text_unchanged(settings: GenerationSettings) -> None:
    model = tiny_llama(VOCAB_SIZE)
    for batch_size in (1, 3, 11):
        assert _run(model, dataclasses.replace(settings, batch_size=batch_size)) == _run(model, settings)


def test_same_seed_same_text_and_other_seed_other_text() -> None:
    model = tiny_llama(VOCAB_SIZE)
    first = _run(model, SAMPLED, seed=10)
    torch.rand(3)  # the global generator plays no role
    assert _run(model, SAMPLED, seed=10) == first
    assert _run(model, SAMPLED, seed=11) != first


def test_equal_prompts_get_different_samples() -> None:
    model = tiny_llama(VOCAB_SIZE)
    texts = {tuple(generation.token_ids) for generation in _run(model, SAMPLED, prompts=[[9, 10, 14]] * 6)}
    assert len(texts) > 1


def test_sampling_takes_the_token_at_the_inverse_of_the_distribution() -> None:
    torch.manual_seed(0)
    scores = torch.randn(200, 9)
    scores[:, 4] = -torch.inf  # as top-p leaves it
    uniforms = torch.rand(200, 3, dtype=torch.float64)
    picked = InverseTransformSampling(uniforms, prompt_length=5)(torch.zeros(200, 6), scores).argmax(dim=-1).tolist()

    def expected(row: int) -> int:
        probabilities = [p.item() for p in scores[row].double().softmax(dim=-1)]
        total = 0.0
        for token, probability in enumerate(probabilities):
            total += probability
            if total > uniforms[row, 1].item():
                return token
        raise AssertionError

    assert picked == [expected(row) for row in range(200)]
    assert len(set(picked)) == 8


def test_sampled_frequencies_follow_temperature_and_nucleus() -> None:
    model = tiny_llama(VOCAB_SIZE)
    prompt, count = [9, 10, 14], 4000
    settings = GenerationSettings(max_new_tokens=1, temperature=0.7, top_p=0.6, batch_size=500)
    with torch.no_grad():
        full = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(dim=-1)
    order = full.argsort(descending=True)
    kept = order[: int((full[order].cumsum(dim=0) < 0.6).sum()) + 1]
    expected = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    expected[kept] = full[kept] / full[kept].sum()
    generations = _run(model, settings, prompts=[prompt] * count, end_token_ids=[VOCAB_SIZE - 1])
    tokens = [g.token_ids[0] if g.token_ids else VOCAB_SIZE - 1 for g in generations]
    observed = torch.bincount(torch.tensor(tokens), minlength=VOCAB_SIZE) / count
    assert len(kept) > 2
    assert set(tokens) <= set(kept.tolist())
    assert (observed - expected).abs().max() < 0.03  # four standard errors of a share of 0.5


def test_padding_rows_of_the_head_are_never_generated() -> None:
    model = tiny_llama(VOCAB_SIZE)
    everything = {token for generation in _run(model, SAMPLED) for token in generation.token_ids}
    assert max(everything) >= 30
    kept = {token for generation in _run(model, SAMPLED, vocab_size=30) for token in generation.token_ids}
    assert max(kept) < 30


def test_the_models_own_generation_defaults_are_set_aside_and_restored() -> None:
    model = tiny_llama(VOCAB_SIZE)
    plain = _run(model, GREEDY)
    defaults = GenerationConfig(repetition_penalty=5.0, max_length=3, num_beams=2, suppress_tokens=list(range(8, 40)))
    model.generation_config = defaults
    model.train()
    assert _run(model, GREEDY) == plain
    assert model.generation_config is defaults
    assert model.training


def test_a_lora_model_generates_and_keeps_its_defaults() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_llama(VOCAB_SIZE)
    plain, defaults = _run(base, GREEDY), base.generation_config
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).double()
    assert _run(wrapped, GREEDY) == plain  # a fresh adapter is the identity
    assert base.generation_config is defaults


def test_buckets_hold_every_row_once_longest_first() -> None:
    lengths = [5, 1, 9, 5, 2, 8, 7]
    buckets = length_buckets(lengths, 3)
    assert buckets == [[2, 5, 6], [0, 3, 4], [1]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("batch_size", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_impossible_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        GenerationSettings(**{field: value})
