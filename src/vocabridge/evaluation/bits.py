"""Bits per byte of the reference responses: what a model pays to spell them, comparable across tokenizers.

    bits per byte = - sum over rows of log2 p(response tokens, end token | prompt) / sum over rows of UTF-8 bytes

The end token counts in the numerator (a model should know when to stop) and has no bytes. The first reference of each
row counts. No sampling is involved, so it is far less noisy than ROUGE-L. A row that does not fit into the context is
cut like a training row: the tokens that fit and their bytes count, its end token does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vocabridge.errors import UserError
from vocabridge.evaluation.generation import inference, length_buckets
from vocabridge.losses.chunked_head import HeadInput, token_log_probs
from vocabridge.models.forward import forward_side
from vocabridge.models.loading import vocabulary_size
from vocabridge.pairs import IGNORE_INDEX, PairTokenizer, TokenizedSide
from vocabridge.prompts import Template
from vocabridge.ranks import Ranks
from vocabridge.text import Example


@dataclass(frozen=True, slots=True)
class RowBits:
    """What a model pays for the reference of one row; fields as in :class:`ReferenceBits`.

    Attributes:
        source: where the row came from (``test.jsonl:12``).
        cut: it was cut to the context.
    """

    source: str
    bits: float
    num_bytes: int
    num_tokens: int
    cut: bool


@dataclass(frozen=True, slots=True)
class ReferenceBits:
    """What a model pays for the references of a file.

    Attributes:
        bits: negative log2-probability of the supervised tokens, end tokens included.
        num_bytes: UTF-8 bytes of the responses.
        num_tokens: supervised tokens.
        num_cut: rows that were cut to the context.
        num_skipped: rows whose prompt leaves no room for a response, or that no token stands for.
    """

    bits: float
    num_bytes: int
    num_tokens: int
    num_cut: int
    num_skipped: int

    @classmethod
    def of(cls, rows: Sequence[RowBits], num_examples: int) -> ReferenceBits:
        """The sums over the rows that fit, of so many."""
        return cls(
            bits=math.fsum(row.bits for row in rows),
            num_bytes=sum(row.num_bytes for row in rows),
            num_tokens=sum(row.num_tokens for row in rows),
            num_cut=sum(row.cut for row in rows),
            num_skipped=num_examples - len(rows),
        )

    @property
    def per_byte(self) -> float:
        """Bits per UTF-8 byte."""
        return self.bits / self.num_bytes


def row_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    template: Template = "plain",
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda num_rows: None,
    ranks: Ranks | None = None,
) -> list[RowBits]:
    """Bits of the examples' responses under the model, row by row; batch size and padding change rounding only.

    Args:
        model: a causal language model; its dtype and device are kept, log-probabilities are taken in float32.
        tokenizer: the model's.
        examples: rows with a response.
        max_length: most tokens of prompt and response together.
        template: how prompts are rendered.
        batch_size: rows of one forward pass.
        on_batch: called with the number of rows after each forward pass.
        ranks: the processes that share the batches; all get the result.

    Returns:
        Rows whose prompt leaves no room for a response, or that no token stands for, are not among them.

    Raises:
        UserError: no row fits, or the model gives a probability that is no number.
    """
    tokenize = PairTokenizer(tokenizer, student_template=template, max_length=max_length)
    pairs = [(example.source, pair) for example in examples if (pair := tokenize(example)) is not None]
    sides = [pair.student for _, pair in pairs]
    if not sides:
        raise UserError(f"no prompt leaves room for a response within {max_length} tokens, the context of the model.")
    vocab_size = vocabulary_size(tokenizer)
    batches = length_buckets([len(side.input_ids) for side in sides], batch_size)

    def log_probs(indices: Sequence[int]) -> list[float]:
        return _log_probs(model, [sides[index] for index in indices], vocab_size=vocab_size)

    ranks = ranks or Ranks()
    known = [0.0] * len(sides)
    for place, values in ranks.spread(batches, log_probs):
        for index, value in zip(batches[place], values, strict=True):
            known[index] = value
        on_batch(len(batches[place]))
    per_row = ranks.on_first(lambda: known)
    if not all(map(math.isfinite, per_row)):
        raise UserError(
            "the model gives the references a log-probability that is no finite number; its weights are broken."
        )
    return [
        RowBits(
            source,
            bits=-log_prob / math.log(2),
            num_bytes=int(pair.student.spans[:, 1].max()),
            num_tokens=len(pair.student.spans),
            cut=pair.truncated,
        )
        for (source, pair), log_prob in zip(pairs, per_row, strict=True)
    ]


def _log_probs(model: PreTrainedModel, sides: Sequence[TokenizedSide], *, vocab_size: int) -> list[float]:
    """Natural log-probability of the supervised tokens of each row of one batch."""
    rows = [torch.tensor(side.input_ids) for side in sides]
    with inference(model):
        side = forward_side(
            model,
            _right_padded(rows, 0).to(model.device),
            _right_padded([torch.ones_like(row) for row in rows], 0).to(model.device),
            _right_padded([torch.tensor(side.labels) for side in sides], IGNORE_INDEX).to(model.device),
            vocab_size=vocab_size,
        )
        head = HeadInput(
            side.hidden_states,
            side.head.weight,
            side.head.bias,
            soft_cap=side.head.soft_cap,
            logit_scale=side.head.logit_scale,
        )
        log_probs = token_log_probs(head, side.labels)
    return [math.fsum(row.tolist()) for row in log_probs.split([len(side.spans) for side in sides])]


def _right_padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
