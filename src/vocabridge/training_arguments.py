"""What a training run can be told, as ``transformers`` users know it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from vocabridge.errors import UserError
from vocabridge.prompts import Template

logger = logging.getLogger(__name__)


_WITHOUT_EFFECT = ("label_smoothing_factor", "neftune_noise_alpha", "bf16_full_eval", "fp16_full_eval")
"""Arguments that ``transformers.Trainer`` applies to its own losses and models only."""


@dataclass
class DistillationConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and what distillation adds."""

    max_length: int = field(default=512, metadata={"help": "Tokens of prompt and response per side; longer is cut."})
    student_template: Template = field(
        default="plain", metadata={"help": "How the student sees a prompt: plain or chat."}
    )
    teacher_template: Template = field(
        default="plain", metadata={"help": "How the teacher sees a prompt: plain or chat."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of projectors; default: learning_rate."}
    )
    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the discriminator; default: projector_learning_rate."}
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Round the padded length up to a multiple (8 suits tensor cores)."}
    )
    diagnostics_steps: int = field(
        default=50, metadata={"help": "Optimizer steps between measurements of query and key distributions; 0: never."}
    )
    diagnostics_examples: int = field(
        default=32, metadata={"help": "Training examples in the fixed set on which distributions are measured."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always off: batches are plain tensors."})

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = [name for name in _WITHOUT_EFFECT if getattr(self, name, None)]
        if unused:
            raise UserError(f"training: {', '.join(unused)} cannot be used with distillation losses; leave it out.")
        if self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise UserError(f"training.train_sampling_strategy: '{self.train_sampling_strategy}' is not supported yet.")
        for name in ("projector_learning_rate", "discriminator_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name} must be a number of at least 0, got {value}.")
        accelerator_config = self.accelerator_config
        if isinstance(accelerator_config, AcceleratorConfig) and accelerator_config.dispatch_batches is None:
            accelerator_config.dispatch_batches = False  # batches of a stream have no common first dimension
        if self._n_gpu > 1:
            logger.warning("several GPUs in one process: only the first is used; start one process per GPU (torchrun)")
            self._n_gpu = 1
