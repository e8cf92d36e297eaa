"""The routed low-rank product with its own backward: the hot path, nothing else.

Shape letters: B rows, M = B x (tokens per row), I in, O out, S adapted slices of the output, C columns of a slice,
R rank, T tasks, N up-projections, K blocks of rows, each of one task.

The up-projections are mixed per block before they touch a token, so that the work per token is that of a plain LoRA
whatever T and N are.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vl_mtl_lora.routing import Blocks, Segment


def mixture(mix: Tensor, temperature: float, scale: float) -> Tensor:
    """(..., N) logits w -> scale * softmax(w / tau), in float32 or wider."""
    return F.softmax(mix.to(torch.promote_types(mix.dtype, torch.float32)) / temperature, dim=-1) * scale


class Mixed(NamedTuple):
    """What the parameters of K blocks' tasks come to before a token is seen.

    weights: (S, K, N), of the up-projections. matrix: (S*K, R, R) or (S*K, R), Lambda. slope: (S*K, N, N), of the
    weights by their logits. member: (T, K), 1 where a block is of a task, else 0.
    """

    weights: Tensor
    matrix: Tensor
    slope: Tensor
    member: Tensor


def mixed(transforms: Sequence[Tensor], mixes: Sequence[Tensor], tasks: Tensor, temperature: float,
          scale: float) -> list[Mixed]:
    """What each layer's `transform` and `mix` come to for blocks of these tasks.

    Of many layers at once it takes far less time: right after a large matrix product, a small operation finds the
    caches cold and takes ten times as long as after another small one.
    """
    weights = mixture(torch.cat(list(mixes)).index_select(1, tasks), temperature, scale)
    # Of a softmax p(w / tau): dp_i / dw_j = p_i (1[i = j] - p_j) / tau.
    slope = (torch.diag_embed(weights) - weights.unsqueeze(-1) * weights.unsqueeze(-2) / scale) / temperature
    member = torch.arange(mixes[0].shape[1], device=tasks.device).unsqueeze(1).eq(tasks).to(weights.dtype)
    counts = [len(mix) for mix in mixes]
    return [Mixed(w, transform.index_select(1, tasks).flatten(0, 1), s.flatten(0, 1), member)
            for w, transform, s in zip(weights.split(counts), transforms, slope.split(counts))]


def routed_linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, down: Tensor, transform: Tensor, up: Tensor,
                  mix: Tensor, blocks: Blocks, *, temperature: float, scale: float, low: Tensor | None = None,
                  slices: Sequence[int] = (0,), out: int, get_mixed: Callable[[], Mixed] | None = None) -> Tensor:
    """The frozen linear layer plus each row's low-rank update (arXiv 2410.09437, eq. 5 and 6).

    Args:
        x: (B, ..., I) input.
        weight, bias: (O, I) and (O,), frozen: no gradient is computed for them; None: the update alone.
        down: (S, R, I), A. transform: (S, T, R, R), or (S, T, R) where diagonal, Lambda. up: (S, N, R, C), B
            transposed. mix: (S, T, N), w.
        blocks: of the rows of x, see `Route.blocks`.
        temperature: tau. scale: alpha / r.
        low: (B, ..., I), what `down` reads instead of x (x after dropout).
        slices: which slices of C output columns are adapted. out: O.
        get_mixed: returns `mixed` of this layer, for one who has it at hand; asked again in the backward pass, so that
            nothing but x and z = low down^T is kept for it.

    Returns:
        (B, ..., O), x weight^T + bias + scale * low down^T transform_t^T sum_n softmax(mix_t / tau)_n up_n per slice,
        where t is the task of the row. It can be differentiated once.
    """
    options = blocks.tasks, blocks.segments, temperature, scale, slices, out, get_mixed
    if not torch.is_autocast_enabled(x.device.type):
        return _apply(x, low, weight, bias, down, transform, up, mix, *options)
    dtype = torch.get_autocast_dtype(x.device.type)
    x, weight, bias, low = (None if t is None else t.to(dtype) for t in (x, weight, bias, low))
    with torch.autocast(x.device.type, enabled=False):
        return _apply(x, low, weight, bias, down, transform, up, mix, *options)


def _apply(*args):
    return _RoutedLinear.apply(*args) if torch.is_grad_enabled() else _forward(*args)[0]


def _forward(x, low, weight, bias, down, transform, up, mix, tasks, segments, temperature, scale, slices, out,
             get_mixed):
    """-> y (B, ..., O), what `down` reads (M, I), z (M, S*R)."""
    width, columns, count = down.shape[2], up.shape[3], len(tasks)
    weights, matrix, _, _ = get_mixed() if get_mixed else mixed([transform], [mix], tasks, temperature, scale)[0]
    factor, matrix = _factor(up, weights, x.dtype), matrix.to(x.dtype)
    rows = (x if low is None else low).reshape(-1, width)
    z = F.linear(rows, down.view(-1, width).to(x.dtype))
    y = x.new_zeros(*x.shape[:-1], out) if weight is None else F.linear(x, weight, bias)
    flat = y.view(-1, out)
    for s, place in enumerate(slices):
        for segment in segments:
            z_part, matrix_part, factor_part = _parts(segment, s, count, z, matrix, factor)
            y_part = _tokens(flat, segment, place, columns)
            y_part.baddbmm_(_times(z_part, matrix_part, transposed=True), factor_part)
    return y, rows, z


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, weight, bias, down, transform, up, mix, tasks, segments, *options):
        y, rows, z = _forward(x, low, weight, bias, down, transform, up, mix, tasks, segments, *options)
        ctx.save_for_backward(rows, weight, down, transform, up, mix, z, tasks)
        ctx.options = segments, *options, x.shape, low is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, weight, down, transform, up, mix, z, tasks = ctx.saved_tensors
        segments, temperature, scale, slices, out, get_mixed, shape, dropped = ctx.options
        (splits, rank, width), columns, count = down.shape, up.shape[3], len(tasks)
        weights, matrix, slope, member = (get_mixed() if get_mixed
                                          else mixed([transform], [mix], tasks, temperature, scale)[0])
        dy = dy.reshape(-1, out)
        factor, matrix = _factor(up, weights, dy.dtype), matrix.to(dy.dtype)
        dz, d_matrix, d_factor = torch.empty_like(z), torch.empty_like(matrix), torch.empty_like(factor)
        for s, place in enumerate(slices):
            for segment in segments:
                z_part, matrix_part, factor_part = _parts(segment, s, count, z, matrix, factor)
                dz_part, d_matrix_part, d_factor_part = _parts(segment, s, count, dz, d_matrix, d_factor)
                dy_part = _tokens(dy, segment, place, columns)
                d_transformed = torch.bmm(dy_part, factor_part.transpose(1, 2))  # (K, L, R)
                transformed = _times(z_part, matrix_part, transposed=True)
                torch.bmm(transformed.transpose(1, 2), dy_part, out=d_factor_part)
                if matrix.dim() == 2:
                    torch.sum(d_transformed * z_part, dim=1, out=d_matrix_part)
                else:
                    torch.bmm(d_transformed.transpose(1, 2), z_part, out=d_matrix_part)
                dz_part.copy_(_times(d_transformed, matrix_part, transposed=False))
        flat_down = down.view(-1, width).to(dz.dtype)
        dx = d_low = None
        if ctx.needs_input_grad[0]:
            dx = dy.new_zeros(rows.shape) if weight is None else dy @ weight
            if not dropped:
                dx.addmm_(dz, flat_down)
            dx = dx.view(shape)
        if ctx.needs_input_grad[1]:
            d_low = (dz @ flat_down).view(shape)
        chunks = math.gcd(len(rows), 4)  # of a long sum, which processor cores share
        d_down = torch.bmm(dz.view(chunks, len(rows) // chunks, splits * rank).transpose(1, 2),
                           rows.view(chunks, len(rows) // chunks, width))
        d_down = d_down.sum(dim=0, dtype=down.dtype).view_as(down)
        d_factor = d_factor.view(splits, count, rank * columns).to(weights.dtype)  # (S, K, R*C)
        d_up = torch.bmm(weights.transpose(1, 2), d_factor).view_as(up).to(up.dtype)
        d_weights = torch.bmm(d_factor, up.flatten(2).to(weights.dtype).transpose(1, 2))
        d_logits = torch.bmm(d_weights.view(splits * count, 1, weights.shape[2]), slope).view_as(weights)
        # From blocks to their tasks.
        member = member.expand(splits, *member.shape)
        d_mix = torch.bmm(member, d_logits).to(mix.dtype)
        d_matrix = d_matrix.view(splits, count, matrix.shape[1:].numel()).to(member.dtype)
        d_transform = torch.bmm(member, d_matrix).view_as(transform).to(transform.dtype)
        return dx, d_low, None, None, d_down, d_transform, d_up, d_mix, *[None] * 7


def _parts(segment: Segment, s: int, blocks: int, z: Tensor, matrix: Tensor,
           factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What of z (M, S*R), matrix (S*K, R, R) and factor (S*K, R, C) is of slice s and the segment's k blocks.

    Returns:
        (k, L, R), (k, R, R), (k, R, C); views.
    """
    first = s * blocks + segment.first
    return (_tokens(z, segment, s, factor.shape[1]), _part(matrix, first, first + segment.count),
            _part(factor, first, first + segment.count))


def _tokens(x: Tensor, segment: Segment, s: int, width: int) -> Tensor:
    """(M, S*W) -> the segment's k blocks of L tokens and slice s of the columns, (k, L, W)."""
    x = _part(x, segment.start, segment.stop)
    x = x if x.shape[1] == width else x[:, s * width:(s + 1) * width]
    return x.view(segment.count, -1, width)


def _part(x: Tensor, start: int, stop: int) -> Tensor:
    """Some rows of x; x itself where that is all, since a view takes time too."""
    return x if stop - start == len(x) else x[start:stop]


def _factor(up: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, N, R, C) up-projections, mixed by (S, K, N) -> (S*K, R, C)."""
    splits, count, rank, columns = up.shape
    return torch.bmm(weights, up.view(splits, count, -1).to(weights.dtype)).view(-1, rank, columns).to(dtype)


def _times(z: Tensor, matrix: Tensor, transposed: bool) -> Tensor:
    """(K, L, R) times the matrix (K, R, R), or diagonal (K, R), of each block."""
    if matrix.dim() == 2:
        return z * matrix.unsqueeze(1)
    return torch.bmm(z, matrix.transpose(1, 2) if transposed else matrix)
