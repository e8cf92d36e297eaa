"""Re-expresses fused attention (`nn.MultiheadAttention`) with plain `nn.Linear`, sharing the weights.

`nn.MultiheadAttention` keeps q, k, v in one parameter and never calls its `out_proj`, so a layer put there would train
nothing. `SplitAttention` (self-attention) and `CrossAttention` compute the same function through linear layers that can
be replaced. Both can read keys and values of earlier tokens from a `KeyValueCache`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vl_mtl_lora.errors import UserError


class KeyValueCache:
    """Keys and values that the attention layers of a decoder have seen; shared by them, empty and idle until `open`."""

    def __init__(self):
        self._parts: dict[int, tuple[Tensor, Tensor]] | None = None

    @contextmanager
    def open(self) -> Iterator["KeyValueCache"]:
        """Inside, every call of a layer remembers; afterwards all is forgotten."""
        self._parts = {}
        try:
            yield self
        finally:
            self._parts = None

    @property
    def filled(self) -> bool:
        return bool(self._parts)

    def extend(self, layer: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New (B, heads, L, width) keys and values after the layer's earlier ones."""
        if self._parts is None:
            return k, v
        if id(layer) in self._parts:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(self._parts[id(layer)], (k, v)))
        self._parts[id(layer)] = k, v
        return k, v

    def recall(self, layer: nn.Module) -> tuple[Tensor, Tensor] | None:
        """What the layer kept, for one whose keys do not change from token to token."""
        return None if self._parts is None else self._parts.get(id(layer))

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        self._parts = {layer: (k[rows], v[rows]) for layer, (k, v) in self._parts.items()}


class SplitAttention(nn.Module):
    """Multi-head self-attention over (B, L, D), rows first, called like the `nn.MultiheadAttention` it replaces."""

    library_names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}

    def __init__(self, source: nn.MultiheadAttention):
        super().__init__()
        self.num_heads = source.num_heads
        self.dropout = source.dropout
        self.cache: KeyValueCache | None = None
        # The very same Parameter objects: nothing is copied, and whoever holds them sees them change.
        self.qkv = _linear(source.in_proj_weight, source.in_proj_bias)
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.train(source.training)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False,
                attn_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """(B, L, D) thrice the same tensor; the mask as `attend` takes it."""
        if query is not key or key is not value or need_weights:
            raise RuntimeError("SplitAttention is self-attention without attention weights")
        q, k, v = self.qkv(query).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.cache is not None:
            k, v = self.cache.extend(self, k, v)
        return self.out_proj(attend(q, k, v, attn_mask, self.dropout if self.training else 0.0)), None


class CrossAttention(nn.Module):
    """Multi-head attention of (B, L, D) on another (B, S, D'), called like the `nn.MultiheadAttention` it replaces."""

    def __init__(self, source: nn.MultiheadAttention):
        super().__init__()
        self.num_heads = source.num_heads
        self.dropout = source.dropout
        self.cache: KeyValueCache | None = None
        packed = source.in_proj_weight is not None
        weights = source.in_proj_weight.chunk(3) if packed else (
            source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        # Parts of the packed parameter become parameters that share its memory.
        self.q, self.k, self.v = (_linear(weight, bias) for weight, bias in zip(weights, biases))
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.library_names = {f"{part}.bias": "in_proj_bias" for part in "qkv"} | {
            f"{part}.weight": "in_proj_weight" if packed else f"{part}_proj_weight" for part in "qkv"}
        self.train(source.training)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False,
                attn_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """(B, L, D) queries, (B, S, D') what is read, the same for every query; the mask as `attend` takes it."""
        if need_weights:
            raise RuntimeError("CrossAttention gives no attention weights")
        kept = None if self.cache is None else self.cache.recall(self)
        q = self._heads(self.q(query))
        k, v = kept or (self._heads(self.k(key)), self._heads(self.v(value)))
        if self.cache is not None and kept is None:
            self.cache.extend(self, k, v)
        return self.out_proj(attend(q, k, v, attn_mask, self.dropout if self.training else 0.0)), None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """(B, heads, L, width), and S keys -> (B, L, heads * width).

    mask: (L, S), (B * heads, L, S) or (B, 1, L, S), additive or boolean (True = masked), as `nn.MultiheadAttention`.
    """
    if mask is not None:
        if mask.dim() == 3:
            mask = mask.unflatten(0, (len(q), -1))
        mask = mask.to(q.dtype) if mask.dtype.is_floating_point else ~mask
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)
    return layer


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def split_attention(source: nn.Module, where: str, cross: bool = False) -> SplitAttention | CrossAttention:
    """Returns the equivalent of `source` with linear layers that hold its own parameters.

    cross: whether queries come from elsewhere than keys and values.

    Raises:
        UserError: `source` is no plain attention; `where` says which one.
    """
    if isinstance(source, SplitAttention | CrossAttention):  # an earlier call has done it
        return source
    if type(source) is not nn.MultiheadAttention:
        raise UserError(f"{where}: {type(source).__name__} cannot be adapted; expected nn.MultiheadAttention")
    if (source.in_proj_weight is None and not cross) or source.bias_k is not None or source.add_zero_attn:
        raise UserError(f"{where}: attention with separate key or value widths, bias_k or add_zero_attn "
                        "cannot be adapted")
    return CrossAttention(source) if cross else SplitAttention(source)
