"""Full disks, damaged files, dead workers, locked folders, wrong clocks, NaN: one sentence, and nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faults.phases import EVALUATE, cache_results, run_results, sha256
from faults.starts import Ended, Fault, ForkServer
from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.checkpoint_files import checkpoints, damage
from vocabridge.errors import UserError
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig

pytestmark = pytest.mark.fault
DISTILL = ("distill", "recipe.yaml", "training.lr_scheduler_type=constant")
CACHE = ("cache-teacher", "recipe.yaml", "teacher.cache=cache")


def refused(ended: Ended) -> str:
    """The one sentence of a command that could not go on, and no traceback."""
    assert "Traceback" not in ended.output, ended.output
    return told(ended)


def told(ended: Ended) -> str:
    assert ended.code == 2, ended.output
    (sentence,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    return sentence


def done(ended: Ended) -> str:
    assert ended.code == 0, ended.output
    return ended.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Always the same one: a recipe names its data by absolute paths, and no run goes on with other data."""
    return tmp_path_factory.mktemp("disasters") / "workplace"


@pytest.fixture(scope="module")
def whole(server: ForkServer, models: Path, place: Path) -> Path:
    """A run of six steps that nothing disturbed, with all its checkpoints."""
    shutil.copytree(models, place)
    done(server.start([*DISTILL, "training.save_total_limit=9"], place))
    return Path(shutil.move(place / "run", place.parent / "whole"))


@pytest.fixture
def workplace(models: Path, place: Path, whole: Path) -> Path:
    """Models and data, and no run."""
    shutil.rmtree(place)
    return Path(shutil.copytree(models, place))


def damaged_copy(whole: Path, folder: Path, file: str, content: bytes) -> None:
    """The undisturbed run as if it had ended after step 5, whose checkpoint is damaged."""
    shutil.copytree(whole, folder / "run")
    shutil.rmtree(folder / "run" / "checkpoint-6")
    for path in (folder / "run").glob("*.safetensors"):
        path.unlink()
    (folder / "run" / "checkpoint-5" / file).write_bytes(content)


def test_damaged_checkpoints_are_named_and_an_earlier_one_is_used(
    server: ForkServer, whole: Path, workplace: Path
) -> None:
    """Two are damaged in two ways; their times are later than all others', and one checkpoint may be kept."""
    weights = bytearray((whole / "checkpoint-5" / "model.safetensors").read_bytes())
    weights[-7] ^= 1
    damaged_copy(whole, workplace, "model.safetensors", weights)
    moments = workplace / "run" / "checkpoint-4" / "optimizer.pt"
    moments.write_bytes(moments.read_bytes()[:-1])
    for path in checkpoints(workplace / "run")[:-2]:
        os.utime(path, (4e9, 4e9))
    output = done(server.start([*DISTILL, "training.save_total_limit=1", "--resume"], workplace))
    assert "checkpoint-5 is damaged (model.safetensors has another checksum) and is not used" in output
    assert "checkpoint-4 is damaged (optimizer.pt has" in output
    assert "going on from run/checkpoint-3, the last whole checkpoint" in output
    assert run_results(workplace / "run") == run_results(whole)
    assert [path.name for path in checkpoints(workplace / "run")] == ["checkpoint-6"]
    assert damage(workplace / "run" / "checkpoint-6") is None


def test_a_kill_while_the_only_checkpoint_is_replaced_does_not_lose_it(
    server: ForkServer, whole: Path, workplace: Path
) -> None:
    """The old one has just been renamed and the new one not yet; it is written again because the evaluation is new."""
    command = [*DISTILL, "training.save_total_limit=1"]
    last_rename = server.start(command, workplace, fault=Fault(r"\.saving/checkpoint-6$", 10**6)).operations
    shutil.rmtree(workplace / "run")
    assert server.start(command, workplace, fault=Fault(r"\.saving/checkpoint-6$", last_rename)).struck
    assert sorted(path.name for path in (workplace / "run" / ".saving").iterdir()) == [
        "checkpoint-6",
        "checkpoint-6.replaced",
    ]
    assert not checkpoints(workplace / "run")
    done(server.start([*command, "--resume"], workplace))
    assert run_results(workplace / "run") == run_results(whole)
    assert "train_runtime" not in (workplace / "run" / "metrics.jsonl").read_text(), "it was trained once more"
    assert not (workplace / "run" / ".saving").exists()


def test_without_a_whole_checkpoint_nothing_is_trained(server: ForkServer, whole: Path, workplace: Path) -> None:
    damaged_copy(whole, workplace, "trainer_state.json", b"{")
    for path in checkpoints(workplace / "run")[:-1]:
        shutil.rmtree(path)
    before = sorted(path.name for path in (workplace / "run").iterdir())
    sentence = refused(server.start([*DISTILL, "training.save_total_limit=9", "--resume"], workplace))
    assert "run: no checkpoint is whole (checkpoint-5: trainer_state.json has 1 bytes and not" in sentence
    assert "start anew with --overwrite" in sentence
    assert sorted(path.name for path in (workplace / "run").iterdir()) == before


def test_a_dead_data_worker_is_told_and_the_run_goes_on(server: ForkServer, whole: Path, workplace: Path) -> None:
    command = [*DISTILL, "training.save_total_limit=9", "training.dataloader_num_workers=2"]
    ended = server.start(command, workplace, preparations=["dying_worker"])
    sentence = told(ended)  # the other worker may complain too, from a thread of Python's own
    assert "a process that prepares batches has died" in sentence
    assert "--resume" in sentence
    assert (workplace / "killed").exists()
    done(server.start([*command, "--resume"], workplace))
    assert run_results(workplace / "run") == run_results(whole), "workers change nothing"


def test_a_longer_run_is_scored_anew_though_it_was_killed_before(server: ForkServer, workplace: Path) -> None:
    """The scores of the shorter run, there when the kill comes, neither stand in the way nor are taken for its."""
    evaluation = [f"evaluation.{key}" for key in ("data=[test.jsonl]", "seeds=[1]", "max_new_tokens=2", "limit=2")]
    command = [*DISTILL, *evaluation]
    done(server.start([*command, "training.max_steps=1"], workplace))
    shorter = sha256(workplace / "run" / "evaluation" / "results.json")
    longer = [*command, "training.max_steps=2", "--resume"]
    for at in (1, 5):
        assert server.start(longer, workplace, fault=Fault("run/evaluation", at)).struck
    done(server.start(longer, workplace))
    found = run_results(workplace / "run")
    shutil.rmtree(workplace / "run")
    done(server.start([*command, "training.max_steps=2"], workplace))
    assert run_results(workplace / "run") == found
    assert found["results.json"] != shorter


def test_a_clock_that_runs_backwards_changes_nothing(server: ForkServer, whole: Path, workplace: Path) -> None:
    command, backwards = [*DISTILL, "training.save_total_limit=1"], ["clock_runs_backwards"]
    done(server.start([*command, "training.max_steps=4"], workplace, preparations=backwards))
    assert '"train_runtime": -' in (workplace / "run" / "metrics.jsonl").read_text(), "nobody asked for the time"
    assert [path.name for path in checkpoints(workplace / "run")] == ["checkpoint-4"]
    done(server.start([*command, "--resume"], workplace, preparations=backwards))
    assert [path.name for path in checkpoints(workplace / "run")] == ["checkpoint-6"]
    assert run_results(workplace / "run") == run_results(whole)


def test_a_flipped_bit_in_a_teacher_cache_is_never_learned_from(server: ForkServer, workplace: Path) -> None:
    done(server.start(CACHE, workplace, preparations=["small_shards"]))
    shard = sorted((workplace / "cache").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 16
    shard.write_bytes(content)
    sentence = refused(server.start([*DISTILL, "teacher.cache=cache"], workplace))
    assert shard.name in sentence
    assert not (workplace / "run" / "model.safetensors").exists()
    shard.unlink()
    shard.with_suffix(".json").unlink()
    done(server.start([*DISTILL, "teacher.cache=cache"], workplace))


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(workplace: Path) -> Iterator[Path]:
    """A file system in memory, mounted where the run folder will be; needs the right to mount."""
    folder = workplace / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(server: ForkServer, small_disk: Path, whole: Path, workplace: Path) -> None:
    """It fills up while this or that is written; each time there is a little more room."""
    checkpoint = sum(path.stat().st_size for path in (whole / "checkpoint-1").iterdir())
    command = [*DISTILL, "training.save_total_limit=1", "training.output_dir=disk/run"]
    sizes = [checkpoint * share // 100 for share in (30, 70, 120, 180)]
    sentences = []
    for size in sizes:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
        sentences.append(refused(server.start([*command, "--resume"], workplace)))
        assert all(damage(path) is None for path in checkpoints(small_disk / "run"))
        assert not list(small_disk.glob("run/.saving/*"))
    assert all("No space left on device" in sentence or "saving failed" in sentence for sentence in sentences), (
        sentences
    )
    assert checkpoints(small_disk / "run"), "a whole one was written before the disk was full"
    subprocess.run(["mount", "-o", f"remount,size={6 * checkpoint}", str(small_disk)], check=True)
    done(server.start([*command, "--resume"], workplace))
    assert run_results(small_disk / "run") == run_results(whole)


def test_full_disk_of_scores(server: ForkServer, small_disk: Path, workplace: Path) -> None:
    evaluate = ["disk/scores" if word == "scores" else word for word in EVALUATE]
    sentence = refused(server.start(evaluate, workplace))
    assert "No space left on device; free some space or mend the permissions" in sentence
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    done(server.start(evaluate, workplace))


def test_full_disk_of_a_teacher_cache(server: ForkServer, small_disk: Path, workplace: Path) -> None:
    command = [*CACHE, "teacher.cache=disk/cache"]
    sentence = refused(server.start(command, workplace, preparations=["small_shards"]))
    assert "the teacher cache needs" in sentence
    assert not list(small_disk.glob("cache/*.safetensors")), "it is told before anything is written"
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    done(server.start(command, workplace, preparations=["small_shards"]))
    done(server.start([*CACHE, "teacher.cache=whole"], workplace, preparations=["small_shards"]))
    assert cache_results(small_disk / "cache") == cache_results(workplace / "whole")


def test_full_disk_of_a_study(server: ForkServer, small_disk: Path, workplace: Path) -> None:
    """Its runs fail with a sentence each, and are all trained when there is room."""
    study = (workplace / "study.yaml").read_text().replace("output_dir: study", "output_dir: disk/study")
    (workplace / "study.yaml").write_text(study)
    ended = server.start(["study", "study.yaml"], workplace)
    assert ended.code in (1, 2), ended.output
    assert "Traceback" not in ended.output
    assert "No space left on device" in ended.output
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert "2 done" in done(server.start(["study", "study.yaml"], workplace))


def test_folders_that_may_not_be_written(server: ForkServer, whole: Path, workplace: Path) -> None:
    locked = ["without_privileges"]
    damaged_copy(whole, workplace, "optimizer.pt", b"")
    places = {
        "run": [*DISTILL, "training.save_total_limit=9", "--resume"],
        "scores": list(EVALUATE),
        "cache": ["cache-teacher", "recipe.yaml", "teacher.cache=cache"],
        "study": ["study", "study.yaml"],
    }
    for name, command in places.items():
        (workplace / name).mkdir(exist_ok=True)
        (workplace / name).chmod(0o555)
        sentence = refused(server.start(command, workplace, preparations=locked))
        assert "Permission denied" in sentence, sentence
        assert name in sentence
        (workplace / name).chmod(0o755)
    assert sorted(checkpoints(whole)) != []
    done(server.start(places["run"], workplace, preparations=locked))
    assert run_results(workplace / "run") == run_results(whole)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_nan_in_one_term_is_named_and_the_run_goes_on_from_before(
    server: ForkServer, whole: Path, workplace: Path
) -> None:
    command = [*DISTILL, "training.save_total_limit=9"]
    sentence = refused(server.start(command, workplace, preparations=["nan_in_one_term"]))
    assert "gan_queries" in sentence
    assert "space" not in sentence, "only the term that is NaN is named"
    assert [path.name for path in checkpoints(workplace / "run")] == ["checkpoint-1", "checkpoint-2"]
    done(server.start([*command, "--resume"], workplace))
    assert run_results(workplace / "run") == run_results(whole)


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, tiny_bpe_tokenizer: object, tiny_sentencepiece_tokenizer: object
) -> None:
    """The gradient of step 3 overflows though its loss does not, and a checkpoint is due at once."""
    trainer = DistillationTrainer(
        student_model(tiny_bpe_tokenizer),
        teacher_model(tiny_sentencepiece_tokenizer),
        objective={"name": "dskd_cma", "matching": "none"},
        args=DistillationConfig(
            output_dir=str(tmp_path / "run"), max_steps=5, save_steps=1, save_total_limit=1, logging_steps=1,
            per_device_train_batch_size=4, report_to="none", disable_tqdm=True, use_cpu=True, diagnostics_steps=0,
        ),
        train_dataset=ROWS,
        student_tokenizer=tiny_bpe_tokenizer,
        teacher_tokenizer=tiny_sentencepiece_tokenizer,
    )  # fmt: skip
    weight = trainer.student.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * float("nan") if trainer.state.global_step == 2 else gradient)
    with pytest.raises(UserError, match=r"the weights of '.*' are not finite, so they are not saved; resume from"):
        trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["loss"])), "the loss itself told nothing"
    (kept,) = checkpoints(tmp_path / "run")
    assert kept.name == "checkpoint-2"
    assert damage(kept) is None


def test_resuming_a_finished_run_keeps_its_best_weights(server: ForkServer, workplace: Path) -> None:
    """The last checkpoint is not the one that the run ended with."""
    command = [
        *DISTILL, "data.validation=test.jsonl", "training.eval_strategy=steps", "training.eval_steps=1",
        "training.load_best_model_at_end=true", "training.learning_rate=0.5", "training.save_total_limit=3",
    ]  # fmt: skip
    done(server.start(command, workplace))
    weights = workplace / "run" / "model.safetensors"
    before, last = sha256(weights), sha256(workplace / "run" / "checkpoint-6" / "model.safetensors")
    assert before != last
    shutil.move(workplace / "run", workplace / "moved")
    done(server.start([*command, "training.output_dir=moved", "--resume"], workplace))
    assert sha256(workplace / "moved" / "model.safetensors") == before
