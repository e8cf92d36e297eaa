"""One task's samples out of shard files, images not decoded; whatever cannot be used is counted and told.

Only members with an extension on a short list are ever read: nothing in a shard is unpickled or run.
"""

import glob
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import braceexpand
import webdataset as wds

from vl_mtl_lora.config import TaskSection
from vl_mtl_lora.data.schema import IMAGE_EXTENSIONS, Sample, check_fields, check_key, parse_fields
from vl_mtl_lora.data.shards import partial_file
from vl_mtl_lora.errors import BadSample, UserError

log = logging.getLogger(__name__)

_EXTENSIONS = (*IMAGE_EXTENSIONS, "json", "txt")  # nothing else in a shard is ever opened
_EARLY = 1000  # samples after which a share of faults can be judged before a pass is over


@dataclass(frozen=True)
class Source:
    """Where one task's samples come from: its tag and kind, shard files, and their format (see `_fields`)."""

    task: str
    kind: str
    urls: tuple[str, ...]
    format: str = "tagged"


@dataclass(frozen=True)
class Fault:
    """One sample that could not be used, or a whole shard where the key is empty."""

    shard: str
    key: str
    reason: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.shard}: {self.key or '(whole shard)'}: {self.reason}"


class FaultLog:
    """Counts faults at each stage of reading, tells each sample's once, and ends the run past the allowed share.

    Stages, each with a share of its own: "record" (is there JSON with a known tag? among all records of a shard),
    "sample" (has a record of the task its fields and an image?), "picture" (can the image be decoded?).

    max_share: the share that may be broken. quiet: count only; another process tells the same faults.
    """

    def __init__(self, max_share: float = 0.01, quiet: bool = False):
        self.max_share, self.quiet = max_share, quiet
        self.faults: dict[Fault, None] = {}  # in the order met, each once
        self._seen: Counter[tuple[str, str]] = Counter()
        self._broken: Counter[tuple[str, str]] = Counter()

    def count(self, task: str, stage: str, fault: Fault | None = None) -> None:
        """One more record of a task's stream at a stage, broken where a fault is given.

        Raises:
            UserError: so many were seen that the share can be judged, and it is too high.
        """
        self._seen[task, stage] += 1
        if fault is not None:
            self._broken[task, stage] += 1
            if fault not in self.faults:
                self.faults[fault] = None
                if not self.quiet:
                    log.warning("skipped a sample of %s: %s", task, fault)
            if self._seen[task, stage] >= _EARLY:
                self.judge(task, stage)

    def judge(self, task: str, *stages: str) -> None:
        """Raises UserError where more than the allowed share of what a stage has seen is broken."""
        for stage in stages:
            seen, broken = self._seen[task, stage], self._broken[task, stage]
            if broken > self.max_share * seen:
                listed = "\n  ".join(map(str, list(self.faults)[:10]))
                listed += f"\n  and {len(self.faults) - 10} more" if len(self.faults) > 10 else ""
                raise UserError(f"{broken} of {seen} {stage}s read for task {task} cannot be used, more than the share "
                                f"data.max_fault_share = {self.max_share:g} allows:\n  {listed}")

    def report(self) -> list[dict]:
        """The faults as plain data, for a file."""
        return [asdict(fault) for fault in self.faults]


def expand_urls(patterns: Sequence[str]) -> tuple[str, ...]:
    """Paths, globs and brace ranges ("shard-{000000..000009}.tar") -> existing files, in order.

    Raises:
        UserError: a pattern that matches no file, a shell pipe, shards whose writing broke off.
    """
    urls: list[str] = []
    for pattern in patterns:
        if pattern.startswith("pipe:"):
            raise UserError(f"{pattern!r}: shards from shell commands are refused")
        for path in braceexpand.braceexpand(pattern):
            found = sorted(glob.glob(path)) if glob.has_magic(path) else [path] if Path(path).is_file() else []
            if not found:
                raise UserError(f"no shard matches {path!r}")
            urls += found
    for partial in {partial_file(Path(url).parent, Path(url).name.rpartition("-")[0]) for url in urls}:
        if partial.is_file():
            raise UserError(f"{partial}: the writing of these shards broke off or goes on: finish it (--resume), or "
                            "remove that file to use what is there")
    return tuple(dict.fromkeys(urls))


def build_source(name: str, section: TaskSection, split: str) -> Source:
    """The source of one task's split ("train", "valid" or "test") by its section of the config.

    Raises:
        UserError: a pattern that matches no file.
    """
    try:
        return Source(name, section.kind, expand_urls(getattr(section, split)), section.format)
    except UserError as error:
        raise UserError(f"tasks.{name}.{split}: {error}") from error


def read_samples(source: Source, known_tasks: Sequence[str], faults: FaultLog,
                 urls: Sequence[str] | None = None) -> Iterator[Sample]:
    """One task's samples in the order of the shards (or of `urls`), images not decoded.

    Samples of other known tasks are passed over; a broken one is counted in `faults` and skipped. Where a manifest lies
    beside a shard and says that only other known tasks are in it, the shard is not opened.

    Raises:
        UserError: too many faults; at the latest when all is read.
    """
    for url in urls if urls is not None else source.urls:
        if _may_hold(url, source, known_tasks):
            yield from _read_shard(url, source, known_tasks, faults)
    faults.judge(source.task, "record", "sample")


def _read_shard(url, source, known_tasks, faults):
    problems: list[Exception] = []

    def stop(error: Exception) -> bool:  # webdataset asks: go on? After damage in a tar nothing can be found again.
        problems.append(error)
        return False

    def count(stage: str, key: str = "", reason: str = "") -> None:
        faults.count(source.task, stage, Fault(url, key, reason) if reason else None)

    members = wds.tariterators.url_opener([{"url": url}], handler=stop)
    members = wds.tariterators.tar_file_expander(members, handler=stop, select_files=_wanted, eof_value=None)
    for record in _grouped(_until_broken(members, problems), count):
        try:
            check_key(record["__key__"])
            fields = _fields(record, source, known_tasks)
        except BadSample as problem:
            count("record", record["__key__"], str(problem))
            continue
        count("record")
        if fields["task"] != source.task:
            continue
        try:
            check_fields(fields, source.kind)
            image = next((record[e] for e in IMAGE_EXTENSIONS if e in record), None)
            if image is None:
                raise BadSample("no image: expected a member ." + ", .".join(IMAGE_EXTENSIONS))
        except BadSample as problem:
            count("sample", record["__key__"], str(problem))
            continue
        count("sample")
        yield Sample(fields, (image,), record["__key__"], url)
    for error in problems:
        count("record", "", f"the shard cannot be read on: {type(error).__name__}: {error}")


def _until_broken(members: Iterator[dict], problems: list[Exception]) -> Iterator[dict]:
    try:
        yield from members
    except Exception as error:  # tarfile and the file system raise many types
        problems.append(error)


def _grouped(members: Iterator[dict], count: Callable[..., None]) -> Iterator[dict]:
    """Consecutive tar members of one key -> one record {extension: bytes, "__key__": key}; of twins the first stays."""
    record: dict = {}
    for member in members:
        key, _, extension = member["fname"].rpartition("/")[2].partition(".")
        folder = member["fname"].rpartition("/")[0]
        key = f"{folder}/{key}" if folder else key
        if record.get("__key__") != key:
            if record:
                yield record
            record = {"__key__": key}
        extension = extension.lower()
        if extension in record:
            count("record", key, f"member .{extension} occurs twice")
        else:
            record[extension] = member["data"]
    if record:
        yield record


def _wanted(name: str) -> bool:
    return name.rpartition("/")[2].partition(".")[2].lower() in _EXTENSIONS


def _fields(record: dict, source: Source, known_tasks: Sequence[str]) -> dict:
    """The sample's JSON object. Raises BadSample where there is none with a known tag.

    Formats: "tagged" is this package's schema. "img2dataset" (.txt one caption) and "clip_benchmark" (.txt one caption
    a line) carry no tag: the config names the task, and the key is the image's id.
    """
    if source.format == "tagged":
        if "json" not in record:
            raise BadSample("no member .json")
        fields = parse_fields(record["json"])
        check_fields(fields, None)
        if fields["task"] not in known_tasks:
            raise BadSample(f"unknown task {fields['task']!r}; known are {', '.join(known_tasks)}")
        return fields
    try:
        text = record["txt"].decode("utf-8")
    except (KeyError, UnicodeDecodeError) as error:
        raise BadSample("no member .txt in UTF-8") from error
    captions = [text] if source.format == "img2dataset" else text.splitlines()
    return {"task": source.task, "image_id": record["__key__"], "captions": [c.strip() for c in captions if c.strip()]}


def _may_hold(url: str, source: Source, known_tasks: Sequence[str]) -> bool:
    """False where the manifest that `write_shards` left beside the shard lists other known tasks only."""
    path = Path(url)
    manifest = path.with_name(path.name.rpartition("-")[0] + ".manifest.json")
    if source.format != "tagged" or not manifest.is_file():
        return True
    try:
        tags = {shard["file"]: set(shard["tasks"]) for shard in json.loads(manifest.read_text())["shards"]}[path.name]
    except (ValueError, KeyError, TypeError):
        return True
    return source.task in tags or not tags <= set(known_tasks)  # an unknown tag is to be met and reported
