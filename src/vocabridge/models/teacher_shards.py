"""A frozen teacher whose layers are shared out over the processes, for teachers that do not fit beside the student."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from vocabridge.models.capture import decoder_layers
from vocabridge.models.heads import base_model


def share_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Leave this process its piece of every decoder layer; a layer is gathered when it runs, one at a time (FSDP2).

    Embeddings, final norm and head stay whole: heads are read in chunks, outside of the model's forward. All processes
    must hold the same weights, and must run the model equally often.

    Args:
        model: a frozen causal language model, on the CPU or on ``device``; changed in place.
        device: where it will run. Pieces are put there, one whole layer at a time.

    Raises:
        UserError: its layers are not where we know them.
    """
    base = base_model(model)
    layers = decoder_layers(base)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    in_layers = {id(parameter) for parameter in layers.parameters()}
    trunk = base.get_decoder()
    # As their common root, which holds nothing itself, the trunk lets one layer be gathered while another runs.
    fully_shard(trunk, mesh=mesh, ignored_params={each for each in trunk.parameters() if id(each) not in in_layers})
