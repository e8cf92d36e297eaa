"""What is found in shards, and every fault that they can have: named, counted, its neighbours delivered."""

import io
import json
import os
import tarfile
from collections import Counter

import pytest
import webdataset as wds

from tests.conftest import tiny_samples
from tests.shard_files import TASKS, index_of, members, png, samples_of, vqa, write_tar
from vl_mtl_lora import UserError, parse_config, write_shards
from vl_mtl_lora.data import index as index_module
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import Source, build_indices, index_sources
from vl_mtl_lora.errors import BadSample


def keys_and_faults(*shards, **options):
    """(keys delivered, {key: reason})."""
    faults = FaultLog(1.0)
    found = samples_of(index_of(*shards, faults=faults, **options))
    return [sample.key for sample in found], {fault.key: fault.reason for fault in faults.faults}


def test_samples_are_those_that_webdataset_reads(tmp_path):
    write_shards(tiny_samples(7), tmp_path, samples_per_shard=4)
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    theirs = {s["__key__"]: s for s in wds.WebDataset(shards, shardshuffle=False) if b'"vqa"' in s["json"]}
    ours = {s.key: s for s in samples_of(index_of(*shards))}
    assert list(ours) == list(theirs) and len(ours) == 7
    for key, sample in ours.items():
        assert sample.images == (theirs[key]["png"],) and sample.fields == json.loads(theirs[key]["json"])
        assert sample.shard == theirs[key]["__url__"]


def test_every_shard_is_scanned_once_for_all_tasks(tmp_path, monkeypatch):
    write_shards(tiny_samples(4), tmp_path, samples_per_shard=6)
    shards = tuple(sorted(map(str, tmp_path.glob("*.tar"))))
    scanned = Counter()
    scan = index_module._scan
    monkeypatch.setattr(index_module, "_scan", lambda shard, *rest: scanned.update([shard]) or scan(shard, *rest))
    indices = index_sources([Source(task, task, shards) for task in TASKS], TASKS, FaultLog(0.0))
    assert scanned == dict.fromkeys(shards, 1)
    assert [len(index) for index in indices] == [4, 4, 4]
    assert [index.sizes.tolist() for index in indices] == [[2, 2]] * 3


def test_several_images_of_a_sample_and_none(tmp_path):
    about = {"task": "m", "text": "a", "label": "yes"}
    write_shards([{**about, "image_id": 0, "images": [png("red"), png("blue")]},
                  {**about, "image_id": 1, "image": png("red")}, {**about, "text_pair": "b"}], tmp_path)
    shard = tmp_path / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        assert tar.getnames() == ["00000000.0.png", "00000000.1.png", "00000000.json", "00000001.json", "00000001.png",
                                  "00000002.json"]
    for count, key, images in ((2, "00000000", (png("red"), png("blue"))), (1, "00000001", (png("red"),)),
                               (0, "00000002", ())):
        faults = FaultLog(1.0)
        (sample,) = samples_of(index_of(shard, task="m", kind="matching", known=["m"], images=count, faults=faults))
        assert sample.key == key and sample.images == images and len(faults.faults) == 2
        assert all(f"expected {count} member" in fault.reason for fault in faults.faults)
    assert sample.image_id == "00000002"  # a sample without a picture is one of its own


@pytest.mark.parametrize("change,reason", [
    ({"label": "maybe"}, "label 'maybe' is none of the task's"), ({"label": "yess"}, "did you mean yes"),
    ({"label": 1}, "label is not a text"), ({"text": ""}, "text is not a text")])
def test_labels_are_those_of_the_task(tmp_path, change, reason):
    good = {"task": "m", "image_id": 0, "text": "a", "label": "yes"}
    write_tar(tmp_path / "a.tar", members({"0": good, "1": {**good, **change}}))
    keys, faults = keys_and_faults(tmp_path / "a.tar", task="m", kind="matching", known=["m"], labels=("no", "yes"))
    assert keys == ["0"] and reason in faults["1"]


@pytest.mark.parametrize("change,reason", [
    ({"answer": 2}, "an index into them"), ({"answer": True}, "answer is not an index"),
    ({"answer": -1}, "answer is not an index"),
    ({"choices": ["a", "a"]}, "two or more different texts"), ({"choices": ["a"]}, "two or more")])
def test_choices_are_checked(tmp_path, change, reason):
    good = {"task": "c", "image_id": 0, "question": "what?", "question_id": 0, "choices": ["a", "b"], "answer": 1}
    write_tar(tmp_path / "a.tar", members({"0": good, "1": {**good, **change}}))
    keys, faults = keys_and_faults(tmp_path / "a.tar", task="c", kind="multiple_choice", known=["c"])
    assert keys == ["0"] and reason in faults["1"]


@pytest.mark.parametrize("text,reason", [
    (b'{"task": "vqa", "image_id": NaN}', "NaN is no number"), (b'{"task": "vqa", "task": "vqa"}', "task occurs twice"),
    (b"[" * 100_000, "not JSON"), (b"\xff\xfe", "not JSON"), (b"", "is empty"), (b"[1]", "expected a JSON object"),
    (json.dumps(vqa(question="x" * 1_000_000)).encode(), "question has 1,000,000 characters"),
    (json.dumps(vqa(answers=["\ud800"])).encode(), "answers is no valid Unicode"),
    (json.dumps(vqa(answers=[])).encode(), "answers is not a list"),
    (json.dumps(vqa(image_id=True)).encode(), "image_id is not a text or integer"),
    (json.dumps({"image_id": 1}).encode(), "field task is missing"),
    (json.dumps(vqa(task="vqaa")).encode(), "unknown task 'vqaa'")])
def test_bad_json_is_a_named_fault(tmp_path, text, reason):
    write_tar(tmp_path / "a.tar", members({"0": vqa(0), "1": text, "2": vqa(2)}))
    keys, faults = keys_and_faults(tmp_path / "a.tar")
    assert keys == ["0", "2"] and faults.keys() == {"1"} and reason in faults["1"]


@pytest.mark.parametrize("contents,reason", [
    ([("1.png", png())], "no member .json"), ([("1.json", vqa())], "no image"),
    ([("1.png", b""), ("1.json", vqa())], "member .png is empty"),
    ([("1.png", png()), ("1.jpg", png()), ("1.json", vqa())], "2 images: expected 1"),
    ([("1.png", png()), ("1.json", vqa()), ("1.json", vqa())], "member .json occurs twice"),
    ([("1.png", png()), ("1.JSON", vqa()), ("1.Png", png())], "member .png occurs twice"),
    ([("1.png", png()), ("1.pyd", b"x"), ("1.pth", b"x")], "no member .json")])
def test_records_that_are_no_sample_are_named_faults(tmp_path, contents, reason):
    write_tar(tmp_path / "a.tar", [*members({"0": vqa(0)}), *contents, *members({"2": vqa(2)})])
    keys, faults = keys_and_faults(tmp_path / "a.tar")
    assert keys == ["0", "2"] and faults.keys() == {"1"} and reason in faults["1"]


def test_a_key_that_comes_again_is_a_fault_and_the_first_stays(tmp_path):
    write_tar(tmp_path / "a.tar", [*members({"0": vqa(0), "1": vqa(1)}), *members({"0": vqa(2)})])
    faults = FaultLog(1.0)
    found = samples_of(index_of(tmp_path / "a.tar", faults=faults))
    assert [(s.key, s.fields["question_id"]) for s in found] == [("0", 0), ("1", 1)]
    assert [(f.key, f.reason) for f in faults.faults] == [("0", "the key occurs twice in the shard")]


def test_nothing_is_ever_unpickled(tmp_path):
    bomb = f"cposix\nsystem\n(S'touch {tmp_path}/run'\ntR.".encode()
    extra = [(f"0.{extension}", bomb) for extension in ("pyd", "pickle", "pkl", "pth", "pt", "npy")]
    write_tar(tmp_path / "a.tar", [*members({"0": vqa(0)}), *extra, *members({"1": bomb})])
    keys, faults = keys_and_faults(tmp_path / "a.tar")
    assert keys == ["0"] and "not JSON" in faults["1"] and not (tmp_path / "run").exists()


def test_keys_that_lead_elsewhere_are_faults(tmp_path):
    write_tar(tmp_path / "a.tar", members({key: vqa() for key in ("../x", "a/../../y", "/etc/z", "good/z")}))
    keys, faults = keys_and_faults(tmp_path / "a.tar")
    assert keys == ["good/z"] and {"../x", "a/../../y"} <= faults.keys() and len(faults) == 3
    assert all("leads out of the shard" in reason for reason in faults.values())


def test_links_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text(json.dumps(vqa(1)))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members({"0": vqa(0)}):
            info = tarfile.TarInfo(name)
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("1.json")
            link.type, link.linkname = kind, str(tmp_path / "secret")
            tar.addfile(link)
    assert keys_and_faults(tmp_path / "a.tar") == (["0"], {})


@pytest.mark.parametrize("cut,keys", [
    (5 * 4 * 512 + 700, ["0", "1", "2", "3", "4"]),  # within the picture of 5
    (5 * 4 * 512, ["0", "1", "2", "3", "4"]),  # between two samples
    (5 * 4 * 512 + 1024, ["0", "1", "2", "3", "4"]),  # between a picture and its text
    (5 * 4 * 512 - 500, ["0", "1", "2", "3"]), (100, []), (0, [])])
def test_a_truncated_shard_gives_what_it_holds(tmp_path, cut, keys):
    write_tar(tmp_path / "a.tar", members({str(i): vqa(i) for i in range(6)}))
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:cut])
    write_tar(tmp_path / "b.tar", members({"b": vqa(7)}))
    found, faults = keys_and_faults(tmp_path / "a.tar", tmp_path / "b.tar")
    assert found == [*keys, "b"] and "the shard cannot be read on" in faults[""]


def test_of_a_cut_shard_all_that_its_manifest_lists_is_lost(tmp_path):
    write_shards(tiny_samples(20), tmp_path)
    shard = tmp_path / "shard-000000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match=r"2\d of 60 records read for task vqa"):
        index_of(shard, faults=FaultLog(0.3))
    shard.unlink()
    with pytest.raises(UserError, match="60 of 60 records read for task vqa"):
        index_of(shard, faults=FaultLog(0.3))


def test_damage_within_a_shard_is_told(tmp_path):
    write_tar(tmp_path / "a.tar", members({str(i): vqa(i) for i in range(6)}))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[3 * 4 * 512 + 150] ^= 0xFF  # the checksum of a header
    (tmp_path / "a.tar").write_bytes(data)
    keys, faults = keys_and_faults(tmp_path / "a.tar")
    assert keys == ["0", "1", "2"] and "the shard cannot be read on" in faults[""]


def test_nothing_behind_a_header_of_zeros_is_lost_in_silence(tmp_path):
    write_tar(tmp_path / "a.tar", members({str(i): vqa(i) for i in range(4)}))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[2 * 2048:2 * 2048 + 512] = bytes(512)
    (tmp_path / "a.tar").write_bytes(data)
    keys, faults = keys_and_faults(tmp_path / "a.tar")
    assert keys == ["0", "1"] and "more behind the end mark" in faults[""]


def test_names_that_are_no_utf8_and_of_any_length(tmp_path):
    write_tar(tmp_path / "a.tar", members({"aZ": vqa(0), "x" * 5000: vqa(1), "b": vqa(2)}))
    data = (tmp_path / "a.tar").read_bytes()
    for name in (b"aZ.png", b"aZ.json"):  # its second character becomes a byte that is no UTF-8
        at = data.index(name)
        header = bytearray(data[at:at + 512])
        header[1] = 0x81
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data = data[:at] + header + data[at + 512:]
    (tmp_path / "a.tar").write_bytes(data)
    keys, faults = keys_and_faults(tmp_path / "a.tar")
    assert len(keys) == 3 and keys[1] == "x" * 5000 and not faults
    assert keys[0] == "a\\x81"


def test_a_header_that_lies_about_its_size_takes_no_memory(tmp_path):
    write_tar(tmp_path / "a.tar", members({"0": vqa(0)}))
    info = tarfile.TarInfo("x")
    info.type, info.size = b"L", 1 << 33
    good = (tmp_path / "a.tar").read_bytes()[:2048]
    (tmp_path / "a.tar").write_bytes(good + info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    keys, faults = keys_and_faults(tmp_path / "a.tar")
    assert keys == ["0"] and "a header of 8,589,934,592 bytes" in faults[""]


def test_a_shard_that_cannot_be_opened_is_a_fault(tmp_path):
    write_tar(tmp_path / "a.tar", members({"0": vqa(0)}))
    keys, faults = keys_and_faults(tmp_path / "a.tar", tmp_path / "gone.tar")
    assert keys == ["0"] and "No such file" in faults[""]


@pytest.mark.parametrize("change", ["removed", "shorter", "other"])
def test_a_shard_that_vanishes_or_changes_after_the_scan_is_a_fault(tmp_path, change):
    shard = write_tar(tmp_path / "a.tar", members({"0": vqa(0), "1": vqa(1)}))
    index = index_of(shard)
    if change == "removed":
        shard.unlink()
    elif change == "shorter":
        changed = shard.stat()
        shard.write_bytes(shard.read_bytes()[:600])
        os.utime(shard, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    else:
        write_tar(shard, members({"9": vqa(9)}))
        os.utime(shard, ns=(1, 1))
    with pytest.raises(BadSample, match="cannot be read|become shorter|has changed"):
        index.sample(1)
    assert str(index.fault(1, "x")) == f"{shard}: 1: x"


def test_faults_are_told_once_each(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", members({"0": vqa(0), "1": b"{", "2": vqa(task="x")}))
    faults = FaultLog(1.0)
    for _ in range(2):
        index_of(tmp_path / "a.tar", faults=faults)
    assert caplog.text.count("skipped a sample of vqa") == 2 and "a.tar: 2: unknown task 'x'" in caplog.text
    assert [fault["key"] for fault in faults.report()] == ["1", "2"]


@pytest.mark.parametrize("share,fatal", [(0.01, True), (0.2, True), (0.25, False)])
def test_too_many_faults_end_the_run_and_name_them(tmp_path, share, fatal):
    write_tar(tmp_path / "a.tar", members({str(i): vqa(i, question="" if i == 2 else "what?") for i in range(4)}))
    if not fatal:
        assert len(index_of(tmp_path / "a.tar", faults=FaultLog(share))) == 3
        return
    with pytest.raises(UserError, match=r"1 of 4 samples read for task vqa(.|\n)*a\.tar: 2: field question"):
        index_of(tmp_path / "a.tar", faults=FaultLog(share))


def test_shards_without_the_task_are_not_opened(tmp_path, monkeypatch):
    samples = [{**vqa(i), "image": png()} for i in range(2)]
    samples += [{"task": "captioning", "image_id": i, "captions": ["x"], "image": png()} for i in range(2)]
    write_shards(samples, tmp_path, name="x", samples_per_shard=2)
    shards = sorted(tmp_path.glob("x-*.tar"))
    opened = Counter()
    scan = index_module._scan
    monkeypatch.setattr(index_module, "_scan", lambda shard, *rest: opened.update([shard[-8:]]) or scan(shard, *rest))
    assert len(index_of(*shards, task="captioning")) == 2 and opened == {"0001.tar": 1}
    # An unknown tag must be met, though the manifest says that the task is not there.
    faults = FaultLog(1.0)
    assert len(index_of(*shards, task="captioning", known=["captioning"], faults=faults)) == 2
    assert [f.reason.split(";")[0] for f in faults.faults] == ["unknown task 'vqa'"] * 2


def test_shards_whose_writing_broke_off_are_refused(tmp_path):
    write_shards(tiny_samples(2), tmp_path)
    (tmp_path / "shard.partial.json").touch()
    with pytest.raises(UserError, match=r"shard\.partial\.json: the writing of these shards broke off"):
        index_of(tmp_path / "shard-000000.tar")


@pytest.mark.parametrize("format,captions", [
    ("img2dataset", ["a dog\na cat"]), ("clip_benchmark", ["a dog", "a cat"])])
def test_other_layouts_are_read_as_they_are(tmp_path, format, captions):
    write_tar(tmp_path / "a.tar", [("s/0.jpg", png()), ("s/0.txt", b"a dog\na cat"), ("s/0.json", {"width": 8}),
                                   ("s/1.jpg", png()), ("s/1.txt", b"\xff")])
    faults = FaultLog(1.0)
    (sample,) = samples_of(index_of(tmp_path / "a.tar", task="retrieval", format=format, faults=faults))
    assert sample.fields["captions"] == captions and sample.images == (png(),)
    assert sample.image_id == f"{tmp_path}/a.tar/s/0"  # keys begin anew in each set
    assert [(f.key, f.reason) for f in faults.faults] == [("s/1", "the text is not UTF-8")]


def test_clip_benchmark_s_classes_are_numbers_of_the_labels(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.{e}", d) for i, number in enumerate((b"1", b"0\n", b"2", b"x", b"-1"))
                                   for e, d in (("webp", png()), ("cls", number))])
    faults = FaultLog(1.0)
    found = samples_of(index_of(tmp_path / "a.tar", task="c", kind="classification", known=["c"],
                                format="clip_benchmark", labels=("dog", "cat"), faults=faults))
    assert [s.fields["label"] for s in found] == ["cat", "dog"]
    assert [f.key for f in faults.faults] == ["2", "3", "4"] and "below 2" in next(iter(faults.faults)).reason


def test_no_sample_of_a_task_is_an_error(tiny_shards):
    with pytest.raises(UserError, match="no sample with the tag 'vqq'"):
        index_of(*sorted(tiny_shards.glob("*.tar")), task="vqq", kind="vqa", known=[*TASKS, "vqq"])


def test_two_tasks_may_have_one_tag_each_in_its_shards(tiny_config, tmp_path):
    data = tiny_config().model_dump()
    for i, name in enumerate(("here", "there")):
        write_shards([{**vqa(10 * i + j), "image": png()} for j in range(3 + i)], tmp_path, name=name)
        data["tasks"][name] = {**data["tasks"]["vqa"], "tag": "vqa", "train": [str(tmp_path / f"{name}-*.tar")]}
    data["tasks"] = {name: data["tasks"][name] for name in ("here", "there")}
    indices = build_indices(parse_config(data), "train", FaultLog(0.0))
    assert {name: [s.fields["question_id"] for s in samples_of(index)] for name, index in indices.items()} == {
        "here": [0, 1, 2], "there": [10, 11, 12, 13]}


def test_a_config_s_patterns_are_scanned_and_named_in_errors(tiny_config, tiny_shards):
    config = tiny_config()
    assert {name: len(index) for name, index in build_indices(config, "train", FaultLog(0.0)).items()} == \
        dict.fromkeys(TASKS, 24)
    data = config.model_dump()
    data["tasks"]["vqa"]["valid"] = []
    assert list(build_indices(parse_config(data), "valid", FaultLog(0.0))) == ["retrieval", "captioning"]
    data["tasks"]["vqa"]["valid"] = [str(tiny_shards / "none-*.tar")]
    with pytest.raises(UserError, match=r"tasks\.vqa\.valid: no shard matches"):
        build_indices(parse_config(data), "valid", FaultLog(0.0))
