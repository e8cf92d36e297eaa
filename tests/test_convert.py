"""What all converters share: going on after a break, and what is told of a damaged download."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.downloads import SCRIPTS, build, coco, flickr30k, gqa, own_data, pack, photo, read, vqav2, written


def test_resumed_shards_are_those_of_a_whole_write(tmp_path, run):
    files, _, _ = coco()
    folder = build(tmp_path / "download", files)
    options = ["--samples-per-shard", "1"]
    assert run("coco_captions_to_shards", folder, tmp_path / "whole", *options)[0] == 0
    late = folder / "val2014/COCO_val2014_000000000042.jpg"  # the second train picture
    late.unlink()
    code, _, error = run("coco_captions_to_shards", folder, tmp_path / "out", *options)
    assert code == 2 and "sample 2 (00000002): image cannot be read: val2014/COCO_val2014_000000000042.jpg" in error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "coco-train-000000.tar", "coco-train-000001.tar", "coco-train.partial.json"]
    build(folder, {"train2014/COCO_train2014_000000000009.jpg": b"never read again"})
    late.write_bytes(files["val2014/COCO_val2014_000000000042.jpg"])
    code, _, error = run("coco_captions_to_shards", folder, tmp_path / "out", *options, "--resume")
    assert code == 0, error
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    code, told, _ = run("coco_captions_to_shards", folder, tmp_path / "out", *options, "--resume")
    assert code == 0 and "coco-train is whole already\n" in told and "wrote" not in told


@pytest.mark.parametrize("change", ["another number", "another size", "a shard gone", "a shard cut"])
def test_resume_writes_anew_what_is_not_this_write(change, tmp_path, run):
    folder = own_data(tmp_path / "in")
    arguments = [folder / "train.jsonl", tmp_path / "out", "--samples-per-shard", "2"]
    assert run("jsonl_to_shards", *arguments)[0] == 0
    options = {"another number": ["--limit", "3"], "another size": ["--samples-per-shard", "4"]}.get(change, [])
    if change == "a shard gone":
        (tmp_path / "out" / "shard-000001.tar").unlink()
    if change == "a shard cut":
        (tmp_path / "out" / "shard-000001.tar").write_bytes(b"")
    code, told, error = run("jsonl_to_shards", *arguments, *options, "--resume")
    assert code == 0 and "wrote" in told, error
    shards = json.loads((tmp_path / "out" / "shard.manifest.json").read_text())["shards"]
    assert [s["samples"] for s in shards] == {"another number": [2, 1], "another size": [4, 1]}.get(change, [2, 2, 1])
    assert len(list((tmp_path / "out").glob("*.tar"))) == len(shards)


def test_ctrl_c_leaves_what_can_be_resumed(tmp_path, run, monkeypatch):
    folder = own_data(tmp_path / "in")
    file, options = folder / "train.jsonl", ["--samples-per-shard", "2"]
    assert run("jsonl_to_shards", file, tmp_path / "whole", *options)[0] == 0
    original = Path.read_bytes

    def interrupted(path):
        if path.name == "3.png":
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", interrupted)
    code, _, error = run("jsonl_to_shards", file, tmp_path / "out", *options)
    assert (code, error) == (130, "interrupted; go on with --resume\n")
    monkeypatch.setattr(Path, "read_bytes", original)
    assert run("jsonl_to_shards", file, tmp_path / "out", *options, "--resume")[0] == 0
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_a_write_broken_off_at_its_very_end_is_finished(tmp_path, run, monkeypatch):
    folder = own_data(tmp_path / "in")
    arguments = [folder / "train.jsonl", tmp_path / "out"]
    original = Path.unlink

    def interrupted(path, **options):
        if path.name == "shard.partial.json":
            raise KeyboardInterrupt
        original(path, **options)

    monkeypatch.setattr(Path, "unlink", interrupted)
    assert run("jsonl_to_shards", *arguments)[0] == 130
    monkeypatch.setattr(Path, "unlink", original)
    assert {"shard.manifest.json", "shard.partial.json"} <= set(written(tmp_path / "out"))
    assert run("jsonl_to_shards", *arguments, "--resume")[0] == 0
    assert set(written(tmp_path / "out")) == {"shard-000000.tar", "shard.manifest.json"}


def test_errors_say_what_is_wrong_with_a_download(tmp_path, run):
    code, _, error = run("gqa_to_shards", tmp_path / "nowhere", tmp_path / "out")
    assert code == 2
    assert f"{tmp_path / 'nowhere'} is no folder; expected the folder of the download: questions1.2.zip" in error
    folder = build(tmp_path / "download", gqa()[0])
    for content, message in [("{", f"{folder / 'val_balanced_questions.json'} is not JSON"),
                             ({"a": {"question": "b"}}, "have not the layout of GQA, https://cs.stanford.edu"),
                             (["a"], "have not the layout of GQA")]:
        build(folder, {"val_balanced_questions.json": content})
        code, _, error = run("gqa_to_shards", folder, tmp_path / "out")
        assert code == 2 and message in error and not (tmp_path / "out").exists()
    folder = build(tmp_path / "nlvr", {"train.json": '{"identifier": "a-0-0"\n'})
    code, _, error = run("nlvr2_to_shards", folder, tmp_path / "out", "--split", "train")
    assert code == 2 and f"{folder / 'train.json'}:1 is not JSON" in error


def test_a_split_without_samples_is_refused_before_anything_is_written(tmp_path, run):
    files, _, _ = coco()
    files["dataset_coco.json"]["images"].pop()  # the only one of valid
    folder = build(tmp_path / "download", files)
    code, _, error = run("coco_captions_to_shards", folder, tmp_path / "out")
    assert code == 2 and error.startswith("error: there is no sample for coco-valid")
    assert not (tmp_path / "out").exists()


def test_damaged_zip_files_are_named(tmp_path, run):
    files, _, zips = coco()
    folder = pack(tmp_path / "download", files, zips)
    data = (folder / "val2014.zip").read_bytes()
    picture = photo(0)
    assert picture in data
    (folder / "val2014.zip").write_bytes(data.replace(picture, bytes(len(picture))))
    code, _, error = run("coco_captions_to_shards", folder, tmp_path / "out", "--split", "test")
    assert code == 2 and "val2014.zip/val2014/COCO_val2014_000000391895.jpg is damaged" in error
    (folder / "val2014.zip").write_bytes(data[:100])
    code, _, error = run("coco_captions_to_shards", folder, tmp_path / "out", "--split", "test")
    assert code == 2 and f"{folder / 'val2014.zip'} cannot be read as a zip file" in error


def test_a_picture_that_several_samples_share_is_read_once(tmp_path, run, monkeypatch):
    folder = build(tmp_path / "download", vqav2()[0])
    reads, original = [], Path.read_bytes

    def counted(path):
        reads.append(path.name)
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    assert run("vqav2_to_shards", folder, tmp_path / "out", "--split", "train")[0] == 0
    assert sorted(name for name in reads if name.endswith(".jpg")) == [
        "COCO_train2014_000000458752.jpg", "COCO_train2014_000000581929.jpg"]


def test_a_script_runs_as_a_command(tmp_path):
    build(tmp_path / "download", flickr30k()[0])
    done = subprocess.run([sys.executable, SCRIPTS / "flickr30k_to_shards.py", "download", "shards"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(read(tmp_path / "shards", "flickr30k-train")) == 2
