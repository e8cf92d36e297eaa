"""The routed low-rank product with its own backward: the hot path, nothing else.

Shape letters: B rows, M = B x (tokens per row), I in, O out, S adapted slices of the output, C columns of a slice,
R rank, T tasks.

Per-task factors are folded before they touch a token, so the work per token is that of a plain LoRA: one skinny
product with the shared `down`, one with the folded `up` of the row's task, added in place to the frozen output.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vl_mtl_lora.routing import Route


def routed_linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, down: Tensor, up: Tensor, route: Route, *,
                  low: Tensor | None = None, slices: Sequence[int] = (0,), out: int) -> Tensor:
    """The frozen linear layer plus each row's low-rank update.

    Args:
        x: (B, ..., I) input.
        weight, bias: (O, I) and (O,), frozen: no gradient is computed for them; None: the update alone.
        down: (S, R, I), shared by all tasks.
        up: (S, T, R, C), each task's folded factor, scale included; T = 1 where `route` is of one task.
        route: the tasks of the B rows.
        low: (B, ..., I), what `down` reads instead of x (x after dropout).
        slices: which slices of C output columns are adapted. out: O.

    Returns:
        (B, ..., O), x weight^T + bias + (low down^T) up[task of the row], per output slice.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias, low = (None if t is None else t.to(dtype) for t in (x, weight, bias, low))
    down, up = down.to(x.dtype), up.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _RoutedLinear.apply(x, low, weight, bias, down, up, route, tuple(slices), out)


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, weight, bias, down, up, route, slices, out):
        splits, rank, width = down.shape
        y = x.new_zeros(*x.shape[:-1], out) if weight is None else F.linear(x, weight, bias)
        low_rows = (x if low is None else low).reshape(-1, width)  # (M, I)
        z = low_rows @ down.reshape(splits * rank, width).T  # (M, S*R)
        _add_up(y.view(-1, out), z, up, route, slices)
        ctx.save_for_backward(low_rows, weight, down, up, z)
        ctx.route, ctx.slices, ctx.shape, ctx.dropped = route, slices, x.shape, low is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        low_rows, weight, down, up, z = ctx.saved_tensors
        need_x, need_low, *_ = ctx.needs_input_grad
        splits, rank, width = down.shape
        flat_down = down.reshape(splits * rank, width)
        dy = dy.reshape(-1, dy.shape[-1])
        dz, d_up = _up_backward(dy, z, up, ctx.route, ctx.slices)
        d_down = (dz.T @ low_rows).view_as(down)
        dx = d_low = None
        if need_x:
            dx = dy.new_zeros(len(dy), width) if weight is None else dy @ weight
            if not ctx.dropped:
                dx.addmm_(dz, flat_down)
            dx = dx.view(ctx.shape)
        if need_low:
            d_low = (dz @ flat_down).view(ctx.shape)
        return dx, d_low, None, None, d_down, d_up, None, None, None


def _parts(up: Tensor, z: Tensor, y: Tensor, route: Route, slices: tuple[int, ...]):
    """(adapted slice, index into T, z's part, y's part) for every slice and run of rows."""
    _, _, rank, columns = up.shape
    tokens = len(z) // route.num_rows if route.num_rows else len(z)
    runs = ((0, 0, 1),) if route.task is not None else route.runs
    for task, start, stop in runs:
        rows = slice(start * tokens, stop * tokens)
        for s, place in enumerate(slices):
            yield s, task, z[rows, s * rank:(s + 1) * rank], y[rows, place * columns:(place + 1) * columns]


def _add_up(y: Tensor, z: Tensor, up: Tensor, route: Route, slices: tuple[int, ...]) -> None:
    """y (M, O) += z (M, S*R) times each row's factor, in place."""
    if route.task is not None or route.runs is not None:
        for s, task, z_part, y_part in _parts(up, z, y, route, slices):
            y_part.addmm_(z_part, up[s, task])
        return
    splits, _, rank, columns = up.shape
    ids = route.ids_on(y.device)
    z, y = z.view(len(ids), -1, splits, rank), y.view(len(ids), -1, y.shape[-1] // columns, columns)
    for s, place in enumerate(slices):
        y[:, :, place] += torch.bmm(z[:, :, s], up[s].index_select(0, ids))


def _up_backward(dy: Tensor, z: Tensor, up: Tensor, route: Route, slices: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Gradients (M, S*R) of z and (S, T, R, C) of up."""
    splits, _, rank, columns = up.shape
    dz, d_up = torch.empty_like(z), torch.zeros_like(up)
    if route.task is not None or route.runs is not None:
        for s, task, dz_part, dy_part in _parts(up, dz, dy, route, slices):
            torch.mm(dy_part, up[s, task].T, out=dz_part)
        for s, task, z_part, dy_part in _parts(up, z, dy, route, slices):
            d_up[s, task].addmm_(z_part.T, dy_part)  # a task may have several runs
        return dz, d_up
    ids = route.ids_on(dy.device)
    dz_rows, z = dz.view(len(ids), -1, splits, rank), z.view(len(ids), -1, splits, rank)
    dy = dy.view(len(ids), -1, dy.shape[-1] // columns, columns)
    for s, place in enumerate(slices):
        dz_rows[:, :, s] = torch.bmm(dy[:, :, place], up[s].index_select(0, ids).transpose(1, 2))
        d_up[s].index_add_(0, ids, torch.bmm(z[:, :, s].transpose(1, 2), dy[:, :, place]))
    return dz, d_up
