"""Writing, reading, mixing and the faults that shards can have."""

import io
import json
import multiprocessing
import os
import random
import resource
import signal
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import tiny_samples
from vl_mtl_lora import UserError, write_shards
from vl_mtl_lora.data.pictures import decode_image, output_side, to_rgb
from vl_mtl_lora.data.reader import FaultLog, Source, expand_urls, read_samples
from vl_mtl_lora.data.shards import checksum, read_jsonl
from vl_mtl_lora.data.stream import BatchStream, Quota, eval_batches, loader_deaths_told, train_batches
from vl_mtl_lora.errors import BadSample

TASKS = ["retrieval", "vqa", "captioning"]
KINDS = dict(zip(TASKS, TASKS))


def to_tensor(image):
    return torch.tensor(list(image.resize((2, 2)).tobytes())).float().view(3, 2, 2)


def collate(samples, rng):
    return {"id": torch.tensor([int(s.image_id) for s in samples])}


def quotas(pattern, rows=(4, 3, 2), tasks=TASKS):
    urls = expand_urls([str(pattern)])
    return [Quota(Source(t, KINDS[t], urls), n, to_tensor, collate) for t, n in zip(tasks, rows)]


def take(stream, count, workers=0):
    batches = train_batches(stream, workers)
    return [next(batches) for _ in range(count)]


def png(colour="red", size=(8, 8)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            data = json.dumps(data).encode() if not isinstance(data, bytes) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def vqa(i=0, **change):
    return {"task": "vqa", "image_id": i, "question": "what?", "answers": ["red"], "question_id": i, **change}


def test_written_samples_are_read_back(tmp_path):
    manifest = write_shards(tiny_samples(5), tmp_path, name="x", samples_per_shard=4, source="here", licence="MIT")
    assert manifest["tasks"] == dict.fromkeys(sorted(TASKS), 5)
    assert [s["samples"] for s in manifest["shards"]] == [4, 4, 4, 3]
    assert json.loads((tmp_path / "x.manifest.json").read_text()) == manifest
    source = Source("vqa", "vqa", expand_urls([str(tmp_path / "x-*.tar")]))
    samples = list(read_samples(source, TASKS, FaultLog(0.0)))
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
    ({"key": "../x"}, "key"), ({"image_id": None}, "image_id"), ({"image": 3}, "image must be")])
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
            expand_urls([str(tmp_path / "b" / "shard-*.tar")])
    assert write_shards(tiny_samples(5), tmp_path / "b", samples_per_shard=4, resume=True) == straight
    assert {p.name for p in (tmp_path / "b").iterdir()} == {p.name for p in (tmp_path / "a").iterdir()}
    for shard in straight["shards"]:
        assert checksum(tmp_path / "b" / shard["file"]) == shard["sha256"] == checksum(tmp_path / "a" / shard["file"])


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


@pytest.mark.parametrize("text,reason", [
    (b'{"task": "vqa", "image_id": NaN}', "NaN is no number"), (b'{"task": "vqa", "task": "vqa"}', "task occurs twice"),
    (b"[" * 100_000, "not JSON"), (b"\xff\xfe", "not JSON"), (b"", "not JSON"), (b"[1]", "expected a JSON object"),
    (json.dumps(vqa(question="x" * 1_000_000)).encode(), "question has 1,000,000 characters"),
    (json.dumps(vqa(answers=["\ud800"])).encode(), "answers is no valid Unicode"),
    (json.dumps(vqa(answers=[])).encode(), "answers is not a list"),
    (json.dumps(vqa(image_id=True)).encode(), "image_id is not a text or integer")])
def test_bad_json_is_a_named_fault_and_its_neighbours_are_delivered(tmp_path, text, reason):
    write_tar(tmp_path / "a.tar", [("0.png", png()), ("0.json", vqa(0)), ("1.png", png()), ("1.json", text),
                                   ("2.png", png()), ("2.json", vqa(2))])
    faults = FaultLog(1.0)
    samples = list(read_samples(Source("vqa", "vqa", (str(tmp_path / "a.tar"),)), TASKS, faults))
    assert [s.key for s in samples] == ["0", "2"]
    (fault,) = faults.faults
    assert fault.key == "1" and reason in fault.reason


def test_keys_that_lead_elsewhere_are_faults(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{key}.{e}", d) for key in ("../x", "a/../../y", "good/z")
                                   for e, d in (("png", png()), ("json", vqa()))])
    faults = FaultLog(1.0)
    samples = list(read_samples(Source("vqa", "vqa", (str(tmp_path / "a.tar"),)), TASKS, faults))
    assert [s.key for s in samples] == ["good/z"]
    assert [f.key for f in faults.faults] == ["../x", "a/../../y"]
    assert all("leads out of the shard" in f.reason for f in faults.faults)


def test_jsonl_names_the_line(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    file = tmp_path / "s.jsonl"
    file.write_text(json.dumps({**vqa(), "image": "a.png"}) + "\n\n{not json\n")
    samples = read_jsonl(file)
    assert next(samples)["image"] == tmp_path / "a.png"
    with pytest.raises(UserError, match=r"s\.jsonl:3: not JSON"):
        next(samples)


def test_batches_have_fixed_quotas_sorted_by_task(tiny_shards):
    batch = take(BatchStream(quotas(tiny_shards / "mixed-*.tar")), 1)[0]
    assert batch.ids.tolist() == [0] * 4 + [1] * 3 + [2] * 2
    assert batch.slices == {"retrieval": slice(0, 4), "vqa": slice(4, 7), "captioning": slice(7, 9)}
    assert batch.images.shape == (9, 3, 2, 2) and batch.inputs["vqa"]["id"].shape == (3,)


def test_every_sample_comes_once_in_each_pass(tiny_shards):
    stream = BatchStream(quotas(tiny_shards / "mixed-*.tar", rows=[6], tasks=["vqa"]), known_tasks=TASKS, shuffle=5)
    ids = [b.inputs["vqa"]["id"].tolist() for b in take(stream, 8)]
    first, second = sum(ids[:4], []), sum(ids[4:], [])
    assert sorted(first) == sorted(second) == list(range(24)) and first != second


@pytest.mark.parametrize("workers", [1, 2])
def test_order_depends_on_the_seed_alone(tiny_shards, workers):
    def order(workers=0, seed=0, start=0):
        stream = BatchStream(quotas(tiny_shards / "mixed-*.tar"), seed=seed, shuffle=7, start=start)
        return [(b.index, b.keys, b.images.sum().item()) for b in take(stream, 6, workers)]

    straight = order()
    assert order(workers) == straight
    assert order(workers, start=2)[:4] == straight[2:]
    assert order(seed=1) != straight


def test_faults_are_counted_told_and_skipped(tmp_path, caplog):
    good = [(f"{i}.{e}", d) for i in range(4) for e, d in (("png", png()), ("json", vqa(i)))]
    write_tar(tmp_path / "a.tar", [
        *good, ("t.png", png()), ("t.json", vqa(task="vqaa")), ("m.png", png()), ("m.json", vqa(question=None)),
        ("n.json", vqa(9)), ("j.png", png()), ("j.json", b"{"), ("u.png", png()),
        ("d.png", b"broken"), ("d.json", vqa(8)), ("x.png", png()), ("x.json", {"image_id": 1}), ("p.pyd", b"x"),
        ("z.png", png()), ("z.json", vqa(5))])
    source = Source("vqa", "vqa", (str(tmp_path / "a.tar"),))
    faults = FaultLog(1.0)
    batches = list(eval_batches(source, TASKS, to_tensor, rows=3, faults=faults))
    assert [s.key for b in batches for s in b.samples] == ["0", "1", "2", "3", "z"]
    reasons = {f.key: f.reason for f in faults.faults}
    assert reasons.keys() == {"t", "m", "n", "j", "u", "d", "x"}
    assert "unknown task 'vqaa'" in reasons["t"] and "question" in reasons["m"] and "no image" in reasons["n"]
    assert "not JSON" in reasons["j"] and "no member .json" in reasons["u"] and "decoded" in reasons["d"]
    assert "field task is missing" in reasons["x"]
    assert caplog.text.count("skipped a sample") == 7 and "a.tar: t: unknown task" in caplog.text


@pytest.mark.parametrize("share,fatal", [(0.01, True), (0.2, True), (0.25, False)])
def test_too_many_faults_end_the_run_and_name_them(tmp_path, share, fatal):
    write_tar(tmp_path / "a.tar", [(f"{i}.{e}", d) for i in range(4) for e, d in (
        ("png", png()), ("json", vqa(i, question="" if i == 2 else "what?")))])
    source = Source("vqa", "vqa", (str(tmp_path / "a.tar"),))
    passes = eval_batches(source, TASKS, to_tensor, rows=3, faults=FaultLog(share))
    if not fatal:
        assert sum(len(b.samples) for b in passes) == 3
        return
    with pytest.raises(UserError, match=r"1 of 4 samples read for task vqa(.|\n)*a\.tar: 2: field question"):
        list(passes)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_faults_end_training_with_the_same_message(tmp_path, workers):
    write_tar(tmp_path / "a.tar", [("0.png", png()), ("0.json", vqa()), ("1.png", png()), ("1.json", b"x")])
    stream = BatchStream(quotas(tmp_path / "a.tar", rows=[2], tasks=["vqa"]))
    with pytest.raises(UserError, match=r"^1 of 2 records read for task vqa"):
        take(stream, 3, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_end_training_whatever_the_number_of_processes(tmp_path, workers):
    write_tar(tmp_path / "a.tar", [(f"{i}.{e}", d) for i in range(10) for e, d in (
        ("png", b"broken" if i == 1 else png()), ("json", vqa(i)))])
    stream = BatchStream(quotas(tmp_path / "a.tar", rows=[5], tasks=["vqa"]), max_fault_share=0.06)
    with pytest.raises(UserError, match=r"pictures read for task vqa.*(.|\n)*a\.tar: 1: image cannot be decoded"):
        take(stream, 12, workers)
    stream = BatchStream(quotas(tmp_path / "a.tar", rows=[5], tasks=["vqa"]), max_fault_share=0.3)
    batches = take(stream, 8, workers)
    assert {f.key for b in batches for f in b.faults} == {"1"} and all(len(b.images) == 5 for b in batches)


def test_a_loader_process_that_dies_ends_training_with_a_message(tiny_shards):
    batches = train_batches(BatchStream(quotas(tiny_shards / "mixed-*.tar")), workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a loader process has died.*data.workers"), loader_deaths_told():
        for _ in range(100):
            next(batches)


def test_a_picture_that_cannot_be_decoded_keeps_the_quota(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.{e}", d) for i in range(3) for e, d in (
        ("png", b"broken" if i == 1 else png()), ("json", vqa(i)))])
    stream = BatchStream(quotas(tmp_path / "a.tar", rows=[3], tasks=["vqa"]), max_fault_share=0.5)
    batch = take(stream, 1)[0]
    assert len(batch.images) == 3 and set(batch.keys) == {"0", "2"}
    assert [f.key for f in batch.faults] == ["1"]


def test_a_truncated_shard_gives_what_it_holds(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.{e}", d) for i in range(6) for e, d in (("png", png()), ("json", vqa(i)))])
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:5 * 512 * 4 + 700])
    faults = FaultLog(1.0)
    samples = list(read_samples(Source("vqa", "vqa", (str(tmp_path / "a.tar"),)), TASKS, faults))
    assert [s.key for s in samples] == ["0", "1", "2", "3", "4"]
    assert any("cannot be read on" in f.reason for f in faults.faults)


def test_shards_without_the_task_are_not_opened(tmp_path, monkeypatch):
    samples = [{**vqa(i), "image": png()} for i in range(2)]
    samples += [{"task": "captioning", "image_id": i, "captions": ["x"], "image": png()} for i in range(2)]
    write_shards(samples, tmp_path, name="x", samples_per_shard=2)
    opened = Counter()
    import vl_mtl_lora.data.reader as module
    read = module._read_shard
    monkeypatch.setattr(module, "_read_shard", lambda url, *rest: opened.update([url[-8:]]) or read(url, *rest))
    source = Source("captioning", "captioning", expand_urls([str(tmp_path / "x-*.tar")]))
    assert len(list(read_samples(source, TASKS, FaultLog(0.0)))) == 2 and opened == {"0001.tar": 1}
    # An unknown tag must be met, though the manifest says that the task is not there.
    faults = FaultLog(1.0)
    assert len(list(read_samples(source, ["captioning"], faults))) == 2
    assert [f.reason.split(";")[0] for f in faults.faults] == ["unknown task 'vqa'"] * 2


@pytest.mark.parametrize("format,captions", [
    ("img2dataset", [["a dog\na cat"]]), ("clip_benchmark", [["a dog", "a cat"]])])
def test_other_layouts_are_read_as_they_are(tmp_path, format, captions):
    write_tar(tmp_path / "a.tar", [("s/0.jpg", png()), ("s/0.txt", b"a dog\na cat"), ("s/0.json", {"width": 8})])
    source = Source("retrieval", "retrieval", (str(tmp_path / "a.tar"),), format)
    samples = list(read_samples(source, TASKS, FaultLog(0.0)))
    assert [s.fields["captions"] for s in samples] == captions and samples[0].image_id == "s/0"


def test_patterns(tmp_path):
    for i in range(3):
        (tmp_path / f"a-{i}.tar").touch()
    assert [u[-7:] for u in expand_urls([str(tmp_path / "a-{0..1}.tar")])] == ["a-0.tar", "a-1.tar"]
    assert len(expand_urls([str(tmp_path / "a-*.tar"), str(tmp_path / "a-0.tar")])) == 3
    with pytest.raises(UserError, match="no shard matches"):
        expand_urls([str(tmp_path / "b-*.tar")])
    with pytest.raises(UserError, match="refused"):
        expand_urls(["pipe:cat a.tar"])


def test_no_sample_of_a_task_is_an_error(tiny_shards):
    source = Source("vqq", "vqa", expand_urls([str(tiny_shards / "mixed-*.tar")]))
    with pytest.raises(UserError, match="no sample of task 'vqq'"):
        list(eval_batches(source, [*TASKS, "vqq"], to_tensor, rows=2, faults=FaultLog()))


def test_a_picture_shown_by_several_samples_is_decoded_once(tmp_path):
    write_shards([{**vqa(i), "image_id": i // 3, "image": png()} for i in range(6)], tmp_path)
    source = Source("vqa", "vqa", expand_urls([str(tmp_path / "shard-*.tar")]))
    (batch,) = eval_batches(source, TASKS, to_tensor, rows=10, faults=FaultLog(0.0))
    assert len(batch.images) == 2 and batch.image_rows.tolist() == [0, 0, 0, 1, 1, 1]


def encode(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def test_unusual_images_come_out_upright_and_rgb():
    rotated = Image.new("RGB", (8, 4), "red")
    exif = rotated.getexif()
    exif[0x0112] = 6
    assert decode_image(encode(rotated, "JPEG", exif=exif)).size == (4, 8)
    assert decode_image(encode(Image.new("CMYK", (4, 4)), "JPEG")).mode == "RGB"
    assert decode_image(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (4, 4), "blue").convert("P")
    assert decode_image(encode(palette, "PNG")).getpixel((0, 0)) == (0, 0, 255)
    deep = Image.new("I;16", (4, 4), 0x8080)
    assert decode_image(encode(deep, "PNG")).getpixel((0, 0)) == (128, 128, 128)
    wide = Image.new("I", (4, 4), 128 * 257)
    assert to_rgb(wide).getpixel((0, 0)) == (128, 128, 128)
    plain = Image.new("RGB", (4, 4))
    assert to_rgb(plain) is plain
    with pytest.raises(ValueError, match="floating point"):
        to_rgb(Image.new("F", (4, 4)))
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode_image(encode(Image.effect_noise((64, 64), 50), "JPEG")[:200])


def test_large_jpegs_are_decoded_smaller_where_nothing_is_lost_by_it():
    photo = Image.radial_gradient("L").resize((800, 600)).convert("RGB")
    photo.paste((200, 30, 60), (100, 200, 340, 420))
    data = encode(photo, "JPEG", quality=95)
    assert decode_image(data).size == decode_image(data, 301).size == (800, 600)
    half = decode_image(data, 300)
    assert half.size == (400, 300)
    exact, near = (np.asarray(image.resize((150, 150), Image.Resampling.BICUBIC)).astype(int)
                   for image in (decode_image(data), half))
    assert abs(exact - near).mean() < 1 and abs(exact - near).max() < 24  # of 255, at the edge of the square
    assert decode_image(data, 75).size == (100, 75)
    assert decode_image(encode(photo, "PNG"), 75).size == (800, 600)


def test_the_size_that_comes_out_is_found_without_touching_the_generator(tiny_backbone):
    transform, state = tiny_backbone().preprocess(True), torch.get_rng_state()
    assert output_side(transform) == 32
    assert output_side(lambda image: torch.zeros(3, *image.size)) is None
    assert output_side(lambda image: [image]) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_example_captions_follow_from_the_annotations():
    from vl_mtl_lora.data.examples import COLOURS, SHAPES, easy_vqa_caption_samples, easy_vqa_samples, name_of

    facts = [("is there a red shape?", "no"), ("what shape is present?", "circle"), ("is no teal shape present?", "no")]
    assert (name_of(facts, SHAPES), name_of(facts, COLOURS)) == ("circle", "teal")
    assert name_of([("what color is the rectangle?", "blue")], SHAPES) == "rectangle"
    assert name_of([("is there a circle?", "no")], SHAPES) is None
    captions = {s["image_id"]: s["captions"][0] for s in easy_vqa_caption_samples("valid")}
    for sample in random.Random(0).sample(list(easy_vqa_samples("valid")), 300):
        words, answer = captions.get(sample["image_id"], "").split(), sample["answers"][0]
        if words and answer not in ("yes", "no"):
            assert answer in words


def test_example_splits_share_no_picture():
    from vl_mtl_lora.data.examples import easy_vqa_samples, emoji_samples

    paths = {split: {s["image"] for s in easy_vqa_samples(split)} for split in ("train", "valid", "test")}
    assert [len(p) for p in paths.values()] == [3800, 200, 1000]
    assert len(set.union(*paths.values())) == 5000
    drawings = {split: list(emoji_samples(split)) for split in ("valid", "test")}
    names = {split: {s["image_id"].rpartition("/")[2] for s in samples} for split, samples in drawings.items()}
    assert len(names["test"]) > 600 and not names["valid"] & names["test"]
    assert all(s["captions"] and all(c == c.lower() for c in s["captions"]) for s in drawings["test"])
