"""The routed low-rank product with its own backward: the hot path, nothing else.

Shape letters: B rows, M = B x (tokens per row), I in, O out, S adapted slices of the output, C columns of a slice,
R rank, T tasks, N up-projections, K blocks of rows, each of one task.

The up-projections are mixed per block before they touch a token, so that the work per token is that of a plain LoRA
whatever T and N are.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vl_mtl_lora.routing import Route


def mixture(mix: Tensor, temperature: float, scale: float) -> Tensor:
    """(..., N) logits w -> scale * softmax(w / tau), in float32 or wider."""
    return F.softmax(mix.to(torch.promote_types(mix.dtype, torch.float32)) / temperature, dim=-1) * scale


def routed_linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, down: Tensor, transform: Tensor, up: Tensor,
                  mix: Tensor, route: Route, *, temperature: float, scale: float, low: Tensor | None = None,
                  slices: Sequence[int] = (0,), out: int) -> Tensor:
    """The frozen linear layer plus each row's low-rank update (arXiv 2410.09437, eq. 5 and 6).

    Args:
        x: (B, ..., I) input.
        weight, bias: (O, I) and (O,), frozen: no gradient is computed for them; None: the update alone.
        down: (S, R, I), A. transform: (S, T, R, R), or (S, T, R) where diagonal, Lambda. up: (S, N, R, C), B
            transposed. mix: (S, T, N), w.
        route: the tasks of the B rows.
        temperature: tau. scale: alpha / r.
        low: (B, ..., I), what `down` reads instead of x (x after dropout).
        slices: which slices of C output columns are adapted. out: O.

    Returns:
        (B, ..., O), x weight^T + bias + scale * low down^T transform_t^T sum_n softmax(mix_t / tau)_n up_n per slice,
        where t is the task of the row. It can be differentiated once.
    """
    device = x.device
    tasks, segments = route.blocks(device, x.shape[0], math.prod(x.shape[1:-1]), rank=down.shape[1])
    options = tasks, segments, temperature, scale, slices, out
    if not torch.is_autocast_enabled(device.type):
        return _RoutedLinear.apply(x, low, weight, bias, down, transform, up, mix, *options)
    dtype = torch.get_autocast_dtype(device.type)
    x, weight, bias, low = (None if t is None else t.to(dtype) for t in (x, weight, bias, low))
    with torch.autocast(device.type, enabled=False):
        return _RoutedLinear.apply(x, low, weight, bias, down, transform, up, mix, *options)


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, weight, bias, down, transform, up, mix, tasks, segments, temperature, scale, slices, out):
        y = x.new_zeros(*x.shape[:-1], out) if weight is None else F.linear(x, weight, bias)
        splits, rank, width = down.shape
        columns = up.shape[3]
        rows = (x if low is None else low).reshape(-1, width)  # (M, I)
        z = F.linear(rows, down.view(-1, width).to(x.dtype))  # (M, S*R)
        matrix = _of_blocks(transform, tasks, x.dtype)
        weights = mixture(mix.index_select(1, tasks), temperature, scale)  # (S, K, N)
        factor, flat = _factor(up, weights, x.dtype), y.view(-1, out)
        for s, place in enumerate(slices):
            for start, stop, count, block in segments:
                first = s * len(tasks) + block
                z_part = _part(z, start, stop, s * rank, rank).view(count, -1, rank)
                y_part = _part(flat, start, stop, place * columns, columns).view(count, -1, columns)
                transformed = _times(z_part, _part(matrix, first, first + count), transposed=True)
                y_part.baddbmm_(transformed, _part(factor, first, first + count))
        ctx.save_for_backward(rows, weight, down, transform, up, weights, z, tasks)
        ctx.options = segments, temperature, scale, slices, x.shape, low is not None, mix.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, weight, down, transform, up, weights, z, tasks = ctx.saved_tensors
        segments, temperature, scale, slices, shape, dropped, mix_shape = ctx.options
        (splits, rank, width), columns = down.shape, up.shape[3]
        dy = dy.reshape(-1, dy.shape[-1])
        dx = d_low = None
        if ctx.needs_input_grad[0]:  # first: the large product hides the time it takes to fetch dy
            dx = dy.new_zeros(rows.shape) if weight is None else dy @ weight
        factor, matrix = _factor(up, weights, dy.dtype), _of_blocks(transform, tasks, dy.dtype)
        dz, d_matrix, d_factor = torch.empty_like(z), torch.empty_like(matrix), torch.empty_like(factor)
        for s, place in enumerate(slices):
            for start, stop, count, block in segments:
                first = s * len(tasks) + block
                blocks = first, first + count
                z_part = _part(z, start, stop, s * rank, rank).view(count, -1, rank)
                dy_part = _part(dy, start, stop, place * columns, columns).view(count, -1, columns)
                matrix_part = _part(matrix, *blocks)
                d_transformed = torch.bmm(dy_part, _part(factor, *blocks).transpose(1, 2))  # (K, L, R)
                transformed = _times(z_part, matrix_part, transposed=True)
                torch.bmm(transformed.transpose(1, 2), dy_part, out=_part(d_factor, *blocks))
                if matrix.dim() == 2:
                    torch.sum(d_transformed * z_part, dim=1, out=_part(d_matrix, *blocks))
                else:
                    torch.bmm(d_transformed.transpose(1, 2), z_part, out=_part(d_matrix, *blocks))
                _part(dz, start, stop, s * rank, rank).view(count, -1, rank).copy_(
                    _times(d_transformed, matrix_part, transposed=False))
        flat_down = down.view(-1, width).to(dz.dtype)
        if dx is not None:
            if not dropped:
                dx.addmm_(dz, flat_down)
            dx = dx.view(shape)
        if ctx.needs_input_grad[1]:
            d_low = (dz @ flat_down).view(shape)
        d_down = (dz.T @ rows).view_as(down).to(down.dtype)
        d_factor = d_factor.view(splits, len(tasks), rank * columns).to(weights.dtype)  # (S, K, R*C)
        d_up = torch.bmm(weights.transpose(1, 2), d_factor).view_as(up).to(up.dtype)
        # Of the softmax: its gradient g becomes p (g - sum_i p_i g_i).
        d_weights = torch.bmm(d_factor, up.flatten(2).to(weights.dtype).transpose(1, 2)).mul_(weights)
        d_weights.addcmul_(weights, d_weights.sum(dim=2, keepdim=True), value=-1 / scale)
        d_mix = up.new_zeros(mix_shape).index_add_(1, tasks, d_weights.to(up.dtype), alpha=1 / temperature)
        d_matrix = d_matrix.unflatten(0, (splits, -1)).to(up.dtype)
        d_transform = torch.zeros_like(transform).index_add_(1, tasks, d_matrix)
        return dx, d_low, None, None, d_down, d_transform, d_up, d_mix, None, None, None, None, None, None


def _part(x: Tensor, start: int, stop: int, column: int = 0, width: int | None = None) -> Tensor:
    """Some rows of x, and columns if a width is given; x itself where that is all, since views take time too."""
    if stop - start < len(x):
        x = x[start:stop]
    return x if width is None or width == x.shape[1] else x[:, column:column + width]


def _of_blocks(transform: Tensor, tasks: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, T, R, R) or (S, T, R) -> those of the K blocks, (S*K, R, R) or (S*K, R)."""
    return transform.index_select(1, tasks).flatten(0, 1).to(dtype)


def _factor(up: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, N, R, C) up-projections, mixed by (S, K, N) -> (S*K, R, C)."""
    splits, count, rank, columns = up.shape
    return torch.bmm(weights, up.view(splits, count, -1).to(weights.dtype)).view(-1, rank, columns).to(dtype)


def _times(z: Tensor, matrix: Tensor, transposed: bool) -> Tensor:
    """(K, L, R) times the matrix (K, R, R), or diagonal (K, R), of each block."""
    if matrix.dim() == 2:
        return z * matrix.unsqueeze(1)
    return torch.bmm(z, matrix.transpose(1, 2) if transposed else matrix)
