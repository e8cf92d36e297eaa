"""Figures that know how sure they are: bootstrap intervals over clusters of samples, paired between two arms.

Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 8.3). Samples that
show one picture are no independent draws, so pictures are drawn, each with all its samples.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

RESAMPLES = 1000
_AT_ONCE = 4_000_000  # counts drawn at once


class Metric(float):
    """A figure over n units (questions, pictures, queries) that make up some clusters.

    resampled: (R, clusters), how often each cluster was drawn in each of R resamples -> (R,) figures.
    """

    n: int
    clusters: int
    resampled: Callable[[np.ndarray], np.ndarray]

    def __new__(cls, value: float, n: int, clusters: int, resampled: Callable[[np.ndarray], np.ndarray]) -> "Metric":
        metric = super().__new__(cls, value)
        metric.n, metric.clusters, metric.resampled = n, clusters, resampled
        return metric


def mean(values: Sequence[float], clusters: Sequence[int] | None = None, scale: float = 1.0) -> Metric:
    """scale * the mean of values (n,), which belong to clusters numbered from 0; each to one of its own where None."""
    values = np.asarray(values, dtype=np.float64)
    clusters = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    sums, counts = np.bincount(clusters, values), np.bincount(clusters)
    return Metric(scale * values.mean(), len(values), len(sums),
                  lambda drawn: scale * (drawn @ sums) / np.maximum(drawn @ counts, 1))


def median(values: Sequence[float], clusters: Sequence[int]) -> Metric:
    """The median of values (n,), the lower one of two in the middle, so that it is one of the values."""
    values, clusters = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    order = np.argsort(values, kind="stable")
    ordered, owners = values[order], clusters[order]

    def resampled(drawn: np.ndarray) -> np.ndarray:
        before = np.cumsum(drawn[:, owners], axis=1)
        return ordered[(before < before[:, -1:] / 2).sum(axis=1).clip(max=len(ordered) - 1)]

    return Metric(ordered[(len(ordered) - 1) // 2], len(values), int(clusters.max()) + 1, resampled)


def interval(metric: Metric, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of a figure; None where fewer than two clusters tell nothing of it."""
    return _percentiles(metric.clusters, resamples, seed, metric.resampled)


def paired_interval(before: Metric, after: Metric, resamples: int = RESAMPLES,
                    seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of after - before, both over the same samples, drawn alike; None as in `interval`.

    Raises:
        ValueError: the figures are over different clusters.
    """
    if before.clusters != after.clusters:
        raise ValueError(f"figures over {before.clusters} and {after.clusters} clusters are no pair")
    return _percentiles(after.clusters, resamples, seed,
                        lambda drawn: after.resampled(drawn) - before.resampled(drawn))


def _percentiles(clusters: int, resamples: int, seed: int,
                 figures: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float] | None:
    if clusters < 2:
        return None
    values = np.concatenate([figures(drawn) for drawn in _draws(clusters, resamples, seed)])
    values = values[~np.isnan(values)]  # a resample of one label only has no AUC
    return tuple(map(float, np.percentile(values, [2.5, 97.5]))) if len(values) else None


def _draws(clusters: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """(R, clusters) counts, each row of `clusters` draws with replacement; some resamples at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // clusters)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        numbers = rng.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        yield np.bincount(numbers.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(np.float64)
