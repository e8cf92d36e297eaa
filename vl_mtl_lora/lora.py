"""Putting adapters into a backbone: which layers, of which method, and what came of it."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from torch import nn

from vl_mtl_lora.backbones.base import Backbone, Place
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.layer import MTLLoRALinear
from vl_mtl_lora.routing import TaskRouter
from vl_mtl_lora.targets import matched_slices
from vl_mtl_lora.variants import DoRALinear, FullLinear, MoELoRALinear, MultiLoRALinear

METHODS = {"mtl_lora": MTLLoRALinear, "multi_lora": MultiLoRALinear, "moe_lora": MoELoRALinear, "dora": DoRALinear,
           "full": FullLinear}


@dataclass(frozen=True)
class AdapterConfig:
    """Hyperparameters of the adapters; see `MTLLoRALinear`.

    method: a key of `METHODS`, or "heads": no adapters, the tasks' heads alone are trained.
    targets: logical places to adapt, as patterns `TOWER.ROLE` or `TOWER.BLOCKS.ROLE`, where each part may hold shell
        wildcards, BLOCKS may be a range "2-5", a role alone stands for all towers, a tower alone for all in it, and
        the beginning of a role for all that begin so: "attn", "image", "image.attn.qkv", "text.4-11.mlp.in",
        "projector". Of a fused qkv, "attn.q" and "attn.v" adapt those parts alone. Roles: attn.qkv (attn.q, attn.k,
        attn.v), attn.out, mlp.in, mlp.gate, mlp.out, projector; pool.* of an attention pool, cross.* of
        cross-attention.
    """

    rank: int = 8
    alpha: float = 16.0
    num_up: int = 3
    temperature: float = 0.5
    dropout: float = 0.0
    transform: str = "full"
    targets: Sequence[str] = ("*",)
    method: str = "mtl_lora"


@dataclass
class AdapterSummary:
    """What `inject` did.

    modules, parameters: per tower, the layers adapted and their trainable parameters. layers, places: by logical name.
    available: every place of the backbone, adapted or not. left_out: name of a layer that is no place -> why.
    """

    config: AdapterConfig = field(default_factory=AdapterConfig)
    modules: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    layers: dict[str, MTLLoRALinear] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    available: list[Place] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def __str__(self) -> str:
        lines = [f"{tower}: {count} modules, {self.parameters[tower]:,} trainable parameters"
                 for tower, count in self.modules.items()]
        return "\n".join([*lines, f"total: {self.total:,} trainable parameters"])


def inject(backbone: Backbone, config: AdapterConfig, router: TaskRouter,
           needs: Set[str] | None = None) -> AdapterSummary:
    """Freezes the backbone and puts an MTL-LoRA layer on every place that a target matches.

    The outputs stay what they were until the first optimizer step. `needs`: what will be used, capabilities and
    "images", all where None; a layer that none of them reads would never learn and is no place.

    Raises:
        UserError: a target that matches nothing, or a value that the layer refuses.
    """
    if any(isinstance(module, MTLLoRALinear) for module in backbone.modules()):
        raise UserError("the backbone already has adapters: load it again to inject others")
    places = backbone.places(backbone.capabilities if needs is None else needs)
    if needs is not None and "images" not in needs:
        places = [place for place in places if place.tower in backbone.text_towers]
    freeze(backbone)
    names = [place.name for place in places]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"backbone: {len(twice)} layers cannot be told apart by tower, block and role: "
                        f"{', '.join(twice[:3])} each stands for several; this model is not supported")
    slices: list[set[int]] = [set() for _ in places]
    for target in config.targets if config.method != "heads" else ():
        matched = [matched_slices(target, place) for place in places]
        if not any(matched):
            names = sorted({f"{p.tower}.{p.role}" for p in places})
            raise UserError(f"adapter.targets: {target!r} matches nothing; this backbone has {', '.join(names)} "
                            f"in blocks 0-{max(p.block for p in places)}", near=(target, names))
        slices = [have | new for have, new in zip(slices, matched)]
    backbone.router = router
    router.towers = frozenset(backbone.towers)
    zero = dict.fromkeys(backbone.towers, 0)
    summary = AdapterSummary(config=config, modules=dict(zero), parameters=dict(zero),
                             available=places, left_out=dict(backbone.left_out))
    for place, chosen in zip(places, slices):
        if not chosen:
            continue
        layer = METHODS[config.method](
            getattr(place.parent, place.attribute), router, tower=place.rows or place.tower, rank=config.rank,
            alpha=config.alpha, num_tasks=len(router.task_names), num_up=config.num_up,
            temperature=config.temperature, dropout=config.dropout, splits=place.splits, slices=sorted(chosen),
            transform=config.transform)
        if len(chosen) < place.splits:  # attn.qkv -> attn.qv
            place = place._replace(role=place.role[:-3] + "".join("qkv"[i] for i in sorted(chosen)))
        layer.name = place.name
        layer.train(backbone.training)
        setattr(place.parent, place.attribute, layer)
        summary.layers[place.name], summary.places[place.name] = layer, place
        summary.modules[place.tower] += 1
        summary.parameters[place.tower] += sum(p.numel() for p in layer.parameters() if p.requires_grad)
    for layer in summary.layers.values():
        layer.peers = [other for other in summary.layers.values() if other.tower == layer.tower]
    return summary


def freeze(module: nn.Module) -> None:
    """No parameter of the module takes a gradient."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def adapter_parameters(layer: MTLLoRALinear) -> dict[str, nn.Parameter]:
    """The parameters of one layer beside its base's, by name."""
    return dict(layer.named_parameters(recurse=False))
