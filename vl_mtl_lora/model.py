"""Backbone, router, adapters and task heads as one module: `forward(batch) -> losses`."""

from types import MethodType

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vl_mtl_lora.backbones import load_backbone
from vl_mtl_lora.backbones.base import Backbone
from vl_mtl_lora.config import RunConfig
from vl_mtl_lora.data.stream import Batch
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.lora import AdapterConfig, AdapterSummary, adapter_parameters, inject
from vl_mtl_lora.routing import TaskRouter
from vl_mtl_lora.tasks import build_tasks, task_needs


class MultiTaskModel(nn.Module):
    """A frozen backbone adapted to several tasks.

    backbone: with adapters in it. router: which task each row is of. tasks: name -> task. summary: what was adapted.
    """

    def __init__(self, backbone: Backbone, router: TaskRouter, tasks: nn.ModuleDict, summary: AdapterSummary):
        super().__init__()
        self.backbone, self.router, self.tasks, self.summary = backbone, router, tasks, summary

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """One loss per task. The image tower runs once over all rows; each task reads its slice of the states."""
        with self.router.use(image=batch.ids):
            states = self.backbone.image_states(batch.images)
        losses = {}
        for name, rows in batch.slices.items():
            with self.router.use(name):
                losses[name] = self.tasks[name].loss(self.backbone, states.rows(rows), batch.inputs[name])
        return losses

    def adapter_state(self) -> dict[str, nn.Parameter]:
        """Every adapter tensor under its logical name, e.g. `image.3.attn.qkv.down`."""
        return {f"{place}.{name}": parameter for place, layer in self.summary.layers.items()
                for name, parameter in adapter_parameters(layer).items()}

    def head_state(self) -> dict[str, nn.Parameter]:
        """Every task head's tensor, e.g. `retrieval.log_scale`."""
        return dict(self.tasks.named_parameters())


def build_model(config: RunConfig, random_weights: bool = False) -> MultiTaskModel:
    """Loads the backbone, injects fresh adapters, and adds the tasks' heads.

    random_weights: do not look for the base's weights; for dry runs.

    Raises:
        UserError: anything in the config that cannot be built.
    """
    options = dict(config.backbone.options)
    if random_weights:
        options["random_weights"] = True
    backbone = load_backbone(config.backbone.library, config.backbone.name,
                             None if random_weights else config.backbone.pretrained, **options)
    if backbone.random_weights and not options.get("random_weights"):
        raise UserError(f"backbone.pretrained is missing: {config.backbone.name} would be frozen with random weights; "
                        "give a tag or a checkpoint file (or backbone.options.random_weights=true to go without)")
    router = TaskRouter(list(config.tasks))
    tasks = build_tasks(config.tasks, backbone)
    summary = inject(backbone, AdapterConfig(**config.adapter.model_dump()), router, task_needs(tasks))
    return MultiTaskModel(backbone, router, tasks, summary)


def check_gradients(model: MultiTaskModel) -> None:
    """Runs one backward pass through all that the tasks use of the backbone.

    Raises:
        UserError: an adapter got no gradient, so its layer is never called or leads nowhere; names every such layer.
    """
    backbone = model.backbone
    needs = task_needs(model.tasks)
    tasks = len(model.router.task_names)
    picture = Image.effect_noise((256, 256), 64).convert("RGB")
    images = torch.stack([backbone.preprocess(False)(picture)] * tasks).to(backbone.device)
    tokens = backbone.tokenize(["a photo"] * tasks).to(backbone.device)
    with model.router.use(torch.arange(tasks)):
        states = backbone.image_states(images)
        total = 0.0
        if "embed" in needs:
            # Fixed random directions: a plain sum of unit vectors can have no slope.
            directions = torch.randn(2, backbone.embed_dim, generator=torch.Generator().manual_seed(0))
            directions = directions.to(backbone.device)
            total = total + (states.embedding @ directions[0] + backbone.encode_text(tokens) @ directions[1]).sum()
        if "generate" in needs:
            total = total + backbone.token_logits(states, tokens)[..., 0].sum()
    ups = {name: layer.up for name, layer in model.summary.layers.items()}
    # A fresh layer's up-projections are zero: they alone have a slope yet.
    slopes = torch.autograd.grad(total, list(ups.values()), allow_unused=True)
    dead = [name for name, slope in zip(ups, slopes) if slope is None or not slope.any()]
    if dead:
        raise UserError(f"{len(dead)} adapters get no gradient and would never learn: {', '.join(dead)}; leave them "
                        "out of adapter.targets")


def checkpoint_blocks(model: MultiTaskModel) -> None:
    """Gradient checkpointing: each transformer block keeps its input alone and runs again in the backward pass.

    A block run again sees the route it ran under, also where the route has changed or gone since.
    """
    for block in model.backbone.blocks():
        block.checkpoint_router = model.router
        block.forward = MethodType(_forward_checkpointed, block)  # a bound method, so that copies run themselves


def _forward_checkpointed(block: nn.Module, *args, **kwargs):
    return checkpoint(type(block).forward, block, *args, use_reentrant=False,
                      context_fn=block.checkpoint_router.checkpoint_contexts, **kwargs)
