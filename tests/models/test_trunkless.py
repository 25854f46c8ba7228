"""Embeddings and head without the layers, in every family, and when the whole model must be loaded after all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from vocabridge.models.capture import trunk_shape
from vocabridge.models.forward import forward_side
from vocabridge.models.heads import output_head
from vocabridge.models.loading import load_teacher
from vocabridge.models.spec import ModelSpec
from vocabridge.models.trunkless import drop_trunk, load_ends

FAMILIES = ("gpt2", "opt", "llama", "llama_tied", "qwen2", "gemma2", "gemma3", "cohere", "granite")

TinyModel = Callable[..., PreTrainedModel]


def save(model: PreTrainedModel, folder: Path, **options: object) -> ModelSpec:
    model.save_pretrained(folder, **options)
    return ModelSpec(model=str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_head_are_those_of_the_whole_model(
    tiny_model: TinyModel, tmp_path: Path, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(family)
    ends = load_ends(save(model, tmp_path))
    assert not ends.has_trunk
    assert "UNEXPECTED" not in "".join(capfd.readouterr()), "the weights of the trunk are left out on purpose"
    num_parameters = sum(p.numel() for p in ends.model.parameters())
    assert num_parameters < 0.9 * sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in ends.model.parameters())
    ids = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(9) < 4, -100, ids)
    side = forward_side(model, ids, torch.ones_like(ids), labels)
    assert torch.equal(ends.model.get_input_embeddings()(ids), side.embedding(ids))
    head = output_head(ends.model, 250)
    assert torch.equal(head(side.hidden_states), output_head(model, 250)(side.hidden_states))
    assert trunk_shape(ends.model) == trunk_shape(model)


def test_fingerprint_is_that_of_the_trunk_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    first = load_ends(save(model, tmp_path / "a")).fingerprint
    assert load_ends(save(model, tmp_path / "b")).fingerprint == first
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 0.25
    assert load_ends(save(model, tmp_path / "b")).fingerprint != first


def test_checkpoint_in_several_files(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    spec = save(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ends = load_ends(spec)
    assert not ends.has_trunk
    assert torch.equal(ends.model.get_output_embeddings().weight, model.get_output_embeddings().weight)
    with torch.no_grad():
        model.model.norm.weight += 1
    assert load_ends(save(model, tmp_path, max_shard_size="20KB")).fingerprint != ends.fingerprint


def test_dtype_is_the_recipes(tiny_model: TinyModel, tmp_path: Path) -> None:
    spec = save(tiny_model("llama").bfloat16(), tmp_path)
    assert load_ends(spec).model.dtype == torch.bfloat16
    assert load_ends(spec.model_copy(update={"dtype": "float32"})).model.dtype == torch.float32


def test_adapters_need_the_whole_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    spec = save(base, tmp_path)
    torch.manual_seed(0)
    adapter = LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(tiny_model("llama"), adapter).save_pretrained(tmp_path)
    ends = load_ends(spec)
    assert ends.has_trunk
    plain = tmp_path / "plain"
    assert load_ends(save(base, plain)).fingerprint != ends.fingerprint


def test_families_that_need_a_layer_are_loaded_whole(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vocabridge.models.trunkless as module

    def refuse(*args: object, **kwargs: object) -> None:
        raise IndexError("index 0 is out of range")

    spec = save(tiny_model("llama"), tmp_path)
    monkeypatch.setattr(module, "load_model", refuse)
    ends = load_ends(spec)
    assert ends.has_trunk
    assert len(ends.model.model.layers) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_trunk_frees_the_layers_and_nothing_else(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    whole = load_teacher(save(tiny_model(family), tmp_path))
    head, shape = output_head(whole), trunk_shape(whole)
    before = sum(p.numel() for p in whole.parameters())
    drop_trunk(whole)
    assert sum(p.numel() for p in whole.parameters()) < 0.9 * before
    assert torch.equal(output_head(whole).weight, head.weight)
    assert trunk_shape(whole) == shape
    drop_trunk(whole)  # an empty list is no longer found, which does no harm
