"""Accuracy among classes, agreement of predictions and labels, and how well a score orders labels."""

from collections.abc import Callable, Sequence

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


def f1(predictions: Sequence[int], labels: Sequence[int], clusters: Sequence[int] | None = None) -> Metric:
    """Per cent F1 of class 1 among two (van Rijsbergen, Information Retrieval, 1979): 2 tp / (2 tp + fp + fn); 0 where
    it is neither there nor predicted."""
    def figures(counts: np.ndarray) -> np.ndarray:
        wrong = counts[:, 0, 1] + counts[:, 1, 0]
        return 200.0 * counts[:, 1, 1] / np.maximum(2 * counts[:, 1, 1] + wrong, 1)

    return _of_confusions(predictions, labels, clusters, figures)


def matthews_correlation(predictions: Sequence[int], labels: Sequence[int],
                         clusters: Sequence[int] | None = None) -> Metric:
    """100 times Matthews' correlation of labels and predictions, for K classes (Gorodkin, Computational Biology and
    Chemistry 28, 2004); 0 where either is always the same."""
    def figures(counts: np.ndarray) -> np.ndarray:
        total, true, said = counts.sum(axis=(1, 2)), counts.sum(axis=2), counts.sum(axis=1)
        right = np.trace(counts, axis1=1, axis2=2)
        shared = right * total - (true * said).sum(axis=1)
        spread = np.sqrt((total**2 - (true**2).sum(axis=1)) * (total**2 - (said**2).sum(axis=1)))
        return 100.0 * np.divide(shared, spread, out=np.zeros_like(shared), where=spread > 0)

    return _of_confusions(predictions, labels, clusters, figures)


def _of_confusions(predictions: Sequence[int], labels: Sequence[int], clusters: Sequence[int] | None,
                   figures: Callable[[np.ndarray], np.ndarray]) -> Metric:
    """A metric that hangs on the confusion matrix alone. figures: (R, K, K) counts by label and prediction -> (R,)."""
    clusters = np.arange(len(labels)) if clusters is None else np.asarray(clusters)
    size = 1 + max(1, *labels, *predictions)
    counts = np.zeros((int(clusters.max()) + 1, size, size))
    np.add.at(counts, (clusters, np.asarray(labels), np.asarray(predictions)), 1.0)
    flat = counts.reshape(len(counts), -1)
    return Metric(figures(counts.sum(axis=0, keepdims=True))[0], len(labels), len(counts),
                  lambda drawn: figures((drawn @ flat).reshape(len(drawn), size, size)))


def spearman(scores: Sequence[float], truths: Sequence[float], clusters: Sequence[int] | None = None) -> Metric:
    """100 times Spearman's rank correlation, equal values at their mean rank; nan where all are the same."""
    clusters = np.arange(len(scores)) if clusters is None else np.asarray(clusters)
    groups = [np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)[1] for values in (scores, truths)]

    def centred_ranks(weights: np.ndarray, group: np.ndarray) -> np.ndarray:
        """(R, n): each sample's rank less their mean, in a set that holds it as often as `weights` (R, n) says."""
        order = np.argsort(group, kind="stable")
        starts = np.searchsorted(group[order], np.arange(group.max() + 1))
        sizes = np.add.reduceat(weights[:, order], starts, axis=1)
        ranks = np.cumsum(sizes, axis=1) - sizes / 2  # less a half, which is centred away
        return ranks[:, group] - weights.sum(axis=1, keepdims=True) / 2

    def resampled(drawn: np.ndarray) -> np.ndarray:
        weights = drawn[:, clusters]
        x, y = (centred_ranks(weights, group) for group in groups)
        spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
        return 100.0 * np.divide((weights * x * y).sum(axis=1), spread, out=np.full(len(drawn), np.nan),
                                 where=spread > 0)

    count = int(clusters.max()) + 1
    return Metric(resampled(np.ones((1, count)))[0], len(scores), count, resampled)
