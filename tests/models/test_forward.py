from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertLMHeadModel

from vocabridge.errors import UserError
from vocabridge.models.forward import check_head, forward_side, supervised_tokens, teacher_side

FAMILIES = ["gpt2", "opt", "llama", "llama_tied", "qwen2", "gemma2", "gemma3", "cohere", "granite"]
LENGTHS = [11, 6, 9]
PROMPT_LENGTHS = [4, 2, 5]


def _batch(side: str = "right") -> SimpleNamespace:
    """Three rows of different lengths with their prompts unsupervised, padded on ``side``."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    batch = SimpleNamespace(
        input_ids=torch.full(shape, 256),
        attention_mask=torch.zeros(shape, dtype=torch.long),
        labels=torch.full(shape, -100),
    )
    for row, (length, prompt_length) in enumerate(zip(LENGTHS, PROMPT_LENGTHS, strict=True)):
        ids = torch.randint(0, 256, (length,), generator=generator)
        start = 0 if side == "right" else shape[1] - length
        batch.input_ids[row, start : start + length] = ids
        batch.attention_mask[row, start : start + length] = 1
        batch.labels[row, start + prompt_length : start + length] = ids[prompt_length:]
    return batch


def _arguments(batch):
    return batch.input_ids, batch.attention_mask, batch.labels


def _reference_logits(model, batch):
    """Each row on its own, without padding, through the model's own forward."""
    rows = []
    for row, prompt_length in enumerate(PROMPT_LENGTHS):
        ids = batch.input_ids[row][batch.attention_mask[row] == 1]
        logits = model(input_ids=ids[None]).logits[0]
        rows += [logits[position - 1] for position in range(prompt_length, len(ids))]
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_packed_positions_give_the_logits_of_unpadded_rows(tiny_model, family, padding):
    model, batch = tiny_model(family), _batch(padding)
    with torch.no_grad():
        side = forward_side(model, *_arguments(batch))
        logits, expected = side.head(side.hidden_states), _reference_logits(model, batch)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_order_and_token_ids():
    model_free = supervised_tokens(
        torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]]), torch.tensor([[-100, 11, -100, 13], [-100, -100, 22, 23]])
    )
    assert model_free.rows.tolist() == [0, 0, 1, 1]
    assert model_free.input_ids.tolist() == [10, 12, 21, 22]
    assert model_free.labels.tolist() == [11, 13, 22, 23]


def test_side_carries_the_same_tokens(tiny_model):
    batch = _batch("left")
    side = forward_side(tiny_model("llama"), *_arguments(batch))
    tokens = supervised_tokens(batch.input_ids, batch.labels)
    assert side.hidden_states.shape == (sum(LENGTHS) - sum(PROMPT_LENGTHS), 16)
    for name in ("input_ids", "labels", "rows"):
        assert torch.equal(getattr(side.tokens, name), getattr(tokens, name))
        assert torch.equal(getattr(side, name), getattr(tokens, name))


def test_embedding_is_what_the_trunk_reads(tiny_model):
    model = tiny_model("gemma3")
    side = forward_side(model, *_arguments(_batch()))
    ids = torch.tensor([3, 5])
    ratio = side.embedding(ids) / model.get_input_embeddings().weight[ids]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 4.0))  # sqrt(hidden size 16)


def test_no_supervised_position_gives_empty_tensors_with_a_gradient_path(tiny_model):
    batch = _batch()
    side = forward_side(tiny_model("llama"), batch.input_ids, batch.attention_mask, torch.full_like(batch.labels, -100))
    assert side.hidden_states.shape == (0, 16)
    assert side.head(side.hidden_states).sum().requires_grad


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_gradient_is_the_one_of_the_models_own_loss(tiny_model, family):
    batch = _batch("left")
    ours, own = tiny_model(family), tiny_model(family)
    side = forward_side(ours, *_arguments(batch))
    torch.nn.functional.cross_entropy(side.head(side.hidden_states), side.labels).backward()
    targets = batch.labels[batch.labels != -100]
    torch.nn.functional.cross_entropy(_reference_logits(own, batch), targets).backward()
    for (name, parameter), expected in zip(ours.named_parameters(), own.parameters(), strict=True):
        assert expected.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


class _LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.num_elements = max(self.num_elements, leaf.numel())
        return result


def test_no_logits_are_computed(tiny_model):
    vocab_size = 4099
    model, batch = tiny_model("llama", vocab_size=vocab_size), _batch()
    with _LargestTensor() as ours:
        forward_side(model, *_arguments(batch))
    with _LargestTensor() as own:
        model(input_ids=batch.input_ids)
    num_weights = vocab_size * 16
    assert ours.num_elements <= num_weights  # views of the head's weight
    assert own.num_elements == batch.input_ids.numel() * vocab_size > num_weights


@pytest.mark.parametrize("use_lora", [False, True])
def test_gradient_checkpointing_changes_nothing(tiny_model, use_lora):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = tiny_model("llama")
        if use_lora:
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian"))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        side = forward_side(model, *_arguments(_batch()))
        side.head(side.hidden_states).logsumexp(-1).sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    plain, checkpointed = gradients(False), gradients(True)
    assert max(gradient.abs().max() for gradient in plain) > 0
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other)


def test_lora_forward_uses_the_adapters_and_trains_nothing_else(tiny_model):
    plain = tiny_model("gpt2")
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = _batch()
    side = forward_side(model, *_arguments(batch))
    logits = side.head(side.hidden_states)
    torch.testing.assert_close(logits, _reference_logits(model, batch), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, _reference_logits(plain, batch), atol=1e-2)
    logits.logsumexp(-1).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.grad is not None)


def test_teacher_side_has_no_gradient_and_refuses_train_mode(tiny_model):
    model, batch = tiny_model("gpt2"), _batch()
    side = teacher_side(model, *_arguments(batch), vocab_size=257)
    assert not side.hidden_states.requires_grad
    assert torch.equal(side.hidden_states, forward_side(model, *_arguments(batch)).hidden_states)
    with pytest.raises(AssertionError, match="eval mode"):
        teacher_side(model.train(), *_arguments(batch))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_head_accepts_known_models(tiny_model, family, dtype):
    model = tiny_model(family, vocab_size=264).to(dtype)
    difference = check_head(model.train(), *_arguments(_batch("left")), vocab_size=257)
    assert 0 <= difference < 0.02
    assert model.training


def test_check_head_refuses_unknown_changes_of_the_logits(tiny_model, monkeypatch):
    model = tiny_model("llama")
    original = type(model).forward

    def forward(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        outputs.logits = outputs.logits * 1.01
        return outputs

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(UserError, match=r"LlamaForCausalLM: logits .* differ .* by 0\.0099 of the largest logit"):
        check_head(model, *_arguments(_batch()), vocab_size=257)


def test_check_head_refuses_nan(tiny_model):
    model = tiny_model("llama")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        check_head(model, *_arguments(_batch()))


@pytest.mark.parametrize(("bidirectional", "message"), [(True, "looks ahead"), (False, None)])
def test_check_head_refuses_a_model_that_looks_ahead(tiny_model, bidirectional, message):
    model = tiny_model("gemma3", use_bidirectional_attention=bidirectional)
    if message is None:
        check_head(model, *_arguments(_batch()))
    else:
        with pytest.raises(UserError, match=message):
            check_head(model, *_arguments(_batch()))


def test_check_head_refuses_an_encoder():
    config = BertConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(UserError, match="BertLMHeadModel"):
        check_head(BertLMHeadModel(config), *_arguments(_batch()))
