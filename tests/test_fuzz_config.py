"""Arbitrary and damaged configs are read, or refused with our own error; what is read survives being written."""

import json

import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzzing import damaged, fuzz, scalars, texts
from tests.test_config import GOOD
from vl_mtl_lora.config import dump_config, load_config
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.sections import RunConfig


def load(tmp_path, text, overrides=()):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    try:
        config = load_config(path, overrides)
    except UserError as error:
        str(error).encode()
        return
    assert isinstance(config, RunConfig)
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    json.dumps(config.model_dump(), ensure_ascii=False).encode()
    assert json.loads(json.dumps(config.model_dump())) == config.model_dump()


TOKENS = ["a", ": ", "\n", "- ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "!!float ", "!!bool ", "!!timestamp ",
          "!!set ", "\"", "'", "<<: ", "? ", "out: ", "backbone: ", "tasks: ", "  ", "1", "e5", "!!binary ", "!!omap ",
          "!!str ", "=", "|", ">", "#", "~", "0x", ".", "1:1", "2001-01-01", "%", "@"]


@fuzz(300)
@given(text=st.binary(max_size=100) | texts | st.lists(st.sampled_from(TOKENS), max_size=30).map("".join))
def test_config_text(tmp_path, text):
    load(tmp_path, text)


PLACES = ["out", "backbone", "backbone.name", "backbone.options", "backbone.options.x", "tasks", "tasks.vqa",
          "tasks.vqa.rows", "tasks.vqa.answers", "tasks.vqa.train", "tasks.vqa.test", "tasks.vqa.kind",
          "tasks.vqa.prompt", "tasks.pictures.kind", "tasks.vqa.augment", "tasks.vqa.zero_shot_prompt", "data",
          "data.mixing", "data.mixing.by", "data.mixing.weights", "train.lr", "train.steps", "train", "adapter",
          "adapter.alpha", "adapter.targets", "tasks.retrieval", "train.precision", "data.ignore_tasks"]
ODD = ["~nobody/x", "1e5", "2001-01-01", "vqa", "~", "=", "<<", "a\0b", "{question} {answer}", "1:30", "*", "quotas",
       "0x1", "null"]
leaves = scalars | st.binary(max_size=5) | st.dates() | st.datetimes() | st.sampled_from(ODD)
keys = scalars | st.sampled_from([place.rpartition(".")[2] for place in PLACES])
yaml_values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4)
                           | st.sets(scalars, max_size=3), max_leaves=8)


@st.composite
def structures(draw):
    data = yaml.safe_load(GOOD)
    for place in draw(st.lists(st.sampled_from(PLACES), max_size=3)):
        at = data
        *parents, last = place.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                break
        else:
            at[last] = draw(yaml_values)
    return data


@fuzz(500)
@given(data=structures() | yaml_values)
def test_config_values(tmp_path, data):
    try:
        text = yaml.safe_dump(data, allow_unicode=True)
    except ValueError:
        return
    load(tmp_path, text)


@fuzz(300)
@given(damaged(GOOD.encode()))
def test_config_damaged(tmp_path, text):
    load(tmp_path, text[0])


YAML = ["!!int ''", "!!bool x", "!!timestamp x", "&a [*a]", "&a {x: *a}", "2001-99-99", "[" * 500, "0x" + "f" * 5000,
        "1e5", "~x/y", "\0"]
pairs = st.tuples(st.sampled_from(PLACES) | texts, texts | yaml_values.map(yaml.safe_dump) | st.sampled_from(YAML))


@fuzz(300)
@given(st.lists(pairs.map("=".join) | texts, max_size=3))
def test_config_overrides(tmp_path, overrides):
    load(tmp_path, GOOD, overrides)
