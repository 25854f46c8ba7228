"""A teacher without its trunk: embeddings and head, all that a complete teacher cache leaves to do for the model."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, find_adapter_config_file

from vocabridge.errors import UserError
from vocabridge.fingerprints import checkpoint_fingerprint, weights_fingerprint
from vocabridge.models.capture import decoder_layers
from vocabridge.models.checkpoint import Checkpoint, check_weight_files, find_checkpoint
from vocabridge.models.heads import base_model
from vocabridge.models.loading import load_model, load_teacher, read_config, resolve_dtype
from vocabridge.models.spec import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class TeacherEnds:
    """Embeddings and head of a teacher, frozen, and a name for its weights."""

    model: PreTrainedModel
    fingerprint: str
    """Of all the weights, those of the trunk too."""
    has_trunk: bool
    """The checkpoint could only be loaded whole; :func:`drop_trunk` frees the memory afterwards."""


def load_ends(spec: ModelSpec) -> TeacherEnds:
    """Load embeddings and head alone where the checkpoint is plain safetensors, else the whole model.

    The plain checkpoint's trunk is read once, tensor by tensor, for the fingerprint.

    Raises:
        UserError: as :func:`vocabridge.models.loading.load_teacher`.
    """
    checkpoint = find_checkpoint(spec.model)
    check_weight_files(checkpoint)
    if _is_plain(spec, checkpoint) and (ends := _plain_ends(spec, checkpoint)) is not None:
        return ends
    model = load_teacher(spec)
    return TeacherEnds(model, weights_fingerprint(model), has_trunk=True)


def drop_trunk(model: PreTrainedModel) -> None:
    """Free the decoder layers of a model whose states are all in a cache."""
    try:
        layers = decoder_layers(base_model(model))
    except UserError:
        logger.info("the layers of %s stay in memory: where they lie is not known", type(model).__name__)
    else:
        del layers[:]


def _is_plain(spec: ModelSpec, checkpoint: Checkpoint) -> bool:
    if checkpoint.gguf_file is not None or spec.quantization or spec.trust_remote_code:
        return False
    adapter = find_adapter_config_file(
        checkpoint.name, revision=spec.revision or "main", local_files_only=checkpoint.is_local
    )
    return adapter is None


def _plain_ends(spec: ModelSpec, checkpoint: Checkpoint) -> TeacherEnds | None:
    """None where the family cannot be built without layers."""
    config = read_config(spec, checkpoint)
    short = copy.deepcopy(config)
    if short is not short.get_text_config():
        return None
    short.num_hidden_layers = 0
    if getattr(short, "layer_types", None):
        short.layer_types = []
    try:
        with _without_load_report():  # which would list every weight of the trunk
            # The type is chosen for the device that the ends are moved to, as the whole teacher's is.
            changes = {"device": "cpu", "dtype": resolve_dtype(spec)}
            model = load_model(spec.model_copy(update=changes), config=short)
    except Exception as error:  # whatever a family's code does without a first layer; loading it whole will tell
        logger.info("'%s' cannot be loaded without its layers (%s), so it is loaded whole", spec.model, error)
        return None
    files = _weight_files(spec, checkpoint)
    if not files:
        return None
    model.config.num_hidden_layers = config.num_hidden_layers
    if getattr(config, "layer_types", None):
        model.config.layer_types = config.layer_types
    return TeacherEnds(model.requires_grad_(False), checkpoint_fingerprint(config, files), has_trunk=False)


def _weight_files(spec: ModelSpec, checkpoint: Checkpoint) -> list[Path]:
    """The safetensors files that ``from_pretrained`` has just read."""

    def find(name: str) -> str | None:
        return cached_file(
            checkpoint.name,
            name,
            revision=spec.revision or "main",
            local_files_only=checkpoint.is_local,
            _raise_exceptions_for_missing_entries=False,
        )

    if (single := find(SAFE_WEIGHTS_NAME)) is not None:
        return [Path(single)]
    if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(path) for name in names if (path := find(name)) is not None]


@contextmanager
def _without_load_report() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
