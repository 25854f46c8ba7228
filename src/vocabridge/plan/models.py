"""Both models and the objective from configuration alone: shapes and types, but no weights and no memory."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from vocabridge.assembly import build_objective
from vocabridge.errors import UserError, one_line
from vocabridge.models.capture import decoder_layers
from vocabridge.models.checkpoint import find_checkpoint
from vocabridge.models.dtypes import fast_dtype
from vocabridge.models.heads import base_model
from vocabridge.models.loading import hub_options, load_tokenizer
from vocabridge.models.lora import add_lora
from vocabridge.models.spec import LoraSpec, ModelSpec, Side
from vocabridge.objectives.base import Objective
from vocabridge.pairs import PairTokenizer
from vocabridge.recipe import Recipe
from vocabridge.recipe.objective import ObjectiveSettings

_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop")
_KERNELS_WITHOUT_MATRIX = (None, "sdpa", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True, slots=True, eq=False)
class PlannedModels:
    """A pair and its objective on the ``meta`` device."""

    student: PreTrainedModel
    """Or a ``PeftModel`` around one."""
    teacher: PreTrainedModel | None
    objective: nn.Module
    """The objective, or a list of a composition's terms."""

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters with a gradient: of the student, then of the objective."""
        parameters = [*self.student.parameters(), *self.objective.parameters()]
        return [parameter for parameter in parameters if parameter.requires_grad]


def planned_models(recipe: Recipe) -> PlannedModels:
    """What the trainer would load for ``recipe``; reads configurations and tokenizers.

    Raises:
        UserError: a configuration or a tokenizer cannot be read, or an objective does not fit the pair.
    """
    student, teacher = planned_pair(recipe)
    return PlannedModels(student, teacher, _objective_of(recipe, student, teacher))


def planned_pair(recipe: Recipe) -> tuple[Any, Any]:
    """Student and teacher, or None, without an objective; reads configurations.

    Raises:
        UserError: a configuration cannot be read.
    """
    on_cpu = _is_on_cpu(recipe)
    teacher = None if recipe.teacher is None else model_of(_as_built(recipe.teacher), "teacher", on_cpu=on_cpu)
    return _student_of(recipe), teacher


def with_student(models: PlannedModels, recipe: Recipe) -> PlannedModels:
    """The same teacher and objective with the student of ``recipe``, in which no more than that may differ."""
    return PlannedModels(_student_of(recipe), models.teacher, models.objective)


def _student_of(recipe: Recipe) -> Any:
    return model_of(_as_built(recipe.student), "student", on_cpu=_is_on_cpu(recipe))


def _is_on_cpu(recipe: Recipe) -> bool:
    return bool(recipe.training.arguments().get("use_cpu"))


@functools.lru_cache(maxsize=8)  # one for all plans with the model, and one run of its trunk without values
def model_of(spec: ModelSpec, side: Side, *, on_cpu: bool) -> Any:
    """The model of one side, in the type that it will have when it is trained; with LoRA a ``PeftModel``.

    Args:
        spec: which one.
        side: a student whose ``dtype`` is ``auto`` is float32, unless LoRA freezes it.
        on_cpu: it runs on this machine's processor, where ``auto`` may mean another type than on an accelerator.

    Raises:
        UserError: its configuration cannot be read, or is of no causal language model.
    """
    config = read_config(spec)
    dtype = _dtype(spec, config, side, on_cpu=on_cpu)
    try:
        model = empty_model(
            config,
            dtype=dtype,
            attention=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
            on_cpu=on_cpu,
            lora=spec.lora,
        )
        return model.train(side == "student")
    except (ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{spec.model}': no model can be built from its configuration: {one_line(error)}") from error


def _as_built(spec: ModelSpec) -> ModelSpec:
    """Without what changes nothing in the empty model, which then serves plans with and without it."""
    return spec.model_copy(update={"cache": None, "quantization": None})


def read_config(spec: ModelSpec) -> PretrainedConfig:
    """The configuration of a model; of a GGUF file, what its header says.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    checkpoint = find_checkpoint(spec.model)
    options = hub_options(spec, checkpoint)
    if checkpoint.gguf_file is not None:
        options["gguf_file"] = checkpoint.gguf_file
    try:
        return AutoConfig.from_pretrained(checkpoint.name, **options)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        what = "config.json" if checkpoint.gguf_file is None else "the header of the GGUF file"
        raise UserError(f"'{spec.model}': {what} cannot be read, which a plan needs: {one_line(error)}") from error


def empty_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    trust_remote_code: bool = False,
    on_cpu: bool = False,
    lora: LoraSpec | None = None,
) -> Any:
    """A causal language model on the ``meta`` device.

    Args:
        config: its configuration; not changed.
        dtype: of its weights.
        attention: kernel of transformers; those that need packages or devices are built as ``sdpa``, which keeps the
            same tensors.
        trust_remote_code: as in transformers.
        on_cpu: the processor's kernel computes dropout in the attention matrix, which the accelerators' never hold.
        lora: adapters to put on it.
    """
    config = copy.deepcopy(config)
    own = config.get_text_config()
    if not on_cpu and attention in _KERNELS_WITHOUT_MATRIX:
        for name in _ATTENTION_DROPOUT:
            if getattr(own, name, None):
                setattr(own, name, 0.0)
    kernel = "eager" if attention == "eager" else None if attention is None else "sdpa"
    options = {} if kernel is None else {"attn_implementation": kernel}
    from_config: Any = AutoModelForCausalLM.from_config  # annotated as returning the auto class
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft about transformers
        model = from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options)
        return model if lora is None else add_lora(model, lora)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers; none where it is not known where they lie."""
    try:
        return list(decoder_layers(base_model(model)))
    except UserError:
        return []


def objective_of(
    settings: ObjectiveSettings,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    *,
    tokenizers: PairTokenizers,
) -> nn.Module:
    """The objective's terms, each built for these models.

    Raises:
        UserError: a term does not fit the pair.
    """
    terms = [
        _term({"name": term.name, **term.config.model_dump(mode="json")}, student, teacher, tokenizers)
        for term in settings.terms
    ]
    return nn.ModuleList(terms)


@dataclass(frozen=True, slots=True, eq=False)
class PairTokenizers:
    """Both tokenizers, and what reads text with them."""

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase | None
    pair: PairTokenizer


def _objective_of(recipe: Recipe, student: PreTrainedModel, teacher: PreTrainedModel | None) -> nn.Module:
    tokenizers = pair_tokenizers(recipe.student, recipe.teacher, recipe.data.max_length)
    return objective_of(recipe.objective, student, teacher, tokenizers=tokenizers)


@functools.lru_cache(maxsize=4)
def pair_tokenizers(student: ModelSpec, teacher: ModelSpec | None, max_length: int) -> PairTokenizers:
    """The tokenizers of two models, as the trainer would use them.

    Raises:
        UserError: one cannot be read.
    """
    student_tokenizer = load_tokenizer(student)
    teacher_tokenizer = None if teacher is None else load_tokenizer(teacher)
    pair = PairTokenizer(
        student_tokenizer,
        teacher_tokenizer,
        student_template=student.template,
        teacher_template="plain" if teacher is None else teacher.template,
        max_length=max_length,
    )
    return PairTokenizers(student_tokenizer, teacher_tokenizer, pair)


def _term(
    values: dict[str, Any],
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizers: PairTokenizers,
) -> Objective:
    def build() -> Objective:
        return build_objective(
            values, student, tokenizers.student, teacher, tokenizers.teacher, pair_tokenizer=tokenizers.pair
        )

    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, TypeError):
        # Maps between vocabularies need values; then only the parameters are without memory.
        with init_empty_weights(include_buffers=False):
            return build()


def _dtype(spec: ModelSpec, config: PretrainedConfig, side: Side, *, on_cpu: bool) -> torch.dtype:
    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)
    stored = config.dtype or config.get_text_config().dtype
    if (side == "student" and spec.lora is None) or not isinstance(stored, torch.dtype):
        return torch.float32
    return fast_dtype(stored, torch.device("cpu")) if on_cpu else stored


def num_elements(parameters: Sequence[torch.Tensor]) -> int:
    """Numbers in all of them together."""
    return sum(parameter.numel() for parameter in parameters)
