"""Metrics against brute force, worked cases, and the scorers they come from."""

import math
import random

import pytest
import torch

from vl_mtl_lora.metrics.caption import caption_metrics, tokenize_caption
from vl_mtl_lora.metrics.classification import concordance, mean_per_class_accuracy, topk_accuracy
from vl_mtl_lora.metrics.retrieval import recall_at_k, retrieval_metrics
from vl_mtl_lora.metrics.vqa import normalize_answer, vqa_accuracy


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_recall_equals_brute_force_with_several_positives(chunk):
    generator = torch.Generator().manual_seed(0)
    queries, items = torch.randn(20, 8, generator=generator), torch.randn(50, 8, generator=generator)
    query_groups = torch.randint(0, 12, (20,), generator=generator)
    item_groups = torch.randint(0, 10, (50,), generator=generator)  # groups 10 and 11 have no right item
    got = recall_at_k(queries, items, query_groups, item_groups, ks=(1, 5, 10, 99), chunk=chunk)
    for k, share in got.items():
        hits = 0
        for query, group in zip(queries.double(), query_groups.tolist()):
            order = sorted(range(50), key=lambda i: -float(query @ items[i].double()))
            hits += any(int(item_groups[i]) == group for i in order[:k])
        assert share == hits / 20


def test_equal_scores_are_no_hit():
    same = torch.ones(4, 3)
    assert recall_at_k(same, same, torch.arange(4), torch.arange(4), ks=(1, 3, 4)) == {1: 0.0, 3: 0.0, 4: 1.0}


def test_embeddings_that_are_no_numbers_hit_nothing():
    broken = torch.full((4, 3), float("nan"))
    assert recall_at_k(broken, broken, torch.arange(4), torch.arange(4), ks=(1, 3)) == {1: 0.0, 3: 0.0}


def test_retrieval_metrics_go_both_ways_in_per_cent():
    images, texts = torch.eye(3), torch.eye(3)[[0, 0, 1, 2, 1]]  # the last caption belongs to image 2
    metrics = retrieval_metrics(images, torch.tensor([7, 8, 9]), texts, torch.tensor([7, 7, 8, 9, 9]))
    assert metrics["image_to_text_recall@1"] == pytest.approx(100 * 2 / 3)  # image 1 ties with a wrong caption
    assert metrics["text_to_image_recall@1"] == pytest.approx(100 * 4 / 5)


@pytest.mark.parametrize("raw,clean", [
    ("The Dog.", "dog"), ("two", "2"), ("dont", "don't"), ("3.5", "3.5"), ("1,000", "1000"), ("red/blue", "red blue"),
    ("a  man ", "man"), ("yes!", "yes"), ("none", "0"), ("well-known", "well known")])
def test_answers_are_normalised_as_the_official_script_does(raw, clean):
    assert normalize_answer(raw) == clean


def test_vqa_accuracy():
    humans = ["dog"] * 2 + ["cat"] * 8
    # Two of ten: leaving one out gives 1/3 twice and 2/3 eight times.
    assert vqa_accuracy("dog", humans) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("cat", humans) == 1.0
    assert vqa_accuracy("The cat!", humans) == 1.0  # answers differ, so both sides are normalised
    assert vqa_accuracy("The cat!", ["cat"] * 10) == 0.0  # the official script's quirk
    assert vqa_accuracy("The cat!", ["cat"] * 10, "lenient") == 1.0
    assert vqa_accuracy("red", ["red"]) == 1.0 and vqa_accuracy("blue", ["red"]) == 0.0
    assert vqa_accuracy("paris", ["Paris"]) == 1.0 and vqa_accuracy("red", ["red", "red"]) == 1.0
    assert vqa_accuracy("red", ["red", "red", "blue", "green"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3 + 2 / 3) / 4)


def test_caption_metrics_equal_the_scorers():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    told = ["a red circle on white", "two dogs play in the snow", "a bus"]
    truth = [["a red circle", "a round red shape on white"], ["two dogs playing in snow"], ["a big yellow bus drives"]]
    got = caption_metrics(told, truth)
    references, results = dict(enumerate(truth)), {i: [t] for i, t in enumerate(told)}
    assert got["CIDEr"] == pytest.approx(100 * Cider().compute_score(references, results)[0])
    assert got["BLEU-4"] == pytest.approx(100 * Bleu(4).compute_score(references, results, verbose=0)[0][3])
    assert got["CIDEr"] > 0 and got["BLEU-4"] > 0


def test_a_perfect_caption_scores_full_marks():
    texts = ["a red circle on the left", "a blue square at the top", "three green stars in a row"]
    assert caption_metrics(texts, [[t] for t in texts])["BLEU-4"] == pytest.approx(100, abs=1e-3)
    assert caption_metrics(texts, [[t] for t in texts])["CIDEr"] == pytest.approx(1000)


def test_caption_tokenizer():
    assert tokenize_caption("A dog's ball, on-the grass.") == "a dog's ball on the grass"


def test_ranked_accuracy_and_the_mean_over_classes():
    ranked, labels = [[0, 1], [1, 0], [2, 1], [1, 2]], [0, 0, 2, 2]
    assert topk_accuracy(ranked, labels, 1) == 50.0 and topk_accuracy(ranked, labels, 2) == 100.0
    # class 0: one of two; class 2: one of two; class 1 does not occur
    assert mean_per_class_accuracy([0, 1, 2, 1], labels) == 50.0
    assert mean_per_class_accuracy([0, 0, 0, 0], [0, 0, 0, 1]) == 50.0  # accuracy would be 75


@pytest.mark.parametrize("labels", [2, 3, 4])
def test_concordance_is_the_share_of_pairs_in_the_right_order(labels):
    rng = random.Random(labels)
    truth = [rng.randrange(labels) for _ in range(60)]
    scores = [round(rng.gauss(label, 1.5), 1) for label in truth]  # rounded, so that some are equal
    pairs = [(scores[i] - scores[j]) * (truth[i] - truth[j])
             for i in range(60) for j in range(i) if truth[i] != truth[j]]
    expected = 100 * sum(1.0 if product > 0 else 0.5 if product == 0 else 0.0 for product in pairs) / len(pairs)
    assert concordance(scores, truth) == pytest.approx(expected)
    assert math.isnan(concordance([1.0, 2.0], [1, 1]))
