import subprocess
import sys

import pydantic
import pytest

from vocabridge.errors import UserError
from vocabridge.models.spec import LoraSpec, ModelSpec, check_side


def test_every_field_is_documented():
    for spec in (ModelSpec, LoraSpec):
        for name, field in spec.model_fields.items():
            assert field.description, name


def test_import_is_torch_free():
    code = "import sys, vocabridge.models.spec; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"dtype": "fp32"}, ("dtype",), "'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"template": "alpaca"}, ("template",), "'plain' or 'chat'"),
        ({"quantization": "2bit"}, ("quantization",), "'8bit' or '4bit'"),
        ({"modle": "x"}, ("modle",), "not permitted"),
        ({"model": ""}, ("model",), "at least 1 character"),
        ({"lora": {"r": 0}}, ("lora", "r"), "greater than or equal to 1"),
        ({"lora": {"dropout": 1.0}}, ("lora", "dropout"), "less than 1"),
        ({"lora": {"alpha": float("nan")}}, ("lora", "alpha"), "finite"),
    ],
)
def test_wrong_settings_are_refused(settings, field, message):
    with pytest.raises(pydantic.ValidationError, match=message) as caught:
        ModelSpec.model_validate({"model": "gpt2", **settings})
    assert [error["loc"] for error in caught.value.errors()] == [field]


def test_lora_targets_from_a_recipe():
    spec = ModelSpec.model_validate({"model": "gpt2", "lora": {"target_modules": ["q_proj", "v_proj"]}})
    assert spec.lora.target_modules == ("q_proj", "v_proj")
    assert LoraSpec().target_modules == "all-linear"
    with pytest.raises(pydantic.ValidationError, match="at least 1 item"):
        LoraSpec(target_modules=())


def test_settings_of_the_other_side_are_refused():
    with pytest.raises(UserError, match=r"^teacher\.lora has no meaning"):
        check_side(ModelSpec(model="gpt2", lora=LoraSpec()), "teacher")
    with pytest.raises(UserError, match=r"^student\.quantization has no meaning"):
        check_side(ModelSpec(model="gpt2", quantization="8bit"), "student")
    check_side(ModelSpec(model="gpt2", lora=LoraSpec()), "student")
    check_side(ModelSpec(model="gpt2", quantization="8bit"), "teacher")
