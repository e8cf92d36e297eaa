"""Metrics against brute force, worked cases, and the scorers they come from."""

import math
import random

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from vl_mtl_lora.metrics.classification import (
    concordance,
    f1,
    matthews_correlation,
    mean_per_class_accuracy,
    spearman,
    topk_accuracy,
)


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


@pytest.mark.parametrize("classes", [2, 4])
def test_f1_and_matthews_are_scikit_learn_s(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 200)
    predictions = np.where(rng.random(200) < 0.6, labels, rng.integers(0, classes, 200))
    assert matthews_correlation(predictions, labels) == pytest.approx(
        100 * sklearn.metrics.matthews_corrcoef(labels, predictions))
    if classes == 2:
        assert f1(predictions, labels) == pytest.approx(100 * sklearn.metrics.f1_score(labels, predictions))
    assert matthews_correlation([1, 1, 1], [0, 1, 1]) == 0 == f1([0, 0], [0, 0])


def test_spearman_is_scipy_s():
    rng = np.random.default_rng(0)
    truths = rng.integers(0, 6, 100) / 2  # with many equal
    scores = truths + rng.normal(0, 1, 100)
    assert spearman(scores, truths) == pytest.approx(100 * scipy.stats.spearmanr(scores, truths).statistic)
    assert math.isnan(spearman([1.0, 2.0], [3, 3]))
