"""What a sample is, and whether one is good.

A sample is any number of image files (most kinds of task: one) and one JSON object: `task` (the tag), `image_id`, and
the fields of its task's kind:

    retrieval, captioning  captions: [text, ..]
    vqa                    question: text, answers: [text, ..], question_id
    classification         label: the class's name; without an image also text
    multiple_choice        question: text, choices: [text, ..], answer: index into choices, question_id
    matching               text, label: one of the task's labels; without an image also text_pair, which text is held to
"""

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vl_mtl_lora.errors import BadSample

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_LONGEST_TEXT = 32_768  # characters; no tower reads so many, and one of a megabyte is a mistake


@dataclass(frozen=True)
class Sample:
    """One sample, its images still encoded.

    fields: the JSON object. images: the bytes of the image files. key, shard: where it came from. epoch: how often
    all of its task's samples have been seen before.
    """

    fields: Mapping[str, Any]
    images: tuple[bytes, ...]
    key: str
    shard: str
    epoch: int = 0

    @property
    def task(self) -> str:
        return self.fields["task"]

    @property
    def image_id(self) -> str:
        """What tells pictures apart; a sample without one has its key for it."""
        return str(self.fields.get("image_id", self.key))

    @property
    def dataset(self) -> str:
        """Its field of that name, else what its shard is called without the number."""
        named = self.fields.get("dataset")
        return named if _is_text(named) else self.shard.rpartition("/")[2].rpartition("-")[0]

    def turn(self, texts: Sequence[str]) -> str:
        """One of the sample's texts: in every epoch the next one, so that all are seen equally often."""
        return texts[(zlib.crc32(self.key.encode()) + self.epoch) % len(texts)]


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_id(value) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_index(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_TEXT, _TEXTS, _ID = (_is_text, "a text"), (_are_texts, "a list of texts"), (_is_id, "a text or integer")
_FIELDS = {
    "retrieval": {"captions": _TEXTS}, "captioning": {"captions": _TEXTS},
    "vqa": {"question": _TEXT, "answers": _TEXTS, "question_id": _ID},
    "classification": {"label": _TEXT},
    "multiple_choice": {"question": _TEXT, "choices": _TEXTS, "answer": (_is_index, "an index"), "question_id": _ID},
    "matching": {"text": _TEXT, "label": _TEXT},
}
_FIELDS_WITHOUT_IMAGE = {"classification": {"text": _TEXT}, "matching": {"text_pair": _TEXT}}
_NEED_AN_IMAGE = ("retrieval", "captioning", "vqa")


def parse_fields(data: str | bytes) -> dict:
    """JSON, in UTF-8 where it is bytes -> the sample's object.

    Raises:
        BadSample: no JSON, no object, a name twice in one object, a number that is none, half a Unicode character.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        fields = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadSample(f"expected a JSON object, got {type(fields).__name__}")
    if "\\u" in text:  # only an escape can be half a character
        for name, value in fields.items():
            try:
                json.dumps([name, value], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise BadSample(f"field {_visible(name)} is no valid Unicode") from error
    return fields


def _visible(name: str) -> str:
    return name[:60].encode(errors="replace").decode()


def _no_number(text: str):
    raise ValueError(f"{text} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"field {_visible(Counter(name for name, _ in pairs).most_common(1)[0][0])} occurs twice")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_no_number, object_pairs_hook=_object)  # once: every record passes it


def check_fields(fields: Any, kind: str | None, images: int = 1) -> None:
    """Raises BadSample unless `fields` is a sample of a task kind (None: what all share) with so many images."""
    if not isinstance(fields, dict):
        raise BadSample(f"expected a JSON object, got {type(fields).__name__}")
    if not _is_text(fields.get("task")):
        raise BadSample("field task is missing or no text")
    if kind in _NEED_AN_IMAGE and images != 1:
        raise BadSample(f"{images or 'no'} image{'s' * (images > 1)}: a sample of {kind} has one")
    wanted = dict(_FIELDS.get(kind, {}))
    if images or "image_id" in fields:
        wanted["image_id"] = _ID
    if not images:
        wanted |= _FIELDS_WITHOUT_IMAGE.get(kind, {})
    for name, (valid, what) in wanted.items():
        if name not in fields:
            raise BadSample(f"field {name} is missing")
        if not valid(fields[name]):
            raise BadSample(f"field {name} is not {what}: {str(fields[name])[:60]!r}")
        _check_texts(name, fields[name])
    if kind == "multiple_choice":
        choices = fields["choices"]
        if fields["answer"] >= len(choices) or len(set(choices)) < max(len(choices), 2):
            raise BadSample(f"field choices must be two or more different texts, and answer {fields['answer']} an "
                            "index into them, counted from 0")


def _check_texts(name: str, value: Any) -> None:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            if len(text) > _LONGEST_TEXT:
                raise BadSample(f"field {name} has {len(text):,} characters, more than {_LONGEST_TEXT:,}")
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise BadSample(f"field {name} is no valid Unicode") from error


def check_key(key: str) -> None:
    """Raises BadSample for a key that no sample of ours has: such ones are made to lead somewhere else."""
    if not key or key.startswith(("/", "\\")) or ".." in key.replace("\\", "/").split("/"):
        raise BadSample(f"key {key!r} is empty or leads out of the shard")


def in_words(fields: Mapping[str, Any]) -> tuple[str, str]:
    """(what a good sample of any kind asks, what is right), for people to read."""
    # Fields that the sample's kind does not ask for may be there too, and hold anything.
    asked = [fields[name] for name in ("question", "text", "text_pair") if _is_text(fields.get(name))]
    choices, answer = fields.get("choices"), fields.get("answer")
    if _are_texts(choices) and _is_index(answer) and answer < len(choices):
        return f"{' '.join(asked)} ({', '.join(choices)})", choices[answer]
    right = [fields["label"]] if _is_text(fields.get("label")) else next(
        (fields[name] for name in ("answers", "captions") if _are_texts(fields.get(name))), [])
    return " / ".join(asked), " / ".join(dict.fromkeys(right))


def kind_of(fields: Mapping[str, Any], images: int = 1) -> str | None:
    """The kind whose fields a sample with so many images has, where no config tells it; None if there is none.

    Of captions nobody can tell whether they are for retrieval or captioning, unless the tag does.
    """
    if fields.get("task") in _FIELDS:
        return fields["task"]
    needed = {kind: set(_FIELDS[kind]) | set({} if images else _FIELDS_WITHOUT_IMAGE.get(kind, {})) for kind in _FIELDS}
    return next((kind for kind in sorted(needed, key=lambda kind: -len(needed[kind]))
                 if fields.keys() >= needed[kind]), None)
