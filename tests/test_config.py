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
