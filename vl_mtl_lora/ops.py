"""The routed low-rank product with its own backward: the hot path, nothing else.

Shape letters: B rows, M = B x (tokens per row), I in, O out, S splits, R rank, T tasks.

Per-task factors are folded before they touch a token, so the work per token is that of a plain LoRA: one skinny
product with the shared `down`, one with the folded `up` of the row's task, added in place to the frozen output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vl_mtl_lora.routing import Route


def routed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, route: Route,
                  low: Tensor | None = None) -> Tensor:
    """The frozen linear layer plus each row's low-rank update.

    Args:
        x: (B, ..., I) input.
        weight, bias: (O, I) and (O,), frozen: no gradient is computed for them.
        down: (S, R, I), shared by all tasks.
        up: (S, T, R, O/S), each task's folded factor, scale included; T = 1 where `route` is of one task.
        route: the tasks of the B rows.
        low: (B, ..., I), what `down` reads instead of x (x after dropout).

    Returns:
        (B, ..., O), x weight^T + bias + (low down^T) up[task of the row], per output slice.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias, low = (None if t is None else t.to(dtype) for t in (x, weight, bias, low))
    down, up = down.to(x.dtype), up.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _RoutedLinear.apply(x, low, weight, bias, down, up, route)


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, weight, bias, down, up, route):
        splits, rank, width = down.shape
        y = F.linear(x, weight, bias)
        low_rows = (x if low is None else low).reshape(-1, width)  # (M, I)
        z = low_rows @ down.reshape(splits * rank, width).T  # (M, S*R)
        _add_up(y.view(-1, y.shape[-1]), z, up, route)
        ctx.save_for_backward(low_rows, weight, down, up, z)
        ctx.route, ctx.shape, ctx.dropped = route, x.shape, low is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        low_rows, weight, down, up, z = ctx.saved_tensors
        need_x, need_low, *_ = ctx.needs_input_grad
        splits, rank, width = down.shape
        flat_down = down.reshape(splits * rank, width)
        dy = dy.reshape(-1, dy.shape[-1])
        dz, d_up = _up_backward(dy, z, up, ctx.route)
        d_down = (dz.T @ low_rows).view_as(down)
        dx = d_low = None
        if need_x:
            dx = dy @ weight
            if not ctx.dropped:
                dx.addmm_(dz, flat_down)
            dx = dx.view(ctx.shape)
        if need_low:
            d_low = (dz @ flat_down).view(ctx.shape)
        return dx, d_low, None, None, d_down, d_up, None


def _slices(up: Tensor, z: Tensor, y: Tensor, route: Route):
    """(split, index into T, z's part, y's part) for every split and run of rows."""
    splits, _, rank, out = up.shape
    tokens = len(z) // route.num_rows if route.num_rows else len(z)
    runs = ((0, 0, 1),) if route.task is not None else route.runs
    for task, start, stop in runs:
        rows = slice(start * tokens, stop * tokens)
        for s in range(splits):
            yield s, task, z[rows, s * rank:(s + 1) * rank], y[rows, s * out:(s + 1) * out]


def _add_up(y: Tensor, z: Tensor, up: Tensor, route: Route) -> None:
    """y (M, O) += z (M, S*R) times each row's factor, in place."""
    if route.task is not None or route.runs is not None:
        for s, task, z_part, y_part in _slices(up, z, y, route):
            y_part.addmm_(z_part, up[s, task])
        return
    splits, _, rank, out = up.shape
    ids = route.ids_on(y.device)
    z, y = z.view(len(ids), -1, splits, rank), y.view(len(ids), -1, splits, out)
    for s in range(splits):
        y[:, :, s] += torch.bmm(z[:, :, s], up[s].index_select(0, ids))


def _up_backward(dy: Tensor, z: Tensor, up: Tensor, route: Route) -> tuple[Tensor, Tensor]:
    """Gradients (M, S*R) of z and (S, T, R, O/S) of up."""
    splits, _, rank, out = up.shape
    dz, d_up = torch.empty_like(z), torch.zeros_like(up)
    if route.task is not None or route.runs is not None:
        for s, task, dz_part, dy_part in _slices(up, dz, dy, route):
            torch.mm(dy_part, up[s, task].T, out=dz_part)
        for s, task, z_part, dy_part in _slices(up, z, dy, route):
            torch.mm(z_part.T, dy_part, out=d_up[s, task])
        return dz, d_up
    ids = route.ids_on(dy.device)
    dz_rows, z = dz.view(len(ids), -1, splits, rank), z.view(len(ids), -1, splits, rank)
    dy = dy.view(len(ids), -1, splits, out)
    for s in range(splits):
        dz_rows[:, :, s] = torch.bmm(dy[:, :, s], up[s].index_select(0, ids).transpose(1, 2))
        d_up[s].index_add_(0, ids, torch.bmm(z[:, :, s].transpose(1, 2), dy[:, :, s]))
    return dz, d_up
