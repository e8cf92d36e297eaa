"""The converters of public data sets: what they write and refuse."""

import json

import pytest

from tests.downloads import HUMAN, SCRIPTS, SETS, aokvqa, build, pack, photo, read, snli_ve, turns, vqav2

NAMES = sorted(path.stem for path in [*SCRIPTS.glob("*_to_shards.py"), SCRIPTS / "reshard.py"])


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


def test_coco_s_training_can_leave_out_the_pictures_of_val2014(tmp_path, run):
    files, _, _ = SETS["coco_captions"]()
    code, _, error = run("coco_captions_to_shards", build(tmp_path / "download", files), tmp_path / "out",
                         "--no-restval", "--split", "train", "--tasks", "captioning")
    assert code == 0, error
    assert [fields["image_id"] for fields, _ in read(tmp_path / "out", "coco-train")] == ["coco/9"]


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
