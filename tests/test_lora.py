"""The layer against a float64 loop over rows that follows the paper's formula literally."""

import copy

import pytest
import torch
from torch import nn

from vl_mtl_lora import AdapterConfig, MTLLoRALinear, TaskRouter, UserError, inject

TASKS = ["a", "b", "c"]


def make_layer(splits=1, dtype=torch.float64, **options):
    torch.manual_seed(3)
    router = TaskRouter(TASKS)
    base = nn.Linear(10, 12, dtype=dtype)
    base.requires_grad_(False)
    options = {"rank": 4, "alpha": 6.0, "num_tasks": 3, "num_up": 2, "temperature": 0.3, **options}
    layer = MTLLoRALinear(base, router, tower="image", splits=splits, **options)
    with torch.no_grad():
        for p in (layer.down, layer.transform, layer.up, layer.mix):
            p.add_(torch.randn_like(p) * 0.5)
    return layer, router


def reference(layer, x, ids, alpha=6.0, tau=0.3):
    """h = W x + alpha / r sum_i softmax(w_t / tau)_i B_i Lambda_t A x, row by row, slice by slice."""
    rank = layer.down.shape[1]
    rows = []
    for row, task in zip(x, ids.tolist()):
        out = row @ layer.base.weight.T + layer.base.bias
        parts = []
        for s in range(layer.down.shape[0]):
            exp = (layer.mix[s, task] / tau).exp()
            p = exp / exp.sum()
            matrix = layer.transform[s, task]
            matrix = torch.diag(matrix) if matrix.dim() == 1 else matrix
            total = 0
            for i in range(layer.up.shape[1]):
                total = total + p[i] * (row @ layer.down[s].T @ matrix.T @ layer.up[s, i])
            parts.append(total * alpha / rank)
        rows.append(out + torch.cat(parts, dim=-1))
    return torch.stack(rows)


IDS = {"sorted": [0, 0, 1, 2, 2], "grouped, not ascending": [2, 2, 0, 1, 1], "mixed": [0, 2, 0, 1, 2],
       "one absent": [1, 1, 2, 2, 2]}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("transform", ["full", "diagonal"])
@pytest.mark.parametrize("shape", [(5, 10), (5, 4, 10), (5, 2, 3, 10)])
def test_forward_and_gradients_equal_the_formula(ids, splits, transform, shape):
    check_formula(torch.tensor(ids), splits, transform, shape)


# Rows of 8 tokens, rank 4: equal blocks of several rows, one row each where all is mixed, each run by itself.
@pytest.mark.parametrize("ids", [
    [0] * 6 + [1] * 4 + [2] * 2, [2] * 4 + [0] * 4, [1] * 8, [0, 1, 2] * 8, [0] * 5 + [2] * 3, [1, 0, 1, 2]])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_blocks_and_runs_equal_the_formula(ids, splits, transform):
    check_formula(torch.tensor(ids), splits, transform, (len(ids), 8, 10))


def test_long_runs_of_a_task_that_comes_twice_equal_the_formula():
    check_formula(torch.tensor([1, 0, 1]).repeat_interleave(20), 3, "full", (60, 10))  # patches side by side


@pytest.mark.parametrize("target", [torch.empty(0).long(), "b"])
def test_no_rows_give_no_gradient(target):
    layer, router = make_layer(3)
    x = torch.empty(0, 4, 10, dtype=torch.float64, requires_grad=True)
    with router.use(target):
        y = layer(x)
    assert y.shape == (0, 4, 12)
    assert not any(grad.any() for grad in torch.autograd.grad(y.sum(), [x, layer.up, layer.mix, layer.transform]))


def check_formula(ids, splits, transform, shape):
    layer, router = make_layer(splits, transform=transform)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*shape[:-1], 12, dtype=torch.float64)
    wanted = [x, layer.down, layer.transform, layer.up, layer.mix]
    with router.use(ids):
        got = layer(x)
    expected = reference(layer, x, ids)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(torch.autograd.grad((got * weight).sum(), wanted),
                            torch.autograd.grad((expected * weight).sum(), wanted)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_gradcheck_of_every_path():
    layer, router = make_layer(3)
    x = torch.randn(4, 2, 10, dtype=torch.float64, requires_grad=True)
    for target in (torch.tensor([0, 0, 1, 2]), torch.tensor([1, 0, 1, 0]), "b"):
        with router.use(target):
            assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("transform", ["full", "diagonal"])
@pytest.mark.parametrize("ids", [[2, 0, 2], [1] * 3, [0] * 8 + [2] * 8, [0] * 5 + [2] * 3])
def test_float32_and_noncontiguous_input(ids, transform):
    layer, router = make_layer(3, transform=transform)
    small = copy.deepcopy(layer).float()
    x, ids = torch.randn(len(ids), 10, 4, dtype=torch.float64).transpose(1, 2), torch.tensor(ids)
    with router.use(ids), small.router.use(ids):
        torch.testing.assert_close(small(x.float()).double(), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ids", [[0, 0, 1, 2], [1, 0, 1, 0], [0] * 4])
def test_float32_gradients(ids):
    layer, router = make_layer(3)
    small = copy.deepcopy(layer).float()
    x, ids = torch.randn(4, 8, 10, dtype=torch.float64), torch.tensor(ids)
    with router.use(ids), small.router.use(ids):
        layer(x).square().sum().backward()
        small(x.float()).square().sum().backward()
    for exact, near in zip(layer.parameters(), small.parameters()):
        if exact.requires_grad:
            scale = exact.grad.abs().max()
            torch.testing.assert_close(near.grad.double() / scale, exact.grad / scale, rtol=1e-5, atol=1e-5)


def test_forward_asks_the_device_nothing(monkeypatch):
    layer, router = make_layer(3)
    x = torch.randn(4, 8, 10, dtype=torch.float64)
    with router.use(torch.tensor([0, 0, 1, 2])):
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, None)
        layer(x)


@pytest.mark.parametrize("ids", [[0] * 4 + [1] * 4, [0, 1, 2, 0, 1, 2, 0, 1], [0] * 5 + [2] * 3])
def test_compiled_whole_and_once_for_batches_of_the_same_quotas(ids):
    layer, router = make_layer(3)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 4, 10, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        with torch._dynamo.config.patch(error_on_recompile=True), router.use(torch.tensor(ids)), \
                compiled.router.use(torch.tensor(ids)):
            got, expected = compiled(x), layer(x)
        torch.testing.assert_close(got, expected)
        mine = torch.autograd.grad(got.square().sum(), [x, compiled.up, compiled.mix, compiled.transform])
        wanted = torch.autograd.grad(expected.square().sum(), [x, layer.up, layer.mix, layer.transform])
        torch.testing.assert_close(mine, wanted)


def test_layers_that_compute_for_one_another_equal_the_formula():
    """In the order of a pass and out of it, with one changed in between, one run twice and one not at all."""
    fused, router = make_layer(3)
    single, unused = make_layer()[0], make_layer()[0]
    for layer in (fused, single, unused):
        layer.router, layer.peers = router, [fused, single, unused]
    x, ids = torch.randn(8, 4, 10, dtype=torch.float64), torch.tensor([2] * 4 + [0] * 4)
    wanted = [p for layer in (fused, single) for p in (layer.down, layer.transform, layer.up, layer.mix)]
    with router.use(ids):
        for layers in ([fused, single], [single, single, fused]):
            got, expected = [layer(x) for layer in layers], [reference(layer, x, ids) for layer in layers]
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
            grads = torch.autograd.grad(sum(y.square().sum() for y in got), wanted)
            exact = torch.autograd.grad(sum(y.square().sum() for y in expected), wanted)
            torch.testing.assert_close(grads, exact, rtol=1e-10, atol=1e-10)
    with torch.no_grad(), router.use(ids):  # a new route: nothing is left of what was computed before
        fused(x)
        single.mix.add_(1.0).mul_(-2.0)
        single.transform.mul_(3.0)
        torch.testing.assert_close(single(x), reference(single, x, ids), rtol=1e-10, atol=1e-10)


def test_only_the_input_and_z_are_kept_for_the_backward_pass():
    layer, router = make_layer(3)
    x = torch.randn(4, 8, 10, dtype=torch.float64, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    with router.use(torch.tensor([0, 0, 1, 2])), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    shapes = [tuple(tensor.shape) for pointer, tensor in kept.items() if pointer not in parameters]
    assert sorted(shapes) == [(3,), (32, 10), (32, 12)]  # tasks of the runs, x, z = A x of three slices
    assert x.untyped_storage().data_ptr() in kept


@pytest.mark.parametrize("ids", [[0, 0, 1, 2], [1, 0, 1, 0], [0] * 4, [0] * 3 + [2]])
@pytest.mark.parametrize("splits,transform", [(1, "full"), (3, "full"), (3, "diagonal")])
@pytest.mark.parametrize("whole", [False, True])
def test_bfloat16_is_as_near_as_its_rounding(ids, splits, transform, whole):
    """Autocast, and a base held in bfloat16 (`whole`): within 2 % of the largest value, gradients too."""
    exact, router = make_layer(splits, transform=transform)
    near = copy.deepcopy(exact).float()
    if whole:
        near.base.bfloat16()
    x = torch.randn(4, 8, 10)
    weight = torch.randn(4, 8, 12)
    with router.use(torch.tensor(ids)), near.router.use(torch.tensor(ids)):
        expected = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
            got = near(x.bfloat16() if whole else x)
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()
    (expected * weight).sum().backward()
    (got.float() * weight).sum().backward()
    for parameter, reference in ((near.down, exact.down), (near.transform, exact.transform), (near.up, exact.up),
                                 (near.mix, exact.mix)):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - reference.grad).abs().max() < 0.02 * reference.grad.abs().max()


def test_fresh_layer_equals_the_frozen_one_exactly():
    base = nn.Linear(10, 12)
    router = TaskRouter(TASKS)
    layer = MTLLoRALinear(base, router, tower="text", rank=4, alpha=8, num_tasks=3, splits=3)
    x = torch.randn(5, 10)
    with router.use(torch.tensor([0, 1, 2, 1, 0])):
        assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.transform[0, 1], torch.eye(4))


def test_dropout_acts_before_down_and_only_in_training():
    layer, router = make_layer(dropout=0.5)
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 2])
    with router.use(ids):
        torch.testing.assert_close(layer.eval()(x), reference(layer, x, ids))
        torch.manual_seed(5)
        got = layer.train()(x)
        torch.manual_seed(5)
        low = layer.dropout(x)
    # The update reads the dropped input, the frozen product the whole one.
    zero = nn.Linear(10, 12, dtype=torch.float64)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    update, frozen = copy.copy(layer), layer.base(x)
    update._modules = {**layer._modules, "base": zero}
    expected = frozen + reference(update, low, ids)
    torch.testing.assert_close(got, expected)
    (grad,) = torch.autograd.grad(got.sum(), x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(grad, wanted)


def test_loss_of_one_task_leaves_the_others_parameters_alone():
    layer, router = make_layer(3)
    x = torch.randn(4, 10, dtype=torch.float64)
    with router.use(torch.tensor([0, 1, 0, 2])):
        loss = layer(x)[[0, 2]].square().sum()
    transform, mix = torch.autograd.grad(loss, [layer.transform, layer.mix])
    assert not transform[:, 1:].any() and not mix[:, 1:].any()
    assert transform[:, 0].any() and mix[:, 0].any()


def test_a_permutation_of_rows_commutes():
    layer, router = make_layer(3)
    x, ids = torch.randn(6, 3, 10, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with router.use(ids):
        straight = layer(x)
    with router.use(ids[order]):
        torch.testing.assert_close(layer(x[order]), straight[order])


def test_mixed_batch_equals_the_tasks_run_alone():
    layer, router = make_layer()
    x, ids = torch.randn(5, 10, dtype=torch.float64), torch.tensor([2, 0, 1, 0, 2])
    with router.use(ids):
        mixed = layer(x)
    for task, name in enumerate(TASKS):
        with router.use(name):
            torch.testing.assert_close(layer(x[ids == task]), mixed[ids == task])


@pytest.mark.parametrize("splits", [1, 3])
def test_fold_and_merge_are_exact(splits):
    layer, router = make_layer(splits)
    x = torch.randn(4, 10, dtype=torch.float64)
    for task, name in enumerate(TASKS):
        down, up = layer.fold(task)
        delta = torch.cat([x @ down[s].T @ up[s] for s in range(splits)], dim=-1)
        with router.use(name):
            torch.testing.assert_close(layer(x), layer.base(x) + delta)
            torch.testing.assert_close(layer(x), layer.merged(task)(x))


def test_no_route_and_wrong_row_count_raise():
    layer, router = make_layer()
    layer.name = "image.0.mlp.in"
    x = torch.randn(4, 10, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no route is set for the image tower"):
        layer(x)
    with router.use(torch.tensor([0, 1, 2])), pytest.raises(RuntimeError, match=r"image\.0\.mlp\.in.*4 rows.*3 ids"):
        layer(x)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"temperature": 0.0}, {"dropout": 1.0}, {"transform": "fulll"},
                                 {"splits": 5}, {"num_up": 0}])
def test_impossible_values_are_refused(bad):
    with pytest.raises(UserError):
        make_layer(**bad)


def test_double_backward_is_refused():
    layer, router = make_layer()
    x = torch.randn(2, 10, dtype=torch.float64, requires_grad=True)
    with router.use("a"):
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("targets,modules", [
    (["*"], {"image": 9, "text": 8}), (["image.attn.*"], {"image": 4, "text": 0}),
    (["text.1.mlp.in", "projector"], {"image": 1, "text": 1}), (["attn.qkv"], {"image": 2, "text": 2}),
    (["image.0-1.mlp.*"], {"image": 4, "text": 0})])
def test_targets_are_anchored_to_towers_blocks_and_roles(tiny_backbone, targets, modules):
    summary = inject(tiny_backbone(), AdapterConfig(targets=targets), TaskRouter(TASKS))
    assert summary.modules == modules
    trainable = sum(p.numel() for layer in summary.layers.values() for p in layer.parameters() if p.requires_grad)
    assert summary.total == trainable


def test_a_target_that_matches_nothing_is_an_error(tiny_backbone):
    with pytest.raises(UserError, match="'image.attn.qvk' matches nothing.*did you mean image.attn.qkv"):
        inject(tiny_backbone(), AdapterConfig(targets=["image.attn.qvk"]), TaskRouter(TASKS))


def test_inject_twice_is_an_error(tiny_backbone):
    backbone = tiny_backbone()
    inject(backbone, AdapterConfig(), TaskRouter(TASKS))
    with pytest.raises(UserError, match="already has adapters"):
        inject(backbone, AdapterConfig(), TaskRouter(TASKS))
