"""The data sets that come in packages."""

import random


def test_example_captions_follow_from_the_annotations():
    from vl_mtl_lora.data.examples import COLOURS, SHAPES, easy_vqa_caption_samples, easy_vqa_samples, name_of

    facts = [("is there a red shape?", "no"), ("what shape is present?", "circle"), ("is no teal shape present?", "no")]
    assert (name_of(facts, SHAPES), name_of(facts, COLOURS)) == ("circle", "teal")
    assert name_of([("what color is the rectangle?", "blue")], SHAPES) == "rectangle"
    assert name_of([("is there a circle?", "no")], SHAPES) is None
    captions = {s["image_id"]: s["captions"][0] for s in easy_vqa_caption_samples("valid")}
    for sample in random.Random(0).sample(list(easy_vqa_samples("valid")), 300):
        words, answer = captions.get(sample["image_id"], "").split(), sample["answers"][0]
        if words and answer not in ("yes", "no"):
            assert answer in words


def test_example_splits_share_no_picture():
    from vl_mtl_lora.data.examples import easy_vqa_samples, emoji_samples

    paths = {split: {s["image"] for s in easy_vqa_samples(split)} for split in ("train", "valid", "test")}
    assert [len(p) for p in paths.values()] == [3800, 200, 1000]
    assert len(set.union(*paths.values())) == 5000
    drawings = {split: list(emoji_samples(split)) for split in ("valid", "test")}
    names = {split: {s["image_id"].rpartition("/")[2] for s in samples} for split, samples in drawings.items()}
    assert len(names["test"]) > 600 and not names["valid"] & names["test"]
    assert all(s["captions"] and all(c == c.lower() for c in s["captions"]) for s in drawings["test"])


def test_yes_no_questions_match_what_the_captions_tell():
    from vl_mtl_lora.data.examples import COLOURS, SHAPES, easy_vqa_reading_samples, name_of

    samples = list(easy_vqa_reading_samples("valid"))
    assert len(samples) > 500 and {s["label"] for s in samples} == {"yes", "no"}
    for sample in samples:
        words = sample["text_pair"].split()
        seen = {name for name in (*COLOURS, *SHAPES) if name in words}
        for names in (COLOURS, SHAPES):  # what question and answer leave open holds what the caption tells
            (told,) = seen & set(names)
            assert name_of([(sample["text"], sample["label"])], names) in (None, told)


def test_choices_are_names_of_one_category_and_stand_at_any_place():
    from vl_mtl_lora.data.examples import emoji_category_samples, emoji_choice_samples

    samples = list(emoji_choice_samples("test"))
    assert all(len(set(s["choices"])) == 4 for s in samples)
    assert {s["answer"] for s in samples} == {0, 1, 2, 3}
    category = {s["image_id"]: s["label"] for s in emoji_category_samples("test")}
    of_name = {}
    for s in samples:
        of_name.setdefault(s["choices"][s["answer"]], set()).add(category[s["image_id"]])
    for s in samples:
        assert all(category[s["image_id"]] in of_name[choice] for choice in s["choices"])
