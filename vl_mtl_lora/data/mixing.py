"""The order of a task's samples and each task's rows in a batch, as functions of the seed and a number alone.

Nothing here depends on what was read before: any batch can be asked for first, by any process.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from vl_mtl_lora.errors import UserError

_CHUNK = 4096  # batches whose rows are drawn at once


class SampleOrder:
    """A task's endless order: in every epoch each of its samples once, shuffled anew.

    Shards are shuffled, put one after the other, and cut into windows; each window is shuffled. Files that lie in one
    place of the disk, or of a network, are so read together. A window as large as the set shuffles it whole.

    sizes: (shards,), samples of each. window: samples of a window.
    """

    def __init__(self, task: str, sizes: Sequence[int], *, seed: int, window: int):
        self._sizes, self._window = np.asarray(sizes, dtype=np.int64), window
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed = [seed, zlib.crc32(task.encode())]
        self._rows: tuple[tuple[int, int], np.ndarray] | None = None  # of the last window asked for

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def __call__(self, position: int) -> tuple[int, int]:
        """(epoch, row) of the sample at a position of the endless order."""
        epoch, place = divmod(position, len(self))
        window, place = divmod(place, self._window)
        if self._rows is None or self._rows[0] != (epoch, window):
            self._rows = (epoch, window), self._window_rows(epoch, window)
        return epoch, int(self._rows[1][place])

    def _window_rows(self, epoch: int, window: int) -> np.ndarray:
        shards = np.random.default_rng([*self._seed, epoch]).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[shards])
        places = np.arange(window * self._window, min((window + 1) * self._window, len(self)))
        at = np.searchsorted(ends, places, side="right")  # which of the shuffled shards
        rows = self._starts[shards[at]] + places - (ends - self._sizes[shards])[at]
        # From 1 on: a zero at its end makes no other seed, and the shards' order has drawn from [.., epoch].
        return np.random.default_rng([*self._seed, epoch, 1 + window]).permutation(rows)


class Schedule:
    """How many rows of each task a batch has: exactly `expected` where that is whole, else on the long average.

    The rows of a batch are drawn by systematic sampling: each count is the expected one rounded down or up, and a
    batch's counts always have the same sum.

    expected: (T,), with a whole sum.
    """

    def __init__(self, expected: Sequence[float], *, seed: int):
        self._bounds = np.concatenate([[0.0], np.cumsum(expected)])
        self._bounds[-1] = round(self._bounds[-1])
        self._seed = seed
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []  # counts of each batch, and the sums before each

    def __call__(self, batch: int) -> tuple[list[int], list[int]]:
        """(rows of each task in a batch, rows of each task in all batches before it)."""
        chunk, place = divmod(batch, _CHUNK)
        while len(self._chunks) <= chunk:
            draws = np.random.default_rng([self._seed, len(self._chunks)]).random((_CHUNK, 1))
            counts = np.diff(np.ceil(self._bounds - draws), axis=1).astype(np.int64)
            before = np.cumsum(counts, axis=0) - counts
            if self._chunks:
                last_counts, last_before = self._chunks[-1]
                before += last_counts[-1] + last_before[-1]
            self._chunks.append((counts, before))
        counts, before = self._chunks[chunk]
        return counts[place].tolist(), before[place].tolist()


class Turns:
    """Batches of one task each, all of the same size: the task is drawn, the more often the more rows are expected.

    expected: (T,), as of `Schedule`; their sum is a batch's rows. each: so many batches in a row have the same task.
    """

    def __init__(self, expected: Sequence[float], *, seed: int, each: int = 1):
        self._shares = np.asarray(expected, dtype=np.float64) / sum(expected)
        self._rows, self._seed, self._each = round(sum(expected)), seed, each
        self._counts: list[np.ndarray] = []  # (chunk, T) turns of each task before each turn, and before the next

    def __call__(self, batch: int) -> tuple[list[int], list[int]]:
        """(rows of each task in a batch, rows of each task in all batches before it)."""
        turn, part = divmod(batch, self._each)
        chunk, place = divmod(turn, _CHUNK)
        while len(self._counts) <= chunk:
            rng = np.random.default_rng([self._seed, len(self._counts)])
            drawn = np.eye(len(self._shares), dtype=np.int64)[rng.choice(len(self._shares), _CHUNK, p=self._shares)]
            start = self._counts[-1][-1] if self._counts else np.zeros_like(drawn[0])
            self._counts.append(start + np.concatenate([np.zeros_like(drawn[:1]), np.cumsum(drawn, axis=0)]))
        before, after = self._rows * self._counts[chunk][place:place + 2]
        return (after - before).tolist(), (self._each * before + part * (after - before)).tolist()


def expected_rows(by: str, sizes: Mapping[str, int], rows: int, minimum: Mapping[str, int], *,
                  temperature: float | None = None, cap: int | None = None,
                  weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """Each task's expected rows of a batch.

    Args:
        by: "proportional" to the task's samples; "temperature": to min(samples, cap) ** (1 / temperature), as T5
            (arXiv 1910.10683, section 3.5.2); "weights".
        sizes: samples of each task. rows: of a batch. minimum: the fewest rows of each task. A task that would have
            fewer gets them, and the others share the rest: no task is ever absent from a batch.

    Raises:
        UserError: a batch too small for the minima.
    """
    if by == "weights":
        shares = {task: float(weights[task]) for task in sizes}
    else:
        power = 1.0 / temperature if by == "temperature" else 1.0
        limit = cap if by == "temperature" and cap else max(sizes.values())
        shares = {task: min(size, limit) ** power for task, size in sizes.items()}
    if sum(minimum.values()) > rows:
        raise UserError(f"data.mixing.rows is {rows}, fewer than the tasks need at least: {sum(minimum.values())}")
    raised: set[str] = set()
    while True:
        left = rows - sum(minimum[task] for task in raised)
        total = sum(share for task, share in shares.items() if task not in raised)
        expected = {task: float(minimum[task]) if task in raised else left * share / total
                    for task, share in shares.items()}
        low = {task for task, value in expected.items() if value < minimum[task]}
        if not low:
            return expected
        raised |= low
