"""Writing samples into webdataset shards with a manifest. A sample becomes KEY.png (jpg, webp) and KEY.json.

Of a sample with several images they become KEY.0.png, KEY.1.png and so on; one without has KEY.json alone.

No half shard is ever left under a shard's name, and a write that broke off can be taken up again.
"""

import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image

from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.data.schema import check_fields, kind_of, parse_fields
from vl_mtl_lora.errors import BadSample, UserError

IMAGE_TYPES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


def write_shards(samples: Iterable[Mapping[str, Any]], out_dir: str | Path, *, name: str = "shard",
                 samples_per_shard: int = 2000, source: str = "", licence: str = "", max_side: int | None = None,
                 skip_broken: bool = False, resume: bool = False) -> dict:
    """Writes samples to OUT_DIR/NAME-000000.tar ... and OUT_DIR/NAME.manifest.json; returns the manifest.

    Args:
        samples: objects of the schema (see data/schema.py) plus `image`: a path (also one inside a zip file), the bytes
            of an image file, or a PIL image (stored as PNG); `images`: a list of them for a sample of several; neither
            for one without. `key` is optional.
        samples_per_shard: the most samples in one shard.
        source, licence: where the data comes from, for the manifest.
        max_side: larger pictures are scaled down to so many pixels; None: files are stored as they are.
        skip_broken: leave out samples that cannot be used, and name them in the manifest.
        resume: go on with a write of the same samples that broke off.

    A shard gets its name only when it is whole. Shards of an earlier write under the same name are replaced. Until the
    manifest is there, OUT_DIR/NAME.partial.json tells that something is missing.

    Raises:
        UserError: a sample that does not fit the schema, an image that cannot be read (names the sample), a file that
            cannot be written, a write to resume that was of other samples.
    """
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    out_dir = Path(out_dir)
    settings = {"samples_per_shard": samples_per_shard, "max_side": max_side}
    with _disk_told(out_dir, name):
        out_dir.mkdir(parents=True, exist_ok=True)
        writer = _Writer(out_dir, name, settings, resume)
    pictures = _Pictures(max_side)
    batch: list[dict] = []
    for index, sample in enumerate(samples):
        key = str(sample.get("key", f"{index:08d}"))
        if not writer.is_new(index, sample, key):
            continue
        try:
            batch.append(_record(sample, key, pictures))
        except BadSample as problem:
            if not skip_broken:
                raise UserError(f"sample {index} ({key}): {problem}") from problem
            writer.skipped.append({"sample": index, "key": key, "reason": str(problem)})
        if len(batch) == samples_per_shard:
            with _disk_told(out_dir, name):
                writer.write(batch)
            batch = []
    writer.check_resumed()
    with _disk_told(out_dir, name):
        if batch:
            writer.write(batch)
        return writer.finish(source, licence)


class _Writer:
    """Whole shards, and what is known of them, on disk."""

    def __init__(self, out_dir: Path, name: str, settings: dict, resume: bool):
        self.out_dir, self.name, self.settings = out_dir, name, settings
        self.manifest_file, self.partial_file = out_dir / f"{name}.manifest.json", partial_file(out_dir, name)
        self.shards: list[dict] = []
        self.skipped: list[dict] = []
        self.keys: set[str] = set()
        self.seen, self.digest = 0, hashlib.sha256()  # of the samples that came in
        self.resumed_at, self.resumed_digest = 0, self.digest.hexdigest()
        if resume and self.partial_file.is_file():
            self._take_up()

    def _take_up(self) -> None:
        try:
            partial = json.loads(self.partial_file.read_text(encoding="utf-8"))
            self.shards, self.skipped = partial["shards"], partial["skipped"]
            self.resumed_at, self.resumed_digest = partial["seen"], partial["digest"]
            settings = partial["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.partial_file} is damaged: write the shards anew, without resume") from error
        if settings != self.settings:
            raise UserError(f"{self.partial_file} tells of a write with {settings}, this one has {self.settings}")
        for shard in self.shards:
            file = self.out_dir / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise UserError(f"{file} is gone or has changed since the write broke off: write anew, without resume")

    def is_new(self, index: int, sample: Mapping, key: str) -> bool:
        """Whether a sample is still to be written. Raises UserError for a key twice, and for other samples than before.

        Samples already there are compared by their fields; their pictures are not read again.
        """
        if key in self.keys:
            raise UserError(f"sample {index}: key {key!r} occurs twice")
        if index == self.resumed_at:
            self.check_resumed()
        self.keys.add(key)
        fields = {name: value for name, value in sample.items() if name not in ("image", "images")}
        try:
            self.digest.update(json.dumps(fields, sort_keys=True, default=str).encode() + b"\n")
        except (TypeError, ValueError) as error:
            raise UserError(f"sample {index} ({key}): fields cannot be written as JSON: {error}") from error
        self.seen += 1
        return index >= self.resumed_at

    def check_resumed(self) -> None:
        if self.resumed_at and (self.seen < self.resumed_at or self.seen == self.resumed_at
                                and self.digest.hexdigest() != self.resumed_digest):
            raise UserError(f"the samples are not those that {self.partial_file} tells of: write anew, without resume")

    def write(self, records: list[dict]) -> None:
        file = self.out_dir / f"{self.name}-{len(self.shards):06d}.tar"
        with _whole(file) as temporary:
            with open(temporary, "wb") as stream:
                with wds.TarWriter(stream, encoder=False, mtime=0) as tar:
                    for record in records:
                        tar.write(record)
                stream.flush()
                os.fsync(stream.fileno())
            if not self.shards:
                self._start()
        counts = Counter(record["__task__"] for record in records)
        self.shards.append({"file": file.name, "samples": len(records), "tasks": dict(sorted(counts.items())),
                            "bytes": file.stat().st_size, "sha256": checksum(file)})
        self._note(self.digest, self.seen)

    def _start(self) -> None:
        """From here on nothing of an earlier write may pass for a part of this one."""
        self._note(hashlib.sha256(), 0)
        self.manifest_file.unlink(missing_ok=True)
        for old in self.out_dir.iterdir():
            if re.fullmatch(re.escape(self.name) + r"-\d{6}\.tar", old.name):
                old.unlink()

    def _note(self, digest, seen: int) -> None:
        """Notes which samples are in whole shards: `seen` of them, of this digest."""
        _write_json(self.partial_file, {"seen": seen, "digest": digest.hexdigest(), "shards": self.shards,
                                        "settings": self.settings, "skipped": self.skipped})

    def finish(self, source: str, licence: str) -> dict:
        if not self.shards:
            raise UserError(f"there is no sample to write into {self.name}" + (
                f": all {len(self.skipped)} cannot be used, the first since {self.skipped[0]['reason']}"
                if self.skipped else ""))
        tasks = Counter()
        for shard in self.shards:
            tasks.update(shard["tasks"])
        manifest = {"name": self.name, "samples": sum(tasks.values()), "tasks": dict(sorted(tasks.items())),
                    "source": source, "licence": licence, **self.settings, "shards": self.shards,
                    "skipped": self.skipped}
        _write_json(self.manifest_file, manifest)
        self.partial_file.unlink()
        return manifest


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A temporary path that gets the file's name when all went well, and is removed otherwise."""
    temporary = file.with_name(file.name + ".part")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _disk_told(out_dir: Path, name: str) -> Iterator[None]:
    """Around what is written alone: the samples come from files of their own."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write shards {name} into {out_dir}: {error}") from error


def _write_json(file: Path, data: dict) -> None:
    with _whole(file) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def partial_file(folder: Path, name: str) -> Path:
    """The file that lies beside the shards NAME-* as long as some of them are missing."""
    return folder / f"{name}.partial.json"


def checksum(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _record(sample: Mapping[str, Any], key: str, stored: Callable[[Any], tuple[bytes, str]]) -> dict[str, Any]:
    fields, images = check_sample(sample)
    if not key or any(c in key for c in "./\\") or key.strip() != key or not key.isprintable():
        raise BadSample(f"key {key!r} may not be empty or hold . / \\, outer spaces or what cannot be printed")
    files = [stored(image) for image in images]
    names = ("",) if len(files) == 1 else tuple(f"{i}." for i in range(len(files)))
    try:
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as error:
        raise BadSample(f"fields cannot be written as JSON: {error}") from error
    return {"__key__": key, "__task__": fields["task"],
            **{name + extension: data for name, (data, extension) in zip(names, files)}, "json": text}


def check_sample(sample: Mapping[str, Any]) -> tuple[dict, list]:
    """What `write_shards` takes -> (the fields of its JSON object, its images, not looked at). Raises BadSample.

    The tag may be any name: the kind is the tag, or what the fields tell.
    """
    fields = {k: v for k, v in sample.items() if k not in ("image", "images", "key")}
    if "image" in sample and "images" in sample:
        raise BadSample("fields image and images exclude each other")
    images = sample["images"] if "images" in sample else [sample["image"]] if "image" in sample else []
    if not isinstance(images, list | tuple):
        raise BadSample(f"field images is not a list: {type(images).__name__}")
    check_fields(fields, kind_of(fields, len(images)) if isinstance(fields.get("task"), str) else None, len(images))
    return fields, list(images)


class _Pictures:
    """Pictures -> (bytes of an image file, its extension); the last is kept, since samples of one follow each other."""

    def __init__(self, max_side: int | None):
        self.max_side = max_side
        self._last: tuple[str, tuple[bytes, str]] | None = None

    def __call__(self, image: Any) -> tuple[bytes, str]:
        if isinstance(image, str):
            image = Path(image)
        if not hasattr(image, "read_bytes"):  # a path, or a file inside a zip
            return image_file(image, self.max_side)
        name = str(image)
        if self._last is None or self._last[0] != name:
            self._last = name, image_file(image, self.max_side)
        return self._last[1]


def image_file(image: Any, max_side: int | None = None) -> tuple[bytes, str]:
    """A picture -> (bytes of an image file, its extension). Raises BadSample where it cannot be read."""
    if isinstance(image, Image.Image):
        if max_side and max(image.size) > max_side:
            image = image.copy()
            image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue(), "png"
    if hasattr(image, "read_bytes"):
        try:
            image = image.read_bytes()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:  # the last three: of a zip
            raise BadSample(f"image cannot be read: {error}") from error
    if not isinstance(image, bytes):
        raise BadSample(f"image must be a path, bytes or a PIL image, got {type(image).__name__}")
    picture = decode_image(image)  # a broken picture is refused here, not in a training run
    kind = Image.open(io.BytesIO(image)).format
    if max_side and max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        if kind == "JPEG":
            stream = io.BytesIO()
            picture.save(stream, "JPEG", quality=95)
            return stream.getvalue(), "jpg"
    elif kind in IMAGE_TYPES:
        return image, IMAGE_TYPES[kind]
    return image_file(picture)


def read_jsonl(path: str | Path) -> Iterable[dict]:
    """Samples from a JSON-lines file; `image` paths, and those in `images`, are absolute or relative to the file.

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
            sample = parse_fields(line)
        except BadSample as problem:
            raise UserError(f"{path}:{number}: {problem}") from problem
        if isinstance(sample.get("image"), str):
            sample["image"] = path.parent / sample["image"]
        if isinstance(sample.get("images"), list):
            sample["images"] = [path.parent / image if isinstance(image, str) else image for image in sample["images"]]
        yield sample
