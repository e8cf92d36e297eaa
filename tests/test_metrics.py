"""Metrics against brute force, worked cases, and the scorers they come from."""

import math
import random

import pytest

from vl_mtl_lora.metrics.classification import concordance, mean_per_class_accuracy, topk_accuracy


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
