"""Small models of several families and a batch with chunks, for objectives that read inner layers."""

from __future__ import annotations

import torch
import transformers

VOCAB_SIZES = {"student": 61, "teacher": 83}
PROMPT_LENGTHS = {"student": (3, 1, 4), "teacher": (2, 5, 2)}

CHUNK_IDS = {
    "student": ((0, 0, 1, -1, 2, 3, 3), (0, 1, 2), (-1, -1)),
    "teacher": ((0, 1, 1, 2, -1, 3), (0, 0, 1, 2, 2), (-1,)),
}
"""Per example and supervised position; the third example has no chunk."""

NUM_TOKENS = 7 + 3 + 2
"""Supervised student positions."""


def chunk_positions(side: str) -> list[list[list[int]]]:
    """By example, then chunk: its positions among the packed ones of this side."""
    found, offset = [], 0
    for ids in CHUNK_IDS[side]:
        found.append([[offset + i for i, chunk in enumerate(ids) if chunk == k] for k in range(max(ids) + 1)])
        offset += len(ids)
    return found


def batch() -> dict[str, torch.Tensor]:
    """A right-padded PairBatch of three examples."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for side, prefix in (("student", ""), ("teacher", "teacher_")):
        lengths = [p + len(ids) for p, ids in zip(PROMPT_LENGTHS[side], CHUNK_IDS[side], strict=True)]
        shape = (len(lengths), max(lengths))
        ids = torch.randint(1, VOCAB_SIZES[side], shape, generator=generator)
        mask = (torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]).long()
        is_prompt = torch.arange(shape[1])[None] < torch.tensor(PROMPT_LENGTHS[side])[:, None]
        longest = max(map(len, CHUNK_IDS[side]))
        tensors |= {
            f"{prefix}input_ids": ids * mask,
            f"{prefix}attention_mask": mask,
            f"{prefix}labels": torch.where(is_prompt | (mask == 0), -100, ids),
            f"{prefix}chunk_ids": torch.tensor([[*row, *[-1] * (longest - len(row))] for row in CHUNK_IDS[side]]),
        }
    return tensors


def model(family: str, side: str, *, num_layers: int = 3, seed: int = 0) -> transformers.PreTrainedModel:
    """A random ``gpt2``, ``llama`` or ``gemma3`` of width 16 (student) or 24 (teacher), in float64 and eval mode."""
    torch.manual_seed(seed)
    width = {"student": 16, "teacher": 24}[side]
    sizes = {
        "vocab_size": VOCAB_SIZES[side],
        "hidden_size": width,
        "intermediate_size": 20,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCAB_SIZES[side], n_embd=width, n_layer=num_layers, n_head=4, n_positions=32,
            initializer_range=0.3, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
            bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        ),
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **sizes, head_dim=8, query_pre_attn_scalar=8, layer_types=["full_attention"] * num_layers
        ),
    }[family]()  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()
