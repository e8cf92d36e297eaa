"""What a plan makes of a step's memory, operations and launches, worked out by hand."""

import pytest

from vl_mtl_lora import UserError, build_model, load_config
from vl_mtl_lora.flops import batch_flops, launches
from vl_mtl_lora.memory import expected_memory
from vl_mtl_lora.planning import CARDS, Card, plan
from vl_mtl_lora.sections import MixingSection
from vl_mtl_lora.sweep_plan import alone

SLOW = dict(memory=1e9, bf16=1e15, float32=1e9, link=1e15, network=1e15)  # one that computes all the time


@pytest.fixture
def planned(monkeypatch, tiny_config):
    """Returns a function: changes to a card, to the training -> the config and its plans by (GPUs, spread)."""
    def make(card, **train):
        monkeypatch.setitem(CARDS, "card", Card(**{**SLOW, **card}))
        config = tiny_config(**train)
        return config, {(each.gpus, each.spread): each for each in plan(config, "card")}
    return make


def parts(config):
    model, probe = build_model(config), build_model(config, dry_run="narrow")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return expected_memory(model, probe, config)[0], batch_flops(model, probe, config), launches(probe), trained


def test_time_is_what_computing_takes(planned):
    config, plans = planned({}, steps=7200, accumulate=3)
    _, flops, _, _ = parts(config)
    seconds = 3 * (flops.forward + flops.backward) / 0.3e9
    assert [each.seconds for each in plans.values()] == pytest.approx([seconds] * 5)
    assert {each.limit for each in plans.values()} == {"computing"}
    assert plans[8, False].hours == pytest.approx(2 * seconds)
    assert plans[8, True].rows_per_second == pytest.approx(8 * 3 * 14 / seconds)


def test_time_is_what_launching_takes_and_blocks_run_twice_launch_twice(planned):
    config, plans = planned({"float32": 1e15}, checkpointing=True)
    forward, backward = parts(config)[2]
    assert plans[1, False].limit == "launching"
    assert plans[1, False].seconds == pytest.approx(50e-6 * (2 * forward + backward))


@pytest.mark.parametrize("gpus,bandwidth", [(8, 2e3), (64, 1e3)])
def test_time_is_what_travelling_takes(planned, gpus, bandwidth):
    config, plans = planned({"link": 2e3, "network": 1e3}, accumulate=2)
    memory, _, _, trained = parts(config)
    share = (gpus - 1) / gpus
    gradients = share * 4 * trained  # once to where they are summed, once back
    assert plans[gpus, False].seconds == pytest.approx(2 * gradients / (0.7 * bandwidth))
    gathered = 2 * 2 * share * (memory.weights + 4 * trained)  # batches, forward and backward
    assert plans[gpus, True].seconds == pytest.approx((gathered + gradients) / (0.7 * bandwidth))
    assert plans[gpus, True].limit == "links" and plans[1, False].limit == "computing"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_weights_training_state_activations_and_similarities(planned, checkpointing):
    config, plans = planned({}, checkpointing=checkpointing)
    memory, _, _, trained = parts(config)
    similarities = 5 * 4 * 6 * 6  # of six rows of retrieval, with those of each process
    assert plans[1, False].memory == memory.total(checkpointing) + similarities
    assert plans[8, False].memory == memory.total(checkpointing) + 8 * similarities + 4 * trained
    assert plans[64, True].memory < plans[8, True].memory < plans[8, False].memory
    assert plans[64, True].memory > memory.total(checkpointing) - memory.weights - memory.trained


def test_of_batches_of_one_task_the_largest_fills_the_memory_and_the_average_takes_the_time(tiny_config):
    whole = tiny_config()
    mixed = whole.model_copy(update={"data": whole.data.model_copy(update={"mixing": MixingSection(turns=True)})})
    memory, flops, *_ = parts(mixed)
    singles = {}
    for name, task in whole.tasks.items():
        one = alone(whole, name)
        one = one.model_copy(update={"tasks": {name: task.model_copy(update={"rows": 14})}})
        singles[name] = task.rows / 14, *parts(one)[:2]
    assert memory.activations == pytest.approx(max(single.activations for _, single, _ in singles.values()), rel=0.01)
    assert [each.gpus for each in plan(mixed)] == [1]
    assert flops.forward == pytest.approx(sum(share * single.forward for share, _, single in singles.values()),
                                          rel=0.01)


def test_what_does_not_fit_is_said(planned):
    _, plans = planned({})
    need = plans[1, False].memory
    for share, fits in ((0.89, True), (0.91, False)):
        assert planned({"memory": need / share})[1][1, False].fits is fits


def test_the_command_prints_a_plan_and_knows_its_cards(command):
    code, out, _ = command("inspect", "configs/clip_vit_b32.yaml", "--plan", "--gpu", "A100-80GB")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("| A100-80GB | weights |") and [line.split(" | ")[0] for line in lines[2:7]] == [
        "| 1", "| 8", "| 8", "| 64", "| 64"]
    assert "microseconds of the processor for each kernel" in lines[8]
    code, out, err = command("inspect", "configs/clip_vit_b32.yaml", "--plan", "--gpu", "H100-80")
    assert code == 2 and not out and "did you mean H100-80GB" in err
    with pytest.raises(UserError, match="unknown GPU 'TPU'; valid are A100-80GB"):
        plan(load_config("configs/clip_vit_b32.yaml"), "TPU")
