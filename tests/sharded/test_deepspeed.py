"""DeepSpeed's ZeRO-2 and ZeRO-3 train, log, save and resume as data parallelism does; two processes on a CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sharded_cases as cases
from sharded_cases import assert_close, assert_same_files
from vocabridge.checkpointing import CheckpointingTrainer
from vocabridge.errors import UserError
from vocabridge.plan.training_state import (
    ZERO_BUCKET,
    ZERO_PERSISTENCE,
    ZERO_REUSE_DISTANCE,
    Placement,
    weight_bytes,
)

ZERO = pytest.mark.parametrize("engine", ["zero2", "zero3"])
TRAINED = ("sft", "gan", "hidden_state", "lora")


@ZERO
@pytest.mark.parametrize("case", [*TRAINED, *cases.PLAIN])
def test_losses_and_weights_are_those_of_data_parallelism(under_deepspeed, case, engine):
    ddp, zero = (under_deepspeed[case][name] for name in ("ddp", engine))
    assert_close(cases.losses(zero["log"]), cases.losses(ddp["log"]))
    for one, other in zip(zero["log"], ddp["log"], strict=True):
        if "grad_norm" in one:  # DeepSpeed's has the discriminator in it, whose gradient is small
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
    folder = under_deepspeed.folder / case
    weights = "adapter_model.safetensors" if case == "lora" else "model.safetensors"
    for name in (weights, *(["objective.safetensors"] if cases.learns(ddp["pieces"]) else [])):
        assert_same_files(folder / engine, folder / "ddp", name)


@ZERO
@pytest.mark.parametrize("case", TRAINED)
def test_all_ranks_hold_the_same_and_all_learned_parts_move(under_deepspeed, case, engine):
    ddp, zero = (under_deepspeed[case][name] for name in ("ddp", engine))
    assert all(zero["alike"])
    assert bool(zero["alike"]) == (engine == "zero2"), "whole weights under ZeRO-2, pieces alone under ZeRO-3"
    in_file = load_file(under_deepspeed.folder / case / engine / "objective.safetensors") if case != "sft" else {}
    assert set(in_file) >= set(ddp["moved"])
    if engine == "zero2":
        assert zero["moved"] == ddp["moved"]
    if case in ("gan", "lora"):
        assert {"discriminator", "query_projector"} <= {part for name in ddp["moved"] for part in name.split(".")}


def test_zero3_holds_student_and_learned_parts_in_pieces(under_deepspeed):
    ddp, zero = (under_deepspeed["gan"][engine]["pieces"] for engine in ("ddp", "zero3"))
    assert {name: whole for name, (_, whole) in zero.items()} == {name: whole for name, (_, whole) in ddp.items()}
    assert all(held == (whole + 1) // 2 for held, whole in zero.values())
    assert {name.split(".")[0] for name in zero} == {"student", "objective"}


def test_the_planner_foresees_the_pieces_of_zero3(under_deepspeed):
    """These models have no matrix of more numbers than stay whole by default; here none does."""
    numbers = [torch.empty(whole, device="meta") for _, whole in under_deepspeed["gan"]["zero3"]["pieces"].values()]
    planned = weight_bytes(numbers, Placement("zero3", 2)) - sum(value.nbytes for value in numbers)
    assert planned == under_deepspeed["gan"]["zero3"]["piece_bytes"]


def test_the_planner_knows_the_defaults():
    config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig()
    assert config.reduce_bucket_size == ZERO_BUCKET
    assert config.max_reuse_distance == ZERO_REUSE_DISTANCE
    assert config.param_persistence_threshold == ZERO_PERSISTENCE


@ZERO
def test_models_are_read_whole_all_the_same(under_deepspeed, engine):
    assert under_deepspeed["gan"][engine]["teacher_is_whole"]
    assert not under_deepspeed["gan"][engine]["from_pretrained_cuts"]


@ZERO
def test_the_run_folder_is_a_plain_checkpoint(under_deepspeed, tiny_bpe_tokenizer, engine):
    cases.assert_is_plain_checkpoint(under_deepspeed.folder / "gan" / engine, tiny_bpe_tokenizer)


@ZERO
def test_probe_sees_whole_parameters(under_deepspeed, engine):
    ddp, zero = (under_deepspeed["gan"][name]["log"] for name in ("ddp", engine))
    probes = [[entry for entry in log if "probe/mmd_squared" in entry] for log in (zero, ddp)]
    assert [entry["step"] for entry in probes[0]] == [0, 2, 4]
    for one, other in zip(*probes, strict=True):
        for name in ("probe/mmd_squared", "probe/energy_distance", "probe/mean_cosine"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


@ZERO
def test_bf16_stays_near_data_parallelism(under_deepspeed, engine):
    ddp, zero = (under_deepspeed["bf16"][name] for name in ("ddp", engine))
    # DeepSpeed keeps the weights themselves in bfloat16, beside float32 ones in the optimizer.
    assert_close(cases.losses(zero["log"]), cases.losses(ddp["log"]), rel=1e-2)
    saved = load_file(under_deepspeed.folder / "bf16" / engine / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    for one in zero["log"]:
        assert one.get("coverage", 1.0) == 1.0  # sums for the log are not rounded


def test_a_learned_part_without_gradient_stays_where_it_is(under_deepspeed):
    """In the student's turn the discriminator has none: a zero for DeepSpeed, nothing at all elsewhere."""
    logs = [cases.losses(under_deepspeed["alternating"][engine]["log"]) for engine in ("ddp", "zero2", "zero3")]
    assert_close(logs[1], logs[0])
    assert_close(logs[2], logs[1], rel=1e-6)
    folder = under_deepspeed.folder / "alternating"
    assert_same_files(folder / "zero3", folder / "zero2", "objective.safetensors", atol=1e-6)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "engine"), [("resumed", "zero2"), ("resumed", "zero3"), ("resumed_lora", "zero3")])
def test_a_resumed_run_is_the_undisturbed_one(under_deepspeed, case, engine):
    whole, again = (under_deepspeed[case][name] for name in (engine, f"{engine}-again"))
    assert_close(cases.losses(again["log"]), cases.losses(whole["log"]), rel=1e-6)
    folder = under_deepspeed.folder / case
    weights = "adapter_model.safetensors" if case == "resumed_lora" else "model.safetensors"
    for name in (weights, "objective.safetensors"):
        assert_same_files(folder / f"{engine}-again", folder / engine, name, atol=1e-6)


@ZERO
def test_a_checkpoint_is_a_model_beside_deepspeeds_own_files(under_deepspeed, engine):
    checkpoint = under_deepspeed.folder / "resumed" / engine / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "objective.safetensors", "scheduler.pt", "latest", "global_step2"} <= names
    assert "optimizer.pt" not in names
    AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not list(under_deepspeed.folder.rglob(".saving"))


@ZERO
def test_another_engine_stage_or_number_of_processes_is_refused(under_deepspeed, tmp_path, monkeypatch, engine):
    told, other = under_deepspeed["resumed"], {"zero2": "zero3", "zero3": "zero2"}[engine]
    assert "was written under DeepSpeed" in told[f"{engine}-ddp"]
    assert "same number and stage" in told[f"{engine}-{other}"]
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(under_deepspeed.folder / "resumed" / engine / "checkpoint-2", checkpoint)
    trainer = cases.trainer(tmp_path / "run", cases.GAN, num_processes=1)
    trainer.is_deepspeed_enabled = True
    monkeypatch.setattr(CheckpointingTrainer, "is_zero3", engine == "zero3")
    with pytest.raises(UserError, match="written by 2 processes") as refusal:
        trainer.check_engine_of(checkpoint)
    assert "a run of 1 " in str(refusal.value)


def test_the_best_checkpoint_is_loaded(under_deepspeed):
    result, run = under_deepspeed["best"], under_deepspeed.folder / "best"
    assert [entry["step"] for entry in result["log"] if "eval_loss" in entry] == [2, 4]
    assert Path(result["best"]) == run / "checkpoint-2"
    for name in ("model.safetensors", "objective.safetensors"):
        assert_same_files(run, run / "checkpoint-2", name, atol=0)


def test_a_failed_save_on_one_rank_ends_all_and_leaves_the_whole_checkpoint(under_deepspeed):
    first, second = under_deepspeed["failed_save"]
    assert "No space left on device" in first
    assert "another process" in second
    run = under_deepspeed.folder / "failed_save"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (run / ".saving").exists()
