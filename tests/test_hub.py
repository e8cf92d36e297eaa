"""The hub: what a push uploads, that a run loads from there as it was, and how both refuse. No network: the hub is a
server in the test, with the HTTP interface that huggingface_hub uses."""

import json
import os
import pickle
import socket
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, metadata_load
from safetensors.torch import load_file

from tests.hub_server import TOKEN, hub
from vl_mtl_lora import UserError, build_model, load_run, parse_config
from vl_mtl_lora.checkpoint import save_checkpoint
from vl_mtl_lora.compare import compare
from vl_mtl_lora.hub import FILES, Address, hub_address
from vl_mtl_lora.model import example_batch
from vl_mtl_lora.model_card import base_on_hub, data_sources, model_card
from vl_mtl_lora.push import push

VALID = {"tasks": {"vqa": {"accuracy": 12.5}, "captioning": {"CIDEr": 3.25}}, "split": "the valid split"}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The stand-in, used by huggingface_hub in this process, with an empty cache."""
    with hub() as running:
        for name, value in {"ENDPOINT": running.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
                            "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "no-token"),
                            "HUGGINGFACE_CO_URL_TEMPLATE":
                                running.url + "/{repo_id}/resolve/{revision}/{filename}"}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def trained(tiny_config):
    """(model, folder of its run): adapters of random values, a last checkpoint with resume state."""
    config = tiny_config()
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.adapter_state().values():
            tensor += torch.randn(tensor.shape, generator=generator) * 0.1
    folder = os.path.join(config.out, "last")
    save_checkpoint(folder, model, config, step=7, results=VALID, resume={"adam": torch.zeros(3)})
    return model, config.out


def no_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_run_pushed_and_loaded_again_is_the_same_bit_for_bit(server, trained, monkeypatch):
    model, run = trained
    assert push(run, "me/adapters") == f"{server.url}/me/adapters"
    first, second = server.commits("me/adapters")
    assert first["files"] == {} and second["message"] == "MTL-LoRA adapters after 7 steps"
    assert second["files"].keys() == set(FILES)  # in one commit, and no resume.safetensors
    loaded, config = load_run("hf://me/adapters", "cpu")
    assert config.backbone.name == f"local-dir:{model.backbone.library_state and config.backbone.name[10:]}"
    for state in ("adapter_state", "head_state"):
        own, found = getattr(model, state)(), getattr(loaded, state)()
        assert own.keys() == found.keys() and all(torch.equal(own[name], found[name]) for name in own)
    batch = example_batch(model)
    with torch.no_grad():
        before, after = model(batch), loaded(batch)
    assert all(torch.equal(before[task], after[task]) for task in before)
    asked = len(server.requests)
    no_network(monkeypatch)
    again, _ = load_run("hf://me/adapters", "cpu")
    assert len(server.requests) == asked
    assert all(torch.equal(tensor, again.adapter_state()[name]) for name, tensor in loaded.adapter_state().items())
