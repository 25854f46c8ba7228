"""What autograd keeps, on tensors without memory and on real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
)

from vocabridge.models.forward import position_ids
from vocabridge.plan.activations import layer_activations, trunk_activations
from vocabridge.plan.models import PlannedModels, empty_model
from vocabridge.plan.step import Step, step_parts, unknown
from vocabridge.plan.training_state import Placement

LENGTH = 48
STEP = Step(
    rows=4,
    length=LENGTH,
    checkpoint_every=None,
    on_cpu=True,
    teacher_is_cached=False,
    teacher_pieces=1,
    quantization=None,
    costs=("student head",),
)


def llama(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=100, num_key_value_heads=2, **(sizes | changes))


def gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=3, n_head=4, attn_pdrop=0.0)


def gemma() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
    )


def kept_bytes(model: Any, rows: int, *, autocast: bool = False) -> int:
    """Of a real forward, parameters apart; one row is shorter, so that there is a mask."""
    mask = torch.ones(rows, LENGTH, dtype=torch.long)
    mask[0, -5:] = 0
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model.get_decoder()(
            input_ids=torch.zeros(rows, LENGTH, dtype=torch.long),
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
        )
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (LlamaForCausalLM, llama()),
        (LlamaForCausalLM, llama(attn_implementation="eager")),
        (GPT2LMHeadModel, gpt2()),
        (Gemma3ForCausalLM, gemma()),
    ],
    ids=["llama", "eager", "gpt2", "gemma3"],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_equal_to_a_real_forward(model_class: Any, config: Any, autocast: bool):
    attention = config._attn_implementation
    empty = empty_model(config, dtype=torch.float32, attention=attention).train()
    found = trunk_activations(empty, LENGTH, autocast=autocast)
    assert found is not None
    real = model_class(config).train()
    expected = kept_bytes(real, 4, autocast=autocast)
    assert found.constant + 4 * found.per_row == pytest.approx(expected, rel=0.02)
    if not autocast:
        assert found.constant < found.per_row / 100


def test_rule_of_thumb_for_llama():
    """``T (6 H + 4 A D + 4 F)`` numbers a layer, as the docstring says."""
    config = llama(hidden_size=64, intermediate_size=160)
    found = trunk_activations(empty_model(config, dtype=torch.float32).train(), LENGTH)
    assert found is not None
    numbers = 3 * LENGTH * (6 * 64 + 4 * 64 + 4 * 160)
    assert found.per_row / (4 * numbers) == pytest.approx(1, abs=0.25)


def test_narrow_weights_halve_what_is_kept():
    model = empty_model(llama(), dtype=torch.float32).train()
    whole, half = trunk_activations(model, LENGTH), trunk_activations(model, LENGTH, weights=torch.bfloat16)
    assert whole is not None
    assert half is not None
    assert 0.5 <= half.per_row / whole.per_row < 0.75  # statistics of the norms stay float32


@pytest.mark.parametrize(("num_layers", "every"), [(3, 1), (8, 1), (8, 2)])
def test_checkpointing_keeps_inputs_of_layers(num_layers: int, every: int):
    """Against what stays of the whole trunk, and what the layer that is computed again keeps."""
    real: Any = LlamaForCausalLM(llama(num_hidden_layers=num_layers)).train()
    real.activation_checkpointing_enable(every_n_layers=every)
    again = [kept_bytes(LlamaForCausalLM(llama(num_hidden_layers=number)).train(), 4) for number in (1, 2)]
    expected = kept_bytes(real, 4) + again[1] - again[0]
    models = PlannedModels(empty_model(llama(num_hidden_layers=num_layers), dtype=torch.float32), None, nn.Module())
    step = replace(STEP, checkpoint_every=every)
    parts = {part.name: part.num_bytes for part in step_parts(models, step, Placement())}
    assert parts["student's activations"] == pytest.approx(expected, rel=0.1)


def test_one_layer_of_many():
    """What a trunk of two layers keeps beyond one of one; the first layer also meets the rotary tables."""
    one, two = (kept_bytes(LlamaForCausalLM(llama(num_hidden_layers=number)).train(), 4) for number in (1, 2))
    found = layer_activations(empty_model(llama(), dtype=torch.float32).train(), LENGTH)
    assert found is not None
    assert 4 * found == pytest.approx(two - one, rel=0.05)


def test_values_are_told_apart_from_shapes():
    class Router(nn.Module):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden_states * hidden_states.max().item()

    model: Any = LlamaForCausalLM(llama()).train()
    model.model.norm = Router()
    assert trunk_activations(model, LENGTH) is None
    assert layer_activations(model, LENGTH) is not None  # the norm comes later
    model.model.layers[0].input_layernorm = Router()
    layer_activations.cache_clear()
    assert layer_activations(model, LENGTH) is None


def test_experts_in_float32_are_not_known(caplog: pytest.LogCaptureFixture):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=100, num_key_value_heads=2, num_local_experts=4, eos_token_id=1, **sizes)
    model = empty_model(config, dtype=torch.float32)
    assert trunk_activations(model, LENGTH) is None
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert "depends on values" in next(unknown(PlannedModels(model, None, nn.Module()), STEP, Placement()))
