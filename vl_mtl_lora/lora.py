"""The MTL-LoRA layer, and putting it into a backbone.

Formula, for a row of task t (arXiv 2410.09437, eq. 5 and 6):

    h = W x + (alpha / r) * sum_i softmax(w_t / tau)_i  B_i  Lambda_t  A  x

Shape letters: S output slices, T tasks, N up-projections, R rank, I in, O out.
"""

import fnmatch
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vl_mtl_lora.backbones.base import Backbone, Place
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.ops import routed_linear
from vl_mtl_lora.routing import TaskRouter

TRANSFORMS = ("full", "diagonal")


class MTLLoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update per task.

    Parameters, stacked over tasks, with the paper's names:
        down (S, R, I): A, shared by all tasks, Kaiming-uniform.
        transform (S, T, R, R), or (S, T, R) where diagonal: Lambda, per task, the identity at start.
        up (S, N, R, O/S): B transposed, N of them, shared, zero at start: a fresh layer equals the frozen one.
        mix (S, T, N): w, per task, whose softmax weighs the up-projections.

    Args:
        base: the frozen layer; shared, not copied.
        router: tells each row's task; shared by all layers of a model.
        tower: the tower whose rows the layer sees.
        rank, alpha: r and alpha of the formula; the update is scaled by alpha / rank.
        num_tasks: T. num_up: N. temperature: tau.
        dropout: probability, on what A reads.
        splits: S, output slices with adapters of their own (3 for a fused qkv).
        transform: "full" (r x r) or "diagonal".

    Raises:
        UserError: a value out of its range.
    """

    def __init__(self, base: nn.Linear, router: TaskRouter, *, tower: str, rank: int, alpha: float, num_tasks: int,
                 num_up: int = 3, temperature: float = 0.5, dropout: float = 0.0, splits: int = 1,
                 transform: str = "full"):
        super().__init__()
        base.requires_grad_(False)
        for name, value in (("rank", rank), ("num_tasks", num_tasks), ("num_up", num_up), ("splits", splits)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if temperature <= 0:
            raise UserError(f"temperature must be above 0, got {temperature}")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {dropout}")
        if transform not in TRANSFORMS:
            raise UserError(f"unknown transform {transform!r}", near=(transform, TRANSFORMS))
        if base.out_features % splits:
            raise UserError(f"{base.out_features} outputs do not divide into {splits} splits")
        self.base = base
        self.router = router
        self.tower = tower
        self.name = ""  # the logical name, set by inject, for messages
        self.scale = alpha / rank
        self.temperature = temperature
        self.dropout = nn.Dropout(dropout)
        # Adapters of a half-precision base stay in float32: their updates would be lost in rounding.
        dtype = base.weight.dtype if base.weight.dtype == torch.float64 else torch.float32
        like = {"device": base.weight.device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(splits, rank, base.in_features, **like))
        eye = torch.eye(rank, **like) if transform == "full" else torch.ones(rank, **like)
        self.transform = nn.Parameter(eye.repeat(splits, num_tasks, *[1] * eye.dim()))
        self.up = nn.Parameter(torch.zeros(splits, num_up, rank, base.out_features // splits, **like))
        self.mix = nn.Parameter(torch.empty(splits, num_tasks, num_up, **like))
        for part in self.down:
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))
        for part in self.mix:
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., I) -> (B, ..., O); row b uses the parameters of the task that the router has for it.

        Raises:
            RuntimeError: no route is set, or it holds another number of rows.
        """
        route = self.router.route(self.tower)
        if route is None:
            return self.base(x)
        if route.num_rows is not None and route.num_rows != x.shape[0]:
            raise RuntimeError(f"layer {self.name or '(unnamed)'}: got {x.shape[0]} rows (dim 0 of "
                               f"{tuple(x.shape)}), but the router holds {route.num_rows} ids for the "
                               f"{self.tower} tower")
        low = self.dropout(x) if self.training and self.dropout.p else None
        up = self._task_up(slice(None) if route.task is None else slice(route.task, route.task + 1))
        return routed_linear(x, self.base.weight, self.base.bias, self.down, up, route, low)

    def _task_up(self, tasks: slice) -> Tensor:
        """(S, T, R, O/S): scale * Lambda_t^T sum_i softmax(w_t / tau)_i B_i^T, what a row's A x is multiplied by."""
        with torch.autocast(self.up.device.type, enabled=False):
            dtype = torch.promote_types(self.mix.dtype, torch.float32)  # also after model.half()
            weights = F.softmax(self.mix[:, tasks].to(dtype) / self.temperature, dim=-1)
            mixed = torch.einsum("stn,snro->stro", weights * self.scale, self.up.to(dtype))
            transform = self.transform[:, tasks].to(dtype)
            if transform.dim() == 3:
                return transform.unsqueeze(-1) * mixed
            return transform.transpose(-1, -2) @ mixed

    @torch.no_grad()
    def fold(self, task_index: int) -> tuple[Tensor, Tensor]:
        """The task's exact plain-LoRA factors A' (S, R, I) and B' (S, R, O/S): delta = (x A'^T) B' per slice."""
        return self.down.detach().clone(), self._task_up(slice(task_index, task_index + 1))[:, 0].clone()

    @torch.no_grad()
    def merged(self, task_index: int) -> nn.Linear:
        """A plain linear layer that computes what this one does for one task, in the base's dtype."""
        down, up = self.fold(task_index)
        delta = torch.einsum("sri,sro->soi", down.double(), up.double()).flatten(0, 1)  # (O, I)
        out = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None,
                        device=self.weight.device, dtype=self.weight.dtype)
        out.weight.copy_((self.weight.double() + delta).to(self.weight.dtype))
        if self.bias is not None:
            out.bias.copy_(self.bias)
        return out

    def extra_repr(self) -> str:
        splits, tasks, up, rank = *self.mix.shape, self.down.shape[1]
        return f"tower={self.tower}, rank={rank}, tasks={tasks}, up={up}, splits={splits}"


@dataclass(frozen=True)
class AdapterConfig:
    """Hyperparameters of the adapters; see `MTLLoRALinear`.

    targets: logical places to adapt, as patterns `TOWER.ROLE` or `TOWER.BLOCKS.ROLE`, where each part may hold shell
        wildcards, BLOCKS may be a range "2-5", and a single role stands for both towers: "attn.qkv",
        "image.attn.*", "text.4-11.mlp.in", "projector". Roles: attn.qkv, attn.out, mlp.in, mlp.out, projector.
    """

    rank: int = 8
    alpha: float = 16.0
    num_up: int = 3
    temperature: float = 0.5
    dropout: float = 0.0
    transform: str = "full"
    targets: Sequence[str] = ("*",)


@dataclass
class AdapterSummary:
    """What `inject` did: per tower the modules matched and the trainable parameters, and each layer by logical name."""

    config: AdapterConfig = field(default_factory=AdapterConfig)
    modules: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    layers: dict[str, MTLLoRALinear] = field(default_factory=dict)

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

    The outputs stay what they were until the first optimizer step. `needs`: the capabilities that will be used, all
    where None; a layer that none of them reads would never learn and is no place.

    Raises:
        UserError: a target that matches nothing, or a value that the layer refuses.
    """
    if any(isinstance(module, MTLLoRALinear) for module in backbone.modules()):
        raise UserError("the backbone already has adapters: load it again to inject others")
    freeze(backbone)
    places = backbone.places(backbone.capabilities if needs is None else needs)
    chosen: list[Place] = []
    for target in config.targets:
        matched = [place for place in places if _matches(target, place)]
        if not matched:
            names = sorted({f"{p.tower}.{p.role}" if p.block >= 0 else p.role for p in places})
            raise UserError(f"adapter.targets: {target!r} matches nothing; this backbone has {', '.join(names)} "
                            f"in blocks 0-{max(p.block for p in places)}", near=(target, names))
        chosen += [place for place in matched if place not in chosen]
    backbone.router = router
    router.towers = frozenset(backbone.towers)
    zero = dict.fromkeys(backbone.towers, 0)
    summary = AdapterSummary(config=config, modules=dict(zero), parameters=dict(zero))
    for place in chosen:
        layer = MTLLoRALinear(
            getattr(place.parent, place.attribute), router, tower=place.tower, rank=config.rank, alpha=config.alpha,
            num_tasks=len(router.task_names), num_up=config.num_up, temperature=config.temperature,
            dropout=config.dropout, splits=place.splits, transform=config.transform)
        layer.name = place.name
        layer.train(backbone.training)
        setattr(place.parent, place.attribute, layer)
        summary.layers[place.name] = layer
        summary.modules[place.tower] += 1
        summary.parameters[place.tower] += sum(p.numel() for p in adapter_parameters(layer).values())
    return summary


def _matches(target: str, place: Place) -> bool:
    """Anchored at both ends: a pattern for one tower never leaks into the other."""
    if place.block < 0:
        return fnmatch.fnmatchcase(place.role, target) or fnmatch.fnmatchcase(f"{place.tower}.{place.role}", target)
    if fnmatch.fnmatchcase(place.role, target) or fnmatch.fnmatchcase(f"{place.tower}.{place.role}", target):
        return True
    tower, _, rest = target.partition(".")
    blocks, _, role = rest.partition(".")
    if not fnmatch.fnmatchcase(place.tower, tower) or not fnmatch.fnmatchcase(place.role, role):
        return False
    first, _, last = blocks.partition("-")
    if first.isdigit() and (not last or last.isdigit()):
        return int(first) <= place.block <= int(last or first)
    return fnmatch.fnmatchcase(str(place.block), blocks)


def freeze(module: nn.Module) -> None:
    """No parameter of the module takes a gradient."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def adapter_parameters(layer: MTLLoRALinear) -> dict[str, nn.Parameter]:
    """The trainable parameters of one layer, by name."""
    return {name: getattr(layer, name) for name in ("down", "transform", "up", "mix")}
