"""A stand-in for the package ``vllm``: the calls and shapes of its 0.11+ ``LLM``, computed by transformers row by row.

Only what is used of it exists here, with vLLM's names, defaults and complaints, so a misspelled argument fails.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM


class TokensPrompt(dict[str, Any]):
    """A ``TypedDict`` there."""


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    detokenize: bool = True
    logit_bias: dict[int, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        assert 0 < self.top_p <= 1
        assert self.seed is None or 0 <= self.seed < 2**63


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: str | None
    stop_reason: int | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt: str | None = None
    finished: bool = True


@dataclass
class Calls:
    """What the tests look at."""

    models: list[dict[str, Any]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    fail_to_load: str = ""
    finish_reason: str = ""


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put the stand-in where ``import vllm`` finds it."""
    calls = Calls()

    class LLM:
        def __init__(
            self,
            model: str,
            *,
            skip_tokenizer_init: bool = False,
            trust_remote_code: bool = False,
            dtype: str = "auto",
            revision: str | None = None,
            max_model_len: int | None = None,
            generation_config: str = "auto",
        ) -> None:
            if calls.fail_to_load:
                raise RuntimeError(calls.fail_to_load)
            given = dict(locals())
            calls.models.append({name: given[name] for name in given if name not in ("self", "calls")})
            # Really float64, like the tests' models, so that no near tie is decided by a batch's shape.
            self.model: Any = AutoModelForCausalLM.from_pretrained(model).double().eval()
            self.max_model_len, self.skips_tokenizer = max_model_len, skip_tokenizer_init

        def generate(
            self,
            prompts: Sequence[TokensPrompt],
            sampling_params: Sequence[SamplingParams],
            *,
            use_tqdm: bool = True,
        ) -> list[RequestOutput]:
            assert len(prompts) == len(sampling_params)
            calls.batches.append(len(prompts))
            return [
                self._answer(str(number), prompt, params)
                for number, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True))
            ]

        def _answer(self, request: str, prompt: TokensPrompt, params: SamplingParams) -> RequestOutput:
            calls.params.append(params)
            assert list(prompt) == ["prompt_token_ids"]
            assert not (self.skips_tokenizer and params.detokenize), "there is no tokenizer to detokenize with"
            ids = list(prompt["prompt_token_ids"])
            if len(ids) + (params.max_tokens or 0) > self.max_model_len:
                raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length.")
            found = _generate(self.model, ids, params)
            stopped = bool(found) and found[-1] in (params.stop_token_ids or [])
            reason = calls.finish_reason or ("stop" if stopped else "length")
            completion = CompletionOutput(0, "", found, reason, found[-1] if stopped else None)
            return RequestOutput(request, ids, [completion])

    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    for part in (LLM, SamplingParams, TokensPrompt):
        setattr(module, part.__name__, part)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return calls


def _generate(model: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    assert params.ignore_eos, "the tokenizer's end token must be among stop_token_ids"
    generator = None if params.seed is None else torch.Generator().manual_seed(params.seed)
    assert params.temperature == 0 or generator is not None, "an unseeded sample cannot be repeated"
    found: list[int] = []
    while len(found) < (params.max_tokens or 0):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + found])).logits[0, -1]
        for token, bias in (params.logit_bias or {}).items():
            assert 0 <= token < len(logits), "out-of-vocab token id"
            logits[token] += bias
        found.append(int(logits.argmax()) if params.temperature == 0 else _sample(logits, params, generator))
        if found[-1] in (params.stop_token_ids or []):
            break
    return found


def _sample(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    probabilities, order = (logits / params.temperature).softmax(dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities * (before < params.top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
