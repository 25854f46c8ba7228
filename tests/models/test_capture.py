"""Captured layers against what the models themselves report or use inside."""

import importlib

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from vocabridge.errors import UserError
from vocabridge.models.capture import (
    NO_LAYERS,
    LayerRecorder,
    LayerRequest,
    check_layers,
    resolve_layer,
    trunk_shape,
)
from vocabridge.models.forward import forward_side, position_ids, teacher_side

LENGTHS, PROMPT_LENGTHS = [11, 6, 9], [4, 2, 5]
NUM_SUPERVISED = sum(LENGTHS) - sum(PROMPT_LENGTHS)
NUM_LAYERS = 3
HIDDEN_FAMILIES = ["gpt2", "opt", "llama", "qwen2", "gemma2", "gemma3"]
EVERYTHING = LayerRequest(hidden_states=(0, 1, 3), attention=(1, 3))


@pytest.fixture
def model(tiny_model):
    """``model(family)``, three layers deep."""

    def build(family, **changes):
        changes = {"num_hidden_layers": NUM_LAYERS} | changes
        if family in ("phi3", "gpt_neox", "bloom"):
            return _fused_model(family, **changes)
        if family in ("gemma2", "gemma3"):
            changes["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
        if family == "qwen2":
            changes["layer_types"] = ["full_attention"] * NUM_LAYERS
        return tiny_model(family, **changes)

    return build


def _fused_model(family, num_hidden_layers):
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": num_hidden_layers, "num_attention_heads": 4}
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    config = {
        "phi3": lambda: transformers.Phi3Config(**sizes, **ids, intermediate_size=24, num_key_value_heads=2),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**sizes, **ids, intermediate_size=24),
        "bloom": lambda: transformers.BloomConfig(**sizes, **ids),
    }[family]()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _batch(side="right"):
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    ids, mask, labels = torch.full(shape, 256), torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    for row, (length, prompt_length) in enumerate(zip(LENGTHS, PROMPT_LENGTHS, strict=True)):
        start = 0 if side == "right" else shape[1] - length
        ids[row, start : start + length] = torch.randint(0, 256, (length,), generator=generator)
        mask[row, start : start + length] = 1
        labels[row, start + prompt_length : start + length] = ids[row, start + prompt_length : start + length]
    return ids, mask, labels


def _packed(states, labels):
    """The positions before each label, by a plain loop."""
    return torch.stack([states[b, t - 1] for b, t in (labels != -100).nonzero().tolist()])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", HIDDEN_FAMILIES)
def test_hidden_states_are_those_that_the_model_reports(model, family, padding):
    network, (ids, mask, labels) = model(family), _batch(padding)
    with torch.no_grad():
        side = forward_side(network, ids, mask, labels, layers=LayerRequest(hidden_states=(0, 1, 2, 3)))
        own = network(
            input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), output_hidden_states=True
        ).hidden_states
    assert sorted(side.layers.hidden_states) == [0, 1, 2, 3]
    for layer, states in side.layers.hidden_states.items():
        assert states.shape == (NUM_SUPERVISED, trunk_shape(network).width(layer))
        if not (family == "opt" and layer == 3):  # it reports the state before its last projection
            torch.testing.assert_close(states, _packed(own[layer], labels))
    assert torch.equal(side.layers.hidden_states[3], side.hidden_states)
    assert not torch.allclose(side.layers.hidden_states[1], side.layers.hidden_states[2])


def _used_by_attention(network, monkeypatch, ids):
    """Query, key and value ``[B, L, heads, head_dim]`` of layer 2, caught where the model's own code has split them."""
    caught = []
    network.set_attn_implementation("eager")
    module = importlib.import_module(type(network).__module__)
    if hasattr(module, "eager_attention_forward"):
        own = module.eager_attention_forward

        def spy(attention, query, key, value, *rest, **options):
            caught.append([states.transpose(1, 2) for states in (query, key, value)])
            return own(attention, query, key, value, *rest, **options)

        monkeypatch.setattr(module, "eager_attention_forward", spy)
    else:  # Bloom
        attention = network.transformer.h[1].self_attention
        own_reshape = attention._reshape

        def spy_reshape(fused):
            caught.extend([None, [states.transpose(1, 2) for states in own_reshape(fused)]])
            return own_reshape(fused)

        monkeypatch.setattr(attention, "_reshape", spy_reshape)
    network(input_ids=ids)
    return caught[1]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2", "gemma3", "phi3", "gpt_neox", "bloom"])
def test_projections_are_what_the_attention_computes_with(model, family, monkeypatch):
    """At the first token of a row, where the rotary embedding is the identity."""
    network = model(family)
    ids = torch.randint(0, 256, (6, 2), generator=torch.Generator().manual_seed(2))
    labels = torch.stack([torch.full((6,), -100), ids[:, 1]], dim=1)
    with torch.no_grad():
        found = forward_side(network, ids, torch.ones_like(ids), labels, layers=LayerRequest(attention=(2,)))
        query, key, value = (states[:, 0] for states in _used_by_attention(network, monkeypatch, ids))
    projections = found.layers.attention[2]
    attention = network.model.layers[1].self_attn if family in ("llama", "gemma3") else None
    of_query, of_key = (getattr(attention, name, torch.nn.Identity()) for name in ("q_norm", "k_norm"))
    factor = query.shape[-1] ** -0.5 if family == "opt" else 1.0  # OPT scales its queries first
    assert torch.unique(query, dim=0).shape[0] == 6
    torch.testing.assert_close(of_query(projections.query) * factor, query)
    torch.testing.assert_close(of_key(projections.key), key)
    torch.testing.assert_close(projections.value, value)
    assert projections.query.shape[1] == 4
    assert projections.key.shape[1] == (2 if family in ("llama", "qwen2", "gemma3", "phi3") else 4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_padding_changes_nothing(model, family):
    sides = [forward_side(model(family), *_batch(side), layers=EVERYTHING).layers for side in ("left", "right")]
    assert sorted(sides[0].attention) == [1, 3]
    for one, other in zip(*(list(_tensors(side)) for side in sides), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def _tensors(layers):
    yield from layers.hidden_states.values()
    for projections in layers.attention.values():
        yield from (projections.query, projections.key, projections.value)


def _loss(layers):
    """Every captured number with a weight of its own."""
    return sum(
        (states.float().sin() * torch.arange(1, states.numel() + 1).view_as(states)).mean()
        for states in _tensors(layers)
    )


def _gradients(network, request=EVERYTHING, *, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layers = forward_side(network, *_batch(), layers=request).layers
    _loss(layers).backward()
    return [value.detach() for value in _tensors(layers)], {
        name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_activation_checkpointing_changes_neither_values_nor_gradients(model, family, use_lora):
    def run(checkpointing):
        network = _with_lora(model(family)) if use_lora else model(family)
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        network.train()
        if checkpointing:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            network.enable_input_require_grads()
        return _gradients(network)

    values, gradients = run(False)
    checkpointed_values, checkpointed_gradients = run(True)
    assert all(torch.equal(one, other) for one, other in zip(values, checkpointed_values, strict=True))
    assert len(gradients) > 5
    assert gradients.keys() == checkpointed_gradients.keys()
    assert sum(float(gradient.abs().max()) > 0 for gradient in gradients.values()) > 5
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient, msg=name)


def test_activation_checkpointing_recomputes_indeed(model):
    network, calls = model("llama").train(), []
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    _gradients(network)
    assert len(calls) == 2


def test_reentrant_checkpointing_is_refused_where_it_would_cut_the_gradient(model):
    network = model("llama").train()
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    network.enable_input_require_grads()
    with pytest.raises(UserError, match="use_reentrant: false"):
        forward_side(network, *_batch(), layers=LayerRequest(attention=(2,)))


def _with_lora(network):
    family = network.config.model_type
    names = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=names, init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    return get_peft_model(network, config).eval()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_are_part_of_what_is_captured(model, family):
    adapted = _with_lora(model(family))
    plain = forward_side(model(family), *_batch(), layers=EVERYTHING).layers
    layers = forward_side(adapted, *_batch(), layers=EVERYTHING).layers
    assert not torch.allclose(layers.attention[1].query, plain.attention[1].query, atol=1e-2)
    merged = forward_side(adapted.merge_and_unload(), *_batch(), layers=EVERYTHING).layers
    for one, other in zip(_tensors(layers), _tensors(merged), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_adapters_get_the_gradient_of_the_layers_below(model):
    _, gradients = _gradients(_with_lora(model("llama")), LayerRequest(hidden_states=(2,)))
    reached = {name for name, gradient in gradients.items() if gradient.abs().max() > 0}
    assert any(".layers.0." in name for name in reached)
    assert any(".layers.1." in name for name in reached)
    assert not any(".layers.2." in name for name in reached)


def test_autocast(model):
    values, gradients = _gradients(model("llama"))
    low_values, low_gradients = _gradients(model("llama"), autocast=True)
    assert [value.dtype for value in low_values[-3:]] == [torch.bfloat16] * 3
    for one, other in zip(values, low_values, strict=True):
        torch.testing.assert_close(other.float(), one, rtol=0.05, atol=0.05 * float(one.abs().max()))
    assert gradients.keys() == low_gradients.keys()


def test_teacher_side_captures_without_gradient(model):
    network = model("gpt2")
    layers = teacher_side(network, *_batch(), layers=EVERYTHING).layers
    expected = forward_side(network, *_batch(), layers=EVERYTHING).layers
    for one, other in zip(_tensors(layers), _tensors(expected), strict=True):
        assert not one.requires_grad
        assert torch.equal(one, other)


def _num_hooks(network):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def test_nothing_is_hooked_without_a_request_nor_afterwards(model, monkeypatch):
    network = model("llama")
    before = _num_hooks(network)
    during = []
    network.model.norm.register_forward_hook(lambda *_: during.append(_num_hooks(network)))
    for request, extra in ((NO_LAYERS, 0), (EVERYTHING, 2 + 6)):
        side = forward_side(network, *_batch(), layers=request)
        assert during.pop() == before + 1 + extra
        assert bool(side.layers.hidden_states) == bool(request)
    monkeypatch.setattr(network.model.norm, "forward", lambda states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward_side(network, *_batch(), layers=EVERYTHING)
    assert _num_hooks(network) == before + 1


def test_only_packed_positions_are_kept(model):
    """A long prompt's states must not be held by what is captured."""
    network = model("llama")
    ids, mask, labels = _batch()
    labels[:, :-1] = -100
    with torch.no_grad():
        layers = forward_side(network, ids, mask, labels, layers=EVERYTHING).layers
    for states in _tensors(layers):
        assert states.shape[0] == 1
        assert states.untyped_storage().nbytes() <= 16 * 4


def test_no_supervised_position(model):
    ids, mask, labels = _batch()
    layers = forward_side(model("llama"), ids, mask, torch.full_like(labels, -100), layers=EVERYTHING).layers
    assert [tuple(states.shape) for states in _tensors(layers)] == [
        *[(0, 16)] * 3,
        *[(0, 4, 4), (0, 2, 4), (0, 2, 4)] * 2,
    ]
    assert all(states.requires_grad for states in _tensors(layers))


def test_union_of_requests():
    assert LayerRequest((0, 3), (2,)) | LayerRequest((1, 3), ()) == LayerRequest((0, 1, 3), (2,))
    assert not NO_LAYERS | NO_LAYERS
    assert LayerRequest(attention=(1,))


@pytest.mark.parametrize(
    ("layer", "first", "resolved"), [(0, 0, 0), (3, 0, 3), (-1, 0, 3), (-4, 0, 0), (1, 1, 1), (-3, 1, 1)]
)
def test_numbers_of_layers(layer, first, resolved):
    assert resolve_layer(layer, 3, first=first, where="layer") == resolved


@pytest.mark.parametrize(("layer", "first"), [(4, 0), (-5, 0), (0, 1), (-4, 1), (4, 1)])
def test_layers_that_do_not_exist(layer, first):
    with pytest.raises(
        UserError, match=f"student layer {layer} does not exist: the model has 3 layers; .* {first} to 3"
    ):
        resolve_layer(layer, 3, first=first, where="student layer")


def test_shapes(model, tiny_model):
    shape = trunk_shape(model("gemma3"))
    assert (shape.num_layers, shape.hidden_size, shape.last_hidden_size, shape.attention_size) == (3, 16, 16, 32)
    shape = trunk_shape(_with_lora(model("opt")))
    assert [shape.width(layer) for layer in range(4)] == [16, 16, 16, 12]
    assert trunk_shape(tiny_model("gpt2")).attention_size == 16


def test_a_model_without_attention_has_a_shape():
    config = transformers.MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=2, state_size=4)
    shape = trunk_shape(transformers.MambaForCausalLM(config))
    assert (shape.num_layers, shape.width(2), shape.attention_size) == (2, 16, None)


def test_unknown_attention_is_refused_at_once():
    config = transformers.FalconConfig(vocab_size=257, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    falcon = transformers.FalconForCausalLM(config)
    check_layers(falcon, LayerRequest(hidden_states=(1,)))
    with pytest.raises(UserError, match="model type 'falcon': layer of class FalconDecoderLayer has no query"):
        check_layers(falcon, LayerRequest(attention=(1,)))


def test_unexpected_width_is_refused(model):
    """A gate beside the queries, say."""
    network = model("llama")
    network.model.layers[1].self_attn.head_dim = 2
    states, index = torch.zeros(1, 2, 16), torch.zeros(1, dtype=torch.long)
    with LayerRecorder(network, LayerRequest(attention=(2,)), index, index) as recorder:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(network.model.layers[1].self_attn, name)(states)
    with pytest.raises(
        UserError, match=r"model type 'llama' projects to 8, 4 and 4 heads, .* 4 query heads of width 2"
    ):
        recorder.captured(states[0])


def test_layer_that_does_not_run_is_named(model):
    network = model("opt", layerdrop=1.0).train()
    network.model.decoder.layerdrop = 1.0
    with pytest.raises(UserError, match="model type 'opt': hidden state of layer 1 was not computed"):
        forward_side(network, *_batch(), layers=LayerRequest(hidden_states=(1,)))


def test_unknown_layer_stack_is_refused(model):
    network = model("llama")
    network.model.layers = torch.nn.ModuleList([network.model.layers[0]])
    with pytest.raises(UserError, match="model type 'llama' keeps its 3 decoder layers"):
        check_layers(network, LayerRequest(hidden_states=(1,)))
