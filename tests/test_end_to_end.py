"""The README's commands and Python example, run as they stand there, with few steps."""

import itertools
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import tiny_samples
from tests.test_importing import clip_lora
from vl_mtl_lora.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
SMALL = {
    "quickstart": ["train.steps=2", "train.eval_samples=10"],
    "bench": ["tasks.retrieval.rows=2", "tasks.vqa.rows=1", "tasks.captioning.rows=1", "--rounds=1", "--no-growth"],
    "import": ["backbone.name=micro-clip", "backbone.pretrained=null"],
    "train": ["backbone.name=micro-clip", "backbone.pretrained=null", "train.steps=2", "data.workers=0",
              "train.precision=float32", "tasks.retrieval.rows=4", "tasks.vqa.rows=4", "tasks.captioning.rows=4"],
}


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith(("#", "make "))]


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def few_examples(patch):
    """The quickstart's data sets, cut to their first samples."""
    from vl_mtl_lora.data import examples

    for samples, counts in ((examples.EASY_VQA, {"vqa": 60, "captioning": 30, "matching": 40, "reading": 35}),
                            (examples.EMOJI, {"emoji": 40, "emoji-category": 25, "emoji-choice": 20})):
        for name, count in counts.items():
            patch.setitem(samples, name, lambda split, whole=samples[name], count=count: itertools.islice(
                whole(split), count))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, monkeypatch_module):
    """A folder with the checkout's scripts and configs, a JSON-lines file, and the pictures it names."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "data_scripts", folder / "data_scripts")
    lines = []
    for i, sample in enumerate(tiny_samples(8)):
        sample["image"].save(folder / f"{i}.png")
        lines.append(json.dumps({**sample, "image": f"{i}.png"}) + "\n")
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text("".join(lines))
    clip_lora(folder / "lora", {"vision_model.encoder.layers.0.self_attn.q_proj": (128, 128)})
    few_examples(monkeypatch_module)
    Image.new("RGB", (64, 64), "red").save(folder / "photo.png")
    return folder


@pytest.mark.parametrize("command", commands())
def test_readme_command(command, workplace, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend("data_scripts")  # as python does for a script
    words = shlex.split(command)
    if words[0] == "vl-mtl-lora":
        words += SMALL.get(words[1], [])
        if words[1:3] == ["evaluate", "configs/clip_vit_b32.yaml"]:
            words.append("backbone.name=micro-clip")
        call = main
    else:
        assert words[0] == "python", f"a README command that no test runs: {command}"
        words = words[1:]
        def call():
            runpy.run_path(words[0], run_name="__main__")
    monkeypatch.setattr(sys, "argv", words)
    try:
        call()
    except SystemExit as stop:
        assert not stop.code, (command, stop.code, capfd.readouterr().err[-2000:])


def test_readme_python(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    code, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})


def test_readme_s_own_backbone_trains(workplace, monkeypatch, tmp_path):
    from transformers import BertConfig, BertModel

    from tests.tiny_models import tokenizer
    from vl_mtl_lora import backbones, parse_config
    from vl_mtl_lora.model import build_model, check_gradients
    from vl_mtl_lora.trainer import train

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(backbones, "LOADERS", dict(backbones.LOADERS))
    tokens = tokenizer(start="<bos>", end="<eos>")
    tokens.save_pretrained("bert")
    BertModel(BertConfig(vocab_size=len(tokens), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64)).save_pretrained("bert")
    _, code = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(re.search(r"class LiT.*?\n\n", code, re.S).group().splitlines()) <= 21
    exec(compile(code, "README.md", "exec"), {})
    shards = str(workplace / "shards" / "train-*.tar")
    config = parse_config({
        "out": str(tmp_path / "run"),
        "backbone": {"library": "lit", "name": "test_vit", "options": {"encoder": "bert"}},
        "tasks": {"retrieval": {"rows": 4, "train": shards, "augment": False, "scale": 10.0},
                  "vqa": {"rows": 4, "train": shards, "answers": ["red", "blue", "green"], "augment": False}},
        "data": {"ignore_tasks": ["captioning"]}, "train": {"steps": 2, "warmup": 0}})
    check_gradients(build_model(config))
    train(config)


def test_quickstart_again_replaces_its_own_run(tmp_path, monkeypatch):
    from vl_mtl_lora.quickstart import quickstart

    few_examples(monkeypatch)
    options = ["train.steps=2", "train.eval_samples=10"]
    for _ in range(2):
        results = quickstart(tmp_path / "q", overrides=options)
    assert {task: values["samples"] for task, values in results["tasks"].items()} == {
        "retrieval": 40, "vqa": 60, "captioning": 30}
    assert {"results.json", "report.md", "report.html", "best", "last"} <= {p.name for p in (tmp_path / "q").iterdir()}
    page = (tmp_path / "q" / "report.html").read_text()
    assert all(f"<h2>{task}: test samples</h2>" in page for task in results["tasks"])
    assert page.count("<figure>") == sum(line.startswith(("| retrieval |", "| vqa |", "| captioning |"))
                                         for line in (tmp_path / "q" / "report.md").read_text().partition(
                                             "## Test samples")[2].splitlines()) >= 9
    assert set(results["seconds"]) == {"shards", "training", "evaluation, zero-shot", "evaluation, adapted",
                                       "held-out sets", "intervals"}
    assert [held["task"] for held in results["held_out"]] == ["matching", "classification"]
    assert results["off_equals_base"]["equal"] and results["off_equals_base"]["numbers"] > 10_000


def test_the_quickstart_of_other_kinds(tmp_path, monkeypatch):
    from vl_mtl_lora.quickstart import quickstart

    few_examples(monkeypatch)
    results = quickstart(tmp_path / "q", "kinds", ["train.steps=2", "train.eval_samples=10"])
    assert {task: (values["samples"], *values["adapted"]) for task, values in results["tasks"].items()} == {
        "classification": (25, "accuracy@1", "mean_per_class"), "multiple_choice": (20, "accuracy"),
        "matching": (40, "accuracy", "AUC"), "reading": (35, "accuracy", "AUC")}


def test_pretraining_makes_a_base_with_the_shipped_vocabulary(tmp_path, monkeypatch):
    import torch

    from vl_mtl_lora import load_backbone

    monkeypatch.syspath_prepend(str(ROOT / "data_scripts"))
    monkeypatch.setattr(sys, "argv", ["pretrain", "--out", str(tmp_path), "--naming-steps", "1", "--steps", "1"])
    state = torch.get_rng_state()
    runpy.run_path(str(ROOT / "data_scripts" / "pretrain_micro_clip.py"), run_name="__main__")
    torch.set_rng_state(state)
    shipped = ROOT / "vl_mtl_lora" / "embedded" / "micro_clip"
    for name in ("tokenizer.json", "tokenizer_config.json", "open_clip_config.json"):
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes()
    new, old = load_backbone("open_clip", f"local-dir:{tmp_path}"), load_backbone("open_clip", "micro-clip")
    assert {n: p.shape for n, p in new.named_parameters()} == {n: p.shape for n, p in old.named_parameters()}
    assert sum(f.stat().st_size for f in shipped.iterdir()) < 6e6
