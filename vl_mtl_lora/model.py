"""Backbone, router, adapters and task heads as one module: `forward(batch) -> losses`."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MethodType
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vl_mtl_lora.backbones import load_backbone
from vl_mtl_lora.backbones.base import Backbone
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.data.stream import Batch
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.lora import AdapterConfig, AdapterSummary, adapter_parameters, inject
from vl_mtl_lora.routing import TaskRouter
from vl_mtl_lora.sections import RunConfig
from vl_mtl_lora.tasks import build_tasks, task_needs

_COLOURS = [("black", "white"), ("navy", "yellow")]  # of the noise in an example batch


class MultiTaskModel(nn.Module):
    """A frozen backbone adapted to several tasks.

    backbone: with adapters in it. router: which task each row is of. tasks: name -> task. summary: what was adapted.
    """

    def __init__(self, backbone: Backbone, router: TaskRouter, tasks: nn.ModuleDict, summary: AdapterSummary):
        super().__init__()
        self.backbone, self.router, self.tasks, self.summary = backbone, router, tasks, summary

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """One loss per task. The image tower runs once over all pictures; each task reads its slice of the states."""
        states = None
        if batch.images is not None:
            with self.router.use(image=batch.ids):
                states = self.backbone.image_states(batch.images)
        losses = {}
        for name, rows in batch.slices.items():
            own = states.rows(rows) if rows.stop > rows.start else None  # a task of texts alone
            with self.router.use(name):
                losses[name] = self.tasks[name].loss(self.backbone, own, batch.inputs[name])
        return losses

    def adapter_state(self) -> dict[str, nn.Parameter]:
        """Every adapter tensor under its logical name, e.g. `image.3.attn.qkv.down`."""
        return {f"{place}.{name}": parameter for place, layer in self.summary.layers.items()
                for name, parameter in adapter_parameters(layer).items()}

    def head_state(self) -> dict[str, nn.Parameter]:
        """Every task head's tensor, e.g. `retrieval.log_scale`."""
        return dict(self.tasks.named_parameters())

    def trainable_state(self) -> dict[str, nn.Parameter]:
        """Adapters and heads."""
        return {**self.adapter_state(), **self.head_state()}

    @cached_property
    def fingerprint(self) -> str:
        """A short hash over the shapes and some values of the frozen weights: cheap also for large bases.

        To be asked for before they are spread over processes; then it stays known.
        """
        digest = hashlib.sha256()
        for tensor in self.backbone.library_state().values():
            if type(tensor) is not Tensor or not tensor.is_floating_point():  # quantised: the others tell enough
                continue
            flat = tensor.flatten()
            step = max(1, len(flat) // 64)
            digest.update(repr((tuple(tensor.shape), flat[::step][:64].float().cpu().tolist())).encode())
        return digest.hexdigest()[:16]


def build_model(config: RunConfig, dry_run: Literal["shapes", "narrow", "random"] | None = None) -> MultiTaskModel:
    """Loads the backbone, injects fresh adapters, and adds the tasks' heads.

    dry_run: look for no weights; see `load_backbone`.

    Raises:
        UserError: anything in the config that cannot be built.
    """
    section = config.backbone
    backbone = load_backbone(section.library, section.name, None if dry_run else section.pretrained, dry_run=dry_run,
                             **section.options)
    if backbone.random_weights and not (dry_run or section.options.get("random_weights")):
        raise UserError(f"backbone.pretrained is missing: {section.name} would be frozen with random weights; "
                        "give a tag or a checkpoint file (or backbone.options.random_weights=true to go without)")
    router = TaskRouter(list(config.tasks))
    tasks = build_tasks(config.tasks, backbone)
    summary = inject(backbone, AdapterConfig(**config.adapter.model_dump()), router, task_needs(tasks))
    return MultiTaskModel(backbone, router, tasks, summary)


def example_batch(model: MultiTaskModel, rows: int | Mapping[str, int] = 2,
                  tasks: Sequence[str] | None = None) -> Batch:
    """`rows` samples of each task (or of some), of noise pictures and the tasks' own example texts, for dry runs.

    rows: for all alike, or by task.
    """
    backbone, rng = model.backbone, random.Random(0)
    transform = backbone.preprocess(False)
    names = list(model.tasks) if tasks is None else tasks
    counts = {name: rows if isinstance(rows, int) else rows[name] for name in names}
    pictures, ids, slices, inputs, keys = [], [], {}, {}, []
    for name, count in counts.items():
        task, start = model.tasks[name], len(pictures)
        samples = [Sample({**task.example, "task": name, "image_id": i}, (), f"{name}{i}", "") for i in range(count)]
        for i in range(count * task.images):
            noise = Image.effect_noise((336, 336), 60)
            pictures.append(transform(ImageOps.colorize(noise, *_COLOURS[i % len(_COLOURS)])))
        slices[name] = slice(start, len(pictures))
        ids += [model.router.index(name)] * (count * task.images)
        inputs[name] = task.collate(samples, rng)
        keys += [sample.key for sample in samples]
    images = backbone.collate_images(pictures) if pictures else None
    return Batch(images, torch.tensor(ids, dtype=torch.long), slices, inputs, keys).to(backbone.device)


def check_gradients(model: MultiTaskModel, total: Tensor | None = None) -> None:
    """Runs a step's forward and backward pass on an `example_batch`, or the backward pass of a given sum of losses.

    Raises:
        UserError: an adapter got no gradient, so its layer is never called or leads nowhere; names such layers.
    """
    if total is None:
        total = sum(model(example_batch(model)).values())
    parameters = [(name, p) for name, layer in model.summary.layers.items() for p in adapter_parameters(layer).values()
                  if p.requires_grad]
    slopes = torch.autograd.grad(total, [p for _, p in parameters], allow_unused=True) if parameters else ()
    # Of a fresh layer only what starts at zero, such as the up-projections, has a slope yet.
    alive = {name for (name, _), slope in zip(parameters, slopes) if slope is not None and slope.any()}
    dead = [name for name in model.summary.layers if name not in alive]
    if dead:
        more = f" and {len(dead) - 20} more" if len(dead) > 20 else ""
        raise UserError(f"{len(dead)} adapters get no gradient and would never learn: {', '.join(dead[:20])}{more}; "
                        "leave them out of adapter.targets")


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
