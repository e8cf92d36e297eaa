"""Answers to requests of mixed tasks: equal to evaluation's own, in order, from Python and on the command line."""

import io
import json
import sys

import pytest
import torch
from PIL import Image

from tests.conftest import COLOURS
from tests.test_task_kinds import SECTIONS, all_kinds
from vl_mtl_lora import UserError, build_model, load_run, parse_config, predict, write_shards
from vl_mtl_lora.checkpoint import save_checkpoint
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import build_indices
from vl_mtl_lora.evaluate import evaluate_task

TRUTH = ("captions", "answers", "question_id", "label", "answer", "image_id")


@pytest.fixture(scope="module")
def samples():
    return list(all_kinds(6))


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory, samples):
    """A checkpoint of ten tasks of all kinds, whose adapters are no longer fresh; its shards beside it."""
    folder = tmp_path_factory.mktemp("predict")
    write_shards(samples, folder / "shards", name="all")
    sections = {"retrieval": {}, "vqa": {"answers": list(COLOURS)}, "captioning": {"max_new_tokens": 5}, **SECTIONS}
    shards = {split: str(folder / "shards" / "all-*.tar") for split in ("train", "test")}
    config = parse_config({
        "out": str(folder / "run"), "backbone": {"name": f"local-dir:{tiny_folder}"},
        "adapter": {"rank": 4, "alpha": 8}, "data": {"eval_batch": 7},
        "tasks": {name: {**section, **shards} for name, section in sections.items()}})
    torch.manual_seed(3)
    model = build_model(config)
    with torch.no_grad():
        for parameter in (*model.adapter_state().values(), *model.head_state().values()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_checkpoint(folder / "run" / "best", model, config, step=1)
    return folder / "run"


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(run, "cpu")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


def requests_of(samples):
    """Without the truth; what is looked for stays."""
    return [{name: value for name, value in sample.items() if name not in TRUTH or
             (name == "captions" and sample["task"] == "retrieval")} for sample in samples]


def in_words(task, prediction, sample):
    """What evaluation predicted, as an answer."""
    if task.kind == "retrieval":
        image, texts = prediction
        return sample.fields["captions"][int((texts.double() @ image.double()).argmax())]
    if task.kind == "classification":
        return task.classes[prediction[0]]
    if task.kind == "multiple_choice":
        return sample.fields["choices"][prediction]
    if task.kind == "matching":
        return f"cosine {prediction[0]:.3f}" if prediction[1] is None else task.labels[prediction[1]]
    return prediction


@pytest.mark.parametrize("zero_shot", [True, False])
def test_a_mixed_batch_is_answered_in_order_as_each_task_is_evaluated_alone(loaded, samples, zero_shot):
    model, config = loaded
    indices = build_indices(config, "test", FaultLog())
    expected = {}
    for name, index in indices.items():
        found = evaluate_task(model, index, zero_shot=zero_shot)
        expected[name] = [in_words(model.tasks[name], *pair) for pair in zip(found.predictions, found.samples)]
    wanted = [expected[sample["task"]].pop(0) for sample in samples]
    replies = predict(model, requests_of(samples), zero_shot)
    assert [reply.answer for reply in replies] == wanted
    assert len(set(wanted)) > 8
    assert predict(model, requests_of(samples), zero_shot, rows=7) == [
        (reply.answer, tuple((text, pytest.approx(score, abs=1e-5)) for text, score in reply.scores))
        for reply in replies]


@pytest.mark.parametrize("zero_shot", [True, False])
def test_scores_are_probabilities_and_cosines(model, zero_shot):
    backbone = model.backbone
    image = Image.new("RGB", (40, 30), (200, 40, 90))
    texts = ["a red shape", "a blue circle", "green"]
    colours, retrieval, fits = predict(model, [
        {"task": "colours", "image": image}, {"task": "retrieval", "image": image, "captions": texts},
        {"task": "fits", "image": image, "text": texts[0]}], zero_shot)

    def embedded(task):
        with torch.no_grad(), model.router.off() if zero_shot else model.router.use(task):
            picture = backbone.encode_image(backbone.preprocess(False)(image).unsqueeze(0))[0].double()
            prompts = [f"a photo of a {label}." for label in COLOURS] if task == "colours" else texts
            return picture, torch.cat([backbone.encode_text(backbone.tokenize([text])) for text in prompts]).double()

    picture, classes = embedded("colours")
    scale = backbone.log_scale if zero_shot else model.tasks["colours"].log_scale.item()
    likely = (torch.tensor(scale).double().exp() * (classes @ picture)).softmax(0)
    assert dict(colours.scores) == {label: pytest.approx(p, abs=1e-4) for label, p in zip(COLOURS, likely.tolist())}
    picture, embeddings = embedded("retrieval")
    cosines = (embeddings @ picture).tolist()
    assert dict(retrieval.scores) == {text: pytest.approx(c, abs=1e-4) for text, c in zip(texts, cosines)}
    assert [text for text, _ in retrieval.scores] == sorted(texts, key=lambda text: -cosines[texts.index(text)])
    picture, embeddings = embedded("fits")
    if zero_shot:
        assert fits.scores == (("cosine", pytest.approx(float(embeddings[0] @ picture), abs=1e-4)),)
    else:
        parts = [part * 24 ** 0.5 for part in (picture, embeddings[0])]
        head = model.tasks["fits"].head
        logits = head.weight.double() @ torch.cat([*parts, parts[0] * parts[1]]) + head.bias.double()
        assert dict(fits.scores) == {label: pytest.approx(p, abs=1e-4)
                                     for label, p in zip(("no", "yes"), logits.softmax(0).tolist())}


def test_the_image_tower_runs_once_and_sees_a_picture_once_for_each_set_of_adapters(model, monkeypatch, tmp_path):
    seen = []
    tower = model.backbone.image_states
    monkeypatch.setattr(model.backbone, "image_states", lambda images: seen.append(len(images)) or tower(images))
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 40), "red").save(path)
    requests = [{"task": "captioning", "image": path}, {"task": "vqa", "image": path, "question": "what is it?"},
                {"task": "vqa", "image": str(path), "question": "what is the color?"},
                {"task": "texts", "text": "a", "text_pair": "b"}]
    predict(model, requests)
    predict(model, requests, zero_shot=True)
    assert seen == [2, 1]


def test_pictures_are_paths_bytes_and_pil_images(model, tmp_path):
    image = Image.new("RGBA", (50, 40), (10, 200, 10, 90))
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    replies = predict(model, [{"task": "colours", "image": each} for each in (
        image, tmp_path / "a.png", str(tmp_path / "a.png"), data, Image.open(io.BytesIO(data)))])
    assert len(set(replies)) == 1


@pytest.mark.parametrize("request_,message", [
    ({"task": "colour", "image": "x.png"}, "request 1: unknown task 'colour'; did you mean colours?"),
    ({"image": "x.png"}, "request 1: unknown task None"),
    ({"task": "vqa", "image": "x.png"}, "request 1: task vqa: field question is missing"),
    ({"task": "choice", "image": "x.png", "question": "a", "choices": ["b"]}, "two or more different texts"),
    ({"task": "colours"}, "request 1: no image: task colours takes 1"),
    ({"task": "texts", "image": "x.png", "text": "a", "text_pair": "b"}, "request 1: 1 image: task texts takes none"),
    ({"task": "pair", "images": ["a", "b"], "image": "x.png", "text": "a"}, "expected one of the fields"),
    ({"task": "colours", "image": "nowhere.png"}, "request 1: image cannot be read: No such file"),
    ({"task": "colours", "image": b"broken"}, "request 1: image cannot be decoded"),
    ({"task": "colours", "image": 3}, "an image must be a path, bytes or a PIL image, got int"),
    ({"task": "colours", "image": Image.new("F", (8, 8))}, "pixels in floating point"),
])
def test_a_request_that_cannot_be_answered_is_named(model, request_, message):
    good = {"task": "colours", "image": Image.new("RGB", (8, 8))}
    with pytest.raises(UserError) as error:
        predict(model, [good, request_])
    assert message in str(error.value)


@pytest.fixture
def folder(tmp_path):
    """Pictures of four colours, one of them in a folder of its own, one that is broken, and what is no picture."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, colour in zip(("a.png", "b.jpg", "c.webp", "more/d.PNG"), COLOURS.values()):
        Image.new("RGB", (40, 40), colour).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_is_answered_and_its_broken_picture_named(command, run, model, folder, tmp_path):
    out = tmp_path / "answers.jsonl"
    code, printed, err = command("predict", run, folder, "--both", "--out", out)
    assert code == 1 and f"skipped {folder / 'broken.png'}: image cannot be decoded" in err
    assert err.count("skipped") == 1 and err.endswith("1 picture could not be used\n") and "8 answers" in printed
    records = lines(out.read_text())
    names = [str(folder / name) for name in ("a.png", "b.jpg", "c.webp", "more/d.PNG")]
    assert [(record["image"], record["task"]) for record in records] == [
        (name, task) for name in names for task in ("captioning", "colours")]
    for arm in ("zero_shot", "adapted"):
        wanted = predict(model, [{"image": r["image"], "task": r["task"]} for r in records], arm == "zero_shot")
        assert [record[arm]["answer"] for record in records] == [reply.answer for reply in wanted]
    assert not list(tmp_path.glob("*.part"))


def test_a_text_ranks_the_pictures_of_a_folder_and_texts_are_ranked_for_a_picture(command, run, model, folder):
    (folder / "broken.png").unlink()
    code, out, _ = command("predict", run, folder, "--task", "retrieval", "--text", "a red shape")
    (record,) = lines(out)
    assert code == 0 and record["captions"] == ["a red shape"] and record["task"] == "retrieval"
    files = [file for file in folder.rglob("*.*") if file.suffix != ".txt"]
    scores = {str(file): reply.scores[0][1] for file, reply in zip(files, predict(
        model, [{"task": "retrieval", "image": file, "captions": ["a red shape"]} for file in files]))}
    assert [name for name, _ in record["adapted"]["images"]] == sorted(scores, key=lambda name: -scores[name])
    assert dict(record["adapted"]["images"]) == {name: pytest.approx(s, abs=1e-5) for name, s in scores.items()}
    code, out, _ = command("predict", run, folder / "a.png", "--task", "retrieval", "--text", "a", "--text", "red")
    assert {text for text, _ in lines(out)[0]["adapted"]["scores"]} == {"a", "red"}
    code, out, _ = command("predict", run, folder / "a.png", "--task", "choice", "--task", "captioning", "--text",
                           "what is it?", "--text", "blue", "--text", "red", "--zero-shot")
    choice, caption = lines(out)
    assert (choice["question"], choice["choices"]) == ("what is it?", ["blue", "red"])
    assert choice["zero_shot"]["answer"] in ("blue", "red") and "adapted" not in choice
    assert caption.keys() == {"image", "task", "zero_shot"}


def test_a_file_of_requests_is_answered_in_order(command, run, model, samples, tmp_path):
    written = []
    for i, request in enumerate(requests_of(samples)):
        request = dict(request)
        for name in ("image", "images"):
            if name in request:
                pictures = request[name] if name == "images" else [request[name]]
                files = [f"{i}-{k}.png" for k in range(len(pictures))]
                for file, picture in zip(files, pictures):
                    picture.save(tmp_path / file)
                request[name] = files if name == "images" else files[0]
        written.append(request)
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(request) + "\n" for request in written))
    code, out, err = command("predict", run, file)
    assert code == 0, err
    wanted = [reply.answer for reply in predict(model, requests_of(samples))]
    assert [record["adapted"]["answer"] for record in lines(out)] == wanted
    assert [record["task"] for record in lines(out)] == [sample["task"] for sample in samples]
    file.write_text(json.dumps({"task": "vqa", "image": "0-0.png"}) + "\n")
    code, out, err = command("predict", run, file)
    assert (code, out) == (2, "") and "requests.jsonl, request 1: task vqa: field question is missing" in err


def test_a_terminal_gets_lines_to_read(command, run, folder, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, _ = command("predict", run, folder / "a.png", "--both", "--task", "colours")
    title, zero_shot, adapted = out.splitlines()
    assert code == 0 and title == f"{folder / 'a.png'}  colours"
    assert zero_shot.startswith("  zero-shot: ") and adapted.startswith("  adapted:   ")
    label = adapted.split()[1]
    assert f"({label} 0." in adapted and adapted.count(" 0.") == 4


@pytest.mark.parametrize("arguments,message", [
    (["nowhere.png"], "there is no file or folder nowhere.png: expected a picture, a folder of pictures"),
    (["PICTURE", "--task", "colors"], "unknown task 'colors'; did you mean colours?"),
    (["PICTURE", "--task", "vqa"], "task vqa takes --text QUESTION; got 0"),
    (["PICTURE", "--task", "choice", "--text", "a"], "task choice takes --text QUESTION --text CHOICE ...; got 1"),
    (["PICTURE", "--task", "captioning", "--text", "a"], "task captioning takes no --text; got 1"),
    (["PICTURE", "--task", "pair", "--text", "a"], "task pair takes 2 pictures, ask it in a .jsonl file"),
    (["PICTURE", "--task", "texts", "--text", "a"], "task texts takes no pictures, ask it in a .jsonl file"),
    (["PICTURE", "--zero-shot", "--both"], "--zero-shot and --both exclude each other"),
    (["EMPTY"], "there is no picture in"),
    (["PICTURE", "--out", "nowhere/x.jsonl"], "expected a file in a folder that exists"),
    (["REQUESTS", "--task", "vqa"], "has the task and the texts of each request; leave out --task and --text"),
])
def test_what_cannot_be_asked_is_refused_in_one_line(command, run, loaded, folder, tmp_path, monkeypatch, arguments,
                                                     message):
    monkeypatch.setattr("vl_mtl_lora.checkpoint.load_run", lambda folder: loaded)
    (tmp_path / "empty").mkdir()
    (tmp_path / "r.jsonl").touch()
    known = {"PICTURE": folder / "a.png", "EMPTY": tmp_path / "empty", "REQUESTS": tmp_path / "r.jsonl"}
    code, out, err = command("predict", run, *(known.get(word, word) for word in arguments))
    assert code == 2 and out == "" and message in err and err.startswith("error: ") and err.count("\n") == 1
