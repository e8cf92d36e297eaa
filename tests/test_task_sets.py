"""Tasks that join a trained adapter, leave it, are renamed, and sets of them that become one."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.test_training import losses_of
from vl_mtl_lora import UserError, load_run, parse_config
from vl_mtl_lora.checkpoint_files import find_checkpoint
from vl_mtl_lora.config import dump_config, load_config
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.evaluate import evaluate_tasks, evaluation_indices
from vl_mtl_lora.model import example_batch
from vl_mtl_lora.task_sets import describe, merge_tasks, remove_task, rename_task
from vl_mtl_lora.trainer import train

NEW = {"colour": {"kind": "vqa", "tag": "vqa", "rows": 4, "answers": ["red", "green", "blue", "yellow"],
                  "answer_by": "classification"}}


def with_tasks(config, out, names, new=None, start=None, **train_section):
    """A config with some of its tasks and new ones, whose shards are those of the others."""
    data = config.model_dump()
    shards = {split: data["tasks"]["vqa"][split] for split in ("train", "valid", "test")}
    tasks = {name: data["tasks"][name] for name in names}
    data |= {"out": str(out), "tasks": tasks | {name: task | shards for name, task in (new or {}).items()},
             "start": start or {}, "train": data["train"] | train_section}
    tags = {section.get("tag") or name for name, section in data["tasks"].items()}
    data["data"]["ignore_tasks"] = sorted({"retrieval", "vqa", "captioning"} - tags)
    return parse_config(data)


@pytest.fixture(scope="module")
def base_run(tmp_path_factory, tiny_folder, tiny_shards):
    """(config, folder) of a run with the tasks retrieval and captioning, whose weights training has made."""
    from tests.conftest import tiny_config

    folder = tmp_path_factory.mktemp("base")
    config = tiny_config.__wrapped__(tiny_folder, tiny_shards, folder)(steps=3, lr=0.05, warmup=0)
    train(with_tasks(config, folder / "run", ["retrieval", "captioning"]))
    return config, folder / "run"


def outputs(run, tasks):
    """What the model of a run computes through each of some tasks, and the metrics of these on the test shards."""
    model, config = load_run(run)
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 32)
    tokens = model.backbone.tokenize(["a red circle", "blue", "what is it?"])
    found = {}
    with torch.no_grad():
        for task in tasks:
            with model.router.use(task):
                states = model.backbone.image_states(images)
                found[task] = [model.backbone.encode_image(images), model.backbone.encode_text(tokens),
                               model.backbone.token_logits(states, tokens)]
    metrics = evaluate_tasks(model, evaluation_indices(config, "test", FaultLog()))
    return found, {task: dict(metrics[task]) for task in tasks}


def assert_same(before, after, names=None):
    (tensors, metrics), (new_tensors, new_metrics) = before, after
    names = names or {name: name for name in tensors}
    for old, new in names.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors[old], new_tensors[new], strict=True)), old
        assert metrics[old] == new_metrics[new]


def parts(run, task, tasks):
    """The rows and the head that are a task's own, and what all share, of the files."""
    folder = find_checkpoint(run)
    adapters, heads = (load_file(folder / f"{name}.safetensors") for name in ("adapter_model", "heads"))
    own = {name: t[:, tasks.index(task)] for name, t in adapters.items() if name.endswith((".transform", ".mix"))}
    own |= {name: t for name, t in heads.items() if name.startswith(f"{task}.")}
    return own, {name: t for name, t in adapters.items() if name.endswith((".down", ".up"))}


def test_a_new_task_learns_and_every_bit_of_the_old_ones_stays(base_run, tmp_path):
    config, old = base_run
    before = outputs(old, ["retrieval", "captioning"])
    new = with_tasks(config, tmp_path / "new", [], NEW, {"run": str(old)}, steps=12, lr=0.05, weight_decay=0.5,
                     save_every=3)
    losses = losses_of(new)
    assert all(step.keys() == {"colour"} for step in losses.values())  # batches without the old tasks
    assert sum(losses[s]["colour"] for s in (10, 11, 12)) < 0.9 * sum(losses[s]["colour"] for s in (1, 2, 3))
    tasks = ["retrieval", "captioning", "colour"]
    assert json.loads((tmp_path / "new" / "best" / "adapter_config.json").read_text())["tasks"] == tasks
    assert list(load_config(tmp_path / "new" / "config.yaml").tasks) == tasks
    assert_same(before, outputs(tmp_path / "new", ["retrieval", "captioning"]))
    for checkpoint in ("best", "last"):
        for task in ("retrieval", "captioning"):
            own, shared = parts(old, task, tasks[:2])
            own_after, shared_after = parts(tmp_path / "new" / checkpoint, task, tasks)
            assert own.keys() == own_after.keys() and all(torch.equal(own[name], own_after[name]) for name in own)
            assert shared.keys() == shared_after.keys() and len(shared) > 20
            assert all(torch.equal(shared[name], shared_after[name]) for name in shared)
    moved, _ = parts(tmp_path / "new", "colour", tasks)
    eye = torch.eye(4)
    assert all((t != eye).any() for name, t in moved.items() if name.endswith("mlp.in.transform"))


def test_adding_resumes_with_the_losses_of_an_uninterrupted_run(base_run, tmp_path):
    config, old = base_run
    start = {"run": str(old)}
    straight = losses_of(with_tasks(config, tmp_path / "a", ["captioning"], NEW, start, steps=6, save_every=3))
    broken = with_tasks(config, tmp_path / "b", ["captioning"], NEW, start, steps=6, save_every=3)

    def interrupt(step, *_):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(UserError, match="stopped at step 3"):
        train(broken, on_step=interrupt)
    assert losses_of(load_config(tmp_path / "b" / "config.yaml"), resume=True) == {s: straight[s] for s in (4, 5, 6)}


def test_a_layer_that_no_old_task_reads_trains_whole(base_run, tmp_path):
    config, _ = base_run
    train(with_tasks(config, tmp_path / "old", ["retrieval"], steps=1))
    assert "image.projector.up" not in parts(tmp_path / "old", "retrieval", ["retrieval"])[1]
    before = outputs_of_retrieval(tmp_path / "old")
    new = with_tasks(config, tmp_path / "new", ["captioning"], None, {"run": str(tmp_path / "old")}, steps=3)
    train(new)
    model, _ = load_run(tmp_path / "new")
    assert model.summary.layers["image.projector"].up.any()
    assert all(torch.equal(a, b) for a, b in zip(before, outputs_of_retrieval(tmp_path / "new")))


def outputs_of_retrieval(run):
    model, _ = load_run(run)
    torch.manual_seed(0)
    with torch.no_grad(), model.router.use("retrieval"):
        tokens = model.backbone.tokenize(["a red circle"])
        return [model.backbone.encode_image(torch.randn(3, 3, 32, 32)), model.backbone.encode_text(tokens),
                model.tasks["retrieval"].log_scale]


def test_rehearsal_starts_from_the_adapter_and_trains_all_of_it(base_run, tmp_path):
    config, old = base_run
    new = with_tasks(config, tmp_path / "new", ["retrieval", "captioning"], NEW, {"run": str(old), "rehearse": True},
                     steps=1, lr=1e-9, warmup=0)
    assert losses_of(new)[1].keys() == {"retrieval", "captioning", "colour"}
    shared, after = (parts(run, "retrieval", ["retrieval", "captioning"])[1] for run in (old, tmp_path / "new"))
    for name in shared:
        torch.testing.assert_close(after[name], shared[name], atol=1e-6, rtol=0)
    assert any(not torch.equal(after[name], shared[name]) for name in shared)


@pytest.mark.parametrize("change,message", [
    ({}, "every task of the config is one of"),
    ({"alpha": 9.0}, "alpha 8.0, the model's 9.0"),
    ({"targets": ["image"]}, "adapter.targets are"),
])
def test_an_adapter_that_does_not_fit_is_refused(base_run, tmp_path, change, message):
    config, old = base_run
    new = with_tasks(config, tmp_path / "new", ["captioning"], NEW if change else None, {"run": str(old)}, steps=1)
    new = new.model_copy(update={"adapter": new.adapter.model_copy(update=change)})
    with pytest.raises(UserError, match=message):
        train(new)
    assert not (tmp_path / "new").exists()


def test_an_old_task_cannot_become_another(base_run, tmp_path):
    config, old = base_run
    new = with_tasks(config, tmp_path / "new", ["captioning"], NEW, {"run": str(old)})
    other = new.tasks["captioning"].model_copy(update={"prompt": "look:"})
    with pytest.raises(UserError, match="tasks.captioning.prompt differs"):
        train(new.model_copy(update={"tasks": {**new.tasks, "captioning": other}}))


def test_the_remaining_tasks_of_a_smaller_set_compute_the_same(base_run, tmp_path):
    _, old = base_run
    before = outputs(old, ["retrieval", "captioning"])
    remove_task(old, "retrieval", tmp_path / "one")
    assert_same(before, outputs(tmp_path / "one", ["captioning"]), {"captioning": "captioning"})
    assert load_file(tmp_path / "one" / "best" / "heads.safetensors").keys() == set()
    card = (tmp_path / "one" / "best" / "README.md").read_text()
    assert "| captioning | captioning |" in card and "| retrieval |" not in card
    remove_task(old, "captioning", tmp_path / "other")  # nothing reads the projector any more
    assert "image.projector" not in load_run(tmp_path / "other")[0].summary.layers
    with pytest.raises(UserError, match="the only task"):
        remove_task(tmp_path / "one", "captioning", tmp_path / "none")
    with pytest.raises(UserError, match="did you mean captioning"):
        remove_task(old, "captionig", tmp_path / "none")
    with pytest.raises(UserError, match="already there"):
        remove_task(old, "captioning", tmp_path / "one")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other"]


def test_a_renamed_task_computes_and_reads_the_same(base_run, tmp_path):
    _, old = base_run
    before = outputs(old, ["retrieval", "captioning"])
    rename_task(old, "retrieval", "search", tmp_path / "new")
    assert_same(before, outputs(tmp_path / "new", ["search", "captioning"]),
                {"retrieval": "search", "captioning": "captioning"})
    refused = {"captioning": "already has", "../../x": "should match pattern", "type": "cannot be used"}
    for name, message in refused.items():
        with pytest.raises(UserError, match=message):
            rename_task(old, "retrieval", name, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_two_runs_added_to_one_adapter_merge_without_a_change(base_run, tmp_path):
    config, old = base_run
    for name, new in (("a", NEW), ("b", {"what": {**NEW["colour"], "answer_by": "ranking"}})):
        train(with_tasks(config, tmp_path / name, [], new, {"run": str(old)}, steps=2, lr=0.05, warmup=0))
    merge_tasks([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert [row[1] for row in describe(tmp_path / "all")] == ["retrieval", "captioning", "colour", "what"]
    for name, tasks in (("a", ["retrieval", "captioning", "colour"]), ("b", ["captioning", "what"])):
        assert_same(outputs(tmp_path / name, tasks), outputs(tmp_path / "all", tasks))
    train(with_tasks(config, tmp_path / "c", [], NEW, {"run": str(old)}, steps=1, seed=5, lr=0.05))
    with pytest.raises(UserError, match="different tasks of the name colour: rename one first"):
        merge_tasks([tmp_path / "a", tmp_path / "c"], tmp_path / "no")
    rename_task(tmp_path / "c", "colour", "hue", tmp_path / "d")
    merge_tasks([tmp_path / "a", tmp_path / "d"], tmp_path / "five")
    assert_same(outputs(tmp_path / "c", ["colour"]), outputs(tmp_path / "five", ["hue"]), {"colour": "hue"})
    train(with_tasks(config, tmp_path / "e", [], NEW, {"run": str(old), "rehearse": True}, steps=1))
    with pytest.raises(UserError, match="what their tasks share differs"):
        merge_tasks([tmp_path / "a", tmp_path / "e"], tmp_path / "no")


def test_the_commands(command, base_run, tmp_path):
    config, old = base_run
    (tmp_path / "new.yaml").write_text(dump_config(with_tasks(config, tmp_path / "new", [], NEW)))
    code, out, err = command("tasks", "add", old, tmp_path / "new.yaml", "train.steps=1")
    assert code == 0 and str(tmp_path / "new") in out, err
    assert command("tasks", "add", old, tmp_path / "new.yaml", "train.steps=2", "--resume")[0] == 0
    code, out, _ = command("tasks", "list", tmp_path / "new")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[:3] for row in rows] == [["0", "retrieval", "retrieval"], ["1", "captioning", "captioning"],
                                         ["2", "colour", "vqa"]]
    model, _ = load_run(tmp_path / "new")
    numbers = sum(layer.transform[:, 2].numel() + layer.mix[:, 2].numel() for layer in model.summary.layers.values())
    assert int(rows[2][3]) == numbers + sum(p.numel() for p in model.tasks["colour"].parameters())
    assert command("tasks", "rename", tmp_path / "new", "colour", "hue", "--out", tmp_path / "hue")[0] == 0
    assert command("tasks", "merge", old, tmp_path / "hue", "--out", tmp_path / "all")[0] == 0
    assert command("tasks", "remove", tmp_path / "all", "hue", "--out", tmp_path / "less")[0] == 0
    code, _, err = command("tasks", "remove", tmp_path / "less", "hue", "--out", tmp_path / "x")
    assert code == 2 and err.startswith("error: ") and "has no task 'hue'" in err
    assert example_batch(load_run(tmp_path / "less")[0]).slices.keys() == {"retrieval", "captioning"}


def test_the_old_tasks_need_no_shards(base_run, tmp_path):
    config, old = base_run
    shutil.copytree(old, tmp_path / "old")
    for file in (tmp_path / "old").glob("*/adapter_config.json"):
        file.write_text(file.read_text().replace(config.tasks["vqa"].train[0], "/nowhere.tar"))
    new = with_tasks(config, tmp_path / "new", [], NEW, {"run": str(tmp_path / "old")}, steps=1)
    assert losses_of(new)[1].keys() == {"colour"}
