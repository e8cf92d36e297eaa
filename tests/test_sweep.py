"""A sweep's plan, its runs, and its report against figures worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from scipy import stats

from vl_mtl_lora import sweep_run
from vl_mtl_lora.config import dump_config, load_config
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.model import build_model
from vl_mtl_lora.sweep import read_records, sweep
from vl_mtl_lora.sweep_plan import load_sweep, sweep_runs
from vl_mtl_lora.sweep_report import compared, findings, interval_of_mean, outcome, write_report

SWEEPS = Path(__file__).parents[1] / "configs" / "sweeps"
LORA = ["adapter.transform=none", "adapter.num_up=1"]


@pytest.fixture
def sweep_file(tiny_config, tmp_path):
    """Returns a function that writes a sweep over the tiny config, some of its values replaced."""
    config = tiny_config(steps=2, warmup=0)
    (tmp_path / "base.yaml").write_text(dump_config(config))

    def make(**values):
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({
            "out": str(tmp_path / "sweep"), "config": "base.yaml", "seeds": [0, 1],
            "lr": {"values": [0.01, 0.001], "seed": 9}, "budgets": {"short": []}, "reference": "LoRA",
            "match": "ours",
            "methods": {"ours": {}, "LoRA": {"set": LORA, "parameters": 1}}, **values}, sort_keys=False))
        return tmp_path / "sweep.yaml"
    return make


@pytest.fixture
def in_process(monkeypatch):
    """Runs are made in this process; returns the list of (folder, split)."""
    called = []

    def run(command, stdout, stderr, env):
        assert command[:3] == [sys.executable, "-m", "vl_mtl_lora.sweep_run"]
        called.append((Path(command[3]), command[4]))
        code = 0
        try:
            sweep_run.run(*command[3:])
        except UserError as error:
            stdout.write(f"train: 0%\nerror: {error}\n".encode())
            code = 2
        return subprocess.CompletedProcess(command, code)
    monkeypatch.setattr("vl_mtl_lora.sweep.subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
    return called


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LORA, ["adapter.method=multi_lora", "adapter.num_up=2"], ["adapter.method=dora"]])
@pytest.mark.parametrize("factor", [1, 2.5])
def test_the_matched_rank_is_the_largest_that_fits(method, factor, sweep_file, tmp_path):
    def size(overrides):
        model = build_model(load_config(tmp_path / "base.yaml", overrides))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    path = sweep_file(methods={"ours": {}, "LoRA": {"set": method, "parameters": factor}})
    run, = sweep_runs(load_sweep(path), "LoRA", "short", 0.01, [0], "test")
    rank = run.config.adapter.rank
    assert run.parameters == size([*method, f"adapter.rank={rank}"]) <= factor * size([])
    assert size([*method, f"adapter.rank={rank + 1}"]) > factor * size([])
    assert run.config.adapter.alpha / rank == 8 / 4  # as in the config


def test_runs_differ_in_what_they_say(sweep_file, tmp_path):
    path = sweep_file(set=["train.clip=2.0"], budgets={"short": ["train.steps=3"], "long": ["train.steps=5"]},
                      methods={"ours": {}, "LoRA": {"set": LORA}, "one by one": {"alone": True}})
    plan = load_sweep(path)
    runs = list(sweep_runs(plan, "ours", "long", 0.001, [4, 5], "test"))
    assert [(run.name, run.config.train.seed) for run in runs] == [
        ("ours/long/lr-0.001/seed-4", 4), ("ours/long/lr-0.001/seed-5", 5)]
    for run in runs:
        train = run.config.train
        assert (train.steps, train.lr, train.clip, run.config.out) == (5, 0.001, 2.0, f"{tmp_path}/sweep/{run.name}")
        assert not any(task.valid for task in run.config.tasks.values())  # it would choose nothing
    tuned, = sweep_runs(plan, "ours", "long", 0.001, [9], "valid")
    assert all(task.valid for task in tuned.config.tasks.values())
    alone = list(sweep_runs(plan, "one by one", "short", 0.01, [0], "test"))
    assert [list(run.config.tasks) for run in alone] == [["retrieval"], ["vqa"], ["captioning"]]
    assert [run.config.batch_rows for run in alone] == [6, 4, 4]
    assert len({run.digest for run in [*runs, tuned, *alone]}) == 6


@pytest.mark.parametrize("values, told", [
    ({"referense": "LoRA"}, "sweep.yaml:22: referense: unknown key; did you mean reference?"),
    ({"reference": "LoRa"}, "reference: no method 'LoRa'; did you mean LoRA?"),
    ({"methods": {"ours": {"sets": []}, "LoRA": {}}}, "methods.ours.sets: unknown key; did you mean set?"),
    ({"seeds": [0, 9]}, "lr.seed none of them"),
    ({"methods": {"ours": {}, "../LoRA": {}}}, "../LoRA"),
    ({"methods": {"ours": {"alone": True}, "LoRA": {"alone": True}}}, "only one method can be `alone`"),
    ({"metrics": {"vqua": "accuracy"}}, "metrics: no task 'vqua'; did you mean vqa?"),
    ({"groups": {"texts": ["vqua"]}}, "groups.texts: no task 'vqua'; did you mean vqa?"),
    ({"methods": {"ours": {}, "LoRA": {"set": ["adapter.method=full"], "parameters": 1}}},
     "methods.LoRA.parameters: its size does not depend on a rank"),
    ({"methods": {"ours": {}, "LoRA": {"set": ["adapter.rnk=1"]}}}, "did you mean rank?"),
    ({"config": "other.yaml"}, "cannot read the config"),
    ({"set": ["tasks.vqa.valid=[]"]}, "tasks.vqa.valid: missing; learning rates are tuned on it"),
])
def test_a_wrong_sweep_is_refused_before_anything_runs(values, told, sweep_file, tmp_path, in_process):
    with pytest.raises(UserError) as error:
        sweep(load_sweep(sweep_file(**values)))
    assert told in str(error.value)
    assert not in_process and not (tmp_path / "sweep").exists()


# --- its runs ---------------------------------------------------------------------------------------------------------


def test_rates_are_tuned_on_valid_and_what_is_done_is_not_done_again(sweep_file, tmp_path, in_process):
    path = sweep_file(methods={"ours": {}, "LoRA": {"set": LORA, "parameters": 1}, "one by one": {"alone": True}})
    records = sweep(load_sweep(path))
    out = tmp_path / "sweep"
    known = read_records(out / "runs.jsonl")
    assert len(known) == len(in_process) == 5 * 2 + 5 * 2  # 1 + 1 + 3 trainings; two rates, then two seeds
    for method in ("ours", "LoRA", "one by one"):
        scores = {}
        for lr in (0.01, 0.001):
            tuned = [r for r in known.values() if r["seed"] == 9 and r["method"] == method and r["lr"] == lr]
            assert {r["split"] for r in tuned} == {"valid"}
            metrics = {task: r["tasks"][task] for r in tuned for task in r["tasks"]}
            scores[lr] = np.mean(np.log1p([metrics["vqa"]["accuracy"], metrics["captioning"]["CIDEr"],
                                           metrics["retrieval"]["text_to_image_recall@1"]]))
        own = [r for r in records if r["method"] == method]
        assert {r["lr"] for r in own} == {max(scores, key=scores.get)}
        assert {r["split"] for r in own} == {"test"} and {r["seed"] for r in own} == {0, 1}
    # A record holds what evaluating its run gives.
    record = next(r for r in records if r["method"] == "ours")
    sweep_run.run(out / record["run"], "test")
    assert json.loads((out / record["run"] / "score.json").read_text())["tasks"] == record["tasks"]

    in_process.clear()
    assert sweep(load_sweep(path)) == records
    assert not in_process
    lost = records[-1]["run"]
    lines = (out / "runs.jsonl").read_text().splitlines()
    (out / "runs.jsonl").write_text("".join(line + "\n" for line in lines if json.loads(line)["run"] != lost))
    again = sweep(load_sweep(path))
    assert [str(folder.relative_to(out)) for folder, _ in in_process] == [lost]
    assert [r["tasks"] for r in again] == [r["tasks"] for r in records]
    with pytest.raises(UserError, match="was made with other settings"):
        sweep(load_sweep(path, ["set=[train.clip=2.0]"]))


def test_a_rate_that_breaks_a_training_is_not_chosen_and_a_failed_run_is_told(sweep_file, tmp_path, in_process,
                                                                              monkeypatch):
    def train(config, **options):
        if config.train.lr == 0.01 or config.adapter.num_up == 1 and config.train.seed == 1:
            raise UserError("the gradient is nan")
        return real(config, **options)

    real = sweep_run.train
    monkeypatch.setattr("vl_mtl_lora.sweep_run.train", train)
    with pytest.raises(UserError) as error:
        sweep(load_sweep(sweep_file()))
    assert "1 of 4 runs failed" in str(error.value) and "seed-1 failed: the gradient is nan" in str(error.value)
    done = [r for r in read_records(tmp_path / "sweep" / "runs.jsonl").values() if r["split"] == "test"]
    assert sorted((r["method"], r["lr"], r["seed"]) for r in done) == [
        ("LoRA", 0.001, 0), ("ours", 0.001, 0), ("ours", 0.001, 1)]


def test_the_command_runs_each_training_in_a_process(sweep_file, tmp_path, command):
    path = sweep_file(lr={"values": [0.01]}, set=["train.steps=1"], jobs=2,
                      methods={"heads": {"set": ["adapter.method=heads"]}, "LoRA": {"set": LORA}}, match="LoRA")
    code, told, error = command("sweep", path, "seeds=[3,4]")
    assert code == 0, error
    assert "# 2 methods, 3 tasks, 2 seeds" in told and "**heads**" in told
    out = tmp_path / "sweep"
    assert (out / "report.md").read_text() in told
    assert "<svg" in (out / "parameters.svg").read_text()
    assert (out / "LoRA/short/lr-0.01/seed-3/last").is_dir()


# --- the report -------------------------------------------------------------------------------------------------------


def test_intervals_are_student_s():
    low, high = interval_of_mean([1, 2, 3, 4, 5])
    half = 2.7764451 * 2.5**0.5 / 5**0.5  # the table's value for 4 degrees of freedom
    np.testing.assert_allclose([low, high], [3 - half, 3 + half], rtol=1e-7)
    assert interval_of_mean([2, 2, 2]) == (2, 2)
    rng = np.random.default_rng(0)
    for shift, expected in ((0.0, 0), (5.0, 1), (-5.0, -1)):
        values = rng.normal(shift, 1, 5)
        assert outcome(values) == expected
        assert (stats.ttest_1samp(values, 0).pvalue < 0.05) == (expected != 0)


def record(method, seed, values, parameters=100, task=None, **more):
    return {"method": method, "budget": "short", "seed": seed, "lr": 0.01, "task": task, "parameters": parameters,
            "tasks": {name: {"accuracy": value, "other": 0.0} for name, value in values.items()},
            "primary": dict.fromkeys(values, "accuracy"), "samples_per_second": 10.0, "device": "CPU",
            "versions": {"torch": "2"}, "git_revision": "abc", **more}


@pytest.fixture
def judged(sweep_file):
    """(sweep, records): ours is better than LoRA on a and worse on b, measured by tasks trained alone."""
    config = load_sweep(sweep_file(methods={"ours": {}, "LoRA": {}, "single": {"alone": True}},
                                   groups={"first": ["a"]}))
    records = []
    for seed, noise in ((0, 0.0), (1, 0.2)):
        records += [record("LoRA", seed, {"a": 20 + noise, "b": 40 - noise}),
                    record("ours", seed, {"a": 30 + noise, "b": 36 - noise}, parameters=150, samples_per_second=8.0),
                    record("single", seed, {"a": 40.0}, task="a"), record("single", seed, {"b": 80.0}, task="b")]
    return config, records


def test_scores_are_shares_of_what_single_task_training_attains(judged):
    config, records = judged
    ours, lora, single = compared(config, records)
    np.testing.assert_allclose(single.scores, [100, 100])
    np.testing.assert_allclose(lora.scores, [(20 / 40 + 40 / 80) * 50, (20.2 / 40 + 39.8 / 80) * 50])
    np.testing.assert_allclose(ours.scores, [(30 / 40 + 36 / 80) * 50, (30.2 / 40 + 35.8 / 80) * 50])
    np.testing.assert_allclose(ours.groups["first"], [75, 75.5])
    assert (ours.parameters, single.parameters, single.speed) == (150, 200, None)
    told = list(findings([ours, lora, single], lora))
    assert told[0] == ("**ours** is better than LoRA by 10.0 points (10.0 to 10.0), with 1.50 times its parameters and "
                       "at 0.80 of its speed; better on 1 (a), worse on 1 (b).")
    assert told[1].startswith("**single** is better than LoRA by 49.9 points (4")


def test_another_metric_than_the_primary_one_can_stand_for_a_task(judged):
    config, records = judged
    for r in records:
        for values in r["tasks"].values():
            values["other"] = values["accuracy"] ** 2
    ours, *_ = compared(config.model_copy(update={"metrics": {"a": "other"}}), records)
    np.testing.assert_allclose(ours.scores[0], (30**2 / 40**2 + 36 / 80) * 50)
    with pytest.raises(UserError, match="metrics.a: no metric 'otter'; did you mean other"):
        compared(config.model_copy(update={"metrics": {"a": "otter"}}), records)


def test_the_report_says_it_in_tables(judged, tmp_path):
    config, records = judged
    text = write_report(config, records, tmp_path)
    assert "| ours | 150 | 0.01 | 60.1 ± 0.8 | +10.0 to +10.0 | 1, 1 | 75.2 ± 3.2 | 0.80 |" in text
    assert "| ours | 30.1 ▲ | 35.9 ▼ |" in text
    first = (tmp_path / "parameters.svg").read_bytes()
    write_report(config, records, tmp_path)
    assert (tmp_path / "parameters.svg").read_bytes() == first


def test_a_task_on_which_the_measure_scores_nothing_is_left_out_and_told(judged, tmp_path):
    config, records = judged
    for r in records:
        if r["task"] == "b":
            r["tasks"]["b"]["accuracy"] = 0.0
    ours, *_ = compared(config, records)
    np.testing.assert_allclose(ours.scores, [100 * 30 / 40, 100 * 30.2 / 40])
    assert "Left out of the scores, since single scores 0 there: b (short)." in write_report(config, records, tmp_path)
    for r in records:
        if r["task"] == "a":
            r["tasks"]["a"]["accuracy"] = 0.0
    with pytest.raises(UserError, match="single scores 0 on every task"):
        compared(config, records)
