"""Accuracy among ranked classes, and how well a score orders labels."""

from collections.abc import Sequence

import numpy as np

from vl_mtl_lora.metrics.bootstrap import Metric, mean


def topk_accuracy(ranked: Sequence[Sequence[int]], labels: Sequence[int], k: int,
                  clusters: Sequence[int] | None = None) -> Metric:
    """Per cent of samples whose label is among the first k of its ranked classes."""
    return mean([label in list(classes)[:k] for classes, label in zip(ranked, labels)], clusters, 100.0)


def mean_per_class_accuracy(predictions: Sequence[int], labels: Sequence[int],
                            clusters: Sequence[int] | None = None) -> Metric:
    """Per cent right of each class that occurs, and the mean of that over the classes, whatever their sizes."""
    hits = np.asarray(predictions) == np.asarray(labels)
    clusters = np.arange(len(hits)) if clusters is None else np.asarray(clusters)
    _, classes = np.unique(labels, return_inverse=True)

    def resampled(drawn: np.ndarray) -> np.ndarray:
        total, drawn_classes = np.zeros(len(drawn)), np.zeros(len(drawn))
        for number in range(classes.max() + 1):
            weights = drawn[:, clusters[classes == number]]
            count = weights.sum(axis=1)
            total += (weights @ hits[classes == number]) / np.maximum(count, 1)
            drawn_classes += count > 0
        return 100.0 * total / drawn_classes

    count = int(clusters.max()) + 1
    return Metric(resampled(np.ones((1, count)))[0], len(hits), count, resampled)


def concordance(scores: Sequence[float], labels: Sequence[int], clusters: Sequence[int] | None = None) -> Metric:
    """Per cent of pairs of different labels whose higher label has the higher score; equal scores count half.

    With two labels that is the area under the ROC curve (Hanley and McNeil, Radiology 143, 1982); with more, Harrell's
    concordance index (JAMA 247, 1982). nan where all labels are the same.
    """
    labels = np.asarray(labels)
    clusters = np.arange(len(labels)) if clusters is None else np.asarray(clusters)
    values, places = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(len(values)))
    members = [labels[order] == label for label in np.unique(labels)]

    def resampled(drawn: np.ndarray) -> np.ndarray:
        weights = drawn[:, clusters[order]]
        by_label = [np.add.reduceat(weights * member, starts, axis=1) for member in members]  # (R, values) each
        right, pairs = np.zeros(len(drawn)), np.zeros(len(drawn))
        for i, low in enumerate(by_label):
            at_or_below = np.cumsum(low, axis=1) - low / 2
            for high in by_label[i + 1:]:
                right += (high * at_or_below).sum(axis=1)
                pairs += low.sum(axis=1) * high.sum(axis=1)
        return np.where(pairs > 0, 100.0 * right / np.maximum(pairs, 1), np.nan)

    count = int(clusters.max()) + 1
    return Metric(resampled(np.ones((1, count)))[0], len(labels), count, resampled)
