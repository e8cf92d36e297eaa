"""Reading shards: one endless, seeded stream per task, mixed into batches of fixed quotas, decoded and collated.

The order of batches is a function of the seed alone. Every loader process walks the same raw stream and decodes only
the batches that are its own, so the number of processes changes nothing, and resuming skips without decoding.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.data.reader import Fault, FaultLog, Source, read_samples
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.errors import BadSample, UserError


class TaskStream:
    """A task's endless stream: passes over its shards in seeded order, through a seeded shuffle buffer."""

    def __init__(self, source: Source, known_tasks: Sequence[str], *, seed: int, shuffle: int, faults: FaultLog):
        self.source, self.known_tasks, self.faults = source, known_tasks, faults
        self.seed, self.shuffle = seed, shuffle
        self.epoch = 0

    def __iter__(self) -> Iterator[Sample]:
        while True:
            rng = random.Random(f"{self.seed}/{self.source.task}/{self.epoch}")
            yield from self._shuffled(self._one_pass(rng), rng)
            self.epoch += 1

    def _one_pass(self, rng: random.Random) -> Iterator[Sample]:
        urls = list(self.source.urls)
        rng.shuffle(urls)
        empty = True
        for sample in read_samples(self.source, self.known_tasks, self.faults, urls):
            empty = False
            yield sample
        if empty:
            raise UserError(_nothing_in(self.source))

    def _shuffled(self, samples: Iterator[Sample], rng: random.Random) -> Iterator[Sample]:
        buffer: list[Sample] = []
        for sample in samples:
            buffer.append(sample)
            if len(buffer) >= self.shuffle:
                i = rng.randrange(len(buffer))
                buffer[i], buffer[-1] = buffer[-1], buffer[i]
                yield buffer.pop()
        rng.shuffle(buffer)
        yield from buffer


@dataclass
class Batch:
    """Rows sorted by task, in the router's order; a task is the slice `slices[name]`.

    images: what the backbone collated, for most (B, 3, H, W). ids: (B,) task ids, on the CPU. inputs: each task's own
    collated tensors.
    """

    images: Any
    ids: Tensor
    slices: dict[str, slice]
    inputs: dict[str, dict[str, Tensor]]
    keys: list[str]
    index: int = 0
    faults: list[Fault] = field(default_factory=list)

    def to(self, device: torch.device) -> "Batch":
        """Everything but the ids, which stay on the host."""
        move = {"device": device, "non_blocking": True}
        inputs = {task: {k: v.to(**move) for k, v in parts.items()} for task, parts in self.inputs.items()}
        return replace(self, images=self.images.to(**move), inputs=inputs)


@dataclass(frozen=True)
class Quota:
    """One task's part of a batch: how many rows, from where, and how its samples become tensors.

    transform: PIL image -> one picture for the backbone. collate: (samples, rng) -> tensors of the task. side: see
    `decode_image`.
    """

    source: Source
    rows: int
    transform: Callable[[Image.Image], Any]
    collate: Callable[[list[Sample], random.Random], dict[str, Tensor]]
    side: int | None = None


class BatchStream(IterableDataset):
    """Endless mixed batches, starting with batch number `start`. The quotas' order gives the task ids.

    collate_images: pictures of all rows -> the batch of them. known_tasks: tags besides the quotas' own that may occur
    in the shards and are passed over.
    """

    def __init__(self, quotas: Sequence[Quota], *, collate_images: Callable[[list], Any] = default_collate,
                 known_tasks: Sequence[str] = (), seed: int = 0, shuffle: int = 2000, max_fault_share: float = 0.01,
                 start: int = 0):
        self.quotas, self.seed, self.shuffle, self.collate_images = list(quotas), seed, shuffle, collate_images
        self.known_tasks = [*(q.source.task for q in self.quotas), *known_tasks]
        self.max_fault_share, self.start = max_fault_share, start

    def __iter__(self) -> "Iterator[Batch | UserError]":
        """Batches; a UserError ends them, as an item, so that it reaches the main process as it is."""
        try:
            yield from self._batches()
        except UserError as error:
            yield error

    def _batches(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # Every process reads the whole stream, so the first one tells for all; pictures each decodes its own.
        reading, decoding = FaultLog(self.max_fault_share, quiet=worker > 0), FaultLog(self.max_fault_share)
        streams = [TaskStream(q.source, self.known_tasks, seed=self.seed, shuffle=self.shuffle, faults=reading)
                   for q in self.quotas]
        samples_of = [iter(stream) for stream in streams]
        told: set[Fault] = set()
        for index in itertools.count():
            samples = [[next(rows) for _ in range(q.rows)] for q, rows in zip(self.quotas, samples_of)]
            if index < self.start or (index - self.start) % workers != worker:
                continue
            batch = self._decode(samples, index, decoding)
            for stream in streams:
                if stream.epoch:  # all of the task's pictures have been decoded once, here or elsewhere
                    decoding.judge(stream.source.task, "picture")
            known = {**({} if reading.quiet else reading.faults), **decoding.faults}
            batch.faults = [fault for fault in known if fault not in told]
            told.update(batch.faults)
            yield batch

    def _decode(self, samples: list[list[Sample]], index: int, faults: FaultLog) -> Batch:
        images, ids, slices, inputs, keys = [], [], {}, {}, []
        rng = random.Random(f"{self.seed}/batch/{index}")
        for task_id, (quota, rows) in enumerate(zip(self.quotas, samples)):
            with _pinned(rng.getrandbits(48)):
                pixels, rows = _decode_rows(quota, rows, faults)
            slices[quota.source.task] = slice(len(images), len(images) + len(rows))
            images += pixels
            ids += [task_id] * len(rows)
            keys += [sample.key for sample in rows]
            inputs[quota.source.task] = quota.collate(rows, rng)
        return Batch(self.collate_images(images), torch.tensor(ids), slices, inputs, keys, index)


@contextmanager
def _pinned(seed: int) -> Iterator[None]:
    """Augmentation draws from torch's CPU generator: inside it has a seed, afterwards it is as it was."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _decode_rows(quota: Quota, samples: list[Sample], faults: FaultLog) -> tuple[list, list[Sample]]:
    """Decoded rows. A picture that cannot be decoded is replaced by another of the slice: quotas stay as they are."""
    good: list[tuple[Any, Sample]] = []
    for sample in samples:
        if (pixels := _pixels(sample, quota.transform, faults, quota.side)) is not None:
            good.append((pixels, sample))
    if not good:
        raise UserError(f"no picture of a whole batch of task {quota.source.task} can be decoded: "
                        + "; ".join(map(str, list(faults.faults)[-3:])))
    good += [good[i % len(good)] for i in range(len(samples) - len(good))]
    return [pixels for pixels, _ in good], [sample for _, sample in good]


def _pixels(sample: Sample, transform: Callable[[Image.Image], Any], faults: FaultLog, side: int | None = None) -> Any:
    """The decoded, transformed image, or None and a counted fault."""
    try:
        pixels = transform(decode_image(sample.images[0], side))
    except BadSample as problem:
        faults.count(sample.task, "picture", Fault(sample.shard, sample.key, str(problem)))
        return None
    faults.count(sample.task, "picture")
    return pixels


def _nothing_in(source: Source) -> str:
    more = " ..." if len(source.urls) > 3 else ""
    return f"no sample of task {source.task!r} in {', '.join(source.urls[:3])}{more}"


def train_batches(stream: BatchStream, workers: int) -> Iterator[Batch]:
    """Batches in the stream's order, decoded by so many loader processes, or here where `workers` is 0.

    Raises:
        UserError: what the stream met.
    """
    # A generator of its own: the loader must not draw from the one that dropout draws from, or resuming would shift it.
    loader = DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None,
                        generator=torch.Generator())
    items = iter(loader)
    while True:
        try:
            item = next(items)
        except (ConnectionError, EOFError) as error:  # a process was gone while its batch was being taken over
            raise _death(error) from error
        if isinstance(item, UserError):
            raise item
        yield item


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
    """Samples of one task and their pictures, each once: row i of the samples shows `images[image_rows[i]]`."""

    samples: list[Sample]
    images: Any  # as in Batch
    image_rows: Tensor  # (samples,)


def eval_batches(source: Source, known_tasks: Sequence[str], transform: Callable[[Image.Image], Any], *, rows: int,
                 faults: FaultLog, collate_images: Callable[[list], Any] = default_collate,
                 limit: int | None = None) -> Iterator[EvalBatch]:
    """One pass over a task's samples, in order, each good one exactly once; at most `limit` of them.

    Raises:
        UserError: too many broken samples, or none at all.
    """
    pictures: dict[str, int] = {}
    samples: list[Sample] = []
    images: list = []
    image_rows: list[int] = []
    count = 0

    def flush() -> EvalBatch:
        batch = EvalBatch(list(samples), collate_images(images), torch.tensor(image_rows))
        for part in (pictures, samples, images, image_rows):
            part.clear()
        return batch

    for sample in read_samples(source, known_tasks, faults):
        if limit is not None and count >= limit:
            break
        if sample.image_id not in pictures:
            pixels = _pixels(sample, transform, faults)
            if pixels is None:
                continue
            pictures[sample.image_id] = len(images)
            images.append(pixels)
        samples.append(sample)
        image_rows.append(pictures[sample.image_id])
        count += 1
        if len(samples) == rows:
            yield flush()
    faults.judge(source.task, "picture")
    if not count:
        raise UserError(_nothing_in(source))
    if samples:
        yield flush()
