"""What a record of a shard says: the member that describes it, and its images, by the format of the shard.

"tagged":         KEY.json, this package's schema.
"img2dataset":    KEY.txt, one caption; no tag: the config names the task, shard and key are the image's id.
"clip_benchmark": KEY.txt, one caption a line, or for classification KEY.cls, the number of the class.
"""

import os
import re
from collections.abc import Collection, Sequence
from typing import BinaryIO

from vl_mtl_lora.data.schema import IMAGE_EXTENSIONS, check_fields, parse_fields
from vl_mtl_lora.data.tar import Record
from vl_mtl_lora.errors import BadSample

Place = tuple[int, int]  # offset and length of a member


def description(file: BinaryIO, record: Record, format: str, kind: str | None = None) -> tuple[Place, bytes]:
    """(place of the member that describes a record, its bytes). Raises BadSample where there is none."""
    if record.problem:
        raise BadSample(record.problem)
    name = "json" if format == "tagged" else "cls" if (format, kind) == ("clip_benchmark", "classification") else "txt"
    if name not in record.members:
        raise BadSample(f"no member .{name}")
    offset, length = place = record.members[name]
    try:
        return place, os.pread(file.fileno(), length, offset)
    except OSError as error:
        raise BadSample(f"member .{name} cannot be read: {error}") from error


def tagged_fields(text: bytes, known_tags: Collection[str] | None = None) -> dict:
    """The object of KEY.json. Raises BadSample without a tag, or with one that is not known."""
    fields = parse_fields(text)
    check_fields(fields, None, images=0)
    if known_tags is not None and fields["task"] not in known_tags:
        raise BadSample(f"unknown task {fields['task'][:60]!r}; known are {', '.join(known_tags)}")
    return fields


def untagged_fields(text: bytes, image_id: str, task: str, kind: str, format: str,
                    labels: Sequence[str] | None) -> dict:
    """The fields of a sample whose format carries no tag. labels: of the classes' numbers, None for the number itself.

    Raises:
        BadSample: no UTF-8, or no number of a class.
    """
    try:
        words = text.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample("the text is not UTF-8") from error
    fields = {"task": task, "image_id": image_id}
    if kind == "classification":
        if not re.fullmatch(r"[0-9]{1,9}", words) or labels is not None and int(words) >= len(labels):
            raise BadSample(f"member .cls is {words[:20]!r}: expected the number of a class"
                            + (f" below {len(labels)}" if labels is not None else ""))
        return {**fields, "label": words if labels is None else labels[int(words)]}
    captions = [words] if format == "img2dataset" else words.splitlines()
    return {**fields, "captions": [caption.strip() for caption in captions if caption.strip()]}


def image_places(record: Record) -> list[Place]:
    """The places of a record's images: KEY.png alone, or KEY.0.png, KEY.1.png and so on."""
    return [record.members[name] for name in sorted(record.members) if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
