"""Models and learned parts without weights have the shapes of the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from tiny_pair import OBJECTIVE_SETTINGS, student_model, teacher_model
from vocabridge.assembly import build_objective
from vocabridge.errors import UserError
from vocabridge.models.spec import ModelSpec
from vocabridge.objectives import objective_info, objective_names
from vocabridge.pairs import PairTokenizer
from vocabridge.plan.models import model_of, planned_models, read_config


def shapes(module: nn.Module, strip: str = "") -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    return {
        name.removeprefix(strip): (tuple(value.shape), value.dtype, value.requires_grad)
        for name, value in module.named_parameters()
    }


@pytest.mark.parametrize("name", objective_names())
def test_learned_parts_of_every_objective(
    name: str,
    make_recipe: Any,
    pair_folder: Path,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
):
    is_same = "same_tokenizer" in objective_info(name).config_class.needs
    teacher_tokenizer = tiny_bpe_tokenizer if is_same else tiny_sentencepiece_tokenizer
    objective = {"name": name, **OBJECTIVE_SETTINGS.get(name, {})}
    teacher = student_model(tiny_bpe_tokenizer, seed=1) if is_same else teacher_model(teacher_tokenizer)
    real = build_objective(
        objective,
        student_model(tiny_bpe_tokenizer),
        tiny_bpe_tokenizer,
        teacher,
        teacher_tokenizer,
        pair_tokenizer=PairTokenizer(tiny_bpe_tokenizer, teacher_tokenizer),
    )
    changes = {"teacher": {"model": str(pair_folder / "student")}} if is_same else {}
    models = planned_models(make_recipe(objective=objective, **changes))
    assert shapes(models.objective, "0.") == shapes(real)
    assert all(value.device.type == "meta" for value in models.objective.parameters())


def test_composition_and_matching_kinds(make_recipe: Any):
    terms = [
        {"name": "cross_entropy"},
        {"name": "dskd_cma", "matching": "conditional_transport"},
        {"name": "gold"},
        {"name": "hidden_state"},
    ]
    models = planned_models(make_recipe(objective={"terms": terms}))
    names = list(shapes(models.objective))
    assert any(name.startswith("1.matching.transport.") for name in names)
    assert any(name.startswith("3.projectors.") for name in names)


def test_models_are_those_of_the_configuration(
    make_recipe: Any, tiny_bpe_tokenizer: PreTrainedTokenizerFast, tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast
):
    models = planned_models(make_recipe())
    assert shapes(models.student) == shapes(student_model(tiny_bpe_tokenizer))  # tied: the head is no second parameter
    assert models.teacher is not None
    assert shapes(models.teacher) == shapes(teacher_model(tiny_sentencepiece_tokenizer))
    assert {value.device.type for value in [*models.student.parameters(), *models.teacher.parameters()]} == {"meta"}


@pytest.mark.parametrize(
    ("side", "changes", "dtype"),
    [
        ("student", {}, torch.float32),
        ("student", {"lora": {"r": 2}}, torch.bfloat16),
        ("teacher", {}, torch.bfloat16),
        ("teacher", {"dtype": "float32"}, torch.float32),
    ],
)
def test_automatic_type(side: Any, changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path, pair_folder: Path):
    config = read_config(ModelSpec(model=str(pair_folder / "student")))
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    model: Any = model_of(ModelSpec(model=str(tmp_path), **changes), side, on_cpu=False)
    assert model.get_input_embeddings().weight.dtype == dtype


def test_gguf_file_by_its_header(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(3)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(50)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = read_config(ModelSpec(model=str(tmp_path / "tiny.gguf")))
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (3, 32, 50)
    model = model_of(ModelSpec(model=str(tmp_path / "tiny.gguf")), "teacher", on_cpu=False)
    assert next(model.parameters()).dtype == torch.float32  # what it is unpacked to
    (tmp_path / "broken.gguf").write_bytes(b"no header")
    with pytest.raises(UserError, match=r"broken.gguf': the header of the GGUF file cannot be read"):
        read_config(ModelSpec(model=str(tmp_path / "broken.gguf")))


def test_what_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"config.json cannot be read, which a plan needs"):
        read_config(ModelSpec(model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match=r"no model can be built from its configuration"):
        model_of(ModelSpec(model=str(tmp_path)), "teacher", on_cpu=False)
