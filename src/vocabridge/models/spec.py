"""What a recipe says about one model; imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vocabridge.errors import UserError
from vocabridge.settings import Name, Settings

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["transformers", "vllm"]
Side = Literal["student", "teacher"]


class LoraSpec(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the student instead of training all of its weights."""

    r: int = Field(16, ge=1)
    """Rank of each update matrix; higher costs memory and fits more."""
    alpha: float = Field(32.0, gt=0)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on the adapters' input."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Names of the linear layers that get an adapter (``[q_proj, v_proj]``), or ``all-linear`` for all but the head."""


class CacheSpec(Settings):
    """Where the teacher's last hidden states are kept, so that it runs once per row instead of once per epoch."""

    folder: Name | None = None
    """Folder of the cache; none means one for this teacher under ``$VOCABRIDGE_CACHE`` or the user's cache folder."""
    dtype: Dtype = "auto"
    """Type of the states on disk; ``auto`` keeps the teacher's own, ``bfloat16`` halves what float32 takes."""


def _read_cache(given: Any) -> Any:
    """``true`` and a folder's name are short for a section."""
    if isinstance(given, bool):
        return {} if given else None
    return {"folder": given} if isinstance(given, str) else given


class ModelSpec(Settings):
    """The ``student:`` or ``teacher:`` section of a recipe: which model, how it is loaded, how it reads a prompt."""

    model: Name = Field(min_length=1)
    """Hub id (``HuggingFaceTB/SmolLM2-135M``), folder with a checkpoint, or path of a ``.gguf`` file."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; none means its main branch."""
    dtype: Dtype = "auto"
    """Type of the weights in memory. ``auto`` keeps the checkpoint's own, but takes float32 where the machine is slow
    in that (bfloat16 without AVX512-BF16 or AMX, float16 on a CPU), and for a student that is trained in full."""
    device: str | None = None
    """Where the model runs (``cpu``, ``cuda``, ``cuda:1``); none means the accelerator when there is one."""
    attn_implementation: str | None = None
    """Attention kernel of transformers (``eager``, ``sdpa``, ``flash_attention_2``); none lets transformers choose."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model; it can do anything on this machine."""
    template: Literal["plain", "chat"] = "plain"
    """How a prompt is rendered: as the plain text it is, or with the tokenizer's chat template."""
    tokenizer: Name | None = None
    """Hub id, folder or ``.gguf`` file of the tokenizer where it does not come with the model."""
    lora: LoraSpec | None = None
    """Adapters to train instead of the weights; student only."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Load the weights in 8 or 4 bits with bitsandbytes; teacher only, needs a CUDA device."""
    cache: Annotated[CacheSpec | None, BeforeValidator(_read_cache)] = None
    """Keep the last hidden states on disk: ``true``, a folder, or a section with ``folder`` and ``dtype``; teacher
    only."""


def check_side(spec: ModelSpec, side: Side) -> None:
    """Refuse the fields that have no meaning on ``side``: a setting that is ignored would mislead.

    Raises:
        UserError: ``lora`` on a teacher, ``quantization`` or ``cache`` on a student.
    """
    if side == "teacher" and spec.lora is not None:
        raise UserError(
            "teacher.lora has no meaning: the teacher is not trained; remove it or move it to student.lora."
        )
    if side == "student" and spec.quantization is not None:
        raise UserError(
            "student.quantization has no meaning: the student is trained and saved in full precision; remove it, or "
            "use student.lora to save memory."
        )
    if side == "student" and spec.cache is not None:
        raise UserError("student.cache has no meaning: the student changes with every step; move it to teacher.cache.")
