"""What is in shards, without a config: tasks, counts, statistics of the fields; and everything that is wrong."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vl_mtl_lora.data.faults import Fault
from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.data.records import Place, description, image_places, tagged_fields, untagged_fields
from vl_mtl_lora.data.schema import Sample, check_fields, kind_of
from vl_mtl_lora.data.shards import checksum, partial_file
from vl_mtl_lora.data.tar import read_records
from vl_mtl_lora.errors import BadSample

MOST_SHOWN = 60  # samples of a task to look at
_COMMON = 5  # values listed of a field that has few
_FEW = 1000  # different values that are counted one by one


@dataclass
class TaskSurvey:
    """The samples of one tag. kinds, images: how many samples are of which kind, and have so many images.

    words: of each text field, the words of each of its texts. entries: of each list field, its lengths. values: of each
    text field the texts and their counts, up to `_FEW`. shown: some samples at even distances, with their shards.
    """

    samples: int = 0
    kinds: Counter = field(default_factory=Counter)
    images: Counter = field(default_factory=Counter)
    words: dict[str, Counter] = field(default_factory=dict)
    entries: dict[str, Counter] = field(default_factory=dict)
    values: dict[str, Counter] = field(default_factory=dict)
    shown: list[tuple[str, "Entry"]] = field(default_factory=list)
    _distance: int = 1  # of the samples in `shown`

    def add(self, shard: str, entry: "Entry") -> None:
        if self.samples % self._distance == 0:
            self.shown.append((shard, entry))
            if len(self.shown) == 2 * MOST_SHOWN:
                self.shown, self._distance = self.shown[::2], 2 * self._distance
        self.samples += 1
        self.kinds[kind_of(entry.fields, len(entry.images)) or "unknown"] += 1
        self.images[len(entry.images)] += 1
        for name, value in entry.fields.items():
            if name in ("task", "image_id", "question_id") or not isinstance(value, str | list):
                continue
            texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
            if isinstance(value, list):
                self.entries.setdefault(name, Counter())[len(value)] += 1
            self.words.setdefault(name, Counter()).update(len(text.split()) for text in texts)
            values = self.values.setdefault(name, Counter())
            if len(values) <= _FEW:
                values.update(texts)

    def lines(self) -> Iterator[str]:
        """In words: one line of counts, one per field."""
        images = ", ".join(f"{count} image{'s' * (count != 1)} each" if len(self.images) == 1 else
                           f"{number:,} with {count}" for count, number in sorted(self.images.items()))
        yield f"{self.samples:,} samples of kind {' or '.join(sorted(self.kinds))}, {images}"
        for name, words in self.words.items():
            count, values = words.total(), self.values[name]
            line = f"{name}: {sum(n * times for n, times in words.items()) / max(count, 1):.1f} words on average, "
            line += f"at most {max(words, default=0)}"
            if name in self.entries:
                lengths = self.entries[name]
                line += f"; {count / self.samples:.1f} per sample, {min(lengths)} to {max(lengths)}"
            if len(values) <= _FEW:
                line += f"; {len(values):,} different: " + ", ".join(
                    f"{text[:40]!r} {100 * times / count:.0f} %" for text, times in values.most_common(_COMMON))
            else:
                line += f"; more than {_FEW:,} different"
            yield line


@dataclass(frozen=True)
class Entry:
    """A good record: its key and fields, where its images lie."""

    key: str
    fields: Mapping[str, Any]
    images: tuple[Place, ...]


def read_entries(shard: str, format: str = "tagged") -> Iterator[Entry | Fault]:
    """The records of a shard in order, images not read. Of the formats without a tag it is "captions" or "classes"."""
    try:
        with open(shard, "rb") as file:
            for record in read_records(file):
                images = tuple(image_places(record))
                try:
                    if format == "tagged":
                        fields = tagged_fields(description(file, record, format)[1])
                    else:
                        task, kind = (("classes", "classification") if "cls" in record.members
                                      else ("captions", "retrieval"))
                        fields = untagged_fields(description(file, record, format, kind)[1], record.key, task, kind,
                                                 format, None)
                    check_fields(fields, kind_of(fields, len(images)), len(images))
                except BadSample as problem:
                    yield Fault(shard, record.key, str(problem))
                else:
                    yield Entry(record.key, fields, images)
    except OSError as error:
        yield Fault(shard, "", f"the shard cannot be read: {error}")


def read_sample(shard: str, entry: Entry) -> Sample:
    """An entry with its images. Raises OSError where the shard is gone."""
    with open(shard, "rb") as file:
        images = tuple(os.pread(file.fileno(), length, offset) for offset, length in entry.images)
    return Sample(entry.fields, images, entry.key, shard)


def survey(shards: Sequence[str], format: str = "tagged") -> tuple[dict[str, TaskSurvey], list[Fault]]:
    """Scans shards, images not read: (each tag's survey, faults)."""
    tasks: dict[str, TaskSurvey] = {}
    faults = []
    for shard in tqdm(shards, desc="inspect", unit="shard", dynamic_ncols=True, leave=False, delay=1):
        for found in read_entries(shard, format):
            if isinstance(found, Fault):
                faults.append(found)
            else:
                tasks.setdefault(found.fields["task"], TaskSurvey()).add(shard, found)
    return tasks, faults


def validate(shards: Sequence[str], format: str = "tagged", processes: int = 1,
             tell: Callable[[Fault], None] = lambda fault: None) -> tuple[Counter, list[Fault]]:
    """Reads everything: fields, every image, checksums and counts of the manifests beside the shards.

    processes: how many read at once. tell: called with each fault as it is met.

    Returns:
        (good samples by tag, all faults).
    """
    counts, faults = Counter(), []
    of_shards: dict[str, Counter] = {}
    with ProcessPoolExecutor(min(processes, len(shards))) as pool:
        read = map if processes == 1 else pool.map
        results = tqdm(zip(shards, read(partial(_validate_shard, format=format), shards)), total=len(shards),
                       desc="validate", unit="shard", dynamic_ncols=True, leave=False, delay=1)
        for shard, (of_shard, found) in results:
            counts += of_shard
            of_shards[shard] = of_shard
            for fault in found:
                tell(fault)
            faults += found
    for fault in _check_manifests({str(Path(shard)): found for shard, found in of_shards.items()}):
        tell(fault)
        faults.append(fault)
    return counts, faults


def _validate_shard(shard: str, format: str) -> tuple[Counter, list[Fault]]:
    counts, faults = Counter(), []
    for found in read_entries(shard, format):
        if isinstance(found, Entry):
            try:
                for image in read_sample(shard, found).images:
                    decode_image(image)
            except (BadSample, OSError) as problem:
                found = Fault(shard, found.key, str(problem))
            else:
                counts[found.fields["task"]] += 1
        if isinstance(found, Fault):
            faults.append(found)
    return counts, faults


def _check_manifests(of_shards: Mapping[str, Counter]) -> Iterator[Fault]:
    """What the manifests beside the shards say otherwise. Shards without one have nothing to be held to."""
    for folder, name in dict.fromkeys((Path(s).parent, Path(s).name.rpartition("-")[0]) for s in of_shards):
        file = folder / f"{name}.manifest.json"
        if (partial := partial_file(folder, name)).is_file():
            yield Fault(str(partial), "", "the writing of these shards broke off or goes on")
        if not file.is_file():
            continue
        try:
            listed = {str(folder / shard["file"]): (shard["sha256"], Counter(shard["tasks"]))
                      for shard in json.loads(file.read_text("utf-8"))["shards"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            yield Fault(str(file), "", f"the manifest is damaged: {type(error).__name__}: {error}")
            continue
        for shard, (sha256, tasks) in listed.items():
            if not Path(shard).is_file():
                yield Fault(shard, "", f"the shard is missing, {file.name} lists it")
            elif shard in of_shards:
                if checksum(Path(shard)) != sha256:
                    yield Fault(shard, "", f"the checksum is not that of {file.name}")
                elif tasks != of_shards[shard]:
                    yield Fault(shard, "", f"good samples are {dict(of_shards[shard])}, {file.name} says {dict(tasks)}")
        for shard in of_shards:
            if Path(shard).parent == folder and Path(shard).name.rpartition("-")[0] == name and shard not in listed:
                yield Fault(shard, "", f"{file.name} does not list the shard")
