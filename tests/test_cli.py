"""Commands as a user calls them: what they print, what they leave, and how they refuse."""

import json
import subprocess
import sys

import pytest

from vl_mtl_lora.config import dump_config


@pytest.fixture
def config_file(tiny_config, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(tiny_config(steps=2)))
    return path


def test_train_evaluate_compare_export(command, config_file, tmp_path):
    out = tmp_path / "run"
    assert command("train", config_file)[0] == 0
    code, table, _ = command("compare", out)
    assert code == 0 and "zero-shot" in table and "CIDEr" in table
    results = json.loads((out / "results.json").read_text())
    assert results["tasks"].keys() == {"retrieval", "vqa", "captioning"}
    assert results["tasks"]["vqa"].keys() >= {"zero_shot", "adapted"} and results["run"]["steps"] == 2
    assert "figure" in (out / "report.html").read_text() and (out / "report.md").is_file()
    code, lines, _ = command("evaluate", out, "--limit", "5")
    assert code == 0 and "vqa\taccuracy\t" in lines
    adapted = {tuple(line.split("\t")[:3]) for line in command("evaluate", out)[1].splitlines()}
    assert ("vqa", "accuracy", f"{results['tasks']['vqa']['adapted']['accuracy']:.2f}") in adapted
    zero_shot = {tuple(line.split("\t")[:3]) for line in command("evaluate", out, "--zero-shot")[1].splitlines()}
    assert ("vqa", "accuracy", f"{results['tasks']['vqa']['zero_shot']['accuracy']:.2f}") in zero_shot
    assert command("export", out, "--task", "vqa", "--out", tmp_path / "m.safetensors")[0] == 0
    assert command("export", out, "--task", "vqa")[0] == 0
    written = out / "merged-vqa" / "open_clip_model.safetensors"
    assert (tmp_path / "m.safetensors").read_bytes() == written.read_bytes()
    # The same again is refused, and more steps go on from where it stopped.
    assert command("train", config_file)[0] == 2
    assert command("train", config_file, "train.steps=4", "--resume")[0] == 0


def test_inspect_tells_what_is_adapted_without_weights_or_shards(command, config_file):
    code, out, _ = command("inspect", config_file, "tasks.vqa.train=nowhere.tar", "adapter.targets=[text.attn.qkv]")
    assert code == 0 and out.endswith("every adapter gets a gradient\n")
    assert "\ntext: 2 layers adapted" in out and "\n  blocks 0-1     attn.qkv         24 -> 72\n" in out


@pytest.mark.parametrize("arguments,message", [
    (["train", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
    (["train", "CONFIG", "train.stepz=3"], "train.stepz: unknown key; did you mean steps?"),
    (["train", "CONFIG", "tasks.vqa.train=nowhere.tar"], "tasks.vqa.train: no shard matches"),
    (["train", "CONFIG", "--resume"], "nothing to resume"),
    (["train", "CONFIG", "adapter.targets=[image.mpl.in]"], "did you mean image.mlp.in"),
    (["train", "CONFIG", "backbone.name=ViT-B-32"], "backbone.pretrained is missing"),
    (["export", "nowhere", "--task", "vqa", "--format", "peft"], "no checkpoint in nowhere"),
    (["train", "CONFIG", "backbone.name=ViT-B-33"], "did you mean ViT-B-32"),
    (["evaluate", "nowhere"], "no checkpoint in nowhere"),
    (["compare", "nowhere", "--split", "tset"], "did you mean test"),
    (["quickstart", "--out", "FOLDER"], "holds something else"),
    (["evaluate", "CONFIG", "--out", "nowhere/x.json"], "expected a file in a folder that exists"),
    (["evaluate", "CONFIG", "--faiss-from", "5"], "a run has it in its config: tasks.NAME.faiss_from"),
    (["evaluate", "CONFIG", "--trec", "CONFIG"], "cannot make the folder"),
    (["evaluate", "CONFIG", "--embeddings", "CONFIG"], "cannot make the folder"),
    (["evaluate", "a.npy", "b.npy"], "cannot read the embeddings a.npy"),
])
def test_user_errors_are_one_clear_line_and_exit_code_2(command, config_file, tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    known = {"CONFIG": config_file, "FOLDER": tmp_path / "full"}
    code, _, err = command(*(known.get(a, a) for a in arguments))
    assert code == 2 and err.startswith("error: ") and message in err and "Traceback" not in err
    assert (tmp_path / "full" / "mine.txt").exists()


def test_wrong_usage_is_refused_too(command):
    code, _, err = command("trian")
    assert code == 2 and "trian" in err
    assert command("train")[0] == 2


def test_module_and_help():
    done = subprocess.run([sys.executable, "-m", "vl_mtl_lora", "--help"], capture_output=True, text=True, check=True)
    for command in ("quickstart", "train", "evaluate", "compare", "export", "inspect"):
        assert command in done.stdout
