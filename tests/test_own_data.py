"""The converters of class folders, shards of others, JSON lines and the packaged set."""

import io
import json
import pickle
import tarfile

import pytest
from PIL import Image

from tests.downloads import build, lines, own_data, photo, read, written
from vl_mtl_lora import write_shards

CLASSES = {"n01440764": 3, "n02012849": 2, "n03126707": 2}  # folder: pictures


def class_files(split):
    return {f"{split}{folder}/{folder}_{i}.JPEG": photo(i + int(folder[1:]) % 97) for folder, count in CLASSES.items()
            for i in range(count)} | {f"{split}n01440764/readme.txt": "no picture"}


@pytest.mark.parametrize("names,labels", [
    (None, ["n01440764", "n02012849", "n03126707"]),
    ("n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\nn9 other\n",
     ["tench", "crane (n02012849)", "crane (n03126707)"]),
    ({"n01440764": "tench", "n02012849": "crane bird", "n03126707": "crane"}, ["tench", "crane bird", "crane"])])
def test_imagefolder(names, labels, tmp_path, run):
    files = {**class_files("train/"), **class_files("val/")}
    folder = build(tmp_path / "download", files if names is None else {**files, "names": names})
    options = [] if names is None else ["--names", folder / "names"]
    code, _, error = run("imagefolder_to_shards", folder, tmp_path / "out", "--source", "here", "--licence", "MIT",
                         "--name", "imagenet", *options)
    assert code == 0, error
    assert (tmp_path / "out" / "imagenet-classes.txt").read_text().splitlines() == labels
    label = dict(zip(CLASSES, labels))
    for split, official in (("train", "train"), ("valid", "val")):
        samples = read(tmp_path / "out", f"imagenet-{split}")
        paths = [f["image_id"].removeprefix(f"imagenet/{split}/") for f, _ in samples]
        assert sorted(f"{official}/{p}" for p in paths) == sorted(
            n for n in files if n.startswith(official) and n.endswith(".JPEG"))
        assert [p.partition("/")[0] for p in paths] != sorted(p.partition("/")[0] for p in paths)  # classes are mixed
        assert samples == [({"task": "classification", "image_id": f"imagenet/{split}/{p}",
                             "label": label[p.partition("/")[0]]}, [files[f"{official}/{p}"]]) for p in paths]
    manifest = json.loads((tmp_path / "out" / "imagenet-train.manifest.json").read_text())
    assert (manifest["source"], manifest["licence"]) == ("here", "MIT")
    assert not (tmp_path / "out" / "imagenet-test.manifest.json").exists()


def test_imagefolder_without_splits(tmp_path, run):
    folder = build(tmp_path / "download", class_files(""))
    assert run("imagefolder_to_shards", folder, tmp_path / "out", "--dry-run")[0] == 0
    assert not (tmp_path / "out").exists()
    assert run("imagefolder_to_shards", folder, tmp_path / "out")[0] == 0
    assert len(read(tmp_path / "out", "imagefolder-train")) == 7
    code, _, error = run("imagefolder_to_shards", folder, tmp_path / "out", "--split", "test")
    assert (code, error) == (2, f"error: {folder} has no split test, only train\n")


@pytest.mark.parametrize("names,message", [
    ("n01440764 tench\nn02012849 crane\n", "has no name for the folder 'n03126707'"),
    ("n01440764\n", 'expected lines "n01440764 tench, Tinca tinca" or JSON'),
    ({"n01440764": 1, "n02012849": 2, "n03126707": 3}, 'expected lines "n01440764 tench, Tinca tinca" or JSON'),
    (None, "No such file")])
def test_imagefolder_refuses_names(names, message, tmp_path, run):
    folder = build(tmp_path / "download", class_files("") | ({} if names is None else {"names": names}))
    code, _, error = run("imagefolder_to_shards", folder, tmp_path / "out", "--names", folder / "names")
    assert code == 2 and message in error and not (tmp_path / "out").exists()


# --- shards of others -------------------------------------------------------------------------------------------------


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_reshard_img2dataset(tmp_path, run):
    for shard in range(2):
        members = {f"{shard}000{i}.{kind}": data for i in range(3) for kind, data in (
            ("jpg", photo(i)), ("json", b'{"url": "x"}'), ("txt", f" a cat {i}\nand a dog".encode()))}
        if shard == 1:
            del members["10002.txt"]
        write_tar(tmp_path / "cc" / f"{shard:05d}.tar", {**members, f"{shard}000x.pkl": pickle.dumps(1)})
    (tmp_path / "cc" / "00000_stats.json").write_text("{}")
    code, told, error = run("reshard", tmp_path / "cc", tmp_path / "out", "--format", "img2dataset", "--name", "cc3m",
                            "--task", "retrieval", "--samples-per-shard", "2", "--source", "cc", "--licence", "own")
    assert code == 0, error
    assert read(tmp_path / "out", "cc3m") == [
        ({"task": "retrieval", "image_id": f"cc3m/{key}", "captions": [f"a cat {key[-1]}\nand a dog"]},
         [photo(int(key[-1]))]) for key in ("00000", "00001", "00002", "10000", "10001")]
    manifest = json.loads((tmp_path / "out" / "cc3m.manifest.json").read_text())
    assert [s["samples"] for s in manifest["shards"]] == [2, 2, 1]
    assert (manifest["source"], manifest["licence"]) == ("cc", "own")
    assert "10002: no member .txt" in told


def test_reshard_clip_benchmark(tmp_path, run):
    folder = tmp_path / "wds"
    for shard, number in ((0, 0), (2, 2), (10, 1)):
        write_tar(folder / "test" / f"{shard}.tar", {
            f"s{shard:07d}.webp": photo(shard, "WEBP"), f"s{shard:07d}.cls": str(number).encode()})
        write_tar(folder / "captions" / f"{shard}.tar", {
            f"{shard}.png": photo(shard, "PNG"), f"{shard}.txt": b"one\ntwo \n"})
    (folder / "test" / "nshards.txt").write_text("3")
    arguments = [folder / "test", tmp_path / "out", "--format", "clip_benchmark", "--task", "classification"]
    code, _, error = run("reshard", *arguments)
    assert code == 2 and "classnames.txt is neither in" in error
    (folder / "classnames.txt").write_text("tench\ngold fish \nshark\n")
    code, _, error = run("reshard", *arguments)
    assert code == 0, error
    assert read(tmp_path / "out", "shard") == [
        ({"task": "classification", "image_id": f"shard/s{shard:07d}", "label": label}, [photo(shard, "WEBP")])
        for shard, label in ((0, "tench"), (2, "shark"), (10, "gold fish"))]
    code, _, error = run("reshard", f"{folder}/captions/*.tar", tmp_path / "out", "--format", "clip_benchmark",
                         "--task", "captioning", "--name", "captions")
    assert code == 0, error
    assert read(tmp_path / "out", "captions") == [
        ({"task": "captioning", "image_id": f"captions/{shard}", "captions": ["one", "two"]}, [photo(shard, "PNG")])
        for shard in (0, 2, 10)]


def test_reshard_tagged(tmp_path, run):
    red, blue = photo(1), photo(2, "PNG")
    samples = [({"task": "retrieval", "image_id": 1, "captions": ["a"]}, [red]),
               ({"task": "matching", "image_id": 2, "text": "b", "label": "true"}, [blue, red]),
               ({"task": "classification", "text": "good", "label": "yes"}, [])]
    for name in ("a", "b"):
        write_shards(({**fields, "images": images} if len(images) != 1 else {**fields, "image": images[0]}
                      for fields, images in samples[:3 if name == "a" else 2]), tmp_path / "in", name=name)
    code, _, error = run("reshard", tmp_path / "in", tmp_path / "all", "--format", "tagged")
    assert code == 0, error
    assert read(tmp_path / "all", "shard") == samples + samples[:2]
    code, _, error = run("reshard", tmp_path / "in", tmp_path / "one", "--format", "tagged", "--task", "matching")
    assert code == 0, error
    assert read(tmp_path / "one", "shard") == [samples[1]] * 2


@pytest.mark.parametrize("options,message", [
    (["--format", "img2dataset"], "--format img2dataset needs --task"),
    (["--format", "tagged", "--limit", "0"], "argument --limit: 0 is less than 1")])
def test_reshard_refuses_options(options, message, tmp_path, run):
    code, _, error = run("reshard", tmp_path, tmp_path / "out", *options)
    assert code == 2 and message in error


def test_reshard_refuses_inputs(tmp_path, run):
    code, _, error = run("reshard", tmp_path / "*.tar", tmp_path / "out", "--format", "tagged")
    assert code == 2 and "no .tar file in" in error
    write_tar(tmp_path / "in" / "shard-000000.tar", {"0.jpg": photo(1), "0.json": b'{"task": "x", "image_id": 1}'})
    before = written(tmp_path / "in")
    code, _, error = run("reshard", tmp_path / "in", tmp_path / "in", "--format", "tagged")
    assert code == 2 and "give another folder" in error and written(tmp_path / "in") == before
    write_tar(tmp_path / "pairs" / "0.tar", {"0.jpg": photo(1), "0.txt": b"a"})
    code, _, error = run("reshard", tmp_path / "pairs", tmp_path / "out", "--format", "tagged")
    assert code == 2 and "0: no member .json" in error
    (tmp_path / "pairs" / "0.tar").write_bytes(b"no tar" * 200)
    code, _, error = run("reshard", tmp_path / "pairs", tmp_path / "out", "--format", "tagged")
    assert code == 2 and "0.tar: the rest: the shard cannot be read on" in error


# --- own data and easy-VQA --------------------------------------------------------------------------------------------


def test_jsonl(tmp_path, run):
    folder = own_data(tmp_path / "in")
    arguments = [folder / "train.jsonl", tmp_path / "out", "--name", "train"]
    assert run("jsonl_to_shards", *arguments, "--dry-run")[:2] == (0, "train: 5 samples (vqa 5)\n")
    assert not (tmp_path / "out").exists()
    code, told, _ = run("jsonl_to_shards", *arguments, "--samples-per-shard", "2", "--source", "me", "--licence", "MIT")
    assert code == 0 and "train-*.tar: 5 samples (vqa 5), shards: 3\n" in told
    assert [f["question_id"] for f, _ in read(tmp_path / "out", "train")] == list(range(5))
    assert json.loads((tmp_path / "out" / "train.manifest.json").read_text())["licence"] == "MIT"
    assert run("jsonl_to_shards", *arguments, "--max-side", "10", "--limit", "2")[0] == 0
    small = [Image.open(io.BytesIO(images[0])).size for _, images in read(tmp_path / "out", "train")]
    assert small == [(10, 5), (10, 5)]


def test_jsonl_tells_of_broken_samples(tmp_path, run):
    folder = own_data(tmp_path / "in")
    (folder / "1.png").write_bytes(b"broken")
    (folder / "2.png").unlink()
    with open(folder / "train.jsonl", "a") as file:
        file.write('{"task": "vqa", "image_id": 9, "images": "0.png"}\n{"task": "vqa", "image_id": 9, "image": null}\n'
                   '{"task": "retrieval", "image_id": 9, "captions": ["no picture"]}\n')
    arguments = [folder / "train.jsonl", tmp_path / "out", "--name", "train"]
    code, told, _ = run("jsonl_to_shards", *arguments, "--dry-run")
    assert code == 1 and told.splitlines()[1:] == [
        f"  missing: {folder / '2.png'}", "  sample 5: field images is not a list: str",
        "  sample 6: field question is missing", "  sample 7: no image: a sample of retrieval has one"]
    code, _, error = run("jsonl_to_shards", *arguments)
    assert code == 2 and "error: sample 1 (00000001): image cannot be decoded" in error
    code, told, _ = run("jsonl_to_shards", *arguments, "--skip-broken")
    assert code == 0 and "3 samples (vqa 3), shards: 1, skipped: 5\n" in told


def test_dry_run_lists_the_first_of_many_problems(tmp_path, run):
    rows = [{"image": f"{i}.png", "task": "retrieval", "image_id": i, "captions": ["a"]} for i in range(1030)]
    folder = build(tmp_path, {"train.jsonl": lines(rows)})
    code, told, _ = run("jsonl_to_shards", folder / "train.jsonl", tmp_path / "out", "--dry-run")
    assert code == 1 and told.count("missing: ") == 20 and "  and 1,010 more\n" in told


def test_easy_vqa(tmp_path, run):
    code, told, error = run("easy_vqa_to_shards", tmp_path / "out", "--limit", "3", "--samples-per-shard", "2")
    assert code == 0, error
    assert {p.name for p in (tmp_path / "out").glob("*.json")} == {
        f"easy-vqa-{task}-{split}.manifest.json" for task in ("vqa", "captioning", "matching", "reading")
        for split in ("train", "valid", "test")}
    assert [f["image_id"].rpartition("/")[0] for f, _ in read(tmp_path / "out", "easy-vqa-vqa-test")] == [
        "easy-vqa/test"] * 3
    options = ["--split", "captioning-train", "--limit", "4", "--dry-run"]
    assert run("easy_vqa_to_shards", tmp_path / "x", *options)[:2] == (
        0, "easy-vqa-captioning-train: 4 samples (captioning 4)\n")
