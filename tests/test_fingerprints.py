"""Fingerprints change with what they name and with nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tiny_pair import student_model
from vocabridge.fingerprints import (
    checkpoint_fingerprint,
    data_fingerprint,
    model_fingerprint,
    weights_fingerprint,
)
from vocabridge.text import Example, Message


def test_a_copy_of_a_model_has_its_fingerprint(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    model = student_model(tiny_bpe_tokenizer)
    first = model_fingerprint(model, tiny_bpe_tokenizer)
    twin = student_model(tiny_bpe_tokenizer)
    twin.config._name_or_path = "/elsewhere"
    tiny_bpe_tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)  # leaves its settings behind
    assert model_fingerprint(twin, tiny_bpe_tokenizer) == first


def test_one_changed_weight_changes_it(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    model = student_model(tiny_bpe_tokenizer)
    first = model_fingerprint(model, tiny_bpe_tokenizer)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        assert weight.numel() > 8 * 1024, "the changed value must not be among the samples"
        weight[5, 3] += 1e-6
    assert model_fingerprint(model, tiny_bpe_tokenizer) != first


def test_tokenizer_dtype_and_adapters_count(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    model = student_model(tiny_bpe_tokenizer)
    found = {model_fingerprint(model, tiny_bpe_tokenizer)}
    other_template = copy.deepcopy(tiny_bpe_tokenizer)
    other_template.chat_template = "{{ messages[0].content }}"
    found.add(model_fingerprint(model, other_template))
    found.add(model_fingerprint(student_model(tiny_bpe_tokenizer).to(torch.bfloat16), tiny_bpe_tokenizer))
    for alpha in (8, 16):
        torch.manual_seed(1)
        config = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_alpha=alpha)
        found.add(model_fingerprint(get_peft_model(student_model(tiny_bpe_tokenizer), config), tiny_bpe_tokenizer))
    assert len(found) == 5


def test_data_counts_in_prompt_messages_and_references() -> None:
    example = Example("p", (Message("user", "p"),), "r", ("r", "s"), "dev.jsonl:1")
    first = data_fingerprint([example])
    assert data_fingerprint([Example("p", (Message("user", "p"),), "r", ("r", "s"), "copy.jsonl:9")]) == first
    others = [
        [Example("q", example.messages, "r", ("r", "s"), "")],
        [Example("p", (Message("system", "p"),), "r", ("r", "s"), "")],
        [Example("p", example.messages, "r", ("r",), "")],
        [example, example],
    ]
    assert len({first, *map(data_fingerprint, others)}) == 5


def test_fingerprint_of_files_changes_with_one_weight_and_one_setting(
    tmp_path: Path, tiny_bpe_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = student_model(tiny_bpe_tokenizer)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1

    def of_folder(name: str) -> str:
        config = AutoConfig.from_pretrained(tmp_path / name)
        return checkpoint_fingerprint(config, sorted((tmp_path / name).glob("*.safetensors")))

    found = {of_folder("whole")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert weights_fingerprint(loaded) == weights_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"))
    with torch.no_grad():
        loaded.get_input_embeddings().weight[5, 3] += 1e-6
    loaded.save_pretrained(tmp_path / "whole")
    found.add(of_folder("whole"))
    model.config.rms_norm_eps *= 2
    model.save_pretrained(tmp_path / "whole")
    found.add(of_folder("whole"))
    assert len(found) == 3
