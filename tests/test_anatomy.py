"""The anatomy against a float64 reference that builds every Delta in full, by loops over slices and projections."""

import json
import math

import pytest
import torch
from torch import nn

from tests.test_lora import make_layer
from vl_mtl_lora import AdapterConfig, TaskRouter, inject
from vl_mtl_lora.anatomy import anatomy, update_gram
from vl_mtl_lora.model import MultiTaskModel

TASKS = ["a", "b", "c"]


@pytest.fixture
def model_of(tiny_backbone):
    """Returns a function that gives the tiny CLIP with adapters, their values drawn at random where trained."""
    def make(trained=True, dtype=torch.float64, **config):
        backbone, router = tiny_backbone().to(dtype), TaskRouter(TASKS)
        summary = inject(backbone, AdapterConfig(rank=4, alpha=6.0, temperature=0.3, **config), router)
        if trained:
            with torch.no_grad():
                for layer in summary.layers.values():
                    for parameter in (layer.transform, layer.up, layer.mix):
                        parameter.add_(torch.randn_like(parameter) * 0.4)
        return MultiTaskModel(backbone, router, nn.ModuleDict(), summary)
    return make


def delta(layer, task, alpha=6.0, tau=0.3):
    """alpha / r sum_i softmax(w_t / tau)_i B_i Lambda_t A, zero outside the adapted slices, (O, I)."""
    columns = layer.up.shape[-1]
    full = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for s, place in enumerate(layer.slices):
        exp = (layer.mix[s, task].double() / tau).exp()
        matrix = layer.transform[s, task].double()
        matrix = torch.diag(matrix) if matrix.dim() == 1 else matrix
        for i, share in enumerate(exp / exp.sum()):
            full[place * columns:(place + 1) * columns] += (
                alpha / layer.rank * share * layer.up[s, i].double().T @ matrix @ layer.down[s].double())
    return full


def cosine(first, second):
    return float(first @ second / (first.norm() * second.norm()))


CONFIGS = {"full": {}, "diagonal": {"transform": "diagonal"}, "one projection": {"num_up": 1},
           "q and v of a fused qkv": {"targets": ["attn.q", "attn.v"]},
           "other parts of each tower": {"targets": ["image.attn.v", "text.mlp"]}}


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_numbers_equal_the_formulas(model_of, config):
    model = model_of(**config)
    got = anatomy(model)
    assert got.tasks == TASKS and [layer.name for layer in got.layers] == list(model.summary.layers)
    vectors = {"image": [[], [], []], "text": [[], [], []]}
    for row, (name, layer) in enumerate(model.summary.layers.items()):
        place = got.layers[row]
        assert name == ".".join([place.tower, *[str(place.block)] * (place.block >= 0), place.role])
        rows = [s * layer.up.shape[-1] + i for s in layer.slices for i in range(layer.up.shape[-1])]
        for t in range(3):
            lambdas = [torch.diag(m) if m.dim() == 1 else m for m in layer.transform[:, t]]
            squares = [((m - torch.eye(4)) ** 2).sum() / 4 for m in lambdas]
            assert got.distance[row][t] == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-9)
            shares = [(w / 0.3).exp() / (w / 0.3).exp().sum() for w in layer.mix[:, t]]
            assert got.mixture[row][t] == pytest.approx((sum(shares) / len(shares)).tolist(), rel=1e-9)
            full = delta(layer, t)
            assert got.size[row][t] == pytest.approx(float(full.norm() / layer.weight[rows].norm()), rel=1e-9)
            vectors[place.tower][t].append(full.flatten())
    both = [vectors["image"][t] + vectors["text"][t] for t in range(3)]
    for matrix, parts in [(got.similarity, both), *((m, vectors[tower]) for tower, m in
                                                   got.similarity_by_tower.items())]:
        flat = [torch.cat(part) for part in parts]
        for t in range(3):
            assert matrix[t] == pytest.approx([cosine(flat[t], flat[u]) for u in range(3)], abs=1e-10)
    assert set(got.similarity_by_tower) == {layer.tower for layer in got.layers}


@torch.no_grad()
@pytest.mark.parametrize("rank", [4, 16])  # 16: more than the layer's 10 inputs
@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_inner_products_of_sliced_layers(transform, rank):
    layer, _ = make_layer(3, transform=transform, slices=[0, 2], rank=rank)
    deltas = [delta(layer, t).flatten() for t in range(3)]
    torch.testing.assert_close(update_gram(layer), torch.stack(deltas) @ torch.stack(deltas).T, rtol=1e-10, atol=1e-10)


def test_an_untrained_model_moves_nothing(model_of):
    got = anatomy(model_of(trained=False))
    assert {value for row in got.distance + got.size for value in row} == {0.0}
    assert {value for row in got.similarity for value in row} == {None}
    assert "NaN" not in json.dumps(got.to_dict()) and json.loads(json.dumps(got.to_dict())) == got.to_dict()


def test_a_task_that_moves_nothing_is_like_no_other(model_of):
    model = model_of()
    with torch.no_grad():
        for layer in model.summary.layers.values():
            layer.transform[:, 1] = 0
    got = anatomy(model)
    assert got.similarity[1] == [None] * 3 and [row[1] for row in got.similarity] == [None] * 3
    assert got.similarity[0][0] == pytest.approx(1) and got.similarity[0][2] is not None


@torch.no_grad()
def test_half_precision_base(model_of):
    model = model_of(dtype=torch.bfloat16)
    got = anatomy(model)
    for row, layer in enumerate(model.summary.layers.values()):
        expected = [float(delta(layer, t).norm() / layer.weight.double().norm()) for t in range(3)]
        assert got.size[row] == pytest.approx(expected, rel=1e-5)


def test_a_weight_that_is_no_plain_tensor_has_no_size(model_of):
    model = model_of()
    name, layer = next(iter(model.summary.layers.items()))
    layer.plain = False  # as of a quantised base
    got = anatomy(model)
    assert got.layers[0].name == name and got.size[0] == [None] * 3 and got.size[1][0] > 0
    assert None not in got.similarity[0]


def test_nothing_changes(model_of):
    model = model_of(dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.adapter_state().items()}
    anatomy(model)
    for name, parameter in model.adapter_state().items():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu(model_of):
    model = model_of(dtype=torch.float32)
    expected = anatomy(model)
    got = anatomy(model.to("cuda"))
    for name in ("distance", "size", "similarity"):
        for mine, theirs in zip(getattr(got, name), getattr(expected, name)):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
