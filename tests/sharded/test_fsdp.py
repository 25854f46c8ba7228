"""FSDP2 trains, logs, saves and resumes as data parallelism does; two processes on a CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import sharded_cases as cases
from sharded_cases import assert_close, assert_same_files
from tiny_pair import student_model
from vocabridge.errors import UserError


@pytest.mark.parametrize("case", [*cases.OBJECTIVES, *cases.OTHERS, "checkpointing", "untied", "lora"])
def test_losses_and_weights_are_those_of_data_parallelism(two_processes, case):
    ddp, fsdp = (two_processes[case][engine] for engine in ("ddp", "fsdp"))
    assert_close(cases.losses(fsdp["log"]), cases.losses(ddp["log"]))
    for one, other in zip(fsdp["log"], ddp["log"], strict=True):
        if "grad_norm" in one:
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    folder = two_processes.folder / case
    weights = "adapter_model.safetensors" if case == "lora" else "model.safetensors"
    assert_same_files(folder / "fsdp", folder / "ddp", weights)
    if cases.learns(ddp["pieces"]):
        assert_same_files(folder / "fsdp", folder / "ddp", "objective.safetensors")


def test_student_and_learned_parts_are_held_in_pieces(two_processes):
    ddp, fsdp = (two_processes["gan"][engine]["pieces"] for engine in ("ddp", "fsdp"))
    assert all(held == whole for held, whole in ddp.values())
    assert {name: whole for name, (_, whole) in fsdp.items()} == {name: whole for name, (_, whole) in ddp.items()}
    in_pieces = {name for name, (held, whole) in fsdp.items() if held < whole}
    assert {name.split(".")[0] for name in in_pieces} == {"student", "objective"}
    held, whole = (sum(numbers) for numbers in zip(*fsdp.values(), strict=True))
    assert held == pytest.approx(whole / 2, rel=0.01)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("asked", cases.READ_FROM_THE_TEACHER)
def test_a_teacher_in_pieces_teaches_the_same(two_processes, asked, engine):
    results = two_processes["shared_teacher"]
    whole, shared = results[f"{asked} ddp whole"], results[f"{asked} {engine} shared"]
    assert_close(cases.losses(shared["log"]), cases.losses(whole["log"]))
    evaluated = [[entry["eval_loss"] for entry in each["log"] if "eval_loss" in entry] for each in (shared, whole)]
    assert evaluated[0]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)
    assert all(held == numbers for held, numbers in whole["teacher"].values())
    in_layers = {name for name in whole["teacher"] if ".layers." in name}
    assert in_layers
    for name, (held, numbers) in shared["teacher"].items():
        assert held == (numbers // 2 if name in in_layers else numbers), name


def test_the_run_folder_is_a_plain_checkpoint(two_processes, tiny_bpe_tokenizer):
    cases.assert_is_plain_checkpoint(two_processes.folder / "gan" / "fsdp", tiny_bpe_tokenizer)


def test_an_adapter_is_saved_alone_and_fits_its_base(two_processes, tiny_bpe_tokenizer):
    run = two_processes.folder / "lora" / "fsdp"
    names = set(load_file(run / "adapter_model.safetensors"))
    assert names
    assert all("lora_" in name for name in names)
    model = PeftModel.from_pretrained(student_model(tiny_bpe_tokenizer), str(run))
    learned = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert learned
    assert all(float(p.abs().max()) > 0 for p in learned)


def test_evaluation_counts_each_row_once(two_processes, tmp_path):
    alone = cases.trainer(tmp_path, "cross_entropy", num_processes=1, evaluate=True)
    alone.train()
    expected = alone.evaluate()["eval_loss"]
    for engine in ("ddp", "fsdp"):  # under DDP one batch takes all rows, so that one rank has none
        evaluated = [entry for entry in two_processes["best"][engine]["log"] if "eval_loss" in entry]
        assert [entry["step"] for entry in evaluated] == [1, 2, 3, 4]
        assert evaluated[-1]["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_probe_sees_whole_parameters(two_processes):
    ddp, fsdp = (two_processes["gan"][engine]["log"] for engine in ("ddp", "fsdp"))
    probes = [[entry for entry in log if "probe/mmd_squared" in entry] for log in (fsdp, ddp)]
    assert [entry["step"] for entry in probes[0]] == [0, 2, 4]
    for one, other in zip(*probes, strict=True):
        for name in ("probe/mmd_squared", "probe/energy_distance", "probe/mean_cosine"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def test_bf16_stays_near_data_parallelism_and_keeps_float32_weights(two_processes):
    ddp, fsdp = (two_processes["bf16"][engine] for engine in ("ddp", "fsdp"))
    # Autocast keeps the residual stream in float32, FSDP runs all of a layer in bfloat16: 8 bits, two layers.
    assert_close(cases.losses(fsdp["log"]), cases.losses(ddp["log"]), rel=1e-2)
    exact = cases.losses(two_processes["checkpointing"]["ddp"]["log"])
    assert cases.losses(fsdp["log"]) != exact
    saved = load_file(two_processes.folder / "bf16" / "fsdp" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    for one, other in zip(fsdp["log"], ddp["log"], strict=True):
        if "coverage" in one:
            assert one["coverage"] == other["coverage"] == 1.0  # sums for the log are not rounded


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp")])
def test_either_engine_goes_on_from_the_others_checkpoint(two_processes, first, second):
    results = two_processes["resumed"]
    whole, resumed = cases.losses(results[first]["log"]), cases.losses(results[f"{first}-{second}"]["log"])
    assert_close(resumed, whole)
    folder = two_processes.folder / "resumed"
    for name in ("model.safetensors", "objective.safetensors"):
        assert_same_files(folder / f"{first}-{second}", folder / first, name)


def test_one_process_goes_on_from_two(two_processes, tmp_path):
    checkpoint = two_processes.folder / "resumed" / "fsdp" / "checkpoint-2"
    trainer = cases.trainer(tmp_path, cases.GAN, num_processes=1, learning_rate=3e-3)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_close(cases.losses(trainer.state.log_history), cases.losses(two_processes["resumed"]["fsdp"]["log"]))


def test_a_checkpoint_is_whole_and_holds_no_weights_twice(two_processes):
    checkpoint = two_processes.folder / "resumed" / "fsdp" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "objective.safetensors", "optimizer.pt", "scheduler.pt"} <= names
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= names
    assert not any(path.is_dir() for path in checkpoint.iterdir())
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    whole = sum(numbers[1] for numbers in two_processes["resumed"]["fsdp"]["pieces"].values())
    assert sum(state["exp_avg"].numel() for state in states.values()) == whole
    assert not list(two_processes.folder.rglob(".saving"))


def test_an_optimizer_in_pickled_pieces_is_not_read(two_processes):
    found = two_processes["foreign_pieces"]
    assert not found["was_unpickled"]
    assert "checkpoint-2 lacks optimizer.pt" in found["told"]


def test_the_best_checkpoint_is_kept_and_loaded(two_processes):
    for engine in ("ddp", "fsdp"):
        result = two_processes["best"][engine]
        run = two_processes.folder / "best" / engine
        assert Path(result["best"]) == run / "checkpoint-1"
        assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
        assert_same_files(run, run / "checkpoint-1", "model.safetensors", atol=0)


def test_a_checkpoint_of_deepspeed_is_refused_elsewhere(two_processes, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(two_processes.folder / "resumed" / "ddp" / "checkpoint-2", checkpoint)
    trainer = cases.trainer(tmp_path / "run", cases.GAN, num_processes=1)
    trainer.check_engine_of(checkpoint)
    (checkpoint / "latest").write_text("global_step2", encoding="utf-8")
    with pytest.raises(UserError, match="written under DeepSpeed"):
        trainer.check_engine_of(checkpoint)


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_a_failed_save_on_one_rank_ends_all_and_leaves_the_whole_checkpoint(two_processes, where):
    first, second = two_processes["failed_save"][where]
    assert "No space left on device" in first
    assert "another process" in second
    run = two_processes.folder / "failed_save" / where
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (run / ".saving").exists()
    assert (run / "checkpoint-1" / "model.safetensors").is_file()
