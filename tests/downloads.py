"""Small downloads of public data sets in their official layouts, and what their converters make of them.

Each download holds the official keys, also those that no converter reads.
"""

import hashlib
import io
import itertools
import json
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
ANSWERS = ["net", "net", "net", "netting", "net", "mesh", "net", "net", " ", "net "]
HUMAN = ["net", "net", "net", "netting", "net", "mesh", "net", "net", "net"]  # of these, without the blank one


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
              "question_id": q, "answer_type": "other", "question_type": "what is"}, [photo(image)])
            for q, image in (pairs[1], pairs[0], pairs[2])]
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
              "question_id": f"0{i}{q}", "question_type": "verify"}, [photo(i + 10 * len(name))])
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


def own_data(folder):
    rows = [{"image": f"{i}.png", "task": "vqa", "image_id": i, "question": "what?", "answers": ["red"],
             "question_id": i} for i in range(5)]
    return build(folder, {"train.jsonl": lines(rows), **{f"{i}.png": photo(i, "PNG", (40, 20)) for i in range(5)}})
