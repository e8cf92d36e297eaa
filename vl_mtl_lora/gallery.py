"""Which test samples a report shows: the largest gains and losses of each task, and some at even distances."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.data.schema import in_words
from vl_mtl_lora.evaluate import Evaluation
from vl_mtl_lora.tasks.base import Answer, Task

EACH = 3  # gains, losses, and samples at even distances, of each task
_LARGE, _SMALL = 256, 112  # pixels of a sample's picture, and of one that was found
_MOST_LABELS = 15  # of a confusion


@dataclass(frozen=True)
class Found:
    """A picture that a search found, as a data URL, and whether it is right."""

    picture: str
    right: bool


@dataclass(frozen=True)
class Said:
    """What an arm said of a sample."""

    text: str
    right: bool
    found: tuple[Found, ...] = ()


@dataclass(frozen=True)
class Example:
    """A test sample with what was asked, what is right, and what both arms said.

    why: "largest gains", "largest losses" or "at even distances". pictures: data URLs.
    """

    task: str
    why: str
    pictures: tuple[str, ...]
    question: str
    truth: str
    zero_shot: Said
    adapted: Said


def pick_examples(tasks: Mapping[str, Task], zero_shot: Mapping[str, Evaluation], adapted: Mapping[str, Evaluation],
                  images_of: Callable[[str, int], tuple[bytes, ...]], each: int = EACH) -> list[Example]:
    """Examples of each task, gains first, then losses, then samples that are no choice at all.

    images_of: (task, row in its index) -> the image files of a sample, which evaluations do not keep.
    """
    examples = []
    for name, after in adapted.items():
        task, before = tasks[name], zero_shot[name]
        change = [b - a for a, b in zip(task.quality(before.predictions, before.samples),
                                        task.quality(after.predictions, after.samples))]
        chosen = choose(change, [(in_words(sample.fields), sample.image_id) for sample in after.samples], each)
        rows = [row for _, row in chosen]
        said = zip(task.answers(before.predictions, before.samples, rows),
                   task.answers(after.predictions, after.samples, rows))
        for (why, row), answers in zip(chosen, said):
            shown = [_said(answer, lambda other, name=name, after=after: images_of(name, after.rows[other])[0])
                     for answer in answers]
            question, truth = in_words(after.samples[row].fields)
            if answers[1].pictures:  # a search: the first caption asks, the picture is right
                question, truth = after.samples[row].fields["captions"][0], ""
            pictures = tuple(picture_url(data, _LARGE) for data in images_of(name, after.rows[row]))
            examples.append(Example(name, why, pictures, question, truth, *shown))
    return examples


def choose(change: Sequence[float], tells: Sequence[Sequence[Hashable]], each: int) -> list[tuple[str, int]]:
    """(why, row) of up to `each` rows of the largest gain, of the largest loss, and at even distances.

    change: how much better each sample is answered. tells: what a sample says and shows; no two shown share any of it.
    """
    chosen: list[tuple[str, int]] = []
    seen = set()

    def take(why: str, rows: Sequence[int]) -> None:
        count = 0
        for row in rows:
            if count < each and not seen & set(tells[row]):
                seen.update(tells[row])
                chosen.append((why, row))
                count += 1

    order = sorted(range(len(change)), key=lambda row: -change[row])
    take("largest gains", [row for row in order if change[row] > 0])
    take("largest losses", [row for row in reversed(order) if change[row] < 0])
    take("at even distances", [(2 * i + 1) * len(change) // (2 * each) for i in range(min(each, len(change)))])
    return chosen


def confusion(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[list[int]]]:
    """(labels, counts) of (truth, said) pairs: rows are truths, columns what was said, the rarest in one "others"."""
    often = Counter(label for pair in pairs for label in pair)
    labels = [label for label, _ in often.most_common(_MOST_LABELS)]
    if len(often) > len(labels):
        labels[-1] = "others"
    places = {label: i for i, label in enumerate(labels)}
    counts = [[0] * len(labels) for _ in labels]
    for truth, said in pairs:
        counts[places.get(truth, len(labels) - 1)][places.get(said, len(labels) - 1)] += 1
    return labels, counts


def picture_url(data: bytes, side: int) -> str:
    """An image file -> a data URL, at most `side` pixels wide and high."""
    image = decode_image(data)
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _said(answer: Answer, image_of: Callable[[int], bytes]) -> Said:
    return Said(answer.text, answer.right, tuple(Found(picture_url(image_of(row), _SMALL), right)
                                                 for row, right in answer.pictures))
