"""What `data inspect` and `data validate` tell of shards: counts by hand, and every fault put in."""

import json

import pytest
from PIL import Image

from tests.conftest import tiny_samples
from tests.shard_files import members, png, vqa, write_tar
from vl_mtl_lora import write_shards
from vl_mtl_lora.data.contact_sheet import contact_sheet
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.data.survey import MOST_SHOWN, survey, validate


def test_counts_and_statistics_by_tag(tmp_path, command):
    samples = [{**vqa(i), "image": png(), "question": "what is it ?" if i else "what ?", "answers": ["red"] * (i + 1)}
               for i in range(3)]
    samples += [{"task": "pairs", "image_id": i, "images": [png(), png("blue")], "text": "a b", "label": "yes"}
                for i in range(2)]
    write_shards(samples, tmp_path, samples_per_shard=2)
    code, out, _ = command("data", "inspect", tmp_path / "shard-*.tar", "--out", tmp_path / "sheet.png")
    assert code == 0 and out.splitlines() == [
        "vqa: 3 samples of kind vqa, 1 image each",
        "  question: 3.3 words on average, at most 4; 2 different: 'what is it ?' 67 %, 'what ?' 33 %",
        "  answers: 1.0 words on average, at most 1; 2.0 per sample, 1 to 3; 1 different: 'red' 100 %",
        "pairs: 2 samples of kind matching, 2 images each",
        "  text: 2.0 words on average, at most 2; 1 different: 'a b' 100 %",
        "  label: 1.0 words on average, at most 1; 1 different: 'yes' 100 %",
        f"contact sheet: {tmp_path / 'sheet.png'}"]
    sheet = Image.open(tmp_path / "sheet.png")
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours and sheet.width == 5 * 252 + 12


def test_shown_samples_lie_at_even_distances(tmp_path):
    write_shards(({**vqa(i), "image": png()} for i in range(1000)), tmp_path)
    tasks, _ = survey([str(tmp_path / "shard-000000.tar")])
    shown = [int(entry.key) for _, entry in tasks["vqa"].shown]
    assert MOST_SHOWN <= len(shown) < 2 * MOST_SHOWN and shown == list(range(0, 1000, shown[1]))


def test_a_sheet_shows_texts_and_pictures_that_cannot_be_decoded():
    samples = [Sample({"task": "t", "text": "long words " * 50, "text_pair": "b", "label": "yes"}, (), "k", "s"),
               Sample({"task": "t", "captions": ["x"], "image_id": 1}, (b"broken",), "k", "s")]
    sheet = contact_sheet(samples)
    assert sheet.getpixel((1, 1)) == (255, 255, 255) and any(
        red > 200 and green < 100 for _, (red, green, _) in sheet.getcolors(1 << 20))


@pytest.mark.parametrize("processes", [1, 2])
def test_every_fault_is_listed(tmp_path, processes):
    write_shards(tiny_samples(4), tmp_path, samples_per_shard=4, name="good")
    for name in ("changed", "gone"):
        write_shards(tiny_samples(4), tmp_path, samples_per_shard=4, name=name)
    data = bytearray((tmp_path / "changed-000001.tar").read_bytes())
    data[data.index(b"IDAT") + 6] ^= 0xFF
    (tmp_path / "changed-000001.tar").write_bytes(data)
    (tmp_path / "gone-000001.tar").unlink()
    write_tar(tmp_path / "gone-000003.tar", members({"x": vqa(0)}))
    write_tar(tmp_path / "bad-000000.tar", [*members({"0": vqa(0), "1": b"{", "2": vqa(question="")}),
                                            *members({"3": vqa(3)}, picture=b"no"), ("4.json", vqa(4))])
    (tmp_path / "broken-000000.tar").write_bytes((tmp_path / "good-000000.tar").read_bytes()[:3000])
    (tmp_path / "broken.partial.json").touch()
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    told = []
    counts, faults = validate(shards, processes=processes, tell=told.append)
    assert told == faults
    found = sorted((fault.shard.rpartition("/")[2], fault.key, fault.reason) for fault in faults)
    wanted = [("bad-000000.tar", "1", "not JSON"), ("bad-000000.tar", "2", "field question is not a text"),
              ("bad-000000.tar", "3", "image cannot be decoded"), ("bad-000000.tar", "4", "no image"),
              ("broken-000000.tar", "", "the shard cannot be read on"),
              ("broken.partial.json", "", "the writing of these shards broke off"),
              ("changed-000001.tar", "", "the checksum is not that of"),
              ("changed-000001.tar", "00000004", "image cannot be decoded"),
              ("gone-000001.tar", "", "the shard is missing"), ("gone-000003.tar", "", "does not list the shard")]
    assert len(found) == len(wanted) + (len([f for f in found if f[0].startswith("broken-")]) - 1)
    for shard, key, reason in wanted:
        assert any(f[:2] == (shard, key) and reason in f[2] for f in found), (shard, key, reason)
    assert counts.total() == 12 + 11 + 8 + 1 + 1 + 1  # good, changed, gone, x, bad, broken


def test_damaged_manifests_are_faults(tmp_path):
    write_shards(tiny_samples(2), tmp_path)
    manifest = tmp_path / "shard.manifest.json"
    content = json.loads(manifest.read_text())
    content["shards"][0]["tasks"]["vqa"] = 7
    manifest.write_text(json.dumps(content))
    (fault,) = validate([str(tmp_path / "shard-000000.tar")])[1]
    assert "good samples are" in fault.reason and "'vqa': 7" in fault.reason
    manifest.write_text("{")
    (fault,) = validate([str(tmp_path / "shard-000000.tar")])[1]
    assert "the manifest is damaged" in fault.reason


def test_exit_codes_and_messages(tmp_path, command):
    write_shards(tiny_samples(2), tmp_path)
    shard = tmp_path / "shard-000000.tar"
    assert command("data", "validate", shard) == (
        0, "6 good samples (captioning 2, retrieval 2, vqa 2), 0 faults\n", "")
    write_tar(tmp_path / "bad.tar", members({"0": b"{"}))
    code, out, _ = command("data", "validate", shard, tmp_path / "bad.tar")
    assert code == 1 and f"{tmp_path / 'bad.tar'}: 0: not JSON" in out and "1 faults" in out
    code, out, err = command("data", "inspect", tmp_path / "bad.tar")
    assert code == 2 and "bad.tar: 0: not JSON" in out and "no good sample" in err
    for name in ("inspect", "validate"):
        code, _, err = command("data", name, tmp_path / "none.tar")
        assert code == 2 and "no shard matches" in err
        code, _, err = command("data", name, shard, "--format", "tagget")
        assert code == 2 and "did you mean tagged" in err


def test_other_layouts(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.jpg", png()), ("0.txt", b"a dog\na cat"), ("1.webp", png()), ("1.cls", b"3")])
    tasks, faults = survey([str(tmp_path / "a.tar")], "clip_benchmark")
    assert not faults and {tag: dict(found.kinds) for tag, found in tasks.items()} == {
        "captions": {"retrieval": 1}, "classes": {"classification": 1}}
    assert tasks["classes"].values["label"] == {"3": 1} and tasks["captions"].entries["captions"] == {2: 1}
