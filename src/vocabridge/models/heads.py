"""Output heads: from last hidden states to logits, as the model itself would do it.

Axes: V vocabulary of the tokenizer, V_model rows of the model's head (V_model >= V: some are padding), H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from vocabridge.errors import UserError

_MULTIPLYING_LOGITS_SCALING = {"hyperclovax"}


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """A model's head as plain tensors: ``cap(scale * (hidden @ weight.T + bias))``."""

    weight: torch.Tensor
    """``[V, H]`` in the model's dtype; a view of the parameter, so gradients reach it."""
    bias: torch.Tensor | None
    """``[V]`` or none."""
    soft_cap: float | None
    """Gemma 2's bound on the logits: ``soft_cap * tanh(logits / soft_cap)``."""
    logit_scale: float
    """Factor on the logits (Cohere, Granite); 1.0 for most models."""

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., V]`` of ``hidden_states [..., H]``, in float32 (float64 from float64 weights)."""
        logits = nn.functional.linear(hidden_states.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def output_head(model: nn.Module, vocab_size: int | None = None) -> OutputHead:
    """The head of a causal language model, wrapped by PEFT or not.

    Call it anew in each forward: tying, resizing and FSDP may replace the parameter.

    Args:
        model: a ``PreTrainedModel``, or a ``PeftModel`` around one.
        vocab_size: rows to keep (the tokenizer's :func:`vocabulary_size`); the rest of the rows is padding and would
            take probability mass. None keeps all rows.

    Raises:
        UserError: no head, a head changed by LoRA or quantised, or fewer rows than ``vocab_size``.
    """
    base = base_model(model)
    module = base.get_output_embeddings()
    weight = _plain_weight(module, type(base).__name__)
    bias = getattr(module, "bias", None)
    num_rows = weight.shape[0] if vocab_size is None else vocab_size
    if num_rows > weight.shape[0]:
        raise UserError(
            f"the tokenizer has {num_rows} ids but {type(base).__name__}'s head has {weight.shape[0]} rows; take the "
            "tokenizer that belongs to the model."
        )
    config = base.config.get_text_config()
    return OutputHead(
        weight=weight[:num_rows],
        bias=None if bias is None else bias[:num_rows],
        soft_cap=getattr(config, "final_logit_softcapping", None),
        logit_scale=_logit_scale(config),
    )


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside ``model``, which may be wrapped by PEFT."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel), f"expected a transformers model, got {type(inner).__name__}"
    return inner


def _plain_weight(module: nn.Module | None, model_name: str) -> torch.Tensor:
    if module is None:
        raise UserError(f"{model_name} has no language-model head; a causal language model is needed.")
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        # Its .weight is the frozen base weight: the adapter would be left out of the loss without a word.
        raise UserError("student.lora.target_modules includes the output head, which is not supported; leave it out.")
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if not weight.is_floating_point():
        raise UserError(f"{model_name}'s output head is quantised; keep the head in floating point.")
    return weight


def _logit_scale(config: PretrainedConfig) -> float:
    """The factor on the logits under the names that transformers gives it; :func:`check_head` finds what is missed."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite and MiniCPM3 divide by it
    return scale * scaling if config.model_type in _MULTIPLYING_LOGITS_SCALING else scale / scaling
