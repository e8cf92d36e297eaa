"""Re-expresses fused attention (`nn.MultiheadAttention`) with plain `nn.Linear`, sharing the weights.

`nn.MultiheadAttention` keeps q, k, v in one parameter and never calls its `out_proj`, so a layer put there would train
nothing. `SplitAttention` computes the same function through two linear layers that can be replaced.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vl_mtl_lora.errors import UserError


class SplitAttention(nn.Module):
    """Multi-head self-attention over (B, L, D), rows first, called like the `nn.MultiheadAttention` it replaces."""

    def __init__(self, source: nn.MultiheadAttention):
        super().__init__()
        width = source.embed_dim
        self.num_heads = source.num_heads
        self.dropout = source.dropout
        # The very same Parameter objects: nothing is copied, and whoever holds them sees them change.
        self.qkv = nn.Linear(width, 3 * width, bias=source.in_proj_bias is not None, device="meta")
        self.qkv.weight, self.qkv.bias = source.in_proj_weight, source.in_proj_bias
        self.out_proj = nn.Linear(width, width, bias=source.out_proj.bias is not None, device="meta")
        self.out_proj.weight, self.out_proj.bias = source.out_proj.weight, source.out_proj.bias
        self.train(source.training)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False,
                attn_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """(B, L, D) thrice the same tensor, mask additive or boolean (True = masked), (L, L) or (B * heads, L, L)."""
        if query is not key or key is not value or need_weights:
            raise RuntimeError("SplitAttention is self-attention without attention weights")
        batch, length, width = query.shape
        qkv = self.qkv(query).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, head width)
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.view(batch, self.num_heads, length, length)
            attn_mask = ~attn_mask if attn_mask.dtype.is_floating_point is False else attn_mask.to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask, self.dropout if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).reshape(batch, length, width)), None


def split_attention(source: nn.Module, where: str) -> SplitAttention:
    """Returns the equivalent of `source` with linear layers `qkv` and `out_proj` that hold its own parameters.

    Raises:
        UserError: `source` is not plain self-attention; `where` says which one.
    """
    if type(source) is not nn.MultiheadAttention:
        raise UserError(f"{where}: {type(source).__name__} cannot be adapted; expected nn.MultiheadAttention")
    if source.in_proj_weight is None or source.bias_k is not None or source.add_zero_attn:
        raise UserError(f"{where}: attention with separate key or value widths, bias_k or add_zero_attn "
                        "cannot be adapted")
    return SplitAttention(source)
