"""Bits per byte against a direct computation in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vocabridge.errors import UserError
from vocabridge.evaluation.bits import ReferenceBits, row_bits
from vocabridge.text import Example, Message


def _example(prompt: str, response: str) -> Example:
    return Example(prompt, (Message("user", prompt),), response, (response,), "test")


EXAMPLES = [
    _example("What is it?\n", "A cat."),
    _example("Say hello in two scripts, please, and be quick about it.\n", "h\u00e9llo \u4f60\u597d \U0001f600"),
    _example("?\n", "one two three four five six seven eight nine ten"),
]


def reference_bits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: list[Example], **settings: int
) -> ReferenceBits:
    """The sums over all rows."""
    return ReferenceBits.of(row_bits(model, tokenizer, examples, **settings), len(examples))


def _direct(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, example: Example) -> float:
    """Bits of one response, token by token from full logits."""
    prompt_ids = tokenizer(example.prompt)["input_ids"]
    response_ids = [*tokenizer(example.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    total = 0.0
    for position, token_id in enumerate(response_ids):
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + response_ids[:position]])).logits[0, -1]
        total -= float(logits[: len(tokenizer)].double().log_softmax(dim=-1)[token_id]) / math.log(2)
    return total


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_bits_are_those_of_every_response_token_and_the_end_token(
    build: Callable[[int], PreTrainedModel], batch_size: int, tiny_bpe_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(len(tiny_bpe_tokenizer) + 37)  # a padded vocabulary takes no probability
    found = reference_bits(model, tiny_bpe_tokenizer, EXAMPLES, max_length=200, batch_size=batch_size)
    expected = sum(_direct(model, tiny_bpe_tokenizer, example) for example in EXAMPLES)
    assert found.bits == pytest.approx(expected, rel=1e-6)
    num_bytes = 6 + len("h\u00e9llo \u4f60\u597d \U0001f600".encode()) + 48
    assert (found.num_bytes, found.num_cut, found.num_skipped) == (num_bytes, 0, 0)
    assert found.per_byte == found.bits / num_bytes


def test_every_row_has_its_own_bits(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(len(tiny_bpe_tokenizer))
    too_long = _example("word " * 100, "yes")
    rows = row_bits(model, tiny_bpe_tokenizer, [EXAMPLES[0], too_long, *EXAMPLES[1:]], max_length=80, batch_size=2)
    expected = [_direct(model, tiny_bpe_tokenizer, example) for example in EXAMPLES]
    assert [row.bits for row in rows] == pytest.approx(expected, rel=1e-6)
    assert [row.num_bytes for row in rows] == [len(example.response.encode()) for example in EXAMPLES]
    assert [row.source for row in rows] == ["test"] * 3


def test_a_uniform_model_pays_the_logarithm_of_its_vocabulary_for_each_token(
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_llama(len(tiny_bpe_tokenizer))
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    found = reference_bits(model, tiny_bpe_tokenizer, EXAMPLES, max_length=200)
    num_tokens = sum(
        len(tiny_bpe_tokenizer(example.response, add_special_tokens=False)["input_ids"]) + 1 for example in EXAMPLES
    )
    assert found.num_tokens == num_tokens
    assert found.bits == pytest.approx(num_tokens * math.log2(len(tiny_bpe_tokenizer)), rel=1e-6)


def test_bytes_do_not_depend_on_the_tokenizer(
    tiny_bpe_tokenizer: PreTrainedTokenizerFast, tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = [
        reference_bits(tiny_llama(len(tokenizer)), tokenizer, EXAMPLES, max_length=200)
        for tokenizer in (tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    ]
    assert found[0].num_bytes == found[1].num_bytes
    assert found[0].num_tokens != found[1].num_tokens


def test_a_row_beyond_the_context_is_cut_or_skipped_and_counted(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(len(tiny_bpe_tokenizer))
    long_response = _example("?\n", "word " * 100)
    long_prompt = _example("word " * 100, "yes")
    found = reference_bits(model, tiny_bpe_tokenizer, [EXAMPLES[0], long_response, long_prompt], max_length=40)
    assert (found.num_cut, found.num_skipped) == (1, 1)
    assert 6 < found.num_bytes < 500
    with pytest.raises(UserError, match="no prompt leaves room"):
        reference_bits(model, tiny_bpe_tokenizer, [long_prompt], max_length=40)


def test_a_broken_model_is_refused(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(len(tiny_bpe_tokenizer))
    torch.nn.init.constant_(model.get_output_embeddings().weight, math.nan)
    with pytest.raises(UserError, match="no finite number"):
        reference_bits(model, tiny_bpe_tokenizer, EXAMPLES, max_length=200)
