import pytest
import torch
from peft import PeftModel

from vocabridge.errors import UserError
from vocabridge.models.lora import add_lora
from vocabridge.models.spec import LoraSpec


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
    ],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_all_linear_adapts_all_but_the_head_and_changes_nothing_at_first(tiny_model, family, layers):
    plain = tiny_model(family)
    model = add_lora(tiny_model(family), LoraSpec(r=3, alpha=6))
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == layers
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    input_ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=input_ids).logits, plain(input_ids=input_ids).logits)


def test_settings_reach_peft(tiny_model):
    model = add_lora(tiny_model("llama"), LoraSpec(r=3, alpha=6, dropout=0.25, target_modules=("q_proj",)))
    assert isinstance(model, PeftModel)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (3, 16)
    assert layer.scaling["default"] == 2.0
    assert layer.lora_dropout["default"].p == 0.25
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "v_prj"), r"no linear layer is called 'v_prj'; did you mean 'v_proj'\?.*: down_proj, gate_proj,"),
        (("norm",), "no linear layer is called 'norm'"),
        (("lm_head",), "'lm_head' is the output head"),
    ],
)
def test_wrong_targets(tiny_model, targets, message):
    with pytest.raises(UserError, match=message):
        add_lora(tiny_model("llama"), LoraSpec(target_modules=targets))
