"""Every shipped config parses, is described by `inspect` without weights, and leaves no adapter without a gradient."""

import re
from importlib import resources
from pathlib import Path

import pytest

from vl_mtl_lora import build_model, load_config
from vl_mtl_lora.inspection import inspect
from vl_mtl_lora.planning import table

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
EMBEDDED = [Path(str(p)) for p in (resources.files("vl_mtl_lora") / "embedded").iterdir() if p.name.endswith(".yaml")]
# Per config: frozen parameters in millions as published, layers adapted per tower, trainable share in per cent.
REAL = {
    "bench_hf_clip_vit_b32": (151.3, {"image": 12 * 6 + 1, "text": 12 * 6}, 2.96),
    "clip_vit_b32": (151.3, {"image": 12 * 4 + 1, "text": 12 * 4}, 2.96),
    "clip_vit_b32_mixture": (151.3, {"image": 12 * 4 + 1, "text": 12 * 4}, 6.02),
    "clip_vit_l14": (427.6, {"image": 24 * 2 + 1, "text": 12 * 2}, 2.05),
    "siglip_vit_b16": (203.2, {"image": 12 * 4 + 5 + 1, "text": 12 * 4}, 2.75),
    "coca_vit_b32": (253.6, {"image": 12 * 4 + 4, "text": 12 * 2, "decoder": 12 * 10}, 2.80),
    "llava_1_5_13b": (13351.5, {"image": 23 * 4 + 2, "text": 40 * 4}, 0.22),
    "llava_1_5_7b": (7063.4, {"image": 23 * 4 + 2, "text": 32 * 4}, 0.28),
    "paper_commonsense_llava_1_5_7b": (7063.4, {"image": 0, "text": 32 * 4}, 0.24),
    "paper_glue_llava_1_5_7b": (7063.4, {"image": 0, "text": 32 * 4}, 0.24),
    "paper_vl_clip_vit_b32": (151.3, {"image": 0, "text": 12}, 1.82),
    "paper_vl_coca_vit_b32": (253.6, {"image": 0, "text": 12, "decoder": 12}, 2.17),
    "paper_vl_llava_1_5_7b": (7063.4, {"image": 0, "text": 32 * 2}, 0.73),
    "qwen2_5_vl_3b": (3754.6, {"image": 32 + 2, "text": 36 * 2}, 0.32),
}
README = (CONFIGS[0].parents[1] / "README.md").read_text()


def shape_of(layer):
    """What the four parameters of a layer must be, from its sizes alone."""
    splits, tasks, up, rank = len(layer.slices), *layer.mix.shape[1:], layer.down.shape[1]
    columns = layer.out_features // (3 if layer.name.rpartition(".")[2] in ("qkv", "qv") else 1)
    return [(splits, rank, layer.in_features), (splits, tasks, rank, rank), (splits, up, rank, columns),
            (splits, tasks, up)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_real_size_is_injected_on_the_meta_device(path):
    model = build_model(load_config(path), dry_run="shapes")
    millions, modules, share = REAL[path.stem]
    frozen = sum(p.numel() for p in model.backbone.model.parameters() if not p.requires_grad)
    assert frozen / 1e6 == pytest.approx(millions, abs=0.1)
    assert model.summary.modules == modules
    assert 100 * model.summary.total / frozen == pytest.approx(share, abs=0.01)
    assert {p.device.type for p in model.backbone.model.parameters()} == {"meta"}
    for layer in model.summary.layers.values():
        assert [tuple(p.shape) for p in (layer.down, layer.transform, layer.up, layer.mix)] == shape_of(layer)


@pytest.mark.parametrize("path", [*CONFIGS, *EMBEDDED], ids=lambda path: path.stem)
def test_inspect_describes_it_and_finds_no_dead_adapter(path):
    lines = list(inspect(load_config(path)))
    text = "\n".join(lines)
    for tower in ("image", "text"):
        assert f"\n{tower}: " in text
    assert "expected memory of a step: weights" in text and lines[-1] == "every adapter gets a gradient"
    if path.stem == "llava_1_5_7b":  # the README shows it
        assert text in README


@pytest.mark.parametrize("name", ["clip_vit_l14", "llava_1_5_7b", "llava_1_5_13b"])
def test_the_readme_s_plans_are_those_of_the_configs(name):
    plans, _, assumed = "\n".join(table(load_config(CONFIGS[0].parent / f"{name}.yaml"), "H100-80GB")).partition("\n\n")
    shown = README.partition(f"`configs/{name}.yaml`):\n\n")[2].partition("\n\n")[0]
    number = re.compile(r"\d[\d,.]*")
    assert number.sub("", shown) == number.sub("", plans)
    values = [[float(value.replace(",", "")) for value in number.findall(text)] for text in (shown, plans)]
    assert values[0] == pytest.approx(values[1], rel=0.05, abs=0.1)  # the kernels of a step are torch's matter
    assert assumed.splitlines()[0] in README.replace("\n", " ")
