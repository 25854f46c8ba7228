"""The teacher cache: the live teacher's numbers, one pass of the teacher, kill and resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tiny_pair import ROWS
from vocabridge import cache_teacher as module
from vocabridge.cache_teacher import Processes, cache_teacher
from vocabridge.errors import UserError
from vocabridge.models import teacher_capture
from vocabridge.models.cached_teacher import CachedTeacher
from vocabridge.models.spec import CacheSpec, ModelSpec
from vocabridge.models.teacher import LiveTeacher
from vocabridge.models.teacher_cache import LOCK_FILE
from vocabridge.pairs import PairBatch, PairCollator, PairTokenizer, tokenize_examples
from vocabridge.text import read_examples

EXAMPLES = read_examples(ROWS)


@pytest.fixture
def spec(teacher_folder: Path, tmp_path: Path) -> ModelSpec:
    return ModelSpec(model=str(teacher_folder), cache=CacheSpec(folder=str(tmp_path / "cache")), device="cpu")


@pytest.fixture
def make_batch(
    tiny_bpe_tokenizer: PreTrainedTokenizerFast, tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., PairBatch]:
    """A batch of a student and the teacher."""

    def make(
        rows: list[dict[str, str]] = ROWS, *, student: Any = None, max_length: int = 512, padding_side: Any = "right"
    ) -> PairBatch:
        tokenizers = (student or tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
        pair_tokenizer = PairTokenizer(*tokenizers, max_length=max_length)
        pairs = tokenize_examples(read_examples(rows), pair_tokenizer)
        return PairCollator(0, 0, padding_side=padding_side)(list(pairs))

    return make


@pytest.fixture
def no_trunk_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(teacher_capture, "teacher_side", refuse)
    monkeypatch.setattr(module, "load_teacher", refuse)


def live(folder: Path, **options: Any) -> LiveTeacher:
    return LiveTeacher(AutoModelForCausalLM.from_pretrained(folder, **options), vocab_size=800)


def check_equal(cached: CachedTeacher, expected: LiveTeacher, batch: PairBatch, **tolerance: float) -> None:
    ours, theirs = cached(batch), expected(batch)
    for name in ("input_ids", "labels", "rows"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.hidden_states.dtype == theirs.hidden_states.dtype
    assert float(theirs.hidden_states.abs().max()) > 0.1
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))
    assert torch.equal(ours.head(theirs.hidden_states), theirs.head(theirs.hidden_states))
    assert torch.equal(ours.embedding(ours.input_ids), theirs.embedding(ours.input_ids))


# --- the signal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_cached_signal_is_the_live_one(
    spec: ModelSpec, teacher_folder: Path, make_batch: Callable[..., PairBatch], padding_side: str
) -> None:
    cached = cache_teacher(spec, EXAMPLES)
    check_equal(cached, live(teacher_folder), make_batch(padding_side=padding_side))


def test_one_row_at_a_time_it_is_equal_to_the_last_bit(
    spec: ModelSpec, teacher_folder: Path, make_batch: Callable[..., PairBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_capture, "TOKENS_PER_BATCH", 1)
    cached, expected = cache_teacher(spec, EXAMPLES), live(teacher_folder)
    for row in ROWS:
        check_equal(cached, expected, make_batch([row]), rtol=0, atol=0)


@pytest.mark.parametrize("storage", ["auto", "bfloat16"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_dtypes_of_computing_and_keeping(
    spec: ModelSpec, teacher_folder: Path, make_batch: Callable[..., PairBatch], compute: str, storage: str
) -> None:
    cache = spec.cache.model_copy(update={"dtype": storage})
    cached = cache_teacher(spec.model_copy(update={"dtype": compute, "cache": cache}), EXAMPLES)
    assert cached.cache.key.storage_dtype == (compute if storage == "auto" else storage)
    tolerance = 1e-5 if (compute, storage) == ("float32", "auto") else 4e-2  # bfloat16 keeps 8 bits
    expected = live(teacher_folder, dtype=getattr(torch, compute))
    check_equal(cached, expected, make_batch(), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def filled(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("filled") / "cache"
    spec = ModelSpec(model=str(teacher_folder), cache=CacheSpec(folder=str(folder)), device="cpu")
    cache_teacher(spec, EXAMPLES)
    return spec


@pytest.mark.usefixtures("no_trunk_runs")
class TestWithoutTrunk:
    """A complete cache, made once, serves these without the teacher's layers ever being loaded."""

    def test_second_time_nothing_runs(
        self, filled: ModelSpec, teacher_folder: Path, make_batch: Callable[..., PairBatch]
    ) -> None:
        cached = cache_teacher(filled, EXAMPLES)
        assert not list(cached.model.model.layers)
        check_equal(cached, live(teacher_folder), make_batch())

    def test_another_student_with_its_own_truncation(
        self,
        filled: ModelSpec,
        teacher_folder: Path,
        make_batch: Callable[..., PairBatch],
        tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        expected = live(teacher_folder)
        seen = set()
        for student in (None, tiny_sentencepiece_tokenizer):
            for max_length in (512, 40, 24):
                batch = make_batch(student=student, max_length=max_length)
                seen.add(int(batch["teacher_labels"].ne(-100).sum()))
                check_equal(cache_teacher(filled, EXAMPLES, max_length=max_length), expected, batch)
        assert len(seen) >= 3, "the truncations must differ between students and lengths"

    def test_read_only_folder(self, filled: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("a complete cache is not written to")

        monkeypatch.setattr(module, "FileLock", refuse)
        monkeypatch.setattr(module, "create_cache", refuse)
        assert len(cache_teacher(filled, EXAMPLES[:3]).cache) == len(ROWS)


def test_a_checkpoint_that_must_be_loaded_whole_is_cached_too(
    spec: ModelSpec, teacher_folder: Path, make_batch: Callable[..., PairBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vocabridge.models import trunkless

    monkeypatch.setattr(trunkless, "_is_plain", lambda *args: False)  # as for GGUF, adapters, quantisation
    for _ in range(2):
        cached = cache_teacher(spec, EXAMPLES)
        assert not list(cached.model.model.layers), "the layers are dropped"
        check_equal(cached, live(teacher_folder), make_batch())


def test_other_rows_are_added(spec: ModelSpec, make_batch: Callable[..., PairBatch]) -> None:
    first = cache_teacher(spec, EXAMPLES[:3])
    assert len(first.cache) == 3
    with pytest.raises(UserError, match=r"lacks a row of this data.*'vocabridge cache-teacher'"):
        first.check(make_batch())
    pairs = tokenize_examples(EXAMPLES, PairTokenizer(*[AutoTokenizer.from_pretrained(spec.model)] * 2))
    with pytest.raises(UserError, match="lacks 5 of 8 rows of this data"):
        first.check_rows(pairs, None)
    second = cache_teacher(spec, EXAMPLES)
    assert len(second.cache) == 8
    second.check_rows(pairs, None)
    second.check(make_batch())


def test_stale_cache_is_refused(spec: ModelSpec, teacher_folder: Path, tmp_path: Path) -> None:
    cache_teacher(spec, EXAMPLES[:2])
    changed = AutoModelForCausalLM.from_pretrained(teacher_folder)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    changed.save_pretrained(tmp_path / "changed")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "changed")
    with pytest.raises(UserError, match="is stale: it was written with other weights or configuration of the teacher;"):
        cache_teacher(spec.model_copy(update={"model": str(tmp_path / "changed")}), EXAMPLES[:2])
    with pytest.raises(UserError, match=r"other teacher\.dtype \(float32, now bfloat16\); teacher\.cache\.dtype"):
        cache_teacher(spec.model_copy(update={"dtype": "bfloat16"}), EXAMPLES[:2])
    with pytest.raises(UserError, match=r"other attention kernel \(sdpa, now eager\)"):
        cache_teacher(spec.model_copy(update={"attn_implementation": "eager"}), EXAMPLES[:2])


def test_default_folder_is_the_teachers_own(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOCABRIDGE_CACHE", str(tmp_path / "user"))
    spec = ModelSpec(model=str(teacher_folder), device="cpu")
    folders = {cache_teacher(spec, EXAMPLES[:1]).cache.folder for _ in range(2)}
    folders.add(cache_teacher(spec.model_copy(update={"dtype": "bfloat16"}), EXAMPLES[:1]).cache.folder)
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {tmp_path / "user" / "teachers"}


# --- several processes, kill and resume ------------------------------------------------------------------------------


def test_two_ranks_write_together(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_capture, "TOKENS_PER_BATCH", 60)
    ends = module.load_ends(spec)
    whole = module.load_teacher(spec)
    monkeypatch.setattr(module, "load_teacher", lambda spec: whole)  # loading is not made for threads
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    rows = module.teacher_rows(EXAMPLES, tokenizer, spec, max_length=512)
    wrote: dict[int, int] = {}
    capture = module.capture

    def count(model: Any, missing: Any, folder: Any, *, rank: int, **options: Any) -> None:
        wrote[rank] = len(missing)
        capture(model, missing, folder, rank=rank, **options)

    monkeypatch.setattr(module, "capture", count)
    barrier = threading.Barrier(2, timeout=60)

    def run(rank: int) -> None:
        processes = Processes(rank, 2, lambda: barrier.wait() and None)
        work = module._Work(spec, ends, rows, module._key(spec, ends), processes, False)
        caches[rank] = module._complete_cache(work)

    caches: dict[int, Any] = {}
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrote == {0: 8, 1: 8}, "both see the same rows missing"
    assert [caches[rank].missing(rows) for rank in range(2)] == [[], []]
    assert [len(caches[rank]) for rank in range(2)] == [8, 8]
    assert len(list(Path(spec.cache.folder).glob("*.safetensors"))) == 2, "one shard of each rank, no row twice"
    assert sum(len(shard.keys) for shard in caches[0]._shards) == 8


def test_a_second_command_waits_for_the_first(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(spec.cache.folder)
    cache_teacher(spec, EXAMPLES[:1])
    code = "import sys, time, filelock\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); time.sleep(2)"
    first = subprocess.Popen([sys.executable, "-c", code, str(folder / LOCK_FILE)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    assert len(cache_teacher(spec, EXAMPLES).cache) == 8
    assert first.poll() == 0 or first.wait(1) == 0
    assert f"another process writes the teacher cache {folder}; waiting for it" in caplog.text


KILLED = """
import json, os, signal, sys
from vocabridge import cache_teacher as module
from vocabridge.models import teacher_capture
from vocabridge.models.spec import ModelSpec
from vocabridge.text import read_examples

teacher_capture.TOKENS_PER_BATCH = 1
teacher_capture.SHARD_BYTES = 1
original, calls = teacher_capture.teacher_side, []

def run(*args, **kwargs):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

teacher_capture.teacher_side = run
capture = module.capture
module.capture = lambda *args, **options: capture(*args, **options, shard_bytes=1)
module.cache_teacher(ModelSpec.model_validate_json(sys.argv[1]), read_examples(json.loads(sys.argv[2])))
"""


def test_a_killed_command_goes_on_where_it_stopped(
    spec: ModelSpec, teacher_folder: Path, make_batch: Callable[..., PairBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", KILLED, spec.model_dump_json(), json.dumps(ROWS)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    leftover = Path(spec.cache.folder) / "states-0.safetensors.partial"
    leftover.write_bytes(b"half")
    rows: list[int] = []
    capture = module.capture

    def count(model: Any, missing: Any, *args: Any, **options: Any) -> None:
        rows.append(len(missing))
        capture(model, missing, *args, **options)

    monkeypatch.setattr(module, "capture", count)
    cached = cache_teacher(spec, EXAMPLES)
    assert rows == [5], "three of eight rows were whole when the signal came"
    assert not leftover.exists()
    check_equal(cached, live(teacher_folder), make_batch())
