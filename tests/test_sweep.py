"""A sweep's plan, its runs, and its report against figures worked out by hand."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from vl_mtl_lora import sweep_run
from vl_mtl_lora.config import dump_config, load_config
from vl_mtl_lora.errors import Diverged, UserError
from vl_mtl_lora.model import build_model
from vl_mtl_lora.sweep import _UnderWay, best_rates, read_records, sweep
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
            "out": str(tmp_path / "sweep"), "config": "base.yaml", "seeds": [0, 1, 2],
            "lr": {"values": [0.01, 0.001], "seed": 9}, "budgets": {"short": []}, "reference": "LoRA",
            "match": "ours",
            "methods": {"ours": {}, "LoRA": {"set": LORA, "parameters": 1}}, **values}, sort_keys=False))
        return tmp_path / "sweep.yaml"
    return make


@pytest.fixture
def in_process(monkeypatch):
    """Runs are made in this process; returns the list of (folder, split)."""
    called = []

    def process(command, log, environment, under_way):
        assert command[:3] == [sys.executable, "-m", "vl_mtl_lora.sweep_run"]
        called.append((Path(command[3]), command[4]))
        try:
            sweep_run.run(*command[3:])
        except UserError as error:
            log.write(f"train: 0%\rerror: {error}\n".encode())
            return 2
        return 0
    monkeypatch.setattr("vl_mtl_lora.sweep._process", process)
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
    ({"referense": "LoRA"}, "sweep.yaml:23: referense: unknown key; did you mean reference?"),
    ({"reference": "LoRa"}, "reference: no method 'LoRa'; did you mean LoRA?"),
    ({"methods": {"ours": {"sets": []}, "LoRA": {}}}, "methods.ours.sets: unknown key; did you mean set?"),
    ({"seeds": [0, 9, 1]}, "lr.seed none of them"),
    ({"seeds": [0, 1]}, "at least 3"),
    ({"lr": {"values": [0.1, 1e-1], "seed": 9}}, "lr.values must be distinct"),
    ({"reference": "LoRA", "methods": {"ours": {}, "LoRA": {"alone": True}}}, "LoRA trains tasks alone"),
    ({"set": ["data.mixing.turns=true"], "methods": {"ours": {}, "LoRA": {}, "single": {"alone": True}}},
     "methods.ours: only where"),
    ({"methods": {"ours": {}, "LoRA": {"set": ["data.mixing.turns=true"]}, "single": {"alone": True}}},
     "methods.LoRA: only where"),
    ({"set": ["start.run=there"]}, "start.run: methods are compared from the base on"),
    ({"methods": {"ours": {}, "../LoRA": {}}}, "../LoRA"),
    ({"methods": {"ours": {}, "LoRA": {}, "a": {"alone": True}, "b": {"alone": True}}}, "only one method can be"),
    ({"metrics": {"vqua": "accuracy"}}, "metrics: no task 'vqua'; did you mean vqa?"),
    ({"methods": {"ours": {}, "LoRA": {"set": ["tasks.vqa=null"]}}}, "methods.LoRA: its tasks are others"),
    ({"groups": {"texts": ["vqua"]}}, "groups.texts: no task 'vqua'; did you mean vqa?"),
    ({"methods": {"ours": {}, "LoRA": {"set": ["adapter.method=full"], "parameters": 1}}},
     "methods.LoRA.parameters: its size does not depend on a rank"),
    ({"methods": {"ours": {}, "LoRA": {"set": ["adapter.method=moe_lora", "adapter.num_up=9"], "parameters": 1}}},
     "methods.LoRA.parameters: of rank 1 it has"),
    ({"methods": {"ours": {}, "LoRA": {"set": ["adapter.rnk=1"]}}}, "did you mean rank?"),
    ({"config": "other.yaml"}, "cannot read the config"),
    ({"set": ["train.lr=0.1"]}, "set: train.lr=0.1: a sweep sets train.lr itself; write lr.values of the sweep"),
    ({"methods": {"ours": {"set": ["train.seed=3"]}, "LoRA": {}}}, "a sweep sets train.seed itself"),
    ({"set": ["tasks.vqa.test=[nowhere-*.tar]"]}, "nowhere-*.tar"),
    ({"methods": {"ours": {}, "LoRA": {}, 101 * "a": {}}}, "at most 100 characters"),
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
    assert len(known) == len(in_process) == 5 * 2 + 5 * 3  # 1 + 1 + 3 trainings; two rates, then three seeds
    figures = {}  # (method, rate) -> vqa, captioning, retrieval
    for method, lr in itertools.product(("ours", "LoRA", "one by one"), (0.01, 0.001)):
        tuned = [r for r in known.values() if r["seed"] == 9 and r["method"] == method and r["lr"] == lr]
        assert {r["split"] for r in tuned} == {"valid"}
        metrics = {task: r["tasks"][task] for r in tuned for task in r["tasks"]}
        figures[method, lr] = np.array([metrics["vqa"]["accuracy"], metrics["captioning"]["CIDEr"],
                                        metrics["retrieval"]["text_to_image_recall@1"]])
    attained = np.maximum(figures["one by one", 0.01], figures["one by one", 0.001])
    for method in ("ours", "LoRA", "one by one"):
        scores = {lr: np.mean(figures[method, lr][attained > 0] / attained[attained > 0]) for lr in (0.01, 0.001)}
        own = [r for r in records if r["method"] == method]
        assert {r["lr"] for r in own} == {max(scores, key=scores.get)}
        assert {r["split"] for r in own} == {"test"} and {r["seed"] for r in own} == {0, 1, 2}
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


def test_a_rate_with_which_a_training_diverges_is_not_chosen(sweep_file, tmp_path, in_process, monkeypatch):
    def train(config, **options):
        if config.train.lr == 0.01 or config.train.seed == diverging:
            raise Diverged("the gradient is nan at step 1")
        return real(config, **options)

    real, diverging = sweep_run.train, 1
    monkeypatch.setattr("vl_mtl_lora.sweep_run.train", train)
    with pytest.raises(UserError, match="2 of 6 trainings diverged; .*\n.*seed-1: the gradient is nan"):
        sweep(load_sweep(sweep_file()))
    known = read_records(tmp_path / "sweep" / "runs.jsonl").values()
    assert sum("diverged" in record for record in known) == 4  # also one of each method in tuning
    assert {r["lr"] for r in known if r["split"] == "test"} == {0.001}
    monkeypatch.setattr("vl_mtl_lora.sweep_run.train", lambda *_, **__: pytest.fail("known already"))
    with pytest.raises(UserError, match="2 of 6 trainings diverged"):
        sweep(load_sweep(sweep_file()))


def test_what_fails_otherwise_is_told_and_tried_again_before_anything_is_chosen(sweep_file, in_process, monkeypatch):
    def train(config, **options):
        if config.train.lr == broken:
            raise UserError("no space left")
        return real(config, **options)

    real, broken = sweep_run.train, 0.01
    monkeypatch.setattr("vl_mtl_lora.sweep_run.train", train)
    with pytest.raises(UserError, match=r"2 of 4 runs failed; .*\n.*lr-0.01/seed-9: error: no space left"):
        sweep(load_sweep(sweep_file()))
    assert len(in_process) == 4
    in_process.clear()
    broken = None
    sweep(load_sweep(sweep_file()))
    assert len(in_process) == 2 + 6


def test_a_training_begun_with_other_settings_does_not_go_on_with_these(sweep_file, in_process, monkeypatch):
    monkeypatch.setattr("vl_mtl_lora.sweep_run.train", lambda *_, **__: (_ for _ in ()).throw(UserError("stopped")))
    with pytest.raises(UserError, match="4 of 4 runs failed"):
        sweep(load_sweep(sweep_file()))
    in_process.clear()
    with pytest.raises(UserError, match="begun with other settings: remove the folder"):
        sweep(load_sweep(sweep_file(set=["train.steps=1"])))
    assert not in_process


def test_one_folder_takes_one_sweep_and_one_run_at_a_time(sweep_file, tmp_path, in_process):
    plan = load_sweep(sweep_file())
    with sweep_run.alone_in(tmp_path / "sweep"), pytest.raises(UserError, match="another process works in"):
        sweep(plan)
    folder = tmp_path / "sweep" / "ours/short/lr-0.01/seed-9"
    with sweep_run.alone_in(folder), pytest.raises(UserError, match="lr-0.01/seed-9: error: another process works in"):
        sweep(plan)


def test_the_digest_is_of_what_decides_and_of_nothing_else(sweep_file, tmp_path):
    def digest(split="test", seed=0, lr=0.01, **values):
        run, = sweep_runs(load_sweep(sweep_file(**values)), "ours", "short", lr, [seed], split)
        return run.digest

    first = digest()
    base = tmp_path / "base.yaml"
    base.write_text("# a comment\n" + base.read_text())
    assert digest() == digest(out="elsewhere", set=["adapter.rank=4"]) == first  # the rank that it has anyway
    others = [digest("valid"), digest(seed=1), digest(lr=0.1), digest(set=["train.clip=2.0"])]
    others += [digest(set=[f"tasks.more={{kind: {kind}, rows: 4, train: [a.tar]}}"])
               for kind in ("captioning", "retrieval")]
    assert len({first, *others}) == 7


def test_the_command_runs_each_training_in_a_process(sweep_file, tmp_path, command):
    path = sweep_file(lr={"values": [0.01]}, set=["train.steps=1"], jobs=2,
                      methods={"heads": {"set": ["adapter.method=heads"]}, "LoRA": {"set": LORA}}, match="LoRA")
    code, told, error = command("sweep", path, "seeds=[3,4,5]")
    assert code == 0, error
    assert "# 2 methods, 3 tasks, 3 seeds" in told and "**heads**" in told
    out = tmp_path / "sweep"
    assert (out / "report.md").read_text() in told
    assert "<svg" in (out / "parameters.svg").read_text()
    assert (out / "LoRA/short/lr-0.01/seed-3/last").is_dir()


def test_sigterm_lets_the_training_under_way_save(sweep_file, tmp_path):
    path = sweep_file(lr={"values": [0.01]}, set=["train.steps=100000"])
    folder = tmp_path / "sweep/ours/short/lr-0.01/seed-0"
    with open(tmp_path / "told", "wb") as told:
        process = subprocess.Popen([sys.executable, "-m", "vl_mtl_lora", "sweep", str(path)], stdout=told, stderr=told)
    deadline = time.monotonic() + 120
    while not (folder / "log.jsonl").exists() or '"lr"' not in (folder / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "told").read_text()
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 130
    assert json.loads((folder / "last" / "adapter_config.json").read_text())["step"] > 0
    with sweep_run.alone_in(folder):  # nobody works in it any more
        assert not (tmp_path / "sweep" / "runs.jsonl").exists()


def test_nothing_starts_once_a_sweep_is_stopped():
    under_way = _UnderWay()
    with under_way.start([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        under_way.stop()
        assert process.wait(30) == -signal.SIGTERM
    with pytest.raises(UserError, match="stopped"):
        under_way.start([sys.executable, "-c", ""])


# --- the report -------------------------------------------------------------------------------------------------------


def test_intervals_are_student_s():
    low, high = interval_of_mean([1, 2, 3, 4, 5])
    half = 2.7764451 * 2.5**0.5 / 5**0.5  # the table's value for 4 degrees of freedom
    np.testing.assert_allclose([low, high], [3 - half, 3 + half], rtol=1e-7)
    assert interval_of_mean([2, 2, 2]) == (2, 2)
    assert outcome([2.0, 2.0 + 7e-15, 2.0 + 8e-15]) == 0  # all the same but for rounding
    rng = np.random.default_rng(0)
    for shift, expected in ((0.0, 0), (5.0, 1), (-5.0, -1)):
        values = rng.normal(shift, 1, 5)
        assert outcome(values) == expected
        assert (stats.ttest_1samp(values, 0).pvalue < 0.05) == (expected != 0)


def record(method, seed, values, parameters=100, task=None, **more):
    return {"method": method, "budget": "short", "seed": seed, "lr": 0.01, "task": task, "parameters": parameters,
            "tasks": {name: {"accuracy": value, "other": 0.0} for name, value in values.items()},
            "primary": dict.fromkeys(values, "accuracy"), "samples_per_second": 10.0, "device": "CPU",
            "versions": {"torch": "2"}, "git_revision": "abc", "run": f"{method}/{seed}",
            "shards": {name: {"hash": "x"} for name in values}, **more}


@pytest.fixture
def judged(sweep_file):
    """(sweep, records): ours is better than LoRA on a and worse on b, measured by tasks trained alone."""
    config = load_sweep(sweep_file(methods={"ours": {}, "LoRA": {}, "single": {"alone": True}},
                                   groups={"first": ["a"]}))
    records = []
    for seed, (of_lora, of_ours) in enumerate([(0.0, 0.0), (0.2, 0.5), (0.1, 0.2)]):
        records += [record("LoRA", seed, {"a": 20 + of_lora, "b": 40 - of_lora}),
                    record("ours", seed, {"a": 30 + of_ours, "b": 36 - of_ours}, parameters=150, samples_per_second=8),
                    record("single", seed, {"a": 40.0}, task="a"), record("single", seed, {"b": 80.0}, task="b")]
    return config, records


def test_scores_are_shares_of_what_single_task_training_attains(judged):
    config, records = judged
    ours, lora, single = compared(config, records)
    np.testing.assert_allclose(single.scores, [100, 100, 100])
    np.testing.assert_allclose(lora.scores, [50, 50.125, 50.0625])  # 50 * ((20 + n) / 40 + (40 - n) / 80)
    np.testing.assert_allclose(ours.scores, [60, 60.3125, 60.125])
    np.testing.assert_allclose(ours.groups["first"], [75, 76.25, 75.5])
    assert (ours.parameters, single.parameters, single.speed) == (150, 200, None)
    told = list(findings([ours, lora, single], lora))
    # 10.083 +- 4.3027 * 0.0955 / sqrt(3), and 25.333 +- 4.3027 * 0.3819 / sqrt(3)
    assert told[0] == (
        "**ours** is better than LoRA: +10.1 (+9.8 to +10.3) points, first +25.3 (+24.4 to +26.3); with any one "
        "task left out -5.2 (a) to +25.3 (b); with 1.50 times its parameters and at 0.80 of its speed; better on 1 "
        "(a), worse on 1 (b).")
    for r in records:
        if r["method"] == "ours":
            r["git_revision"] = "another"
    assert "parameters; better" in next(findings(compared(config, records)[:2], lora))  # measured at another time
    assert told[1].startswith("**single** is better than LoRA: +49.9 (+49.8 to +50.1) points, first +49.8")


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
    assert "| ours | 150 | 0.01 | 60.1 ± 0.4 | +9.8 to +10.3 | 1, 1 | 75.6 ± 1.6 | 0.80 |" in text
    assert "| ours | 30.2 ▲ | 35.8 ▼ |" in text
    assert "| LoRA | -10.1 ▼ |  | -49.9 ▼ |" in text
    first = (tmp_path / "parameters.svg").read_bytes()
    write_report(config, records, tmp_path)
    assert (tmp_path / "parameters.svg").read_bytes() == first


def test_a_task_on_which_the_measure_scores_nothing_is_left_out_and_told(judged, tmp_path):
    config, records = judged
    for r in records:
        if r["task"] == "b":
            r["tasks"]["b"]["accuracy"] = 0.0
    ours, *_ = compared(config, records)
    np.testing.assert_allclose(ours.scores, [75, 76.25, 75.5])
    assert "Left out of the scores, since single is not above 0 there: b (short)." in write_report(
        config, records, tmp_path)
    for r in records:
        if r["task"] == "a":
            r["tasks"]["a"]["accuracy"] = 0.0
    with pytest.raises(UserError, match="single is above 0 on no task"):
        compared(config, records)


# --- the results in the README ----------------------------------------------------------------------------------------


RESULTS = sorted(path.parent.name for path in SWEEPS.glob("results/*/runs.jsonl"))


@pytest.mark.parametrize("name", RESULTS)
def test_the_readme_s_results_are_made_of_the_recorded_runs(name, tmp_path):
    config = load_sweep(SWEEPS / f"{name}.yaml")
    known = read_records(SWEEPS / "results" / name / "runs.jsonl")
    tested = [record for record in known.values() if record["split"] == "test"]
    for budget in config.budgets:
        for method in config.methods:
            rate, = {r["lr"] for r in tested if (r["method"], r["budget"]) == (method, budget)}
            for run in sweep_runs(config, method, budget, rate, config.seeds, "test"):
                assert known[run.name]["digest"] == run.digest  # nothing has changed since
                assert known[run.name]["parameters"] == run.parameters
    rates = best_rates(config, [r for r in known.values() if r["split"] == "valid"])
    assert all(r["lr"] == rates[r["method"], r["budget"]] for r in tested)
    report = write_report(config, tested, tmp_path)
    assert report == (SWEEPS / "results" / name / "report.md").read_text()
    readme = (SWEEPS.parents[1] / "README.md").read_text()
    shown = readme.partition(f"<!-- {name}: of its report -->\n")[2].partition("<!-- end -->")[0].splitlines()
    assert shown and all(line.replace("### ", "## ") in report.splitlines() for line in shown)
