"""How many floating-point operations a training step takes, and how many kernels it launches.

A small model with the same layers really runs a step; each matrix product is counted at the real sizes, a multiply and
an add each. Not counted: what is small beside them, such as norms, activations, the mixing of up-projections, losses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vl_mtl_lora.layer import MTLLoRALinear
from vl_mtl_lora.memory import blocks_by_layer
from vl_mtl_lora.model import MultiTaskModel, example_batch
from vl_mtl_lora.sections import RunConfig

_LINEAR, _CONVOLUTIONS = {F.linear}, {F.conv1d, F.conv2d, F.conv3d}
_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations. again: the forward pass of the blocks that checkpointing runs a second time."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0

    def total(self, checkpointing: bool) -> float:
        return self.forward + self.backward + (self.again if checkpointing else 0.0)

    def plus(self, other: "Flops", times: float) -> "Flops":
        return Flops(self.forward + times * other.forward, self.backward + times * other.backward,
                     self.again + times * other.again)


def batch_flops(model: MultiTaskModel, probe: MultiTaskModel, config: RunConfig) -> Flops:
    """Of an average batch of the config, forward and backward; `model` and `probe` as for `memory.expected_memory`."""
    total = Flops()
    share = config.batch_rows / sum(section.rows for section in config.tasks.values())  # of the quotas, where mixed
    for task, section in config.tasks.items():
        one, two = (_of_rows(model, probe, task, rows) for rows in (1, 2))
        row = two.plus(one, -1)  # what a batch costs however many rows it has is in both
        if config.data.mixing.turns:  # a batch of each task in its turn
            often = section.rows / sum(section.rows for section in config.tasks.values())
            total = total.plus(one, often).plus(row, often * (config.batch_rows - 1))
        else:
            total = total.plus(one, 1).plus(row, share * section.rows - 1)
    return total


def _of_rows(model: MultiTaskModel, probe: MultiTaskModel, task: str, rows: int) -> Flops:
    count = _Count(model, probe)
    with count.adapters(probe), count:
        probe(example_batch(probe, rows, [task]))
    return Flops(sum(count.forward.values()), count.backward,
                 sum(flops for block, flops in count.forward.items() if block in count.learning))


def launches(probe: MultiTaskModel) -> tuple[int, int]:
    """Of one batch, forward and backward: operations that are no mere views. Their number depends neither on widths nor
    on rows."""
    with _Launches() as forward:
        loss = sum(probe(example_batch(probe, 1)).values())
    with _Launches() as backward:
        loss.backward()
    probe.zero_grad()
    return forward.count, backward.count


class _Launches(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class _Count(TorchFunctionMode):
    """Inside, products with weights and attention are counted.

    forward: by block, "" outside. learning: blocks that a gradient passes.
    """

    def __init__(self, model: MultiTaskModel, probe: MultiTaskModel):
        super().__init__()
        sizes = dict(model.backbone.named_parameters(remove_duplicate=False))
        block_of = blocks_by_layer(probe)
        self.weights = {id(weight): (sizes[name], block_of(name))  # id of a probe's weight -> the real one, its block
                        for name, weight in probe.backbone.named_parameters(remove_duplicate=False)}
        self.real = dict(model.backbone.named_modules())
        self.forward: dict[str, float] = {}
        self.backward = 0.0
        self.learning: set[str] = set()
        self.attended: list[tuple[float, bool]] = []  # since the last linear layer

    def add(self, block: str, forward: float, backward: float) -> None:
        self.forward[block] = self.forward.get(block, 0.0) + forward
        self.backward += backward
        if block and backward:
            self.learning.add(block)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs or {}).values())[:3]
            products = 2 * q.numel() * k.shape[-2] + 2 * out.numel() * k.shape[-2]
            self.attended.append((products, any(x.requires_grad for x in (q, k, v))))
        elif func in _LINEAR | _CONVOLUTIONS | _MATMULS:
            x, weight = args[:2]
            real, block = self.weights.get(id(weight), (None, ""))
            if real is not None:
                places = out.numel() // out.shape[1 if func in _CONVOLUTIONS else -1]
                flops = 2 * places * real.numel()
                self.add(block, flops, flops * x.requires_grad)
                if func in _LINEAR:  # it reads what was attended to: heads x width are its inputs
                    widened = real.shape[-1] / weight.shape[-1]
                    for products, learns in self.attended:
                        self.add(block, widened * products, 2 * widened * products * learns)
                    self.attended.clear()
        return out

    @contextmanager
    def adapters(self, probe: MultiTaskModel) -> Iterator[None]:
        """Inside, the adapters' own products are counted; `ops` has them."""
        def count(name):
            def hook(layer, args, _):
                x = args[0]
                self.add(self.weights[id(layer.base.weight)][1],
                         *self.real[name].operations(x.numel() // x.shape[-1], x.requires_grad))
            return hook

        handles = [layer.register_forward_hook(count(name)) for name, layer in probe.backbone.named_modules()
                   if isinstance(layer, MTLLoRALinear)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
