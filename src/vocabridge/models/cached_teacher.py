"""The teacher signal that comes from a cache: the trunk does not run, embeddings and head are still the model's."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel

from vocabridge.errors import UserError
from vocabridge.models.capture import LayerRequest
from vocabridge.models.forward import SideForward, supervised_tokens
from vocabridge.models.heads import output_head
from vocabridge.models.teacher import LiveTeacher, place
from vocabridge.models.teacher_cache import TeacherCache
from vocabridge.models.teacher_rows import batch_keys, teacher_row
from vocabridge.pairs import PairBatch, PairDataset


class CachedTeacher:
    """A frozen teacher whose last hidden states are read from disk.

    Args:
        model: a causal language model, of which only embeddings and head are used; see
            :func:`vocabridge.models.trunkless.load_ends`.
        cache: its states.
        vocab_size: rows of the head to keep; see :func:`vocabridge.models.heads.output_head`.
    """

    def __init__(self, model: PreTrainedModel, cache: TeacherCache, *, vocab_size: int | None = None):
        self.model = model.eval().requires_grad_(False)
        self.cache = cache
        self.vocab_size = vocab_size

    @property
    def embedding(self) -> nn.Module:
        """The input embeddings."""
        return self.model.get_input_embeddings()

    def to(self, device: torch.device) -> None:
        """Move embeddings and head."""
        place(self.model, device)

    def check(self, batch: PairBatch) -> None:
        """The head was compared with the model's own logits when the cache was written; a batch must be readable.

        Raises:
            UserError: a row is not in the cache, or damaged.
        """
        self(batch)

    def check_rows(self, *datasets: object) -> None:
        """Make sure before training that every row of tokenized data will be found; reads no states.

        Raises:
            UserError: rows are not in the cache.
        """
        pairs = chain.from_iterable(data for data in datasets if isinstance(data, PairDataset))
        keys = [teacher_row(pair.teacher).key for pair in pairs if pair.teacher is not None]
        if absent := sum(key not in self.cache for key in keys):
            raise self.cache.lacks(f"{absent} of {len(keys)} rows")

    def __call__(self, batch: PairBatch) -> SideForward:
        """Read the states of the batch's rows, in the model's dtype, onto the batch's device.

        Raises:
            UserError: a row is not in the cache, or damaged.
        """
        tokens = supervised_tokens(batch["teacher_input_ids"], batch["teacher_labels"])
        head = output_head(self.model, self.vocab_size)
        states = torch.cat([self.cache.read(key) for key in batch_keys(batch)])
        return SideForward(
            hidden_states=states.to(device=tokens.labels.device, dtype=head.weight.dtype),
            input_ids=tokens.input_ids,
            labels=tokens.labels,
            rows=tokens.rows,
            head=head,
            embedding=self.embedding,
        )


def teacher_signal(
    teacher: PreTrainedModel | CachedTeacher, *, vocab_size: int, layers: LayerRequest
) -> LiveTeacher | CachedTeacher:
    """The signal of a model that runs, or of a cache.

    Args:
        teacher: what the user gave.
        vocab_size: rows of the head to keep.
        layers: inner layers that the objective reads.

    Raises:
        UserError: the objective reads inner layers, which no cache holds, or which the model does not let us capture.
    """
    if not isinstance(teacher, CachedTeacher):
        return LiveTeacher(teacher, vocab_size=vocab_size, layers=layers)
    if layers:
        raise UserError(
            "the objective reads inner layers of the teacher, but a teacher cache holds the last hidden states only; "
            "remove teacher.cache or take another objective."
        )
    return CachedTeacher(teacher.model, teacher.cache, vocab_size=vocab_size)
