"""Patterns of shards, and copies of those that cannot be read where they lie."""

import functools
import gzip
import http.server
import io
import tarfile
import threading
from pathlib import Path

import pytest

from vl_mtl_lora import UserError
from vl_mtl_lora.data import files
from vl_mtl_lora.data.files import shard_files


def tar(content):
    """The bytes of a tar with one file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("0.txt")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def site(tmp_path):
    """A folder, its address over HTTP, and the paths asked for; the first `fails` requests fail."""
    folder, asked, fails = tmp_path / "site", [], []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if fails:
                fails.pop()
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked, fails
    server.shutdown()
    thread.join()
    server.server_close()


def test_patterns_become_files_in_order_each_once(tmp_path):
    for i in range(3):
        (tmp_path / f"a-{i}.tar").touch()

    def names(*patterns):
        return [file[-7:] for file in shard_files([str(tmp_path / p) for p in patterns], tmp_path / "cache")]

    assert names("a-{0..1}.tar") == ["a-0.tar", "a-1.tar"]
    assert names("a-2.tar", "a-*.tar") == ["a-2.tar", "a-0.tar", "a-1.tar"]
    with pytest.raises(UserError, match="no shard matches .*b-"):
        names("b-*.tar")
    with pytest.raises(UserError, match="no shard matches .*a-3.tar"):
        names("a-{2..3}.tar")
    with pytest.raises(UserError, match="braces do not match"):
        names("a-{0..")
    assert not (tmp_path / "cache").exists()


def test_remote_shards_are_copied_once_with_retries(tmp_path, site, monkeypatch):
    folder, address, asked, fails = site
    monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))
    for i in range(2):
        (folder / f"a-{i}.tar").write_bytes(tar(bytes([i]) * 3_000_000))
    fails += [1, 1]
    for _ in range(2):
        found = shard_files([f"{address}/a-{{0..1}}.tar"], tmp_path / "cache")
        assert [Path(file).read_bytes() for file in found] == [tar(bytes([i]) * 3_000_000) for i in range(2)]
    assert all(asked.count(f"/a-{i}.tar") >= 1 for i in range(2)) and not list((tmp_path / "cache").glob("*.part"))
    count = len(asked)
    shard_files([f"{address}/a-0.tar"], tmp_path / "cache")
    assert len(asked) == count


def test_a_remote_shard_that_cannot_be_had_is_an_error_and_leaves_nothing(tmp_path, site, monkeypatch):
    _, address, _, fails = site
    monkeypatch.setattr(files, "_PAUSES", (0.0,))
    with pytest.raises(UserError, match=r"/none\.tar cannot be read: FileNotFoundError"):
        shard_files([f"{address}/none.tar"], tmp_path / "cache")
    fails += [1] * 20
    with pytest.raises(UserError, match=r"/a\.tar cannot be read.*503"):
        shard_files([f"{address}/a.tar"], tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_protocols_without_their_package_and_unknown_ones_are_named(tmp_path):
    with pytest.raises(UserError, match=r"xyz://a\.tar: .*vl_mtl_lora\[remote\]"):
        shard_files(["xyz://a.tar"], tmp_path)
    with pytest.raises(UserError, match=r"xyz://a-\*\.tar: .*vl_mtl_lora\[remote\]"):
        shard_files(["xyz://a-*.tar"], tmp_path)


def test_any_protocol_can_have_patterns(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for i in range(2):
        memory.pipe(f"/set/a-{i}.tar", tar(b"x" * i))
    found = shard_files(["memory://set/a-*.tar"], tmp_path)
    assert [Path(file).read_bytes() for file in found] == [tar(b""), tar(b"x")]
    with pytest.raises(UserError, match="no shard matches"):
        shard_files(["memory://set/b-*.tar"], tmp_path)


def test_compressed_shards_are_unpacked_and_anew_when_they_change(tmp_path):
    shard = tmp_path / "a.tar.gz"
    for content in (tar(b"one"), tar(b"other")):
        shard.write_bytes(gzip.compress(content))
        (copy,) = shard_files([str(shard)], tmp_path / "cache")
        assert Path(copy).read_bytes() == content and copy.endswith("-a.tar")
    shard.write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"a\.tar\.gz cannot be read"):
        shard_files([str(shard)], tmp_path / "cache")


def test_commands_run_only_where_they_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PAUSES", ())
    (tmp_path / "a").write_bytes(tar(b"x"))
    command = f"pipe:touch {tmp_path}/ran; cat {tmp_path}/a"
    with pytest.raises(UserError, match="refused; data.allow_pipe"):
        shard_files([command], tmp_path / "cache")
    assert not (tmp_path / "ran").exists()
    (copy,) = shard_files([command], tmp_path / "cache", allow_pipe=True)
    assert Path(copy).read_bytes() == tar(b"x") and (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="pipe:false cannot be read"):
        shard_files(["pipe:false"], tmp_path / "cache", allow_pipe=True)


def test_what_is_no_tar_is_not_kept(tmp_path, site, monkeypatch):
    folder, address, _, _ = site
    monkeypatch.setattr(files, "_PAUSES", ())
    (folder / "page.tar").write_text("<html>")
    for pattern in (f"{address}/page.tar", "pipe:true"):
        with pytest.raises(UserError, match="what came is no tar"):
            shard_files([pattern], tmp_path / "cache", allow_pipe=True)
    assert not list((tmp_path / "cache").iterdir())


def test_signed_urls_are_known_by_their_path(tmp_path, site):
    folder, address, _, _ = site
    (folder / "a.tar.gz").write_bytes(gzip.compress(tar(b"x")))
    (copy,) = shard_files([f"{address}/a.tar.gz?signature={'s' * 400}"], tmp_path / "cache")
    assert Path(copy).read_bytes() == tar(b"x") and copy.endswith("-a.tar")
