"""Adapters that others trained, made into a checkpoint of this package: evaluated, exported and trained on like any."""

from pathlib import Path

import torch

from vl_mtl_lora.backbones.base import Backbone, Place
from vl_mtl_lora.checkpoint import save_checkpoint
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.layer import MTLLoRALinear
from vl_mtl_lora.model import MultiTaskModel, build_model
from vl_mtl_lora.safe_files import some
from vl_mtl_lora.sections import RunConfig
from vl_mtl_lora.sources import LayerAdapter, Source, read_source

_Target = tuple[Place, int | None]  # a place, and which of its output slices; None: all, side by side


def import_adapters(path: str | Path, config: RunConfig) -> list[str]:
    """Writes `config.out`/last, a checkpoint whose adapters compute what those in `path` do; returns what to tell.

    Of a plain LoRA every task gets the same: A as it is, B as each of the up-projections, whose weights sum to one, and
    Lambda the identity. Layers that the config adapts and the source does not have stay fresh: they change nothing.

    Raises:
        UserError: as `read_source`; settings, tasks, layers or shapes that do not fit the config; an `out` in use.
    """
    out = Path(config.out)
    if (out / "last").exists():
        raise UserError(f"{out} already holds a run: set another out=FOLDER")
    source = read_source(path, list(config.tasks))
    _check_settings(source, config)
    torch.manual_seed(config.train.seed)
    model = build_model(config)
    told = [f"{len(source.layers)} layers of {source.kind} for {len(config.tasks)} tasks", *fill(model, source)]
    origin = f"imported from {Path(path).absolute().name}, trained with {source.kind}"
    try:
        # `train --resume` starts from there at step 0, with nothing in the optimizer yet.
        save_checkpoint(out / "last", model, config, step=0, origin=origin,
                        resume={"random.torch.0": torch.get_rng_state()})
    except OSError as error:
        raise UserError(f"out: cannot write {out}: {error}") from error
    return told


def _check_settings(source: Source, config: RunConfig) -> None:
    """What shapes and formula depend on must be the source's."""
    own, tasks = config.adapter, list(config.tasks)
    if own.method != "mtl_lora" or own.transform not in ("full", "diagonal"):
        raise UserError(f"adapters are imported as MTL-LoRA with a Lambda, not as {own.method} with transform: "
                        f"{own.transform}; leave adapter.method and adapter.transform out of the config")
    if isinstance(source.tasks, int) and source.tasks != len(tasks):
        raise UserError(f"the adapters are of {source.tasks} tasks, numbered, the config has {len(tasks)} "
                        f"({', '.join(tasks)}): name as many, in the order of their numbers")
    wrong = {name: value for name, value in source.settings.items() if getattr(own, name) != value}
    if wrong:
        raise UserError(f"the adapters were trained with other settings of adapter than the config's "
                        f"({', '.join(f'{name} {getattr(own, name)}' for name in wrong)}); write "
                        + " ".join(f"adapter.{name}={value}" for name, value in wrong.items()))
    if own.rank < source.least_rank:
        raise UserError(f"the adapters have rank {source.least_rank}, the config {own.rank}; write "
                        f"adapter.rank={source.least_rank}")
    if unsaid := [name for name in source.unsaid if name not in own.model_fields_set]:
        raise UserError(f"{source.kind} does not save {' and '.join(unsaid)}: write "
                        + ", ".join(f"adapter.{name}=VALUE ({source.unsaid[name]})" for name in unsaid))


@torch.no_grad()
def fill(model: MultiTaskModel, source: Source) -> list[str]:
    """Puts a source's layers into those of a model with fresh adapters; returns what was not one to one.

    Raises:
        UserError: layers that the backbone does not have or the config does not adapt, or that have other shapes; the
            model is then filled in part and of no use.
    """
    known = layer_names(model.backbone, model.summary.available)
    found = {name: known.get(name) for name in source.layers}
    # LLaVA's last vision block is no place and never read, so what was trained for it is as it was: B is zero.
    empty = [name for name, target in found.items()
             if not (target and _slices(target)) and not source.layers[name].up.any()]
    found = {name: target for name, target in found.items() if name not in empty}
    if unknown := [name for name, target in found.items() if target is None]:
        raise UserError(f"the backbone has no adaptable layer {some(unknown)} ({len(unknown)} in all)",
                        near=(unknown[0], known))
    if left := [name for name, target in found.items() if not _slices(target)]:
        roles = sorted({_role(target) for target in found.values()})
        raise UserError(f"adapter.targets leaves out {some(left)} ({len(left)} in all); write "
                        f"adapter.targets=[{','.join(roles)}]")
    filled = set()
    for name, target in found.items():
        for index, part in _slices(target):
            layer = getattr(target[0].parent, target[0].attribute)
            if (layer.name, index) in filled:
                raise UserError(f"the source adapts {layer.name} twice, once as {name}")
            filled.add((layer.name, index))
            _fill_slice(layer, index, source.layers[name], part, name)
    fresh = [layer.name for layer in model.summary.layers.values()
             if not any((layer.name, index) in filled for index in range(len(layer.slices)))]
    if not filled:
        raise UserError("every layer of the source computes nothing (B is zero): there is nothing to import")
    told = []
    if empty:
        told.append(f"left out, since they compute nothing (B is zero): {some(empty)} ({len(empty)} in all)")
    if fresh:
        told.append(f"not in the source, so fresh, which changes nothing: {some(fresh)} ({len(fresh)} in all)")
    return told


def layer_names(backbone: Backbone, places: list[Place]) -> dict[str, _Target]:
    """Every name by which a source may call an adaptable layer, or a slice of one."""
    return {name: (place, part) for place in places for name, part in backbone.layer_names(place).items()}


def _slices(target: _Target) -> list[tuple[int, int | None]]:
    """Of a target's slices the index in the layer, and which part of the source's columns it is (None: all). Empty
    where not all of them are adapted."""
    place, part = target
    layer = getattr(place.parent, place.attribute)
    if not isinstance(layer, MTLLoRALinear):
        return []
    wanted = range(place.splits) if part is None else [part]
    if not set(wanted) <= set(layer.slices):
        return []
    return [(layer.slices.index(i), i if part is None and place.splits > 1 else None) for i in wanted]


def _role(target: _Target) -> str:
    place, part = target
    role = place.role if part is None else place.role.removesuffix("qkv") + "qkv"[part]
    return f"{place.tower}.{role}"


def _fill_slice(layer: MTLLoRALinear, index: int, adapter: LayerAdapter, part: int | None, name: str) -> None:
    """One slice's parameters become an adapter's. Of a rank below the layer's, the rest of A stays fresh, B zero."""
    rank, columns = len(adapter.down), layer.up.shape[-1]
    up = adapter.up if part is None else adapter.up[:, part * columns:(part + 1) * columns]
    if adapter.down.shape[1] != layer.in_features or up.shape[1] != columns or (
            part is not None and adapter.up.shape[1] != layer.out_features):
        raise UserError(f"{name} takes {adapter.down.shape[1]} and gives {adapter.up.shape[1]} numbers, "
                        f"the backbone's {layer.name} {layer.in_features} and "
                        f"{columns if part is None else layer.out_features}: it was trained on another base")
    layer.down[index, :rank] = adapter.down.to(layer.down)
    up = up.to(layer.up)
    if adapter.scale is not None:
        up = up * (adapter.scale / layer.scale)
    layer.up[index, :, :rank] = up.transpose(1, 2)
    if adapter.transform is not None:
        layer.transform[index] = adapter.transform.to(layer.transform)
    if adapter.mix is not None:
        layer.mix[index] = adapter.mix.to(layer.mix)
