"""Weights, gradients, moments and average shared out over the processes (FSDP2, torch's
fully_shard), for networks that one card cannot hold. Used if cfg.fsdp.
"""

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate

from common import fail


def shard(model, device, compiled=False):
    """Share out a network's tensors: a block's are whole only while the block runs. All processes
    must then call the network equally often. compiled: compile each block."""
    if not dist.is_initialized():
        fail("fsdp=True: needs several processes; start train.py with torchrun")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh)
    # the root, too: `update_ema` may follow a validation, which has no backward pass
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "next_logits")
    return model


def whole(state):
    """A state dict with every shared tensor put together on the CPU of rank 0, one at a time; None
    on the others. All processes must call it."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else None


def shard_like(tensor, like):
    """A whole tensor, the same on all processes, shared out as `like` is. No communication."""
    if not isinstance(like, DTensor) or not tensor.ndim:
        return tensor
    tensor = DTensor.from_local(tensor.to(like.device), like.device_mesh, [Replicate()])
    return tensor.redistribute(placements=like.placements)
