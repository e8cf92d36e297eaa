"""Where the members of a tar lie, and what is wrong with it: consecutive members of one key are a record."""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from vl_mtl_lora.data.schema import IMAGE_EXTENSIONS, check_key
from vl_mtl_lora.errors import BadSample

# Nothing else is ever read. "0.png", "1.png": the images of a sample of several.
_MEMBER = re.compile(rf"(?:\d\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})|json|txt|cls")
_END = bytes(tarfile.BLOCKSIZE)  # a block of zeros ends a tar


@dataclass
class Record:
    """Members of one key, {extension: (offset, length)}, and what is wrong with them, or "".

    An empty key stands for the rest of the shard: after damage in a tar nothing can be found again.
    """

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: str = ""


def read_records(file: BinaryIO) -> Iterator[Record]:
    """The records of a shard in order, found by its headers alone."""
    size = os.fstat(file.fileno()).st_size
    seen: set[str] = set()
    record, damage = None, ""
    try:
        for name, offset, length in _members(file):
            folder, _, base = name.rpartition("/")
            key, _, extension = base.partition(".")
            key, extension = f"{folder}/{key}" if folder else key, extension.lower()
            if not _MEMBER.fullmatch(extension):
                continue
            if record is None or key != record.key:
                if record:
                    yield record
                record = Record(key, problem=_problem_of(key, seen))
                seen.add(key)
            if extension in record.members:
                record.problem = record.problem or f"member .{extension} occurs twice"
            elif not 0 < length <= size - offset:
                record.problem = record.problem or f"member .{extension} is {'cut off' if length else 'empty'}"
            record.members[extension] = offset, length
    except Exception as error:  # tarfile raises many types
        damage = f"the shard cannot be read on: {type(error).__name__}: {error}"
    if record:
        yield record
    if damage:
        yield Record("", problem=damage)


def _problem_of(key: str, seen: set[str]) -> str:
    try:
        check_key(key)
    except BadSample as error:
        return str(error)
    return "the key occurs twice in the shard" if key in seen else ""


def _members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, offset, length) of the plain files in a tar. Raises whatever tarfile raises where it is damaged."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        place = -1
        while (info := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            if tar.offset <= place:
                raise tarfile.ReadError("a header of a length below zero")
            place = tar.offset
            if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                yield info.name, info.offset_data, info.size
        file.seek(tar.offset)  # tarfile takes damage behind the first member for the end
        if file.read(len(_END)) != _END:
            raise tarfile.ReadError("there is no end mark, the file is cut off or damaged")
