import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from vocabridge.errors import UserError
from vocabridge.models.heads import OutputHead, output_head

FAMILIES = ["gpt2", "opt", "llama", "llama_tied", "qwen2", "gemma2", "gemma3", "cohere", "granite"]


def test_head_is_scale_then_cap_by_hand():
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(5, 3), torch.randn(5), torch.randn(2, 4, 3)
    logits = OutputHead(weight, bias, soft_cap=2.0, logit_scale=0.5)(hidden)
    assert logits.shape == (2, 4, 5)
    for row in range(2):
        for position in range(4):
            for word in range(5):
                raw = sum(float(weight[word, i]) * float(hidden[row, position, i]) for i in range(3)) + float(
                    bias[word]
                )
                expected = 2.0 * torch.tensor(0.5 * raw / 2.0).tanh()
                assert float(logits[row, position, word]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_logits_are_at_least_float32(dtype, expected):
    head = OutputHead(torch.randn(5, 3, dtype=dtype), None, soft_cap=None, logit_scale=1.0)
    assert head(torch.randn(2, 3, dtype=dtype)).dtype == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_models_own_logits(tiny_model, family):
    model = tiny_model(family)
    input_ids = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=input_ids).last_hidden_state
        own = model(input_ids=input_ids).logits
        ours = output_head(model)(hidden)
        raw = nn.functional.linear(hidden, model.get_output_embeddings().weight)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    changes_logits = family in {"gemma2", "gemma3", "cohere", "granite"}
    assert torch.allclose(raw, own, atol=1e-3) != changes_logits, "the test must see the soft cap and the scale"


def test_padded_rows_are_cut_off_and_the_gradient_reaches_the_whole_weight(tiny_model):
    model = tiny_model("llama", vocab_size=264)
    parameter = model.get_output_embeddings().weight
    head = output_head(model, vocab_size=257)
    assert head.weight.shape == (257, 16)
    assert head.weight.data_ptr() == parameter.data_ptr()
    head(torch.randn(3, 16)).logsumexp(-1).sum().backward()
    assert parameter.grad.shape == (264, 16)
    assert (parameter.grad[:257] != 0).any(dim=1).all()
    assert (parameter.grad[257:] == 0).all()


def test_bias_is_cut_off_too(tiny_model):
    model = tiny_model("llama")
    model.set_output_embeddings(nn.Linear(16, 264, bias=True))
    head = output_head(model, vocab_size=257)
    assert head.bias.shape == (257,)
    hidden = torch.randn(4, 16)
    torch.testing.assert_close(head(hidden), model.get_output_embeddings()(hidden)[:, :257])


def test_weight_is_fetched_anew(tiny_model):
    model = tiny_model("llama")
    old = output_head(model).weight
    model.resize_token_embeddings(300)
    assert output_head(model).weight.shape == (300, 16)
    assert old.shape == (257, 16)


def test_too_few_rows_are_refused(tiny_model):
    with pytest.raises(UserError, match="tokenizer has 300 ids but LlamaForCausalLM's head has 257 rows"):
        output_head(tiny_model("llama"), vocab_size=300)


def test_model_without_head_is_refused(tiny_model):
    with pytest.raises(UserError, match="LlamaModel has no language-model head"):
        output_head(tiny_model("llama").model)


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_adapted_head_is_refused(tiny_model, option):
    config = LoraConfig(**{"target_modules": ["q_proj"], option: ["lm_head"]})
    with pytest.raises(UserError, match="includes the output head"):
        output_head(get_peft_model(tiny_model("llama"), config))


def test_quantised_head_is_refused(tiny_model):
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(257, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="head is quantised"):
        output_head(model)
