"""Runs side by side: groups by what differs, seeds taken together, refused where the shards differ."""

import copy
import json
import statistics

import pytest

from vl_mtl_lora import UserError
from vl_mtl_lora.side_by_side import compare_results, side_by_side, text_table


def result(seed, rank, accuracy, rank_metric=5.0, shards="aa"):
    config = {"out": f"runs/{seed}", "adapter": {"rank": rank, "alpha": 16}, "train": {"seed": seed, "steps": 9},
              "tasks": {"vqa": {"test": [f"{seed}.tar"]}}}
    return {"seed": seed, "config": config, "shards": {"vqa": {"hash": shards}}, "tasks": {"vqa": {
        "zero_shot": {"accuracy": 10.0, "x_rank": 9.0}, "adapted": {"accuracy": accuracy, "x_rank": rank_metric},
        "interval": {"zero_shot": {"accuracy": [9.0, 11.0]}, "adapted": {"accuracy": [accuracy - 1, accuracy + 1]}}}}}


RUNS = {"a": result(0, 4, 50.0), "b": result(1, 4, 54.0), "c": result(0, 8, 60.0, 2.0)}


def test_seeds_are_taken_together_and_others_named_by_what_differs():
    table = compare_results(RUNS)
    assert table.columns == ["zero-shot", "rank 4", "rank 8"] and table.seeds == [[0, 1], [0]]
    zero, four, eight = table.rows["vqa", "accuracy"]
    assert (four.mean, four.deviation, four.interval) == (52.0, statistics.stdev([50.0, 54.0]), None)
    assert eight == (60.0, None, [59.0, 61.0]) and zero == (10.0, None, [9.0, 11.0])
    lines = text_table(table).splitlines()
    assert lines[2].split() == ["vqa", "accuracy", "10.0", "52.0", "±", "2.8", "60.0"]


def test_files(tmp_path):
    side_by_side(RUNS, tmp_path / "c")
    page = (tmp_path / "c" / "comparison.html").read_text()
    assert "<b>60.0</b>" in page and "<b>2.0</b>" in page and "52.0 ± 2.8" in page  # of a rank the lower is bold
    saved = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert saved["groups"] == [{"name": "rank 4", "seeds": [0, 1], "runs": ["a", "b"]},
                               {"name": "rank 8", "seeds": [0], "runs": ["c"]}]
    assert saved["rows"][0]["cells"]["rank 8"]["mean"] == 60.0
    assert "| vqa | accuracy | 10.0 | 52.0 ± 2.8 | 60.0 |" in (tmp_path / "c" / "comparison.md").read_text()


def test_a_zero_shot_figure_that_differs_is_left_out_and_other_tasks_are_empty():
    other = copy.deepcopy(RUNS["c"])
    other["tasks"]["vqa"]["zero_shot"]["accuracy"] = 12.0
    other["tasks"]["new"] = {"zero_shot": {"CIDEr": 1.0}, "adapted": {"CIDEr": 2.0}}
    other["shards"]["new"] = {"hash": "n"}
    table = compare_results({"a": RUNS["a"], "c": other})
    assert table.rows["vqa", "accuracy"][0] is None and table.rows["new", "CIDEr"][1] is None
    assert table.rows["new", "CIDEr"][2].mean == 2.0


def test_runs_over_other_shards_are_refused():
    with pytest.raises(UserError, match="c and a were measured on different shards of vqa"):
        compare_results({"a": RUNS["a"], "c": result(0, 8, 60.0, shards="bb")})


def test_the_command_compares_runs(command, tiny_config, tmp_path):
    from vl_mtl_lora.config import dump_config

    runs = []
    for seed, rank in ((0, 4), (1, 4), (0, 2)):
        path, out = tmp_path / "c.yaml", tmp_path / f"r{seed}{rank}"
        path.write_text(dump_config(tiny_config(steps=2, seed=seed)))
        assert command("train", path, f"out={out}", f"adapter.rank={rank}")[0] == 0
        runs.append(out)
    code, text, _ = command("compare", *runs, "--out", tmp_path / "side", "--limit", "8")
    assert code == 0 and text.splitlines()[0].split() == ["task", "metric", "zero-shot", "rank", "4", "rank", "2"]
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    accuracies = [one["tasks"]["vqa"]["adapted"]["accuracy"] for one in results]
    row = next(line for line in text.splitlines() if line.startswith("vqa") and "lenient" not in line)
    assert f"{statistics.fmean(accuracies[:2]):.1f} ± {statistics.stdev(accuracies[:2]):.1f}" in row
    before = [(run / "results.json").stat().st_mtime_ns for run in runs]
    assert command("compare", *runs, "--out", tmp_path / "side", "--limit", "8")[0] == 0
    assert before == [(run / "results.json").stat().st_mtime_ns for run in runs]  # known already
    assert command("compare", *runs, "--out", tmp_path / "side", "--limit", "7")[0] == 0
    assert before != [(run / "results.json").stat().st_mtime_ns for run in runs]
    assert "a run is named twice" in command("compare", runs[0], runs[0])[2]
