"""Several processes that train one model: who is which, what all of them hold, and rows of all with their gradient."""

import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from vl_mtl_lora.errors import UserError


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def everyone(value: Any) -> list:
    """The value of each process, in their order; all must call it."""
    if world() == 1:
        return [value]
    values: list = [None] * world()
    dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Returns when all processes have called it."""
    if world() > 1:
        dist.barrier()


def joined(rows: Tensor) -> Tensor:
    """(B, ...) -> (processes * B, ...): the rows of all, in their order. The gradient goes back to each one's own."""
    return rows if world() == 1 else _Joined.apply(rows)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, slope):
        slope = slope.contiguous().clone()
        dist.all_reduce(slope)
        return slope.chunk(world())[rank()]


def shared_mean(total: Tensor, count: Tensor) -> Tensor:
    """Mean of what is spread unevenly over the processes, as the value whose mean over them it is.

    total: sum of a process's terms. count: how many these are. Where no process has any, 0.
    """
    if world() > 1:
        count = count.to(total.dtype)
        dist.all_reduce(count)
        count = count / world()
    return total / count.clamp(min=1 / world())


@contextmanager
def launched(shard: bool) -> Iterator[Accelerator]:
    """Around a training run: connects the processes that torchrun or accelerate has started, and lets go of them.

    shard: the weights are to be spread over them (FSDP2); also where `accelerate launch --use_fsdp` says so.

    Raises:
        UserError: the connection to another process is lost, or there never was one.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        _find_launcher()
        _join_again()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                                            cpu_ram_efficient_loading=False) if shard and several else None
    # Its own precision setting is global to the process; ours is the run's.
    accelerator = Accelerator(cpu=several and not torch.cuda.is_available(), fsdp_plugin=plugin)
    try:
        yield accelerator
    except RuntimeError as error:
        first = str(error).splitlines()[0][:200]
        if world() == 1 or not re.search("gloo|nccl|connection|peer", str(error), re.IGNORECASE):
            raise
        raise UserError(f"process {rank()} of {world()} has lost another one, which died or was stopped; the last "
                        f"checkpoint is whole, go on with --resume ({first})") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _find_launcher() -> None:
    """Raises UserError where torchrun, whose store is there before its processes, is gone: torch would wait for it half
    an hour."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.create_connection((host, int(port)), timeout=60).close()
    except OSError as error:
        raise UserError(f"torchrun does not answer at {host}:{port} ({error}): it was stopped, or that address cannot "
                        "be reached from this machine") from error


def _join_again() -> None:
    """Connects processes that torchrun has started again on one machine.

    Its store still holds the addresses of their first life, and torch 2.14 does not tell attempts apart. Over several
    machines each counts attempts for itself, so that nothing can be done here.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt {attempt}", store), rank=number, world_size=size)


def prepared(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer,
             blocks: Iterable[nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model on its device, copied to each process or spread over them block by block, and its optimizer."""
    if accelerator.is_fsdp2:
        names = sorted({type(block).__name__ for block in blocks})
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names
    return accelerator.prepare(model, optimizer)


# -- parameters spread over processes (FSDP2) ----------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part, put together; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor -> this process's part of it where `like` is spread, on its device."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside, each process holds every weight of a spread model: what it computes alone needs no other process."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)
