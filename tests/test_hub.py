"""The hub: what a push uploads, that a run loads from there as it was, and how both refuse. No network: the hub is a
server in the test, with the HTTP interface that huggingface_hub uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants, metadata_load

from tests.conftest import tiny_samples
from tests.hub_server import TOKEN, hub
from vl_mtl_lora import UserError, build_model, load_run, write_shards
from vl_mtl_lora.checkpoint import save_checkpoint
from vl_mtl_lora.checkpoint_files import read_description
from vl_mtl_lora.hub import FILES, downloaded, hub_address
from vl_mtl_lora.model import example_batch
from vl_mtl_lora.model_card import base_on_hub, data_sources, model_card
from vl_mtl_lora.push import push

VALID = {"tasks": {"vqa": {"accuracy": 12.5}, "captioning": {"CIDEr": 3.25}}, "split": "the valid split"}
BOTH = {"tasks": {"vqa": {"zero_shot": {"accuracy": 17.0}, "adapted": {"accuracy": 91.25},
                          "interval": {"change": {"accuracy": [70.5, 78.0]}}, "samples": 24}},
        "split": "test", "limit": 500, "run": {"checkpoint": "last", "steps": 7}, "faults": []}


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
    save_checkpoint(Path(config.out) / "last", model, config, step=7, results=VALID, resume={"adam": torch.zeros(3)})
    return model, config.out


def same_tensors(a, b):
    return all(getattr(a, state)().keys() == getattr(b, state)().keys() and
               all(torch.equal(tensor, getattr(b, state)()[name]) for name, tensor in getattr(a, state)().items())
               for state in ("adapter_state", "head_state"))


def test_a_run_pushed_and_loaded_again_is_the_same_bit_for_bit(server, trained, monkeypatch):
    model, run = trained
    assert push(run, "me/adapters") == f"{server.url}/me/adapters"
    first, second = server.commits("me/adapters")
    assert first["files"] == {} and second["message"] == "MTL-LoRA adapters after 7 steps"
    assert second["files"].keys() == set(FILES)  # in one commit, and no resume.safetensors
    loaded, _ = load_run("hf://me/adapters", "cpu")
    batch = example_batch(model)
    with torch.no_grad():
        before, after = model(batch), loaded(batch)
    assert same_tensors(model, loaded) and before.keys() == after.keys()
    assert all(torch.equal(loss, after[task]) for task, loss in before.items())
    asked = len(server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same_tensors(model, load_run("hf://me/adapters", "cpu")[0]) and len(server.requests) == asked


def test_a_branch_a_commit_and_a_private_repository(server, trained):
    model, run = trained
    assert push(run, "me/a", private=True, revision="v1.0", message="the first").endswith("/me/a/tree/v1.0")
    assert server.repos["me/a"]["private"] and len(server.commits("me/a")) == 1
    commit = server.commits("me/a", "v1.0")[-1]
    assert commit["message"] == "the first"
    for revision in ("v1.0", commit["sha"]):
        assert same_tensors(model, load_run(f"hf://me/a@{revision}", "cpu")[0])
    with pytest.raises(UserError, match="hf://me/a holds no checkpoint.*no adapter_config.json"):
        load_run("hf://me/a")  # nothing was pushed to main
    push(run, "me/open")
    with pytest.raises(UserError, match="is there already and is public"):
        push(run, "me/open", private=True)
    assert len(server.commits("me/open")) == 2


def test_no_other_file_is_downloaded(server, trained, tmp_path):
    push(trained[1], "me/a")
    others = ("pytorch_model.bin", "evil.pkl", "last/adapter_config.json", "resume.safetensors")
    server.commits("me/a")[-1]["files"] |= {name: b"x" for name in others}
    load_run("hf://me/a", "cpu")
    assert {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")} == set(FILES)
    assert not [path for _, path in server.requests if path.endswith(others)]


def test_no_path_of_this_machine_is_uploaded_but_that_of_the_base(server, trained, tiny_shards, tiny_folder, tmp_path):
    _, run = trained
    results = {**BOTH, "config": read_description(Path(run) / "last")["config"].model_dump(),
               "faults": [{"shard": str(tiny_shards / "mixed-000000.tar"), "key": "1", "reason": "broken"}]}
    (Path(run) / "results.json").write_text(json.dumps(results))
    push(run, "me/a")
    files = server.commits("me/a")[-1]["files"]
    config = json.loads(files["adapter_config.json"])["config"]
    assert config["tasks"]["vqa"]["test"] == [f"{tiny_shards.name}/mixed-*.tar"] and config["out"] == "run"
    assert json.loads(files["results.json"])["faults"][0]["shard"] == f"{tiny_shards.name}/mixed-000000.tar"
    for name in ("adapter_config.json", "results.json", "README.md"):
        assert str(tmp_path.parent) not in files[name].decode().replace(f"local-dir:{tiny_folder}", ""), name


def test_commands_take_a_run_on_the_hub(server, trained, command, tiny_shards, tmp_path, monkeypatch):
    _, run = trained
    code, out, _ = command("push", run, "me/a", "--license", "mit", "--message", "hello")
    assert code == 0 and out == f"pushed: {server.url}/me/a\n" and server.commits("me/a")[-1]["message"] == "hello"
    monkeypatch.chdir(tiny_shards.parent)  # where shards/ is found by the last two parts of its path
    code, here, _ = command("evaluate", run, "--limit", "6")
    assert (code, here) == command("evaluate", "hf://me/a", "--limit", "6")[:2]
    code, out, _ = command("compare", "hf://me/a", "--limit", "6", "--out", tmp_path / "c")
    assert code == 0 and f"report: {tmp_path}/c/me--a/report.html" in out
    results = json.loads((tmp_path / "c" / "me--a" / "results.json").read_text())
    assert results["run"]["checkpoint"] == server.commits("me/a")[-1]["sha"]
    assert command("compare", run, "--limit", "6")[0] == 0
    assert json.loads((Path(run) / "results.json").read_text())["tasks"] == results["tasks"]
    monkeypatch.setattr("vl_mtl_lora.compare.load_run", None)  # the results of both are known by now
    code, out, _ = command("compare", run, "hf://me/a", "--limit", "6", "--out", tmp_path / "c")
    assert code == 0 and (tmp_path / "c" / "comparison.html").is_file()
    monkeypatch.chdir(tmp_path)
    assert command("export", "hf://me/a", "--task", "vqa")[0] == command("export", run, "--task", "vqa")[0] == 0
    ours, theirs = (Path(folder) / "merged-vqa" / "open_clip_model.safetensors" for folder in (tmp_path, run))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_stranger_s_config_runs_no_command(server, trained, command, tmp_path):
    push(trained[1], "me/a")
    files = server.commits("me/a")[-1]["files"]
    description = json.loads(files["adapter_config.json"])
    description["config"]["data"] |= {"allow_pipe": True, "cache": str(tmp_path / "theirs")}
    for task in description["config"]["tasks"].values():
        task["test"] = [f"pipe:touch {tmp_path}/ran"]
    files["adapter_config.json"] = json.dumps(description).encode()
    code, _, err = command("evaluate", "hf://me/a")
    assert code == 2 and "shards from shell commands are refused" in err
    assert load_run("hf://me/a", "cpu")[1].data.cache == "~/.cache/vl_mtl_lora"
    assert not (tmp_path / "ran").exists() and not (tmp_path / "theirs").exists()
    snapshot = next((tmp_path / "cache").rglob("snapshots/*"))
    assert downloaded(snapshot) and not downloaded(trained[1])  # also where a folder of the cache is named itself


def one_line(result, *words):
    code, out, err = result
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


@pytest.mark.parametrize("token,repo,status,words", [
    (None, "me/a", None, ["cannot push to hf://me/a: there is no token", "hf auth login"]),
    ("hf_wrong", "me/a", None, ["the hub refuses the token", "HF_TOKEN"]),
    (TOKEN, "you/a", None, ["USER must be you or an organisation of yours"]),
    (TOKEN, "me/a", 500, ["answered 500"]),
    (TOKEN, "a", None, ["'a' is no name of a repository", "expected USER/NAME"]),
    (TOKEN, "../../x", None, ["'../../x' is no name of a repository"]),
])
def test_a_push_is_refused_in_one_line(server, trained, command, monkeypatch, token, repo, status, words):
    server.refuse = status
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    one_line(command("push", trained[1], repo), *words)
    assert not server.repos


def test_what_the_hub_finds_wrong_in_a_card_is_told(server, trained, command):
    one_line(command("push", trained[1], "me/a", "--license", "nonsense"), '"license" must be one of [mit, other]')


@pytest.mark.parametrize("address,words", [
    ("hf://me/none", ["hf://me/none cannot be loaded: the hub has no such repository", "HF_TOKEN"]),
    ("hf://me/a@v2", ["hf://me/a@v2 cannot be loaded: it has no such branch"]),
    ("hf://../../x", ["'../../x' is no name of a repository"]),
    ("hf:///etc/passwd", ["is no name of a repository"]),
    ("hf://me/a/b", ["'me/a/b' is no name of a repository"]),
    ("hf://me/a@../../refs", ["'../../refs' is no name of a branch"]),
    ("hf://me/a@", ["'' is no name of a branch"]),
])
def test_loading_is_refused_in_one_line(server, command, address, words, trained, capsys):
    push(trained[1], "me/a")
    capsys.readouterr()  # its progress
    for line in (["evaluate", address], ["compare", address], ["export", address, "--task", "vqa"]):
        one_line(command(*line), *words)


def test_without_a_hub(server, trained, command, monkeypatch):
    for url, words in ((f"{server.url}", ["HF_HUB_OFFLINE is set"]), ("http://127.0.0.1:9", ["cannot be reached"])):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", url == server.url)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        one_line(command("evaluate", "hf://me/a"), "hf://me/a cannot be loaded: it is not in the cache, and", *words)
        one_line(command("push", trained[1], "me/a"), "cannot push to hf://me/a: ", *words)
    assert not server.requests


def test_the_environment_is_honoured(trained, tmp_path):
    def call(*words, **environment):
        done = subprocess.run([sys.executable, "-m", "vl_mtl_lora", *words], capture_output=True, text=True, env={
            **os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
            **environment})
        return done.returncode, done.stdout, done.stderr

    with hub() as server:
        code, out, err = call("push", trained[1], "me/a", HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0")
        assert (code, out) == (0, f"pushed: {server.url}/me/a\n"), err
        one_line(call("export", "hf://me/a", "--task", "vqa", HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1"),
                 "HF_HUB_OFFLINE is set")


def test_files_that_lead_elsewhere_and_damaged_ones_are_not_pushed(server, trained, tmp_path):
    last = Path(trained[1]) / "last"
    secret = tmp_path / "secret"
    (last / "heads.safetensors").rename(secret)
    for make, message in ((lambda: None, "heads.safetensors is missing"),
                          (lambda: (last / "heads.safetensors").symlink_to(secret), "a link that leads elsewhere")):
        make()
        with pytest.raises(UserError, match=message):
            push(trained[1], "me/a")
    (last / "heads.safetensors").unlink()
    secret.rename(last / "heads.safetensors")
    (last / "results.json").write_text("{")
    with pytest.raises(UserError, match="results.json is damaged"):
        push(trained[1], "me/a")
    with pytest.raises(UserError, match="is on the hub already"):
        push("hf://me/a", "me/b")
    assert not server.requests


def test_a_description_without_its_parts_is_refused(tmp_path):
    for text, message in (('{"format": "vl_mtl_lora/1", "step": 1}', "tasks: expected a list, got None"),
                          ("[1]", "expected format 'vl_mtl_lora/1', got")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_run(tmp_path)


def test_addresses():
    assert hub_address("hf://a/b") == hub_address(Path("hf://a/b")) == ("a/b", None)
    assert hub_address("hf://A-1.x/b_c@refs/pr/1") == ("A-1.x/b_c", "refs/pr/1")
    assert hub_address("runs/hf:/x") is None and hub_address(Path("runs/a")) is None
    for bad in ("hf://a/..", "hf://a--b/c", "hf://a/b.git", "hf://a/b c", "hf://a", "hf://", "hf://a/" + "b" * 95,
                "hf://a/b@x..y", "hf://a/b@/etc", "hf://a/b@x@y", "hf://a/" + "_" * 90 + "!"):
        with pytest.raises(UserError, match="is no name of a"):
            hub_address(bad)


def description_of(config, **changes):
    return {"config": {**config.model_dump(), **changes}, "step": 1234, "trainable_parameters": {"image": 7, "text": 5}}


def test_the_hub_s_own_reader_understands_the_card(tiny_config, tmp_path):
    config = tiny_config()
    data = [{"task": "vqa", "split": "test", "name": "mixed", "licence": "CC BY | 4.0",
             "source": "mine: https://huggingface.co/datasets/me/shapes."}]
    description = {**description_of(config), "data": data}
    description["config"]["backbone"] = {"library": "any", "name": "org/base", "pretrained": None}
    card = model_card(description, BOTH, "me/adapters", "cc-by-4.0")
    (tmp_path / "README.md").write_text(card)
    found = metadata_load(tmp_path / "README.md")
    assert found.pop("model-index") and found == {
        "library_name": "vl_mtl_lora", "license": "cc-by-4.0", "base_model": "org/base",
        "base_model_relation": "adapter", "datasets": ["me/shapes"],
        "tags": ["mtl-lora", "lora", "multi-task", "vision-language", "retrieval", "vqa", "captioning"]}
    parsed = ModelCard(card)
    result, = parsed.data.eval_results
    assert parsed.data.model_name == "me/adapters" and (
        result.task_type, result.dataset_name, result.dataset_split, result.metric_type, result.metric_value) == (
        "visual-question-answering", "mixed", "test", "accuracy", 91.25)
    for line in ("| vqa | accuracy | 17.00 | 91.25 | +70.50 to +78.00 |", 'load_run("hf://me/adapters")',
                 "On the test split, at most 500 samples of each task. Zero-shot is the base alone.",
                 "| vqa | vqa | answers a question about a picture, one of 4: red, green, blue, yellow |",
                 "| vqa | test | mixed | mine: https://huggingface.co/datasets/me/shapes. | CC BY \\| 4.0 |",
                 "trained for 1,234 steps on 3 tasks at once", "Trainable parameters: 12 (image 7, text 5)"):
        assert line in card, line


@pytest.mark.parametrize("name", ['a: "b"\n---\nx: 1', "`|`", "'", "nan", "- [x]", "\u2028\x07\U0001f600", "{{ x }}"])
def test_the_card_is_valid_whatever_names_contain(tiny_config, tmp_path, name):
    data = [{"task": "vqa", "split": "valid", "name": name, "source": name, "licence": name}]
    description = {**description_of(tiny_config()), "data": data}
    description["config"]["backbone"] = {"library": "any", "name": name, "pretrained": name}
    description["config"]["tasks"]["vqa"]["answers"] = [name, "other"]
    card = model_card(description, {"tasks": {"vqa": {"accuracy": 1.5, "odd": float("nan")}}}, licence=name)
    (tmp_path / "README.md").write_text(card)
    found = metadata_load(tmp_path / "README.md")
    assert found["license"] == name and "base_model" not in found
    entry, = found["model-index"][0]["results"]
    assert entry["dataset"]["name"] == name
    assert [metric["value"] for metric in entry["metrics"]] == [1.5]
    assert ModelCard(card).data.eval_results[0].metric_value == 1.5
    body = card.split("\n---\n", 1)[1]
    rows = [line.replace("\\|", "") for line in body.splitlines() if line.startswith("| vqa |")]
    assert [row.count("|") for row in rows] == [4, 4, 4, 6]


def test_the_card_of_a_run_tells_its_data_and_its_last_comparison(server, tiny_config, tmp_path, trained):
    write_shards(tiny_samples(2), tmp_path, name="mine", source="drawn", licence="CC0")
    config = tiny_config()
    tasks = {name: task.model_copy(update={"train": [str(tmp_path / "mine-{000000..000001}.tar")], "valid": [],
                                           "test": ["s3://elsewhere/x-*.tar"]}) for name, task in config.tasks.items()}
    found = data_sources(config.model_copy(update={"tasks": tasks}))
    assert found == [{"task": task, "split": "train", "name": "mine", "source": "drawn", "licence": "CC0"}
                     for task in tasks]
    last = Path(trained[1]) / "last"
    assert {about["name"] for about in read_description(last)["data"]} == {"mixed"}
    assert "| vqa | accuracy | 12.50 |" in (last / "README.md").read_text()
    for steps, line in ((8, "| vqa | accuracy | 12.50 |"), (7, "| vqa | accuracy | 17.00 | 91.25 |")):  # 8: of another
        (last.parent / "results.json").write_text(json.dumps({**BOTH, "config": {}, "run": {**BOTH["run"],
                                                                                           "steps": steps}}))
        push(trained[1], "me/a")
        assert line in server.commits("me/a")[-1]["files"]["README.md"].decode()


def test_a_base_on_the_hub_is_told_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/local").mkdir(parents=True)
    assert [base_on_hub(name) for name in ("org/base", "hf-hub:org/base", "org/local", "ViT-B-32", "local-dir:/a/b")] \
        == ["org/base", "org/base", None, None, None]
