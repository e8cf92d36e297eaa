"""What a sample is, and whether one is good.

A sample is one image file and one JSON object: `task` (the tag), `image_id`, and the fields of its task's kind:

    retrieval, captioning  captions: [text, ..]
    vqa                    question: text, answers: [text, ..], question_id
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vl_mtl_lora.errors import BadSample

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_LONGEST_TEXT = 32_768  # characters; no tower reads so many, and one of a megabyte is a mistake


@dataclass(frozen=True)
class Sample:
    """One sample, its images still encoded.

    fields: the JSON object. images: the bytes of the image files. key, shard: where it came from.
    """

    fields: Mapping[str, Any]
    images: tuple[bytes, ...]
    key: str
    shard: str

    @property
    def task(self) -> str:
        return self.fields["task"]

    @property
    def image_id(self) -> str:
        return str(self.fields["image_id"])


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_id(value) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


_TEXT, _TEXTS, _ID = (_is_text, "a text"), (_are_texts, "a list of texts"), (_is_id, "a text or integer")
_FIELDS = {
    "retrieval": {"captions": _TEXTS}, "captioning": {"captions": _TEXTS},
    "vqa": {"question": _TEXT, "answers": _TEXTS, "question_id": _ID},
}


def parse_fields(data: str | bytes) -> dict:
    """JSON, in UTF-8 where it is bytes -> the sample's object.

    Raises:
        BadSample: no JSON, no object, a name twice in one object, a number that is none.
    """
    try:
        fields = _DECODER.decode(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadSample(f"expected a JSON object, got {type(fields).__name__}")
    return fields


def _no_number(text: str):
    raise ValueError(f"{text} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"field {Counter(name for name, _ in pairs).most_common(1)[0][0]} occurs twice")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_no_number, object_pairs_hook=_object)  # once: every record passes it


def check_fields(fields: Any, kind: str | None) -> None:
    """Raises BadSample unless `fields` is a sample of the given task kind (None: only what all kinds share)."""
    if not isinstance(fields, dict):
        raise BadSample(f"expected a JSON object, got {type(fields).__name__}")
    if not _is_text(fields.get("task")):
        raise BadSample("field task is missing or no text")
    for name, (valid, what) in {"image_id": _ID, **_FIELDS.get(kind, {})}.items():
        if name not in fields:
            raise BadSample(f"field {name} is missing")
        if not valid(fields[name]):
            raise BadSample(f"field {name} is not {what}: {str(fields[name])[:60]!r}")
        _check_texts(name, fields[name])


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
