"""Classification, multiple choice and matching against slow references, and all kinds trained in one run."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

from tests.conftest import COLOURS, tiny_samples
from tests.test_tasks import sample, task
from vl_mtl_lora import UserError, build_model, parse_config, write_shards
from vl_mtl_lora.backbones.base import ImageStates
from vl_mtl_lora.backbones.generation import score_choices
from vl_mtl_lora.compare import compare
from vl_mtl_lora.data.schema import in_words
from vl_mtl_lora.model import check_gradients, example_batch
from vl_mtl_lora.tasks.base import Answer, Kept
from vl_mtl_lora.trainer import train

LABELS = ["red", "green", "blue", "dark blue", "yellow", "black", "white"]
RNG = random.Random(0)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def embedded(backbone, texts):
    """(N, E) of texts, each alone."""
    return torch.stack([backbone.encode_text(backbone.tokenize([text]))[0] for text in texts])


def close(got, wanted):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pictures", [0, 1])
def test_classes_are_the_means_of_their_templates(tiny_backbone, images, pictures):
    backbone = tiny_backbone()
    made = task(backbone, "classification", labels=LABELS, templates=["a {label} shape", "{label}"], images=pictures)
    samples = [sample(label=label, text=f"the color is {label}") for label in ("red", "blue", "white", "red")]
    with torch.no_grad():
        classes = torch.stack([F.normalize(embedded(backbone, [f"a {label} shape", label]).mean(0), dim=0)
                               for label in LABELS])
        states = backbone.image_states(images) if pictures else None
        query = states.embedding if pictures else embedded(backbone, [s.fields["text"] for s in samples])
        expected = (query.double() @ classes.double().T).argsort(dim=1, descending=True)[:, :5].tolist()
        made.eval()
        assert made.predict(backbone, states, samples, True) == expected
    right = [LABELS.index(s.fields["label"]) for s in samples]
    metrics = made.score(expected, samples)
    assert metrics["accuracy@1"] == 100 * sum(e[0] == r for e, r in zip(expected, right)) / 4
    assert metrics["accuracy@5"] == 100 * sum(r in e for e, r in zip(expected, right)) / 4
    assert made.answers(expected, samples, [2]) == [Answer(LABELS[expected[2][0]], expected[2][0] == 6)]


# Made by CLIP_benchmark 1.6.2's zeroshot_classification.evaluate.
CLIP_BENCHMARK = json.loads((Path(__file__).parent / "data" / "clip_benchmark.json").read_text())["classification"]


@pytest.mark.parametrize("case", CLIP_BENCHMARK, ids=lambda case: str(case["classes"]))
def test_zero_shot_accuracies_are_clip_benchmark_s(case, tiny_backbone, monkeypatch):
    rng = np.random.default_rng(case["seed"])
    middle = rng.standard_normal((case["classes"], case["dim"]))
    prompts = middle[:, None] + case["noise"] * rng.standard_normal((*middle.shape[:1], case["templates"], case["dim"]))
    right = np.repeat(np.arange(case["classes"]), case["images_per_class"])
    pictures = torch.from_numpy(middle[right] + case["noise"] * rng.standard_normal((len(right), case["dim"])))
    names = [str(i) for i in range(case["classes"])]
    backbone = tiny_backbone()
    templates = [f"{{label}}/{i}" for i in range(case["templates"])]
    made = task(backbone, "classification", labels=names, templates=templates)

    def embed(_, texts):
        return F.normalize(torch.from_numpy(np.stack([prompts[tuple(map(int, t.split("/")))] for t in texts])).float(),
                           dim=-1)
    monkeypatch.setattr("vl_mtl_lora.tasks.classification.embed_texts", embed)
    made.eval()
    samples = [sample(label=names[i], image_id=n) for n, i in enumerate(right)]
    states = ImageStates(F.normalize(pictures.float(), dim=-1), None)
    metrics = made.score(made.predict(backbone, states, samples, True), samples)
    theirs = {name: 100 * value for name, value in case["figures"].items() if value is not None}
    assert metrics["accuracy@1"] == pytest.approx(theirs["acc1"], abs=1e-6)
    assert metrics["mean_per_class"] == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)
    assert metrics.get("accuracy@5") == (pytest.approx(theirs["acc5"], abs=1e-6) if "acc5" in theirs else None)


@pytest.mark.parametrize("pictures", [0, 1])
def test_a_class_is_trained_against_those_of_the_batch_and_some_others(tiny_backbone, images, pictures):
    backbone = tiny_backbone()
    made = task(backbone, "classification", labels=LABELS, templates=["{label}"], images=pictures, negatives=4)
    samples = [sample(label=label, text=f"the color is {label}") for label in ("white", "blue", "white", "red")]
    inputs = made.collate(samples, random.Random(3))
    drawn = [backbone.text.decode(ids[1:].tolist()) for ids in inputs["tokens"]]
    assert drawn[:3] == ["white", "blue", "red"] and len(set(drawn)) == 4 and set(drawn) <= set(LABELS)
    assert inputs["labels"].tolist() == [0, 1, 0, 2]
    with torch.no_grad():
        states = backbone.image_states(images) if pictures else None
        query = states.embedding if pictures else embedded(backbone, [s.fields["text"] for s in samples])
        logits = made.log_scale.exp().double() * query.double() @ embedded(backbone, drawn).double().T
        wanted = -sum(logits.log_softmax(1)[i, label] for i, label in enumerate([0, 1, 0, 2])) / 4
        close(made.loss(backbone, states, inputs).double(), wanted)
    few = task(backbone, "classification", labels=LABELS, templates=["{label}"], negatives=2)
    assert len(few.collate(samples, RNG)["tokens"]) == 3  # those of the batch are always there


def choices(*rows):
    return [sample(question=f"what is {i} ?", choices=list(row), answer=len(row) - 1, question_id=i)
            for i, row in enumerate(rows)]


def test_choices_are_ranked_by_the_likelihood_of_their_tokens(tiny_backbone, images):
    backbone = tiny_backbone()
    backbone.model.logit_scale.data.zero_()
    made = task(backbone, "multiple_choice")
    assert made.answer_by == "ranking" and made.needs == {"generate"}
    samples = choices(["red", "dark blue"], ["a circle", "blue", "green circle"], ["x", "red", "a", "yellow"],
                      ["b", "a"])
    prompts = made._prompts(samples)
    with torch.no_grad():
        states = backbone.image_states(images)
        got = score_choices(backbone, states, prompts, [s.fields["choices"] for s in samples])
        assert got.shape == (4, 4)
        for i, s in enumerate(samples):
            for j, choice in enumerate(s.fields["choices"]):
                before, after = backbone.text.ids([prompts[i], choice])
                ids = torch.tensor([[backbone.text.bos_id, *before, *after]])
                logp = backbone.token_logits(states.rows(slice(i, i + 1)), ids)[0].double().log_softmax(-1)
                close(got[i, j].double(), sum(logp[len(before) + k, t] for k, t in enumerate(after)) / len(after))
            assert (got[i, len(s.fields["choices"]):] == float("-inf")).all()
        assert made.predict(backbone, states, samples, False) == got.argmax(1).tolist()
    inputs = made.collate(samples, RNG)
    assert backbone.text.decode(inputs["labels"].tolist()).split()[:2] == ["dark", "blue"]  # the right one is learned


def test_choices_of_texts_alone_are_ranked_as_those_of_pictures_are(tiny_backbone):
    backbone = tiny_backbone()
    backbone.model.logit_scale.data.zero_()
    assert task(backbone, "multiple_choice", images=0).answer_by == "similarity"  # a CLIP does not write by itself
    made = task(backbone, "multiple_choice", images=0, answer_by="ranking")
    assert made.needs == {"generate_text"}
    samples = choices(["red", "dark blue"], ["a circle", "blue", "green circle"])
    prompts, wanted, total, count = made._prompts(samples), [], 0.0, 0
    with torch.no_grad():
        for prompt, s in zip(prompts, samples):
            scores = []
            for j, choice in enumerate(s.fields["choices"]):
                before, after = backbone.text.ids([prompt, choice])
                after = [*after, backbone.text.eos_id]
                ids = torch.tensor([[backbone.text.bos_id, *before, *after]])
                logp = backbone.token_logits(backbone.no_pictures(1), ids)[0].double().log_softmax(-1)
                each = [logp[len(before) + k, token] for k, token in enumerate(after)]
                scores.append(sum(each[:-1]) / len(each[:-1]))
                if j == s.fields["answer"]:
                    total, count = total - sum(each), count + len(each)
            wanted.append(int(torch.stack(scores).argmax()))
        assert made.predict(backbone, None, samples, False) == wanted
        close(made.loss(backbone, None, made.collate(samples, RNG)).double(), total / count)


def test_choices_that_are_always_the_same_are_classes(tiny_backbone):
    samples = [sample(question="good ?", choices=["no", "yes"], answer=answer, question_id=i)
               for i, answer in enumerate([1, 1, 0, 0, 1])]
    made = task(tiny_backbone(), "multiple_choice", images=0, metric="F1")
    said = [1, 0, 0, 1, 1]
    metrics = made.score(said, samples)
    assert made.primary == "F1" and metrics["F1"] == pytest.approx(100 * 2 / 3)
    assert metrics["accuracy"] == 60 and metrics["Matthews"] == pytest.approx(100 * (2 * 1 - 1 * 1) / 6)
    assert made.closed(said, samples)[:2] == [("yes", "yes"), ("yes", "no")]
    assert "F1 is of 'yes'" in made.notes(samples)[0]
    other = choices(["a", "b"], ["c", "d"])
    assert "Matthews" not in task(tiny_backbone(), "multiple_choice", images=0).score([0, 0], other)
    with pytest.raises(UserError, match="F1 is of samples that have the same two choices"):
        made.score([0, 0], other)


def test_matching_orders_samples_by_scores_of_their_own(tiny_backbone):
    made = task(tiny_backbone(), "matching", images=0, labels=["0", "1", "2"], metric="Spearman")
    samples = [sample(text="a", text_pair="b", label=label, score=score)
               for label, score in (("0", 0.4), ("2", 1.6), ("1", 1.4), ("1", 0.6))]
    said = [(0.1, 0), (1.0, 1), (1.2, 1), (0.9, 1)]
    metrics = made.score(said, samples)
    assert made.primary == "Spearman" and metrics["Spearman"] == pytest.approx(80)  # 1 - 6 * 2 / (4 * 15)
    for s in samples:
        del s.fields["score"]
    assert made.score(said, samples)["Spearman"] == pytest.approx(100 * scipy.stats.spearmanr(
        [0.1, 1.0, 1.2, 0.9], [0, 2, 1, 1]).statistic)


@pytest.mark.parametrize("pictures", [0, 1])
def test_choices_are_compared_by_similarity(tiny_backbone, images, pictures):
    backbone = tiny_backbone()
    made = task(backbone, "multiple_choice", images=pictures, answer_by="similarity")
    samples = choices(["red", "dark blue"], ["circle", "blue", "green circle"], ["square", "red", "a", "yellow"],
                      ["b", "a"])
    total, wanted = 0.0, []
    with torch.no_grad():
        states = backbone.image_states(images) if pictures else None
        for i, s in enumerate(samples):
            question = s.fields["question"]
            query = states.embedding[i] if pictures else embedded(backbone, [question])[0]
            texts = embedded(backbone, [f"{question} {c}" if pictures else c for c in s.fields["choices"]])
            scores = texts.double() @ query.double()
            wanted.append(int(scores.argmax()))
            total -= (made.log_scale.exp().double() * scores).log_softmax(0)[s.fields["answer"]] / 4
        close(made.loss(backbone, states, made.collate(samples, RNG)).double(), total)
        for zero_shot in (True, False):
            assert made.predict(backbone, states, samples, zero_shot) == wanted
    made.loss(backbone, states, made.collate(samples, RNG)).backward()
    assert torch.isfinite(made.log_scale.grad)  # though some questions have fewer choices than others
    right = sum(w == s.fields["answer"] for w, s in zip(wanted, samples))
    assert made.score(wanted, samples) == {"accuracy": 25.0 * right}
    assert made.answers(wanted, samples, [1]) == [Answer(samples[1].fields["choices"][wanted[1]], wanted[1] == 2)]


def test_a_clip_s_zero_shot_choice_is_by_similarity(tiny_backbone, images):
    backbone = tiny_backbone()
    samples = choices(["red", "dark blue"], ["circle", "blue"], ["square", "red"], ["b", "a"])
    with torch.no_grad():
        states = backbone.image_states(images)
        ranked, similar = (task(backbone, "multiple_choice", answer_by=by).predict(backbone, states, samples, True)
                           for by in ("ranking", "similarity"))
    assert ranked == similar


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_matching_reads_all_parts_and_their_products(tiny_backbone, images, pictures):
    backbone = tiny_backbone()
    made = task(backbone, "matching", images=pictures, labels=["no", "maybe", "yes"])
    rows = 4 // max(pictures, 1)
    samples = [sample(text=f"a red {w}", text_pair=f"a {w}", label=label)
               for w, label in zip(("circle", "square", "shape", "color"), ("no", "yes", "maybe", "no"))][:rows]
    scores, logits, cosines = [], [], []
    with torch.no_grad():
        states = backbone.image_states(images[:rows * pictures]) if pictures else None
        for i, s in enumerate(samples):
            parts = [states.embedding[pictures * i + k] for k in range(pictures)]
            parts += embedded(backbone, [s.fields["text"]] + [s.fields["text_pair"]] * (not pictures)).unbind(0)
            parts = [part.double() for part in parts]
            cosines.append(sum(float(part @ parts[-1]) for part in parts[:-1]) / (len(parts) - 1))
            scaled = [part * 24 ** 0.5 for part in parts]
            features = scaled + [scaled[a] * scaled[b] for a in range(len(parts)) for b in range(a + 1, len(parts))]
            logits.append(made.head.weight.double() @ torch.cat(features) + made.head.bias.double())
            likely = logits[-1].softmax(0)
            scores.append(float(likely[1] + 2 * likely[2]))
        labels = [made.labels.index(s.fields["label"]) for s in samples]
        close(made.loss(backbone, states, made.collate(samples, RNG)).double(),
              -sum(row.log_softmax(0)[label] for row, label in zip(logits, labels)) / rows)
        predictions = made.predict(backbone, states, samples, False)
        close([score for score, _ in predictions], scores)
        assert [number for _, number in predictions] == [int(row.argmax()) for row in logits]
        unshot = made.predict(backbone, states, samples, True)
        close([score for score, _ in unshot], cosines)
        assert {number for _, number in unshot} == {None}


def test_zero_shot_labels_are_the_scores_cut_into_equal_parts(tiny_backbone):
    made = task(tiny_backbone(), "matching", labels=["no", "maybe", "yes"])
    scores = [0.5, 0.1, 0.9, 0.3, 0.7, 0.2]
    samples = [sample(text="a", label=label) for label in ("maybe", "no", "yes", "no", "yes", "no")]
    predictions = [(score, None) for score in scores]
    assert [said.text for said in made.answers(predictions, samples, range(6))] == [
        "maybe", "no", "yes", "maybe", "yes", "no"]
    metrics = made.score(predictions, samples)
    assert metrics["accuracy"] == pytest.approx(500 / 6) and metrics["AUC"] == 100
    assert made.score(predictions, [sample(text="a", label="no")] * 6).keys() == {"accuracy"}  # nothing to put in order


def test_samples_in_words():
    assert in_words({"question": "what?", "choices": ["a", "b"], "answer": 1}) == ("what? (a, b)", "b")
    assert in_words({"text": "a", "text_pair": "b", "label": "yes"}) == ("a / b", "yes")
    assert in_words({"question": "what?", "answers": ["x", "x", "y"]}) == ("what?", "x / y")
    assert in_words({"captions": ["p", "q"]}) == ("", "p / q")


def all_kinds(count=24):
    """Samples of every kind, with no, one and two pictures."""
    yield from tiny_samples(count)
    names = list(COLOURS)
    for i in range(count):
        colour, other = names[i % 4], names[(i + 1 + i % 2) % 4]
        picture, second = (Image.new("RGB", (40, 40), COLOURS[c]) for c in (colour, other))
        about = {"image_id": i, "question_id": i, "image": picture}
        texts = {"text": f"the color is {colour}", "text_pair": f"a {colour if i % 2 else other} shape"}
        match = {"label": "yes" if i % 2 else "no"}
        yield {**about, "task": "colours", "label": colour}
        yield {"task": "words", "label": colour, "text": texts["text"]}
        yield {**about, "task": "choice", "question": "what is the color?", "choices": [other, colour], "answer": 1}
        yield {"task": "text_choice", "question": texts["text"], "choices": [other, colour], "answer": 1,
               "question_id": i}
        yield {**about, "task": "fits", "text": texts["text_pair"], **match}
        yield {"task": "pair", "image_id": i, "images": [picture, second], "text": f"{colour} and {other}", **match}
        yield {"task": "texts", **texts, **match}


SECTIONS = {
    "colours": {"kind": "classification", "labels": list(COLOURS)},
    "words": {"kind": "classification", "labels": list(COLOURS), "images": 0, "templates": ["{label}"]},
    "choice": {"kind": "multiple_choice"}, "text_choice": {"kind": "multiple_choice", "images": 0},
    "fits": {"kind": "matching", "labels": ["no", "yes"]},
    "pair": {"kind": "matching", "labels": ["no", "yes"], "images": 2},
    "texts": {"kind": "matching", "labels": ["no", "yes"], "images": 0},
}


@pytest.fixture
def config_of(tiny_config, tmp_path):
    """Returns a function: names of tasks -> the configuration of a run over shards of all kinds."""
    write_shards(all_kinds(), tmp_path / "all", samples_per_shard=50)

    def make(*names, **sections):
        data = tiny_config(steps=12, lr=0.01).model_dump()
        shards = {split: str(tmp_path / "all" / "shard-*.tar") for split in ("train", "test")}
        tasks = {name: {**data["tasks"].get(name, SECTIONS.get(name)), **shards, "valid": [], "rows": 4}
                 for name in names}
        data["data"]["ignore_tasks"] = [name for name in (*data["tasks"], *SECTIONS) if name not in names]
        return parse_config({**data, "tasks": tasks, **sections})
    return make


def test_all_kinds_train_together_and_are_reported(config_of):
    config = config_of("retrieval", "vqa", "captioning", *SECTIONS)
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 150})})
    losses = {}
    train(config, on_step=lambda step, loss: losses.update({step: loss}))
    for name in config.tasks:
        assert sum(losses[s][name] for s in range(141, 151)) < sum(losses[s][name] for s in range(1, 11)), name
    results = compare(config.out)
    assert all(values["samples"] == 24 for values in results["tasks"].values())
    assert results["tasks"]["pair"]["adapted"].keys() == {"accuracy", "AUC"}
    with open(f"{config.out}/report.html") as page:
        text = page.read()
    assert "the color is red / a green shape" in text and "(green, red)" in text
    assert 'class="pictures"></div>' not in text and "<figure>\n<figcaption>" in text  # of tasks without
    json.loads(open(f"{config.out}/results.json").read(), parse_constant=lambda value: pytest.fail(value))  # noqa: SIM115


def test_tasks_of_texts_alone_leave_the_image_tower_alone(config_of):
    config = config_of("words", "texts", "text_choice")
    model = build_model(config)
    assert model.summary.modules["text"] > 0 and not any(n.startswith("image") for n in model.summary.layers)
    assert example_batch(model).images is None
    check_gradients(model)
    train(config)
    with pytest.raises(UserError, match=r"'image\.\*' matches nothing"):
        build_model(config_of("texts", adapter={"targets": ["image.*"]}))


@pytest.mark.parametrize("name", list(SECTIONS))
def test_every_adapter_of_each_new_kind_gets_a_gradient(config_of, name):
    check_gradients(build_model(config_of(name)))


def test_what_an_evaluation_keeps_is_forgotten_by_the_next():
    kept = Kept()
    assert [kept("a", lambda value=value: torch.tensor([value])).item() for value in (1, 2)] == [1, 1]
    kept.eval()
    assert kept("a", lambda: torch.tensor([3])).item() == 3
