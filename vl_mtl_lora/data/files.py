"""Patterns of shards -> files on this machine: brace ranges, globs; copies of remote and of compressed shards."""

import glob
import gzip
import hashlib
import logging
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import braceexpand
import fsspec
from tqdm import tqdm

from vl_mtl_lora.errors import UserError

log = logging.getLogger(__name__)

_COMPRESSED = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz"}
_PAUSES = (1.0, 4.0, 16.0)  # seconds before each further attempt
_AT_ONCE = 8  # shards copied at the same time


def shard_files(patterns: Sequence[str], cache: str | Path, allow_pipe: bool = False) -> tuple[str, ...]:
    """Paths, globs, brace ranges ("shard-{000000..000009}.tar") and URLs -> existing files, in order.

    Args:
        patterns: local paths, or URLs of any protocol that fsspec knows (http, s3, gs ..).
        cache: the folder for copies of remote and of compressed shards. A copy is made once and not compared with its
            source again.
        allow_pipe: whether "pipe:COMMAND" may run a shell command whose output is a shard.

    Raises:
        UserError: a pattern that matches nothing, a shard that cannot be copied, a pipe that is not allowed.
    """
    found: dict[str, Callable[[], BinaryIO] | None] = {}
    for pattern in patterns:
        if pattern.startswith("pipe:"):
            if not allow_pipe:
                raise UserError(f"{pattern!r}: shards from shell commands are refused; data.allow_pipe: true runs "
                                "them, those of a trained run together with --allow-pipe")
            found[pattern] = None
            continue
        try:
            paths = list(braceexpand.braceexpand(pattern))
        except ValueError as error:
            raise UserError(f"{pattern!r}: braces do not match: {error}") from error
        for path in paths:
            found |= dict.fromkeys(_remote(path) if "://" in path else _local(path))
    folder = Path(os.path.expanduser(cache))
    copies = {url: _copy_of(url, folder) for url in found}
    missing = [(url, copy) for url, copy in copies.items() if copy and not copy.exists()]
    if missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache: {folder} cannot be made: {error}") from error
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(tqdm(pool.map(lambda pair: _fetch(*pair), missing), total=len(missing), desc="copy shards",
                      unit="shard", dynamic_ncols=True))
    return tuple(str(copy or url) for url, copy in copies.items())


def _local(path: str) -> list[str]:
    found = sorted(glob.glob(path)) if glob.has_magic(path) else [path] if Path(path).is_file() else []
    if not found:
        raise UserError(f"no shard matches {path!r}")
    return found


def _remote(url: str) -> list[str]:
    if not glob.has_magic(url):
        return [url]
    fs, path = _filesystem(url)
    try:
        found = [fs.unstrip_protocol(name) for name in sorted(fs.glob(path))]
    except Exception as error:  # each protocol raises types of its own
        raise UserError(f"{url} cannot be listed: {type(error).__name__}: {error}") from error
    if not found:
        raise UserError(f"no shard matches {url!r}")
    return found


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        options = {}
        if url.startswith(("http://", "https://")):
            import aiohttp  # its own limit of five minutes for a whole file is too short for a shard

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
        return fsspec.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}; remote shards need: pip install 'vl_mtl_lora[remote]'") from error


def _copy_of(url: str, cache: Path) -> Path | None:
    """Where the copy of a shard lies; None for one that can be read as it is."""
    kind = _suffix(url)
    if "://" not in url and not url.startswith("pipe:") and kind not in _COMPRESSED:
        return None
    about = url
    if "://" not in url and not url.startswith("pipe:"):
        about += f"/{os.stat(url).st_mtime_ns}"  # a local file may be written anew
    name = os.path.basename(urlsplit(url).path)[-100:]
    name = name.removesuffix(kind) if kind in _COMPRESSED else name
    name = "pipe.tar" if url.startswith("pipe:") else name if name.endswith(".tar") else name + ".tar"
    return cache / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}-{name}"


def _suffix(url: str) -> str:
    """Of a path or of a URL's path: a signed URL has more behind it."""
    return os.path.splitext(urlsplit(url).path if "://" in url else url)[1]


def _fetch(url: str, copy: Path) -> None:
    """Copies a shard into the cache, whole or not at all, with several attempts."""
    temporary = copy.with_name(f"{copy.name}.{os.getpid()}.part")
    for pause in (*_PAUSES, None):
        try:
            if url.startswith("pipe:"):
                with open(temporary, "wb") as out:
                    subprocess.run(url.removeprefix("pipe:"), shell=True, check=True, stdout=out)
            else:
                fs, path = _filesystem(url)
                fs.get_file(path, str(temporary))
                _unpack(temporary, _COMPRESSED.get(_suffix(url)))
            if not tarfile.is_tarfile(temporary):
                raise tarfile.ReadError("what came is no tar")
            os.replace(temporary, copy)
            return
        except UserError:
            raise
        except Exception as error:  # each protocol raises types of its own
            if pause is None or isinstance(error, FileNotFoundError | PermissionError | gzip.BadGzipFile):
                raise UserError(f"{url} cannot be read: {type(error).__name__}: {error}") from error
            log.warning("%s: %s: %s; again in %g s", url, type(error).__name__, error, pause)
            time.sleep(pause)
        finally:
            temporary.unlink(missing_ok=True)


def _unpack(file: Path, compression: str | None) -> None:
    if compression:
        unpacked = file.with_name(file.name + ".unpacked")
        try:
            with fsspec.open(str(file), "rb", compression=compression) as stream, open(unpacked, "wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
            os.replace(unpacked, file)
        finally:
            unpacked.unlink(missing_ok=True)
