"""Losses and predictions of the tasks against slow references."""

import random

import pytest
import torch
import torch.nn.functional as F

from vl_mtl_lora import UserError, parse_config
from vl_mtl_lora.backbones.base import ImageStates
from vl_mtl_lora.backbones.generation import score_continuations
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.tasks import build_tasks, retrieval
from vl_mtl_lora.tasks.base import Answer, next_token_inputs
from vl_mtl_lora.tasks.retrieval import contrastive_loss, sigmoid_loss

ANSWERS = ["red", "blue", "dark blue"]


def task(backbone, kind, **options):
    data = {"out": "x", "backbone": {"name": "m"}, "tasks": {kind: {"train": "a", **options}}}
    return build_tasks(parse_config(data).tasks, backbone)[kind]


def sample(**fields):
    return Sample({"image_id": 0, **fields}, (), "k", "s")


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def names_of(groups):
    """(B, 2) names with one image to each group, and captions of their own."""
    return torch.tensor([[group, 100 + i] for i, group in enumerate(groups)])


def test_contrastive_loss_shares_the_mass_among_captions_of_one_image():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(4, 6, generator=generator).double(), dim=-1) for _ in range(2))
    groups = [0, 1, 0, 2]
    total = 0.0
    for queries, items in ((image, text), (text, image)):
        for i in range(4):
            logp = (5.0 * items @ queries[i]).log_softmax(0)
            right = [j for j in range(4) if groups[j] == groups[i]]
            total -= sum(logp[j] for j in right) / len(right) / 8
    got = contrastive_loss(image, text, names_of(groups), torch.tensor(5.0))
    torch.testing.assert_close(got.double(), total, atol=1e-6, rtol=1e-6)


def test_sigmoid_loss_is_the_paper_s_and_open_clip_s():
    from open_clip.loss import SigLipLoss

    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(4, 6, generator=generator).double(), dim=-1) for _ in range(2))
    groups = [0, 1, 0, 2]
    total = 0.0
    for i in range(4):
        for j in range(4):
            sign = 1.0 if groups[i] == groups[j] else -1.0
            total -= F.logsigmoid(sign * (8.0 * image[i] @ text[j] - 3.0)) / 4
    scale, bias = torch.tensor(8.0), torch.tensor(-3.0)
    got = sigmoid_loss(image, text, names_of(groups), scale, bias)
    torch.testing.assert_close(got.double(), total, atol=1e-6, rtol=1e-6)
    theirs = SigLipLoss()(image.float(), text.float(), scale, bias)
    torch.testing.assert_close(sigmoid_loss(image.float(), text.float(), names_of(range(4)), scale, bias), theirs)


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_sigmoid_loss_in_chunks_is_the_whole_one(monkeypatch, chunk):
    def slopes():
        generator = torch.Generator().manual_seed(0)
        parts = [torch.randn(4, 6, generator=generator).double().requires_grad_() for _ in range(2)]
        parts += [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (2.0, -3.0)]
        loss = sigmoid_loss(parts[0], parts[1], names_of([0, 1, 0, 2]), parts[2], parts[3])
        return [loss, *torch.autograd.grad(loss, parts)]

    whole = slopes()
    monkeypatch.setattr(retrieval, "_CHUNK", chunk)
    for got, expected in zip(slopes(), whole):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options,base,expected", [
    ({}, "softmax", ["log_scale"]), ({}, "sigmoid", ["bias", "log_scale"]),
    ({"loss": "sigmoid"}, "softmax", ["bias", "log_scale"]), ({"loss": "softmax"}, "sigmoid", ["log_scale"])])
def test_retrieval_takes_the_base_s_loss_or_the_config_s(tiny_backbone, options, base, expected):
    backbone = tiny_backbone()
    backbone.contrastive, backbone.logit_bias, backbone.log_scale = base, -7.0, 4.8
    made = task(backbone, "retrieval", **options)
    head = dict(made.named_parameters())
    assert sorted(head) == expected
    if "bias" in head:  # SigLIP's own start where the base has none
        assert head["bias"].item() == (-7.0 if base == "sigmoid" else -10.0)
    assert head["log_scale"].item() == pytest.approx(4.8 if "bias" in head else 4.60517, abs=1e-4)
    states = ImageStates(F.normalize(torch.randn(3, 24), dim=-1), None)
    inputs = made.collate([sample(image_id=i, captions=[c]) for i, c in enumerate(["a", "red", "blue"])],
                          random.Random(0))
    made.loss(backbone, states, inputs).backward()
    assert all(p.grad is not None and p.grad.abs() > 0 for p in head.values())


def test_ranking_by_similarity_learns_among_choices_and_predicts_the_nearest(tiny_backbone, images):
    backbone = tiny_backbone()
    backbone.capabilities = frozenset({"embed"})
    answers = [f"answer {i}" for i in range(12)]
    made = task(backbone, "vqa", answers=answers)
    assert made.answer_by == "similarity" and made.needs == {"embed"}
    samples = [sample(question=q, answers=[a]) for q, a in (("what ?", answers[3]), ("where ?", "none of these"))]
    questions = [s.fields["question"] for s in samples]
    inputs = made.collate(samples, random.Random(0))
    shown = [backbone.text.decode([t for t in row if t]) for row in inputs["tokens"].tolist()]
    assert len(shown) == 16 and shown[0] == backbone.text.decode(backbone.text.ids(["what ? answer 3"])[0])
    states = backbone.image_states(images[:2])
    got = made.loss(backbone, states, inputs)
    texts = backbone.encode_text(inputs["tokens"]).view(2, 8, -1)
    wanted = -torch.stack([(made.log_scale.exp() * texts[i] @ states.embedding[i]).log_softmax(0)[0]
                           for i in range(2)]).mean()
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        similar = torch.stack([states.embedding[i] @ backbone.encode_text(
            backbone.text.rows([f"{q} {a}" for a in answers])).T for i, q in enumerate(questions)])
    for zero_shot in (False, True):
        assert made.predict(backbone, states, samples, zero_shot) == [answers[i] for i in similar.argmax(1)]


def test_a_base_that_writes_answers_zero_shot_by_writing(tiny_backbone, images):
    backbone = tiny_backbone()
    backbone.writes = True
    states, samples = backbone.image_states(images), [sample(question="what ?", answers=["red"])] * 3
    ranked, written = task(backbone, "vqa", answers=ANSWERS), task(backbone, "vqa", max_new_tokens=3)
    scores = score_continuations(backbone, states, ranked._prompts(samples), ANSWERS)
    assert ranked.predict(backbone, states, samples, True) == [ANSWERS[i] for i in scores.argmax(1)]
    assert written.predict(backbone, states, samples, True) == written.predict(backbone, states, samples, False)


def test_an_answer_without_a_token_is_refused_at_build(tiny_backbone):
    backbone = tiny_backbone()
    backbone.text.ids = lambda texts: [[5] if text == "red" else [] for text in texts]
    with pytest.raises(UserError, match=r"tasks.vqa.answers: '\?!' has no token"):
        task(backbone, "vqa", answers=["red", "?!"])


def test_similarities_are_float32_also_under_autocast():
    from vl_mtl_lora.tasks.base import similarity

    image, text = (F.normalize(torch.randn(20, 64, generator=torch.Generator().manual_seed(i)), dim=-1) for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        got = similarity(image, text.T)
    assert torch.equal(got, image @ text.T)


def test_prompts_are_the_backbone_s_unless_the_config_has_one(tiny_backbone):
    backbone = tiny_backbone()
    backbone.prompts = {"vqa": "{question}!", "captioning": "describe"}
    assert task(backbone, "vqa").prompt == "{question}!" and task(backbone, "captioning").prompt == "describe"
    assert task(backbone, "captioning", prompt="").prompt == ""
    assert task(backbone, "vqa", prompt="Q {question}").prompt == "Q {question}"


def test_rows_of_one_image_or_one_caption_are_positives_of_each_other(tiny_backbone):
    rows = [(0, "a red circle"), (1, "blue"), (0, "red"), (2, "blue")]
    samples = [sample(image_id=i, captions=[caption]) for i, caption in rows]
    names = task(tiny_backbone(), "retrieval").collate(samples, random.Random(0))["names"]
    positives = (names[:, None] == names).any(dim=-1)
    assert positives.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]


def test_next_token_inputs_supervise_target_and_end_alone(tiny_backbone):
    text = tiny_backbone().text
    inputs = next_token_inputs(text, ["a", "what color"], ["red circle", "blue"])
    (a,), (what, color), (red, circle), (blue,) = text.ids(["a", "what color", "red circle", "blue"])
    assert inputs["tokens"].tolist() == [[text.bos_id, a, red, circle], [text.bos_id, what, color, blue]]
    assert inputs["positions"].tolist() == [1, 2, 3, 6, 7]
    assert inputs["labels"].tolist() == [red, circle, text.eos_id, blue, text.eos_id]


def test_a_prompt_too_long_is_cut_and_the_answer_kept(tiny_backbone):
    text = tiny_backbone().text
    inputs = next_token_inputs(text, ["red " * 50], ["blue"])
    assert inputs["tokens"].shape[1] == text.context_length - 1
    assert inputs["labels"].tolist() == [*text.ids(["blue"])[0], text.eos_id]
    assert inputs["positions"].tolist() == [text.context_length - 3, text.context_length - 2]


@pytest.mark.parametrize("kind,fields", [
    ("vqa", {"question": "what is it ?", "answers": ["red circle"]}), ("captioning", {"captions": ["a red circle"]})])
def test_next_token_loss_equals_a_loop_over_tokens(tiny_backbone, images, kind, fields):
    backbone = tiny_backbone()
    made = task(backbone, kind)
    other = {name: ["blue"] if isinstance(value, list) else "where ?" for name, value in fields.items()}
    samples = [sample(**fields), sample(**other)]
    states = backbone.image_states(images[:2])
    got = made.loss(backbone, states, made.collate(samples, random.Random(0)))
    losses = []
    for i, s in enumerate(samples):
        prompt = made.prompt.format(question=s.fields.get("question"))
        target = (s.fields.get("answers") or s.fields["captions"])[0]
        (before,), (after,) = backbone.text.ids([prompt]), backbone.text.ids([target])
        ids = [backbone.text.bos_id, *before, *after, backbone.text.eos_id]
        logits = backbone.token_logits(images[i:i + 1], torch.tensor([ids]))[0]
        losses += [-logits[j - 1].log_softmax(-1)[ids[j]] for j in range(len(before) + 1, len(ids))]
    torch.testing.assert_close(got, torch.stack(losses).mean())


@pytest.mark.parametrize("certain", [0.0, 30.0])
def test_scores_of_continuations_equal_the_mean_over_their_tokens(tiny_backbone, images, certain):
    backbone = tiny_backbone()
    prompts = ["what ?", "the color of it is", ""]
    answers = [*ANSWERS, "a red circle", "there is a", "blue blue blue blue"]
    passes = []
    plain, logits = backbone.token_states, backbone.logits
    ((red,),) = backbone.text.ids(["red"])
    backbone.logits = lambda states: logits(states) + certain * (torch.arange(backbone.model.vocab_size) == red)
    backbone.token_states = lambda *args: passes.append(1) or plain(*args)
    with torch.no_grad():
        got = score_continuations(backbone, backbone.image_states(images), prompts, answers)
        ran = len(passes)
        for i, prompt in enumerate(prompts):
            wanted, bound = [], []
            for answer in answers:
                (before,), (after,) = backbone.text.ids([prompt]), backbone.text.ids([answer])
                ids = [backbone.text.bos_id, *before, *after]
                logp = backbone.token_logits(images[i:i + 1], torch.tensor([ids]))[0].log_softmax(-1)
                each = [logp[len(before) + k, token] for k, token in enumerate(after)]
                wanted.append(sum(each) / len(after))
                bound.append(each[0] / len(after))
            wanted, bound = torch.stack(wanted), torch.stack(bound)
            assert got[i].argmax() == wanted.argmax()
            exact = (got[i] - wanted).abs() < 1e-3
            assert exact[wanted.argmax()] and exact[:2].all()
            torch.testing.assert_close(got[i][~exact], bound[~exact], atol=1e-3, rtol=1e-4)
            assert (bound[~exact] < wanted.max()).all()
    assert ran == (1 if certain else 5)  # where one answer is certain, none of the longer ones has a chance


def test_vqa_answers_by_each_way(tiny_backbone, images):
    backbone = tiny_backbone()
    states = backbone.image_states(images)
    samples = [sample(question=q, answers=["red"]) for q in ("what ?", "where is it ?", "what ?")]
    with torch.no_grad():
        ranked = task(backbone, "vqa", answers=ANSWERS)
        scores = score_continuations(backbone, states, ranked._prompts(samples), ANSWERS)
        assert ranked.predict(backbone, states, samples, False) == [ANSWERS[i] for i in scores.argmax(1)]
        texts = [[f"{s.fields['question']} {a}" for a in ANSWERS] for s in samples]
        similar = torch.stack([states.embedding[i] @ backbone.encode_text(backbone.tokenize(t)).T
                               for i, t in enumerate(texts)])
        assert ranked.predict(backbone, states, samples, True) == [ANSWERS[i] for i in similar.argmax(1)]
        written = task(backbone, "vqa", answer_by="generation", max_new_tokens=3)
        assert written.predict(backbone, states, samples, False) == backbone.generate(
            states, ranked._prompts(samples), max_new_tokens=3)
        head = task(backbone, "vqa", answers=ANSWERS, answer_by="classification")
        assert set(head.predict(backbone, states, samples, False)) <= set(ANSWERS)
    inputs = head.collate([*samples[:2], sample(question="what ?", answers=["green"])], random.Random(0))
    assert inputs["labels"].tolist() == [0, 0, -100]  # an answer outside the list is not learned
    assert torch.isfinite(head.loss(backbone, states, inputs))


def test_retrieval_scores_images_once_and_all_their_captions(tiny_backbone):
    backbone = tiny_backbone()
    made = task(backbone, "retrieval")
    samples = [sample(image_id=i, captions=c) for i, c in ((5, ["a", "b"]), (6, ["c"]), (5, ["d"]))]
    eye = torch.eye(3)
    predictions = [(eye[0], eye[[0, 0]]), (eye[1], eye[[1]]), (eye[0], eye[[0]])]
    metrics = made.score(predictions, samples)
    assert metrics["image_to_text_recall@1"] == 100 and metrics["text_to_image_recall@1"] == 100
    # By its first caption each picture is found first; the other picture comes after it, by its first row.
    assert made.answers(predictions, samples, [0, 1, 2]) == [
        Answer("picture at rank 1", True, ((0, True), (1, False))),
        Answer("picture at rank 1", True, ((1, True), (0, False))),
        Answer("picture at rank 1", True, ((0, True), (1, False)))]
    assert made.quality(predictions, samples) == [1, 1, 1]
    wrong = [(eye[1], eye[[0, 0]]), (eye[0], eye[[1]]), (eye[1], eye[[0]])]
    assert made.answers(wrong, samples, [1]) == [Answer("picture at rank 2", False, ((0, False), (1, True)))]
    assert made.quality(wrong, samples) == [0.5, 0.5, 0.5]


def test_a_task_whose_need_is_missing_fails_at_build(tiny_backbone):
    backbone = tiny_backbone()
    backbone.capabilities = frozenset({"embed"})
    with pytest.raises(UserError, match="captioning needs a backbone that can generate; this one can embed"):
        task(backbone, "captioning")
    task(backbone, "vqa", answers=ANSWERS, answer_by="classification")


def best_sequences(backbone, states, row, prompt, vocabulary, length):
    """Every sequence up to `length` tokens by mean log-probability: brute force over a masked vocabulary."""
    (start,) = backbone.text.ids([prompt])
    open_ends, closed = [([], 0.0)], []
    for _ in range(length):
        grown = []
        for tokens, score in open_ends:
            ids = torch.tensor([[backbone.text.bos_id, *start, *tokens]])
            logp = backbone.logits(backbone.token_states(states.rows(slice(row, row + 1)), ids)[0, -1]).log_softmax(-1)
            for token in vocabulary:
                entry = ([*tokens, token], score + float(logp[token]))
                (closed if token == backbone.text.eos_id else grown).append(entry)
        open_ends = grown
    return max(closed + open_ends, key=lambda entry: entry[1] / len(entry[0]))[0]


def test_beam_search_finds_the_best_sequence_and_greedy_the_likeliest_next(tiny_backbone, images):
    backbone = tiny_backbone()
    red, blue = (backbone.text.ids([w])[0][0] for w in ("red", "blue"))
    vocabulary = [red, blue, backbone.text.eos_id]
    plain = backbone.logits
    mask = torch.full((backbone.model.vocab_size,), float("-inf"))
    mask[vocabulary] = 0.0
    backbone.logits = lambda states: plain(states) + mask
    prompts = ["", "what color is it", "a"]
    with torch.no_grad():
        states = backbone.image_states(images)
        beams = backbone.generate(states, prompts, max_new_tokens=3, num_beams=27)
        greedy = backbone.generate(states, prompts, max_new_tokens=3)
        for row, prompt in enumerate(prompts):
            best = best_sequences(backbone, states, row, prompt, vocabulary, 3)
            assert beams[row] == backbone.text.decode(best)
            tokens = []
            (start,) = backbone.text.ids([prompt])
            while len(tokens) < 3 and (not tokens or tokens[-1] != backbone.text.eos_id):
                ids = torch.tensor([[backbone.text.bos_id, *start, *tokens]])
                tokens.append(int(backbone.token_logits(states.rows(slice(row, row + 1)), ids)[0, -1].argmax()))
            assert greedy[row] == backbone.text.decode(tokens)


def test_generation_of_a_mixed_batch_equals_each_task_alone(tiny_backbone, images):
    from tests.test_open_clip import randomize
    from vl_mtl_lora import AdapterConfig, TaskRouter, inject

    backbone = tiny_backbone()
    router = TaskRouter(["a", "b"])
    randomize(inject(backbone, AdapterConfig(rank=4), router))
    prompts = ["what color", "", "a red"]
    with router.use(torch.tensor([0, 1, 0])):
        mixed = backbone.generate(images, prompts, max_new_tokens=4, num_beams=3)
    for row, name in enumerate("aba"):
        with router.use(name):
            alone = backbone.generate(images[row:row + 1], prompts[row:row + 1], max_new_tokens=4, num_beams=3)
        assert alone == [mixed[row]]


def test_what_a_row_says_does_not_depend_on_its_neighbours(tiny_backbone, images):
    backbone = tiny_backbone()
    long = "red " * 27
    with torch.no_grad():
        alone = backbone.generate(images[:1], ["a"], max_new_tokens=10)
        assert backbone.generate(images, ["a", long, ""], max_new_tokens=10)[:1] == alone
        backbone.generate(images[:1], ["red " * 50], max_new_tokens=3)  # cut to what the context holds


def test_image_states_slice_by_rows():
    states = ImageStates(torch.arange(6).view(3, 2), None)
    assert states.rows(slice(1, 3)).embedding.tolist() == [[2, 3], [4, 5]] and states.rows(slice(0, 1)).prefix is None


def test_text_rows_are_trimmed(tiny_backbone):
    rows = tiny_backbone().text.rows(["a", "a red circle"])
    assert rows.shape == (2, 5) and rows[0, 3:].tolist() == [0, 0]
