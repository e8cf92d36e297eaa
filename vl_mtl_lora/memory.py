"""How much memory a training step takes: weights, what is trained, and what is kept for the backward pass.

A small model with the same layers really runs a step. What autograd keeps for a row is measured, and scaled to the real
sizes by what the linear layers account for: once each input that an adapted layer reads, and the output of every linear
layer through which a gradient passes. Not counted: what a kernel needs for a moment, and the allocator's slack.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vl_mtl_lora.layer import MTLLoRALinear
from vl_mtl_lora.model import MultiTaskModel, example_batch
from vl_mtl_lora.sections import RunConfig

_BYTES_TRAINED = 16  # per trained parameter in float32: itself, its gradient, Adam's two moments
# What half precision computes in float32 all the same; `pow` stands for the norms that models write themselves.
_WIDE = {F.layer_norm, F.rms_norm, F.group_norm, F.softmax, F.log_softmax, torch.softmax, torch.Tensor.softmax,
         torch.log_softmax, torch.Tensor.log_softmax, F.cross_entropy, torch.pow, torch.Tensor.pow}


@dataclass
class Memory:
    """Bytes of a training step.

    weights: of the frozen model. trained: adapters and heads with gradients and Adam's moments. activations: kept for
    the backward pass. checkpointed: the same where each block keeps its input alone and runs again.
    """

    weights: int
    trained: int
    activations: int
    checkpointed: int

    def total(self, checkpointing: bool) -> int:
        return self.weights + self.trained + (self.checkpointed if checkpointing else self.activations)


@dataclass
class _Step:
    """What a step keeps: `measured` bytes of the probe, and the values each linear layer accounts for, by its name.

    probe, real: at the probe's and the real model's sizes. inputs: values of each block's input, real size.
    """

    measured: int = 0
    probe: dict[str, int] = field(default_factory=dict)
    real: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)


def expected_memory(model: MultiTaskModel, probe: MultiTaskModel, config: RunConfig) -> tuple[Memory, Tensor]:
    """The memory of one batch of the config, and the loss of the step that the probe ran for it, ready for backward.

    model: with the real sizes; it may lie on the meta device. probe: a model with the same layers that can compute.
    """
    block_of = blocks_by_layer(probe)
    parts: list[tuple[Counter, Counter]] = []  # of each task, what is kept and the inputs, by block
    loss = torch.zeros((), device=probe.backbone.device)
    share = config.batch_rows / sum(section.rows for section in config.tasks.values())  # of the quotas, where mixed
    for task, section in config.tasks.items():
        with _measured(probe, model, config) as one:  # what it keeps however many rows there are is small
            probe(example_batch(probe, 1, [task]))
        with _measured(probe, model, config) as two:
            loss = loss + probe(example_batch(probe, 2, [task]))[task]
        rows = config.batch_rows if config.data.mixing.turns else share * section.rows
        kept, inputs = Counter(), Counter()
        parts.append((kept, inputs))
        measured = (two.measured - one.measured) / (sum(two.probe.values()) - sum(one.probe.values()))
        for layer in two.real:
            kept[block_of(layer)] += rows * measured * (two.real[layer] - one.real[layer])
        for block in two.inputs:
            inputs[block] += rows * (two.inputs[block] - one.inputs[block])
    if config.data.mixing.turns:  # the largest batch counts
        parts = [max(parts, key=lambda part: part[0].total())]
    kept, inputs = (sum(counters, Counter()) for counters in zip(*parts))
    outside = kept.pop("", 0.0)
    value = _value_bytes(model, config)
    again = value * sum(inputs[block] for block in kept) + max(kept.values(), default=0.0)
    trained = _BYTES_TRAINED * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Memory(model.backbone.weight_bytes, trained, round(outside + sum(kept.values())),
                  round(outside + again)), loss


def blocks_by_layer(model: MultiTaskModel) -> Callable[[str], str]:
    """Returns a function: name of a layer or weight of the backbone -> name of its block, "" outside of all."""
    blocks = {id(block) for block in model.backbone.blocks()}
    names = [name for name, module in model.backbone.named_modules() if id(module) in blocks]
    return lambda layer: next((name for name in names if layer.startswith(name + ".")), "")


def _value_bytes(model: MultiTaskModel, config: RunConfig) -> int:
    return 2 if config.train.precision == "bf16" else model.backbone.dtype.itemsize


class _Wide(TorchFunctionMode):
    """Tells whether what is computed just now is computed in float32 anyway."""

    now = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before, self.now = self.now, self.now or func in _WIDE
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.now = before


@contextmanager
def _measured(probe: MultiTaskModel, model: MultiTaskModel, config: RunConfig) -> Iterator[_Step]:
    """Inside, the probe's forward pass is measured as if it had the real model's precision."""
    step, wide = _Step(), _Wide()
    value, block_of = _value_bytes(model, config), blocks_by_layer(probe)
    sizes = dict(model.backbone.named_modules())
    permanent = {t.untyped_storage().data_ptr() for t in chain(probe.parameters(), probe.buffers())}
    kept: dict[int, Tensor] = {}  # by address; held, so that no two share one
    read: dict[int, Tensor] = {}

    def keep(tensor):
        tensor = tensor.detach()  # the graph would hold itself: what it saves may be what it made
        address = tensor.untyped_storage().data_ptr()
        if address not in permanent and address not in kept:
            kept[address] = tensor
            count = tensor.untyped_storage().nbytes() // tensor.element_size()
            step.measured += count * (max(value, 4) if wide.now else value)
        return tensor

    def note(name):
        def hook(layer, args, output):
            x, real = args[0], sizes[name]
            rows = x.numel() // x.shape[-1]
            step.inputs.setdefault(block_of(name), rows * real.in_features)
            if not output.requires_grad:
                return
            new = isinstance(layer, MTLLoRALinear) and x.data_ptr() not in read
            read[x.data_ptr()] = x
            for counts, size in ((step.probe, layer), (step.real, real)):
                counts[name] = counts.get(name, 0) + rows * (size.out_features + (size.in_features if new else 0))
        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in probe.backbone.named_modules()
               if isinstance(layer, nn.Linear | MTLLoRALinear) and not name.endswith(".base")]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), wide:
            yield step
    finally:
        kept.clear()  # the graph holds `keep`, and that these
        read.clear()
        for handle in handles:
            handle.remove()
