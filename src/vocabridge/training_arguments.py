"""What a training run can be told, as ``transformers`` users know it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from vocabridge.compilation import check_compilation
from vocabridge.errors import UserError
from vocabridge.prompts import Template
from vocabridge.recipe.training import NOT_TAKEN
from vocabridge.sharding import check_engine, check_shared_teacher
from vocabridge.zero import load_models_whole, tell_deepspeed_of_cpu

logger = logging.getLogger(__name__)


_WITHOUT_EFFECT = (
    *("label_smoothing_factor", "neftune_noise_alpha", "bf16_full_eval", "fp16_full_eval", "use_liger_kernel"),
    *("liger_kernel_config", "optim_target_modules", "label_names", "include_for_metrics", "batch_eval_metrics"),
)
"""Arguments that ``transformers.Trainer`` applies to its own losses, models, optimizers and metrics only."""
_REFUSED = {
    "auto_find_batch_size": (False,),
    "average_tokens_across_devices": (True,),
    "enable_jit_checkpoint": (False,),
    "save_on_each_node": (False,),
    "hub_token": (None,),
    "hub_strategy": ("every_save", "end"),  # the first is the default, which cannot be told from a wish
    "hub_always_push": (False,),
}
"""Arguments that a recipe cannot set either, and the values that ask for nothing."""


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
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most padded tokens of a batch, both sides together: rows x (longest student row + longest teacher "
            "row). Rows of similar length share a batch, as many as fit; replaces per_device_train_batch_size and "
            "bounds evaluation batches too."
        },
    )
    diagnostics_steps: int = field(
        default=50, metadata={"help": "Optimizer steps between measurements of query and key distributions; 0: never."}
    )
    diagnostics_examples: int = field(
        default=32, metadata={"help": "Training examples in the fixed set on which distributions are measured."}
    )
    shard_teacher: bool = field(
        default=False,
        metadata={
            "help": "Each process holds a piece of every layer of the teacher and gathers a layer when it runs; needs "
            "several processes."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always off: batches are plain tensors."})

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = [name for name in _WITHOUT_EFFECT if getattr(self, name, None)]
        if unused:
            raise UserError(f"training: {', '.join(unused)} cannot be used with distillation losses; leave it out.")
        for name, accepted in _REFUSED.items():
            if getattr(self, name) not in accepted:  # the value may be a secret
                raise UserError(f"training.{name} cannot be used: {NOT_TAKEN[name]}; leave it out.")
        self._check_batching()
        check_engine(self)
        if self.shard_teacher:
            check_shared_teacher(self)
        load_models_whole()
        tell_deepspeed_of_cpu(self.device)
        if self.torch_compile:
            check_compilation(str(self.torch_compile_backend), self.torch_compile_mode, self.device)
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

    @property
    def groups_by_length(self) -> bool:
        """Whether rows of similar length share a training batch."""
        return self.max_tokens_per_batch is not None or self.train_sampling_strategy == "group_by_length"

    def _check_batching(self) -> None:
        strategy = self.train_sampling_strategy
        num_rows = self.per_device_train_batch_size
        if getattr(self.accelerator_config, "split_batches", False) and num_rows % self.world_size:
            raise UserError(
                f"training.accelerator_config.split_batches shares each batch of {num_rows} rows "
                f"(training.per_device_train_batch_size) among {self.world_size} processes, which does not come out "
                f"even; give a multiple of {self.world_size}, or start another number of processes."
            )
        if strategy == "batch_rebalance":
            raise UserError(
                "training.train_sampling_strategy: 'batch_rebalance' is not supported; 'group_by_length' or "
                "training.max_tokens_per_batch also give batches of similar length, and the same work to every rank."
            )
        if not self.groups_by_length:
            return
        asked = "group_by_length" if self.max_tokens_per_batch is None else "max_tokens_per_batch"
        accelerator = self.accelerator_config
        without_meaning = {
            "train_sampling_strategy: sequential": strategy == "sequential",
            "dataloader_drop_last (no batch is incomplete)": self.dataloader_drop_last,
            "accelerator_config.split_batches": getattr(accelerator, "split_batches", False),
            "accelerator_config.dispatch_batches": getattr(accelerator, "dispatch_batches", False),
        }
        if self.max_tokens_per_batch is not None:
            if self.max_tokens_per_batch < 1:
                raise UserError(f"training.max_tokens_per_batch must be at least 1, not {self.max_tokens_per_batch}.")
            default = type(self).__dataclass_fields__["per_device_train_batch_size"].default
            without_meaning |= {
                "per_device_train_batch_size (the budget takes its place)": self.per_device_train_batch_size != default,
            }
        if refused := [name for name, is_set in without_meaning.items() if is_set]:
            raise UserError(f"training: {', '.join(refused)} cannot be used with {asked}; leave one of them out.")
