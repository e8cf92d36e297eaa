"""The MTL-LoRA layer.

Formula, for a row of task t (arXiv 2410.09437, eq. 5 and 6):

    h = W x + (alpha / r) * sum_i softmax(w_t / tau)_i  B_i  Lambda_t  A  x

Shape letters: S adapted output slices, T tasks, N up-projections, R rank, I in, O out, C columns of a slice.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vl_mtl_lora.errors import UserError
from vl_mtl_lora.ops import Mixed, mixed, mixture, routed_linear
from vl_mtl_lora.routing import Blocks, Route, TaskRouter

TRANSFORMS = ("full", "diagonal", "none", "own")
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
        transform: "full" (r x r) or "diagonal"; "none": the identity, not trained; "own": not trained either, and each
            task's own r rows of A and columns of B, R being T * r: one plain LoRA per task.

    Raises:
        UserError: a value out of its range.
    """

    library_names = {"base.weight": "weight", "base.bias": "bias", **dict.fromkeys(ADAPTER_PARAMETERS)}
    folds = True  # whether a task's update is a low-rank product

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
        self.make_parameters(adapted, num_tasks, num_up, base.out_features // splits, transform, like)

    def make_parameters(self, slices: int, tasks: int, num_up: int, columns: int, transform: str, like: dict) -> None:
        """Registers S, T, N and C's parameters, with values to start from. like: their device and dtype."""
        width = self.rank * (tasks if transform == "own" else 1)
        if transform == "full":
            start = torch.eye(self.rank, **like).expand(tasks, -1, -1)
        elif transform == "own":
            start = torch.eye(tasks, **like).repeat_interleave(self.rank, dim=1)
        else:
            start = torch.ones(tasks, self.rank, **like)
        self.down = kaiming(torch.empty(slices, width, self.base.in_features, **like))
        self.transform = nn.Parameter(start.repeat(slices, *[1] * start.dim()),
                                      requires_grad=transform in ("full", "diagonal"))
        self.up = nn.Parameter(torch.zeros(slices, num_up, width, columns, **like))
        self.mix = kaiming(torch.empty(slices, tasks, num_up, **like))

    @staticmethod
    def sizes(tasks: int, rank: int, num_up: int, transform: str) -> dict[str, tuple[int, ...]]:
        """What follows the number of slices in the shape of each parameter, before the layer's own sizes."""
        width = rank * (tasks if transform == "own" else 1)
        return {"down": (width,), "transform": (tasks, width), "up": (num_up, width), "mix": (tasks, num_up)}

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, Lambda, B and w as the formula reads them, differentiable by the parameters that they are made of."""
        return self.down, self.transform, self.up, self.mix

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
        return self.adapted(x, route)

    def adapted(self, x: Tensor, route: Route) -> Tensor:
        """`forward` under a route that fits the rows."""
        base = self.base
        if not self.plain:
            return base(x) + self.product(x, route, None, None)
        return self.product(x, route, base.weight, base.bias)

    def product(self, x: Tensor, route: Route, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """`ops.routed_linear` of the layer's factors."""
        low = self.dropout(x) if self.training and self.dropout.p else None
        down, transform, up, mix = self.factors()
        blocks = route.blocks(x.device, x.shape[0], math.prod(x.shape[1:-1]), down.shape[1])
        shared = mix is self.mix and transform is self.transform and not torch.compiler.is_compiling()
        return routed_linear(x, weight, bias, down, transform, up, mix, blocks, low=low, temperature=self.temperature,
                             scale=self.scale, slices=self.slices, out=self.out_features,
                             get_mixed=partial(self._mixed, blocks) if shared else None)

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
        """The task's exact plain-LoRA factors A' (S, R, I) and B' (S, R, C): delta = (x A'^T) B' per slice.

        Raises:
            UserError: the layer's update is no such product.
        """
        if not self.folds:
            raise UserError(f"{self.name}: what {type(self).__name__} learns is no low-rank product; --format merged "
                            "writes it")
        return self._folded(task_index)

    def _folded(self, task_index: int) -> tuple[Tensor, Tensor]:
        down, transform, up, mix = self.factors()
        weights = mixture(mix[:, task_index], self.temperature, self.scale)
        mixed = torch.einsum("sn,snrc->src", weights, up.to(weights.dtype))
        matrix = transform[:, task_index].to(weights.dtype)
        up = matrix.unsqueeze(-1) * mixed if matrix.dim() == 2 else matrix.transpose(-1, -2) @ mixed
        return down.detach().clone(), up

    @torch.no_grad()
    def updated(self, task_index: int) -> Tensor:
        """The weight (O, I) that one task computes with, in float64."""
        down, up = self._folded(task_index)
        weight = self.weight.to(torch.float64, copy=True)
        parts = weight.view(-1, up.shape[-1], self.in_features)  # (splits, C, I)
        parts[list(self.slices)] += torch.einsum("sri,sro->soi", down.double(), up.double())
        return weight

    @torch.no_grad()
    def merged(self, task_index: int) -> nn.Linear:
        """A plain linear layer that computes what this one does for one task, in the base's dtype.

        Raises:
            UserError: the base is quantised.
        """
        if not self.plain:
            raise UserError(f"{self.name}: a {type(self.base.weight).__name__} cannot be merged into; --format peft "
                            "writes the task without the base")
        out = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None,
                        device=self.weight.device, dtype=self.weight.dtype)
        out.weight.copy_(self.updated(task_index).to(self.weight.dtype))
        if self.bias is not None:
            out.bias.copy_(self.bias)
        return out

    def operations(self, rows: int, to_input: bool) -> tuple[int, int]:
        """Floating-point operations of the adapter for so many tokens, forward and backward, the frozen layer's left
        out. to_input: whether the input gets a gradient."""
        down, transform, up, _ = self.factors()
        (slices, rank, width), columns = down.shape, up.shape[-1]
        first, last = 2 * rows * slices * rank * width, 2 * rows * slices * rank * columns
        middle = 2 * rows * slices * rank * (rank if transform.dim() == 4 else 1)
        return first + middle + last, first * (1 + to_input) + 3 * middle + 2 * last

    def extra_repr(self) -> str:
        _, tasks, up, rank = *self.mix.shape, self.down.shape[1]
        return f"tower={self.tower}, rank={rank}, tasks={tasks}, up={up}, slices={self.slices}"


def _version(*tensors: Tensor) -> int:
    """A number that changes when one of the tensors is changed in place."""
    return 0 if tensors[0].is_inference() else sum([tensor._version for tensor in tensors])


def kaiming(tensor: Tensor) -> nn.Parameter:
    """(S, ...): each slice drawn as `nn.Linear` draws its weight, here in place."""
    for part in tensor:
        nn.init.kaiming_uniform_(part, a=math.sqrt(5))
    return nn.Parameter(tensor)
