"""The vLLM engine: continuous batching and a shared prefix cache, in vLLM's own process and with its own kernels.

Random numbers are vLLM's, drawn from a seed of each row's own, so a text does not depend on which rows are generated
together, but it is another text than the transformers engine gives for the same seed.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from vocabridge.errors import UserError, one_line
from vocabridge.evaluation.engine import Generation, GenerationSettings, OutputTokens, cut_at_end
from vocabridge.models.checkpoint import find_checkpoint
from vocabridge.models.dtypes import dtype_name
from vocabridge.models.spec import Dtype, ModelSpec

ROWS_AT_ONCE = 1024
"""vLLM packs batches itself; this many answers are lost at most when a run is interrupted."""

_NEVER = -100.0
"""Added to a logit: e^-100 of the probability is none."""


@dataclass(frozen=True, slots=True)
class VllmModel:
    """What vLLM must know to load the model that transformers loads from the same spec."""

    spec: ModelSpec
    dtype: str
    """Type of the weights, such as ``bfloat16``."""
    num_logits: int
    """Rows of the head."""

    @classmethod
    def like(cls, model: PreTrainedModel, spec: ModelSpec) -> VllmModel:
        """The same weights in the same type as ``model``, which was loaded from ``spec`` and can then be dropped.

        Raises:
            UserError: a type that vLLM does not know.
        """
        dtype = dtype_name(model.dtype)
        if dtype not in get_args(Dtype):
            raise UserError(f"engine vllm does not run '{spec.model}' in {dtype}; set dtype to float32 or bfloat16.")
        return cls(spec, dtype, model.config.get_text_config().vocab_size)


def check_vllm(spec: ModelSpec, *, num_processes: int = 1) -> None:
    """Refuse at once what would fail after the model has been loaded and the data read.

    Raises:
        UserError: vLLM is not installed, or the spec asks for what it cannot do.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine vllm needs the package vllm; install it (pip install 'vocabridge[vllm]') or use transformers."
        )
    if num_processes > 1:
        raise UserError("engine vllm batches in one process; start the command without a launcher.")
    checkpoint = find_checkpoint(spec.model)
    if checkpoint.gguf_file is not None:
        raise UserError(f"engine vllm does not read the GGUF file '{spec.model}'; use the transformers engine.")
    if checkpoint.is_local and (Path(checkpoint.name) / "adapter_config.json").is_file():
        raise UserError(f"engine vllm does not read the adapter '{spec.model}'; merge it into its base model first.")
    if spec.quantization is not None:
        raise UserError("engine vllm does not go with quantization; remove one of the two.")
    if spec.device is not None:
        raise UserError("engine vllm chooses its device itself; leave device out (CUDA_VISIBLE_DEVICES restricts it).")


class VllmEngine:
    """Starts vLLM when the first prompt is to be answered: a finished run does not wait for it.

    Args:
        model: what it loads.
        settings: length, temperature and nucleus.
        tokens: what may be generated.
        max_length: tokens of the longest prompt and its response together; vLLM reserves memory by it.
    """

    def __init__(self, model: VllmModel, *, settings: GenerationSettings, tokens: OutputTokens, max_length: int):
        self.model, self.settings, self.tokens, self.max_length = model, settings, tokens, max_length
        self._llm: Any = None

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows as they come, many at once."""
        rows = list(range(len(lengths)))
        return [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]

    def generate(self, prompts: Sequence[Sequence[int]], *, indices: Sequence[int], seed: int) -> list[Generation]:
        """The responses to ``prompts[i]`` for every i in ``indices``.

        Raises:
            UserError: vLLM cannot load the model, refuses a setting or gives up on a prompt.
        """
        import vllm

        self._llm = self._llm or self._start()
        try:
            outputs = self._llm.generate(
                [vllm.TokensPrompt(prompt_token_ids=list(prompts[index])) for index in indices],
                [self._sampling_params(seed, index) for index in indices],
                use_tqdm=False,
            )
        except ValueError as error:  # such as a temperature above 2
            raise UserError(f"vllm refuses to generate: {error}") from error
        return [self._generation(output.outputs[0], index) for output, index in zip(outputs, indices, strict=True)]

    def _start(self) -> Any:
        import vllm

        gc.collect()  # what transformers held has been dropped, and vLLM measures the free memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        spec = self.model.spec
        try:
            return vllm.LLM(
                model=find_checkpoint(spec.model).name,
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
                dtype=self.model.dtype,
                max_model_len=self.max_length,
                skip_tokenizer_init=True,  # prompts are token ids already, and so are the answers
                generation_config="vllm",  # none of the defaults that a checkpoint brings along
            )
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            raise UserError(f"vllm cannot load '{spec.model}': {one_line(error)}") from error

    def _sampling_params(self, seed: int, index: int) -> Any:
        import vllm

        padding = range(self.tokens.vocab_size, self.model.num_logits)
        return vllm.SamplingParams(
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            max_tokens=self.settings.max_new_tokens,
            seed=None if self.settings.greedy else row_seed(seed, index),
            stop_token_ids=list(self.tokens.end_token_ids),
            ignore_eos=True,  # the checkpoint's own end token; ours are those above
            logit_bias=dict.fromkeys(padding, _NEVER) or None,
            detokenize=False,
        )

    def _generation(self, completion: Any, index: int) -> Generation:
        reason = completion.finish_reason
        if reason not in ("stop", "length"):
            raise UserError(f"vllm gave up on prompt {index} ({reason}).")
        # The end token is among the ids, also where the last of max_new_tokens is one and the reason is "length".
        return cut_at_end(list(completion.token_ids), index, frozenset(self.tokens.end_token_ids))


def row_seed(seed: int, index: int) -> int:
    """A seed for one row, different for every seed and row (but for chance), below 2^32."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
