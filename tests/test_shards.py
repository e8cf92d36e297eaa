"""Writing shards: whole or not at all, taken up again, and what is refused."""

import json
import os
import resource
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.conftest import tiny_samples
from tests.shard_files import TASKS, encode, index_of, png, samples_of, vqa
from vl_mtl_lora import UserError, write_shards
from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.data.shards import checksum, read_jsonl


def test_written_samples_are_read_back(tmp_path):
    manifest = write_shards(tiny_samples(5), tmp_path, name="x", samples_per_shard=4, source="here", licence="MIT")
    assert manifest["tasks"] == dict.fromkeys(sorted(TASKS), 5)
    assert [s["samples"] for s in manifest["shards"]] == [4, 4, 4, 3]
    assert json.loads((tmp_path / "x.manifest.json").read_text()) == manifest
    samples = samples_of(index_of(*sorted(tmp_path.glob("x-*.tar"))))
    assert [s.fields["question_id"] for s in samples] == list(range(5))
    assert decode_image(samples[1].images[0]).getpixel((0, 0)) == (0, 255, 0)


def test_writing_again_leaves_no_shard_of_before(tmp_path):
    write_shards(tiny_samples(6), tmp_path, samples_per_shard=4)
    write_shards(tiny_samples(1), tmp_path, samples_per_shard=4)
    assert [p.name for p in sorted(tmp_path.glob("*.tar*"))] == ["shard-000000.tar"]


@pytest.mark.parametrize("change,message", [
    ({"answers": []}, "answers is not a list of texts"), ({"question": None}, "question is not a text"),
    ({"task": ""}, "field task"), ({"image": b"no"}, "cannot be decoded"),
    ({"image": "/nowhere.png"}, "cannot be read"),
    ({"key": "../x"}, "key"), ({"key": "\ud800"}, "key"), ({"image": "a\0b"}, "cannot be read"),
    ({"more": {1: 2, "a": 3}}, "cannot be written as JSON"),
    ({"image_id": None}, "image_id"), ({"image": 3}, "image must be")])
def test_bad_samples_are_refused_when_written_and_leave_nothing(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        write_shards([{**vqa(), "image": png(), **change}], tmp_path)
    assert not list(tmp_path.iterdir())


def test_writing_touches_no_other_set_and_leaves_no_old_manifest(tmp_path):
    write_shards(tiny_samples(1), tmp_path, name="train-extra")
    write_shards(tiny_samples(2), tmp_path, name="train", samples_per_shard=2)
    broken = [*tiny_samples(1), {**vqa(), "image": b"no", "key": "x"}]
    with pytest.raises(UserError):
        write_shards(broken, tmp_path, name="train", samples_per_shard=2)
    assert (tmp_path / "train-extra-000000.tar").exists() and (tmp_path / "train-extra.manifest.json").exists()
    assert not (tmp_path / "train.manifest.json").exists()


def stopping(samples, before, error=KeyboardInterrupt):
    """Samples up to number `before`, then an error."""
    for i, sample in enumerate(samples):
        if i == before:
            raise error
        yield sample


@pytest.mark.parametrize("before", [0, 3, 9, 14])
def test_a_write_that_broke_off_is_taken_up_again(tmp_path, before):
    straight = write_shards(tiny_samples(5), tmp_path / "a", samples_per_shard=4)
    write_shards(tiny_samples(6), tmp_path / "b", samples_per_shard=4)  # of an earlier write, to be replaced
    with pytest.raises(KeyboardInterrupt):
        write_shards(stopping(tiny_samples(5), before), tmp_path / "b", samples_per_shard=4)
    if before >= 4:
        names = {p.name for p in (tmp_path / "b").iterdir()}
        assert names == {"shard.partial.json", *(f"shard-{i:06d}.tar" for i in range(before // 4))}
        with pytest.raises(UserError, match=r"shard\.partial\.json: the writing of these shards broke off"):
            index_of(tmp_path / "b" / "shard-000000.tar")
    assert write_shards(tiny_samples(5), tmp_path / "b", samples_per_shard=4, resume=True) == straight
    assert {p.name for p in (tmp_path / "b").iterdir()} == {p.name for p in (tmp_path / "a").iterdir()}
    for shard in straight["shards"]:
        assert checksum(tmp_path / "b" / shard["file"]) == shard["sha256"] == checksum(tmp_path / "a" / shard["file"])


def test_a_write_killed_before_its_first_shard_is_noted_loses_nothing(tmp_path, monkeypatch):
    def killed(file):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vl_mtl_lora.data.shards.checksum", killed)
        write_shards(tiny_samples(5), tmp_path, samples_per_shard=4)
    assert write_shards(tiny_samples(5), tmp_path, samples_per_shard=4, resume=True)["samples"] == 15


def test_only_the_same_write_is_taken_up_again(tmp_path):
    def broken_off():
        with pytest.raises(KeyboardInterrupt):
            write_shards(stopping(tiny_samples(5), 9), tmp_path, samples_per_shard=4)

    broken_off()
    other = [{**sample, "image_id": 77} for sample in tiny_samples(5)]
    for samples in (other, other[:6], list(tiny_samples(5))[:6]):
        with pytest.raises(UserError, match="the samples are not those"):
            write_shards(samples, tmp_path, samples_per_shard=4, resume=True)
    with pytest.raises(UserError, match="tells of a write with"):
        write_shards(tiny_samples(5), tmp_path, samples_per_shard=5, resume=True)
    (tmp_path / "shard-000001.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"shard-000001\.tar is gone or has changed"):
        write_shards(tiny_samples(5), tmp_path, samples_per_shard=4, resume=True)
    (tmp_path / "shard.partial.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        write_shards(tiny_samples(5), tmp_path, samples_per_shard=4, resume=True)
    assert write_shards(tiny_samples(5), tmp_path, samples_per_shard=4)["samples"] == 15


def test_a_full_disk_leaves_no_half_shard(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a shard of four samples is larger
    try:
        with pytest.raises(UserError, match="cannot write shards shard into .*File too large"):
            write_shards(tiny_samples(5), tmp_path, samples_per_shard=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, named = set(), []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.stat(file).st_ino) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: named.append((new.name, os.stat(old).st_ino in synced))
                        or replace(old, new))
    write_shards(tiny_samples(2), tmp_path, samples_per_shard=4)
    assert {name for name, _ in named} == {"shard-000000.tar", "shard-000001.tar", "shard.partial.json",
                                           "shard.manifest.json"}
    assert all(on_disk for _, on_disk in named)


def test_an_error_of_the_samples_is_not_taken_for_one_of_the_disk(tmp_path):
    with pytest.raises(ConnectionError):
        write_shards(stopping(tiny_samples(5), 2, ConnectionError), tmp_path)
    assert not list(tmp_path.iterdir())


def test_pictures_are_read_out_of_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good.png", png("blue"))
        archive.writestr("bad.png", png("red"))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(png("red")) + 40] ^= 0xFF  # the checksum tells
    (tmp_path / "a.zip").write_bytes(data)
    images = [zipfile.Path(tmp_path / "a.zip", name) for name in ("good.png", "bad.png", "none.png")]
    manifest = write_shards([{**vqa(i), "image": image} for i, image in enumerate(images)], tmp_path, skip_broken=True)
    assert [s["sample"] for s in manifest["skipped"]] == [1, 2]
    assert "CRC" in manifest["skipped"][0]["reason"]
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert tar.extractfile("00000000.png").read() == png("blue") and len(tar.getnames()) == 2


def test_broken_samples_can_be_left_out_and_are_named(tmp_path):
    samples = [{**vqa(i), "image": png()} for i in range(4)]
    samples[1]["image"], samples[2]["question"] = b"no", ""
    manifest = write_shards(samples, tmp_path, skip_broken=True)
    assert manifest["samples"] == 2
    assert [(s["sample"], s["key"]) for s in manifest["skipped"]] == [(1, "00000001"), (2, "00000002")]
    assert "decoded" in manifest["skipped"][0]["reason"] and "question" in manifest["skipped"][1]["reason"]
    with pytest.raises(UserError, match="no sample to write into y: all 2 cannot be used"):
        write_shards(samples[1:3], tmp_path, name="y", skip_broken=True)


@pytest.mark.parametrize("format,extension", [("JPEG", "jpg"), ("PNG", "png"), ("GIF", "png")])
def test_large_pictures_are_stored_smaller_on_demand(tmp_path, format, extension):
    large, small = (encode(Image.new("RGB", size, "red"), format) for size in ((80, 40), (20, 10)))
    write_shards([{**vqa(i), "image": data} for i, data in enumerate((large, small))], tmp_path, max_side=40)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        stored = [tar.extractfile(f"0000000{i}.{extension}").read() for i in range(2)]
    assert [decode_image(data).size for data in stored] == [(40, 20), (20, 10)]
    assert (stored[1] == small) == (format != "GIF")
    assert np.abs(np.asarray(decode_image(stored[0])).astype(int) - (255, 0, 0)).max() <= 3


def test_jsonl_names_the_line(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    file = tmp_path / "s.jsonl"
    file.write_text(json.dumps({**vqa(), "image": "a.png"}) + "\n\n{not json\n")
    samples = read_jsonl(file)
    assert next(samples)["image"] == tmp_path / "a.png"
    with pytest.raises(UserError, match=r"s\.jsonl:3: not JSON"):
        next(samples)


