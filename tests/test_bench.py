"""The benchmark: its arms compute what they claim to; what it measures is never a test."""

import json

import pytest
import torch

from tests import tiny_models
from vl_mtl_lora import UserError, bench, bench_arms, parse_config
from vl_mtl_lora.backbones import load_backbone
from vl_mtl_lora.lora import MTLLoRALinear, freeze
from vl_mtl_lora.model import example_batch


def config_of(folder, library="transformers", **sections):
    tasks = {"retrieval": {"rows": 3}, "vqa": {"rows": 2, "answers": ["red", "blue"]}, "captioning": {"rows": 2}}
    return parse_config({
        "out": "runs/none", "backbone": {"library": library, "name": str(folder)}, "adapter": {"rank": 4, "alpha": 8},
        "tasks": {name: {**task, "train": "none.tar"} for name, task in tasks.items()}, **sections})


@pytest.fixture
def config(tmp_path):
    tiny_models.hf_clip(tmp_path)
    return config_of(tmp_path)


@pytest.fixture
def backbone(config):
    backbone = load_backbone("transformers", config.backbone.name)
    freeze(backbone)
    return backbone


def test_every_arm_is_measured_and_told(config, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "GROWTH", {"tasks": (1, 9), "rank": (4,), "num_up": (2,)})
    result = bench.bench(config, rounds=2)
    arms = {"frozen", "ours", "peft_lora", "peft_poly"}
    assert set(result["ratios"]) == arms | {"ours_inference", "ours_merged"} and result["ratios"]["frozen"] == 1
    assert set(result["peak_bytes"]) == arms and result["peak_bytes"]["ours"] > result["peak_bytes"]["frozen"] > 0
    assert {what: list(values) for what, values in result["growth"].items()} == {
        "tasks": ["1", "9"], "rank": ["4"], "num_up": ["2"]}
    assert result["rows"] == 7 and list(result["left_out"]) == ["loader"]  # there are no shards
    bench.write(result, tmp_path / "a" / "bench.json")
    assert json.loads((tmp_path / "a" / "bench.json").read_text()) == result
    text = bench.table(result)
    assert all(arm in text for arm in arms) and result["device"] in text


def test_arms_share_the_frozen_weights_and_see_their_tasks(config, backbone):
    frozen, ours = bench_arms.frozen_model(backbone, config), bench_arms.our_model(backbone, config)
    lora, poly = bench_arms.peft_lora_model(backbone, config), bench_arms.peft_poly_model(backbone, config)
    merged = bench_arms.merged_model(ours, config)
    batch = example_batch(ours, {name: task.rows for name, task in config.tasks.items()})
    assert {name: rows.stop - rows.start for name, rows in batch.slices.items()} == {
        "retrieval": 3, "vqa": 2, "captioning": 2}
    weight = backbone.model.visual_projection.weight
    assert all(model.backbone.model.visual_projection.weight is weight for model in (frozen, ours, lora, poly, merged))
    losses = frozen(batch)
    with ours.router.off():
        states = ours.backbone.image_states(batch.images)
    torch.testing.assert_close(states.embedding, frozen.backbone.image_states(batch.images).embedding)
    for name in losses:  # fresh adapters of PEFT change nothing
        torch.testing.assert_close(lora(batch)[name], losses[name])
    with torch.no_grad(), ours.router.use("retrieval"):
        expected = ours.backbone.encode_image(batch.images)
    torch.testing.assert_close(merged.backbone.encode_image(batch.images), expected)
    assert not any(isinstance(module, MTLLoRALinear) for module in merged.modules())
    adapted = {name for name, module in ours.backbone.named_modules() if isinstance(module, MTLLoRALinear)}
    for model, attribute in ((lora, "lora_A"), (poly, "poly_lora_A")):
        assert {name for name, module in model.backbone.named_modules() if hasattr(module, attribute)} == adapted
    seen = []
    layer = poly.backbone.get_submodule(next(name for name in adapted if "vision_model" in name))
    layer.poly_router["default"].register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["task_ids"]),
                                                           with_kwargs=True)
    poly(batch)
    assert seen[0].tolist() == batch.ids.tolist()


def test_gradients_of_the_frozen_arm_reach_the_first_block(config, backbone):
    frozen = bench_arms.frozen_model(backbone, config)
    inputs = []
    first = frozen.backbone.model.vision_model.encoder.layers[0]
    first.register_forward_pre_hook(lambda _, args, kwargs: inputs.append([*args, *kwargs.values()][0]),
                                    with_kwargs=True)
    sum(frozen(example_batch(frozen)).values()).backward()
    assert inputs[0].grad.any()


def test_what_peft_cannot_adapt_is_said(tiny_folder):
    result = bench.bench(config_of(f"local-dir:{tiny_folder}", "open_clip"), rounds=1, growth=False)
    assert set(result["peak_bytes"]) == {"frozen", "ours"}
    assert "PEFT does not adapt" in result["left_out"]["peft_lora"]
    assert "peft_poly is not measured" in bench.table(result)


def test_a_missing_peft_is_said(config, backbone, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'vl_mtl_lora\[bench\]'"):
        bench_arms.peft_lora_model(backbone, config)


def test_the_loader_is_measured_where_there_are_shards(tiny_config):
    result = bench.bench(tiny_config(), rounds=1, growth=False)
    loader = result["loader"]
    assert loader["images_per_second"] > 0 and loader["workers"] == 0
    assert loader["ratio"] == pytest.approx(loader["images_per_second"] / loader["bare_images_per_second"])
    assert "loader, 0 processes" in bench.table(result)


def test_peak_memory_is_what_was_held_at_once():
    model = torch.nn.Linear(1, 1)

    def step():
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        c = torch.empty(500)
        del b, c
    assert bench._peak_bytes(step, model, torch.device("cpu")) == 4 * 3000


def test_retrieval_is_measured_in_growing_sizes_within_its_bound(monkeypatch, command, tmp_path):
    code, out, _ = command("bench-retrieval", "--images", "64", "--dim", "8", "--out", tmp_path / "r.json")
    sizes = json.loads((tmp_path / "r.json").read_text())["sizes"]
    assert code == 0 and [(s["images"], s["texts"]) for s in sizes] == [(8, 40), (16, 80), (32, 160), (64, 320)]
    for size in sizes:
        assert size["peak_bytes"] <= size["bound_bytes"] and size["seconds"] > 0
        assert size["pairs_per_second"] == pytest.approx(2 * size["images"] * size["texts"] / size["seconds"])
    assert len(out.splitlines()) == 7


def test_a_search_holds_no_more_than_its_chunks(monkeypatch):
    """Tensors alive at once, as the profiler counts them, whatever the number of queries."""
    from vl_mtl_lora.metrics import retrieval

    monkeypatch.setattr(retrieval, "MOST_SCORES", 20_000)
    items, groups = torch.randn(500, 8), torch.arange(500)

    def peak(queries):
        rows, owner = torch.randn(queries, 8), torch.arange(queries) % 500
        return bench._peak_bytes(lambda: retrieval.search(rows, items, owner, groups), torch.nn.Linear(1, 1),
                                 torch.device("cpu"))
    few, many = peak(500), peak(4000)
    assert 4 * 20_000 < few < 4.5 * 4 * 20_000 and many - few < 4000 * 8 * 10  # but for what it returns of each query
