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
_LONGEST_HEADER = 1 << 20  # bytes; that of a name of any length has less


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
            elif length is None:
                record.problem = record.problem or f"member .{extension} is sparse: pack it as a plain file"
            elif not 0 < length <= size - offset:
                record.problem = record.problem or f"member .{extension} is {'cut off' if length else 'empty'}"
            record.members[extension] = offset, length or 0
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


class _Headers:
    """What tarfile reads of a file: headers alone, so that none can make it read all that its size says."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _members(file: BinaryIO) -> Iterator[tuple[str, int, int | None]]:
    """(name, offset, length) of the files in a tar; length None: not stored byte by byte, but with its holes left out.

    Raises whatever tarfile raises where it is damaged.
    """
    # Names that are not UTF-8 are made into text that can be written anywhere.
    with tarfile.open(fileobj=_Headers(file), mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
        place = -1
        while (info := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            if tar.offset <= place:
                raise tarfile.ReadError("a header of a length below zero")
            place = tar.offset
            if info.isreg():
                yield info.name, info.offset_data, None if info.issparse() else info.size
        file.seek(tar.offset)  # tarfile takes damage behind the first member for the end
        if file.read(len(_END)) != _END:
            raise tarfile.ReadError("there is no end mark, the file is cut off or damaged")
        while rest := file.read(1 << 20):  # a header of zeros, by damage, looks like the end
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is more behind the end mark: damage, or several tars in one file")
