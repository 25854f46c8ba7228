"""Which engines may spread training over processes, and what FSDP2 must be told.

Under FSDP2 each decoder layer is a group of its own. Embeddings, head, projectors and discriminator are the root's
group, which is whole during the forward of :class:`~vocabridge.distillation_model.DistillationModel`: heads in chunks
read plain tensors there, and each rank holds no other layer than the one that runs.
"""

from __future__ import annotations

from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from vocabridge.errors import UserError


def check_engine(args: TrainingArguments) -> None:
    """Refuse what cannot train here, before any model is read: a launcher's settings reach ``from_pretrained`` too.

    Raises:
        UserError: names what works instead.
    """
    if args.parallelism_config is not None or parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError(
            "accelerate's parallelism_config (tensor, context or sequence parallelism) is not supported; remove it and "
            "shard over all processes (configs/fsdp2.yaml)."
        )
    if args.fsdp_plugin_args is not None and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError(
            "training.fsdp needs processes that a launcher starts: accelerate launch --config_file configs/fsdp2.yaml "
            "-m vocabridge distill RECIPE, or torchrun --nproc-per-node N -m vocabridge distill RECIPE."
        )
    plugin = fsdp_plugin(args)
    if plugin is not None:
        _check_fsdp(plugin, args.mixed_precision)
    if args.deepspeed_plugin is not None:
        _check_deepspeed(args.deepspeed_plugin)


def check_shared_teacher(args: TrainingArguments) -> None:
    """Early check of ``training.shard_teacher``.

    Raises:
        UserError: there is one process only, or an engine that does not go with it.
    """
    if args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError(
            "training.shard_teacher needs several processes, each with its piece: accelerate launch --config_file "
            "configs/ddp.yaml -m vocabridge distill RECIPE, or torchrun --nproc-per-node N; or leave it out."
        )
    if args.deepspeed_plugin is not None:
        raise UserError("training.shard_teacher cannot be used with DeepSpeed; take DDP or FSDP2, or leave it out.")
    if args.torch_compile:
        raise UserError("training.shard_teacher cannot be used with torch_compile; leave one of them out.")


def fsdp_plugin(args: TrainingArguments) -> FullyShardedDataParallelPlugin | None:
    """What ``training.fsdp`` or ``accelerate launch`` asks for; None without FSDP."""
    if args.fsdp_plugin_args is not None:
        return FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    return FullyShardedDataParallelPlugin() if parse_flag_from_env("ACCELERATE_USE_FSDP") else None


def _check_fsdp(plugin: FullyShardedDataParallelPlugin, mixed_precision: str) -> None:
    if plugin.fsdp_version != 2:
        raise UserError(
            "FSDP version 1 is not supported; set fsdp_version: 2 in the accelerate config (configs/fsdp2.yaml), or "
            "training.fsdp_config: {version: 2}."
        )
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            "FSDP's cpu_ram_efficient_loading would leave all processes but the first without the teacher's weights; "
            "set it to false."
        )
    if plugin.activation_checkpointing:
        # accelerate replays a layer with preserve_rng_state=False, so dropout would differ from the forward's.
        raise UserError(
            "FSDP's own activation_checkpointing replays dropout with other random numbers; set it to false and "
            "training.activation_checkpointing: true instead."
        )
    if mixed_precision == "fp16":
        raise UserError("fp16 does not go with FSDP here; use training.bf16: true, or float32.")


def _check_deepspeed(plugin: DeepSpeedPlugin) -> None:
    if own := [name for name in ("optimizer", "scheduler") if name in plugin.deepspeed_config]:
        raise UserError(
            f"DeepSpeed's own {' and '.join(own)} would give projectors and discriminator the student's learning rate; "
            "leave that out of its config and set training.optim and training.lr_scheduler_type."
        )


def use_fsdp(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Make a fresh ``accelerator`` shard by ``plugin``, on a CPU too, without loss of precision at the root.

    Accelerate leaves FSDP out on CPUs without a word, and its mixed precision casts every number that enters or leaves
    the root: token counts, logged sums and the teacher's states and head would be rounded to bfloat16.
    """
    state = accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        state.fsdp_plugin = plugin
        state.distributed_type = DistributedType.FSDP
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
    used = cast(FullyShardedDataParallelPlugin, state.fsdp_plugin)
    policy = used.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy):
        used.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def start_alike(model: nn.Module, device: torch.device) -> None:
    """Give every rank the first one's parameters, as data parallelism does; FSDP2 shards what each rank has."""
    for parameter in model.parameters():
        value = parameter.data.to(device)
        torch.distributed.broadcast(value, src=0)
        parameter.data.copy_(value)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has taken over the model's parameters."""
    return isinstance(model, FSDPModule)


def gather_for(model: nn.Module, method: str) -> None:
    """Let ``model.method`` run with whole root parameters, as its forward does; nothing without FSDP2."""
    register_fsdp_forward_method(model, method)
