"""A student and a teacher with different tokenizers and widths, small enough to train inside a test."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ROWS = [
    {"prompt": "What is the capital of France?\n", "response": "The capital of France is Paris."},
    {"prompt": "Wer lernt?\n", "response": "Der Schüler lernt von der Lehrerin."},
    {"prompt": "Who jumps?\n", "response": "The quick brown fox jumps over the lazy dog 😀"},
    {
        "prompt": "How do I cook rice?\n",
        "response": "First boil the water. Then add the rice, and wait for 20 minutes.",
    },
    {"prompt": "什么跳过了懒狗?\n", "response": "敏捷的棕色狐狸跳过了懒狗。"},
    {"prompt": "What does a model learn?\n", "response": "A language model learns to predict the next token."},
    {"prompt": "Add two numbers.\n", "response": "def add(a, b):\n    return a + b"},
    {"prompt": "Qui apprend?\n", "response": "Les élèves apprennent à l'école."},
]

OBJECTIVE_SETTINGS: dict[str, dict[str, object]] = {"dskd_cma": {"gan": {"hidden_size": 16}}}
"""Instead of an objective's defaults, where those are larger than the vocabularies of the tests."""


def student_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def teacher_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 1) -> MistralForCausalLM:
    torch.manual_seed(seed)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_pair(folder: Path, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> None:
    """Both models with their tokenizers, in the folders ``student`` and ``teacher``."""
    save(folder / "student", student_model(student), student)
    save(folder / "teacher", teacher_model(teacher), teacher)
