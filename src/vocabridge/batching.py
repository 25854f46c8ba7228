"""Batches of rows of similar length, of a fixed number of rows or of as many as a token budget allows.

A batch costs what it is padded to: rows x (longest student row + longest teacher row), because both trunks run over
it. On Dolly (SmolLM2 <- Gemma 3, 512 tokens a side) eight rows at random are padded to 2.16 times their tokens; eight
rows of similar length to 1.02 times, and a budget of 8192 tokens to 1.04 times.

The number of batches is the same in every epoch, as the trainer's learning-rate schedule and resumption need, although
rows meet other rows each time: sorted rows are cut into pools once, a pool's batch size follows from its longest row
on each side, and an epoch only shuffles inside pools. Loss and gradient are normalised by the tokens of the whole
optimizer step, so they depend on which rows a step holds and not on how it is cut into batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from vocabridge.errors import UserError
from vocabridge.pairs import PairDataset, TokenizedPair
from vocabridge.training_arguments import DistillationConfig

_BATCHES_PER_POOL = 8
"""More batches to a pool mix rows better and pad more: 1.03, 1.04, 1.05 and 1.09 times the tokens with 1, 8, 16, 32."""

_FEWEST_POOLS = 16
"""Of small data: a pool of eight batches would take in rows of every length."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How large a batch may become; at least one limit is set.

    Attributes:
        max_rows: rows of a batch.
        max_tokens: padded tokens of a batch, both sides together.
        pad_to_multiple_of: what the collator rounds a side's length up to.
    """

    max_rows: int | None = None
    max_tokens: int | None = None
    pad_to_multiple_of: int = 1

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens that a row of these ``lengths [..., sides]`` takes in a batch where it is the longest: ``[...]``."""
        return (-(-lengths // self.pad_to_multiple_of) * self.pad_to_multiple_of).sum(-1)

    def rows(self, longest: np.ndarray) -> np.ndarray:
        """Most rows of a batch whose longest sides are ``longest [..., sides]``: ``[...]``, at least 1."""
        bounds = [] if self.max_rows is None else [np.full(longest.shape[:-1], self.max_rows)]
        if self.max_tokens is not None:
            bounds.append(self.max_tokens // self.padded(longest))
        return np.minimum.reduce([*bounds]).clip(min=1)


def pair_lengths(pairs: Sequence[TokenizedPair]) -> np.ndarray:
    """``[rows, sides]`` tokens of each row, the student's side first."""
    return np.array([[len(side.input_ids) for side in (pair.student, pair.teacher) if side] for pair in pairs])


class LengthGroupedBatches(Sampler[list[int]]):
    """Row indices of each batch; every row is in one batch of an epoch.

    The batches depend on ``seed`` and epoch alone. The one with the most padded tokens comes first, so that memory runs
    out at once or never; the others come in random order. With several ranks, batches k * num_ranks + rank are a rank's
    own: their number is a multiple of ``num_ranks``, for which the batches of most rows are split, and those that run
    at the same time are of similar length. Only if all batches are single rows do a few rows come twice.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        limits: BatchLimits,
        num_ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ):
        """Cut the rows into pools.

        Args:
            lengths: ``[rows, sides]`` tokens.
            limits: of a batch.
            num_ranks: processes that share the batches.
            seed: of the shuffling.
            shuffle: False gives the same batches every time, longest first.
        """
        self.lengths = lengths
        self.limits = limits
        self.num_ranks = num_ranks
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self._pools = list(_pools(lengths, limits, batches_per_pool=1))
        batches_per_pool = min(_BATCHES_PER_POOL, len(self._pools) // _FEWEST_POOLS)
        if shuffle and batches_per_pool > 1:
            self._pools = list(_pools(lengths, limits, batches_per_pool=batches_per_pool))
        self._num_batches = len(self._cut(None))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next pass gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch, over all ranks."""
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Start a pass."""
        generator = np.random.default_rng([self.seed, self.epoch]) if self.shuffle else None
        batches = self._cut(generator)
        assert len(batches) == self._num_batches, "the number of batches must not change from epoch to epoch"
        starts = np.arange(0, len(batches), self.num_ranks)
        if generator is not None:
            sizes = np.array([len(batch) * self._padded(batch) for batch in batches])
            first = int(sizes.argmax()) // self.num_ranks * self.num_ranks
            starts = np.array([first, *generator.permutation(starts[starts != first])])
        for start in starts:
            for batch in batches[start : start + self.num_ranks]:
                yield batch.tolist()

    def _cut(self, generator: np.random.Generator | None) -> list[np.ndarray]:
        """The epoch's batches, longest first."""
        batches: list[np.ndarray] = []
        for pool in self._pools:
            rows = pool.rows if generator is None else generator.permutation(pool.rows)
            batches += np.array_split(rows, pool.num_batches)
        while len(batches) % self.num_ranks:
            largest = max(range(len(batches)), key=lambda index: len(batches[index]))
            if len(batches[largest]) == 1:
                return batches + (batches * self.num_ranks)[: -len(batches) % self.num_ranks]
            batches[largest : largest + 1] = np.array_split(batches[largest], 2)
        return batches

    def _padded(self, batch: np.ndarray) -> int:
        return int(self.limits.padded(self.lengths[batch].max(axis=0)))


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """Rows that may share a batch, and into how many batches they go."""

    rows: np.ndarray
    num_batches: int


def _pools(lengths: np.ndarray, limits: BatchLimits, *, batches_per_pool: int) -> Iterator[_Pool]:
    """Cut the rows, longest first, into runs that fill so many batches each."""
    order = np.argsort(-lengths.sum(axis=1), kind="stable")
    start = 0
    while start < len(order):
        most = batches_per_pool * int(limits.rows(lengths[order[start]]))
        candidates = order[start : start + most]
        # The run's longest sides grow with every row taken in, so its batches shrink while it grows.
        batch_sizes = limits.rows(np.maximum.accumulate(lengths[candidates], axis=0))
        size = int((np.arange(1, len(candidates) + 1) <= batches_per_pool * batch_sizes).sum())
        yield _Pool(candidates[:size], -(-size // int(batch_sizes[size - 1])))
        start += size


def check_batches(pairs: Any, args: DistillationConfig) -> None:
    """Refuse training rows that cannot be batched as ``args`` ask.

    Raises:
        UserError: grouping by length needs all rows beforehand, or a row alone is beyond the token budget.
    """
    if pairs is None or not args.groups_by_length:
        return
    if not isinstance(pairs, PairDataset):
        raise UserError(
            "training.max_tokens_per_batch and train_sampling_strategy: group_by_length need the length of every row, "
            "which a stream does not tell beforehand; leave them out or set data.streaming to false."
        )
    if args.max_tokens_per_batch is None:
        return
    longest = int(_limits(args, None).padded(pair_lengths(pairs)).max())
    if longest > args.max_tokens_per_batch:
        raise UserError(
            f"training.max_tokens_per_batch is {args.max_tokens_per_batch}, but one row alone has {longest} padded "
            f"tokens on both sides together; give at least {longest}, or a smaller data.max_length."
        )


def _limits(args: DistillationConfig, max_rows: int | None) -> BatchLimits:
    return BatchLimits(
        max_rows=max_rows, max_tokens=args.max_tokens_per_batch, pad_to_multiple_of=args.pad_to_multiple_of or 1
    )


class LengthGroupingTrainer(Trainer):
    """A trainer whose batches hold rows of similar length: in training when asked for, in evaluation always."""

    args: DistillationConfig
    _train_batches: LengthGroupedBatches | None = None

    def get_train_dataloader(self) -> DataLoader:
        """As in ``transformers``, unless rows are grouped by length."""
        if not self.args.groups_by_length:
            return super().get_train_dataloader()
        pairs = cast(PairDataset, self.train_dataset)
        self._train_batches = LengthGroupedBatches(
            pair_lengths(pairs),
            limits=_limits(self.args, None if self.args.max_tokens_per_batch else self._train_batch_size),
            num_ranks=self.args.world_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        return self._loader(pairs, self._train_batches, persistent_workers=self.args.dataloader_persistent_workers)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Sorted by length: the averages do not depend on the order."""
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(pairs, PairDataset):
            return super().get_eval_dataloader(eval_dataset)
        # Sharded models must run the same number of batches on every rank; otherwise no row needs to come twice.
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.shard_teacher
        batches = LengthGroupedBatches(
            pair_lengths(pairs),
            limits=_limits(self.args, self.args.eval_batch_size),
            num_ranks=self.args.world_size if is_sharded else 1,
            shuffle=False,
        )
        loader = self._loader(pairs, batches, persistent_workers=False)
        if self.args.world_size > 1:
            loader.batch_sampler.even_batches = is_sharded
        return loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of an optimizer step over all ranks, on average; the log's samples per second come from it."""
        if self._train_batches is None:
            return super().get_total_train_batch_size(args)
        rows_per_batch = len(self._train_batches.lengths) / len(self._train_batches)
        return round(rows_per_batch * args.gradient_accumulation_steps * args.world_size)

    def _loader(self, pairs: PairDataset, batches: LengthGroupedBatches, *, persistent_workers: bool) -> Any:
        loader = self.accelerator.prepare(
            DataLoader(
                cast(Any, pairs),
                batch_sampler=batches,
                collate_fn=cast(Any, self.data_collator),
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                persistent_workers=persistent_workers,
                multiprocessing_context=self.args.dataloader_multiprocessing_context,
                prefetch_factor=self.args.dataloader_prefetch_factor,
                in_order=self.args.dataloader_in_order,
            )
        )
        # With this, accelerate's loader finds the sampler to tell it the epoch even where it is wrapped twice: by a
        # rank's shard and by what skips batches of a resumed epoch.
        loader.set_sampler(batches)
        return loader
