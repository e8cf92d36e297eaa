"""The ten tasks that get in each other's way: what they ask of a scene, and their shards."""

import random

import pytest

from tests.downloads import SCRIPTS, read
from vl_mtl_lora.config import load_config


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import interference_to_shards
    return interference_to_shards


def test_what_is_asked_of_a_scene(script):
    from scenes import Thing

    def thing(shape, colour, x, y, side):
        return Thing(shape, colour, (0, 0, 0), x, y, side, side)

    things = [thing("star", "red", 10, 10, 5), thing("circle", "red", 32, 32, 10), thing("star", "blue", 50, 50, 15)]
    rng = random.Random(0)
    asked = {name: [make(things, rng) for _ in range(30)] for name, make in script.DRAWN.items()}
    # One circle; one thing that is blue.
    assert asked["colour"] == [{"question": "what is the color of the circle?", "answers": ["red"]}] * 30
    assert asked["place"] == [{"question": "where is the circle?", "answers": ["center"]}] * 30
    assert asked["shape"] == [{"question": "what shape is the blue object?", "answers": ["star"]}] * 30
    assert asked["count"][0] == {"question": "how many shapes are there?", "answers": ["three"]}
    assert asked["coarse"][0] == {"captions": ["a star and a circle and a star"]}
    full = ("a small {} star at the top left and a medium {} circle at the center and a large {} star at the bottom "
            "right")
    for name in ("fine", "find"):
        assert asked[name][0] == {"captions": [full.format("red", "red", "blue")]}
    swapped = [script.SWAPPED["red"], script.SWAPPED["red"], script.SWAPPED["blue"]]
    assert asked["swapped"][0] == {"captions": [full.format(*swapped)]}
    assert script.colour(things[::2], rng) is None  # two stars
    assert sorted(script.SWAPPED.values()) == sorted(script.SWAPPED) and all(a != b for a, b in script.SWAPPED.items())


def test_shards_are_those_that_the_config_names(script, tmp_path, run):
    names = [*script.DRAWN, *script.PACKAGED]
    code, _, error = run("interference_to_shards", tmp_path, "--limit", 12, "--split",
                         *(f"{name}-{part}" for name in names for part in ("train", "test")))
    assert code == 0, error
    config = load_config(SCRIPTS.parent / "configs" / "sweeps" / "interference.yaml")
    assert sorted(config.tasks) == sorted(names)
    for name, task in config.tasks.items():
        assert task.train[0].endswith(f"interference-{name}-train-*.tar")
        train, test = (read(tmp_path, f"interference-{name}-{part}") for part in ("train", "test"))
        assert len(train) == len(test) == 12 and {fields["task"] for fields, _ in [*train, *test]} == {name}
        pictures = [images[0] for _, images in train]
        if name in script.DRAWN:
            assert not set(pictures) & {images[0] for _, images in test}
        if task.kind == "vqa":
            assert all(answer in task.answers for fields, _ in [*train, *test] for answer in fields["answers"])


def test_every_answer_is_in_the_config_s_list(script):
    from scenes import COLOURS, NUMBERS, SHAPES

    config = load_config(SCRIPTS.parent / "configs" / "sweeps" / "interference.yaml")
    assert config.tasks["colour"].answers == list(COLOURS) and config.tasks["shape"].answers == list(SHAPES)
    assert config.tasks["count"].answers == list(NUMBERS[1:])
