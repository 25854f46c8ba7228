"""Batched generation: prompts of similar length share a left-padded batch, with a key-value cache, greedy or sampled.

What is reproducible. A row's random numbers depend on the seed and on the row's index in the file alone, never on the
batch it is in, the device or the other rows: token t is the inverse of the cumulative distribution at a uniform number
drawn from ``(seed, row index)``. So an interrupted run resumes with the same text, and the batch size changes a text
only through rounding (padding and batch shape change the last bits of the logits, which can flip a near tie). Two
models evaluated with the same seed also share their random numbers, which takes noise out of their comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import UserError
from ..models.heads import base_model


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """How responses are generated.

    Attributes:
        max_new_tokens: most tokens of a response, the end token included.
        temperature: 0 is greedy decoding, which needs no seed; 1 samples from the model's own distribution.
        top_p: sample among the fewest tokens that hold this much probability; 1 is all of them.
        batch_size: prompts generated together.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not self.temperature >= 0:
            raise UserError(f"temperature must be 0 (greedy) or more, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], not {self.top_p}.")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Generation:
    """The response generated for one prompt.

    Attributes:
        index: the prompt's place in the input.
        token_ids: the response without its end token.
        finished: whether an end token came before ``max_new_tokens`` ran out.
    """

    index: int
    token_ids: list[int]
    finished: bool


class InverseTransformSampling(LogitsProcessor):
    """Samples with given uniform numbers: leaves one finite score a row, which greedy decoding then picks."""

    def __init__(self, uniforms: Tensor, *, prompt_length: int) -> None:
        """Keep the numbers.

        Args:
            uniforms: [rows, max_new_tokens] float in [0, 1), on the model's device.
            prompt_length: tokens of the padded prompt; the position beyond it uses ``uniforms[:, 0]``.
        """
        self.uniforms = uniforms
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary] -> 0 at the sampled token and -inf elsewhere."""
        cumulative = torch.softmax(scores.to(self.uniforms.dtype), dim=-1).cumsum(dim=-1)
        threshold = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None] * cumulative[:, -1:]
        # The first token whose cumulative probability exceeds the threshold, so never one of probability 0.
        sampled_ids = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, sampled_ids, 0.0)


class PaddedVocabularyMask(LogitsProcessor):
    """Rules out the ids beyond the tokenizer's: padding rows of the head that were never trained."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary] -> the same with -inf on padding."""
        scores[:, self.vocab_size :] = -torch.inf
        return scores


def length_buckets(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices packed into batches of similar length, longest first so that memory runs out at once or never.

    >>> length_buckets([3, 9, 4, 8, 1], 2)
    [[1, 3], [2, 0], [4]]
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate_bucket(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    indices: Sequence[int],
    settings: GenerationSettings,
    seed: int,
    end_token_ids: Sequence[int],
    vocab_size: int,
) -> list[Generation]:
    """Generate the responses to ``prompts[i]`` for every i in ``indices`` as one batch.

    Args:
        model: a causal language model; its dtype and device are kept, and its own generation defaults (penalties,
            top_k, ...) are not used.
        prompts: token ids of all prompts of the file.
        indices: the rows of this batch.
        settings: length, temperature and nucleus.
        seed: of the sampling; unused when greedy.
        end_token_ids: any of these ends a response.
        vocab_size: ids of the tokenizer; a larger head is padding there.
    """
    batch = _left_padded([prompts[index] for index in indices], pad_id=end_token_ids[0], device=model.device)
    prompt_length = batch["input_ids"].shape[1]
    with inference(model):
        decode: Any = model.generate  # a PEFT wrapper has it too, unknown to the type checker
        output = decode(
            **batch,
            generation_config=GenerationConfig(
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=list(end_token_ids),
                pad_token_id=end_token_ids[0],
            ),
            logits_processor=LogitsProcessorList(
                [
                    PaddedVocabularyMask(vocab_size),
                    *_sampling(settings, indices, seed=seed, prompt_length=prompt_length, device=model.device),
                ]
            ),
        )
    rows = output[:, prompt_length:].tolist()
    return [_cut_at_end(row, index, frozenset(end_token_ids)) for row, index in zip(rows, indices, strict=True)]


def _left_padded(prompts: Sequence[Sequence[int]], *, pad_id: int, device: torch.device) -> dict[str, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    input_ids = [[pad_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    attention_mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(attention_mask, device=device),
    }


def _sampling(
    settings: GenerationSettings, indices: Sequence[int], *, seed: int, prompt_length: int, device: torch.device
) -> list[LogitsProcessor]:
    if settings.greedy:
        return []
    processors: list[LogitsProcessor] = []
    if settings.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    draws = np.stack([np.random.default_rng((seed, index)).random(settings.max_new_tokens) for index in indices])
    # Apple's devices have no float64; elsewhere it keeps a 262k-entry cumulative sum exact enough.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    uniforms = torch.from_numpy(draws).to(dtype=dtype, device=device)
    processors.append(InverseTransformSampling(uniforms, prompt_length=prompt_length))
    return processors


def _cut_at_end(token_ids: list[int], index: int, end_token_ids: frozenset[int]) -> Generation:
    for position, token_id in enumerate(token_ids):
        if token_id in end_token_ids:
            return Generation(index, token_ids[:position], finished=True)
    return Generation(index, token_ids, finished=False)


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradient, and none of the generation defaults that a checkpoint brings along."""
    # A PEFT wrapper copies its own generation defaults into the model it wraps, so both are set aside and restored.
    holders = (model, base_model(model))
    own_defaults = [holder.generation_config for holder in holders]
    was_training = model.training
    model.eval()
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        with torch.inference_mode():
            yield
    finally:
        for holder, defaults in zip(holders, own_defaults, strict=True):
            holder.generation_config = defaults
        model.train(was_training)
