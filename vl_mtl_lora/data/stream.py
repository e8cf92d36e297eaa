"""Batches by their number: which samples they hold, decoded and collated; and one pass over a task for evaluation.

Batch number n is a function of the seed and n alone. Loader processes, ranks and resumed runs ask for the numbers that
are theirs, so nothing is read that another one uses, and nothing is skipped by reading it. With several ranks the
batches are used in turns: each rank takes one of a turn, and all of a turn have the same numbers of rows.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vl_mtl_lora.data.faults import Fault, FaultLog
from vl_mtl_lora.data.index import TaskIndex
from vl_mtl_lora.data.mixing import SampleOrder, Schedule, Turns
from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.errors import BadSample, UserError

_MOST_TRIED = 100  # samples in place of a batch's own, where none of these can be used


@dataclass
class Batch:
    """Samples sorted by task, in the router's order, and their P pictures in the same order.

    images: what the backbone collated, for most (P, 3, H, W); None without any picture. ids: (P,) each picture's task
    id, on the CPU. slices: the pictures of each task in it; of a task with k pictures per sample, sample i has numbers
    k * i to k * i + k - 1 of them. inputs: each task's own collated tensors. keys: of the samples. index: the batch's
    number.
    epochs: how often each task's samples have all been seen after this batch, 1.5 for one and a half times.
    checked: (task, fault or None) of every sample that was read. faults: those of them not told before.
    """

    images: Any
    ids: Tensor
    slices: dict[str, slice]
    inputs: dict[str, dict[str, Tensor]]
    keys: list[str]
    index: int = 0
    epochs: dict[str, float] = field(default_factory=dict)
    checked: list[tuple[str, Fault | None]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def to(self, device: torch.device) -> "Batch":
        """Everything but the ids, which stay on the host."""
        move = {"device": device, "non_blocking": True}
        inputs = {task: {k: v.to(**move) for k, v in parts.items()} for task, parts in self.inputs.items()}
        return replace(self, images=None if self.images is None else self.images.to(**move), inputs=inputs)


@dataclass(frozen=True)
class Feed:
    """One task's part of the stream: its samples, and how they become tensors.

    transform: PIL image -> one picture for the backbone. collate: (samples, rng) -> tensors of the task. side: see
    `decode_image`.
    """

    index: TaskIndex
    transform: Callable[[Image.Image], Any]
    collate: Callable[[list[Sample], random.Random], dict[str, Tensor]]
    side: int | None = None


class BatchStream(Dataset):
    """`stream[n]` is batch number n, from 0 on without end.

    rows: of each task in a batch, in the feeds' order; where they are no whole numbers, on the long average. turns:
    instead a batch has so many rows in all, of one task, the same for so many batches; on the long average as many of
    each; see `Turns`.
    ids: of the feeds' tasks; default: 0, 1 and so on. collate_images: the pictures of a batch -> the tensor of them.
    window: see `SampleOrder`.
    world: ranks that share the stream. used: (T,) samples of each task used before turn `start`, by however many ranks
    there then were; None for as many as there are now.
    """

    def __init__(self, feeds: Sequence[Feed], rows: Sequence[float], *, ids: Sequence[int] | None = None,
                 collate_images: Callable[[list], Any] = default_collate, seed: int = 0, window: int = 100_000,
                 world: int = 1, start: int = 0, used: Sequence[int] | None = None, turns: int = 0):
        self.feeds, self.seed, self.collate_images, self.world = list(feeds), seed, collate_images, world
        self.tasks = [feed.index.source.task for feed in self.feeds]
        self.ids = list(range(len(self.feeds)) if ids is None else ids)
        self.schedule = Turns(rows, seed=seed, each=turns) if turns else Schedule(rows, seed=seed)
        _, before = self.schedule(start)
        self._lead = [0] * len(feeds) if used is None else [n - world * first for n, first in zip(used, before)]
        self.orders = [SampleOrder(task, feed.index.sizes, seed=seed, window=window)
                       for task, feed in zip(self.tasks, self.feeds)]

    def __getitem__(self, number: int) -> "Batch | UserError":
        """A UserError is returned, not raised, so that it reaches the main process as it is."""
        try:
            return self._batch(number)
        except UserError as error:
            return error

    def places(self, number: int) -> tuple[list[list[tuple[int, int]]], list[float]]:
        """(each task's (epoch, row) of the samples of a batch, each task's epochs after it)."""
        turn, rank = divmod(number, self.world)
        counts, _ = self.schedule(turn)
        places = [[order(first + rank * count + i) for i in range(count)]
                  for order, count, first in zip(self.orders, counts, self.used(turn))]
        return places, [(first + self.world * count) / len(order)
                        for order, count, first in zip(self.orders, counts, self.used(turn))]

    def used(self, turn: int) -> list[int]:
        """(T,): samples of each task used before a turn."""
        _, before = self.schedule(turn)
        return [lead + self.world * first for lead, first in zip(self._lead, before)]

    def _batch(self, number: int) -> Batch:
        images, ids, slices, inputs, keys, checked = [], [], {}, {}, [], []
        rng = random.Random(f"{self.seed}/batch/{number}")
        places, epochs = self.places(number)
        for task_id, task, feed, rows in zip(self.ids, self.tasks, self.feeds, places):
            if not rows:
                continue
            with _pinned(rng.getrandbits(48)):
                pictures, samples = _read(feed, rows, checked)
            slices[task] = slice(len(images), len(images) + len(pictures))
            images += pictures
            ids += [task_id] * len(pictures)
            keys += [sample.key for sample in samples]
            inputs[task] = feed.collate(samples, rng)
        return Batch(self.collate_images(images) if images else None, torch.tensor(ids, dtype=torch.long), slices,
                     inputs, keys, number, dict(zip(self.tasks, epochs)), checked)


@contextmanager
def _pinned(seed: int) -> Iterator[None]:
    """Augmentation draws from the generators of torch (CPU), Python and numpy, according to its library: inside they
    have a seed, afterwards they are as they were."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _read(feed: Feed, places: Sequence[tuple[int, int]], checked: list) -> tuple[list, list[Sample]]:
    """(pictures, samples) at some places. One that is no good is replaced by another of them: the count stays.

    Where none of them is good, the samples that follow in the shards are tried.
    """
    task, good, (first_epoch, first) = feed.index.source.task, [], places[-1]
    after = ((first_epoch, (first + i) % len(feed.index)) for i in range(1, _MOST_TRIED))
    for number, (epoch, row) in enumerate(itertools.chain(places, after)):
        if number >= len(places) and good:
            break
        try:
            sample = feed.index.sample(row, epoch)
            good.append((_pictures(sample, feed.transform, feed.side), sample))
        except BadSample as problem:
            checked.append((task, feed.index.fault(row, problem)))
        else:
            checked.append((task, None))
    if not good:
        raise UserError(f"no sample of a batch of task {task} can be used, and none of those after it: "
                        + "; ".join(str(fault) for name, fault in checked[-3:] if name == task))
    good += [good[i % len(good)] for i in range(len(places) - len(good))]
    return [picture for pictures, _ in good for picture in pictures], [sample for _, sample in good]


def _pictures(sample: Sample, transform: Callable[[Image.Image], Any], side: int | None = None) -> list:
    """A sample's pictures, decoded and transformed. Raises BadSample."""
    decoded = [decode_image(image, side) for image in sample.images]
    try:
        return [transform(image) for image in decoded]
    except Exception as error:  # of a model's own preprocessing, say for a picture a thousand times as wide as high
        raise BadSample(f"image cannot be preprocessed: {type(error).__name__}: {error}") from error


def train_batches(stream: BatchStream, workers: int, *, faults: FaultLog | None = None, start: int = 0,
                  rank: int = 0) -> Iterator[Batch]:
    """A rank's batches of the turns from `start` on, without end.

    Args:
        workers: loader processes; 0: none, they are decoded here.
        faults: counts samples that cannot be used, and tells them.

    Raises:
        UserError: what the stream met; too many faults.
    """
    faults = faults or FaultLog()
    # A generator of its own: the loader must not draw from the one that dropout draws from, or resuming would shift it.
    loader = DataLoader(stream, batch_size=None, sampler=itertools.count(start * stream.world + rank, stream.world),
                        num_workers=workers,
                        prefetch_factor=4 if workers else None, generator=torch.Generator())
    items = iter(loader)
    while True:
        try:
            batch = next(items)
        except (ConnectionError, EOFError) as error:  # a process was gone while its batch was being taken over
            raise _death(error) from error
        if isinstance(batch, UserError):
            raise batch
        batch.faults = [fault for task, fault in batch.checked if faults.count(task, "picture", fault)]
        for feed in stream.feeds:
            task = feed.index.source.task
            if faults.seen(task, "picture") >= len(feed.index):  # as many as there are; none of before resuming counts
                faults.judge(task, "picture")
        yield batch


@contextmanager
def loader_deaths_told() -> Iterator[None]:
    """Around the use of `train_batches`: a loader process that was killed ends it with a UserError.

    torch tells of it by a signal, so that its error can come up at any place in the main process.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _death(error) from error


def _death(error: Exception) -> UserError:
    return UserError(f"a loader process has died, perhaps for want of memory ({type(error).__name__}: {error}): set "
                     "data.workers lower, and go on with --resume")


@dataclass
class EvalBatch:
    """Samples of one task and their pictures, each once.

    rows: of the samples in their index. image_rows: picture k of sample i of a task with K pictures per sample is
    `images[image_rows[K * i + k]]`. images: as in `Batch`.
    """

    samples: list[Sample]
    rows: list[int]
    images: Any
    image_rows: Tensor


def eval_batches(index: TaskIndex, transform: Callable[[Image.Image], Any], *, rows: int, faults: FaultLog,
                 collate_images: Callable[[list], Any] = default_collate,
                 among: Sequence[int] | None = None) -> Iterator[EvalBatch]:
    """One pass over a task's samples, or those in some rows of the index, in order, each good one exactly once.

    Raises:
        UserError: too many broken samples.
    """
    task, images = index.source.task, index.source.images
    pictures: dict[tuple[str, int], int] = {}  # (image id, number among the sample's) -> number in `decoded`
    samples, sample_rows, decoded, image_rows = [], [], [], []

    def flush() -> EvalBatch:
        batch = EvalBatch(list(samples), list(sample_rows), collate_images(decoded) if decoded else None,
                          torch.tensor(image_rows, dtype=torch.long))
        for part in (pictures, samples, sample_rows, decoded, image_rows):
            part.clear()
        return batch

    for row in range(len(index)) if among is None else among:
        try:
            sample = index.sample(row)
            names = [(sample.image_id, i) for i in range(images)]
            if any(name not in pictures for name in names):
                new = _pictures(sample, transform)
                pictures |= {name: len(decoded) + i for i, name in enumerate(names)}
                decoded += new
        except BadSample as problem:
            faults.count(task, "picture", index.fault(row, problem))
            continue
        faults.count(task, "picture")
        samples.append(sample)
        sample_rows.append(row)
        image_rows += [pictures[name] for name in names]
        if len(samples) == rows:
            yield flush()
    faults.judge(task, "picture")
    if samples:
        yield flush()
