"""The MTL-LoRA layer, and putting it into a backbone.

Formula, for a row of task t (arXiv 2410.09437, eq. 5 and 6):

    h = W x + (alpha / r) * sum_i softmax(w_t / tau)_i  B_i  Lambda_t  A  x

Shape letters: S adapted output slices, T tasks, N up-projections, R rank, I in, O out, C columns of a slice.
"""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from vl_mtl_lora.backbones.base import Backbone, Place
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.ops import Mixed, mixed, mixture, routed_linear
from vl_mtl_lora.routing import Blocks, TaskRouter
from vl_mtl_lora.targets import matched_slices

TRANSFORMS = ("full", "diagonal")
ADAPTER_PARAMETERS = ("down", "transform", "up", "mix")


class MTLLoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update per task.

    Parameters, stacked over tasks, with the paper's names:
        down (S, R, I): A, shared by all tasks, Kaiming-uniform.
        transform (S, T, R, R), or (S, T, R) where diagonal: Lambda, per task, the identity at start.
        up (S, N, R, C): B transposed, N of them, shared, zero at start: a fresh layer equals the frozen one.
        mix (S, T, N): w, per task, whose softmax weighs the up-projections.

    Args:
        base: the frozen layer; shared, not copied.
        router: tells each row's task; shared by all layers of a model.
        tower: the tower whose rows the layer sees.
        rank, alpha: r and alpha of the formula; the update is scaled by alpha / rank.
        num_tasks: T. num_up: N. temperature: tau.
        dropout: probability, on what A reads.
        splits: output slices with adapters of their own (3 for a fused qkv); C is O / splits.
        slices: those of them that are adapted, all where None.
        transform: "full" (r x r) or "diagonal".

    Raises:
        UserError: a value out of its range.
    """

    library_names = {"base.weight": "weight", "base.bias": "bias", **dict.fromkeys(ADAPTER_PARAMETERS)}

    def __init__(self, base: nn.Linear, router: TaskRouter, *, tower: str, rank: int, alpha: float, num_tasks: int,
                 num_up: int = 3, temperature: float = 0.5, dropout: float = 0.0, splits: int = 1,
                 transform: str = "full", slices: Sequence[int] | None = None):
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
        self.slices = tuple(range(splits) if slices is None else slices)
        if not self.slices or not set(self.slices) <= set(range(splits)):
            raise UserError(f"slices must be some of 0..{splits - 1}, got {list(self.slices)}")
        self.base = base
        self.router = router
        self.tower = tower
        self.peers = [self]  # those of its tower, set by inject: they compute small things for one another
        self.name = ""  # the logical name, set by inject, for messages
        self.rank = rank
        self.scale = alpha / rank
        self.temperature = temperature
        self.dropout = nn.Dropout(dropout)
        # A quantised layer, or one whose weight is spread over devices, computes its own product.
        self.plain = type(base) is nn.Linear and type(base.weight) is nn.Parameter
        # Adapters of a half-precision base stay in float32: their updates would be lost in rounding.
        dtype = base.weight.dtype if base.weight.dtype == torch.float64 else torch.float32
        like = {"device": base.weight.device, "dtype": dtype}
        adapted = len(self.slices)
        self.down = nn.Parameter(torch.empty(adapted, rank, base.in_features, **like))
        eye = torch.eye(rank, **like) if transform == "full" else torch.ones(rank, **like)
        self.transform = nn.Parameter(eye.repeat(adapted, num_tasks, *[1] * eye.dim()))
        self.up = nn.Parameter(torch.zeros(adapted, num_up, rank, base.out_features // splits, **like))
        self.mix = nn.Parameter(torch.empty(adapted, num_tasks, num_up, **like))
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
        base = self.base
        weight, bias = (base.weight, base.bias) if self.plain else (None, None)
        blocks = route.blocks(x.device, x.shape[0], math.prod(x.shape[1:-1]), self.rank)
        y = routed_linear(x, weight, bias, self.down, self.transform, self.up, self.mix, blocks, low=low,
                          temperature=self.temperature, scale=self.scale, slices=self.slices, out=base.out_features,
                          get_mixed=None if torch.compiler.is_compiling() else partial(self._mixed, blocks))
        return y if self.plain else base(x) + y

    def _mixed(self, blocks: Blocks) -> Mixed:
        """What an earlier layer of this pass has computed for this one; else computes it for all that will ask."""
        mix, transform = self.mix, self.transform
        value, version = blocks.waiting.pop(self, (None, None))
        if version != _version(mix, transform):
            # Not those on another device, or sharded at the moment.
            peers = {peer: (peer.mix, peer.transform) for peer in self.peers if type(peer.mix) is type(mix)
                     and peer.mix.device == mix.device and peer.mix.dtype == mix.dtype}
            mixes, transforms = zip(*peers.values())
            values = mixed(transforms, mixes, blocks.tasks, self.temperature, self.scale)
            blocks.waiting.update(zip(peers, zip(values, map(_version, mixes, transforms))))
            value, _ = blocks.waiting.pop(self)
        return value

    @torch.no_grad()
    def fold(self, task_index: int) -> tuple[Tensor, Tensor]:
        """The task's exact plain-LoRA factors A' (S, R, I) and B' (S, R, C): delta = (x A'^T) B' per slice."""
        weights = mixture(self.mix[:, task_index], self.temperature, self.scale)
        mixed = torch.einsum("sn,snrc->src", weights, self.up.to(weights.dtype))
        matrix = self.transform[:, task_index].to(weights.dtype)
        up = matrix.unsqueeze(-1) * mixed if matrix.dim() == 2 else matrix.transpose(-1, -2) @ mixed
        return self.down.detach().clone(), up

    @torch.no_grad()
    def merged(self, task_index: int) -> nn.Linear:
        """A plain linear layer that computes what this one does for one task, in the base's dtype.

        Raises:
            UserError: the base is quantised.
        """
        if not self.plain:
            raise UserError(f"{self.name}: a {type(self.base.weight).__name__} cannot be merged into; --format peft "
                            "writes the task without the base")
        down, up = self.fold(task_index)
        delta = torch.zeros(self.out_features, self.in_features, dtype=torch.float64, device=down.device)
        parts = delta.view(-1, up.shape[-1], self.in_features)  # (splits, C, I)
        parts[list(self.slices)] = torch.einsum("sri,sro->soi", down.double(), up.double())
        out = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None,
                        device=self.weight.device, dtype=self.weight.dtype)
        out.weight.copy_((self.weight.double() + delta).to(self.weight.dtype))
        if self.bias is not None:
            out.bias.copy_(self.bias)
        return out

    def extra_repr(self) -> str:
        _, tasks, up, rank = *self.mix.shape, self.down.shape[1]
        return f"tower={self.tower}, rank={rank}, tasks={tasks}, up={up}, slices={self.slices}"


def _version(*tensors: Tensor) -> int:
    """A number that changes when one of the tensors is changed in place."""
    return 0 if tensors[0].is_inference() else sum([tensor._version for tensor in tensors])


@dataclass(frozen=True)
class AdapterConfig:
    """Hyperparameters of the adapters; see `MTLLoRALinear`.

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
    for target in config.targets:
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
        layer = MTLLoRALinear(
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
        summary.parameters[place.tower] += sum(p.numel() for p in adapter_parameters(layer).values())
    for layer in summary.layers.values():
        layer.peers = [other for other in summary.layers.values() if other.tower == layer.tower]
    return summary


def freeze(module: nn.Module) -> None:
    """No parameter of the module takes a gradient."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def adapter_parameters(layer: MTLLoRALinear) -> dict[str, nn.Parameter]:
    """The trainable parameters of one layer, by name."""
    return {name: getattr(layer, name) for name in ADAPTER_PARAMETERS}
