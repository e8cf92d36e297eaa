"""Intervals: against the textbook, against resampling by hand, and paired."""

import numpy as np
import pytest

from vl_mtl_lora.metrics.bootstrap import Metric, interval, mean, median, paired_interval
from vl_mtl_lora.metrics.classification import (
    concordance,
    f1,
    matthews_correlation,
    mean_per_class_accuracy,
    spearman,
    topk_accuracy,
)


def test_the_interval_of_a_mean_is_the_normal_one_where_there_are_many():
    values = np.random.default_rng(0).random(4000)
    low, high = interval(mean(values, scale=100.0), resamples=2000)
    half = 1.96 * 100 * values.std() / np.sqrt(4000)
    assert low == pytest.approx(100 * values.mean() - half, abs=0.05)
    assert high == pytest.approx(100 * values.mean() + half, abs=0.05)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        low, high = interval(mean(rng.random(60) < 0.3), resamples=400)
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 400 <= 0.98


def test_pictures_are_drawn_whole():
    """Ten questions that all say the same of one picture are one observation: the interval is that of the pictures."""
    values = np.random.default_rng(2).random(100)
    alone, repeated = mean(values), mean(np.repeat(values, 10), np.repeat(np.arange(100), 10))
    assert alone == repeated and (alone.n, repeated.n) == (100, 1000)
    assert interval(repeated) == pytest.approx(interval(alone))
    low, high = interval(mean(np.repeat(values, 10)))  # as if independent
    assert high - low < 0.5 * (interval(alone)[1] - interval(alone)[0])


def test_a_paired_interval_is_of_the_differences():
    rng = np.random.default_rng(3)
    before = rng.random(500)
    after = before + 0.01 + 0.001 * rng.standard_normal(500)
    assert paired_interval(mean(before), mean(after)) == pytest.approx(interval(mean(after - before)), abs=1e-12)
    assert paired_interval(mean(before), mean(after))[0] > 0  # though the arms' own intervals overlap widely
    with pytest.raises(ValueError, match="no pair"):
        paired_interval(mean(before), mean(after[:-1]))


def test_one_cluster_has_no_interval_and_draws_are_the_same_every_time():
    assert interval(mean([1.0, 0.0], [0, 0])) is None and paired_interval(mean([1.0]), mean([0.0])) is None
    values = np.random.default_rng(4).random(50)
    assert interval(mean(values)) == interval(mean(values)) != interval(mean(values), seed=1)


def drawn_by_hand(metric_of, values, clusters, drawn):
    """A figure of the samples of the clusters drawn, each as often as it was drawn."""
    rows = [i for cluster, count in enumerate(drawn) for _ in range(int(count)) for i in np.flatnonzero(
        np.asarray(clusters) == cluster)]
    return metric_of(*(np.asarray(part)[rows] for part in values))


@pytest.mark.parametrize("name", ["mean", "median", "accuracy", "per_class", "concordance", "f1", "matthews",
                                  "spearman"])
def test_resampled_figures_are_those_of_the_samples_drawn(name):
    rng = np.random.default_rng(5)
    clusters = np.sort(rng.integers(0, 12, 80))
    clusters = np.unique(clusters, return_inverse=True)[1]
    labels, predictions = rng.integers(0, 4, 80), rng.integers(0, 4, 80)
    scores = rng.integers(0, 9, 80) / 4
    metric_of, values = {
        "mean": (lambda v, c=None: mean(v, c), (scores,)),
        "median": (lambda v, c=None: median(v, np.arange(len(v)) if c is None else c), (scores,)),
        "accuracy": (lambda p, y, c=None: topk_accuracy(p[:, None], y, 1, c), (predictions, labels)),
        "per_class": (lambda p, y, c=None: mean_per_class_accuracy(p, y, c), (predictions, labels)),
        "concordance": (lambda s, y, c=None: concordance(s, y, c), (scores, labels)),
        "f1": (lambda p, y, c=None: f1(p, y, c), (predictions % 2, labels % 2)),
        "matthews": (lambda p, y, c=None: matthews_correlation(p, y, c), (predictions, labels)),
        "spearman": (lambda s, y, c=None: spearman(s, y, c), (scores, labels)),
    }[name]
    metric = metric_of(*values, clusters)
    assert isinstance(metric, Metric) and metric.n == 80 and metric.clusters == clusters.max() + 1
    drawn = rng.multinomial(metric.clusters, np.ones(metric.clusters) / metric.clusters, size=20).astype(float)
    by_hand = [drawn_by_hand(metric_of, values, clusters, row) for row in drawn]
    np.testing.assert_allclose(metric.resampled(drawn), by_hand, rtol=1e-12)
    assert metric.resampled(np.ones((1, metric.clusters)))[0] == pytest.approx(float(metric), abs=1e-12)
