import json

import pytest
import yaml

from vl_mtl_lora.config import dump_config, load_config, parse_config
from vl_mtl_lora.errors import UserError

GOOD = """\
out: runs/x
backbone:
  name: ViT-B-32
  pretrained: openai
tasks:
  vqa: {rows: 8, train: shards/a-*.tar}
  pictures:
    kind: retrieval
    train: [b.tar]
"""


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_kinds_from_names_and_paths_from_the_file(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    assert config.tasks["vqa"].kind == "vqa" and config.tasks["pictures"].kind == "retrieval"
    assert config.tasks["vqa"].train == [str(tmp_path / "shards/a-*.tar")]
    assert config.train.steps == 1000 and config.adapter.rank == 8


def test_overrides_are_yaml_values(tmp_path):
    config = load_config(write(tmp_path, GOOD), ["train.steps=7", "train.lr=1e-2", "tasks.vqa.answers=[a, b]",
                                                 "backbone.pretrained=null"])
    assert (config.train.steps, config.train.lr, config.tasks["vqa"].answers) == (7, 0.01, ["a", "b"])
    assert config.backbone.pretrained is None


def test_a_task_set_to_null_is_taken_out(tmp_path):
    assert list(load_config(write(tmp_path, GOOD), ["tasks.vqa=null"]).tasks) == ["pictures"]
    with pytest.raises(UserError, match="there is no task 'vqua'; did you mean vqa"):
        load_config(write(tmp_path, GOOD), ["tasks.vqua=null"])


def test_a_dumped_config_reads_back_the_same(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_all_mistakes_are_told_at_once_with_line_value_and_nearest_name(tmp_path):
    text = GOOD.replace("pretrained: openai", "pretraind: openai").replace("rows: 8", "rows: many") + \
        "train:\n  stepz: 3\n  lr: -1\n  precision: bf61\n"
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text))
    lines = str(caught.value).splitlines()
    path = tmp_path / "run.yaml"
    assert f"{path}:4: backbone.pretraind: unknown key; did you mean pretrained?" in lines
    assert any(line.startswith(f"{path}:6: tasks.vqa.rows: got 'many'") for line in lines)
    assert f"{path}:11: train.stepz: unknown key; did you mean steps?" in lines
    assert any(line.startswith(f"{path}:12: train.lr: got -1") for line in lines)
    assert any(line.startswith(f"{path}:13: train.precision: got 'bf61'") and line.endswith("did you mean bf16?")
               for line in lines)
    assert len(lines) == 5


@pytest.mark.parametrize("change,message", [
    ({"tasks": {"vqq": {"train": "a"}}}, "expected the task's kind"),
    ({"tasks": {"x": {"kind": "vqq", "train": "a"}}}, "did you mean vqa"),
    ({"tasks": {}}, "at least 1"),
    ({"tasks": {"vqa": {"train": "a", "answer_by": "ranking"}}}, "needs the list `answers`"),
    ({"tasks": {"vqa": {"train": "a", "prompt": "what?"}}}, "must contain {question}"),
    ({"tasks": {"vqa": {"train": "a", "prompt": "{question} {x}"}}}, "no other field"),
    ({"tasks": {"vqa": {"train": "a", "answers": ["a", ""]}}}, "distinct and not empty"),
    ({"tasks": {"vqa.v2": {"kind": "vqa", "train": "a"}}}, "vqa.v2"),
    ({"tasks": {"vqa": {"train": "a", "answerz": []}}}, "did you mean answers"),
    ({"tasks": {"vqa": {}}}, "tasks.vqa.train: missing"),
    ({"adapter": {"temperature": 0}}, "greater than 0"),
    ({"adapter": {"targets": []}}, "at least 1"),
    ({"train": {"lr": float("nan")}}, "train.lr"),
    ({"out": 3}, "out: got 3"),
    ({"backbone": None}, "backbone"),
])
def test_impossible_values(change, message):
    data = {"out": "x", "backbone": {"name": "m"}, "tasks": {"vqa": {"train": "a"}}, **change}
    with pytest.raises(UserError, match=message):
        parse_config(data)


def test_what_is_no_mapping():
    with pytest.raises(UserError, match="config"):
        parse_config([])


@pytest.mark.parametrize("text,message", [
    ("a: [", "not valid YAML"), ("- 1\n", "expected a mapping"), ("", "expected a mapping"),
    ("a: !!python/none x", "YAML"), ("\x00", "YAML")])
def test_files_that_are_no_config(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_file_and_a_bad_override(tmp_path):
    with pytest.raises(UserError, match="cannot read the config"):
        load_config(tmp_path / "no.yaml")
    for bad in ("train.steps", "=3", "train.steps.x=3"):
        with pytest.raises(UserError, match="override"):
            load_config(write(tmp_path, GOOD + "train: {steps: 3}\n"), [bad])


@pytest.mark.parametrize("text,message", [
    ("x: &a {y: *a}", "an alias is part of what it stands for"), ("x: {1.5: 2}", "a key is no text"),
    ("x: 1\nx: 2", "line 2: x occurs twice"), ("x: !!int ''", "not valid YAML"), ("x: !!set {a}", "not valid YAML"),
    ("x: 0x" + "f" * 5000, "not valid YAML"), ('x: "\\ud800"', "not valid YAML")])
def test_yaml_that_no_config_can_mean_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("value", ["1e5", "a\x85b", "2001-01-01", "0x1f", "yes", "line\nbreak"])
def test_texts_survive_being_written(tmp_path, value):
    config = load_config(write(tmp_path, GOOD), [f"backbone.options.x={json.dumps(value)}"])
    assert config.backbone.options["x"] == value
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_an_override_changes_no_alias(tmp_path):
    text = GOOD.replace("tasks:", "data: {mixing: &m {by: proportional, rows: 9}}\ntasks:")
    config = load_config(write(tmp_path, text), ["data.mixing.rows=7"])
    assert config.data.mixing.rows == 7


@pytest.mark.parametrize("change,message", [
    ({"train": "a\0b"}, "tasks.vqa.train"), ({"train": "~nobodyhere/x"}, "tasks.vqa.train"),
    ({"train": "a", "prompt": "{question!z}"}, "prompt must contain"),
    ({"train": "a", "prompt": "{question:zz}"}, "prompt must contain")])
def test_values_that_would_fail_later_are_refused_at_once(change, message):
    with pytest.raises(UserError, match=message):
        parse_config({"out": "x", "backbone": {"name": "m"}, "tasks": {"vqa": change}})


@pytest.mark.parametrize("mixing,message", [
    ({"rows": 9}, "rows belongs to by: proportional or temperature or weights, not to by: quotas"),
    ({"by": "temperature"}, "by: temperature needs temperature"), ({"by": "weights"}, "by: weights needs weights"),
    ({"by": "weights", "weights": {"vqa": 1.0, "x": 1.0}}, "weights names the tasks vqa, x; expected each of vqa")])
def test_mixtures_that_do_not_fit_are_refused(mixing, message):
    with pytest.raises(UserError, match=message):
        parse_config({"out": "x", "backbone": {"name": "m"}, "tasks": {"vqa": {"train": "a"}},
                      "data": {"mixing": mixing}})


def test_lists_may_lie_in_text_files(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    def made(labels):
        return parse_config({"out": "x", "backbone": {"name": "m"}, "tasks": {
            "classification": {"train": "a", "labels": labels}}}, root=tmp_path).tasks["classification"].labels
    assert made("labels.txt") == ["cat", "dog"] == made(["cat", "dog"])
    for labels, message in (("none.txt", "tasks.classification.labels: cannot read the list"), (["a"], "at least 2"),
                            (["a", "a"], "distinct")):
        with pytest.raises(UserError, match=message):
            made(labels)
