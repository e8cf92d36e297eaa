"""Which samples the shards of a task hold, and where their bytes lie.

Every shard is scanned once, before the first batch: headers and texts are read, pictures passed over. From then on any
sample is read at its place, so that order, length and resuming need nothing of what came before.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from vl_mtl_lora.data.faults import Fault, FaultLog
from vl_mtl_lora.data.files import shard_files
from vl_mtl_lora.data.records import Place, description, image_places, tagged_fields, untagged_fields
from vl_mtl_lora.data.schema import IMAGE_EXTENSIONS, Sample, check_fields, parse_fields
from vl_mtl_lora.data.shards import partial_file
from vl_mtl_lora.data.tar import Record, read_records
from vl_mtl_lora.errors import BadSample, UserError, did_you_mean
from vl_mtl_lora.sections import RunConfig


@dataclass(frozen=True)
class Source:
    """Where one task's samples come from.

    task, kind: its name and kind. files: shards. format: "tagged" (this package's), "img2dataset", "clip_benchmark".
    images: how many each sample has. labels: those that may occur, None for any. tag: of its samples in the shards,
    None for the task's name.
    """

    task: str
    kind: str
    files: tuple[str, ...]
    format: str = "tagged"
    images: int = 1
    labels: tuple[str, ...] | None = None
    tag: str | None = None

    def wants(self, tag: str) -> bool:
        """Whether samples of a tag are the task's."""
        return tag == (self.tag or self.task)

    def untagged_fields(self, text: bytes, image_id: str) -> dict:
        """As `records.untagged_fields`."""
        return untagged_fields(text, image_id, self.task, self.kind, self.format, self.labels)


class TaskIndex:
    """A task's good samples, in the order of its shards.

    sizes: (shards,), how many samples each holds.
    """

    def __init__(self, source: Source, shards: Sequence[tuple[str, int]], sizes: Sequence[int], keys: Sequence[str],
                 places: np.ndarray):
        self.source, self.sizes = source, np.asarray(sizes, dtype=np.int64)
        self._shards, self._ends = list(shards), np.cumsum(self.sizes)  # (file, time of its last change)
        encoded = [key.encode() for key in keys]  # one text, no objects: forked processes share the memory
        self._keys, self._key_ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])
        self._places = places  # (N, 2 + 2 * images): offset and length of the text and of each image

    def __len__(self) -> int:
        return len(self._places)

    def sample(self, row: int, epoch: int = 0) -> Sample:
        """Reads sample number `row`.

        Raises:
            BadSample: its shard is gone or has changed.
        """
        key, (shard, changed) = self.key(row), self._shard(row)
        text, *images = _read(shard, changed, self._places[row].tolist())
        tagged = self.source.format == "tagged"
        fields = parse_fields(text) if tagged else self.source.untagged_fields(text, f"{shard}/{key}")
        return Sample(fields, tuple(images), key, shard, epoch)

    def key(self, row: int) -> str:
        return self._keys[self._key_ends[row]:self._key_ends[row + 1]].decode()

    def fault(self, row: int, problem: object) -> Fault:
        """What is told of a sample that turns out to be no good."""
        return Fault(self._shard(row)[0], self.key(row), str(problem))

    def _shard(self, row: int) -> tuple[str, int]:
        return self._shards[int(np.searchsorted(self._ends, row, side="right"))]


def _read(shard: str, changed: int, places: list[int]) -> list[bytes]:
    try:
        file = _open(shard, changed).fileno()
        parts = [os.pread(file, length, offset) for offset, length in zip(places[::2], places[1::2])]
    except OSError as error:
        raise BadSample(f"the shard cannot be read: {error}") from error
    if any(len(part) != length for part, length in zip(parts, places[1::2])):
        raise BadSample("the shard has become shorter")
    return parts


@lru_cache(maxsize=256)  # of each process; every read names its place, so that forks can share them
def _open(shard: str, changed: int) -> BinaryIO:
    file = open(shard, "rb")  # noqa: SIM115
    if os.fstat(file.fileno()).st_mtime_ns != changed:
        file.close()
        raise BadSample("the shard has changed since it was scanned")
    return file


def index_sources(sources: Sequence[Source], known_tasks: Sequence[str], faults: FaultLog) -> list[TaskIndex]:
    """Scans the shards of some tasks, each shard once for all of them.

    Args:
        known_tasks: tags that may occur. A shard whose manifest lists others of them only is not opened.
        faults: counts what cannot be used.

    Raises:
        UserError: too many faults, a task without any sample, shards whose writing broke off.
    """
    found = [_Found(source) for source in sources]
    shards = dict.fromkeys((file, source.format) for source in sources for file in source.files)
    for shard, format in tqdm(shards, desc="scan", unit="shard", dynamic_ncols=True, leave=False, delay=2):
        readers = [reader for reader in found if reader.source.format == format and shard in reader.files
                   and _may_hold(shard, reader.source, known_tasks)]
        if readers:
            _scan(shard, readers, known_tasks, faults)
    for reader in found:
        faults.judge(reader.source.task, "record", "sample")
        if not reader.keys:
            raise UserError(_nothing_in(reader.source))
    return [TaskIndex(reader.source, reader.shards, reader.sizes, reader.keys,
                      np.frombuffer(reader.places, dtype=np.int64).reshape(len(reader.keys), -1)) for reader in found]


def build_indices(config: RunConfig, split: str, faults: FaultLog, held_out: bool = False) -> dict[str, TaskIndex]:
    """Scans the "train", "valid" or "test" shards of a run's tasks: {task: its samples}, without tasks that have none.

    held_out: of the tasks that it is not trained on instead.

    Raises:
        UserError: as `shard_files` and `index_sources`.
    """
    sources = []
    for name, section in (config.held_out if held_out else config.tasks).items():
        try:
            files = shard_files(getattr(section, split), config.data.cache, config.data.allow_pipe)
        except UserError as error:
            raise UserError(f"{'held_out' if held_out else 'tasks'}.{name}.{split}: {error}") from error
        if files:
            labels = getattr(section, "labels", None)
            sources.append(Source(name, section.kind, files, section.format, section.images,
                                  None if labels is None else tuple(labels), section.tag))
    tags = [section.tag or name for name, section in (*config.tasks.items(), *config.held_out.items())]
    indices = index_sources(sources, [*tags, *config.data.ignore_tasks], faults)
    return {index.source.task: index for index in indices}


class _Found:
    """What has been found of one source so far."""

    def __init__(self, source: Source):
        self.source, self.files = source, frozenset(source.files)
        self.labels = None if source.labels is None else frozenset(source.labels)
        self.shards: list[tuple[str, int]] = []
        self.sizes: list[int] = []
        self.keys: list[str] = []
        self.places = array("q")

    def add(self, record: Record, text: Place, fields: dict) -> None:
        """Raises BadSample for what is no sample of the task."""
        images = image_places(record)
        if len(images) != self.source.images:
            got = f"{len(images) or 'no'} image{'s' * (len(images) > 1)}"
            raise BadSample(f"{got}: expected {self.source.images} member{'s' * (self.source.images != 1)} ."
                            + ", .".join(IMAGE_EXTENSIONS))
        check_fields(fields, self.source.kind, self.source.images)
        if self.labels is not None and fields["label"] not in self.labels:
            raise BadSample(f"label {fields['label'][:60]!r} is none of the task's"
                            + did_you_mean(fields["label"], self.source.labels))
        self.keys.append(record.key)
        self.places.extend([*text, *(number for place in images for number in place)])
        self.sizes[-1] += 1


def _scan(shard: str, readers: list[_Found], known_tasks: Sequence[str], faults: FaultLog) -> None:
    records = 0

    def count(stage: str, key: str = "", problem: object = None, by: list[_Found] = readers) -> None:
        nonlocal records
        records += stage == "record" and bool(key)
        lost = 1
        if problem and not key:  # the rest of the shard: all that the manifest says is in it
            lost = max(1, sum((_listed(shard) or {}).values()) - records)
        for reader in by:
            faults.count(reader.source.task, stage, Fault(shard, key, str(problem)) if problem else None, lost)

    try:
        file = open(shard, "rb")  # noqa: SIM115
    except OSError as error:
        count("record", problem=f"the shard cannot be read: {error}")
        return
    with file:
        for reader in readers:
            reader.shards.append((shard, os.fstat(file.fileno()).st_mtime_ns))
            reader.sizes.append(0)
        tagged = readers[0].source.format == "tagged"
        for record in read_records(file):
            place, fields = None, None
            try:
                if tagged:
                    place, text = description(file, record, "tagged")
                    fields = tagged_fields(text, known_tasks)
                elif record.problem:
                    raise BadSample(record.problem)
            except BadSample as problem:
                count("record", record.key, problem)
                continue
            count("record", record.key)
            for reader in [r for r in readers if not tagged or r.source.wants(fields["task"])]:
                try:
                    if not tagged:
                        place, text = description(file, record, reader.source.format, reader.source.kind)
                        fields = reader.source.untagged_fields(text, f"{shard}/{record.key}")
                    reader.add(record, place, fields)
                except BadSample as problem:
                    count("sample", record.key, problem, [reader])
                else:
                    count("sample", by=[reader])


def _may_hold(shard: str, source: Source, known_tasks: Sequence[str]) -> bool:
    """False where the manifest that `write_shards` left beside the shard lists other known tasks only."""
    path = Path(shard)
    name = path.name.rpartition("-")[0]
    if partial_file(path.parent, name).is_file():
        raise UserError(f"{partial_file(path.parent, name)}: the writing of these shards broke off or goes on: finish "
                        "it (resume), or remove that file to use what is there")
    if source.format != "tagged":
        return True
    tags = _listed(shard)
    if tags is None or not tags.keys() <= set(known_tasks):  # an unknown tag is to be met and told
        return True
    return any(map(source.wants, tags))


def shards_hash(files: Sequence[str]) -> str:
    """A short hash that tells shards from others: of their manifests, which hold checksums, and of names and sizes."""
    digest = hashlib.sha256()
    for manifest in sorted({_manifest(Path(file)) for file in files}):
        if manifest.is_file():
            digest.update(manifest.read_bytes())
    for file in sorted(files):
        digest.update(f"{Path(file).name} {os.path.getsize(file)}\n".encode())
    return digest.hexdigest()[:16]


def _manifest(shard: Path) -> Path:
    """Where `write_shards` leaves the manifest of a shard."""
    return shard.with_name(f"{shard.name.rpartition('-')[0]}.manifest.json")


def _listed(shard: str) -> dict[str, int] | None:
    """How many samples of each tag the manifest beside a shard says are in it; None where there is none that tells."""
    path = Path(shard)
    manifest = _manifest(path)
    return _read_manifest(manifest, manifest.stat().st_mtime_ns).get(path.name) if manifest.is_file() else None


@lru_cache(maxsize=16)
def _read_manifest(manifest: Path, changed: int) -> dict[str, dict[str, int]]:
    """The tags' counts of each shard, by the name of its file; nothing where the manifest cannot be read."""
    try:
        return {shard["file"]: {tag: int(count) for tag, count in shard["tasks"].items()}
                for shard in json.loads(manifest.read_text("utf-8"))["shards"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _nothing_in(source: Source) -> str:
    more = " ..." if len(source.files) > 3 else ""
    return f"no sample with the tag {source.tag or source.task!r} in {', '.join(source.files[:3])}{more}"
