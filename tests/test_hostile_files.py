"""Checkpoints made to harm: each is refused with one clear line, nothing of it is loaded, nothing of it is run."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_open_clip import randomize
from vl_mtl_lora import UserError, build_model, load_backbone, load_run
from vl_mtl_lora.checkpoint import load_checkpoint, save_checkpoint
from vl_mtl_lora.checkpoint_files import load_resume, read_description
from vl_mtl_lora.trainer import train

ADAPTERS, HEADS, DESCRIPTION = "adapter_model.safetensors", "heads.safetensors", "adapter_config.json"
UP, DOWN = "image.0.mlp.in.up", "image.0.mlp.in.down"


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    """(folder, config) of a checkpoint as we write it."""
    config = tiny_config()
    model = build_model(config)
    randomize(model.summary)
    save_checkpoint(tmp_path / "c", model, config, step=1)
    return tmp_path / "c", config


def tensors(edit, file=ADAPTERS):
    """The tensors of a file changed."""
    def damage(folder):
        held = load_file(folder / file)
        edit(held)
        save_file(held, folder / file)
    return damage


def header(edit, data=None, file=ADAPTERS):
    """The head of a safetensors file changed, which says where each tensor lies."""
    def damage(folder):
        raw = (folder / file).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        head = edit(json.loads(raw[8:8 + length]))
        head = head if isinstance(head, bytes) else json.dumps(head).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + length:])
    return damage


def described(*path, value=None, drop=False):
    """One value of adapter_config.json replaced, or dropped."""
    def damage(folder):
        file = folder / DESCRIPTION
        data = inner = json.loads(file.read_text())
        for key in path[:-1]:
            inner = inner[key]
        if drop:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        file.write_text(json.dumps(data))
    return damage


def written(content, file=DESCRIPTION):
    return lambda folder: (folder / file).write_bytes(content)


def instead(make, file=ADAPTERS):
    """Something else in a file's place."""
    def damage(folder):
        (folder / file).unlink()
        make(folder / file)
    return damage


def larger_than_allowed(folder):
    with open(folder / DESCRIPTION, "r+b") as file:
        file.truncate(1 << 30)  # takes no room on the disk


def option(name, value):
    return described("config", "backbone", "options", value={name: value})


def placed(**place):
    return header(lambda head: head | {UP: head[UP] | place})


CASES = {
    "a wrong shape": (tensors(lambda t: t.update({UP: torch.ones(1)})), "has shape"),
    "no shape at all": (tensors(lambda t: t.update({UP: torch.tensor(1.0)})), "has shape"),
    "an empty tensor": (tensors(lambda t: t.update({DOWN: torch.ones(0, 4, 32)})), "has shape"),
    "an unknown tensor": (tensors(lambda t: t.update({"evil\n\x1b[2J.up": torch.ones(1, 3, 4, 4)})),
                          r"unknown tensors: 'evil\n"),
    "a missing tensor": (tensors(lambda t: t.pop(UP)), "tensors are missing: " + UP),
    "no tensor": (tensors(lambda t: t.clear()), "holds no tensor"),
    "a NaN": (tensors(lambda t: t[UP].view(-1)[3].fill_(float("nan"))), "no number"),
    "an infinity in a head": (tensors(lambda t: t["retrieval.log_scale"].fill_(float("inf")), HEADS), "no number"),
    "integers": (tensors(lambda t: t.update({UP: t[UP].long()})), "type I64, expected F32"),
    "half precision": (tensors(lambda t: t.update({UP: t[UP].half()})), "type F16, expected F32"),
    "a head of another shape": (tensors(lambda t: t.update({"retrieval.log_scale": torch.ones(3)}), HEADS),
                                "has shape"),
    "a truncated file": (lambda f: os.truncate(f / ADAPTERS, (f / ADAPTERS).stat().st_size - 9), "cannot read"),
    "a truncated head": (lambda f: os.truncate(f / HEADS, 20), "cannot read"),
    "an empty file": (lambda f: os.truncate(f / ADAPTERS, 0), "cannot read"),
    "a head of 2^60 bytes": (lambda f: (f / ADAPTERS).write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "cannot read"),
    "a head that is no JSON": (header(lambda head: b"{" * 1000), "cannot read"),
    "a head of deep JSON": (header(lambda head: b'{"x":' + b"[" * 100_000), "cannot read"),
    "exabytes": (placed(shape=[1 << 20, 1 << 20, 1 << 20], data_offsets=[0, 1 << 62]), "cannot read"),
    "more elements than an integer counts": (placed(shape=[1 << 62, 1 << 62]), "cannot read"),
    "overlapping tensors": (header(lambda head: head | {UP: head[UP] | {"data_offsets": head[DOWN]["data_offsets"]}}),
                            "cannot read"),
    "offsets backwards": (placed(data_offsets=[400, 0]), "cannot read"),
    "negative offsets": (placed(data_offsets=[-8, 8]), "cannot read"),
    "a tensor twice": (header(lambda head: json.dumps(head).encode()[:-1] + b", "
                              + json.dumps({UP: head[DOWN]}).encode()[1:]), "cannot read"),
    "a folder for tensors": (instead(lambda path: path.mkdir()), "no plain file"),
    "a pipe for tensors": (instead(os.mkfifo), "no plain file"),
    "a link to a device": (instead(lambda path: path.symlink_to("/dev/zero")), "no plain file"),
    "a link to nothing": (instead(lambda path: path.symlink_to("nowhere")), "cannot read"),
    "a link to itself": (instead(lambda path: path.symlink_to(path)), "cannot read"),
    "a folder for a description": (instead(lambda path: path.mkdir(), DESCRIPTION), "no checkpoint"),
    "a link from a description to a device": (instead(lambda path: path.symlink_to("/dev/zero"), DESCRIPTION),
                                              "no checkpoint"),
    "a gigabyte of description": (larger_than_allowed, "larger than 64 MiB"),
    "no JSON": (written(b"{"), "cannot read"),
    "no Unicode": (written(b'{"format": "\xff"}'), "cannot read"),
    "half a surrogate": (described("base", value="\ud800"), "cannot read"),
    "a list": (written(b"[1, 2]"), "expected format"),
    "a number": (written(b"7"), "expected format"),
    "a format that is no text": (described("format", value=["vl_mtl_lora/1"]), "expected format"),
    "another format": (described("format", value="vl_mtl_lora/99"), "expected format"),
    "deep nesting": (written(b'{"format": ' + b"[" * 1_000_000), "cannot read"),
    "deep nesting in an option": (lambda f: described("config", "backbone", "options", value={"dtype": "X"})(f) or (
        f / DESCRIPTION).write_text((f / DESCRIPTION).read_text().replace('"X"', "[" * 600 + "]" * 600)), "dtype"),
    "a NaN in the description": (described("config", "adapter", "alpha", value=float("nan")), "NaN is no number"),
    "a number of 100,000 digits": (lambda f: (f / DESCRIPTION).write_text(
        (f / DESCRIPTION).read_text().replace('"step": 1', '"step": ' + "9" * 100_000)), "cannot read"),
    "a negative step": (described("step", value=-1), "step"),
    "a step that is a text": (described("step", value="1"), "step: expected a number"),
    "tasks that are no list": (described("tasks", value={"retrieval": 0}), "tasks: expected a list"),
    "tasks in another order": (described("tasks", value=["vqa", "retrieval", "captioning"]), "its tasks are"),
    "another base": (described("base", value="0" * 16), "another base"),
    "no base": (described("base", drop=True), "base: expected a text"),
    "no config": (described("config", drop=True), "config: expected a mapping"),
    "a config that is a list": (described("config", value=[]), "config: expected a mapping"),
    "tasks of the config that are a list": (described("config", "tasks", value=[1]), "tasks"),
    "no backbone": (described("config", "backbone", drop=True), "backbone: missing"),
    "a huge rank": (described("config", "adapter", "rank", value=10**9), "does not fit rank 1000000000"),
    "very many up-projections": (described("config", "adapter", "num_up", value=10**12), "does not fit"),
    "a negative temperature": (described("config", "adapter", "temperature", value=-1.0), "temperature"),
    "a rank that is a text": (described("config", "adapter", "rank", value="4"), "rank"),
    "an unknown key": (described("config", "shell", value="true"), "unknown key"),
    "a task named as a path": (described("config", "tasks", value={"../../x": {"kind": "retrieval", "train": ["x"]}}),
                               "should match pattern"),
    "a task named as a root": (described("config", "tasks", value={"/etc": {"kind": "retrieval", "train": ["x"]}}),
                               "should match pattern"),
    "answers in a file": (described("config", "tasks", "vqa", "answers", value="/etc/passwd"), "names no files"),
    "labels in a file, held out": (described("config", "held_out", value={"x": {
        "kind": "classification", "test": ["x"], "labels": "/etc/passwd"}}), "names no files"),
    "a prompt that reaches into objects": (described("config", "tasks", "vqa", "prompt", value="{question.__class__}"),
                                           "prompt"),
    "a library that is a file": (described("config", "backbone", "library", value="/tmp/evil.py"), "unknown library"),
    "code that comes with the model": (option("trust_remote_code", True), "knows no option"),
    "pickles": (option("weights_only", False), "knows no option"),
    "pictures that fill the memory": (option("image_size", 1_000_000), "image_size"),
    "a grid that fills the memory": (option("prefix_grid", 10**9), "prefix_grid"),
    "an option of a wrong type": (option("dtype", ["float32"]), "dtype"),
    "a base that is not there": (described("config", "backbone", "name", value="local-dir:../../nowhere"),
                                 "could not load"),
}

OF_THE_BASE = ("a library that is a file", "code that comes with the model", "pickles", "pictures that fill the memory",
               "a grid that fills the memory", "an option of a wrong type", "a base that is not there",
               "deep nesting in an option")


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_checkpoint_is_refused_and_nothing_of_it_is_loaded(checkpoint, case):
    (folder, config), (damage, message) = checkpoint, CASES[case]
    damage(folder)
    with pytest.raises(UserError) as refused:
        load_run(folder)
    line = str(refused.value)
    assert message in line and len(line) < 1000 and line.isprintable()
    model = build_model(config)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    if case in OF_THE_BASE:  # here it is ours
        load_checkpoint(folder, model)
        return
    with pytest.raises(UserError):
        load_checkpoint(folder, model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("case", ["a head of 2^60 bytes", "a list", "a huge rank", "answers in a file", "a NaN",
                                  "a folder for a description"])
@pytest.mark.parametrize("name", ["evaluate", "compare", "export", "tasks"])
def test_a_command_on_a_hostile_checkpoint_tells_one_line(command, checkpoint, case, name):
    folder, _ = checkpoint
    CASES[case][0](folder)
    more = {"export": ["--task", "vqa"]}.get(name, [])
    words = ["tasks", "list", folder] if name == "tasks" else [name, folder, *more]
    code, _, err = command(*words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def test_no_secret_of_a_named_file_is_told(checkpoint, tmp_path):
    folder, _ = checkpoint
    (tmp_path / "secret").write_text("first\npassword\n")
    described("config", "tasks", "vqa", "answers", value=str(tmp_path / "secret"))(folder)
    with pytest.raises(UserError) as refused:
        read_description(folder)
    assert "password" not in str(refused.value)


@pytest.mark.parametrize("edit,message", [
    (lambda t: t.pop("random.torch.0"), "missing: random.torch.0"),
    (lambda t: t.update({"random.torch.0": torch.zeros(3, dtype=torch.uint8)}), "has shape"),
    (lambda t: t.update({f"adam.exp_avg.{UP}": torch.ones(1)}), "has shape"),
    (lambda t: t[f"adam.exp_avg_sq.{UP}"].fill_(float("nan")), "no number"),
    (lambda t: t.pop(f"adam.step.{UP}"), "missing"),
    (lambda t: t.update({"adam.exp_avg.x": torch.ones(1)}), "unknown"),
    (lambda t: t.update({"data.sizes": torch.ones(4)}), "type F32, expected I64"),
])
def test_a_hostile_state_to_resume_from_is_refused(tiny_config, edit, message):
    config = tiny_config(steps=1)
    train(config)
    folder = f"{config.out}/last"
    held = load_file(f"{folder}/resume.safetensors")
    edit(held)
    save_file(held, f"{folder}/resume.safetensors")
    with pytest.raises(UserError, match=f"cannot be resumed: .*{message}"):
        train(config, resume=True)
    os.remove(f"{folder}/resume.safetensors")
    with pytest.raises(UserError, match="cannot be resumed"):
        load_resume(folder, {})


def test_a_checkpoint_s_shell_commands_run_only_where_that_is_allowed(command, checkpoint, tmp_path):
    folder, _ = checkpoint
    described("config", "data", "allow_pipe", value=True)(folder)
    described("config", "tasks", "vqa", "test", value=[f"pipe:touch {tmp_path}/ran"])(folder)
    described("config", "data", "cache", value=str(tmp_path / "cache"))(folder)
    for name in ("evaluate", "compare"):
        code, _, err = command(name, folder)
        assert code == 2 and "shell commands are refused" in err and "--allow-pipe" in err
    assert not (tmp_path / "ran").exists()
    assert load_run(folder, allow_pipe=True)[1].data.allow_pipe


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_of_weights_runs_nothing(tmp_path, tiny_folder):
    torch.save({"state_dict": {"x": Evil(tmp_path / "ran")}}, tmp_path / "weights.pt")
    for name in ("ViT-B-32", f"local-dir:{tiny_folder}"):
        with pytest.raises(UserError, match="could not load"):
            load_backbone("open_clip", name, str(tmp_path / "weights.pt"))
    assert not (tmp_path / "ran").exists()


def test_a_base_whose_folder_brings_code_is_refused(tmp_path, tiny_folder):
    config = json.loads((tiny_folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="trust_remote_code"):
        load_backbone("open_clip", f"local-dir:{tmp_path}", random_weights=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}))
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Config: pass\n")
    with pytest.raises(UserError, match="custom code"):
        load_backbone("transformers", str(tmp_path))
    assert not (tmp_path / "ran").exists()
