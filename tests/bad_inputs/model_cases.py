"""Models: folders, configurations, weights, GGUF files, adapters, devices."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from bad_inputs.cases import BadInput, Spoil, set_in_recipe
from bad_inputs.workplace import change_json, change_weights, change_yaml, empty

WEIGHTS = "student/model.safetensors"


def in_config(**changes: Any) -> Spoil:
    return lambda folder: change_json(folder / "student" / "config.json", changes)


def config_file(text: str) -> Spoil:
    return lambda folder: (folder / "student" / "config.json").write_text(text)


def gguf(content: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "teacher.gguf").write_bytes(content)
        change_yaml(folder / "recipe.yaml", teacher__model="teacher.gguf")

    return spoil


def not_finite(side: str, name: str) -> Spoil:
    return lambda folder: change_weights(folder / side, lambda tensors: tensors[name].fill_(float("nan")))


def index(weight_map: dict[str, str] | None) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "student" / "model-1.safetensors")
        text = "{" if weight_map is None else json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "student" / "model.safetensors.index.json").write_text(text)

    return spoil


def short_positions(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=32, n_layer=1, n_head=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "student")


MODELS = [
    set_in_recipe(
        "student.model: no such folder", "./studnet", "recipe.yaml:5: student.model names './studnet'", "not exist"
    ),
    set_in_recipe("student.model: a file", WEIGHTS, "model.safetensors' is a file", "give the folder"),
    BadInput("an empty folder", ("student' has no tokenizer.json",), lambda folder: empty(folder / "student")),
    BadInput(
        "config.json missing",
        ("student' has no config.json", "not a checkpoint"),
        lambda folder: (folder / "student" / "config.json").unlink(),
    ),
    BadInput("config.json cut", ("student'", "not a valid JSON file"), config_file("{")),
    BadInput("config.json a list", ("student'", "cannot be loaded"), config_file("[]")),
    BadInput(
        "an unknown kind of model", ("student': config.json cannot be read", "mamba9"), in_config(model_type="mamba9")
    ),
    BadInput(
        "an encoder and decoder",
        ("is a t5 model, not a causal language model",),
        in_config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
    ),
    BadInput(
        "a model without its head",
        ("saved as LlamaModel", "load and save it with AutoModelForCausalLM"),
        in_config(architectures=["LlamaModel"]),
    ),
    BadInput("a width that the heads do not divide", ("student'", "hidden size (30)"), in_config(hidden_size=30)),
    BadInput(
        "weights of another width",
        ("config.json does not fit the weights", "[700, 32]", "[700, 64]", "again"),
        in_config(hidden_size=64),
    ),
    BadInput(
        "weights of fewer layers",
        ("lacks 9 weights", "model.layers.2.", "not a complete"),
        in_config(num_hidden_layers=3),
    ),
    BadInput(
        "config.json with fewer layers than the weights",
        ("student': config.json has fewer layers", "model.layers.1.input_layernorm.weight", "mend it"),
        in_config(num_hidden_layers=1),
    ),
    BadInput(
        "generation_config.json cut",
        ("student': generation_config.json cannot be read", "mend it, or remove it"),
        lambda folder: (folder / "student" / "generation_config.json").write_text('{"eos_token_id": '),
    ),
    BadInput(
        "generation_config.json a list",
        ("student': generation_config.json cannot be read", "mend it, or remove it"),
        lambda folder: (folder / "student" / "generation_config.json").write_text("[]"),
    ),
    BadInput("weights missing", ("student' has no model.safetensors",), lambda folder: (folder / WEIGHTS).unlink()),
    BadInput(
        "weights cut",
        ("student': the model cannot be loaded", "incomplete metadata"),
        lambda folder: os.truncate(folder / WEIGHTS, 5000),
    ),
    BadInput(
        "weights as a pickle",
        ("holds its weights as a pickle (pytorch_model.bin)", "save the model again"),
        lambda folder: (folder / WEIGHTS).rename(folder / "student" / "pytorch_model.bin"),
    ),
    BadInput(
        "an index that names a shard that is not there",
        ("student': the model cannot be loaded", "model-2"),
        index({"model.norm.weight": "model-2.safetensors"}),
    ),
    BadInput(
        "an index that leads out",
        ("lies outside of its folder", "download the model again"),
        index({"model.norm.weight": "../teacher/model.safetensors"}),
    ),
    BadInput(
        "a student that is not finite",
        ("student): the model's own logits are not finite", "load others"),
        not_finite("student", "model.norm.weight"),
    ),
    BadInput(
        "a teacher that is not finite",
        ("teacher): the model's own logits are not finite", "load others"),
        not_finite("teacher", "lm_head.weight"),
    ),
    BadInput(
        "rows beyond the learned positions",
        ("student: the longest row has", "positions for 16", "data.max_length"),
        short_positions,
    ),
    set_in_recipe(
        "teacher.model: GGUF file missing", "teacher.gguf", "recipe.yaml:8: teacher.model names 'teacher.gguf'"
    ),
    BadInput("a GGUF file that was cut", ("teacher.gguf': the tokenizer cannot be loaded",), gguf(b"GGUF\3\0")),
    set_in_recipe(
        "student.lora: no such layer", {"target_modules": ["c_attn"]}, "no linear layer is called 'c_attn'", "q_proj"
    ),
    set_in_recipe(
        "student.lora: the head", {"target_modules": ["lm_head"]}, "'lm_head' is the output head", "leave it out"
    ),
    set_in_recipe(
        "student.attn_implementation: unknown",
        "flash",
        "student': the model cannot be loaded",
        'attn_implementation="flash"',
        "not supported",
        "change that setting",
    ),
    set_in_recipe("teacher.quantization: package or device missing", "4bit", "quantization: 4bit needs"),
    BadInput(
        "a layer that the model lacks",
        ("student layer 99 does not exist", "give a number from 0 to 2"),
        lambda folder: change_yaml(folder / "recipe.yaml", objective={"name": "hidden_state", "layers": [[99, 1]]}),
    ),
]
