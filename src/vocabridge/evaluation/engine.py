"""What turns prompts into responses, whatever runs the model: settings, result and the interface of an engine.

Engines: ``generation`` (transformers, always there) and ``vllm_engine`` (when vLLM is installed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vocabridge.errors import UserError
from vocabridge.models.spec import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """How responses are generated.

    Attributes:
        max_new_tokens: most tokens of a response, the end token included.
        temperature: 0 is greedy decoding, which needs no seed; 1 samples from the model's own distribution.
        top_p: sample among the fewest tokens that hold this much probability; 1 is all of them.
        batch_size: prompts generated together; vLLM finds its own.
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
class OutputTokens:
    """Which token ids a response may hold, and which end it."""

    end_token_ids: tuple[int, ...]
    """Any of these ends a response."""
    vocab_size: int
    """Ids of the tokenizer; a larger head is padding there, which is never generated."""


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


class GenerationEngine(Protocol):
    """A model that is ready to answer; its random numbers depend on seed and row index alone, not on the batch."""

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Prompts to give to :meth:`generate` together, as indices, from the prompts' lengths in tokens."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], *, indices: Sequence[int], seed: int) -> list[Generation]:
        """The responses to ``prompts[i]`` for every i in ``indices``, in that order."""
        ...


def cut_at_end(token_ids: Sequence[int], index: int, end_token_ids: frozenset[int]) -> Generation:
    """What was generated, up to the first end token."""
    for position, token_id in enumerate(token_ids):
        if token_id in end_token_ids:
            return Generation(index, list(token_ids[:position]), finished=True)
    return Generation(index, list(token_ids), finished=False)


def engine_settings(engine: Engine) -> dict[str, str]:
    """What a manifest says of the engine: nothing of transformers, like the folders from before there was a choice."""
    return {} if engine == "transformers" else {"engine": engine}
