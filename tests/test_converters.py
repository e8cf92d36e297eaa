"""The converters of data_scripts on small downloads in each data set's own layout: what they write and refuse.

Each download holds the official keys, also those that no converter reads.
"""

import hashlib
import importlib.util
import io
import itertools
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from vl_mtl_lora import write_shards

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
NAMES = sorted(path.stem for path in [*SCRIPTS.glob("*_to_shards.py"), SCRIPTS / "reshard.py"])
ANSWERS = ["net", "net", "net", "netting", "net", "mesh", "net", "net", " ", "net "]
HUMAN = ["net", "net", "net", "netting", "net", "mesh", "net", "net", "net"]  # of these, without the blank one


@pytest.fixture
def run(monkeypatch, capfd):
    """Returns a function that runs a script's main; it gives the exit code, and what was printed and told of errors."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def call(script, *args):
        spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capfd.readouterr()
    return call


def photo(number, kind="JPEG", size=(24, 16)):
    stream = io.BytesIO()
    Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, 80)).save(stream, kind)
    return stream.getvalue()


def build(folder, files):
    """Writes bytes as they are, a text as it is, anything else as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        path.write_bytes(content)
    return folder


def pack(folder, files, zips, top=""):
    """Writes the same into .zip files: {zip: the beginnings of the names in it}; `top` comes before the names."""
    folder.mkdir()
    unpacked = build(folder.parent / "unpacked", files)
    packed = set()
    for archive, beginnings in zips.items():
        with zipfile.ZipFile(folder / archive, "w") as stream:
            for name in sorted(files):
                if name.startswith(tuple(beginnings)):
                    stream.write(unpacked / name, top + name)
                    packed.add(name)
    assert packed == set(files)
    return folder


def read(out, name):
    """The samples of all shards of a name: their objects and pictures, in order."""
    samples = []
    for shard in sorted(out.glob(f"{name}-[0-9]*.tar")):
        with tarfile.open(shard) as tar:
            for _, members in itertools.groupby(tar, lambda member: member.name.partition(".")[0]):
                record = {member.name.partition(".")[2]: tar.extractfile(member).read() for member in members}
                samples.append((json.loads(record.pop("json")), [record[kind] for kind in sorted(record)]))
    return samples


def written(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- the downloads: files, expected samples by shards' name, zip files ------------------------------------------------


def coco():
    def row(number, split, folder, imgid):
        return {"filepath": folder, "filename": f"COCO_{folder}_{number:012d}.jpg", "imgid": imgid, "split": split,
                "cocoid": number, "sentids": [imgid * 2, imgid * 2 + 1], "sentences": [
                    {"tokens": ["a", "man"], "raw": f"A man {number}. ", "imgid": imgid, "sentid": imgid * 2},
                    {"tokens": ["the", "dog"], "raw": f"\nthe dog {number}", "imgid": imgid, "sentid": imgid * 2 + 1}]}

    rows = [row(391895, "test", "val2014", 0), row(9, "train", "train2014", 1), row(42, "restval", "val2014", 2),
            row(73, "val", "val2014", 3)]
    files = {"dataset_coco.json": {"images": rows, "dataset": "coco"}}
    files |= {f"{r['filepath']}/{r['filename']}": photo(r["imgid"]) for r in rows}

    def both(number, imgid):
        fields = {"image_id": f"coco/{number}", "captions": [f"A man {number}.", f"the dog {number}"]}
        return [({**fields, "task": task}, [photo(imgid)]) for task in ("retrieval", "captioning")]
    expected = {"coco-train": both(9, 1) + both(42, 2), "coco-valid": both(73, 3), "coco-test": both(391895, 0)}
    return files, expected, {"caption_datasets.zip": ["dataset_"], "train2014.zip": ["train2014/"],
                             "val2014.zip": ["val2014/"]}


def flickr30k():
    rows = [{"sentids": [0, 1], "imgid": i, "split": split, "filename": f"100009279{i}.jpg", "sentences": [
        {"tokens": ["two", "men"], "raw": f"Two men {i} .", "imgid": i, "sentid": 2 * i},
        {"tokens": [], "raw": " ", "imgid": i, "sentid": 2 * i + 1}]}
        for i, split in enumerate(["train", "val", "test"])]
    files = {"dataset_flickr30k.json": {"images": rows, "dataset": "flickr30k"}}
    files |= {f"flickr30k-images/{r['filename']}": photo(r["imgid"]) for r in rows}
    expected = {f"flickr30k-{split}": [
        ({"image_id": f"flickr30k/100009279{i}", "captions": [f"Two men {i} ."], "task": task}, [photo(i)])
        for task in ("retrieval", "captioning")] for i, split in enumerate(["train", "valid", "test"])}
    return files, expected, {"flickr30k.zip": ["dataset_", "flickr30k-images/"]}


def coco_vqa(name, version, more):
    """VQA v2 and OK-VQA: questions in another order than their answers, two about one picture."""
    files, expected = {}, {}
    for split, folder in (("train", "train2014"), ("valid", "val2014")):
        pairs = [(581929000, 581929), (458752001, 458752), (581929001, 581929)]
        files[f"{version}OpenEnded_mscoco_{folder}_questions.json"] = {
            "info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": folder,
            "license": {"name": "CC BY 4.0"},
            "questions": [{"image_id": image, "question": f"What is {q}? ", "question_id": q} for q, image in pairs]}
        files[f"{version}mscoco_{folder}_annotations.json"] = {
            "info": {}, "license": {}, "data_type": "mscoco", "data_subtype": folder,
            "annotations": [{"question_type": "what is", "answer_type": "other", "image_id": image, "question_id": q,
                             "answers": [{"answer": a, "answer_id": i + 1, **more} for i, a in enumerate(ANSWERS)],
                             **({"multiple_choice_answer": "net" if q % 2 else "yes"} if version else {})}
                            for q, image in reversed(pairs)]}
        files |= {f"{folder}/COCO_{folder}_{image:012d}.jpg": photo(image) for _, image in pairs}
        expected[f"{name}-{split}"] = [
            ({"task": "vqa", "image_id": f"coco/{image}", "question": f"What is {q}?", "answers": HUMAN,
              "question_id": q}, [photo(image)]) for q, image in (pairs[1], pairs[0], pairs[2])]
    return files, expected


def vqav2():
    files, expected = coco_vqa("vqav2", "v2_", {"answer_confidence": "yes"})
    zips = {f"v2_{what}_{split}_mscoco.zip": [f"v2_{begin}mscoco_{split.lower()}2014"]
            for split in ("Train", "Val") for what, begin in (("Questions", "OpenEnded_"), ("Annotations", ""))}
    return files, expected, {**zips, "train2014.zip": ["train2014/"], "val2014.zip": ["val2014/"]}


def okvqa():
    files, expected = coco_vqa("okvqa", "", {"raw_answer": "nets", "answer_confidence": "yes"})
    zips = {f"{name}.zip": [name] for name in files if name.endswith(".json")}
    return files, expected, {**zips, "train2014.zip": ["train2014/"], "val2014.zip": ["val2014/"]}


def gqa():
    files, expected = {}, {}
    for i, (split, official) in enumerate([("train", "train"), ("valid", "val"), ("test", "testdev")]):
        questions = {f"0{i}{q}": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}], "entailed": [],
            "equivalent": [f"0{i}{q}"], "question": f"Is the sky {q} dark?", "imageId": image, "isBalanced": True,
            "groups": {"global": None, "local": "06-sky_dark"}, "answer": "yes", "semanticStr": "select: sky",
            "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {}},
            "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
            "fullAnswer": "Yes, the sky is dark."} for q, image in enumerate([f"2{i}", f"n1{i}", f"2{i}"])}
        files[f"{official}_balanced_questions.json"] = questions
        files |= {f"images/{name}.jpg": photo(i + 10 * len(name)) for name in (f"2{i}", f"n1{i}")}
        expected[f"gqa-{split}"] = [
            ({"task": "vqa", "image_id": f"vg/{name}", "question": f"Is the sky {q} dark?", "answers": ["yes"],
              "question_id": f"0{i}{q}"}, [photo(i + 10 * len(name))])
            for q, name in ((0, f"2{i}"), (2, f"2{i}"), (1, f"n1{i}"))]
    return files, expected, {"questions1.2.zip": ["train_", "val_", "testdev_"], "images.zip": ["images/"]}


def aokvqa_rows(split):
    return [{"split": split, "image_id": image, "question_id": f"22MexNkB{image}", "question": "What is this bike? ",
             "choices": ["race", "delivery", "race", "street"], "correct_choice_idx": right, "direct_answers": ANSWERS,
             "difficult_direct_answer": False, "rationales": ["It has a number."]}
            for image, right in ((299207, 3), (5 + len(split), 2))]


def aokvqa():
    files = {f"aokvqa_v1p0_{split}.json": aokvqa_rows(split) for split in ("train", "val")}
    files |= {"train2017/000000000010.jpg": photo(10), "val2017/000000000008.jpg": photo(8),
              **{f"{split}2017/000000299207.jpg": photo(3) for split in ("train", "val")}}
    expected = {f"aokvqa-{split}": [
        ({"image_id": f"coco/{image}", "question": "What is this bike?", "question_id": f"22MexNkB{image}",
          "task": "multiple_choice", "choices": ["race", "delivery", "street"], "answer": answer}, [photo(colour)])
        for image, answer, colour in ((first, 0, first), (299207, 2, 3))]
        for split, first in (("train", 10), ("valid", 8))}
    return files, expected, {"aokvqa.zip": ["aokvqa_"], "train2017.zip": ["train2017/"], "val2017.zip": ["val2017/"]}


def textvqa():
    files, expected = {}, {}
    for split, official, start in (("train", "train", 0), ("valid", "val", 34602)):
        files[f"TextVQA_0.5.1_{official}.json"] = {
            "dataset_type": official, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [
                {"question": f"what is the brand {q}?", "image_id": image, "image_classes": ["Cassette deck"],
                 "flickr_original_url": "https://farm2.staticflickr.com/4.jpg", "image_width": 1024,
                 "flickr_300k_url": "https://c5.staticflickr.com/5.jpg", "image_height": 664, "answers": ANSWERS,
                 "question_tokens": ["what", "is"], "question_id": start + q, "set_name": official}
                for q, image in enumerate([f"b{start}", f"a{start}"])]}
        files |= {f"train_images/{c}{start}.jpg": photo(start + ord(c)) for c in "ab"}
        expected[f"textvqa-{split}"] = [
            ({"task": "vqa", "image_id": f"textvqa/{c}{start}", "question": f"what is the brand {q}?", "answers": HUMAN,
              "question_id": start + q}, [photo(start + ord(c))]) for q, c in ((1, "a"), (0, "b"))]
    return files, expected, {"train_val_images.zip": ["train_images/"], "annotations.zip": ["TextVQA"]}


def nlvr2():
    files, expected = {}, {}
    for split, official in (("train", "train"), ("valid", "dev"), ("test", "test1")):
        rows = [{"validation": {"4": "False"}, "sentence": f"There are {i} dogs. ", "left_url": "https://x/l.jpg",
                 "writer": 77, "label": label, "right_url": "https://x/r.jpg", "synset": "dog", "query": "dogs13",
                 "identifier": f"{official}-10171-0-{i}"} for i, label in enumerate(["True", "False"])]
        if split == "train":
            rows = [{**row, "directory": 60} for row in rows]
        folder = "images/train/60" if split == "train" else official
        files[f"{official}.json"] = lines(rows)
        files |= {f"{folder}/{official}-10171-0-img{side}.png": photo(side + len(official), "PNG") for side in (0, 1)}
        expected[f"nlvr2-{split}"] = [
            ({"task": "matching", "image_id": f"nlvr2/{official}-10171-0", "text": f"There are {i} dogs.",
              "label": label, "question_id": f"{official}-10171-0-{i}"},
             [photo(side + len(official), "PNG") for side in (0, 1)]) for i, label in enumerate(["true", "false"])]
    return files, expected, {"train_img.zip": ["images/train/", "train.json"], "dev_img.zip": ["dev"],
                             "test1_img.zip": ["test1"]}


def snli_ve():
    labels = ["contradiction", "-", "neutral", "entailment"]
    files, expected = {}, {}
    for split, official in (("train", "train"), ("valid", "dev"), ("test", "test")):
        rows = [{"annotator_labels": [label], "captionID": "4705552913.jpg#2", "gold_label": label,
                 "pairID": f"4705552913.jpg#2r1{i}", "sentence1": "Two women are embracing.",
                 "sentence1_parse": "(ROOT)", "sentence1_binary_parse": "( Two )", "sentence2": f"The sisters {i}. ",
                 "sentence2_parse": "(ROOT)", "sentence2_binary_parse": "( The )", "Flickr30K_ID": "4705552913"}
                for i, label in enumerate(labels)]
        files[f"snli_ve_{official}.jsonl"] = lines(rows)
        expected[f"snli-ve-{split}"] = [
            ({"task": "matching", "image_id": "flickr30k/4705552913", "text": f"The sisters {i}.", "label": label,
              "question_id": f"4705552913.jpg#2r1{i}"}, [photo(1)]) for i, label in enumerate(labels) if label != "-"]
    files["flickr30k_images/4705552913.jpg"] = photo(1)
    return files, expected, {"snli_ve.zip": ["snli_ve"], "flickr30k_images.zip": ["flickr30k_images/"]}


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def llava_instruct():
    rows = [{"id": "000000033471", "image": "000000033471.jpg",
             "conversations": turns("<image>\nWhat is shown?", "A bus.", "Where?", "In a street. ")},
            {"id": "000000033471", "image": "000000033471.jpg",
             "conversations": turns("Describe.\n<image>", "Red bus.")},
            {"id": "000000000009", "image": "000000000009.jpg",
             "conversations": turns("Who?\n<image>", "Nobody.")}]
    files = {"llava_instruct_150k.json": rows, "train2017/000000033471.jpg": photo(1),
             "train2014/COCO_train2014_000000000009.jpg": photo(2)}
    turn = [("000000033471/0/0", "What is shown?", "A bus."), ("000000033471/0/1", "Where?", "In a street."),
            ("000000033471/1/0", "Describe.", "Red bus."), ("000000000009/2/0", "Who?", "Nobody.")]
    expected = {"llava-instruct-train": [
        ({"task": "vqa", "image_id": f"coco/{int(i[:12])}", "question": q, "answers": [a], "question_id": i},
         [photo(1 if "33471" in i else 2)]) for i, q, a in turn]}
    return files, expected, {"llava.zip": ["llava_"], "train2017.zip": ["train2017/"], "train2014.zip": ["train2014/"]}


SETS = {"coco_captions": coco, "flickr30k": flickr30k, "vqav2": vqav2, "gqa": gqa, "okvqa": okvqa, "aokvqa": aokvqa,
        "textvqa": textvqa, "nlvr2": nlvr2, "snli_ve": snli_ve, "llava_instruct": llava_instruct}


# --- every set of a download ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["unpacked", "zips", "below a folder", "below a folder in zips"])
@pytest.mark.parametrize("name", SETS)
def test_fields_and_pictures(name, layout, tmp_path, run):
    files, expected, zips = SETS[name]()
    folder = tmp_path / "download"
    if "zips" in layout:
        pack(folder, files, zips, top="some folder/" if "folder" in layout else "")
    else:
        build(folder / "some folder" if layout == "below a folder" else folder, files)
    code, _, error = run(f"{name}_to_shards", folder, tmp_path / "out")
    assert code == 0, error
    for shards, samples in expected.items():
        assert read(tmp_path / "out", shards) == samples
        manifest = json.loads((tmp_path / "out" / f"{shards}.manifest.json").read_text())
        assert manifest["samples"] == len(samples) and "https://" in manifest["source"] and manifest["licence"]
    assert {p.name for p in (tmp_path / "out").glob("*.manifest.json")} == {f"{s}.manifest.json" for s in expected}


@pytest.mark.parametrize("name", SETS)
def test_dry_run_counts_and_names_a_missing_picture(name, tmp_path, run):
    files, expected, _ = SETS[name]()
    folder, out = build(tmp_path / "download", files), tmp_path / "out"
    code, told, error = run(f"{name}_to_shards", folder, out, "--dry-run")
    assert code == 0, error
    for shards, samples in expected.items():
        assert f"{shards}: {len(samples)} samples (" in told
    lost = next(name for name in files if name.endswith((".jpg", ".png")))
    (folder / lost).unlink()
    code, told, _ = run(f"{name}_to_shards", folder, out, "--dry-run")
    assert code == 1
    assert "  missing: " in told and lost.rpartition("/")[2] in told
    assert not out.exists()


@pytest.mark.parametrize("name", SETS)
def test_a_missing_annotation_file_is_named_before_anything_is_written(name, tmp_path, run):
    files, _, _ = SETS[name]()
    lost = [name for name in files if name.endswith((".json", ".jsonl"))][-1]
    folder = build(tmp_path / "download", {name: content for name, content in files.items() if name != lost})
    code, _, error = run(f"{name}_to_shards", folder, tmp_path / "out")
    assert code == 2
    assert error.startswith("error: ")
    assert f"{lost} is neither in {folder} nor in a .zip file there; it comes in" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_of_the_command_and_the_licence(name, run):
    code, told, _ = run(name, "--help")
    assert code == 0
    assert f"python data_scripts/{name}.py" in told and "icence" in told and "--dry-run" in told


# --- what the sets have of their own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_caption_tasks_and_splits_can_be_chosen(name, tmp_path, run):
    files, expected, _ = SETS["coco_captions" if name == "coco" else name]()
    folder = build(tmp_path / "download", files)
    script = "coco_captions_to_shards" if name == "coco" else "flickr30k_to_shards"
    options = ["--split", "train", "test", "--tasks", "captioning", "--name", "x"]
    assert run(script, folder, tmp_path / "out", *options)[0] == 0
    for split in ("train", "test"):
        assert read(tmp_path / "out", f"x-{split}") == [
            s for s in expected[f"{name}-{split}"] if s[0]["task"] == "captioning"]
    assert not (tmp_path / "out" / "x-valid.manifest.json").exists()


def test_vqav2_lists_the_most_frequent_train_answers(tmp_path, run):
    files, _, _ = vqav2()
    rows = files["v2_mscoco_train2014_annotations.json"]["annotations"]
    for row, answer in zip(rows, ["red", "yes", "yes "]):
        row["multiple_choice_answer"] = answer
    folder, out = build(tmp_path / "download", files), tmp_path / "out"
    assert run("vqav2_to_shards", folder, out)[0] == 0
    assert (out / "vqav2-answers.txt").read_text() == "yes\nred\n"
    assert run("vqav2_to_shards", folder, out, "--answers", "1")[0] == 0
    assert (out / "vqav2-answers.txt").read_text() == "yes\n"
    assert run("vqav2_to_shards", folder, tmp_path / "b", "--split", "valid")[0] == 0
    assert not (tmp_path / "b" / "vqav2-answers.txt").exists()


def test_aokvqa_direct_answers(tmp_path, run):
    folder = build(tmp_path / "download", aokvqa()[0])
    assert run("aokvqa_to_shards", folder, tmp_path, "--direct", "--split", "valid")[0] == 0
    assert read(tmp_path, "aokvqa-valid") == [
        ({"image_id": f"coco/{image}", "question": "What is this bike?", "question_id": f"22MexNkB{image}",
          "task": "vqa", "answers": HUMAN}, [photo(colour)]) for image, colour in ((8, 8), (299207, 3))]


def test_snli_ve_counts_rows_without_a_label(tmp_path, run):
    folder = build(tmp_path / "download", snli_ve()[0])
    _, told, _ = run("snli_ve_to_shards", folder, tmp_path / "out", "--split", "train", "test")
    assert told.count("  left out: 1 without a gold label\n") == 2


def test_llava_mixture_with_pictures_of_several_sets(tmp_path, run):
    rows = [{"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
             "conversations": turns("<image>\na?", "A")},
            {"id": "wgByO4Y_0", "model": "", "conversations": turns("hi", "Hello")},
            {"id": "2407890", "image": "gqa/images/2407890.jpg", "conversations": turns("b?\n<image>", "B")},
            {"id": "2407890", "image": "vg/VG_100K/2407890.jpg", "conversations": turns("c?\n<image>", "C")},
            {"id": "0f", "image": "textvqa/train_images/0f.jpg", "conversations": turns("d?", "D")},
            {"id": "1x", "image": "ocr_vqa/images/1x.jpg", "conversations": turns("e?", "E", "f?")},
            {"id": "2x", "image": "ocr_vqa/images/1x.jpg", "conversations": turns("e?", "E")[::-1]}]
    files = {row["image"]: photo(2) for row in rows if "image" in row}
    folder = build(tmp_path / "download", {**files, "llava_v1_5_mix665k.json": rows})
    code, told, error = run("llava_instruct_to_shards", folder, tmp_path, "--file", "llava_v1_5_mix665k.json")
    assert code == 0, error
    fields = [fields for fields, _ in read(tmp_path, "llava-instruct-train")]
    assert [(f["image_id"], f["question"], f["answers"], f["question_id"]) for f in fields] == [
        ("coco/33471", "a?", ["A"], "000000033471/0/0"), ("vg/2407890", "b?", ["B"], "2407890/2/0"),
        ("vg/2407890", "c?", ["C"], "2407890/3/0"), ("textvqa/0f", "d?", ["D"], "0f/4/0"),
        ("ocr_vqa/1x", "e?", ["E"], "1x/5/0")]
    assert "left out: 1 entries without a picture" in told and "left out: 1 turns that are no question" in told


# --- folders of classes -----------------------------------------------------------------------------------------------


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
    assert "left out: 1 records: no text" in told


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
    assert code == 2 and "left out: 1 records: no member .json" in error
    (tmp_path / "pairs" / "0.tar").write_bytes(b"no tar" * 200)
    code, _, error = run("reshard", tmp_path / "pairs", tmp_path / "out", "--format", "tagged")
    assert code == 2 and "0.tar: the rest: the shard cannot be read on" in error


# --- own data and easy-VQA --------------------------------------------------------------------------------------------


def own_data(folder):
    rows = [{"image": f"{i}.png", "task": "vqa", "image_id": i, "question": "what?", "answers": ["red"],
             "question_id": i} for i in range(5)]
    return build(folder, {"train.jsonl": lines(rows), **{f"{i}.png": photo(i, "PNG", (40, 20)) for i in range(5)}})


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


# --- breaking off, and errors -----------------------------------------------------------------------------------------


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
