"""Ten small tasks that get in each other's way, drawn and from PyPI packages -> shards, to compare adapters on.

Writes {colour,shape,count,place,coarse,fine,find,swapped,emoji,easy}-{train,valid,test}-*.tar with a manifest each.
Questions tell their task; what is wanted of a picture in "coarse" and "fine" captions, and of a caption in "find" and
"swapped" retrieval, where each colour is called by another's name, is told by the task's tag alone. "emoji" and "easy"
are the quickstart's emoji and easy-VQA. Licence of the drawn ones: MIT.

    python data_scripts/interference_to_shards.py shards
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice

from convert import argument_parser, command, convert
from scenes import COLOURS, NUMBERS, Thing, article, make_scene

from vl_mtl_lora.data import examples

SOURCE = ("drawn by data_scripts/interference_to_shards.py; emoji: OpenMoji (CC BY-SA 4.0), https://openmoji.org, and "
          "Twemoji (CC BY 4.0); easy: easy-VQA (MIT), https://github.com/vzhou842/easy-VQA")
LICENCE = "MIT, CC BY 4.0, CC BY-SA 4.0"
SIZES = {"train": 4000, "valid": 300, "test": 600}  # of each task
_NAMES = list(COLOURS)
SWAPPED = {name: _NAMES[(i + len(_NAMES) // 2) % len(_NAMES)] for i, name in enumerate(_NAMES)}


def colour(things: list[Thing], rng: random.Random) -> dict | None:
    """What colour something has whose shape is there once."""
    asked = _lonely(things, rng, "shape")
    return asked and {"question": f"what is the color of the {asked.shape}?", "answers": [asked.colour]}


def shape(things: list[Thing], rng: random.Random) -> dict | None:
    """What something is whose colour is there once."""
    asked = _lonely(things, rng, "colour")
    return asked and {"question": f"what shape is the {asked.colour} object?", "answers": [asked.shape]}


def place(things: list[Thing], rng: random.Random) -> dict | None:
    """Where something is whose shape is there once."""
    asked = _lonely(things, rng, "shape")
    return asked and {"question": f"where is the {asked.shape}?", "answers": [asked.place]}


def count(things: list[Thing], rng: random.Random) -> dict:
    """How many things there are."""
    return {"question": "how many shapes are there?", "answers": [NUMBERS[len(things)]]}


def coarse(things: list[Thing], rng: random.Random) -> dict:
    """A caption that names shapes."""
    return {"captions": [_listed(things, lambda t: article(t.shape))]}


def fine(things: list[Thing], rng: random.Random) -> dict:
    """A caption that names shapes, colours, sizes and places."""
    return {"captions": [_listed(things, _in_full)]}


def find(things: list[Thing], rng: random.Random) -> dict:
    """Retrieval by captions in full."""
    return {"captions": [_listed(things, _in_full)]}


def swapped(things: list[Thing], rng: random.Random) -> dict:
    """Retrieval by captions in full with the colours' names exchanged."""
    return {"captions": [_listed(things, lambda t: _in_full(t, SWAPPED[t.colour]))]}


DRAWN: dict[str, Callable[[list[Thing], random.Random], dict | None]] = {
    "colour": colour, "shape": shape, "count": count, "place": place, "coarse": coarse, "fine": fine, "find": find,
    "swapped": swapped}
PACKAGED = {"emoji": examples.emoji_samples, "easy": examples.easy_vqa_samples}
SPLITS = [f"{task}-{split}" for split in SIZES for task in (*DRAWN, *PACKAGED)]


def samples(split: str) -> Iterator[dict]:
    task, _, split = split.partition("-")
    found = drawn_samples(task, split) if task in DRAWN else packaged_samples(task, split)
    yield from islice(found, SIZES[split])


def drawn_samples(task: str, split: str) -> Iterator[dict]:
    """Endless samples of a task, no two splits or tasks with a scene in common."""
    rng = random.Random(f"{task} {split}")
    number = 0
    while True:
        image, things = make_scene(rng)
        if fields := DRAWN[task](sorted(things, key=lambda thing: thing.x), rng):
            about = {"question_id": f"{task}/{split}/{number}"} if "question" in fields else {}
            yield {"image": image, "image_id": f"{task}/{split}/{number}", "task": task, **fields, **about}
            number += 1


def packaged_samples(task: str, split: str) -> Iterator[dict]:
    """The samples of a package, shuffled, since easy-VQA has those of a picture in a row."""
    found = list(PACKAGED[task](split))
    random.Random(f"{task} {split}").shuffle(found)
    return ({**sample, "task": task} for sample in found)


def _lonely(things: list[Thing], rng: random.Random, attribute: str) -> Thing | None:
    """One of the things whose shape or colour no other has."""
    values = [getattr(thing, attribute) for thing in things]
    lonely = [thing for thing, value in zip(things, values) if values.count(value) == 1]
    return rng.choice(lonely) if lonely else None


def _in_full(thing: Thing, colour: str | None = None) -> str:
    return f"{article(f'{thing.size} {colour or thing.colour} {thing.shape}')} at the {thing.place}"


def _listed(things: list[Thing], noun: Callable[[Thing], str]) -> str:
    """Things from left to right."""
    return " and ".join(noun(thing) for thing in things)


@command
def main() -> None:
    convert(argument_parser(__doc__, "interference", SPLITS, source=None).parse_args(), samples, SOURCE, LICENCE)


if __name__ == "__main__":
    main()
