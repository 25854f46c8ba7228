"""Tokenizers and models from a :class:`ModelSpec`; every way it can fail is a :class:`UserError`."""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from vocabridge.alignment import check_tokenizer_file
from vocabridge.errors import UserError, one_line
from vocabridge.models.checkpoint import Checkpoint, check_weight_files, find_checkpoint
from vocabridge.models.dtypes import dtype_name, fast_dtype, tell_choice
from vocabridge.models.lora import add_lora
from vocabridge.models.spec import Dtype, ModelSpec, Side, check_side

logger = logging.getLogger(__name__)

_NEEDS_CODE = (
    "it ships with Python code of its own, which can do anything on this machine; read that code, then set "
    "trust_remote_code: true for this model, or choose another one"
)
_MAX_PADDED_ROWS = 1024
"""More unused rows than this, and than a tenth of the head, mean a wrong tokenizer rather than padding."""
_LAYER = re.compile(r"(.*?\.)(\d+)\.")
"""Of a weight's name: the list of layers, and the number of the layer."""


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The fast tokenizer of ``spec.tokenizer`` or ``spec.model``, with a pad token (the end token where it has none).

    Raises:
        UserError: nothing to load there, no fast tokenizer, no end token.
    """
    name = spec.tokenizer or spec.model
    checkpoint = find_checkpoint(name)
    has_file = (Path(checkpoint.name) / "tokenizer.json").is_file()
    lacks_file = checkpoint.is_local and checkpoint.gguf_file is None and not has_file
    lack = " has no tokenizer.json, and no tokenizer can be made of its other files"
    what = f"'{name}'{lack if lacks_file else ': the tokenizer cannot be loaded'}"
    with _as_user_error(what, "mend or download its files again, or set the field 'tokenizer' if it lies elsewhere"):
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.name, **hub_options(spec, checkpoint), **_gguf_options(checkpoint)
        )
    if not tokenizer.is_fast:
        raise UserError(f"'{name}' has no fast tokenizer (tokenizer.json), which byte spans need; convert it first.")
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise UserError(f"'{name}': the tokenizer is empty; if it lies elsewhere, set the field 'tokenizer'.")
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of '{name}' has no end token (eos_token), so a response could never end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if checkpoint.gguf_file is None:  # reading a GGUF file's header takes seconds; the tokenizer-pair report does it
        for warning in check_tokenizer_file(tokenizer):
            logger.warning(warning)
    return tokenizer


def load_model(spec: ModelSpec, *, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """A causal language model in eval mode on ``spec.device`` (none: the accelerator when there is one).

    ``dtype: auto`` is the checkpoint's own type, or float32 where the device is slow in that; see
    :mod:`vocabridge.models.dtypes`. A checkpoint whose configuration names no type, and a GGUF file, are left to
    transformers.

    Args:
        spec: which one.
        config: instead of the checkpoint's own.

    Raises:
        UserError: nothing to load there, not a causal language model, weights missing, device not available.
    """
    device = _device(spec.device)
    model = _load(spec, device, config)
    # bitsandbytes places its weights while it loads and refuses to move them.
    return model if spec.quantization else nn.Module.to(model, device)


def load_teacher(spec: ModelSpec) -> PreTrainedModel:
    """:func:`load_model`, frozen.

    Raises:
        UserError: as :func:`load_model`, or a setting that only a student has.
    """
    check_side(spec, "teacher")
    return load_model(spec).requires_grad_(False)


def load_student(spec: ModelSpec) -> Any:
    """A trainable model in train mode: a ``PreTrainedModel``, or a ``PeftModel`` around it when ``spec.lora`` is set.

    It stays on the CPU unless ``spec.device`` is set: the Trainer moves it. With ``dtype: auto`` it is float32 whatever
    the checkpoint's dtype, unless LoRA freezes it: in bfloat16 most updates are smaller than the weights' last bit and
    are lost (use ``bf16: true`` of the training arguments for speed).

    Raises:
        UserError: as :func:`load_model`, or a setting that only a teacher has, or LoRA targets that do not exist.
    """
    check_side(spec, "student")
    changes = {} if spec.device else {"device": "cpu"}
    if spec.dtype == "auto":
        changes["dtype"] = "float32" if spec.lora is None else resolve_dtype(spec)
    model = load_model(spec.model_copy(update=changes))
    return (model if spec.lora is None else add_lora(model, spec.lora)).train()


def resolve_dtype(spec: ModelSpec) -> Dtype:
    """What ``auto`` means for a model that will run on ``spec.device``, for who loads it elsewhere first.

    Raises:
        UserError: there is no checkpoint, or its configuration cannot be read.
    """
    checkpoint = find_checkpoint(spec.model)
    check_weight_files(checkpoint)
    if checkpoint.gguf_file is not None:
        return spec.dtype
    return _chosen_dtype(spec, read_config(spec, checkpoint), _device(spec.device))


def clear_gguf_marks(model: PreTrainedModel) -> None:
    """Forget that the weights came from a GGUF file, or transformers refuses to save, train and move the model."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False  # type: ignore[assignment]  # nn.Module types every attribute as a tensor or a module


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Largest token id + 1: the rows of a head that stand for something. Larger than ``len`` where ids have gaps."""
    ids: dict[str, int] = tokenizer.get_vocab()
    return max(ids.values()) + 1


def check_tokenizer_matches(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, side: Side) -> int:
    """Check that every id of the tokenizer has an embedding and that the rest of the embedding is mere padding.

    Returns:
        Number of embedding rows without a token.

    Raises:
        UserError: the tokenizer has more ids than the embedding, or so few that it belongs to another model.
    """
    num_ids = vocabulary_size(tokenizer)
    num_rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    padded = num_rows - num_ids
    if padded < 0 or padded > max(_MAX_PADDED_ROWS, num_rows // 10):
        raise UserError(
            f"{side}: the tokenizer has {num_ids} ids and the model {num_rows} embeddings, so they do not belong "
            f"together; check {side}.model and {side}.tokenizer, or resize the embeddings if tokens were added."
        )
    logger.info("%s: %d tokens, %d padded embedding rows", side, num_ids, padded)
    return padded


def _load(spec: ModelSpec, device: torch.device, config: PretrainedConfig | None) -> PreTrainedModel:
    checkpoint = find_checkpoint(spec.model)
    check_weight_files(checkpoint)
    dtype = spec.dtype
    if checkpoint.gguf_file is None:
        own_config = read_config(spec, checkpoint)
        _check_config(spec, own_config)
        dtype = _chosen_dtype(spec, own_config, device)
        _check_generation_config(checkpoint)
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # annotated as returning no report
    mend = "change that setting, or download the model again if a file is damaged"
    with _as_user_error(f"'{spec.model}': the model cannot be loaded", mend):
        model, report = from_pretrained(
            checkpoint.name,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=spec.attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
            **hub_options(spec, checkpoint),
            **_weight_options(spec, checkpoint, device),
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise UserError(
            f"'{spec.model}': config.json does not fit the weights: {name} is {list(stored)} in the file and "
            f"{list(expected)} by the configuration; save or download the model again."
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"'{spec.model}' lacks {len(missing)} weights of {type(model).__name__} ({missing[0]}, ...), which would "
            "start at random values; it is not a complete causal language model."
        )
    if surplus := _beyond_the_last_layer(model, report["unexpected_keys"]):
        raise UserError(
            f"'{spec.model}': config.json has fewer layers than the weights ({surplus[0]}, ...), and would leave the "
            "last ones out; mend it, or save a model of fewer layers first if that is what you want."
        )
    if model.get_output_embeddings() is None:
        raise UserError(f"'{spec.model}' ({type(model).__name__}) has no language-model head.")
    if checkpoint.gguf_file is not None:
        clear_gguf_marks(model)
        # The folder alone names no model: who looks up the tokenizer or an adapter's base later needs the file.
        model.config.name_or_path = model.name_or_path = checkpoint.path
    return model


def _beyond_the_last_layer(model: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """Weights without which the model is cut short; others, such as a vision tower's, are no part of it."""
    last: dict[str, int] = {}
    for name in model.state_dict():
        if found := _LAYER.match(name):
            last[found[1]] = max(int(found[2]), last.get(found[1], 0))
    places = {name: found for name in unexpected if (found := _LAYER.match(name))}
    return sorted(name for name, found in places.items() if found[1] in last and int(found[2]) > last[found[1]])


def read_config(spec: ModelSpec, checkpoint: Checkpoint) -> PretrainedConfig:
    """The checkpoint's configuration.

    Raises:
        UserError: there is none that can be read.
    """
    with _as_user_error(f"'{spec.model}': config.json cannot be read", "download the model again, or choose another"):
        return AutoConfig.from_pretrained(checkpoint.name, **hub_options(spec, checkpoint))


def _chosen_dtype(spec: ModelSpec, config: PretrainedConfig, device: torch.device) -> Dtype:
    """``auto`` only where the checkpoint's own type is unknown or none that can be named."""
    stored = config.dtype or config.get_text_config().dtype
    if spec.dtype != "auto" or spec.quantization or not isinstance(stored, torch.dtype):
        return spec.dtype
    chosen = fast_dtype(stored, device)
    tell_choice(spec.model, stored, chosen, device.type)
    names: tuple[Dtype, ...] = get_args(Dtype)
    return next((name for name in names if name == dtype_name(chosen)), "auto")


def _check_config(spec: ModelSpec, config: PretrainedConfig) -> None:
    """Refuse from the config alone, before gigabytes are read, what is no causal language model."""
    if spec.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise UserError(f"'{spec.model}' is a {config.model_type} model, not a causal language model.")
    architectures = config.architectures or []
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    if architectures and expected not in architectures:
        raise UserError(
            f"'{spec.model}' was saved as {architectures[0]}, without the head of a causal language model "
            f"({expected}); load and save it with AutoModelForCausalLM."
        )


def _check_generation_config(checkpoint: Checkpoint) -> None:
    """Transformers takes a damaged file for none, and a student saved from that has lost its end tokens."""
    if checkpoint.is_local and Path(checkpoint.name, GENERATION_CONFIG_NAME).exists():
        mend = "mend it, or remove it if the model needs none"
        with _as_user_error(f"'{checkpoint.path}': {GENERATION_CONFIG_NAME} cannot be read", mend):
            transformers.GenerationConfig.from_pretrained(checkpoint.name)


def hub_options(spec: ModelSpec, checkpoint: Checkpoint) -> dict[str, Any]:
    """What every ``from_pretrained`` of this model is given; says so where that will run code of the model."""
    if spec.trust_remote_code:
        _announce_code(checkpoint.path)
    return {
        "revision": spec.revision or "main",
        "trust_remote_code": spec.trust_remote_code,
        "local_files_only": checkpoint.is_local,
    }


@functools.cache  # once, not for tokenizer, configuration and weights each
def _announce_code(name: str) -> None:
    logger.warning("trust_remote_code is on: Python code that ships with '%s' is run on this machine", name)


def _gguf_options(checkpoint: Checkpoint) -> dict[str, Any]:
    return {} if checkpoint.gguf_file is None else {"gguf_file": checkpoint.gguf_file}


def _weight_options(spec: ModelSpec, checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    if checkpoint.gguf_file is None:
        return {"use_safetensors": True, **_quantization_options(spec, device)}
    if spec.quantization:
        raise UserError(f"'{spec.model}' is a GGUF file and is unpacked; quantization does not go with it; remove it.")
    options: dict[str, Any] = {"gguf_file": checkpoint.gguf_file}
    if hasattr(transformers, "GgufConfig"):
        # Newer releases keep the weights packed where a kernel for them is installed; those cannot be trained or saved.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


def _quantization_options(spec: ModelSpec, device: torch.device) -> dict[str, Any]:
    if spec.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"quantization: {spec.quantization} needs the package bitsandbytes; install it or remove it.")
    if device.type != "cuda":
        raise UserError(f"quantization: {spec.quantization} needs a CUDA device, not '{device}'.")
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=spec.quantization == "8bit",
        load_in_4bit=spec.quantization == "4bit",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA fails an assertion
        raise UserError(f"device '{name}' is not available here: {one_line(error)}") from error
    return device


@contextmanager
def _as_user_error(what: str, mend: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever a damaged file leads them to
        reason = f"{one_line(error).rstrip('.')}; {mend}."
        raise UserError(f"{what}: {_NEEDS_CODE if 'trust_remote_code' in str(error) else reason}") from error
