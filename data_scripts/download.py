"""Finds the files of a data set's official download by their official paths, unpacked or in .zip files."""

import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vl_mtl_lora.errors import UserError


class Download:
    """The files of a data set's official download: in a folder, or in the .zip files that lie in it.

    folder: the download. origin: which official files hold the annotations, for errors. keep: so many names at the end
    of an official path are needed to know a file. left_out: why and how often rows are no samples; the converter
    counts them here.
    """

    def __init__(self, folder: Path, origin: str, keep: int = 1):
        self.folder, self.origin, self.keep = folder, origin, keep
        self.left_out: Counter[str] = Counter()
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; expected the folder of the download: {origin}")
        self._folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        self._members: dict[str, tuple[zipfile.ZipFile, str]] = {}
        for file in sorted(folder.glob("*.zip")):
            self._add(file)

    def _add(self, file: Path) -> None:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{file} cannot be read as a zip file ({error}): download it again") from error
        for member in archive.namelist():
            if not member.endswith("/"):
                self._members.setdefault(member, (archive, member))
                self._members.setdefault(member.partition("/")[2] or member, (archive, member))  # below a top folder

    def find(self, *names: str) -> Path | zipfile.Path | None:
        """The first of some official paths that exists, as it is, below one more folder, or without leading ones."""
        for name in names:
            parts = PurePosixPath(name).parts
            for start in range(max(1, len(parts) - self.keep + 1)):
                ending = "/".join(parts[start:])
                if ending in self._members:
                    return zipfile.Path(*self._members[ending])
                for folder in self._folders:
                    if (folder / ending).is_file():
                        return folder / ending
        return None

    def json(self, name: str) -> Any:
        """What a JSON file of annotations holds."""
        found = self._annotations(name)
        return _parsed(_read(found), found)

    def jsonl(self, name: str) -> Iterator[Any]:
        """What the lines of a file of annotations hold, each line JSON."""
        found = self._annotations(name)
        for number, line in enumerate(io.BytesIO(_read(found)), 1):
            if line.strip():
                yield _parsed(line, f"{found}:{number}")

    def lines(self, name: str) -> Iterator[str]:
        """The lines of a text file, without their ends."""
        found = self._annotations(name)
        for number, line in enumerate(io.BytesIO(_read(found)), 1):
            try:
                yield line.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{found}:{number} is no text in UTF-8 ({error}): download it again") from error

    def image(self, *names: str) -> "Picture":
        """A picture by its official path, or by the first of several; nothing is looked for before it is read."""
        return Picture(self, names)

    def _annotations(self, name: str) -> Path | zipfile.Path:
        found = self.find(name)
        if found is None:
            raise UserError(f"{name} is neither in {self.folder} nor in a .zip file there; it comes in {self.origin}. "
                            "Where you have some splits only, name them with --split")
        return found


@dataclass(frozen=True)
class Picture:
    """A picture of a download, looked for when it is read."""

    download: Download
    names: tuple[str, ...]

    def __str__(self) -> str:
        return self.names[0]

    def exists(self) -> bool:
        return self.download.find(*self.names) is not None

    def read_bytes(self) -> bytes:
        """Raises OSError where it is missing or damaged: the error of a file, which the writing of shards expects."""
        found = self.download.find(*self.names)
        if found is None:
            raise FileNotFoundError(f"{' or '.join(self.names)} is neither in {self.download.folder} nor in a .zip "
                                    "file there; --dry-run tells how many are missing, --skip-broken does without")
        return _read(found)


def _read(file: Path | zipfile.Path) -> bytes:
    try:
        return file.read_bytes()
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise OSError(f"{file} is damaged ({error}): download it again") from error


def _parsed(data: bytes, where: Any) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # also of text that is no Unicode
        raise UserError(f"{where} is not JSON ({error}): download it again") from error
