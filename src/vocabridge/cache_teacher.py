"""Filling a teacher cache: which rows, which folder, who writes what.

The rows are those of the teacher alone, cut only by its own ``max_length``, so that what is written depends on no
student: a student's truncation keeps a beginning of them.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vocabridge.alignment.vocabulary_cache import cache_folder
from vocabridge.errors import UserError
from vocabridge.models.cache_shards import remove_leftovers
from vocabridge.models.cached_teacher import CachedTeacher
from vocabridge.models.capture import trunk_shape
from vocabridge.models.dtypes import dtype_name
from vocabridge.models.loading import check_tokenizer_matches, load_teacher, load_tokenizer, vocabulary_size
from vocabridge.models.spec import CacheSpec, ModelSpec, check_side
from vocabridge.models.teacher import place
from vocabridge.models.teacher_cache import (
    LOCK_FILE,
    CacheKey,
    TeacherCache,
    create_cache,
    open_cache,
)
from vocabridge.models.teacher_capture import capture, capture_size, check_space, gigabytes
from vocabridge.models.teacher_rows import TeacherRow, teacher_row
from vocabridge.models.trunkless import TeacherEnds, drop_trunk, load_ends
from vocabridge.pairs import PairTokenizer, tokenize_examples
from vocabridge.text import Example

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that fill one cache together; one alone by default."""

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = lambda: None
    """Returns when all processes have called it."""
    device: torch.device | None = None
    """Where the teacher runs; none means the accelerator when there is one."""


def cache_teacher(
    teacher: ModelSpec | str,
    examples: Sequence[Example],
    *,
    max_length: int = 512,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processes: Processes | None = None,
    progress: bool = False,
) -> CachedTeacher:
    """Write the states that the teacher's cache lacks for these examples, and open it.

    When nothing is missing, the teacher's layers are never loaded (a plain safetensors checkpoint).

    Args:
        teacher: which one, its template and its cache; a name alone means the plain template and the default folder.
        examples: as :func:`vocabridge.text.read_examples` gives them.
        max_length: longest row of the teacher in tokens.
        tokenizer: the teacher's; default: loaded.
        processes: this process among those that share the work, which must all call this.
        progress: print the size beforehand and show progress bars.

    Returns:
        What :class:`vocabridge.trainer.DistillationTrainer` takes as ``teacher``, with any student.

    Raises:
        UserError: the folder holds another teacher's states, a file in it is damaged, or the disk is too small.
    """
    spec = ModelSpec(model=teacher) if isinstance(teacher, str) else teacher
    check_side(spec, "teacher")
    processes = processes or Processes()
    tokenizer = tokenizer or load_tokenizer(spec)
    shows = progress and processes.rank == 0
    rows = teacher_rows(examples, tokenizer, spec, max_length=max_length, progress=shows)
    ends = load_ends(spec)
    check_tokenizer_matches(tokenizer, ends.model, "teacher")
    work = _Work(spec, ends, rows, _key(spec, ends), processes, shows)
    cache = _complete_cache(work)
    if ends.has_trunk:
        drop_trunk(ends.model)
    return CachedTeacher(ends.model, cache, vocab_size=vocabulary_size(tokenizer))


def teacher_rows(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    spec: ModelSpec,
    *,
    max_length: int,
    progress: bool = False,
) -> list[TeacherRow]:
    """The teacher's rows of these examples, whatever the student.

    Raises:
        UserError: no example is left.
    """
    alone = PairTokenizer(tokenizer, student_template=spec.template, max_length=max_length)
    pairs = tokenize_examples(examples, alone, progress=progress)
    return [teacher_row(pair.student) for pair in pairs]


@dataclass(frozen=True, slots=True)
class _Work:
    """What one call has to do."""

    spec: ModelSpec
    ends: TeacherEnds
    rows: Sequence[TeacherRow]
    key: CacheKey
    processes: Processes
    shows_progress: bool

    @property
    def folder(self) -> Path:
        """Of the cache."""
        given = self.spec.cache and self.spec.cache.folder
        if given:
            return Path(given).expanduser()
        name = re.sub(r"[^\w.-]+", "-", Path(self.spec.model).name)
        parts = (name, self.key.teacher[:12], self.key.compute_dtype, self.key.attention, self.key.storage_dtype)
        return cache_folder() / "teachers" / "-".join(parts)


def _key(spec: ModelSpec, ends: TeacherEnds) -> CacheKey:
    compute = dtype_name(ends.model.dtype)
    chosen = (spec.cache or CacheSpec()).dtype
    return CacheKey(
        teacher=ends.fingerprint,
        compute_dtype=compute,
        attention=str(ends.model.config._attn_implementation),
        hidden_size=trunk_shape(ends.model).last_hidden_size,
        storage_dtype=compute if chosen == "auto" else chosen,
    )


def _complete_cache(work: _Work) -> TeacherCache:
    """Rank 0 holds the folder while all ranks write, so they all see the same rows missing."""
    with _writing(work):
        work.processes.wait()
        cache = _opened(work)
        missing = cache.missing(work.rows)
        work.processes.wait()  # nobody writes before everybody has looked
        if missing:
            _capture(work, missing)
            work.processes.wait()
            cache = _opened(work)
    if work.shows_progress:
        size = f"{len(cache)} rows, {gigabytes(cache.num_bytes)} ({work.key.storage_dtype})"
        print(f"teacher cache {work.folder}: complete, {size}", file=sys.stderr)
    return cache


@contextmanager
def _writing(work: _Work) -> Iterator[None]:
    """Keep other commands out of the folder while rows are missing; a complete cache needs no right to write."""
    if work.processes.rank or ((cache := open_cache(work.folder, work.key)) and not cache.missing(work.rows)):
        yield
        return
    create_cache(work.folder, work.key)
    lock = FileLock(work.folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.warning("another process writes the teacher cache %s; waiting for it", work.folder)
        lock.acquire()
    try:
        remove_leftovers(work.folder)
        yield
    finally:
        lock.release()


def _opened(work: _Work) -> TeacherCache:
    cache = open_cache(work.folder, work.key)
    if cache is None:
        raise UserError(f"teacher.cache: {work.folder} is not there; all processes must see the same folder.")
    return cache


def _capture(work: _Work, missing: Sequence[TeacherRow]) -> None:
    size = capture_size(missing, work.key)
    check_space(work.folder, size)
    if work.shows_progress:
        print(f"teacher cache {work.folder}: {size} to write ({work.key.storage_dtype})", file=sys.stderr)
    capture(
        _whole_model(work),
        missing,
        work.folder,
        key=work.key,
        rank=work.processes.rank,
        world_size=work.processes.world_size,
        progress=work.shows_progress,
    )


def _whole_model(work: _Work) -> PreTrainedModel:
    """With its trunk, on the device of this process."""
    model = work.ends.model if work.ends.has_trunk else load_teacher(work.spec)
    if work.processes.device is not None:
        place(model, work.processes.device)
    return model
