"""Arbitrary and damaged shards, pictures and JSON end in samples, named faults or our own errors."""

import itertools
import json
import tarfile
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.fuzzing import FIELDS, damaged, fuzz, texts, values
from tests.shard_files import encode, members, png, write_tar
from tests.test_stream import to_tensor
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import Source, index_sources
from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.data.schema import check_fields, in_words, parse_fields
from vl_mtl_lora.data.stream import BatchStream, Feed, eval_batches, train_batches
from vl_mtl_lora.errors import BadSample, UserError
from vl_mtl_lora.sections import TASK_SECTIONS

SOURCES = [Source("t", kind, ("",), format, images, ("a", "b") if labels else None) for kind, format, images, labels
           in itertools.product(TASK_SECTIONS, ("tagged", "img2dataset", "clip_benchmark"), (0, 1, 2), (False, True))
           if not labels or kind in ("classification", "matching")]
samples = st.builds(lambda change, drop: {k: v for k, v in {**FIELDS, **change}.items() if k not in drop},
                    st.dictionaries(st.sampled_from([*FIELDS]) | texts, values | st.lists(texts), max_size=3),
                    st.sets(st.sampled_from([*FIELDS]), max_size=3))
RECORD = 4 * tarfile.BLOCKSIZE  # of a picture and its JSON: a header and a block each
SIX = members({str(i): {**FIELDS, "image_id": i} for i in range(6)})
PICTURES = [encode(Image.effect_noise((20, 12), 60).convert(mode), format, **options) for mode, format, options in [
    ("RGB", "PNG", {}), ("P", "PNG", {"transparency": 3}), ("I;16", "PNG", {}), ("1", "PNG", {}), ("LA", "PNG", {}),
    ("RGB", "JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
    ("CMYK", "JPEG", {"progressive": True}), ("RGBA", "WEBP", {}), ("RGB", "WEBP", {"lossless": True}),
    ("P", "GIF", {"save_all": True, "append_images": [Image.new("P", (20, 12))]}), ("I;16", "TIFF", {}),
    ("F", "TIFF", {}), ("RGB", "BMP", {}), ("RGBA", "ICO", {}), ("RGB", "PPM", {})]]


def read(path, source, content=None):
    """{key: sample} of all that is delivered, everything checked that must hold of it."""
    if content is not None:
        path.write_bytes(content)
    source = Source(**{**source.__dict__, "files": (str(path),)})
    log = FaultLog(1.0)
    try:
        (index,) = index_sources([source], ["t"], log)
    except UserError as error:
        str(error).encode()
        return {}
    finally:
        json.dumps(log.report(), ensure_ascii=False).encode()
    found = {}
    for row in range(len(index)):
        sample = index.sample(row)
        check_fields(dict(sample.fields), source.kind, source.images)
        assert len(sample.images) == source.images and all(sample.images) and sample.key == index.key(row)
        " ".join([sample.key, sample.image_id, *in_words(sample.fields)]).encode()
        found[sample.key] = sample
    assert len(found) == len(index)
    return found


def streamed(path, source):
    (index,) = index_sources([Source(**{**source.__dict__, "files": (str(path),)})], ["t"], FaultLog(1.0))
    keys = [s.key for b in eval_batches(index, to_tensor, rows=4, faults=FaultLog(1.0)) for s in b.samples]
    stream = BatchStream([Feed(index, to_tensor, lambda samples, rng: {})], [3])
    try:
        for batch in itertools.islice(train_batches(stream, 0, faults=FaultLog(1.0)), 3):
            assert len(batch.keys) == 3 and set(batch.keys) <= set(keys)
    except UserError:
        assert len(keys) < len(index)
    return keys


def all_of(path, source, content=None):
    found = read(path, source, content)
    keys = streamed(path, source) if found else []
    assert set(keys) <= set(found) and len(set(keys)) == len(keys)
    return found, keys


def with_checksum(header):
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a-0.tar"


@pytest.fixture(scope="module")
def whole(shard):
    return write_tar(shard, SIX).read_bytes()


@fuzz(300)
@given(st.binary(max_size=2000), st.sampled_from(SOURCES))
def test_arbitrary_bytes_as_a_shard(shard, data, source):
    assert read(shard, source, data) == {}


@fuzz(300)
@given(data=st.data(), source=st.sampled_from(SOURCES))
def test_samples_before_damage_are_delivered(shard, whole, data, source):
    content, first = data.draw(damaged(whole))
    found, keys = all_of(shard, source, content)
    if source.format == "tagged" and source.images == 1:
        want = [str(i) for i in range(min(6, first // RECORD) - 1)]
        assert list(found)[:len(want)] == want and keys[:len(want)] == want
        assert all(found[key].images == (png(),) for key in want)


PAX = ["path", "size", "linkpath", "hdrcharset", "mtime", "uid", "GNU.sparse.map", "GNU.sparse.size", "x",
       "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.name", "GNU.sparse.realsize", "GNU.sparse.offset",
       "GNU.sparse.numbytes"]
large = st.integers(0, 2 ** 88 - 1).map(lambda n: n.to_bytes(11, "big"))
numbers = (st.binary(max_size=12) | st.integers(0, 2 ** 33).map(lambda n: b"%o" % n) | large.map(b"\x80".__add__)
           | large.map(b"\xff".__add__) | st.integers(1, 600).map(lambda n: (-n).to_bytes(12, "big", signed=True)))
PLACES = {"name": (0, 100), "size": (124, 12), "kind": (156, 1), "magic": (257, 8), "dev": (329, 16),
          "prefix": (345, 155), "sparse": (386, 24), "more": (482, 13)}
KINDS = [b"%c" % kind for kind in b"01234567DIKLMNSVXgxA"]
CONTENTS = {"size": numbers, "kind": st.sampled_from(KINDS) | st.binary(max_size=1),
            "more": st.tuples(st.sampled_from([b"\0", b"\1"]), numbers).map(b"".join),
            "sparse": st.tuples(numbers, numbers).map(lambda pair: b"".join(n.ljust(12, b"\0")[:12] for n in pair))}
header_field = st.sampled_from([*PLACES]).flatmap(
    lambda name: st.tuples(st.just(PLACES[name]), CONTENTS.get(name, st.binary(max_size=20))))


@st.composite
def pax_block(draw):
    lines = b""
    for key in draw(st.lists(st.sampled_from(PAX) | texts, max_size=4)):
        value = draw(st.sampled_from(["1", "0", "9.json", "9.png", "1000000000000", "-512", "BINARY", "0,1"]) | texts)
        line = f" {key}={value}\n".encode(errors="surrogatepass")
        lines += b"%d" % (len(line) + 2 + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 600]))) + line
    info = tarfile.TarInfo("x")
    info.type, info.size = draw(st.sampled_from([b"x", b"g", b"X", b"L", b"K"])), len(lines)
    return info.tobuf(tarfile.USTAR_FORMAT) + lines + bytes(-len(lines) % 512)


@fuzz(300)
@given(data=st.data(), source=st.sampled_from(SOURCES))
def test_odd_headers(shard, whole, data, source):
    content, first = whole, 6
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, 11))
        first = min(first, number // 2)
        place = number * 1024
        header = content[place:place + 512]
        for (start, length), new in data.draw(st.lists(header_field, max_size=3)):
            header = header[:start] + new.ljust(length, b"\0")[:length] + header[start + length:]
        extra = b"".join(data.draw(st.lists(pax_block(), max_size=2)))
        content = content[:place] + extra + with_checksum(header) + content[place + 512:]
    tracemalloc.start()
    try:
        found = read(shard, source, content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    if source.format == "tagged" and source.images == 1:
        assert list(found)[:max(first - 1, 0)] == [str(i) for i in range(first - 1)]


PARTS = ["0", "1", "2", "0.", "1.", ".", "..", "/", "a", "json", ".png", ".txt", ".cls", ".json", "JPEG", "\\", "\0"]
names = st.lists(st.sampled_from(PARTS) | texts, max_size=6).map("".join)
usual_names = st.tuples(st.sampled_from("0123"), st.sampled_from(
    [".png", ".json", ".txt", ".cls", ".0.png", ".1.jpg", ".webp", ".x"])).map("".join)
contents_ = (st.binary(max_size=40) | samples | samples | values | texts | st.sampled_from(PICTURES)
             | st.sampled_from([b"1", b"0\n", b"a\r\n b \n\n", b"\xef\xbb\xbf1"]))


@fuzz(500)
@given(st.lists(st.tuples(names | usual_names | usual_names, contents_), max_size=10), st.sampled_from(SOURCES))
def test_arbitrary_members(shard, contents, source):
    def data(value):
        try:
            return value if isinstance(value, bytes) else json.dumps(value).encode()
        except ValueError:
            return b"1e999"

    pictures = {0: [], 1: [("png", png())], 2: [("0.png", png()), ("1.png", png())]}[source.images]
    good = [(f"{key}.{name}", value) for key in ("first", "last")
            for name, value in [*pictures, ("json", FIELDS), ("txt", b"a"), ("cls", b"1")]]
    middle = [(name.encode("utf-8", "replace").decode(), data(value)) for name, value in contents]
    write_tar(shard, [*good[:len(good) // 2], *middle, *good[len(good) // 2:]])
    found, keys = all_of(shard, source)
    fits = source.images == 1 or source.kind not in ("retrieval", "captioning", "vqa")
    if source.format == "tagged":
        assert not fits or {"first", "last"} <= set(found) and {"first", "last"} <= set(keys)
    elif source.kind in ("retrieval", "captioning") and fits:
        assert {"first", "last"} <= set(found) and {"first", "last"} <= set(keys)


@fuzz(2000)
@given(st.data())
def test_pictures(data):
    content = data.draw(st.binary(max_size=200) | st.sampled_from(PICTURES).flatmap(damaged).map(lambda d: d[0]))
    try:
        image = decode_image(content, data.draw(st.none() | st.integers(1, 40)))
    except BadSample:
        return
    assert image.mode == "RGB" and min(image.size) > 0 and len(image.tobytes()) == 3 * image.width * image.height


@fuzz(2000)
@given(st.binary() | texts.map(lambda t: t.encode("utf-8", "surrogatepass")) | values | samples)
def test_json(data):
    if not isinstance(data, bytes | str):
        try:
            data = json.dumps(data)
        except ValueError:
            return
    try:
        fields = parse_fields(data)
    except BadSample as error:
        str(error).encode()
        return
    for kind, images in itertools.product([None, *TASK_SECTIONS], (0, 1, 2)):
        try:
            check_fields(fields, kind, images)
        except BadSample as error:
            str(error).encode()
        else:
            "".join(in_words(fields)).encode()


@fuzz(1000)
@given(values, st.sampled_from([None, *TASK_SECTIONS]), st.integers(0, 2))
def test_fields(fields, kind, images):
    try:
        check_fields(fields, kind, images)
    except BadSample as error:
        str(error).encode()
