"""Weights, gradients and optimizer states against a trainer that has taken a step, and shards against torch's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.models.lora import add_lora
from vocabridge.models.spec import LoraSpec
from vocabridge.plan.models import planned_models
from vocabridge.plan.optimizer_states import optimizer_state_bytes
from vocabridge.plan.recipe_plan import device_parts
from vocabridge.plan.training_state import (
    Placement,
    communication_bytes,
    gradient_bytes,
    optimizer_bytes,
    weight_bytes,
)
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig


class _Gradients(TrainerCallback):
    """Their bytes when all have been computed."""

    num_bytes = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.num_bytes = sum(value.grad.nbytes for value in model.parameters() if value.grad is not None)


@pytest.mark.parametrize(
    ("optim", "optim_args", "has_lora"),
    [
        ("adamw_torch_fused", None, False),
        ("adamw_torch", None, True),
        ("adafactor", None, False),
        ("sgd", None, False),
        ("sgd", "momentum=0.9", False),
    ],
)
def test_state_is_that_of_a_trainer(
    optim: str,
    optim_args: str | None,
    has_lora: bool,
    make_recipe: Any,
    tmp_path: Path,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
):
    student: Any = student_model(tiny_bpe_tokenizer)
    trainer = DistillationTrainer(
        add_lora(student, LoraSpec(r=2)).train() if has_lora else student,
        teacher_model(tiny_sentencepiece_tokenizer),
        objective={"name": "dskd_cma", "gan": {"hidden_size": 16}},
        args=DistillationConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            optim=optim,
            optim_args=optim_args,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            diagnostics_steps=0,
        ),
        train_dataset=ROWS,
        student_tokenizer=tiny_bpe_tokenizer,
        teacher_tokenizer=tiny_sentencepiece_tokenizer,
        callbacks=[gradients := _Gradients()],
    )
    trainer.train()
    assert trainer.optimizer is not None
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    training = {"optim": optim} | ({"optim_args": optim_args} if optim_args else {})
    recipe = make_recipe(training=training, student={"lora": {"r": 2}} if has_lora else {})
    planned = {part.name: part.num_bytes for part in device_parts(recipe, planned_models(recipe), Placement())}

    objective = trainer.objective_module
    assert planned["student's weights"] == sum(value.nbytes for value in trainer.student.parameters())
    held = [*objective.parameters(), *objective.buffers()]
    assert planned["objective's weights"] == sum(value.nbytes for value in held)
    assert trainer.teacher is not None
    assert planned["teacher's weights"] == sum(value.nbytes for value in trainer.teacher.model.parameters())
    assert gradients.num_bytes > 0
    assert planned["gradients"] == gradients.num_bytes
    assert planned.get("optimizer", 0) == sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    assert "communication" not in planned


@pytest.fixture
def one_gloo_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("has_lora", [False, True])
def test_fsdp2_holds_what_accelerate_makes_of_a_bfloat16_student(
    one_gloo_process: None, has_lora: bool, mixed_precision: str, tiny_bpe_tokenizer: PreTrainedTokenizerFast
):
    student: Any = student_model(tiny_bpe_tokenizer).to(torch.bfloat16)
    student = (add_lora(student, LoraSpec(r=2)) if has_lora else student).train()
    placement = Placement("fsdp2", half=mixed_precision == "bf16")
    parameters = list(student.parameters())
    trained = [value for value in parameters if value.requires_grad]
    assert (len(trained) < len(parameters)) == has_lora
    planned = (
        weight_bytes(parameters, placement),
        gradient_bytes(trained, placement),
        optimizer_bytes(trained, placement, optim="adamw_torch"),
    )

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision=mixed_precision,
        device=torch.device("cpu"),
        is_main_process=False,  # which only logs, and would want all of accelerate's state for that
    )
    model = fsdp2_prepare_model(accelerator, student)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad])
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
    optimizer.step()

    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert planned == tuple(sum(value.nbytes for value in held) for held in (model.parameters(), gradients, states))


def test_fsdp2_has_the_first_piece_of_each_parameter(make_recipe: Any):
    models = planned_models(make_recipe())
    parameters = list(models.student.parameters())
    placement = Placement("fsdp2", 3)
    pieces = [value.detach().chunk(3)[0] for value in parameters]
    assert weight_bytes(parameters, placement) == sum(value.nbytes for value in pieces)
    assert gradient_bytes(parameters, placement) == sum(value.nbytes for value in pieces)
    states = sum(2 * value.nbytes + 4 for value in pieces)  # both moments and the number of the step
    assert optimizer_bytes(parameters, placement, optim="adamw_torch") == states

    layer = sum(value.numel() for value in models.student.model.layers[0].parameters())
    learned = sum(value.numel() for value in models.objective.parameters())
    outside = sum(value.numel() for value in parameters) - 2 * layer + learned
    found = communication_bytes(models, Placement("fsdp2", 3, half=True))
    assert found == 2 * 2 * (outside + 2 * layer) + 4 * max(outside, layer)


@pytest.mark.parametrize("half", [False, True])
def test_deepspeed_shards_and_keeps_float32(half: bool, make_recipe: Any):
    models = planned_models(make_recipe())
    trained = models.trained
    number = sum(value.numel() for value in trained)
    width = 2 if half else 4
    shard = math.ceil(number / 4)
    zero2, zero3 = (Placement(strategy, 4, half=half) for strategy in ("zero2", "zero3"))
    assert weight_bytes(trained, zero2) == width * number
    for placement in (zero2, zero3):
        assert gradient_bytes(trained, placement) == math.ceil((width + 4) * number / 4)
        assert optimizer_bytes(trained, placement, optim="adamw_torch") == (8 + 4) * shard + 4
    assert communication_bytes(models, zero2) == width * 500_000_000  # however small the model is
    layer = sum(value.numel() for value in models.student.model.layers[0].parameters())
    outside = number - 2 * layer
    gathered = number + outside + layer  # all weights, and gradients of what is outside and of one layer
    assert communication_bytes(models, zero3) == width * (500_000_000 + gathered)


def test_zero3_keeps_small_parameters_whole_and_gathers_no_more_than_its_reuse_distance(make_recipe: Any):
    small, large = torch.empty(100_000, device="meta"), torch.empty(1000, 101, device="meta")
    assert weight_bytes([small, large], Placement("zero3", 8)) == 4 * (100_000 + 12_500 + 12_625)
    assert weight_bytes([torch.empty(7, device="meta")], Placement("zero3", 4, half=True)) == 2 * (7 + 2)
    models = planned_models(make_recipe())
    layers = [nn.Linear(50_000, 40_000, bias=False, device="meta") for _ in range(2)]  # 2e9 numbers each
    models.student.model.layers = nn.ModuleList(layers)
    outside = sum(value.numel() for value in [*models.student.parameters(), *models.objective.parameters()]) - 4 * 10**9
    found = communication_bytes(models, Placement("zero3", 8))
    assert found == pytest.approx(4 * (5e8 + (outside + 1e9) + outside + 2e9), rel=1e-6)


def test_buckets_of_ddp(make_recipe: Any):
    models = planned_models(make_recipe())
    assert communication_bytes(models, Placement("ddp", 1)) == 0
    assert communication_bytes(models, Placement("ddp", 2)) == sum(4 * value.numel() for value in models.trained)


def test_packed_optimizers():
    matrix, small = torch.empty(1000, 1000, device="meta"), torch.empty(100, device="meta")
    scales = 4 * math.ceil(1_000_000 / 256)
    assert optimizer_state_bytes([matrix], "adamw_bnb_8bit") == 2 * (1_000_000 + scales)
    assert optimizer_state_bytes([matrix], "adamw_torch_4bit") == 2 * (500_000 + scales)
    assert optimizer_state_bytes([matrix, small], "paged_lion_8bit") == 1_000_000 + scales + 400
    assert optimizer_state_bytes([small], "paged_adamw_32bit") == 800
    assert optimizer_state_bytes([small], "rmsprop_bnb") == 400
    assert optimizer_state_bytes([small], "ademamix") == 1200
