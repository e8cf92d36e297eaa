"""Two processes, each with its own rows: the gradients are those of one process that sees all rows."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vl_mtl_lora import MTLLoRALinear, TaskRouter
from vl_mtl_lora.lora import adapter_parameters

IDS = torch.tensor([[0, 0, 1, 1], [1, 2, 2, 2]])  # by process; each lacks a task


class Block(nn.Module):
    def __init__(self, router):
        super().__init__()
        options = {"tower": "image", "rank": 4, "alpha": 8, "num_tasks": 3}
        self.norm = nn.LayerNorm(8)
        self.qkv = MTLLoRALinear(nn.Linear(8, 24), router, splits=3, **options)
        self.out = MTLLoRALinear(nn.Linear(24, 8), router, **options)
        self.router, self.checkpointed = router, False

    def forward(self, x):
        if not self.checkpointed:
            return self.run(x)
        return checkpoint(self.run, x, use_reentrant=False, context_fn=self.router.checkpoint_contexts)

    def run(self, x):
        return x + self.out(self.qkv(self.norm(x)).tanh())


def make_model():
    torch.manual_seed(0)
    router = TaskRouter(["a", "b", "c"])
    model = nn.Sequential(*[Block(router) for _ in range(3)])
    layers = [layer for block in model for layer in (block.qkv, block.out)]
    for layer in layers:
        layer.peers = layers
        nn.init.normal_(layer.up)
        nn.init.normal_(layer.transform)
    model.requires_grad_(False)
    for layer in layers:
        for parameter in adapter_parameters(layer).values():
            parameter.requires_grad_()
    return model, router, torch.randn(2, 4, 5, 8)


def gradients(model, router, x, ids):
    with router.use(ids):
        loss = model(x).square().mean()
    loss.backward()  # outside: a checkpointed block must see the route that it ran under
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_process(rank, kind, store):
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    check_process(rank, kind)
    dist.barrier()  # none leaves while the other still talks to it
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that the interpreter's end overtakes abort it, about once in forty times


def check_process(rank, kind):
    model, router, x = make_model()
    halves = []
    for i in range(2):
        alone = copy.deepcopy(model)
        halves.append(gradients(alone, alone[0].router, x[i], IDS[i]))
    expected = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model:
            block.checkpointed = kind == "fsdp, checkpointed"
            fully_shard(block)
        wrapped = fully_shard(model)
    for _ in range(2):  # the second time with everything set up by the first
        wrapped.zero_grad()
        got = gradients(wrapped, router, x[rank], IDS[rank])
        assert len(got) == len(expected) == 24
        for name, grad in got.items():
            whole = grad.full_tensor() if kind != "ddp" else grad
            torch.testing.assert_close(whole, expected[name.removeprefix("module.")], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp, checkpointed"])
def test_gradients_of_two_processes(kind, tmp_path):
    torch.multiprocessing.spawn(run_process, (kind, str(tmp_path / "store")), nprocs=2)
