"""A tiny CLIP of open_clip's architecture with random weights and the embedded vocabulary, and tiny shards."""

import importlib.util
import json
import os
import shutil
import sys
from importlib import resources

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.downloads import SCRIPTS
from vl_mtl_lora import cli, load_backbone, parse_config, write_shards

torch.set_num_threads(1)  # two tests run at a time
os.environ["HF_HUB_OFFLINE"] = "1"  # also of the processes that tests start
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


@pytest.fixture(autouse=True)
def same_start():
    """Fresh adapters are drawn at random: every test draws the same."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """An open_clip local-dir with random weights."""
    folder = tmp_path_factory.mktemp("tiny_clip")
    embedded = resources.files("vl_mtl_lora") / "embedded" / "micro_clip"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(embedded / name), folder / name)
    config = json.loads((embedded / "open_clip_config.json").read_text())
    model = config["model_cfg"]
    model["embed_dim"] = 24
    model["vision_cfg"] |= {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
    model["text_cfg"] |= {"width": 24, "heads": 2, "layers": 2}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = load_backbone("open_clip", f"local-dir:{folder}", random_weights=True).model
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(p.shape, generator=generator) * 0.2 + (p.dim() == 1)
             for name, p in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def tiny_backbone(tiny_folder):
    """Returns a function that loads the tiny model."""
    return lambda: load_backbone("open_clip", f"local-dir:{tiny_folder}")


def tiny_samples(count=24):
    """`count` samples of each task over pictures of one colour."""
    names = list(COLOURS)
    for i in range(count):
        colour = names[i % len(names)]
        common = {"image": Image.new("RGB", (40, 40), COLOURS[colour]), "image_id": i}
        yield {**common, "task": "retrieval", "captions": [f"a {colour} shape", f"the color is {colour}"]}
        yield {**common, "task": "vqa", "question": "what is the color?", "answers": [colour], "question_id": i}
        yield {**common, "task": "captioning", "captions": [f"there is a {colour} shape"]}


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory):
    """Mixed shards of three tasks, 24 samples each."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(tiny_samples(), folder, name="mixed", samples_per_shard=20)
    return folder


@pytest.fixture
def tiny_config(tiny_folder, tiny_shards, tmp_path):
    """Returns a function that gives the configuration of a run in a temporary folder."""
    def make(**train):
        shards = str(tiny_shards / "mixed-*.tar")
        split = {"train": shards, "valid": shards, "test": shards}
        return parse_config({
            "out": str(tmp_path / "run"),
            "backbone": {"name": f"local-dir:{tiny_folder}"},
            "adapter": {"rank": 4, "alpha": 8},
            "tasks": {"retrieval": {"rows": 6, **split},
                      "vqa": {"rows": 4, "answers": list(COLOURS), **split},
                      "captioning": {"rows": 4, "num_beams": 2, "max_new_tokens": 5, **split}},
            "data": {"shuffle": 10, "eval_batch": 10},
            "train": {"steps": 6, "lr": 0.01, "warmup": 2, "log_every": 1, "eval_samples": 8, **train},
        })
    return make


@pytest.fixture
def run(monkeypatch, capfd):
    """Returns a function that runs a script's main; it gives the exit code, and what was printed and told of errors."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def call(script, *args):
        spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capfd.readouterr()
    return call


def hide_java(patch):
    """METEOR starts a Java machine of seconds for each arm; `test_captions` has tests of it."""
    patch.setattr("vl_mtl_lora.metrics.caption.which", lambda name: None)


@pytest.fixture(autouse=True)
def no_java(request, monkeypatch):
    if request.module.__name__ != "tests.test_captions":
        hide_java(monkeypatch)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line in this process; returns (exit code, stdout, stderr)."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vl-mtl-lora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err
    return call
