"""How much memory a training step takes: weights, what is trained, and what is kept for the backward pass.

A small model with the same layers really runs a step. What autograd keeps for a row is measured, and scaled to the real
sizes by what the linear layers account for: once each input that an adapted layer reads, and the output of every linear
layer through which a gradient passes. Not counted: what a kernel needs for a moment, and the allocator's slack.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from vl_mtl_lora.lora import MTLLoRALinear
from vl_mtl_lora.model import MultiTaskModel, example_batch
from vl_mtl_lora.sections import RunConfig

_BYTES_TRAINED = 16  # per trained parameter in float32: itself, its gradient, Adam's two moments


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
    """Values that a step keeps: `measured` of the probe, and what each linear layer accounts for, by its name.

    probe, real: at the probe's and the real model's sizes. inputs: the values of the layer's input, real size.
    """

    measured: int = 0
    probe: dict[str, int] = field(default_factory=dict)
    real: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)


def expected_memory(model: MultiTaskModel, probe: MultiTaskModel, config: RunConfig) -> tuple[Memory, Tensor]:
    """The memory of one batch of the config, and the loss of the step that the probe ran for it, ready for backward.

    model: with the real sizes; it may lie on the meta device. probe: a model with the same layers that can compute.
    """
    blocks = {id(block) for block in probe.backbone.blocks()}
    names = [name for name, module in probe.backbone.named_modules() if id(module) in blocks]
    kept: dict[str, float] = {}  # by block, "" for what lies outside
    inputs: dict[str, float] = {}
    loss = torch.zeros((), device=probe.backbone.device)
    share = config.batch_rows / sum(section.rows for section in config.tasks.values())  # of the quotas, where mixed
    for task, section in config.tasks.items():
        with _measured(probe, model) as one:  # what it keeps however many rows there are is small in a real model
            probe(example_batch(probe, 1, [task]))
        with _measured(probe, model) as two:
            loss = loss + probe(example_batch(probe, 2, [task]))[task]
        measured = (two.measured - one.measured) / (sum(two.probe.values()) - sum(one.probe.values()))
        for layer in two.real:
            block = next((name for name in names if layer.startswith(name + ".")), "")
            values = share * section.rows * measured * (two.real[layer] - one.real[layer])
            kept[block] = kept.get(block, 0.0) + values
            inputs[block] = max(inputs.get(block, 0.0), share * section.rows * (two.inputs[layer] - one.inputs[layer]))
    outside = kept.pop("", 0.0)
    inputs.pop("", None)
    again = sum(inputs.values()) + max(kept.values(), default=0.0)
    value = 2 if config.train.precision == "bf16" else model.backbone.dtype.itemsize
    trained = _BYTES_TRAINED * sum(p.numel() for p in model.parameters() if p.requires_grad)
    activations = round(value * (outside + sum(kept.values())))
    return Memory(model.backbone.weight_bytes, trained, activations, round(value * (outside + again))), loss


@contextmanager
def _measured(probe: MultiTaskModel, model: MultiTaskModel) -> Iterator[_Step]:
    """Inside, the probe's forward pass is measured."""
    step = _Step()
    sizes = dict(model.backbone.named_modules())
    permanent = {t.untyped_storage().data_ptr() for t in chain(probe.parameters(), probe.buffers())}
    kept: dict[int, Tensor] = {}  # by address; held, so that no two share one
    read: dict[int, Tensor] = {}

    def keep(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in permanent and address not in kept:
            kept[address] = tensor
            step.measured += tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    def note(name):
        def hook(layer, args, output):
            if not output.requires_grad:
                return
            x, real = args[0], sizes[name]
            rows = x.numel() // x.shape[-1]
            new = isinstance(layer, MTLLoRALinear) and x.data_ptr() not in read
            read[x.data_ptr()] = x
            for counts, size in ((step.probe, layer), (step.real, real)):
                counts[name] = counts.get(name, 0) + rows * (size.out_features + (size.in_features if new else 0))
            step.inputs[name] = step.inputs.get(name, 0) + rows * real.in_features
        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in probe.backbone.named_modules()
               if isinstance(layer, nn.Linear | MTLLoRALinear) and not name.endswith(".base")]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield step
    finally:
        for handle in handles:
            handle.remove()
