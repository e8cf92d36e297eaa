"""The sample schema, its validation, and writing shards with a manifest.

A sample is one image file and one JSON object with `task`, `image_id` and, by task, `captions` (retrieval,
captioning) or `question`, `answers`, `question_id` (vqa). In a shard it is KEY.png (jpg, webp) and KEY.json.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image

from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.errors import BadSample, UserError

IMAGE_TYPES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
KIND_FIELDS = {"retrieval": ("captions",), "captioning": ("captions",), "vqa": ("question", "answers", "question_id")}


@dataclass(frozen=True)
class Sample:
    """One sample, its image still encoded.

    fields: the JSON object. image: the bytes of the image file. key, shard: where it came from.
    """

    fields: Mapping[str, Any]
    image: bytes
    key: str
    shard: str

    @property
    def task(self) -> str:
        return self.fields["task"]

    @property
    def image_id(self) -> str:
        return str(self.fields["image_id"])


def check_fields(fields: Any, kind: str | None) -> None:
    """Raises BadSample unless `fields` is a sample of the given task kind (None: only what all kinds share)."""
    if not isinstance(fields, dict):
        raise BadSample(f"expected a JSON object, got {type(fields).__name__}")
    if not isinstance(fields.get("task"), str) or not fields["task"]:
        raise BadSample("field task is missing or no text")
    _require(fields, "image_id", lambda v: isinstance(v, (str, int)) and not isinstance(v, bool), "a text or integer")
    for name in KIND_FIELDS.get(kind, ()):
        if name in ("captions", "answers"):
            _require(fields, name, lambda v: isinstance(v, list) and v and all(isinstance(t, str) and t.strip()
                                                                              for t in v), "a list of texts")
        elif name == "question":
            _require(fields, name, lambda v: isinstance(v, str) and bool(v.strip()), "a text")
        else:
            _require(fields, name, lambda v: isinstance(v, (str, int)) and not isinstance(v, bool),
                     "a text or integer")


def _require(fields: dict, name: str, valid, wanted: str) -> None:
    if name not in fields:
        raise BadSample(f"field {name} is missing")
    if not valid(fields[name]):
        raise BadSample(f"field {name} is not {wanted}: {str(fields[name])[:60]!r}")


def write_shards(samples: Iterable[Mapping[str, Any]], out_dir: str | Path, *, name: str = "shard",
                 samples_per_shard: int = 2000, source: str = "", licence: str = "") -> dict:
    """Writes samples to OUT_DIR/NAME-000000.tar ... and OUT_DIR/NAME.manifest.json; returns the manifest.

    Args:
        samples: objects of the schema plus `image`: a path, the bytes of an image file, or a PIL image (stored as
            PNG). `key` is optional.
        samples_per_shard: the most samples in one shard.
        source, licence: where the data comes from, for the manifest.

    A shard gets its name only when it is whole. Shards of an earlier write under the same name are replaced.

    Raises:
        UserError: a sample that does not fit the schema, or an image that cannot be read; names the sample.
    """
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    shards: list[dict] = []
    batch: list[dict] = []
    keys: set[str] = set()

    manifest_file = out_dir / f"{name}.manifest.json"

    def flush():
        manifest_file.unlink(missing_ok=True)  # an old one would tell of shards that are being replaced
        file = out_dir / f"{name}-{len(shards):06d}.tar"
        temporary = file.with_suffix(".tar.part")
        try:
            with open(temporary, "wb") as stream:
                with wds.TarWriter(stream, encoder=False, mtime=0) as tar:
                    for record in batch:
                        tar.write(record)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        counts = Counter(json.loads(record["json"])["task"] for record in batch)
        shards.append({"file": file.name, "samples": len(batch), "tasks": dict(sorted(counts.items()))})
        batch.clear()

    for index, sample in enumerate(samples):
        record = _record(sample, index)
        if record["__key__"] in keys:
            raise UserError(f"sample {index}: key {record['__key__']!r} occurs twice")
        keys.add(record["__key__"])
        batch.append(record)
        if len(batch) == samples_per_shard:
            flush()
    if batch:
        flush()
    for old in out_dir.iterdir():
        if re.fullmatch(re.escape(name) + r"-\d{6}\.tar", old.name) and old.name not in {s["file"] for s in shards}:
            old.unlink()
    tasks = Counter()
    for shard in shards:
        tasks.update(shard["tasks"])
    manifest = {"name": name, "samples": sum(tasks.values()), "tasks": dict(sorted(tasks.items())), "shards": shards,
                "source": source, "licence": licence}
    manifest_file.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _record(sample: Mapping[str, Any], index: int) -> dict[str, Any]:
    fields = {k: v for k, v in sample.items() if k not in ("image", "key")}
    key = str(sample.get("key", f"{index:08d}"))
    try:
        # The tag may be any name; what it must carry is known for the built-in kinds.
        check_fields(fields, fields.get("task") if isinstance(fields, dict) else None)
        if "image" not in sample:
            raise BadSample("field image is missing")
        if not key or any(c in key for c in "./\\") or key.strip() != key:
            raise BadSample(f"key {key!r} may not be empty or hold . / \\ or outer spaces")
        data, extension = _image_bytes(sample["image"])
    except BadSample as problem:
        raise UserError(f"sample {index} ({key}): {problem}") from problem
    return {"__key__": key, extension: data, "json": json.dumps(fields, ensure_ascii=False).encode()}


def _image_bytes(image) -> tuple[bytes, str]:
    if isinstance(image, Image.Image):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue(), "png"
    if isinstance(image, (str, os.PathLike)):
        try:
            return _read_image(os.fspath(image), os.stat(image).st_mtime_ns)
        except OSError as error:
            raise BadSample(f"image cannot be read: {error}") from error
    if not isinstance(image, bytes):
        raise BadSample(f"image must be a path, bytes or a PIL image, got {type(image).__name__}")
    decode_image(image)  # a broken picture is refused here, not in a training run
    kind = Image.open(io.BytesIO(image)).format
    if kind in IMAGE_TYPES:
        return image, IMAGE_TYPES[kind]
    return _image_bytes(decode_image(image))


@lru_cache(maxsize=16)  # samples of one picture follow each other: it is read and checked once
def _read_image(path: str, changed: int) -> tuple[bytes, str]:
    return _image_bytes(Path(path).read_bytes())


def read_jsonl(path: str | Path) -> Iterable[dict]:
    """Samples from a JSON-lines file; `image` paths are absolute or relative to the file.

    Raises:
        UserError: a line that is no JSON object, with its number.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(sample, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, got {type(sample).__name__}")
        if isinstance(sample.get("image"), str):
            sample["image"] = path.parent / sample["image"]
        yield sample
