"""One process or several: who we are, and the few things that processes do together.

Under `torchrun` every process takes every n-th batch and gradients are averaged, so n processes with one batch each do
what one process does that accumulates n. Each keeps the whole drafter (DDP), or a part of every tensor (FSDP2); what
needs tensors in one piece asks for them with `whole`, which all processes must do together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from dspark.losses import Losses


def join() -> tuple[int, int]:
    """(rank, number of processes). Joins the group that torchrun announces; alone there is none."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Part from the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_over_processes(values: Iterable[float]) -> list[float]:
    """The same list of numbers in every process: the means."""
    own = list(values)
    if not dist.is_initialized():
        return own
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    summed = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return [float(value) / dist.get_world_size() for value in summed]


def gathered(own: Any) -> list[Any]:
    """What every process has, in the order of their ranks, in every process."""
    if not dist.is_initialized():
        return [own]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


class Objective(nn.Module):
    """The drafter's loss as a forward, which is what DDP and FSDP2 watch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> tuple[Tensor, Losses]:
        losses: Losses = self.model.loss(*inputs)  # type: ignore[operator]
        return losses.total, losses


def shared(model: nn.Module, is_sharded: bool) -> nn.Module:
    """The objective; its gradients are averaged over the processes if there are several.

    is_sharded  every process keeps a part of each parameter, which turns into a DTensor here: before optimisers are made.
                All are gathered for a forward and let go after its backward, in one go: a drafter has few layers.
    """
    objective = Objective(model)
    if not dist.is_initialized():
        return objective
    if is_sharded:
        device = next(model.parameters()).device.type
        fully_shard(objective, mesh=init_device_mesh(device, (dist.get_world_size(),)))
        return objective
    # a loss with weight 0 leaves parameters without a gradient
    return DistributedDataParallel(objective, find_unused_parameters=True)


def without_averaging(objective: nn.Module) -> AbstractContextManager[Any]:
    """All but the last batch of an accumulation: gradients stay in the process, unless it has no room for them whole."""
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece, whether or not the processes have parts of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """What `whole` undoes: of a tensor that all processes have, the part that this one has of `like`."""
    if not isinstance(like, DTensor):
        return tensor
    everywhere = DTensor.from_local(tensor, like.device_mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=like.placements)


def whole_state(state: Any) -> Any:
    """A state dict with its tensors in one piece; those that were in parts lie in main memory then."""
    if isinstance(state, dict):
        return {name: whole_state(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value) for value in state]
    return state.full_tensor().cpu() if isinstance(state, DTensor) else state
