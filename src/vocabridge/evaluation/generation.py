"""The transformers engine: prompts of similar length share a left-padded batch with a key-value cache.

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

from vocabridge.evaluation.engine import Generation, GenerationSettings, OutputTokens, cut_at_end
from vocabridge.models.heads import base_model


@dataclass(frozen=True, slots=True, eq=False)
class TransformersEngine:
    """A model in this process; dtype and device are kept."""

    model: PreTrainedModel
    settings: GenerationSettings
    tokens: OutputTokens

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Prompts of similar length, ``batch_size`` of them."""
        return length_buckets(lengths, self.settings.batch_size)

    def generate(self, prompts: Sequence[Sequence[int]], *, indices: Sequence[int], seed: int) -> list[Generation]:
        """Generate the responses to ``prompts[i]`` for every i in ``indices`` as one batch, until all have ended.

        The model's own generation defaults (penalties, top_k, ...) are not used.

        Args:
            prompts: token ids of all prompts of the file.
            indices: the rows of this batch.
            seed: of the sampling; unused when greedy.
        """
        pad_id = self.tokens.end_token_ids[0]
        batch = _left_padded([prompts[index] for index in indices], pad_id=pad_id, device=self.model.device)
        prompt_length = batch["input_ids"].shape[1]
        with inference(self.model):
            decode: Any = self.model.generate  # a PEFT wrapper has it too, unknown to the type checker
            output = decode(
                **batch,
                generation_config=GenerationConfig(
                    max_new_tokens=self.settings.max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=list(self.tokens.end_token_ids),
                    pad_token_id=pad_id,
                ),
                logits_processor=LogitsProcessorList(
                    [
                        PaddedVocabularyMask(self.tokens.vocab_size),
                        *self._sampling(indices, seed=seed, prompt_length=prompt_length),
                    ]
                ),
            )
        end_token_ids = frozenset(self.tokens.end_token_ids)
        rows = output[:, prompt_length:].tolist()
        return [cut_at_end(row, index, end_token_ids) for row, index in zip(rows, indices, strict=True)]

    def _sampling(self, indices: Sequence[int], *, seed: int, prompt_length: int) -> list[LogitsProcessor]:
        settings, device = self.settings, self.model.device
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


def _left_padded(prompts: Sequence[Sequence[int]], *, pad_id: int, device: torch.device) -> dict[str, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    input_ids = [[pad_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    attention_mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(attention_mask, device=device),
    }


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
