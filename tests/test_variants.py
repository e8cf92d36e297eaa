"""Other adapters than MTL-LoRA: each against its formula written out, or against PEFT, in float64."""

import copy
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vl_mtl_lora import TaskRouter, UserError, build_model, load_run
from vl_mtl_lora.anatomy import transform_distance
from vl_mtl_lora.export import export
from vl_mtl_lora.layer import MTLLoRALinear
from vl_mtl_lora.lora import METHODS, adapter_parameters
from vl_mtl_lora.model import check_gradients, example_batch
from vl_mtl_lora.task_sets import rename_task
from vl_mtl_lora.trainer import train

IDS = [2, 0, 0, 1, 2]
RANK, ALPHA, UP = 3, 6.0, 2
# What a sweep calls them, as settings of the layer.
SETTINGS = {"lora": {"num_up": 1, "transform": "none"}, "own": {"num_up": 1, "transform": "own"},
            "hydra": {"transform": "none"}, "multi_lora": {}, "moe_lora": {}, "dora": {}, "full": {}}


@pytest.fixture
def made():
    """Returns a function: name of a method -> a layer with random parameters, its base, and rows to feed it."""
    def make(name, splits=1, fresh=False):
        torch.manual_seed(0)
        base = nn.Linear(10, 12 * splits).double()
        options = {"num_up": UP, **SETTINGS[name]}
        layer = METHODS.get(name, MTLLoRALinear)(
            base, TaskRouter(["a", "b", "c"]), tower="image", rank=RANK, alpha=ALPHA, num_tasks=3, splits=splits,
            slices=None if splits == 1 else (0, 2), **options)
        with torch.no_grad():
            for parameter in () if fresh else adapter_parameters(layer).values():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        return layer, base, torch.randn(len(IDS), 4, 10, dtype=torch.float64)
    return make


def routed(layer, x):
    with layer.router.use(torch.tensor(IDS)):
        return layer(x)


def lora(x, down, up):
    """(R, I) and (R, C) -> the low-rank product, scaled."""
    return ALPHA / RANK * x @ down.T @ up


def expected(name, layer, base, x):
    """Row by row, from the formulas."""
    rows, part = [], slice(None)
    for task, row in zip(IDS, x):
        down = layer.down[0]
        if name == "own":
            part = slice(task * RANK, (task + 1) * RANK)
        if name in ("lora", "own"):
            update = lora(row, down[part], layer.up[0, 0, part])
        elif name == "hydra":
            weights = torch.softmax(layer.mix[0, task] / 0.5, 0)
            update = sum(weights[i] * lora(row, down, layer.up[0, i]) for i in range(UP))
        else:
            experts = [lora(row, down[i * RANK:(i + 1) * RANK], layer.up[0, 0, i * RANK:(i + 1) * RANK])
                       for i in range(UP)]
            weights = (layer.scaling[0] if name == "multi_lora"
                       else torch.softmax(layer.mix[0, task], 0))  # (N, C), or (N,)
            update = sum(weights[i] * experts[i] for i in range(UP))
        rows.append(base(row) + update)
    return torch.stack(rows)


def test_the_factors_of_multi_lora_start_as_linear_layers_do(made):
    layer, _, _ = made("multi_lora", splits=3, fresh=True)
    for part, like in ((layer.down, nn.Linear(10, RANK)), (layer.up, nn.Linear(RANK, 12))):
        bound = like.weight.detach().abs().max()  # of so few still near the bound
        assert 0.9 * bound < part.detach().abs().max() < 1.1 * bound
        assert float(part.detach().abs().mean()) == pytest.approx(float(bound) / 2, rel=0.2)


def test_the_experts_of_moe_lora_start_small(made):
    layer, _, _ = made("moe_lora", splits=3, fresh=True)
    assert float(layer.down.detach().std()) == pytest.approx(0.01, rel=0.2)


def test_dora_s_lengths_are_not_rounded_to_a_half_precision_base():
    base = nn.Linear(10, 12, bias=False).bfloat16()
    layer = METHODS["dora"](base, TaskRouter(["a"]), tower="image", rank=RANK, alpha=ALPHA, num_tasks=1)
    with torch.no_grad():
        layer.magnitude *= 1.003  # 1 in bfloat16
    x = torch.randn(64, 10).bfloat16()
    with layer.router.use("a"):
        y = layer(x)
    torch.testing.assert_close(y, (base(x).float() * 1.003).bfloat16(), rtol=0, atol=0)
    assert not torch.equal(y, base(x))


@pytest.mark.parametrize("name", ["own", "multi_lora", "moe_lora", "hydra"])
def test_what_has_no_lambda_is_at_no_distance_from_the_identity(made, name):
    layer, _, _ = made(name, fresh=True)
    assert transform_distance(layer).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["lora", "own", "hydra", "multi_lora", "moe_lora"])
def test_outputs_and_gradients_are_those_of_the_formula(made, name):
    layer, base, x = made(name)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    for y in (out := (routed(layer, x), expected(name, layer, base, x))):
        assert y.requires_grad
    torch.testing.assert_close(*out)
    slopes = [torch.autograd.grad((y * y.detach().sin()).sum(), parameters, allow_unused=True) for y in out]
    for got, wanted in zip(*slopes):
        torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted)


def test_a_task_moves_nothing_of_another_s_own_lora(made):
    layer, _, x = made("own")
    with layer.router.use("b"):
        layer(x).square().sum().backward()
    touched = torch.arange(3 * RANK) // RANK == 1
    assert torch.equal(layer.down.grad[0].any(-1), touched) and torch.equal(layer.up.grad[0, 0].any(-1), touched)


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_and_dora_are_peft_s(made, use_dora):
    layer, base, x = made("dora" if use_dora else "lora")
    model = nn.ModuleDict({"linear": copy.deepcopy(base)})
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=use_dora, target_modules=["linear"]), model)["linear"]
    own = {layer.down: theirs.lora_A["default"].weight, layer.up: theirs.lora_B["default"].weight}
    if use_dora:
        own[layer.magnitude] = theirs.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        for ours, parameter in own.items():
            parameter.data = (ours[0, 0].T if ours is layer.up else ours[0]).clone()
    out = routed(layer, x), theirs(x)
    torch.testing.assert_close(*out)
    slopes = (torch.autograd.grad(out[0].square().sum(), list(own)),
              torch.autograd.grad(out[1].square().sum(), list(own.values())))
    for ours, got, wanted in zip(own, *slopes):
        torch.testing.assert_close(got[0, 0].T if ours is layer.up else got[0], wanted)


def test_full_fine_tuning_is_that_of_the_weight(made):
    layer, base, x = made("full", splits=3)
    weight = base.weight.detach().clone().unflatten(0, (3, 12))
    weight[[0, 2]] += layer.delta.detach()
    weight = weight.flatten(0, 1).requires_grad_()
    out = routed(layer, x), F.linear(x, weight, base.bias)
    torch.testing.assert_close(*out)
    got, = torch.autograd.grad(out[0].square().sum(), [layer.delta])
    wanted, = torch.autograd.grad(out[1].square().sum(), [weight])
    torch.testing.assert_close(got, wanted.unflatten(0, (3, 12))[[0, 2]])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_fresh_layer_changes_nothing_and_a_trained_one_merges_exactly(made, name, splits):
    layer, base, x = made(name, splits, fresh=True)
    torch.testing.assert_close(routed(layer, x), base(x), rtol=0, atol=1e-13)
    with layer.router.off():
        assert torch.equal(layer(x), base(x))
    layer, base, x = made(name, splits)
    before = base.weight.clone()
    assert not torch.allclose(routed(layer, x), base(x))
    for task, name_of_task in enumerate("abc"):
        with layer.router.use(name_of_task):
            torch.testing.assert_close(layer.merged(task)(x), layer(x))
    assert torch.equal(base.weight, before)
    if layer.folds:
        down, up = layer.fold(1)
        with layer.router.use("b"):
            update = (layer(x) - base(x)).unflatten(-1, (splits, 12))[..., list(layer.slices), :]
        torch.testing.assert_close(torch.einsum("...i,sri,src->...sc", x, down, up), update)
    else:
        with pytest.raises(UserError, match="no low-rank product; --format merged"):
            layer.fold(0)


@pytest.mark.parametrize("name", [*SETTINGS, "heads"])
def test_a_run_learns_and_is_loaded_and_exported(tiny_config, tmp_path, name):
    config = tiny_config(steps=12, lr=0.02, warmup=0)
    method = name if name in METHODS else "heads" if name == "heads" else "mtl_lora"
    config = config.model_copy(update={"adapter": config.adapter.model_copy(update={
        "method": method, "num_up": UP, **SETTINGS.get(name, {})})})
    losses = []
    train(config, on_step=lambda step, values: losses.append(sum(values.values())))
    assert all(map(math.isfinite, losses)) and (name == "heads" or losses[-1] < 0.9 * losses[0])
    model, saved = load_run(config.out, "cpu")
    assert saved.adapter == config.adapter and bool(model.summary.layers) == (name != "heads")
    fresh = build_model(config)
    check_gradients(fresh)
    batch = example_batch(model)
    assert name == "heads" or sum(model(batch).values()) < sum(fresh(batch).values())
    with model.router.use("vqa"):
        expected = model.backbone.encode_text(model.backbone.tokenize(["a red circle"]))
    export(config.out, "vqa", tmp_path / "merged", "merged")
    import open_clip

    stock = open_clip.create_model(f"local-dir:{tmp_path / 'merged'}").eval()
    got = F.normalize(stock.encode_text(model.backbone.tokenize(["a red circle"])), dim=-1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    if name in ("own", "multi_lora", "dora", "full", "heads"):
        with pytest.raises(UserError, match="tasks cannot join, leave or be renamed"):
            rename_task(config.out, "vqa", "other", tmp_path / "renamed")


def test_a_transform_belongs_to_the_layer_that_has_one(tiny_config):
    with pytest.raises(ValueError, match="transform: none belongs to method: mtl_lora, not to dora"):
        type(tiny_config().adapter)(method="dora", transform="none")
