"""Tiny random models of several families, built on the spot."""

from collections.abc import Callable

import pytest
import torch
import transformers

VOCAB_SIZE = 257
"""256 bytes and an end token."""

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
    # Larger than the usual 0.02, so that logits are far from 0 and a soft cap or a scale changes them.
    "initializer_range": 0.3,
}
_GEMMA = {"head_dim": 8, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, "sliding_window": 8}


def _config(family: str) -> transformers.PretrainedConfig:
    match family:
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
                bos_token_id=256, eos_token_id=256,
            )  # fmt: skip
        case "opt":
            return transformers.OPTConfig(
                vocab_size=VOCAB_SIZE, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, word_embed_proj_dim=12, init_std=0.3,
                pad_token_id=256, bos_token_id=256, eos_token_id=256,
            )  # fmt: skip
        case "llama":
            return transformers.LlamaConfig(**_SIZES, tie_word_embeddings=False)
        case "llama_tied":
            return transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True)
        case "qwen2":
            return transformers.Qwen2Config(**_SIZES)
        case "gemma2":
            return transformers.Gemma2Config(**_SIZES, **_GEMMA)
        case "gemma3":
            return transformers.Gemma3TextConfig(**_SIZES, **_GEMMA)
        case "cohere":
            return transformers.CohereConfig(**_SIZES, logit_scale=0.25)
        case "granite":
            return transformers.GraniteConfig(**_SIZES, logits_scaling=4.0)
    raise AssertionError(family)


@pytest.fixture
def tiny_model() -> Callable[..., transformers.PreTrainedModel]:
    """``tiny_model(family, **config changes)`` builds the same random model each time, in eval mode."""

    def build(family: str, **changes: object) -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        config = _config(family)
        for name, value in changes.items():
            setattr(config, name, value)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    return build
