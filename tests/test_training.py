"""Training, resuming, saving and loading on the tiny model."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import tiny_samples
from tests.test_open_clip import randomize
from vl_mtl_lora import UserError, build_model, load_run, parse_config, write_shards
from vl_mtl_lora.checkpoint import load_checkpoint, save_checkpoint
from vl_mtl_lora.config import dump_config
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import build_indices
from vl_mtl_lora.data.stream import train_batches
from vl_mtl_lora.evaluate import evaluate_tasks
from vl_mtl_lora.lora import MTLLoRALinear
from vl_mtl_lora.model import check_gradients, checkpoint_blocks, example_batch
from vl_mtl_lora.routing import TaskRouter
from vl_mtl_lora.trainer import build_optimizer, build_stream, learning_rate_factor, train


def losses_of(config, resume=False):
    seen = {}
    train(config, resume=resume, on_step=lambda step, losses: seen.update({step: losses}))
    return seen


def with_steps(config, **train_section):
    return config.model_copy(update={"train": config.train.model_copy(update=train_section)})


def changed(config, **sections):
    """The configuration with other values in some sections."""
    data = config.model_dump()
    for name, values in sections.items():
        data[name] = {key: {**data[name].get(key, {}), **value} if isinstance(value, dict) else value
                      for key, value in {**data[name], **values}.items()}
    return parse_config(data)


def first_batch(config, model):
    return next(train_batches(build_stream(config, model, build_indices(config, "train", FaultLog())), 0))


def total_gradients(model, batch):
    model.zero_grad()
    sum(model(batch).values()).backward()
    return {name: p.grad.clone() for name, p in {**model.adapter_state(), **model.head_state()}.items()
            if p.grad is not None}


def test_training_lowers_every_loss_and_leaves_the_base_alone(tiny_config):
    config = tiny_config(steps=160, log_every=20)
    before = {n: p.clone() for n, p in build_model(config).backbone.library_state().items()}
    losses = losses_of(config)
    for task in config.tasks:
        start, end = (sum(losses[s][task] for s in steps) / 5 for steps in (range(1, 6), range(156, 161)))
        assert end < start
    model, _ = load_run(config.out)
    after = model.backbone.library_state()
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    with open(f"{config.out}/log.jsonl") as log:
        entries = [json.loads(line) for line in log]
    assert {"loss/vqa", "lr", "grad_norm", "samples_per_second", "data_wait", "epoch/vqa"} <= entries[0].keys()
    assert any("valid/vqa/accuracy" in entry for entry in entries)


@pytest.mark.parametrize("dropout,accumulate,workers", [(0.0, 1, 0), (0.2, 2, 0), (0.2, 1, 2)])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tiny_config, tmp_path, dropout, accumulate, workers):
    config = tiny_config(steps=6, save_every=3, accumulate=accumulate)
    config = config.model_copy(update={"adapter": config.adapter.model_copy(update={"dropout": dropout}),
                                       "data": config.data.model_copy(update={"workers": workers})})
    straight = losses_of(config)
    broken = config.model_copy(update={"out": str(tmp_path / "broken")})

    class Stop(Exception):
        pass

    def stop(step, *_):
        if step == 5:  # two steps after the last save
            raise Stop

    with pytest.raises(Stop):
        train(broken, on_step=stop)
    resumed = losses_of(broken, resume=True)
    assert resumed.keys() == {4, 5, 6}
    assert all(resumed[step] == straight[step] for step in resumed)
    with open(f"{broken.out}/log.jsonl") as log:
        steps = [json.loads(line)["step"] for line in log if "lr" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("step,workers", [(4, 0), (random.Random(0).randrange(2, 30), 2)])
def test_a_killed_run_resumes_with_the_losses_and_samples_of_an_uninterrupted_one(tiny_config, tmp_path, step, workers):
    config = changed(tiny_config(steps=60, save_every=3, eval_every=7), data={"workers": workers})
    straight = {}
    told(config, straight)
    killed = config.model_copy(update={"out": str(tmp_path / "killed")})
    (tmp_path / "config.yaml").write_text(dump_config(killed))
    steps = tmp_path / "steps"
    # With as many threads as here: sums of another number of parts round in another way.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "config.yaml", steps], stderr=subprocess.DEVNULL,
                             env={**os.environ, **threads})
    while not steps.exists() or steps.read_text().count("\n") < step:  # killed wherever it then is
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    seen = {}
    for line in filter(str.strip, steps.read_text().rpartition("\n")[0].split("\n")):
        number, losses, keys = json.loads(line)
        seen[number] = losses, keys
    before = len(seen)
    assert step <= before < 60 and all(seen[s] == straight[s] for s in seen)
    again = {}
    told(killed, again, resume=True)
    assert min(again) > before - 3 and again == {s: straight[s] for s in again}
    assert seen.keys() | again.keys() == straight.keys()
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "lr" in entry] == list(range(1, 61))


def told(config, seen, **options):
    """Trains; `seen` gets {step: (losses, keys of the samples)}."""
    keys = []
    train(config, on_batch=lambda batch: keys.append(batch.keys),
          on_step=lambda step, losses: seen.update({step: (losses, keys[-1])}), **options)


KILLED = """
import json, sys
from vl_mtl_lora import load_config
from vl_mtl_lora.trainer import train
keys = []
with open(sys.argv[2], "w", buffering=1) as steps:
    train(load_config(sys.argv[1]), on_batch=lambda batch: keys.append(batch.keys),
          on_step=lambda step, losses: print(json.dumps([step, losses, keys[-1]]), file=steps))
"""


def test_batches_of_one_task_each_train_and_resume(tiny_config, tmp_path):
    config = changed(tiny_config(steps=12), data={"mixing": {"turns": True}})
    whole = losses_of(config)
    assert all(len(losses) == 1 for losses in whole.values())
    assert {name for losses in whole.values() for name in losses} == set(config.tasks)
    log = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    for entry in log:  # of every step: the loss of the task that it had
        if "lr" in entry:
            losses = whole[entry["step"]]
            assert {name: entry[f"loss/{name}"] for name in losses} == pytest.approx(losses)
    parts = config.model_copy(update={"out": str(tmp_path / "parts")})
    first = losses_of(with_steps(parts, steps=5))
    rest = losses_of(parts, resume=True)
    assert {**first, **rest}.keys() == whole.keys()
    assert [set(losses) for losses in {**first, **rest}.values()] == [set(losses) for losses in whole.values()]


def test_a_checkpoint_killed_between_two_renames_is_put_back(tiny_config):
    config = tiny_config(steps=3)
    train(config)
    last = Path(config.out) / "last"
    last.rename(last.with_name("last.old"))
    assert losses_of(with_steps(config, steps=4), resume=True).keys() == {4}


def test_a_resume_that_would_shift_the_stream_or_the_formula_is_refused(tiny_config):
    config = tiny_config(steps=2)
    train(config)
    changes = {"train.seed was 0": {"train": config.train.model_copy(update={"seed": 1})},
               "data.shuffle was 10": {"data": config.data.model_copy(update={"shuffle": 3})},
               "adapters have alpha 8": {"adapter": config.adapter.model_copy(update={"alpha": 9.0})}}
    for message, change in changes.items():
        with pytest.raises(UserError, match=message):
            train(config.model_copy(update=change), resume=True)


def test_a_resume_with_another_shard_is_refused(tiny_config, tmp_path):
    write_shards(tiny_samples(8), tmp_path, name="a")
    config = tiny_config(steps=2)
    config = changed(config, tasks={name: {"train": [str(tmp_path / "*-*.tar")]} for name in config.tasks})
    train(config)
    write_shards(tiny_samples(8), tmp_path, name="b")
    with pytest.raises(UserError, match="the train shards hold other samples"):
        train(with_steps(config, steps=4), resume=True)


def test_periodic_evaluation_is_logged_and_chooses_the_best(tiny_config):
    config = tiny_config(steps=4, eval_every=2)
    train(config)
    with open(f"{config.out}/log.jsonl") as log:
        scores = {e["step"]: e["valid/score"] for e in map(json.loads, log) if "valid/score" in e}
    assert scores.keys() == {2, 4}
    with open(f"{config.out}/best/results.json") as best:
        assert json.load(best)["primary_score"] == max(scores.values())


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_config):
    config = tiny_config(steps=6)

    def interrupt(step, *_):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(UserError, match="stopped at step 3.*config.yaml --resume"):  # the step under way is done whole
        train(config, on_step=interrupt)
    assert losses_of(config, resume=True).keys() == {4, 5, 6}


def test_a_run_that_broke_off_before_its_first_save_starts_anew(tiny_config):
    config = tiny_config(steps=2)

    def fail(step, *_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(config, on_step=fail)
    assert losses_of(config).keys() == {1, 2}


def test_a_folder_with_a_run_is_not_overwritten(tiny_config):
    config = tiny_config(steps=1)
    train(config)
    with pytest.raises(UserError, match="already holds a run"):
        train(config)


def test_resume_without_a_run_is_an_error(tiny_config):
    with pytest.raises(UserError, match="nothing to resume"):
        train(tiny_config(), resume=True)


def test_a_loss_that_is_no_number_ends_the_run(tiny_config):
    with pytest.raises(UserError, match="the gradient is (nan|inf).*lower train.lr"):
        train(tiny_config(steps=30, lr=1e30, clip=1e30, warmup=0))


def test_checkpointing_gives_the_same_gradients_with_nested_routes(tiny_config):
    config = tiny_config()
    plain, again = build_model(config), build_model(config)
    for model in (plain, again):
        torch.manual_seed(0)
        randomize(model.summary)
    again.load_state_dict(plain.state_dict())
    checkpoint_blocks(again)
    again = copy.deepcopy(again)  # a copy checkpoints its own blocks
    batch = first_batch(config, plain)
    expected = total_gradients(plain, batch)
    with again.router.use("captioning"):  # an outer route that the blocks must not see when they run again
        got = total_gradients(again, batch)
    assert expected.keys() == got.keys() and len(got) > 50
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_mixed_batch_gives_each_task_the_gradient_of_its_rows_alone(tiny_config):
    config = tiny_config()
    model = build_model(config)
    randomize(model.summary)
    batch = first_batch(config, model)
    model.zero_grad()
    model(batch)["vqa"].backward()
    vqa = model.router.index("vqa")
    for name, p in model.adapter_state().items():
        if name.endswith((".transform", ".mix")):
            others = [t for t in range(3) if t != vqa]
            assert not p.grad[:, others].any(), name
    alone = model.tasks["vqa"]
    rows = batch.slices["vqa"]
    mixed = {n: p.grad.clone() for n, p in model.adapter_state().items()}
    model.zero_grad()
    with model.router.use("vqa"):
        states = model.backbone.image_states(batch.images[rows])
        alone.loss(model.backbone, states, batch.inputs["vqa"]).backward()
    for name, p in model.adapter_state().items():
        torch.testing.assert_close(mixed[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_save_and_load_give_equal_outputs(tiny_config, tmp_path):
    config = tiny_config()
    model = build_model(config).eval()
    randomize(model.summary)
    save_checkpoint(tmp_path / "c", model, config, step=3)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "heads.safetensors", "results.json"]
    loaded, _ = load_run(tmp_path / "c")
    images, ids = torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 1])
    with torch.no_grad(), model.router.use(ids), loaded.router.use(ids):
        assert torch.equal(model.backbone.encode_image(images), loaded.backbone.encode_image(images))
    assert model.adapter_state().keys() == load_file(tmp_path / "c" / "adapter_model.safetensors").keys()


def test_damaged_checkpoints_are_refused_whole(tiny_config, tmp_path):
    config = tiny_config()
    model = build_model(config)
    folder = tmp_path / "c"

    def damaged(change, message):
        save_checkpoint(folder, model, config, step=0)
        change()
        fresh = build_model(config)
        before = {n: p.clone() for n, p in fresh.adapter_state().items()}
        with pytest.raises(UserError, match=message):
            load_checkpoint(folder, fresh)
        assert all(torch.equal(p, before[n]) for n, p in fresh.adapter_state().items())

    file = folder / "adapter_model.safetensors"

    def rewrite(edit):
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)

    name = "image.0.mlp.in.up"
    damaged(lambda: rewrite(lambda t: t.pop(name)), "missing: image.0.mlp.in.up")
    damaged(lambda: rewrite(lambda t: t.update(x=torch.ones(1))), "unknown tensors: x")
    damaged(lambda: rewrite(lambda t: t.update({name: torch.ones(1)})), r"shape \(1,\)")
    damaged(lambda: rewrite(lambda t: t[name].fill_(float("nan"))), "no number")
    damaged(lambda: file.write_bytes(file.read_bytes()[:-9]), "cannot read")

    def describe(**change):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    damaged(lambda: describe(tasks=["vqa", "retrieval", "captioning"]), "its tasks are")
    damaged(lambda: describe(base="0"), "another base")
    damaged(lambda: describe(format="x"), "expected format")
    damaged(lambda: (folder / "adapter_config.json").unlink(), "no checkpoint")


def test_lambda_and_mix_take_no_weight_decay(tiny_config):
    model = build_model(tiny_config())
    decayed, free = build_optimizer(model, 1e-3, 0.1).param_groups
    state = model.adapter_state()
    assert {id(p) for p in decayed["params"]} == {id(p) for n, p in state.items() if n.endswith((".down", ".up"))}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(free["params"]) == len(trainable)


def test_learning_rate_warms_up_and_falls_to_zero():
    factors = [learning_rate_factor(s, 4, 12) for s in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5) and factors[12] == pytest.approx(0.0)


def test_a_layer_that_no_task_reads_is_no_place(tiny_config):
    config = tiny_config()
    config = config.model_copy(update={"tasks": {"retrieval": config.tasks["retrieval"]}})
    model = build_model(config)
    assert "image.projector" not in model.summary.layers
    check_gradients(model)


def test_a_dead_target_is_named(tiny_config):
    model = build_model(tiny_config())
    check_gradients(model)
    block = model.backbone.model.transformer.resblocks[1]
    block.mlp.c_proj = block.mlp.c_proj.base  # as if the library never called what was put there
    with pytest.raises(UserError, match=r"1 adapters get no gradient.*text\.1\.mlp\.out"):
        check_gradients(model)


def test_merged_weights_equal_the_routed_model(tiny_config, tiny_backbone):
    from vl_mtl_lora.export import merged_state

    model = build_model(tiny_config()).eval()
    summary = {n: layer for n, layer in model.summary.layers.items() if n != "image.projector"}
    randomize(type(model.summary)(layers=summary))
    images, tokens = torch.randn(3, 3, 32, 32), model.backbone.tokenize(["a red circle", "blue", "a"])
    plain = tiny_backbone()
    for task in model.router.task_names:
        plain.model.load_state_dict(merged_state(model, task))
        with torch.no_grad(), model.router.use(task):
            torch.testing.assert_close(plain.encode_image(images), model.backbone.encode_image(images))
            torch.testing.assert_close(plain.encode_text(tokens), model.backbone.encode_text(tokens))


def test_zero_shot_after_training_is_zero_shot_before(tiny_config):
    config = tiny_config(steps=5)
    test = build_indices(config, "test", FaultLog())
    before = evaluate_tasks(build_model(config), test, zero_shot=True)
    train(config)
    model, _ = load_run(config.out)
    assert evaluate_tasks(model, test, zero_shot=True) == before


def test_bf16_autocast_trains(tiny_config):
    losses = losses_of(tiny_config(steps=3, precision="bf16", checkpointing=True))
    assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in losses.values())


def test_training_pictures_keep_twice_the_pixels_that_a_crop_of_them_needs(tiny_config):
    config = changed(tiny_config(), tasks={"captioning": {"augment": {"scale": [0.25, 1.0]}}})
    stream = build_stream(config, build_model(config), build_indices(config, "train", FaultLog()))
    assert [feed.side for feed in stream.feeds] == [68, 64, 128]  # 2 * 32 of 90 %, all and 25 % of the area


def test_no_activation_is_kept_below_the_first_adapted_layer(tiny_config):
    model = build_model(changed(tiny_config(), adapter={"targets": ["image.1.mlp.out", "text.1.mlp.out"]}))
    kept, below = [], []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    layers = [layer for layer in model.backbone.modules() if isinstance(layer, MTLLoRALinear)]
    assert len(layers) == 2
    layers[0].register_forward_pre_hook(lambda *_: below.append(len(kept)))
    with model.router.use("vqa"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.backbone.image_states(example_batch(model).images)
    assert below == [0] and kept


def test_a_step_asks_the_device_nothing(tiny_config, monkeypatch):
    """Routes are made of ids that lie on the host; nothing else in a step may wait for a value."""
    model = build_model(tiny_config())
    batch, asked, making_a_route = example_batch(model), [], []
    sum(model(batch).values()).backward()  # what is asked once, at the first step, is no matter

    def telling(name, original):
        def wrapped(self, *args, **kwargs):
            if not making_a_route:
                asked.append(name)
            return original(self, *args, **kwargs)
        return wrapped

    def route(self, target, original=TaskRouter._route):
        making_a_route.append(target)
        try:
            return original(self, target)
        finally:
            making_a_route.pop()

    monkeypatch.setattr(TaskRouter, "_route", route)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, telling(name, getattr(torch.Tensor, name)))
    losses = model(batch)
    sum(losses.values()).backward()
    assert not asked
    losses["vqa"].item()
    assert asked == ["item"]
