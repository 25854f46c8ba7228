"""Low-rank adapters on the student, through PEFT."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vocabridge.errors import UserError
from vocabridge.models.spec import LoraSpec
from vocabridge.suggest import did_you_mean


def add_lora(model: PreTrainedModel, spec: LoraSpec) -> PeftModel:
    """Freeze ``model`` and put adapters on its linear layers.

    Raises:
        UserError: a target that names no linear layer, or the output head.
    """
    if spec.target_modules != "all-linear":
        _check_targets(model, spec.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # declared int, used as a factor
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules if spec.target_modules == "all-linear" else list(spec.target_modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores [in, out]
    )
    return get_peft_model(model, config)


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    known = sorted({name.rsplit(".", 1)[-1] for name, module in linear.items() if module is not head})
    for target in targets:
        matched = [module for name, module in linear.items() if name == target or name.endswith(f".{target}")]
        if not matched:
            hint = did_you_mean(target, known) or "."
            raise UserError(
                f"student.lora.target_modules: no linear layer is called '{target}'{hint} "
                f"Linear layers: {', '.join(known)}."
            )
        if any(module is head for module in matched):
            raise UserError(
                f"student.lora.target_modules: '{target}' is the output head, which takes no adapter; leave it out."
            )
