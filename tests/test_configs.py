"""Every shipped config parses, builds without weights, and leaves no adapter without a gradient."""

from importlib import resources
from pathlib import Path

import pytest

from vl_mtl_lora import build_model, load_config
from vl_mtl_lora.model import check_gradients

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
EMBEDDED = [Path(str(p)) for p in (resources.files("vl_mtl_lora") / "embedded").iterdir() if p.name.endswith(".yaml")]


@pytest.mark.parametrize("path", [*CONFIGS, *EMBEDDED], ids=lambda path: path.stem)
def test_config_builds(path):
    config = load_config(path)
    model = build_model(config, random_weights=True)
    assert all(count > 0 for count in model.summary.modules.values())
    check_gradients(model)
