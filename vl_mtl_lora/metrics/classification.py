"""Accuracy among ranked classes, and how well a score orders labels."""

from collections.abc import Sequence

import numpy as np


def topk_accuracy(ranked: Sequence[Sequence[int]], labels: Sequence[int], k: int) -> float:
    """Per cent of samples whose label is among the first k of its ranked classes."""
    return 100.0 * sum(label in list(classes)[:k] for classes, label in zip(ranked, labels)) / len(labels)


def mean_per_class_accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Per cent right of each class that occurs, and the mean of that over the classes, whatever their sizes."""
    hits: dict[int, list[bool]] = {}
    for prediction, label in zip(predictions, labels):
        hits.setdefault(label, []).append(prediction == label)
    return 100.0 * sum(sum(of_class) / len(of_class) for of_class in hits.values()) / len(hits)


def concordance(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Per cent of pairs of different labels whose higher label has the higher score; equal scores count half.

    With two labels that is the area under the ROC curve (Hanley and McNeil, Radiology 143, 1982); with more, Harrell's
    concordance index (JAMA 247, 1982). nan where all labels are the same.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    by_label = [np.sort(scores[labels == label]) for label in np.unique(labels)]
    right, pairs = 0.0, 0
    for i, low in enumerate(by_label):
        for high in by_label[i + 1:]:
            below = np.searchsorted(low, high, side="left")
            not_above = np.searchsorted(low, high, side="right")
            right += float((below + not_above).sum()) / 2
            pairs += len(low) * len(high)
    return 100.0 * right / pairs if pairs else float("nan")
